"""Where training a linearised network by the squared error leads, without training it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.func import functional_call, vjp

from kernelmeta.linear.lqf import Linearised
from kernelmeta.linear.ntk import ntk_gram
from kernelmeta.reference.precision import without_autocast


@without_autocast
def tangent_gram(model: Linearised, rows: Tensor, chunk_size: int | None = None) -> Tensor:
    """``K = J J^T`` of a linearised network on n rows, outputs apart: [n C, n C] float64.

    Args:
        model: linearised at w0.
        rows: [n, ...].
        chunk_size: as for `ntk_gram`.
    """
    network = copy.deepcopy(model.frozen)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name in model.names)
    K = ntk_gram(network, rows[None], full=True, chunk_size=chunk_size)
    return K[0].detach().flatten(2).flatten(0, 1).double()


@without_autocast
def solutions(
    model: Linearised,
    rows: Tensor,
    targets: Tensor,
    regularizations: Sequence[float],
    *,
    chunk_size: int | None = None,
) -> Iterator[tuple[float, Linearised]]:
    """A linearised network at the least of ``|f(x; w) - y|^2 / 2 + l |w - w0|^2 / 2``, for every strength l.

    ``w - w0 = J^T (K + l I)^-1 (y - f(x; w0))`` with ``K = J J^T``, the tangent kernel of the n rows: one
    eigendecomposition of [n C, n C] for all strengths. It is for few rows; for many, train.

    Args:
        model: linearised at w0; its weights are set.
        rows: [n, ...], what it is called with.
        targets: y, [n, C].
        regularizations: l, in units of the mean eigenvalue of K.
        chunk_size: as for `ntk_gram`.

    Yields:
        A strength, as given, and ``model`` itself with the weights for it.

    Raises:
        TypeError, ValueError: what `ntk_gram` does not take; targets that do not fit.
    """
    with torch.no_grad():
        start = model.frozen(rows)
    if targets.shape != start.shape:
        raise ValueError(f"targets: expected {list(start.shape)}, got {list(targets.shape)}")
    K = tangent_gram(model, rows, chunk_size)
    values, vectors = torch.linalg.eigh(K)
    along = vectors.mT @ (targets - start).double().flatten()
    origin = dict(model.frozen.named_parameters())

    def outputs(moved: dict[str, Tensor]) -> Tensor:
        found: Tensor = functional_call(model.frozen, origin | moved, rows)
        return found

    pull = vjp(outputs, {name: origin[name] for name in model.names})[1]
    for strength in regularizations:
        dual = vectors @ (along / (values.clamp_min(0) + strength * values.mean()))
        weights = pull(dual.reshape(targets.shape).to(start.dtype))[0]
        with torch.no_grad():
            for name, own in model.names.items():
                model.moved[own].copy_(weights[name])
        yield strength, model
