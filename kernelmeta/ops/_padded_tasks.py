"""Tasks of unequal size as tasks of equal size, by an index: rows that a task lacks are one of its own again."""

from __future__ import annotations

import torch
from torch import Tensor

from kernelmeta.tasks import Ragged


class _Rows:
    """Support or query rows.

    Attributes:
        index: [T, most] into all rows.
        own: [T, most] bool, which of them are the task's.
        counts: [T].
    """

    def __init__(self, offsets: Tensor, most: int | None, all_rows: int) -> None:
        first, self.counts = offsets[:-1], offsets.diff()
        if most is None:
            most = int(self.counts.max()) if len(first) else 0
        position = torch.arange(max(most, 1), device=offsets.device)
        self.own = position < self.counts.unsqueeze(-1)
        last = (offsets[1:] - 1).unsqueeze(-1)
        self.index = torch.minimum(first.unsqueeze(-1) + position, last).clamp_min(0)
        tasks = torch.arange(len(first), device=offsets.device)
        task = torch.repeat_interleave(tasks, self.counts, output_size=all_rows)
        self._where = task, torch.arange(all_rows, device=offsets.device) - first[task]

    def flat(self, padded: Tensor) -> Tensor:
        """[T, most, ...] -> [all rows, ...]."""
        return padded[self._where]


class PaddedTasks:
    """What `Ragged` tasks of so many support and query rows are, padded."""

    def __init__(self, ragged: Ragged, all_support: int, all_query: int) -> None:
        self.support = _Rows(ragged.support_offsets, ragged.max_support, all_support)
        self.query = _Rows(ragged.query_offsets, ragged.max_query, all_query)

    def indices(self, support_index: Tensor | None, query_index: Tensor | None) -> tuple[Tensor, Tensor]:
        """Of the rows [T, most], in features [all rows, D] or in a bank that other indices [all rows] point into."""
        if support_index is None or query_index is None:
            return self.support.index, self.query.index
        return support_index[self.support.index], query_index[self.query.index]

    def of_support(self, values: Tensor) -> Tensor:
        """[all support rows, ...] -> [T, most, ...]."""
        return values[self.support.index]

    def row_weights(self, values: Tensor | None, dtype: torch.dtype) -> Tensor:
        """[T, most]: those of every row, or equal parts of 1; zero where a row is no task's own."""
        own = self.support.own
        if values is None:
            weights = 1 / self.support.counts.clamp_min(1).unsqueeze(-1).to(dtype)
        else:
            weights = self.of_support(values)
        return torch.where(own, weights, torch.zeros((), dtype=weights.dtype, device=weights.device))
