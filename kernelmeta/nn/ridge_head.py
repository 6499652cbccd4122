"""Ridge regression as a learner (Bertinetto et al., "Meta-learning with differentiable closed-form solvers", 2019)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from kernelmeta import ops


class RidgeHead(nn.Module):
    """A linear classifier for every task by ridge regression on its support rows, in closed form (R2-D2).

    Args:
        n_way: N.
        n_features: D.
        lam: the regularisation at the start; it is learned as its logarithm, so that it stays positive.
        scale: of the predictions as logits, at the start.
        normalize: whether rows are scaled to length 1 before.

    Parameters: ``log_lam``, ``scale``, ``bias``, [1] each.
    """

    def __init__(
        self, n_way: int, n_features: int, lam: float = 1.0, scale: float = 10.0, *, normalize: bool = True
    ) -> None:
        super().__init__()
        if n_way < 1 or n_features < 1:
            raise ValueError(f"n_way and n_features: expected at least 1, got {n_way} and {n_features}")
        if not lam > 0:
            raise ValueError(f"lam: expected a positive number, got {lam}")
        self.n_way, self.n_features, self.normalize = n_way, n_features, normalize
        self.log_lam = nn.Parameter(torch.tensor([math.log(lam)]))
        self.scale = nn.Parameter(torch.tensor([float(scale)]))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, support: Tensor, support_labels: Tensor, query: Tensor) -> Tensor:
        """[T, S, D], [T, S] int64, [T, Q, D] -> logits [T, Q, N].

        Raises:
            ValueError, TypeError: as :func:`kernelmeta.ops.ridge`.
        """
        if self.normalize:
            support, query = normalize(support, dim=-1, eps=1e-12), normalize(query, dim=-1, eps=1e-12)
        return ops.ridge(support, support_labels, query, self.log_lam.exp(), self.scale, self.bias, n_way=self.n_way)

    def from_bank(self, bank: Tensor, support_index: Tensor, support_labels: Tensor, query_index: Tensor) -> Tensor:
        """The logits [T, Q, N] for rows of a feature bank [n, D]: [T, S] and [T, Q] int64."""
        return self(bank[support_index], support_labels, bank[query_index])

    def extra_repr(self) -> str:
        return f"n_way={self.n_way}, n_features={self.n_features}, normalize={self.normalize}"
