"""MAML of a whole network as a module, called as the other learners are."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernelmeta import func
from kernelmeta.reference.task_rows import as_labels, check_label_range, gathered


class MAML(nn.Module):
    """Adapts every parameter of a network to a task by K gradient steps on its support rows (Finn et al. 2017).

    :func:`kernelmeta.func.maml` does the work and says what holds for BatchNorm.

    Args:
        network: maps rows [n, ...] to logits [n, N].
        n_way: N.
        steps: K.
        inner_lr: their learning rate.
        first_order: take the inner gradients for constants.
        learn_rates: learn a rate for every step (Antoniou et al., ICLR 2019), from ``inner_lr`` on.
        norm_stats: "task" or "running", see :func:`kernelmeta.func.maml`.
        chunk_size: tasks at a time, to bound memory.
        n_features: D, where rows are vectors or flattened images; nothing depends on it.

    Parameters: those of ``network``, and ``rates`` [K] if they are learned.
    """

    rates: nn.Parameter | None

    def __init__(
        self,
        network: nn.Module,
        n_way: int,
        steps: int = 5,
        inner_lr: float = 0.01,
        first_order: bool = False,
        learn_rates: bool = False,
        norm_stats: str = "task",
        chunk_size: int | None = None,
        n_features: int | None = None,
    ) -> None:
        super().__init__()
        self.network, self.n_way, self.n_features = network, n_way, n_features
        self.steps, self.inner_lr = steps, inner_lr
        self.first_order, self.norm_stats, self.chunk_size = first_order, norm_stats, chunk_size
        self.register_parameter("rates", nn.Parameter(torch.full((steps,), inner_lr)) if learn_rates else None)
        self._transform()  # so that what cannot work is said here

    def _transform(self) -> func.Adapted:
        return func.maml(
            self.network,
            steps=self.steps,
            inner_lr=self.inner_lr if self.rates is None else self.rates,
            first_order=self.first_order,
            norm_stats=self.norm_stats,
            chunk_size=self.chunk_size,
        )

    def forward(self, support: Tensor, support_labels: Tensor, query: Tensor) -> Tensor:
        """[T, S, ...], [T, S] int64, [T, Q, ...] -> logits [T, Q, N], in the dtype of the network's parameters."""
        support_labels = as_labels(support_labels)
        check_label_range(support_labels, self.n_way)
        dtype = next(self.network.parameters()).dtype
        logits: Tensor = self._transform()(support.to(dtype), support_labels, query.to(dtype))
        return logits

    def from_bank(self, bank: Tensor, support_index: Tensor, support_labels: Tensor, query_index: Tensor) -> Tensor:
        """The logits [T, Q, N] for rows of a feature bank [n, ...]: [T, S] and [T, Q] int64."""
        support, query = gathered(bank, support_index, "support"), gathered(bank, query_index, "query")
        logits: Tensor = self(support, support_labels, query)
        return logits

    def extra_repr(self) -> str:
        return f"n_way={self.n_way}, steps={self.steps}, inner_lr={self.inner_lr}, first_order={self.first_order}"
