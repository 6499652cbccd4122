"""What all transductive methods share: their arguments, checked, and tasks of unequal size, one after the other."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernelmeta.ops import _checks
from kernelmeta.reference.class_means import check_labels
from kernelmeta.reference.precision import without_autocast
from kernelmeta.reference.task_rows import as_labels, each_task, one_hot_targets
from kernelmeta.tasks import Ragged


class Tasks(NamedTuple):
    """T tasks of equal size, float32 or float64."""

    support: Tensor  # [T, S, D]
    labels: Tensor  # [T, S] int64
    members: Tensor  # [T, S, N], 1 for a row's own class
    query: Tensor  # [T, Q, D]
    proportions: Tensor | None  # [T, N]

    @property
    def counts(self) -> Tensor:
        """[T, N], the support rows of each class."""
        return self.members.sum(-2)

    def means(self) -> Tensor:
        """[T, N, D], the mean support row of each class."""
        return self.members.mT @ self.support / self.counts.unsqueeze(-1)


@without_autocast
def solved(
    solve: Callable[[Tasks], Tensor],
    support: Tensor,
    support_labels: Tensor,
    query: Tensor,
    *,
    n_way: int,
    proportions: Tensor | None = None,
    ragged: Ragged | None = None,
) -> Tensor:
    """What ``solve`` makes of checked tasks: scores [T, Q, N], or [all query rows, N] of tasks of unequal size, which
    it gets one by one; minus infinity beyond a task's own ways.

    Raises:
        ValueError, TypeError: an argument that does not fit, named.
    """
    named = {"support": support, "query": query}
    if proportions is not None:
        named["proportions"] = proportions
    _checks.tensors(**named)
    support_labels = as_labels(support_labels)
    _checks.task_rows(support, support_labels, query, None, None, ragged)
    _checks.ways(n_way)
    dtype = torch.promote_types(torch.promote_types(support.dtype, query.dtype), torch.float32)
    T = support_labels.shape[0] if ragged is None else ragged.support_offsets.shape[0] - 1
    if proportions is not None:
        _check_proportions(proportions, (T, n_way), None if ragged is None else ragged.n_ways)
        proportions = proportions.to(dtype)

    def one_batch(support: Tensor, labels: Tensor, query: Tensor, shares: Tensor | None, ways: int) -> Tensor:
        check_labels(labels, ways)
        members = one_hot_targets(labels, ways, dtype)
        return solve(Tasks(support.to(dtype), labels, members, query.to(dtype), shares))

    if ragged is None:
        return one_batch(support, support_labels, query, proportions, n_way)
    scores = [query.new_zeros(0, n_way, dtype=dtype)]
    for t, (s, q, ways) in enumerate(each_task(ragged, n_way)):
        shares = None if proportions is None else proportions[t, None, :ways]
        own = one_batch(support[None, s], support_labels[None, s], query[None, q], shares, ways)
        scores.append(pad(own[0], (0, n_way - ways), value=-math.inf))
    return torch.cat(scores)


def _check_proportions(proportions: Tensor, shape: tuple[int, int], ways: Tensor | None) -> None:
    _checks.shape("proportions", proportions, shape, "[T, N]")
    shares = proportions.double()
    if ways is not None:  # nothing may lie beyond a task's own ways
        beyond = torch.arange(shape[1], device=shares.device) >= ways.unsqueeze(-1)
        shares = torch.where(beyond & (shares != 0), math.nan, shares)
    wrong = ~((shares >= 0).all(-1) & ((shares.sum(-1) - 1).abs() <= 1e-5))
    if wrong.any():
        task = int(wrong.nonzero()[0])
        raise ValueError(
            f"proportions: task {task} has {[round(p, 6) for p in proportions[task].tolist()]}; the shares of its"
            " classes must be 0 or more and sum to 1"
        )


def check_least(**given: tuple[float, float]) -> None:
    """Each is a finite number of at least so much: name -> (given, least). Raises ValueError or TypeError."""
    for name, (value, least) in given.items():
        whole = isinstance(least, int)
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
            raise TypeError(f"{name}: expected {'an int' if whole else 'a number'}, got {value!r}")
        if not least <= value < math.inf:
            raise ValueError(f"{name}: expected a finite number of at least {least:g}, got {value}")
