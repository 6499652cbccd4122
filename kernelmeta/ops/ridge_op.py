"""Ridge regression as a classifier, in closed form: a Cholesky factorisation for each task in the space of its rows."""

from __future__ import annotations

import math
from typing import Any, Literal, overload

from torch import Tensor

from kernelmeta.backends import select
from kernelmeta.ops import _checks, _ragged
from kernelmeta.ops._differentiable import DifferentiableOp
from kernelmeta.ops._trace import elements, padded
from kernelmeta.reference.ridge import ridge_with_coefficients
from kernelmeta.reference.task_rows import as_labels
from kernelmeta.tasks import Ragged


def _fake(call: Any) -> tuple[Tensor, ...]:
    support, query, _ = _ragged.shapes(call)
    return call.scale.new_empty((*query, call.n_way)), call.scale.new_empty((*support, call.n_way))


def _plain(call: Any) -> tuple[Tensor, ...]:
    dtype = call.scale.dtype
    return ridge_with_coefficients(
        call.support.to(dtype), call.support_labels, call.query.to(dtype), call.regularization, call.scale, call.bias,
        n_way=call.n_way, support_index=call.support_index, query_index=call.query_index,
        ragged=_ragged.of_call(call),
    )  # fmt: skip


def _trace(call: Any) -> Any:
    """``RidgeTrace`` in csrc/engine/ridge.h, of all tasks."""
    (T, S), (_, Q), _ = _ragged.shapes(call)
    s, q, N = padded(S), padded(Q), call.n_way
    return T * elements((S, s), (S,), (N, s), (S, q), (N, q))


def _work(call: Any) -> int:
    """As if all tasks were of the same size."""
    support, query, T = _ragged.shapes(call)
    S, Q = (math.prod(rows) // max(T, 1) for rows in (support, query))
    return T * (S * (S // 2 + Q) * call.query.shape[-1] + S**3 // 3 + S * call.n_way * (S + Q))


OP = DifferentiableOp(
    "ridge",
    f"{_ragged.FEATURES}, Tensor regularization, Tensor scale, Tensor bias, int n_way, {_ragged.SIZES}",
    results=("logits", "coefficients"),
    outputs=2,
    differentiable=("support", "query", "regularization", "scale", "bias"),
    rows={"support": "support_index", "query": "query_index"},
    trace=_trace,
    fake=_fake,
    plain=_plain,
    work=_work,
)


# fmt: off
@overload
def ridge(
    support: Tensor, support_labels: Tensor, query: Tensor, regularization: Tensor, scale: Tensor, bias: Tensor, *,
    n_way: int, return_coefficients: Literal[False] = ...,
    support_index: Tensor | None = ..., query_index: Tensor | None = ..., ragged: Ragged | None = ...,
) -> Tensor: ...
@overload
def ridge(
    support: Tensor, support_labels: Tensor, query: Tensor, regularization: Tensor, scale: Tensor, bias: Tensor, *,
    n_way: int, return_coefficients: Literal[True],
    support_index: Tensor | None = ..., query_index: Tensor | None = ..., ragged: Ragged | None = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def ridge(
    support: Tensor, support_labels: Tensor, query: Tensor, regularization: Tensor, scale: Tensor, bias: Tensor, *,
    n_way: int, return_coefficients: bool,
    support_index: Tensor | None = ..., query_index: Tensor | None = ..., ragged: Ragged | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...
# fmt: on
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
    ragged: Ragged | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``Z = scale x W^T + bias`` with W the ridge regression of the one-hot labels on the support rows of each task.

    W = Y^T (X X^T + regularization)^-1 X (Bertinetto et al. 2019, R2-D2, equation 6).

    Args:
        support: [T, S, D]; every class needs at least one row. Classes may have unequal counts.
        support_labels: [T, S] int64 in 0..N-1.
        query: [T, Q, D], at least one row a task.
        regularization, scale, bias: [1] each.
        n_way: N.
        return_coefficients: return alpha = (X X^T + regularization)^-1 Y too; W = alpha^T X.
        support_index, query_index: rows of a bank, as in :func:`program`.
        ragged: tasks of unequal size, as in :func:`program`.

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
    support_labels = as_labels(support_labels)
    _checks.task_rows(support, support_labels, query, support_index, query_index, ragged)
    _checks.ways(n_way)
    for name, tensor in (("regularization", regularization), ("scale", scale), ("bias", bias)):
        _checks.one_value(name, tensor)
    args = OP.arguments(
        support=support, support_index=support_index, query=query, query_index=query_index,
        support_labels=support_labels, **_ragged.fields(ragged), regularization=regularization, scale=scale, bias=bias,
        n_way=n_way,
    )  # fmt: skip
    logits, coefficients = OP.run(select(query.device.type), args)
    return (logits, coefficients) if return_coefficients else logits
