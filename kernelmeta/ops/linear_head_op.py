"""Gradient descent on a linear head, from the labelled support rows of every task: ANIL's inner loop in one op.

All tasks start from the same head; what a task's head becomes is W - P^T X with its support rows X, so the steps need
their Gram matrix alone (csrc/engine/linear_head.h).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from kernelmeta import reference
from kernelmeta.backends import select
from kernelmeta.ops import _checks
from kernelmeta.ops._differentiable import Args, DifferentiableOp, is_traced
from kernelmeta.reference.phases import LABELLED
from kernelmeta.reference.program import oracle_gradient

# Positions of the raw op's arguments.
_SUPPORT, _QUERY, _WEIGHT, _BIAS, _RATES = 0, 3, 5, 6, 7
_DIFFERENTIABLE = (_SUPPORT, _QUERY, _WEIGHT, _BIAS, _RATES)
ARGUMENTS = (
    "Tensor support, Tensor? support_index, Tensor support_labels, Tensor query, Tensor? query_index, Tensor weight, "
    "Tensor bias, Tensor rates, int oracle, bool first_order"
)
_RETURN_WEIGHTS = 10


def trace_size(N: int, S: int, D: int, K: int) -> int:
    """Elements that one task's forward pass leaves for its backward pass: ``HeadTrace`` in csrc/engine."""

    def padded(n: int) -> int:
        return (n + 15) // 16 * 16

    ld = padded(S)
    return padded(S * ld) + padded(K * N * ld) + padded((K + 1) * N * ld) + padded(N * D)


def _rows(features: Tensor, index: Tensor | None) -> Tensor:
    return features if index is None else features[index]


def sizes(args: Args) -> tuple[int, int, int, int, int, int]:
    """T, S, Q, N, D, K of the raw op's arguments."""
    support, support_index, _, query, query_index, weight, _, rates = args[:8]
    T, S = support.shape[:2] if support_index is None else support_index.shape
    Q = query.shape[1] if query_index is None else query_index.shape[1]
    return T, S, Q, *weight.shape, rates.shape[0]


def _fake(*args: Any) -> tuple[Tensor, ...]:
    T, S, Q, N, D, K = sizes(args)
    return_weights, save_trace = args[_RETURN_WEIGHTS:]
    new_empty = args[_WEIGHT].new_empty
    return (
        new_empty(T, Q, N),
        new_empty((T, N, D + 1) if return_weights else 0),
        new_empty((T, trace_size(N, S, D, K)) if save_trace else 0),
    )


def _fake_backward(grad_logits: Tensor, grad_heads: Tensor | None, trace: Tensor, *args: Any) -> tuple[Tensor, ...]:
    T, S, Q, N, D, K = sizes(args)
    need_support, need_query = args[-2:]
    new_empty = args[_WEIGHT].new_empty
    return (
        new_empty((T, S, D) if need_support else 0),
        new_empty((T, Q, D) if need_query else 0),
        new_empty(N, D),
        new_empty(N),
        new_empty(K),
    )


def _fallback(*args: Any) -> tuple[Tensor, ...]:
    """What the kernels do, in plain PyTorch."""
    support, support_index, labels, query, query_index, weight, bias, rates, oracle, first_order = args[:10]
    return_weights, _ = args[_RETURN_WEIGHTS:]
    support, query = (_rows(*pair).to(weight.dtype) for pair in ((support, support_index), (query, query_index)))
    targets = one_hot(labels, weight.shape[0]).to(weight.dtype)
    start = support @ weight.t() + bias
    gram = support @ support.transpose(-1, -2) + 1
    pull = torch.zeros_like(start)
    for rate in rates.unbind():
        G = oracle_gradient(LABELLED[oracle], start - gram @ pull, targets, mean=True)
        pull = pull + rate * (G.detach() if first_order else G)
    theta = weight - pull.transpose(-1, -2) @ (support.detach() if first_order else support)
    b = bias - pull.sum(-2)
    logits = query @ theta.transpose(-1, -2) + b.unsqueeze(-2)
    heads = torch.cat([theta, b.unsqueeze(-1)], -1) if return_weights else weight.new_empty(0)
    return logits, heads, weight.new_empty(0)


