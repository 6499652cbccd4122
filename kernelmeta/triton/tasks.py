"""Tasks of equal or unequal size as the kernels take them: [T, rows] each, with room for the largest task's rows.

A smaller task's last row is repeated, and its labels end with -1. The sizes of grids and arrays depend on the offsets:
tasks of unequal size wait for the device once, unless the caller says how large they are at most. Then nobody looks at
offsets and ways before the kernels run: they are brought into their bounds, and tasks that do not fit are broken.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor


def broken(labels: Tensor, n_ways: int | Tensor, most: int, valid: Tensor | None = None) -> Tensor:
    """Tasks with a label outside of their ways ([T, 1] or one number), or a way without a row; [T]."""
    ways = torch.arange(most, device=labels.device)
    empty = ~(labels.unsqueeze(1) == ways.unsqueeze(-1)).any(-1) & (ways < n_ways)
    return foreign(labels, n_ways, valid) | empty.any(-1)


def foreign(labels: Tensor, n_ways: int | Tensor, valid: Tensor | None = None) -> Tensor:
    """Tasks with a label outside of their ways."""
    outside = (labels < 0) | (labels >= n_ways)
    return (outside if valid is None else outside & valid).any(-1)


class _Ragged:
    """Offsets [T + 1] of one kind of rows, of tasks with at most so many."""

    def __init__(self, offsets: Tensor, rows: int, most: int) -> None:
        self.rows, self.most = rows, most
        counts = offsets.diff()
        self.rising = (counts >= 0).all() & (offsets[0] == 0) & (offsets[-1] == rows)
        self.fits = (counts >= 1) & (counts <= most)  # [T]
        self.counts = counts.clamp(1, max(most, 1))
        line = torch.arange(most, device=offsets.device)
        self.valid = line < self.counts.unsqueeze(-1)  # [T, most]
        # Of a row of [T, most]: its number among all rows; and the other way round.
        source = offsets[:-1, None] + torch.minimum(line, self.counts.unsqueeze(-1) - 1)
        self.source = source.clamp_(0, max(rows - 1, 0))
        number = torch.arange(rows, device=offsets.device)
        task = torch.searchsorted(offsets[1:].contiguous(), number, right=True).clamp_(max=len(counts) - 1)
        self.place = task * most + (number - offsets[task]).clamp_(0, max(most - 1, 0))

    def spread(self, flat: Tensor) -> Tensor:
        """[all rows, ...] -> [T, most, ...], zeros where there is no row."""
        spread = flat[self.source]
        return spread.masked_fill_(~self.valid.view(*self.valid.shape, *[1] * (flat.dim() - 1)), 0)

    def flatten(self, spread: Tensor) -> Tensor:
        """[T, most, ...] -> [all rows, ...]."""
        return spread.flatten(0, 1)[self.place]


class Tasks:
    """The tasks that a call of the raw ops ``program`` and ``ridge`` is about.

    ``counts`` [T, 3] holds each task's support rows, query rows and ways, ``ways`` the last of them, [T, 1]; None and
    ``n_way`` where all tasks are alike. ``every_class``: whether each needs a support row, as in
    tasks of unequal size.
    """

    def __init__(self, call: Any, every_class: bool = True) -> None:
        query, query_index, support, support_index = call.query, call.query_index, call.support, call.support_index
        labels, support_offsets, query_offsets = call.support_labels, call.support_offsets, call.query_offsets
        n_way, n_ways, max_support, max_query = call.n_way, call.n_ways, call.max_support, call.max_query
        self.query, self.support = query.contiguous(), support.contiguous()
        self.query_index, self.support_index, self.labels = query_index, support_index, labels
        self.D, self.n_way = query.shape[-1], n_way
        self.counts: Tensor | None = None
        self.ways: int | Tensor = n_way
        self._support: _Ragged | None = None
        self._query: _Ragged | None = None
        if support_offsets is None:
            self.T, self.S = labels.shape
            self.Q = (query if query_index is None else query_index).shape[1]
            self.broken = broken(labels, n_way, n_way) if every_class else foreign(labels, n_way)
            return
        self.T = support_offsets.shape[0] - 1
        if n_ways is None:
            n_ways = torch.full_like(support_offsets[1:], n_way)
        rows = (labels.shape[0], (query if query_index is None else query_index).shape[0])
        if self.T and not all(rows):
            raise ValueError("support and query: every task needs a row")
        if max_support < 0:
            max_support, max_query = _sizes(support_offsets, query_offsets, n_ways, rows, n_way)
        of_support = _Ragged(support_offsets, rows[0], max_support)
        of_query = _Ragged(query_offsets, rows[1], max_query)
        unfit = ~(of_support.fits & of_query.fits & of_support.rising & of_query.rising)
        unfit |= (n_ways < 1) | (n_ways > n_way)
        n_ways = n_ways.clamp(1, n_way)
        self._support, self._query, self.S, self.Q = of_support, of_query, max_support, max_query
        self.counts = torch.stack([of_support.counts, of_query.counts, n_ways], 1)
        self.ways = n_ways.unsqueeze(-1)
        self.support_index = of_support.source if support_index is None else support_index[of_support.source]
        self.query_index = of_query.source if query_index is None else query_index[of_query.source]
        self.labels = labels[of_support.source].masked_fill_(~of_support.valid, -1)
        self.broken = broken(self.labels, self.ways, n_way, of_support.valid) | unfit

    @property
    def own_ways(self) -> Tensor | None:
        """[T, N]: which ways are a task's own; None where all are."""
        if isinstance(self.ways, int):
            return None
        return torch.arange(self.n_way, device=self.labels.device) < self.ways

    def rows(self, of_query: bool) -> tuple[Tensor, Tensor | None]:
        """Features and index as `products` takes them."""
        return (self.query, self.query_index) if of_query else (self.support, self.support_index)

    def gathered(self, of_query: bool) -> Tensor:
        """[T, rows, D]."""
        rows, index = self.rows(of_query)
        return rows if index is None else rows[index]

    def spread(self, given: Tensor, of_query: bool) -> Tensor:
        """Something for every row, as it was given -> [T, rows, ...], zeros where there is no row."""
        ragged = self._query if of_query else self._support
        return given if ragged is None else ragged.spread(given)

    def flatten(self, spread: Tensor, of_query: bool) -> Tensor:
        """The other way round."""
        ragged = self._query if of_query else self._support
        return spread.contiguous() if ragged is None else ragged.flatten(spread)


