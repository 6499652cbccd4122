"""Random features of a few families, and least squares on them, for many seeds, targets and ridges at once.

``sqrt(c / N) a(s x W + b)`` with W Gaussian: ReLUs (Cho & Saul 2009), signs (the same, of order 0) and cosines
(Rahimi & Recht, NeurIPS 2007), each with E[k(x, x)] near 1 for rows of length sqrt(d).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

ACTIVATIONS = ("relu", "sign", "cos")
BLOCK = 2000  # features of wide models that are there at once


class Family(NamedTuple):
    """A distribution of random features."""

    activation: str
    """One of `ACTIVATIONS`."""
    scale: float = 1.0
    """s, of what goes into a cosine; ReLUs and signs have none."""

    def __str__(self) -> str:
        return f"cosine, scale {self.scale:g}" if self.activation == "cos" else self.activation

    def blocks(
        self, rows: Sequence[Tensor], N: int, generator: torch.Generator, block: int | None = None
    ) -> Iterator[list[Tensor]]:
        """The N features of these rows, [n, at most ``block``] each at a time; their squares have the mean 1 / N.

        Args:
            rows: [n, d] each.
            N: features.
            generator: where W and b come from.
            block: how many at a time; all if None.

        Raises:
            ValueError: there is no such activation.
        """
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")
        d, at_once = rows[0].shape[1], N if block is None else block
        for first in range(0, N, at_once):
            count = min(at_once, N - first)
            W = torch.randn(d, count, generator=generator, dtype=torch.float64) * (self.scale / math.sqrt(d))
            if self.activation == "cos":
                b = 2 * math.pi * torch.rand(count, generator=generator, dtype=torch.float64)
                yield [torch.addmm(b, x, W).cos_().mul_(math.sqrt(2 / N)) for x in rows]
            elif self.activation == "relu":
                yield [(x @ W).relu_().mul_(math.sqrt(2 / N)) for x in rows]
            else:
                yield [(x @ W).sign_().div_(math.sqrt(N)) for x in rows]

    def grams(self, train: Tensor, test: Tensor, N: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The products of features, [n, n] and [m, n], of which no more than a block is there at once.

        Args:
            train: [n, d].
            test: [m, d].
            N: features.
            generator: as for `blocks`.
        """
        n = len(train)
        gram, cross = train.new_zeros(n, n), train.new_zeros(len(test), n)
        for of_train, of_test in self.blocks([train, test], N, generator, BLOCK):
            gram.addmm_(of_train, of_train.mT)
            cross.addmm_(of_test, of_train.mT)
        return gram, cross


def least_squares(train: Tensor, test: Tensor, targets: Tensor, ridges: Tensor) -> tuple[Tensor, Tensor]:
    """What least squares on these features says of the training rows and of the test rows, for many ridges at once.

    Args:
        train: [..., n, N], features of the training rows.
        test: [..., m, N].
        targets: [..., n, k]; a column a regression.
        ridges: [r], what is added to the squared singular values; 0: the solution of the smallest norm.

    Returns:
        [..., r, n, k] and [..., r, m, k].
    """
    n, N = train.shape[-2:]
    if n < N:  # train = R^T Q^T: the decomposition is that of n by n
        Q, R = torch.linalg.qr(train.mT)
        U, S, Vh = torch.linalg.svd(R.mT)
        Vh = Vh @ Q.mT
    else:
        U, S, Vh = torch.linalg.svd(train, full_matrices=False)
    counts = S[..., :1] * (max(n, N) * torch.finfo(S.dtype).eps) < S
    s = S.unsqueeze(-2)  # [..., 1, k]
    inverse = torch.where(counts.unsqueeze(-2), s / (s * s + ridges.unsqueeze(-1)), 0.0)  # [..., r, k]
    weights = inverse.unsqueeze(-1) * (U.mT @ targets).unsqueeze(-3)  # [..., r, k, columns], along the rows of Vh
    return (U * S.unsqueeze(-2)).unsqueeze(-3) @ weights, (test @ Vh.mT).unsqueeze(-3) @ weights


def kernel_least_squares(gram: Tensor, cross: Tensor, targets: Tensor, ridges: Tensor) -> tuple[Tensor, Tensor]:
    """`least_squares` from the products of features, for many more features than rows: fewer would lose digits.

    Args:
        gram: [..., n, n], of the training rows.
        cross: [..., m, n], of the test rows with them.
        targets, ridges: as for `least_squares`.

    Returns:
        [..., r, n, k] and [..., r, m, k].
    """
    values, U = torch.linalg.eigh(gram)
    counts = values[..., -1:] * (gram.shape[-1] * torch.finfo(values.dtype).eps) < values
    v = values.unsqueeze(-2)
    inverse = torch.where(counts.unsqueeze(-2), 1 / (v + ridges.unsqueeze(-1)), 0.0)  # [..., r, n]
    along = inverse.unsqueeze(-1) * (U.mT @ targets).unsqueeze(-3)
    return (U * values.unsqueeze(-2)).unsqueeze(-3) @ along, (cross @ U).unsqueeze(-3) @ along