def _fallback_backward(grad_logits: Tensor, grad_heads: Tensor | None, trace: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *raw, need_support, need_query = args
    inputs: list[Any] = list(raw)
    for i in (_SUPPORT, _QUERY):  # gradients are those of the gathered rows
        inputs[i], inputs[i + 1] = _rows(inputs[i], inputs[i + 1]), None
    with torch.enable_grad():
        for i in _DIFFERENTIABLE:
            inputs[i] = inputs[i].detach().requires_grad_()
        logits, heads, _ = _fallback(*inputs, grad_heads is not None, False)
        outputs = [logits] if grad_heads is None else [logits, heads]
        grads = [grad_logits] if grad_heads is None else [grad_logits, grad_heads]
        wanted = [inputs[i] for i in _DIFFERENTIABLE]
        found = torch.autograd.grad(outputs, wanted, grads, allow_unused=True)
    needs = (need_support, need_query, True, True, True)
    return tuple(
        logits.new_empty(0) if not need else torch.zeros_like(i) if g is None else g.contiguous()
        for g, i, need in zip(found, wanted, needs, strict=True)
    )


def _backward_args(args: Args, residuals: Args, grads: Args, needs: Any) -> Args:
    grad_logits, grad_heads = grads
    if grad_logits is None:
        T, _, Q, N, _, _ = sizes(args)
        grad_logits = args[_WEIGHT].new_zeros(T, Q, N)
    if not args[_RETURN_WEIGHTS]:
        grad_heads = None  # of an empty tensor
    return (grad_logits, grad_heads, residuals[0], *args[:_RETURN_WEIGHTS], needs[_SUPPORT], needs[_QUERY])


OP = DifferentiableOp(
    "linear_head",
    schema=f"({ARGUMENTS}, bool return_weights, bool save_trace) -> (Tensor, Tensor, Tensor)",
    backward_schema=f"(Tensor grad_logits, Tensor? grad_heads, Tensor trace, {ARGUMENTS}, bool need_support, "
    f"bool need_query) -> ({', '.join(['Tensor'] * len(_DIFFERENTIABLE))})",
    fake=_fake,
    fake_backward=_fake_backward,
    fallback=_fallback,
    fallback_backward=_fallback_backward,
    differentiable=_DIFFERENTIABLE,
    n_outputs=2,
    n_private=1,
    backward_args=_backward_args,
    save=lambda args: (*args[:-1], True),
)


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
) -> Any:
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
        float32 at least); with ``return_weights`` a tuple of them and the heads [T, N, D + 1], weights then bias.

    Raises:
        ValueError: shapes, devices, labels or options that do not fit, named.
        TypeError: features that are not floating point, labels or indices that are not int64.
    """
    given = (support, support_index, support_labels, query, query_index, weight, bias, rates, oracle)
    try:
        logits, heads = _run(given, first_order, return_weights)
    except Exception as error:
        _checks.explain(error, _check, *given)
    return (logits, heads) if return_weights else logits


def _check(
    support: Tensor,
    support_index: Tensor | None,
    support_labels: Tensor,
    query: Tensor,
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


def _run(given: Args, first_order: bool, return_weights: bool) -> tuple[Tensor, Tensor]:
    support, support_index, support_labels, query, query_index, weight, bias, rates, oracle = given
    backend = select(query.device.type)
    if (support_index is None) != (query_index is None) or not _checks.by_kernel(backend):
        _check(*given)
    if support_index is not None and (support.requires_grad or query.requires_grad):
        support, query = _rows(support, support_index), _rows(query, query_index)
        support_index = query_index = None
    parameters: Any = (weight, bias, rates)
    precision = _checks.precisions((support, query, *parameters))
    if precision is not None:
        parameters = [p.to(precision[0]) for p in parameters]
        if precision[0] is torch.float64:
            support, query = support.to(precision[0]), query.to(precision[0])
    if backend == "reference":
        support, query = (_rows(*p).to(parameters[0].dtype) for p in ((support, support_index), (query, query_index)))
        form = _traceable if is_traced() else reference.linear_head
        logits, heads = form(
            support, support_labels, query, *parameters, oracle=oracle, first_order=first_order, return_weights=True
        )
    else:
        logits, heads = OP.on(backend)(
            support, support_index, support_labels, query, query_index, *parameters, LABELLED.index(oracle),
            first_order, return_weights, False,
        )[:2]  # fmt: skip
    if precision is not None:
        logits, heads = logits.to(precision[1]), heads.to(precision[1])
    return logits, heads


def _traceable(
    support: Tensor, labels: Tensor, query: Tensor, weight: Tensor, bias: Tensor, rates: Tensor, *, oracle: str,
    first_order: bool, return_weights: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The reference without autograd inside."""
    arguments = (support, None, labels, query, None, weight, bias, rates, LABELLED.index(oracle), first_order)
    return _fallback(*arguments, return_weights, False)[:2]
