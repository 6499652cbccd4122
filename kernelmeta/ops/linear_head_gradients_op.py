"""A training step's worth of :func:`linear_head` in one launch: the query rows' mean cross entropy, and its gradients.

As :func:`sib_gradients`: each task's backward pass follows its forward pass at once.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernelmeta.ops import _checks, _training_step
from kernelmeta.ops._signature import Signature
from kernelmeta.ops.linear_head_op import FEATURES, OPTIONS, PARAMETERS, fake, linear_head
from kernelmeta.phases import LABELLED
from kernelmeta.reference.task_rows import as_labels


class HeadGradients(NamedTuple):
    """What :func:`linear_head_gradients` returns."""

    loss: Tensor  # [], the mean cross entropy of all query rows
    accuracy: Tensor  # [], the share of query rows whose own class has the largest logit
    logits: Tensor  # [T, Q, N]
    gradients: tuple[Tensor, ...]  # of weight, bias and rates


_SIGNATURE = Signature(f"{FEATURES}, Tensor query_labels, {PARAMETERS}, {OPTIONS}")


def _fake(*args: Any) -> tuple[Tensor, ...]:
    call = _SIGNATURE.call(*args)
    logits, _ = fake(SimpleNamespace(**call._asdict(), return_weights=False))
    return logits.new_empty(2), logits, *(p.new_empty(p.shape) for p in (call.weight, call.bias, call.rates))


# -> measures [2], logits, and the three gradients
_RAW = _training_step.declare("linear_head_gradients", _SIGNATURE, 5, _fake)


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
        ValueError, TypeError: as :func:`linear_head`, and for query labels that do not fit; features that require a
            gradient.
    """
    parameters = (weight, bias, rates)
    options: dict[str, Any] = {
        "oracle": oracle, "first_order": first_order, "support_index": support_index, "query_index": query_index,
    }  # fmt: skip
    support_labels, query_labels = as_labels(support_labels), as_labels(query_labels)
    _checks.frozen(support=support, query=query)
    try:
        if (support_index is None) is (query_index is None) and _training_step.is_fused(query, support, parameters):
            args = _SIGNATURE.pack(
                support=support, support_index=support_index, query=query, query_index=query_index,
                support_labels=support_labels, query_labels=query_labels, weight=weight, bias=bias, rates=rates,
                oracle=LABELLED.index(oracle), first_order=first_order,
            )  # fmt: skip
            with torch._C._AutoDispatchBelowAutograd():
                measures, logits, *gradients = _RAW(*args)
            loss, accuracy = measures.unbind()
            return HeadGradients(loss, accuracy, logits, tuple(gradients))
    except Exception as error:
        given = {"support": support, "support_labels": support_labels, "query": query, "query_labels": query_labels}
        _checks.explain(error, _one_after_the_other, given | {"parameters": parameters, "options": options})
    return _one_after_the_other(support, support_labels, query, query_labels, parameters, options)


def _one_after_the_other(
    support: Tensor,
    support_labels: Tensor,
    query: Tensor,
    query_labels: Tensor,
    parameters: tuple[Tensor, ...],
    options: dict[str, Any],
) -> HeadGradients:
    weight, bias, rates = parameters
    _checks.tensors(support=support, query=query, weight=weight, bias=bias, rates=rates)

    def forward(leaves: list[Tensor]) -> tuple[Tensor, ...]:
        return (linear_head(support.detach(), support_labels, query.detach(), *leaves, **options),)

    loss, accuracy, logits, gradients, _ = _training_step.one_after_the_other(forward, parameters, query_labels)
    return HeadGradients(loss, accuracy, logits, gradients)
