"""A perceptron's neural tangent kernel by its layers, and training it linearised, in the space of its parameters.

``K[i, c, j, e] = sum over layers of (A A^T + 1_bias)[i, j] (G G^T)[i c, j e]`` with A the inputs of a layer and G the
derivatives of the outputs in what the layer gives (Jacot et al., NeurIPS 2018).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from kernelmeta.reference.precision import promoted, without_autocast
from kernelmeta.reference.task_rows import check_label_range, each_task, gathered
from kernelmeta.tasks import Ragged

Layers = Sequence[tuple[Tensor, Tensor | None]]  # weight [units, inputs] and bias [units] of each, in order


class TangentKernel(NamedTuple):
    """The neural tangent kernel on the rows of T tasks, and what the network says of them."""

    gram: Tensor
    """[T, S, S], the trace over the outputs, of the support rows; with ``full`` [T, S, N, S, N]."""
    cross: Tensor
    """[T, Q, S], or [T, Q, N, S, N]: of the query rows with the support rows."""
    support_outputs: Tensor
    """[T, S, N]."""
    query_outputs: Tensor
    """[T, Q, N]."""


class LayerRows(NamedTuple):
    """Rows [T, n, ...], seen from every layer."""

    inputs: Sequence[Tensor]
    """[T, n, inputs]."""
    slopes: Sequence[Tensor]
    """[T, n, units] of what follows every layer but the last."""
    outputs: Tensor
    """[T, n, N]."""


def layer_rows(x: Tensor, layers: Layers, slope: float) -> LayerRows:
    inputs: list[Tensor] = [x]
    slopes: list[Tensor] = []
    for i, (weight, bias) in enumerate(layers):
        z = inputs[-1] @ weight.T
        z = z if bias is None else z + bias
        if i + 1 == len(layers):
            return LayerRows(inputs, slopes, z)
        slopes.append(torch.where(z > 0, torch.ones_like(z), torch.full_like(z, slope)))
        inputs.append(z * slopes[-1])
    raise ValueError("layers: at least one")


def derivatives(rows: LayerRows, layers: Layers) -> list[Tensor | None]:
    """Of the outputs in what every layer gives, [T, n, N, units]; None for the identity, of the last layer."""
    G: Tensor | None = None
    found: list[Tensor | None] = [None]
    for (weight, _), slopes in zip(reversed(layers[1:]), reversed(rows.slopes), strict=True):
        G = (weight if G is None else G @ weight) * slopes.unsqueeze(-2)
        found.append(G)
    return found[::-1]


def kernel(first: LayerRows, second: LayerRows, layers: Layers, *, full: bool) -> Tensor:
    """[T, n, m], the trace over the outputs, or [T, n, N, m, N]."""
    total: Tensor | None = None
    N = len(layers[-1][0])
    of_first, of_second = derivatives(first, layers), derivatives(second, layers)
    for i, (_, bias) in enumerate(layers):
        M = first.inputs[i] @ second.inputs[i].transpose(-1, -2)
        M = M if bias is None else M + 1
        G1, G2 = of_first[i], of_second[i]
        if G1 is None or G2 is None:
            product = M[:, :, None, :, None] * torch.eye(N, dtype=M.dtype, device=M.device)[:, None] if full else N * M
        elif full:
            (T, n, _, _), m = G1.shape, G2.shape[1]
            P = G1.flatten(1, 2) @ G2.flatten(1, 2).transpose(-1, -2)
            product = M[:, :, None, :, None] * P.view(T, n, N, m, N)
        else:
            product = M * (G1.flatten(2) @ G2.flatten(2).transpose(-1, -2))
        total = product if total is None else total + product
    assert total is not None
    return total


def tangent_kernel(support: Tensor, query: Tensor, layers: Layers, slope: float, *, full: bool) -> TangentKernel:
    rows, of_query = layer_rows(support, layers, slope), layer_rows(query, layers, slope)
    return TangentKernel(
        kernel(rows, rows, layers, full=full),
        kernel(of_query, rows, layers, full=full),
        rows.outputs,
        of_query.outputs,
    )


def together(
    weights: Sequence[Tensor], biases: Sequence[Tensor] | None, *others: Tensor
) -> tuple[Layers, list[Tensor]]:
    """The layers, and other tensors, in the dtype that all of them promote to."""
    n = len(weights)
    all_of_them = promoted(*weights, *(biases or ()), *others)
    own = all_of_them[n : 2 * n] if biases is not None else [None] * n
    return list(zip(all_of_them[:n], own, strict=True)), list(all_of_them[len(all_of_them) - len(others) :])


@without_autocast
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
    """The neural tangent kernel of a perceptron, by its layers. See :func:`kernelmeta.ops.ntk_gram`."""
    support = gathered(support, support_index, "support")
    query = support[:, :0] if query is None else gathered(query, query_index, "query")
    layers, (support, query) = together(weights, biases, support, query)
    return tangent_kernel(support, query, layers, slope, full=full)


def loss_gradient(outputs: Tensor, targets: Tensor, oracle: str) -> Tensor:
    """Of every row's loss in its outputs, [..., N]: ``|f - y|^2 / 2``, or ``-sum y log softmax(f)``."""
    if oracle == "cross_entropy":
        return outputs.softmax(-1) * targets.sum(-1, keepdim=True) - targets
    return outputs - targets


