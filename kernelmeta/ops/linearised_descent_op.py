"""Gradient descent on a network that is linearised at its weights, from the support rows of every task, in one op.

A linearised network moves in the space of its neural tangent kernel; the kernel of a task stays in the task's memory
(csrc/engine/linearised_descent.h).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, overload

import torch
from torch import Tensor

from kernelmeta.backends import select
from kernelmeta.ops import _checks, _perceptron
from kernelmeta.ops._differentiable import DifferentiableOp
from kernelmeta.ops._padded_tasks import PaddedTasks
from kernelmeta.ops._trace import elements, padded
from kernelmeta.reference.ntk import loss_gradient, tangent_kernel, train_linearised
from kernelmeta.reference.task_rows import as_labels, check_label_range, gathered, one_hot_targets
from kernelmeta.tasks import Ragged

ORACLES = ("squared_error", "cross_entropy")
MOST_STEPS = 2**20


def _sizes(call: Any) -> tuple[Any, Any, Any, int]:
    """T, S, Q, N."""
    T, Q = call.query.shape[:2] if call.query_index is None else call.query_index.shape
    return T, call.targets.shape[1], Q, call.widths[-1]


def _fake(call: Any) -> tuple[Tensor, ...]:
    T, S, Q, N = _sizes(call)
    return call.parameters.new_empty(T, Q, N), call.parameters.new_empty(T, S, N)


def _rows(call: Any) -> tuple[Tensor, Tensor]:
    dtype = call.parameters.dtype
    support = gathered(call.support, call.support_index, "support")
    return support.to(dtype), gathered(call.query, call.query_index, "query").to(dtype)


def _plain(call: Any) -> tuple[Tensor | None, ...]:
    """In function space, as the kernels do it."""
    layers = _perceptron.unpack(call.parameters, call.widths, call.biased)
    support, query = _rows(call)
    kernel = tangent_kernel(support, query, layers, call.slope, full=True)
    gram = kernel.gram.flatten(3).flatten(1, 2)  # [T, S N, S N]
    oracle = ORACLES[call.cross_entropy]
    lr, kept = call.lr.reshape(()), 1 - call.lr.reshape(()) * call.weight_decay.reshape(())
    pulls = torch.zeros_like(call.targets)
    for _ in range(call.steps):
        moved = (gram @ pulls.flatten(1).unsqueeze(-1)).view_as(pulls)
        g = loss_gradient(kernel.support_outputs + moved, call.targets, oracle)
        pulls = kept * pulls - lr * call.row_weights.unsqueeze(-1) * g
    cross = kernel.cross.flatten(3).flatten(1, 2)
    outputs = kernel.query_outputs + (cross @ pulls.flatten(1).unsqueeze(-1)).view_as(kernel.query_outputs)
    return outputs, pulls


def _reference(call: Any) -> tuple[Tensor | None, ...]:
    layers = _perceptron.unpack(call.parameters, call.widths, call.biased)
    support, query = _rows(call)
    return train_linearised(
        support, call.targets, query, layers, call.row_weights, call.lr.reshape(()), call.weight_decay.reshape(()),
        steps=call.steps, oracle=ORACLES[call.cross_entropy], slope=call.slope,
    )  # fmt: skip


def _trace(call: Any) -> Any:
    """``DescentTrace`` in csrc/engine/linearised_descent.h, of all tasks."""
    T, S, Q, N = _sizes(call)
    s, q, n = padded(S), padded(Q), padded(N * S)
    layers = len(call.widths) - 1
    of_rows = sum(_perceptron.hidden_elements(call.widths, ld) for ld in (s, q, q, n))
    products = elements(*[(S, s)] * layers, *[(s, q)] * layers)
    return T * (of_rows + products + elements((N * S, n + 16), (n + 16,), (n + 16,)))


def _work(call: Any) -> int:
    T, S, Q, N = _sizes(call)
    R, total = N * S, call.steps * N * S * (N * S + 20)
    last = len(call.widths) - 2
    for i, (inputs, units) in enumerate(pairwise(call.widths)):
        total += (S + Q) * inputs * units + S * (S + Q) * (inputs + units)
        total += R * R * units if i < last else 0
        total += (Q + R * (i < last)) * inputs * units if i > 0 else 0
    return int(T * total)


OP = DifferentiableOp(
    "linearised_descent",
    "Tensor support, Tensor? support_index, Tensor query, Tensor? query_index, Tensor targets, Tensor row_weights, "
    f"Tensor parameters, Tensor lr, Tensor weight_decay, {_perceptron.OPTIONS}, int steps, bool cross_entropy",
    results=("outputs", "coefficients"),
    outputs=2,
    differentiable=("support", "query", "targets", "row_weights", "parameters", "lr", "weight_decay"),
    rows={"support": "support_index", "query": "query_index"},
    trace=_trace,
    fake=_fake,
    plain=_plain,
    reference=_reference,
    work=_work,
)


# fmt: off
@overload
def linearised_descent(
    support: Tensor, support_targets: Tensor, query: Tensor, weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None = ..., *, steps: int, lr: float | Tensor, weight_decay: float | Tensor = ...,
    oracle: str = ..., slope: float = ..., row_weights: Tensor | None = ..., return_coefficients: Literal[False] = ...,
    support_index: Tensor | None = ..., query_index: Tensor | None = ..., ragged: Ragged | None = ...,
) -> Tensor: ...
@overload
def linearised_descent(
    support: Tensor, support_targets: Tensor, query: Tensor, weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None = ..., *, steps: int, lr: float | Tensor, weight_decay: float | Tensor = ...,
    oracle: str = ..., slope: float = ..., row_weights: Tensor | None = ..., return_coefficients: Literal[True],
    support_index: Tensor | None = ..., query_index: Tensor | None = ..., ragged: Ragged | None = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def linearised_descent(
    support: Tensor, support_targets: Tensor, query: Tensor, weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None = ..., *, steps: int, lr: float | Tensor, weight_decay: float | Tensor = ...,
    oracle: str = ..., slope: float = ..., row_weights: Tensor | None = ..., return_coefficients: bool,
    support_index: Tensor | None = ..., query_index: Tensor | None = ..., ragged: Ragged | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...
# fmt: on
def linearised_descent(
    support: Tensor,
    support_targets: Tensor,
    query: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None = None,
    *,
    steps: int,
    lr: float | Tensor,
    weight_decay: float | Tensor = 0.0,
    oracle: str = "squared_error",
    slope: float = 0.0,
    row_weights: Tensor | None = None,
    return_coefficients: bool = False,
    support_index: Tensor | None = None,
    query_index: Tensor | None = None,
    ragged: Ragged | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """K steps of gradient descent on a perceptron linearised at its weights, on each task's support rows.

    ``f(x; w) = f(x; w0) + df/dw(x; w0) (w - w0)``, and ``w <- w - lr (dL/dw + weight_decay (w - w0))`` with L the sum
    over support rows of their weights times ``|f - y|^2 / 2`` or ``-sum y log softmax(f)``. All tasks start from the
    same weights. The steps run on the task's neural tangent kernel (Jacot et al. 2018; Lee et al. 2019), which is not
    kept; the gradient goes through all steps, exactly, and takes no more memory for more of them (but for one level
    of checkpoints, 16 times the coefficients, for each factor of 16).

    Args:
        support: [T, S, D].
        support_targets: y, [T, S, N]; or labels [T, S] int64 in 0..N-1, made one-hot.
        query: [T, Q, D].
        weights: of the linear layers, in order, [units, inputs] each, 1 to 8 of them; the last has N units. A (leaky)
            ReLU follows every layer but the last.
        biases: [units] each; no biases if None.
        steps: K, at most 2^20.
        lr, weight_decay: numbers or tensors of one value, which get gradients. The decay is towards w0.
        oracle: "squared_error" or "cross_entropy".
        slope: of the leaky ReLU below zero, at least 0.
        row_weights: [T, S], how much a row counts; 1 / S each if None (1 / a task's own rows).
        return_coefficients: return p too, with w - w0 = sum over support rows and outputs of p df/dw.
        support_index, query_index: rows of a bank, as in :func:`program`.
        ragged: tasks of unequal size, as in :func:`program`; its ``n_ways`` must be None.

    Returns:
        The outputs of the query rows, [T, Q, N] or [all query rows, N], in the dtype that all arguments promote to
        (under autocast float32 at least); with ``return_coefficients`` a pair of them and p, [T, S, N] or
        [all support rows, N].

    Raises:
        ValueError: shapes, devices, labels or options that do not fit, named.
        TypeError: tensors that are not floating point, indices that are not int64.
    """
    support_targets = as_labels(support_targets)
    _check(
        support, support_targets, query, weights, biases, steps, lr, weight_decay, oracle, slope, row_weights,
        support_index, query_index, ragged,
    )  # fmt: skip
    if not support_targets.is_floating_point():
        check_label_range(support_targets, len(weights[-1]))
        support_targets = one_hot_targets(support_targets, len(weights[-1]), weights[-1].dtype)
    rates = [r if isinstance(r, Tensor) else weights[-1].new_tensor([r]) for r in (lr, weight_decay)]
    dtype = support_targets.dtype
    if ragged is not None:
        all_query = query if query_index is None else query_index
        padded_tasks = PaddedTasks(ragged, support_targets.shape[0], all_query.shape[0])
        support_index, query_index = padded_tasks.indices(support_index, query_index)
        support_targets = padded_tasks.of_support(support_targets)
        row_weights = padded_tasks.row_weights(row_weights, dtype)
    elif row_weights is None:
        row_weights = support_targets.new_full(support_targets.shape[:2], 1 / support_targets.shape[1])
    parameters, widths, biased = _perceptron.pack(weights, biases)
    args = OP.arguments(
        support=support, support_index=support_index, query=query, query_index=query_index, targets=support_targets,
        row_weights=row_weights, parameters=parameters, lr=rates[0], weight_decay=rates[1], widths=widths,
        biased=biased, slope=slope, steps=steps, cross_entropy=oracle == "cross_entropy",
    )  # fmt: skip
    outputs, coefficients = OP.run(select(query.device.type), args)
    if ragged is not None:
        outputs, coefficients = padded_tasks.query.flat(outputs), padded_tasks.support.flat(coefficients)
    return (outputs, coefficients) if return_coefficients else outputs


def _check(
    support: Tensor,
    targets: Tensor,
    query: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None,
    steps: int,
    lr: float | Tensor,
    weight_decay: float | Tensor,
    oracle: str,
    slope: float,
    row_weights: Tensor | None,
    support_index: Tensor | None,
    query_index: Tensor | None,
    ragged: Ragged | None,
) -> None:
    rates = {name: r for name, r in (("lr", lr), ("weight_decay", weight_decay)) if isinstance(r, Tensor)}
    _checks.tensors(support=support, query=query, **rates)
    rows = support.shape[:-1] if support_index is None else support_index.shape
    if not isinstance(targets, Tensor) or targets.dim() != len(rows) + targets.is_floating_point():
        raise ValueError("support_targets: expected a tensor, [T, S, N] or labels [T, S] (without T for ragged tasks)")
    if not targets.is_floating_point() and targets.dtype is not torch.int64:
        raise TypeError(f"support_targets: expected labels of int64, got {str(targets.dtype).removeprefix('torch.')}")
    labels = targets if targets.dtype is torch.int64 else targets[..., 0].detach().long()
    _checks.task_rows(support, labels, query, support_index, query_index, ragged)
    _perceptron.check(weights, biases, query.shape[-1], slope)
    _checks.tensors(query=query, weights=weights[0])
    N = weights[-1].shape[0]
    if targets.is_floating_point():
        _checks.tensors(query=query, support_targets=targets)
        _checks.shape("support_targets", targets, (*rows, N), "[T, S, N]")
    if ragged is not None and ragged.n_ways is not None:
        raise ValueError("ragged.n_ways: expected None; the network has as many outputs in every task")
    if math.prod(rows) == 0 and (rows[0] if ragged is None else ragged.support_offsets.shape[0] - 1):
        raise ValueError("support: expected at least one row")
    if row_weights is not None:
        _checks.tensors(query=query, row_weights=row_weights)
        _checks.shape("row_weights", row_weights, tuple(rows), "[T, S]")
    for name, tensor in rates.items():
        _checks.one_value(name, tensor)
    _checks.step_size(steps, 0.0, "sum", 1)
    if steps > MOST_STEPS:
        raise ValueError(
            f"steps: expected at most {MOST_STEPS}, got {steps}; km.linear.kernel_ridge is where they lead"
        )
    if oracle not in ORACLES:
        raise ValueError(f"oracle: expected one of {', '.join(ORACLES)}, got {oracle!r}")