def _sizes(
    support_offsets: Tensor, query_offsets: Tensor, n_ways: Tensor, rows: tuple[int, int], n_way: int
) -> tuple[int, int]:
    """The most support and query rows of a task, from offsets and ways that are read here, and checked."""
    T = support_offsets.shape[0] - 1
    numbers = torch.cat([support_offsets, query_offsets, n_ways]).tolist()
    support, query, ways = numbers[: T + 1], numbers[T + 1 : 2 * T + 2], numbers[2 * T + 2 :]
    for name, offsets, last in (("support", support, rows[0]), ("query", query, rows[1])):
        if offsets[0] != 0 or offsets[-1] != last or any(a > b for a, b in itertools.pairwise(offsets)):
            raise ValueError(f"{name}_offsets: expected numbers that rise from 0 to the number of rows, {last}")
    of_support, of_query = ([b - a for a, b in itertools.pairwise(o)] for o in (support, query))
    for t, own in enumerate(ways):
        if not 1 <= own <= n_way:
            raise ValueError(f"n_ways: task {t} has {own} ways; expected 1..{n_way}")
        if of_support[t] < own:
            raise ValueError(
                f"support: task {t} has {own} ways and {of_support[t]} support rows; every class needs at least one"
            )
        if of_query[t] < 1:
            raise ValueError("every task needs a query row")
    return max(of_support, default=0), max(of_query, default=0)
