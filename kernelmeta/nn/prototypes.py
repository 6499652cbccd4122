"""Prototypes: the inductive baseline."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernelmeta import ops
from kernelmeta.adapted_classifier import CosineTerms
from kernelmeta.nn.learner import Learner
from kernelmeta.tasks import Classifier, Ragged


class Prototypes(Learner):
    """Cosine similarity to weighted class means (Snell et al. 2017, with cosines): SIB before its first step.

    Args:
        n_way: N.
        n_features: D, for learned weights of the features; without it there are none.
        transform, center: of the features, see :class:`Learner`.

    Parameters: ``weight`` [D] (1 at start), ``scale`` [1], ``bias`` [1].

    Raises:
        ValueError: a size below 1.
    """

    weight: nn.Parameter | None

    def __init__(
        self, n_way: int, n_features: int | None = None, *, transform: str = "none", center: str = "none"
    ) -> None:
        super().__init__(transform, center, n_features)
        if n_way < 1 or (n_features is not None and n_features < 1):
            raise ValueError(f"n_way and n_features: expected at least 1, got {n_way} and {n_features}")
        self.n_way, self.n_features = n_way, n_features
        weight = None if n_features is None else nn.Parameter(torch.ones(n_features))
        self.register_parameter("weight", weight)
        self.scale = nn.Parameter(torch.full((1,), 10.0))
        self.bias = nn.Parameter(torch.zeros(1))

    def _adapt(
        self,
        support: Tensor,
        support_labels: Tensor,
        query: Tensor,
        *,
        return_weights: bool = False,
        support_index: Tensor | None = None,
        query_index: Tensor | None = None,
        ragged: Ragged | None = None,
    ) -> Tensor | tuple[Tensor, Classifier]:
        return ops.program(
            support, support_labels, query, (), n_way=self.n_way, weight=self.weight, scale=self.scale,
            bias=self.bias, return_weights=return_weights, support_index=support_index, query_index=query_index,
            ragged=ragged,
        )  # fmt: skip

    @property
    def takes_any_ways(self) -> bool:
        return True

    @property
    def cosine_terms(self) -> CosineTerms | None:
        return (self.scale, self.bias)

    def extra_repr(self) -> str:
        return f"n_way={self.n_way}, n_features={self.n_features}"
