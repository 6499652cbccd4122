"""Ridge regression as a classifier, in closed form: a Cholesky factorisation for each task in the space of its rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernelmeta.backends import select
from kernelmeta.ops import _checks
from kernelmeta.ops._differentiable import Args, DifferentiableOp
from kernelmeta.reference.ridge import ridge_with_coefficients

# Positions of the raw op's arguments.
_QUERY, _SUPPORT, _SCALE = 0, 2, 9
_DIFFERENTIABLE = (_QUERY, _SUPPORT, 8, 9, 10)

_ARGUMENTS = (
    "Tensor query, Tensor? query_index, Tensor support, Tensor? support_index, Tensor support_labels, "
    "Tensor? support_offsets, Tensor? query_offsets, Tensor? n_ways, Tensor regularization, Tensor scale, "
    "Tensor bias, int n_way, int max_support, int max_query"
)


def trace_size(S: int, Q: int, N: int) -> int:
    """Elements that one task's forward pass leaves for its backward pass: ``RidgeTrace`` in csrc/engine/ridge.h."""
    s, q = ((n + 15) // 16 * 16 for n in (S, Q))
    return S * s + s + N * s + S * q + N * q


def _fake(*args: Any) -> tuple[Tensor, ...]:
    n_way, save_trace = args[11], args[-1]
    support, query = _checks.row_shapes(*args[:4])
    new_empty = args[_SCALE].new_empty
    size: Any = 0
    if save_trace and args[5] is None:
        size = query[0] * trace_size(support[1], query[1], n_way)
    elif save_trace:  # it depends on the offsets
        size = torch.library.get_ctx().new_dynamic_size()
    return new_empty((*query, n_way)), new_empty((*support, n_way)), new_empty(size)


def _fake_backward(grad: Tensor, of_support: Tensor | None, trace: Tensor, *args: Any) -> tuple[Tensor, ...]:
    need_query, need_support = args[-2:]
    support, query = _checks.row_shapes(*args[:4])
    new_empty, D = args[_SCALE].new_empty, args[_QUERY].shape[-1]
    return (
        new_empty((*query, D) if need_query else 0),
        new_empty((*support, D) if need_support else 0),
        *(new_empty(p.shape) for p in args[8:11]),
    )


def _fallback(*args: Any) -> tuple[Tensor, ...]:
    query, query_index, support, support_index, labels, support_offsets, query_offsets, n_ways = args[:8]
    regularization, scale, bias, n_way, *most = args[8:14]
    logits, coefficients = ridge_with_coefficients(
        support.to(scale.dtype), labels, query.to(scale.dtype), regularization, scale, bias, n_way=n_way,
        support_index=support_index, query_index=query_index, support_offsets=support_offsets,
        query_offsets=query_offsets, n_ways=n_ways, **_checks.given_sizes(*most),
    )  # fmt: skip
    return logits.contiguous(), coefficients.contiguous(), scale.new_empty(0)


def _fallback_backward(grad: Tensor, of_support: Tensor | None, trace: Tensor, *args: Any) -> tuple[Tensor, ...]:
    need_query, need_support = args[-2:]
    inputs = list(args[:14])
    needs = dict.fromkeys(_DIFFERENTIABLE, True) | {_QUERY: need_query, _SUPPORT: need_support}
    with torch.enable_grad():
        for i in (_QUERY, _SUPPORT):  # gradients are those of the gathered rows
            if inputs[i + 1] is not None:
                inputs[i], inputs[i + 1] = inputs[i][inputs[i + 1]], None
        for i in _DIFFERENTIABLE:
            if needs[i]:
                inputs[i] = inputs[i].detach().requires_grad_()
        logits, coefficients, _ = _fallback(*inputs, False)
        outputs, grads = [logits], [grad]
        if of_support is not None:
            outputs.append(coefficients)
            grads.append(of_support)
        wanted = [inputs[i] for i in _DIFFERENTIABLE if needs[i]]
        found = iter(torch.autograd.grad(outputs, wanted, grads))
    return tuple(next(found).to(grad.dtype).contiguous() if needs[i] else grad.new_empty(0) for i in _DIFFERENTIABLE)


def _backward_args(args: Args, residuals: Args, grads: Args, needs: Any) -> Args:
    grad, of_support = grads
    if grad is None:
        _, query = _checks.row_shapes(*args[:4])
        grad = args[_SCALE].new_zeros(*query, args[11])
    return (grad, of_support, residuals[0], *args[:14], needs[_QUERY], needs[_SUPPORT])


OP = DifferentiableOp(
    "ridge",
    schema=f"({_ARGUMENTS}, bool save_trace) -> (Tensor, Tensor, Tensor)",
    backward_schema="(Tensor grad_logits, Tensor? grad_coefficients, Tensor trace, "
    f"{_ARGUMENTS}, bool need_query, bool need_support) -> ({', '.join(['Tensor'] * 5)})",
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


def ridge(
    support: Tensor,
    support_labels: Tensor,
    query: Tensor,
    regularization: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    n_way: int,
    return_coefficients: bool = False,
    support_index: Tensor | None = None,
    query_index: Tensor | None = None,
    support_offsets: Tensor | None = None,
    query_offsets: Tensor | None = None,
    n_ways: Tensor | None = None,
    max_support: int | None = None,
    max_query: int | None = None,
) -> Any:
    """``Z = scale x W^T + bias`` with W the ridge regression of the one-hot labels on the support rows of each task.

    W = Y^T (X X^T + regularization)^-1 X (Bertinetto et al. 2019, R2-D2, equation 6).

    Args:
        support: [T, S, D]; every class needs at least one row. Classes may have unequal counts.
        support_labels: [T, S] int64 in 0..N-1.
        query: [T, Q, D], at least one row a task.
        regularization, scale, bias: [1] each.
        n_way: N.
        return_coefficients: return alpha = (X X^T + regularization)^-1 Y too; W = alpha^T X.
        support_index, query_index, support_offsets, query_offsets, n_ways, max_support, max_query: rows of a bank, and
            tasks of unequal size, as in :func:`program`.

    Returns:
        Logits, [T, Q, N] or [sum Q, N], minus infinity beyond a task's own ways, in the dtype that all arguments
        promote to (under autocast float32 at least); with ``return_coefficients`` a pair of them and alpha,
        [T, S, N] or [sum S, N].

    Raises:
        ValueError: shapes, devices or labels that do not fit, named; a singular system, its task named (on a GPU
            that task gets NaN); a class without a support row; more ways than a task has rows.
        TypeError: features that are not floating point, labels, indices, offsets or ways that are not int64.
    """
    _checks.tensors(support=support, query=query, regularization=regularization, scale=scale, bias=bias)
    _checks.task_rows(
        support, support_labels, query, support_index, query_index, support_offsets, query_offsets, n_ways
    )
    sizes = _checks.task_sizes(max_support, max_query, support_offsets)
    _checks.ways(n_way)
    for name, tensor in (("regularization", regularization), ("scale", scale), ("bias", bias)):
        _checks.one_value(name, tensor)
    if support_index is not None and query_index is not None and (support.requires_grad or query.requires_grad):
        support, query = support[support_index], query[query_index]
        support_index = query_index = None
    parameters: Any = (regularization, scale, bias)
    precision = _checks.precisions((query, support, *parameters))
    if precision is not None:
        parameters = tuple(p.to(precision[0]) for p in parameters)
        if precision[0] is torch.float64:
            query, support = query.to(precision[0]), support.to(precision[0])
    backend = select(query.device.type)
    run = _fallback if backend == "reference" else OP.on(backend)
    logits, coefficients = run(
        query, query_index, support, support_index, support_labels, support_offsets, query_offsets, n_ways,
        *parameters, n_way, *sizes, False,
    )[:2]  # fmt: skip
    if precision is not None:
        logits, coefficients = logits.to(precision[1]), coefficients.to(precision[1])
    return (logits, coefficients) if return_coefficients else logits
