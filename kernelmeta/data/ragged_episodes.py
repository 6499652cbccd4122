"""Episodes of unequal sizes: ways, shots and query counts differ from task to task, and from class to class.

The rows of T tasks lie one after the other, with offsets, in the manner of variable-length attention. As with even
episodes, episode number e of a seed and split is a pure function of (seed, split, e).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kernelmeta.data import counter
from kernelmeta.data.bank import FeatureBank
from kernelmeta.data.class_draws import QUERIES, SHOTS, WAYS, ClassDraws, Ints, balanced
from kernelmeta.data.episodes import Episodes, parse_balances
from kernelmeta.tasks import Ragged

Range = tuple[int, int]


class RaggedEpisodes(NamedTuple):
    """T episodes; all int64. Indices point into the rows of the bank; rows are sorted by task, then by class."""

    support_index: Tensor  # [all support rows]
    support_labels: Tensor  # [all support rows] in 0..n_ways[t]-1
    query_index: Tensor  # [all query rows]
    query_labels: Tensor  # [all query rows] in 0..n_ways[t]-1
    ragged: Ragged  # where each task begins, and its ways

    def tasks(self, first: int, n: int) -> RaggedEpisodes:
        """The tasks first .. first+n-1."""
        of_support, of_query = (
            offsets[first : first + n + 1] for offsets in (self.ragged.support_offsets, self.ragged.query_offsets)
        )
        support, query = (slice(int(offsets[0]), int(offsets[-1])) for offsets in (of_support, of_query))
        n_ways = None if self.ragged.n_ways is None else self.ragged.n_ways[first : first + n]
        return RaggedEpisodes(
            self.support_index[support],
            self.support_labels[support],
            self.query_index[query],
            self.query_labels[query],
            self.ragged._replace(
                support_offsets=of_support - of_support[0], query_offsets=of_query - of_query[0], n_ways=n_ways
            ),
        )

    def task(self, t: int) -> Episodes:
        """Task t as an even batch of one: [1, S], [1, S], [1, Q], [1, Q]."""
        support, query = (
            slice(int(offsets[t]), int(offsets[t + 1]))
            for offsets in (self.ragged.support_offsets, self.ragged.query_offsets)
        )
        return Episodes(
            self.support_index[None, support],
            self.support_labels[None, support],
            self.query_index[None, query],
            self.query_labels[None, query],
        )


class RaggedEpisodeSampler:
    """Draws episodes of unequal sizes from the classes of one split of a bank.

    Args:
        bank: the bank.
        split: "train", "val" or "test".
        ways: least and most classes an episode; every number between is equally likely.
        shots: least and most support rows a class, drawn for every class of every episode.
        queries: least and most query rows a class, drawn likewise.
        balance: "even": every class has the query rows drawn for it. "dirichlet:ALPHA": an episode has as many query
            rows in all, but the classes' shares of them are drawn from Dirichlet(ALPHA), rounded, and cut where a
            class has not that many samples left; what is cut goes to the other classes. A class may have no query row.
            Several, with commas: each episode has one of them, drawn.
        same_shots: the classes of an episode have as many support rows each, drawn once for the episode.
        seed: chooses the sequence of episodes.

    Raises:
        ValueError: a range that is none; the split has too few classes, or one of its classes (named) too few samples
            for the most that may be drawn.
    """

    def __init__(
        self,
        bank: FeatureBank,
        split: str,
        *,
        ways: Range = (5, 50),
        shots: Range = (1, 10),
        queries: Range = (1, 15),
        balance: str = "even",
        same_shots: bool = False,
        seed: int = 0,
    ) -> None:
        for name, value, least in (("ways", ways, 2), ("shots", shots, 1), ("queries", queries, 1)):
            if len(value) != 2 or not least <= value[0] <= value[1]:
                raise ValueError(f"{name}: expected (least, most) with {least} <= least <= most, got {value}")
        self.ways, self.shots, self.queries, self.same_shots = ways, shots, queries, same_shots
        self.alphas = parse_balances(balance)
        self._draws = ClassDraws(bank, split, ways[1], seed)
        self._draws.check_samples(shots[1], queries[1] if None in self.alphas else 0)
        # Of the smallest classes: if the fewest that an episode may have suffice, so do more.
        self._draws.check_left(ways[0], shots[1], queries[1])

    @property
    def max_support(self) -> int:
        """The most support rows that an episode may have."""
        return self.ways[1] * self.shots[1]

    @property
    def max_query(self) -> int:
        """The most query rows that an episode may have."""
        return self.ways[1] * self.queries[1]

    def draw(self, first: int, n: int) -> RaggedEpisodes:
        """Episodes first .. first+n-1; the same however a range is cut into calls."""
        per_call = self._draws.per_call
        parts = [self._draw(e, min(per_call, first + n - e)) for e in range(first, first + n, per_call)]
        if not parts:
            none, zero = torch.zeros(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
            return RaggedEpisodes(none, none, none, none, Ragged(zero, zero, none))
        joined = (torch.from_numpy(np.concatenate(part)) for part in zip(*parts, strict=True))
        support_index, support_labels, support_counts, query_index, query_labels, query_counts, n_ways = joined
        ragged = Ragged(_offsets(support_counts), _offsets(query_counts), n_ways)
        return RaggedEpisodes(support_index, support_labels, query_index, query_labels, ragged)

    def _draw(self, first: int, n: int) -> tuple[Ints, ...]:
        """Indices and labels of the rows, and how many an episode has, for support and query; and the ways."""
        W, draws = self.ways[1], self._draws
        keys = draws.keys(first, n)
        n_ways = _between(counter.words(keys, WAYS), self.ways)
        used = np.arange(W) < n_ways[:, None]  # [n, W]
        chosen = draws.choose_classes(keys)
        available = draws.count[chosen]
        of_shots = np.zeros(1, dtype=np.int64) if self.same_shots else np.arange(W)
        shots = used * _between(counter.words(keys[:, None], SHOTS, of_shots), self.shots)
        queries = used * _between(counter.words(keys[:, None], QUERIES, np.arange(W)), self.queries)
        queries = balanced(keys, self.alphas, queries, used * (available - shots), used)
        picked = draws.choose_samples(keys, available, int((shots + queries).max(initial=0)))  # [n, W, draws]
        # Draws beyond a class's samples, which nobody reads, may be beyond all rows.
        rows = draws.rows[np.minimum(picked + draws.first[chosen][:, :, None], len(draws.rows) - 1)]
        place = np.arange(picked.shape[2])
        label = np.broadcast_to(np.arange(W)[None, :, None], picked.shape)
        in_support = place < shots[:, :, None]
        in_query = (place < (shots + queries)[:, :, None]) & ~in_support
        return (
            rows[in_support], label[in_support], shots.sum(1),
            rows[in_query], label[in_query], queries.sum(1), n_ways,
        )  # fmt: skip


def _between(random: counter.Words, bounds: Range) -> Ints:
    """Words -> integers from the least to the most, both included."""
    return bounds[0] + counter.below(random, bounds[1] - bounds[0] + 1)


def _offsets(counts: Tensor) -> Tensor:
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0))