def train_linearised(
    support: Tensor,
    targets: Tensor,
    query: Tensor,
    layers: Layers,
    row_weights: Tensor,
    lr: Tensor,
    weight_decay: Tensor,
    *,
    steps: int,
    oracle: str,
    slope: float,
) -> tuple[Tensor, Tensor]:
    """The outputs of the query rows, [T, Q, N], and what every support row has pulled by, [T, S, N]."""
    rows = layer_rows(support, layers, slope)
    T = len(support)
    moved = [
        (weight.new_zeros(T, *weight.shape), None if bias is None else weight.new_zeros(T, 1, len(weight)))
        for weight, bias in layers
    ]
    G = derivatives(rows, layers)
    kept = 1 - lr * weight_decay
    coefficients = torch.zeros_like(targets)
    for _ in range(steps):
        g = row_weights.unsqueeze(-1) * loss_gradient(_linearised(rows, layers, moved), targets, oracle)
        for i, (dW, db) in enumerate(moved):
            own = G[i]
            pull = g if own is None else (g.unsqueeze(-2) @ own).squeeze(-2)  # [T, S, units]
            moved[i] = (
                kept * dW - lr * (pull.transpose(-1, -2) @ rows.inputs[i]),
                None if db is None else kept * db - lr * pull.sum(-2, keepdim=True),
            )
        coefficients = kept * coefficients - lr * g
    return _linearised(layer_rows(query, layers, slope), layers, moved), coefficients


def _linearised(rows: LayerRows, layers: Layers, moved: Sequence[tuple[Tensor, Tensor | None]]) -> Tensor:
    """``f + df/dw dw``."""
    along: Tensor | None = None
    for i, ((weight, _), (dW, db)) in enumerate(zip(layers, moved, strict=True)):
        z = rows.inputs[i] @ dW.transpose(-1, -2)
        z = z if db is None else z + db
        along = z if along is None else z + along @ weight.T
        if i + 1 < len(layers):
            along = along * rows.slopes[i]
    assert along is not None
    return rows.outputs + along


@without_autocast
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
) -> Any:
    """Every task's weights move, one step after the other. See :func:`kernelmeta.ops.linearised_descent`."""
    support, query = gathered(support, support_index, "support"), gathered(query, query_index, "query")
    if not support_targets.is_floating_point():
        check_label_range(support_targets, len(weights[-1]))
        support_targets = one_hot(support_targets, len(weights[-1])).to(weights[-1].dtype)
    rates = [r if isinstance(r, Tensor) else weights[-1].new_tensor(r) for r in (lr, weight_decay)]
    given = [] if row_weights is None else [row_weights]
    layers, (support, targets, query, lr, weight_decay, *given) = together(
        weights, biases, support, support_targets, query, *rates, *given
    )
    lr, weight_decay = lr.squeeze(), weight_decay.squeeze()
    options: dict[str, Any] = {"steps": steps, "oracle": oracle, "slope": slope}
    if ragged is None:
        counts = given[0] if given else support.new_full(support.shape[:2], 1 / max(support.shape[1], 1))
        outputs, pulls = train_linearised(support, targets, query, layers, counts, lr, weight_decay, **options)
        return (outputs, pulls) if return_coefficients else outputs
    found = [(query.new_zeros(1, 0, targets.shape[-1]),) * 2]
    for s, q, _ in each_task(ragged, targets.shape[-1]):
        own = support[None, s]
        counts = given[0][None, s] if given else own.new_full(own.shape[:2], 1 / max(own.shape[1], 1))
        found.append(
            train_linearised(own, targets[None, s], query[None, q], layers, counts, lr, weight_decay, **options)
        )
    outputs, pulls = (torch.cat([r.squeeze(0) for r in results]) for results in zip(*found, strict=True))
    return (outputs, pulls) if return_coefficients else outputs
