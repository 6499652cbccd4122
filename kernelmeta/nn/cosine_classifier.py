"""The cosine classifier with which backbones are pretrained."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize


class CosineClassifier(nn.Module):
    """``scale * cos(x, weight)`` over all classes of a data set (Gidaris & Komodakis 2018).

    Args:
        n_features: D.
        n_classes: C.
        scale: starting value of the learned scale.
    """

    def __init__(self, n_features: int, n_classes: int, scale: float = 10.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_classes, n_features) * (2.0 / n_features) ** 0.5)
        self.scale = nn.Parameter(torch.tensor(float(scale)))

    def forward(self, features: Tensor) -> Tensor:
        """[n, D] -> [n, C]."""
        return self.scale * linear(normalize(features, dim=-1), normalize(self.weight, dim=-1))

    def extra_repr(self) -> str:
        return f"n_features={self.weight.shape[1]}, n_classes={self.weight.shape[0]}"
