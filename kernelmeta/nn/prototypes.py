"""Prototypes: the inductive baseline."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kernelmeta import ops
from kernelmeta.reference.sib import cosine_classifier


class Prototypes(nn.Module):
    """Cosine similarity to weighted class means (Snell et al. 2017, with cosines): SIB before its first step.

    Args:
        n_way: N.
        n_features: D, for learned weights of the features; without it there are none.

    Parameters: ``weight`` [D] (1 at start), ``scale`` [1], ``bias`` [1].

    Raises:
        ValueError: a size below 1.
    """

    weight: nn.Parameter | None

    def __init__(self, n_way: int, n_features: int | None = None) -> None:
        super().__init__()
        if n_way < 1 or (n_features is not None and n_features < 1):
            raise ValueError(f"n_way and n_features: expected at least 1, got {n_way} and {n_features}")
        self.n_way, self.n_features = n_way, n_features
        weight = None if n_features is None else nn.Parameter(torch.ones(n_features))
        self.register_parameter("weight", weight)
        self.scale = nn.Parameter(torch.full((1,), 10.0))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, support: Tensor, support_labels: Tensor, query: Tensor, return_weights: bool = False) -> Any:
        """[T, S, D], [T, S] int64, [T, Q, D] -> logits [T, Q, N] (with ``return_weights`` theta [T, N, D] too)."""
        theta = ops.class_means(support, support_labels, self.n_way, self.weight)
        logits = cosine_classifier(theta, query.to(theta.dtype), self.scale, self.bias)
        return (logits, theta) if return_weights else logits

    def from_bank(self, bank: Tensor, support_index: Tensor, support_labels: Tensor, query_index: Tensor) -> Tensor:
        """The logits [T, Q, N] for rows of a feature bank [n, D]: [T, S] and [T, Q] int64."""
        logits: Tensor = self(bank[support_index], support_labels, bank[query_index])
        return logits

    def extra_repr(self) -> str:
        return f"n_way={self.n_way}, n_features={self.n_features}"
