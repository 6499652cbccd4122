"""Ridge regression as a learner."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from kernelmeta import ops


class RidgeHead(nn.Module):
    """A ridge regression of the labels for each task, in closed form (R2-D2, Bertinetto et al. 2019).

    Args:
        n_way: N; of the task that has most, where they differ.
        n_features: D; taken so that learners are built alike, nothing depends on it.
        regularization: starting value of lambda, above 0.
        scale: starting value of the scale of the logits.

    Parameters: ``log_regularization`` [1] (so that lambda stays positive), ``scale`` [1], ``bias`` [1].

    Raises:
        ValueError: a size below 1, or a regularization that is not positive.
    """

    def __init__(
        self, n_way: int, n_features: int | None = None, regularization: float = 1.0, scale: float = 10.0
    ) -> None:
        super().__init__()
        if n_way < 1 or (n_features is not None and n_features < 1):
            raise ValueError(f"n_way and n_features: expected at least 1, got {n_way} and {n_features}")
        if not 0 < regularization < math.inf:
            raise ValueError(f"regularization: expected a positive number, got {regularization}")
        self.n_way, self.n_features = n_way, n_features
        self.log_regularization = nn.Parameter(torch.tensor([math.log(regularization)]))
        self.scale = nn.Parameter(torch.tensor([float(scale)]))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(
        self,
        support: Tensor,
        support_labels: Tensor,
        query: Tensor,
        return_weights: bool = False,
        *,
        support_offsets: Tensor | None = None,
        query_offsets: Tensor | None = None,
        n_ways: Tensor | None = None,
        max_support: int | None = None,
        max_query: int | None = None,
    ) -> Any:
        """Classify the query rows of T tasks.

        Args:
            support: [T, S, D]; every class needs at least one row, counts may differ.
            support_labels: [T, S] int64 in 0..N-1.
            query: [T, Q, D].
            return_weights: return the classifiers too.
            support_offsets, query_offsets, n_ways, max_support, max_query: tasks of unequal size; see
                :func:`kernelmeta.ops.program`.

        Returns:
            Logits [T, Q, N]; with ``return_weights`` a pair of them and (theta [T, N, D], bias [T, N]), the scale
            multiplied in. Not for tasks of unequal size.

        Raises:
            ValueError, TypeError: as :func:`kernelmeta.ops.ridge`.
        """
        if return_weights and support_offsets is not None:
            raise ValueError("return_weights: expected False for tasks of unequal size, got True")
        logits, coefficients = self._solve(
            support, support_labels, query, support_offsets=support_offsets, query_offsets=query_offsets,
            n_ways=n_ways, max_support=max_support, max_query=max_query,
        )  # fmt: skip
        if not return_weights:
            return logits
        weights = (self.scale * coefficients).transpose(-1, -2) @ support.to(coefficients.dtype)
        return logits, (weights, self.bias.to(weights.dtype).expand(weights.shape[:2]))

    def from_bank(
        self, bank: Tensor, support_index: Tensor, support_labels: Tensor, query_index: Tensor, **ragged: Any
    ) -> Tensor:
        """The logits [T, Q, N] for rows of a feature bank [n, D], read where they lie: [T, S] and [T, Q] int64.

        With ``support_offsets``, ``query_offsets`` (and ``n_ways``, ``max_support``, ``max_query``) the indices are
        [sum S] and [sum Q].
        """
        logits: Tensor = self._solve(
            bank, support_labels, bank, support_index=support_index, query_index=query_index, **ragged
        )[0]
        return logits

    def _solve(self, support: Tensor, support_labels: Tensor, query: Tensor, **options: Any) -> Any:
        return ops.ridge(
            support, support_labels, query, self.log_regularization.exp(), self.scale, self.bias, n_way=self.n_way,
            return_coefficients=True, **options,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"n_way={self.n_way}, n_features={self.n_features}"
