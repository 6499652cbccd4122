"""Soft k-means: the transductive baseline that a learned gradient must beat."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, one_hot

from kernelmeta import ops
from kernelmeta.reference.precision import without_autocast


class SoftKMeans(nn.Module):
    """Prototypes refined by soft assignment of the query rows (Ren et al. 2018, eq. 5, with cosines).

    Nothing is learned.

    Args:
        n_way: N.
        n_features: D; taken so that learners are built alike, nothing depends on it.
        steps: refinements; 0 gives plain prototypes.
        scale: of the cosines, in the assignment and in the logits.
    """

    def __init__(self, n_way: int, n_features: int | None = None, steps: int = 10, scale: float = 10.0) -> None:
        super().__init__()
        if n_way < 1 or steps < 0:
            raise ValueError(f"n_way and steps: expected 1 and 0 or more, got {n_way} and {steps}")
        self.n_way, self.n_features, self.steps, self.scale = n_way, n_features, steps, scale

    @without_autocast
    def forward(self, support: Tensor, support_labels: Tensor, query: Tensor, return_weights: bool = False) -> Any:
        """[T, S, D], [T, S] int64, [T, Q, D] -> logits [T, Q, N] (with ``return_weights`` theta [T, N, D] too).

        In float32 at least, whatever the features are stored in.
        """
        dtype = torch.promote_types(torch.promote_types(support.dtype, query.dtype), torch.float32)
        theta = ops.class_means(support.to(dtype), support_labels, self.n_way)
        rows = normalize(query.to(dtype), dim=-1, eps=1e-12)
        counts = one_hot(support_labels, self.n_way).sum(-2).to(theta.dtype).unsqueeze(-1)  # [T, N, 1]
        sums = theta * counts
        for _ in range(self.steps):
            shares = self._logits(theta, rows).softmax(-1).transpose(-1, -2)  # [T, N, Q]
            theta = (sums + shares @ rows) / (counts + shares.sum(-1, keepdim=True))
        logits = self._logits(theta, rows)
        return (logits, theta) if return_weights else logits

    def _logits(self, theta: Tensor, rows: Tensor) -> Tensor:
        return self.scale * (rows @ normalize(theta, dim=-1, eps=1e-12).transpose(-1, -2))

    def from_bank(self, bank: Tensor, support_index: Tensor, support_labels: Tensor, query_index: Tensor) -> Tensor:
        """The logits [T, Q, N] for rows of a feature bank [n, D]: [T, S] and [T, Q] int64."""
        logits: Tensor = self(bank[support_index], support_labels, bank[query_index])
        return logits

    def extra_repr(self) -> str:
        return f"n_way={self.n_way}, n_features={self.n_features}, steps={self.steps}, scale={self.scale}"
