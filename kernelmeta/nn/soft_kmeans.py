"""Soft k-means: the transductive baseline that a learned gradient must beat."""

from __future__ import annotations

import torch
from torch import Tensor

from kernelmeta import ops
from kernelmeta.adapted_classifier import CosineTerms
from kernelmeta.nn.kept import KeptNumbers
from kernelmeta.nn.learner import Learner
from kernelmeta.phases import Phase
from kernelmeta.tasks import Classifier, Ragged


class SoftKMeans(Learner):
    """Prototypes refined by soft assignment of the query rows (Ren et al. 2018, eq. 5, with cosines).

    Nothing is learned.

    Args:
        n_way: N.
        n_features: D; taken so that learners are built alike, nothing depends on it.
        steps: refinements; 0 gives plain prototypes.
        scale: of the cosines, in the assignment and in the logits.
        transform, center: of the features, see :class:`Learner`.

    Raises:
        ValueError: ``n_way`` below 1 or ``steps`` below 0.
    """

    def __init__(
        self,
        n_way: int,
        n_features: int | None = None,
        steps: int = 10,
        scale: float = 10.0,
        *,
        transform: str = "none",
        center: str = "none",
    ) -> None:
        super().__init__(transform, center, n_features)
        if n_way < 1 or steps < 0:
            raise ValueError(f"n_way and steps: expected 1 and 0 or more, got {n_way} and {steps}")
        self.n_way, self.n_features, self.steps, self.scale = n_way, n_features, steps, scale
        self.phases = (Phase("soft_assignment", steps, 1.0),)
        self._kept_scale = KeptNumbers()

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
        # In float32 at least, whatever the features are stored in.
        wide = torch.float64 in (support.dtype, query.dtype)
        scale = self._kept_scale((self.scale,), support, torch.float64 if wide else torch.float32)
        return ops.program(
            support, support_labels, query, self.phases, n_way=self.n_way, scale=scale, return_weights=return_weights,
            support_index=support_index, query_index=query_index, ragged=ragged,
        )  # fmt: skip

    @property
    def takes_any_ways(self) -> bool:
        return True

    @property
    def cosine_terms(self) -> CosineTerms | None:
        return (self.scale, 0.0)

    def extra_repr(self) -> str:
        return f"n_way={self.n_way}, n_features={self.n_features}, steps={self.steps}, scale={self.scale}"
