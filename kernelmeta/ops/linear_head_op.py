"""Gradient descent on a linear head, from the labelled support rows of every task: ANIL's inner loop in one op.

All tasks start from the same head; what a task's head becomes is W - P^T X with its support rows X, so the steps need
their Gram matrix alone (csrc/engine/linear_head.h).
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from kernelmeta import reference
from kernelmeta.backends import is_traced, select
from kernelmeta.ops import _checks
from kernelmeta.ops._differentiable import DifferentiableOp
from kernelmeta.ops._trace import elements, padded
from kernelmeta.phases import LABELLED
from kernelmeta.reference.program import oracle_gradient
from kernelmeta.reference.task_rows import as_labels, gathered
from kernelmeta.tasks import Classifier

FEATURES = "Tensor support, Tensor? support_index, Tensor query, Tensor? query_index, Tensor support_labels"
PARAMETERS = "Tensor weight, Tensor bias, Tensor rates"
OPTIONS = "int oracle, bool first_order"


def fake(call: Any) -> tuple[Tensor, ...]:
    T, Q = call.query.shape[:2] if call.query_index is None else call.query_index.shape
    N, D = call.weight.shape
    new_empty = call.weight.new_empty
    return new_empty(T, Q, N), new_empty((T, N, D + 1) if call.return_weights else 0)


def _plain(call: Any) -> tuple[Tensor | None, ...]:
    """What the kernels do."""
    weight, bias = call.weight, call.bias
    support = gathered(call.support, call.support_index, "support").to(weight.dtype)
    query = gathered(call.query, call.query_index, "query").to(weight.dtype)
    targets = one_hot(call.support_labels, weight.shape[0]).to(weight.dtype)
    start = support @ weight.t() + bias
    gram = support @ support.transpose(-1, -2) + 1
    pull = torch.zeros_like(start)
    for rate in call.rates.unbind():
        G = oracle_gradient(LABELLED[call.oracle], start - gram @ pull, targets, mean=True)
        pull = pull + rate * (G.detach() if call.first_order else G)
    theta = weight - pull.transpose(-1, -2) @ (support.detach() if call.first_order else support)
    b = bias - pull.sum(-2)
    logits = query @ theta.transpose(-1, -2) + b.unsqueeze(-2)
    return logits, torch.cat([theta, b.unsqueeze(-1)], -1) if call.return_weights else None


def _trace(call: Any) -> Any:
    """``HeadTrace`` in csrc/engine/linear_head.h, of all tasks."""
    T, S = call.support_labels.shape
    N, D = call.weight.shape
    K, ld = call.rates.shape[0], padded(S)
    return T * elements((S, ld), (K, N, ld), (K + 1, N, ld), (N, D))


def _reference(call: Any) -> tuple[Tensor | None, ...]:
    if is_traced():  # (there is autograd inside of the reference)
        return _plain(call)
    support, query = (
        gathered(call.support, call.support_index, "support"),
        gathered(call.query, call.query_index, "query"),
    )
    dtype = call.weight.dtype
    logits, head = reference.linear_head(
        support.to(dtype), call.support_labels, query.to(dtype), call.weight, call.bias, call.rates,
        oracle=LABELLED[call.oracle], first_order=call.first_order, return_weights=True,
    )  # fmt: skip
    return logits, torch.cat([head.weight, head.bias.unsqueeze(-1)], -1) if call.return_weights else None


def _work(call: Any) -> int:
    (T, S), (N, D), K = call.support_labels.shape, call.weight.shape, call.rates.shape[0]
    Q = (call.query if call.query_index is None else call.query_index).shape[1]
    return T * (D * (S * S // 2 + (2 * S + Q) * N) + K * N * S * (S + 20))


OP = DifferentiableOp(
    "linear_head",
    f"{FEATURES}, {PARAMETERS}, {OPTIONS}, bool return_weights",
    results=("logits", "heads"),
    outputs=2,
    differentiable=("support", "query", "weight", "bias", "rates"),
    rows={"support": "support_index", "query": "query_index"},
    trace=_trace,
    fake=fake,
    plain=_plain,
    reference=_reference,
    work=_work,
)


# fmt: off
@overload
def linear_head(
    support: Tensor, support_labels: Tensor, query: Tensor, weight: Tensor, bias: Tensor, rates: Tensor, *,
    oracle: str = ..., first_order: bool = ..., return_weights: Literal[False] = ...,
    support_index: Tensor | None = ..., query_index: Tensor | None = ...,
) -> Tensor: ...
@overload
def linear_head(
    support: Tensor, support_labels: Tensor, query: Tensor, weight: Tensor, bias: Tensor, rates: Tensor, *,
    oracle: str = ..., first_order: bool = ..., return_weights: Literal[True],
    support_index: Tensor | None = ..., query_index: Tensor | None = ...,
) -> tuple[Tensor, Classifier]: ...
@overload
def linear_head(
    support: Tensor, support_labels: Tensor, query: Tensor, weight: Tensor, bias: Tensor, rates: Tensor, *,
    oracle: str = ..., first_order: bool = ..., return_weights: bool,
    support_index: Tensor | None = ..., query_index: Tensor | None = ...,
) -> Tensor | tuple[Tensor, Classifier]: ...
# fmt: on
def linear_head(
    support: Tensor,
    support_labels: Tensor,
    query: Tensor,
    weight: Tensor,
    bias: Tensor,
    rates: Tensor,
    *,
    oracle: str = "cross_entropy",
    first_order: bool = False,
    return_weights: bool = False,
    support_index: Tensor | None = None,
    query_index: Tensor | None = None,
) -> Tensor | tuple[Tensor, Classifier]:
    """K steps of gradient descent on a linear head, shared by all tasks at the start, on each task's support rows.

    ``theta <- theta - rates[k] * d loss / d theta`` of the mean loss over the S rows, for weights and bias alike: the
    inner loop of MAML (Finn et al. 2017, algorithm 2) for the last layer (ANIL; Raghu et al. 2020). The gradient of
    the result goes through all steps, exactly.

    Args:
        support: [T, S, D].
        support_labels: [T, S] int64 in 0..N-1; a class may have no row.
        query: [T, Q, D].
        weight, bias: [N, D] and [N], the head before the first step.
        rates: [K], the learning rate of every step.
        oracle: the loss: "cross_entropy", "squared_error" (against one-hot targets) or "hinge" (Weston & Watkins).
        first_order: take every step's gradient for a constant (first-order MAML).
        return_weights: return the heads after the last step too.
        support_index, query_index: [T, S] and [T, Q] int64, given together: then ``support`` and ``query`` are
            feature banks [n, D] (the same one or two) and the op reads its rows straight from them.

    Returns:
        The logits [T, Q, N] of the query rows, in the dtype that features and parameters promote to (under autocast
        float32 at least); with ``return_weights`` a pair of them and the heads after the last step.

    Raises:
        ValueError: shapes, devices, labels or options that do not fit, named.
        TypeError: features that are not floating point, labels or indices that are not int64.
    """
    support_labels = as_labels(support_labels)
    given: dict[str, Any] = {
        "support": support, "support_labels": support_labels, "query": query, "support_index": support_index,
        "query_index": query_index, "weight": weight, "bias": bias, "rates": rates, "oracle": oracle,
    }  # fmt: skip
    try:
        backend = select(query.device.type)
        if (support_index is None) != (query_index is None) or not _checks.by_kernel(backend):
            _check(**given)
        args = OP.arguments(
            support=support, support_index=support_index, query=query, query_index=query_index,
            support_labels=support_labels, weight=weight, bias=bias, rates=rates, oracle=LABELLED.index(oracle),
            first_order=first_order, return_weights=return_weights,
        )  # fmt: skip
        logits, heads = OP.run(backend, args)
    except Exception as error:
        _checks.explain(error, _check, given)
    return (logits, Classifier(heads[..., :-1], heads[..., -1])) if return_weights else logits


def _check(
    support: Tensor,
    support_labels: Tensor,
    query: Tensor,
    support_index: Tensor | None,
    query_index: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    rates: Tensor,
    oracle: str,
) -> None:
    _checks.tensors(support=support, query=query, weight=weight, bias=bias, rates=rates)
    T, S, Q = _checks.episode(support, support_index, query, query_index)
    if T and (S == 0 or Q == 0):
        raise ValueError(f"support and query: expected at least one row each, got {S} and {Q}")
    _checks.dimensions("weight", weight, "[N, D]")
    N, D = weight.shape
    if N == 0 or D == 0 or query.shape[-1] != D:
        raise ValueError(f"weight: expected shape [N, D] with D = {query.shape[-1]}, got {_checks.shape_text(weight)}")
    _checks.shape("bias", bias, (N,), "[N]")
    _checks.dimensions("rates", rates, "[K]")
    _checks.labels("support_labels", support_labels, (T, S), support)
    if oracle not in LABELLED:
        raise ValueError(f"oracle: expected one of {', '.join(LABELLED)}, got {oracle!r}")
