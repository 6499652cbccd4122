"""A training step's worth of :func:`linear_head` in one launch: the query rows' mean cross entropy, and its gradients.

As :func:`sib_gradients`: each task's backward pass follows its forward pass at once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernelmeta.ops import _checks, _training_step
from kernelmeta.ops._differentiable import LIBRARY, on_one_device
from kernelmeta.ops.linear_head_op import ARGUMENTS, linear_head, sizes
from kernelmeta.reference.phases import LABELLED


class HeadGradients(NamedTuple):
    """What :func:`linear_head_gradients` returns."""

    loss: Tensor  # [], the mean cross entropy of all query rows
    accuracy: Tensor  # [], the share of query rows whose own class has the largest logit
    logits: Tensor  # [T, Q, N]
    gradients: tuple[Tensor, ...]  # of weight, bias and rates


def _fake(*args: Any) -> tuple[Tensor, ...]:
    T, _, Q, N, D, K = sizes(args)
    new_empty = args[5].new_empty
    return new_empty(2), new_empty(T, Q, N), new_empty(N, D), new_empty(N), new_empty(K)


# -> measures [2], logits, and the three gradients
LIBRARY.define(f"linear_head_gradients({ARGUMENTS}, Tensor query_labels) -> ({', '.join(['Tensor'] * 5)})")
torch.library.register_fake("kernelmeta::linear_head_gradients", on_one_device(_fake), lib=LIBRARY)
_RAW = torch.ops.kernelmeta.linear_head_gradients.default._op


def linear_head_gradients(
    support: Tensor,
    support_labels: Tensor,
    query: Tensor,
    query_labels: Tensor,
    weight: Tensor,
    bias: Tensor,
    rates: Tensor,
    *,
    oracle: str = "cross_entropy",
    first_order: bool = False,
    support_index: Tensor | None = None,
    query_index: Tensor | None = None,
) -> HeadGradients:
    """The loss of one meta-training step of ANIL and its gradient in the head and the rates (Raghu et al. 2020).

    The same as :func:`linear_head`, the mean cross entropy of its logits and that one's backward pass, in less time
    and memory; outside of autograd. Features get no gradient: they are a frozen backbone's. On a CPU the three are one
    kernel; elsewhere they run one after the other.

    Args:
        support, support_labels, query, weight, bias, rates, ...: as in :func:`linear_head`.
        query_labels: [T, Q] int64 in 0..N-1.

    Raises:
        ValueError, TypeError: as :func:`linear_head`, and for query labels that do not fit.
    """
    parameters = (weight, bias, rates)
    options: dict[str, Any] = {
        "oracle": oracle, "first_order": first_order, "support_index": support_index, "query_index": query_index,
    }  # fmt: skip
    step = _training_step.Step(support, support_labels, query, query_labels, parameters, options)
    try:
        if (support_index is None) is (query_index is None) and _training_step.is_fused(query, support, parameters):
            features = (support, support_index, support_labels, query, query_index)
            with torch._C._AutoDispatchBelowAutograd():
                measures, logits, *gradients = _RAW(
                    *features, *parameters, LABELLED.index(oracle), first_order, query_labels
                )
            loss, accuracy = measures.unbind()
            return HeadGradients(loss, accuracy, logits, tuple(gradients))
    except Exception as error:
        _checks.explain(error, _one_after_the_other, step)
    return _one_after_the_other(step)


def _one_after_the_other(step: _training_step.Step) -> HeadGradients:
    support, query, parameters = step.support, step.query, step.parameters
    weight, bias, rates = parameters
    _checks.tensors(support=support, query=query, weight=weight, bias=bias, rates=rates)

    def forward(leaves: list[Tensor]) -> tuple[Tensor, ...]:
        return (linear_head(support.detach(), step.support_labels, query.detach(), *leaves, **step.options),)

    loss, accuracy, logits, gradients, _ = _training_step.one_after_the_other(forward, parameters, step.query_labels)
    return HeadGradients(loss, accuracy, logits, gradients)
