"""A training step's worth of :func:`sib` in one launch: the mean cross entropy of the query rows, and its gradients.

Where the loss is known beforehand, each task's backward pass can follow its forward pass at once, while its rows are
still in the cache and without a trace of all tasks in between.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernelmeta.ops import _checks, _training_step
from kernelmeta.ops._differentiable import LIBRARY, on_one_device
from kernelmeta.ops.sib_op import sib, sizes
from kernelmeta.reference import MLPParameters


class SIBGradients(NamedTuple):
    """What :func:`sib_gradients` returns."""

    loss: Tensor  # [], the mean cross entropy of all query rows
    accuracy: Tensor  # [], the share of query rows whose own class has the largest logit
    logits: Tensor  # [T, Q, N]
    norm_stats: Tensor | None  # [K, 2, 2, H], if asked for
    gradients: tuple[Tensor, ...]  # of weight, scale, bias and the ten of mlp


_SCHEMA = (
    "sib_gradients(Tensor query, Tensor? query_index, Tensor support, Tensor? support_index, Tensor support_labels, "
    "Tensor weight, Tensor scale, Tensor bias, Tensor weight1, Tensor bias1, Tensor gain1, Tensor shift1, "
    "Tensor weight2, Tensor bias2, Tensor gain2, Tensor shift2, Tensor weight3, Tensor bias3, Tensor? running_stats, "
    "Tensor query_labels, int steps, float inner_lr, bool return_stats) "
    f"-> ({', '.join(['Tensor'] * 16)})"
)  # measures [2], logits, stats, and the thirteen gradients


def _fake(*args: Any) -> tuple[Tensor, ...]:
    T, _, Q, N, _, H, K = sizes((*args[:19], args[20]))
    new_empty = args[6].new_empty
    stats = new_empty((K, 2, 2, H) if args[22] else 0)
    return new_empty(2), new_empty(T, Q, N), stats, *(new_empty(p.shape) for p in args[5:18])


LIBRARY.define(_SCHEMA)
torch.library.register_fake("kernelmeta::sib_gradients", on_one_device(_fake), lib=LIBRARY)
_RAW = torch.ops.kernelmeta.sib_gradients.default._op


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
        ValueError, TypeError: as :func:`sib`, and for query labels that do not fit.
    """
    parameters = (weight, scale, bias, *mlp)
    options: dict[str, Any] = {
        "steps": steps, "inner_lr": inner_lr, "reduction": reduction, "norm_stats": norm_stats,
        "running_stats": running_stats, "return_norm_stats": return_norm_stats, "support_index": support_index,
        "query_index": query_index,
    }  # fmt: skip
    step = _training_step.Step(support, support_labels, query, query_labels, parameters, options)
    try:
        if (
            norm_stats == "task"
            and (support_index is None) is (query_index is None)
            and _training_step.is_fused(query, support, parameters)
        ):
            rows = query if query_index is None else query_index
            lr = _checks.step_size(steps, inner_lr, reduction, rows.shape[1])
            features = (query, query_index, support, support_index, support_labels)
            with torch._C._AutoDispatchBelowAutograd():
                measures, logits, stats, *gradients = _RAW(
                    *features, *parameters, None, query_labels, steps, lr, return_norm_stats
                )
            loss, accuracy = measures.unbind()
            return SIBGradients(loss, accuracy, logits, stats if return_norm_stats else None, tuple(gradients))
    except Exception as error:
        _checks.explain(error, _one_after_the_other, step)
    return _one_after_the_other(step)


def _one_after_the_other(step: _training_step.Step) -> SIBGradients:
    support, query, parameters = step.support, step.query, step.parameters
    weight, scale, bias, *mlp = parameters
    _checks.tensors(support=support, query=query, weight=weight, scale=scale, bias=bias)
    _checks.mlp(mlp)

    def forward(leaves: list[Tensor]) -> tuple[Tensor, ...]:
        own, (s, b), of_mlp = leaves[0], leaves[1:3], MLPParameters(*leaves[3:])
        results = sib(support.detach(), step.support_labels, query.detach(), own, s, b, of_mlp, **step.options)
        return results if isinstance(results, tuple) else (results,)

    *found, stats = _training_step.one_after_the_other(forward, parameters, step.query_labels)
    loss, accuracy, logits, gradients = found
    return SIBGradients(loss, accuracy, logits, stats[0] if stats else None, gradients)
