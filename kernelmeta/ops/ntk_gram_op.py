"""The neural tangent kernel of a perceptron on the rows of every task, without a Jacobian (csrc/engine/ntk_gram.h)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor

from kernelmeta.backends import select
from kernelmeta.ops import _checks, _perceptron
from kernelmeta.ops._differentiable import DifferentiableOp
from kernelmeta.ops._trace import padded
from kernelmeta.reference.ntk import TangentKernel, tangent_kernel
from kernelmeta.reference.task_rows import gathered


def _sizes(call: Any) -> tuple[Any, Any, Any, int]:
    """T, S, Q, N."""
    T, S = call.support.shape[:2] if call.support_index is None else call.support_index.shape
    Q = (call.query if call.query_index is None else call.query_index).shape[1]
    return T, S, Q, call.widths[-1]


def _fake(call: Any) -> tuple[Tensor, ...]:
    T, S, Q, N = _sizes(call)
    each = N if call.full else 1
    new_empty = call.parameters.new_empty
    return (
        new_empty(T, S * each, S * each), new_empty(T, Q * each, S * each), new_empty(T, S, N), new_empty(T, Q, N),
    )  # fmt: skip


def _plain(call: Any) -> tuple[Tensor | None, ...]:
    dtype = call.parameters.dtype
    layers = _perceptron.unpack(call.parameters, call.widths, call.biased)
    support, query = (
        gathered(call.support, call.support_index, "support").to(dtype),
        gathered(call.query, call.query_index, "query").to(dtype),
    )
    found = tangent_kernel(support, query, layers, call.slope, full=call.full)
    if not call.full:
        return found
    gram, cross = (kernel.flatten(3).flatten(1, 2) for kernel in found[:2])
    return gram, cross, found.support_outputs, found.query_outputs


def _trace(call: Any) -> Any:
    """``NtkTrace`` in csrc/engine/ntk_gram.h, of all tasks."""
    T, S, Q, _ = _sizes(call)
    return T * sum(_perceptron.hidden_elements(call.widths, padded(n)) for n in (S, Q))


def _work(call: Any) -> int:
    T, S, Q, N = _sizes(call)
    last, total = len(call.widths) - 2, 0
    for i, (inputs, units) in enumerate(pairwise(call.widths)):
        total += (S + Q) * inputs * (units + S)
        total += S * (S + Q) * units * N * (N if call.full else 1) if i < last else 0
        total += (S + Q) * N * inputs * units if 0 < i < last else 0
    return int(T * total)


OP = DifferentiableOp(
    "ntk_gram",
    "Tensor support, Tensor? support_index, Tensor query, Tensor? query_index, Tensor parameters, "
    f"{_perceptron.OPTIONS}, bool full",
    results=("gram", "cross", "support_outputs", "query_outputs"),
    outputs=4,
    differentiable=("support", "query", "parameters"),
    rows={"support": "support_index", "query": "query_index"},
    trace=_trace,
    fake=_fake,
    plain=_plain,
    work=_work,
)


def ntk_gram(
    support: Tensor,
    query: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None = None,
    *,
    full: bool = False,
    slope: float = 0.0,
    support_index: Tensor | None = None,
    query_index: Tensor | None = None,
) -> TangentKernel:
    """The neural tangent kernel of a perceptron on the rows of every task (Jacot et al., NeurIPS 2018).

    ``K[i, c, j, e] = <df_c(x_i)/dw, df_e(x_j)/dw>`` over all weights and biases, layer by layer,
    ``sum (A A^T + 1_bias) o (G G^T)`` with A the inputs of a layer and G the derivatives of the outputs in what it
    gives. Neither Jacobians nor the products of a layer are kept for more than a task at once. For any other module,
    :func:`kernelmeta.linear.ntk_gram`.

    Args:
        support: [T, S, D].
        query: [T, Q, D], or None for none.
        weights: of the linear layers, in order, [units, inputs] each, 1 to 8 of them; the last has N units. A (leaky)
            ReLU follows every layer but the last.
        biases: [units] each; no biases if None.
        full: keep the outputs apart.
        slope: of the leaky ReLU below zero, at least 0.
        support_index, query_index: rows of a bank, as in :func:`program`.

    Returns:
        A `TangentKernel`: ``gram`` [T, S, S] of the support rows, ``cross`` [T, Q, S] of the query rows with them,
        each the trace over the outputs (with ``full`` [T, rows, N, S, N]), and ``support_outputs``, ``query_outputs``
        [T, rows, N]; in the dtype that all arguments promote to (under autocast float32 at least).

    Raises:
        ValueError: shapes, devices or options that do not fit, named.
        TypeError: tensors that are not floating point, indices that are not int64.
    """
    if query is None:
        if support_index is None:
            query = support[:, :0]
        else:
            query, query_index = support, support_index[:, :0]
    _checks.tensors(support=support, query=query)
    T, S, Q = _checks.episode(support, support_index, query, query_index)
    if T and S == 0:
        raise ValueError("support: expected at least one row")
    _perceptron.check(weights, biases, query.shape[-1], slope)
    _checks.tensors(query=query, weights=weights[0])
    parameters, widths, biased = _perceptron.pack(weights, biases)
    args = OP.arguments(
        support=support, support_index=support_index, query=query, query_index=query_index, parameters=parameters,
        widths=widths, biased=biased, slope=slope, full=full,
    )  # fmt: skip
    gram, cross, *outputs = OP.run(select(query.device.type), args)
    if full:
        N = widths[-1]
        gram, cross = gram.view(T, S, N, S, N), cross.view(T, Q, N, S, N)
    return TangentKernel(gram, cross, *outputs)
