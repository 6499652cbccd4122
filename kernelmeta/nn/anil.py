"""ANIL: MAML's inner loop for the last layer alone (Raghu et al., "Rapid Learning or Feature Reuse?", ICLR 2020)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kernelmeta import ops


class ANIL(nn.Module):
    """A linear head, shared by all tasks, that every task adapts by gradient descent on its support rows.

    Args:
        n_way: N.
        n_features: D.
        steps: K.
        inner_lr: the learning rate of the steps.
        first_order: leave out the derivative of the steps (first-order MAML).
        learn_rates: learn the K rates too, each from ``inner_lr`` on (as Li et al. 2017 and Antoniou et al. 2019).
        oracle: the loss of the steps: "cross_entropy", "squared_error" or "hinge", the mean over the support rows.

    ``steps`` may be lowered after training.

    Parameters: ``weight`` [N, D] and ``bias`` [N], drawn as those of ``torch.nn.Linear``; ``rates`` [K] where learned.
    """

    rates: nn.Parameter | None

    def __init__(
        self,
        n_way: int,
        n_features: int,
        steps: int = 5,
        inner_lr: float = 0.1,
        first_order: bool = False,
        *,
        learn_rates: bool = False,
        oracle: str = "cross_entropy",
    ) -> None:
        super().__init__()
        if n_way < 1 or n_features < 1:
            raise ValueError(f"n_way and n_features: expected at least 1, got {n_way} and {n_features}")
        if steps < 0:
            raise ValueError(f"steps: expected 0 or more, got {steps}")
        if oracle not in ("cross_entropy", "squared_error", "hinge"):
            raise ValueError(f"oracle: expected cross_entropy, squared_error or hinge, got {oracle!r}")
        self.n_way, self.n_features, self.steps, self.inner_lr = n_way, n_features, steps, inner_lr
        self.first_order, self.learn_rates, self.oracle = first_order, learn_rates, oracle
        linear = nn.Linear(n_features, n_way)
        self.weight, self.bias = linear.weight, linear.bias
        self.register_parameter("rates", nn.Parameter(torch.full((steps,), float(inner_lr))) if learn_rates else None)

    def forward(self, support: Tensor, support_labels: Tensor, query: Tensor, return_weights: bool = False) -> Any:
        """Classify the query rows of T tasks.

        Args:
            support: [T, S, D].
            support_labels: [T, S] int64 in 0..N-1.
            query: [T, Q, D].
            return_weights: return the adapted heads too.

        Returns:
            Logits [T, Q, N]; with ``return_weights`` a tuple of them and the heads [T, N, D + 1], weights then bias.

        Raises:
            ValueError, TypeError: as :func:`kernelmeta.ops.linear_head`.
        """
        return self._adapt(support, support_labels, query, return_weights=return_weights)

    def from_bank(self, bank: Tensor, support_index: Tensor, support_labels: Tensor, query_index: Tensor) -> Tensor:
        """The logits [T, Q, N] for rows of a feature bank [n, D], read where they lie: [T, S] and [T, Q] int64."""
        logits: Tensor = self._adapt(bank, support_labels, bank, support_index=support_index, query_index=query_index)
        return logits

    def _adapt(self, support: Tensor, support_labels: Tensor, query: Tensor, **options: Any) -> Any:
        weight, learned = self.weight, self.rates
        rates = weight.new_full((self.steps,), self.inner_lr) if learned is None else learned[: self.steps]
        return ops.linear_head(
            support, support_labels, query, weight, self.bias, rates, oracle=self.oracle,
            first_order=self.first_order, **options,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return (
            f"n_way={self.n_way}, n_features={self.n_features}, steps={self.steps}, inner_lr={self.inner_lr}, "
            f"first_order={self.first_order}, learn_rates={self.learn_rates}, oracle={self.oracle!r}"
        )
