"""Rows of tasks: gathered from a bank; those of unequal size, taken one by one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from kernelmeta.backends import holds_numbers, is_traced
from kernelmeta.tasks import Ragged

_NARROW_INTEGERS = frozenset({torch.int32, torch.int16, torch.int8, torch.uint8})


def gathered(features: Tensor, index: Tensor | None, name: str) -> Tensor:
    """The rows of a bank [n, D] that an index points to; the features themselves where there is none.

    Raises:
        ValueError: an index outside of the bank. (On a GPU nobody waits to look.)
    """
    if index is None:
        return features
    looked_at = index.device.type == "cpu" and not is_traced() and type(index) is Tensor
    if looked_at and index.numel():
        n = features.shape[0]
        for extreme in index.aminmax():
            if not 0 <= extreme < n:
                raise ValueError(f"{name}: index {int(extreme)} is outside of the bank's {n} rows")
    return features[index]


def as_labels(labels: Any) -> Any:
    """Labels of a narrower integer type as int64; anything else as it is, for the checks to name."""
    if isinstance(labels, Tensor) and labels.dtype in _NARROW_INTEGERS:
        return labels.long()
    return labels


def one_hot_targets(labels: Tensor, n_way: int, dtype: torch.dtype) -> Tensor:
    """1 for a row's own class, [..., N]; also of labels that hold no numbers yet."""
    return (labels.unsqueeze(-1) == torch.arange(n_way, device=labels.device)).to(dtype)


def check_label_range(labels: Tensor, n_way: int) -> None:
    """Raise a ValueError for labels [T, S] that are none of 0..N-1, a TypeError for those that are not int64.

    (While they are traced, nobody sees what they are.)
    """
    if labels.dtype is not torch.int64:
        raise TypeError(f"support_labels: expected int64, got {str(labels.dtype).removeprefix('torch.')}")
    if not holds_numbers(labels):
        return
    outside = (labels < 0) | (labels >= n_way)
    if outside.any():
        task, row = outside.nonzero()[0].tolist()
        raise ValueError(
            f"support_labels: task {task} has label {int(labels[task, row])}; labels must be in 0..{n_way - 1}"
        )


def each_task(ragged: Ragged, n_way: int) -> Iterator[tuple[slice, slice, int]]:
    """The support rows, the query rows and the ways of every task.

    Raises:
        ValueError: a task without a query row, or with more rows than ``ragged`` says there are at most.
    """
    of_support, of_query = ragged.support_offsets.tolist(), ragged.query_offsets.tolist()
    _check_sizes(of_support, ragged.max_support, "max_support")
    _check_sizes(of_query, ragged.max_query, "max_query")
    ways = [n_way] * (len(of_support) - 1) if ragged.n_ways is None else ragged.n_ways.tolist()
    for t, own in enumerate(ways):
        support, query = slice(*of_support[t : t + 2]), slice(*of_query[t : t + 2])
        if query.start == query.stop:
            raise ValueError(f"query: task {t} has no row; every task needs one")
        yield support, query, own


def _check_sizes(offsets: Sequence[int], most: int | None, name: str) -> None:
    for t, (first, end) in enumerate(pairwise(offsets)):
        if most is not None and end - first > most:
            raise ValueError(f"{name}: task {t} has {end - first} rows, more than {most}")
