"""LaplacianShot: nearest class means, with neighbours among the query rows that should agree."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernelmeta.tasks import Ragged
from kernelmeta.transductive.bd_cspn import rectified
from kernelmeta.transductive.tasks import Tasks, check_least, solved

# Relative change of the bound at which a task is done, and the first step at which it may be.
_TOLERANCE, _FIRST = 1e-6, 2


def laplacian_shot(
    support: Tensor,
    support_labels: Tensor,
    query: Tensor,
    *,
    n_way: int,
    steps: int = 20,
    neighbours: int = 2,
    strength: float = 0.7,
    rectify: bool = True,
    scale: float = 10.0,
    ragged: Ragged | None = None,
) -> Tensor:
    """LaplacianShot (Ziko et al., "Laplacian regularized few-shot learning", ICML 2020, algorithm 1).

    Each step sets ``Y = softmax(-a + strength W Y)`` (eq. 12), which lowers a bound of the loss (eq. 7): a are squared
    distances to the class means, W says which rows are a row's nearest. A task is done when its bound moves by less
    than a millionth.

    Args:
        support: [T, S, D], usually of length 1; every class needs at least one row.
        support_labels: [T, S] int64 in 0..N-1.
        query: [T, Q, D].
        n_way: N.
        steps: at most.
        neighbours: how many of the other query rows are a row's own; all of them where there are fewer.
        strength: lambda.
        rectify: class means as of `bd_cspn`, with its assumption about proportions, as published for even queries.
        scale: of the rectification.
        ragged: tasks of unequal size: features are [all rows, D] then, see `kernelmeta.Ragged`.

    Returns:
        The logarithm of Y, [T, Q, N] or [all query rows, N], float32 or float64.

    Raises:
        ValueError, TypeError: an argument that does not fit, named.
    """
    check_least(steps=(steps, 0), neighbours=(neighbours, 0), strength=(strength, 0.0), scale=(scale, 0.0))
    if not isinstance(rectify, bool):
        raise TypeError(f"rectify: expected True or False, got {rectify!r}")

    def solve(tasks: Tasks) -> Tensor:
        means = rectified(tasks, scale) if rectify else tasks.means()
        # |q - m|^2 but for |q|^2, which is the same for all classes: the bound takes it back below
        a = means.square().sum(-1).unsqueeze(-2) - 2 * tasks.query @ means.mT
        lengths = tasks.query.square().sum((-1, -2))
        W = _nearest(tasks.query, neighbours)
        log_y = (-a).log_softmax(-1)
        bound, running = log_y.new_full(lengths.shape, math.inf), torch.ones_like(lengths, dtype=torch.bool)
        for step in range(steps):
            moved = (strength * W @ log_y.exp() - a).log_softmax(-1)
            log_y = torch.where(running[:, None, None], moved, log_y)
            y = log_y.exp()
            terms = torch.where(y > 0, y * (log_y + a - strength * W @ y), 0.0)
            before, bound = bound, terms.sum((-1, -2)) + lengths
            if step >= _FIRST:
                running = running & ((bound - before).abs() > _TOLERANCE * before.abs())
                if not running.any():
                    break
        return log_y

    return solved(solve, support, support_labels, query, n_way=n_way, ragged=ragged)


def _nearest(rows: Tensor, k: int) -> Tensor:
    """[T, Q, D] -> [T, Q, Q]: 1 where the second row is one of the first row's k nearest, itself left out."""
    Q = rows.shape[-2]
    products = rows @ rows.mT
    # The nearest have the largest x y - |y|^2 / 2.
    closeness = products - products.diagonal(dim1=-2, dim2=-1).unsqueeze(-2) / 2
    closeness = closeness.masked_fill(torch.eye(Q, dtype=torch.bool, device=rows.device), -math.inf)
    index = closeness.topk(min(k, Q - 1), -1).indices
    return torch.zeros_like(products).scatter_(-1, index, 1.0)
