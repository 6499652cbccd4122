"""A training step's worth of :func:`sib` in one launch: the mean cross entropy of the query rows, and its gradients.

Where the loss is known beforehand, each task's backward pass can follow its forward pass at once, while its rows are
still in the cache and without a trace of all tasks in between.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernelmeta.mlp_parameters import MLPParameters
from kernelmeta.ops import _checks, _training_step
from kernelmeta.ops._signature import Signature, mlp_of
from kernelmeta.ops.sib_op import FEATURES, OPTIONS, PARAMETERS, fake, loop_arguments, sib
from kernelmeta.reference.task_rows import as_labels


class SIBGradients(NamedTuple):
    """What :func:`sib_gradients` returns."""

    loss: Tensor  # [], the mean cross entropy of all query rows
    accuracy: Tensor  # [], the share of query rows whose own class has the largest logit
    logits: Tensor  # [T, Q, N]
    norm_stats: Tensor | None  # [K, 2, 2, H], if asked for
    gradients: tuple[Tensor, ...]  # of weight, scale, bias and the ten of mlp


_SIGNATURE = Signature(f"{FEATURES}, Tensor query_labels, {PARAMETERS}, {OPTIONS}, bool return_stats")


def _fake(*args: Any) -> tuple[Tensor, ...]:
    call = _SIGNATURE.call(*args)
    logits, _, stats = fake(SimpleNamespace(**call._asdict(), return_weights=False))
    parameters = (call.weight, call.scale, call.bias, *mlp_of(call))
    return call.scale.new_empty(2), logits, stats, *(p.new_empty(p.shape) for p in parameters)


# -> measures [2], logits, stats, and the thirteen gradients
_RAW = _training_step.declare("sib_gradients", _SIGNATURE, 16, _fake)


def sib_gradients(
    support: Tensor,
    support_labels: Tensor,
    query: Tensor,
    query_labels: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    mlp: MLPParameters,
    *,
    steps: int,
    inner_lr: float,
    reduction: str = "sum",
    norm_stats: str = "task",
    running_stats: Tensor | None = None,
    return_norm_stats: bool = False,
    support_index: Tensor | None = None,
    query_index: Tensor | None = None,
) -> SIBGradients:
    """The loss of one meta-training step of SIB and its gradient in every parameter (Hu et al. 2020, algorithm 1).

    The same as :func:`sib`, the mean cross entropy of its logits and that one's backward pass, in less time and
    memory; outside of autograd. Features get no gradient: they are a frozen backbone's. On a CPU the three are one
    kernel; elsewhere, and with "batch" statistics of several tasks, they run one after the other.

    Args:
        support, support_labels, query, weight, scale, bias, mlp, ...: as in :func:`sib`.
        query_labels: [T, Q] int64 in 0..N-1.

    Raises:
        ValueError, TypeError: as :func:`sib`, and for query labels that do not fit; features that require a gradient.
    """
    support_labels, query_labels = as_labels(support_labels), as_labels(query_labels)
    given = dict(locals())
    _checks.frozen(support=support, query=query)
    try:
        if (
            norm_stats == "task"
            and (support_index is None) is (query_index is None)
            and _training_step.is_fused(query, support, (weight, scale, bias, *mlp))
        ):
            rows = query if query_index is None else query_index
            args = _SIGNATURE.pack(
                start=support, start_index=support_index, query=query, query_index=query_index,
                support_labels=support_labels, query_labels=query_labels, weight=weight, **loop_arguments(given, rows),
            )  # fmt: skip
            with torch._C._AutoDispatchBelowAutograd():
                measures, logits, stats, *gradients = _RAW(*args)
            loss, accuracy = measures.unbind()
            return SIBGradients(loss, accuracy, logits, stats if return_norm_stats else None, tuple(gradients))
    except Exception as error:
        _checks.explain(error, _one_after_the_other, given)
    return _one_after_the_other(**given)


def _one_after_the_other(
    support: Tensor,
    support_labels: Tensor,
    query: Tensor,
    query_labels: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    mlp: MLPParameters,
    **options: Any,
) -> SIBGradients:
    _checks.tensors(support=support, query=query, weight=weight, scale=scale, bias=bias)
    _checks.mlp(mlp)

    def forward(leaves: list[Tensor]) -> tuple[Tensor, ...]:
        own, (s, b), of_mlp = leaves[0], leaves[1:3], MLPParameters(*leaves[3:])
        results = sib(support.detach(), support_labels, query.detach(), own, s, b, of_mlp, **options)
        return results if isinstance(results, tuple) else (results,)

    *found, stats = _training_step.one_after_the_other(forward, (weight, scale, bias, *mlp), query_labels)
    loss, accuracy, logits, gradients = found
    return SIBGradients(loss, accuracy, logits, stats[0] if stats else None, gradients)
