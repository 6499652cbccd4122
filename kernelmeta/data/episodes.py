"""Few-shot episodes as index tensors.

Episode number e of a seed and split is a pure function of (seed, split, e): it can be drawn again, on any
rank, after a resume, without drawing those before it. Step t of T tasks holds the episodes t*T .. t*T + T-1.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernelmeta.data import counter
from kernelmeta.data.bank import SPLITS, FeatureBank

Ints = NDArray[np.int64]

# What a key is drawn for.
_CLASSES, _SAMPLES, _PROPORTIONS = range(3)
# Elements of the permutations that are shuffled at a time.
_SCRATCH = 1 << 21


class Episodes(NamedTuple):
    """T episodes; all int64. Indices point into the rows of the bank; rows are sorted by class."""

    support_index: Tensor  # [T, S]
    support_labels: Tensor  # [T, S] in 0..N-1
    query_index: Tensor  # [T, Q]
    query_labels: Tensor  # [T, Q] in 0..N-1


def parse_balance(text: str) -> float | None:
    """ "even" -> None, "dirichlet:ALPHA" -> ALPHA. Raises ValueError."""
    if text == "even":
        return None
    name, _, value = text.partition(":")
    try:
        alpha = float(value)
    except ValueError:
        alpha = math.nan
    if name != "dirichlet" or not 0 < alpha < math.inf:
        raise ValueError(f"query_balance: expected 'even' or 'dirichlet:ALPHA' with ALPHA > 0, got {text!r}")
    return alpha


class EpisodeSampler:
    """Draws episodes from the classes of one split of a bank.

    Args:
        bank: the bank.
        split: "train", "val" or "test".
        way, shot: N classes an episode, support rows a class.
        query: query rows a class; Q = way * query rows an episode.
        balance: "even": every class has ``query`` rows. "dirichlet:ALPHA": the classes' shares of the Q
            rows are
            drawn from Dirichlet(ALPHA) (Veilleux et al., NeurIPS 2021), rounded, and cut where a class has
            not that many samples left; what is cut goes to the other classes. A class may have no query row.
        seed: chooses the sequence of episodes.

    Raises:
        ValueError: the split has too few classes, or one of its classes (named) too few samples.
    """

    def __init__(
        self,
        bank: FeatureBank,
        split: str,
        *,
        way: int = 5,
        shot: int = 1,
        query: int = 15,
        balance: str = "even",
        seed: int = 0,
    ) -> None:
        for name, value, least in (("way", way, 2), ("shot", shot, 1), ("query", query, 1)):
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        self.way, self.shot, self.query = way, shot, query
        self.alpha = parse_balance(balance)
        classes = bank.classes(split).numpy()
        if way > len(classes):
            raise ValueError(f"way: {way} classes asked for, the {split} split has {len(classes)}")
        labels = bank.labels.numpy()
        counts = np.bincount(labels, minlength=len(bank.class_names))
        self._rows = np.argsort(labels, kind="stable")
        self._first = (np.cumsum(counts) - counts)[classes]
        self._count = counts[classes]
        self._key = counter.words(seed, SPLITS[split])
        self._check_samples(split, [bank.class_names[c] for c in classes])
        widest = int(self._count.max())
        rows = max(1, _SCRATCH // (widest * way)) * way
        self._permutation = np.broadcast_to(np.arange(widest, dtype=np.int32), (rows, widest)).copy()

    def _check_samples(self, split: str, names: list[str]) -> None:
        needed = self.shot + (self.query if self.alpha is None else 0)
        least = int(np.argmin(self._count))
        if self._count[least] < needed:
            raise ValueError(
                f"class {names[least]!r} of the {split} split has {self._count[least]} samples;"
                f" {needed} are needed ({self.shot} shot + {needed - self.shot} query)"
            )
        left = int(np.sort(self._count - self.shot)[: self.way].sum())
        if left < self.way * self.query:
            raise ValueError(
                f"query: {self.way} classes of the {split} split may have only {left} samples left for"
                f" {self.way} x {self.query} query rows (smallest: {names[least]!r},"
                f" {self._count[least]} samples)"
            )

    def draw(self, first: int, n: int) -> Episodes:
        """Episodes first .. first+n-1; the same however a range is cut into calls."""
        per_call = max(1, len(self._permutation) // self.way)
        parts = [self._draw(e, min(per_call, first + n - e)) for e in range(first, first + n, per_call)]
        if not parts:
            empty = torch.zeros(0, self.way * self.shot, dtype=torch.int64)
            rows = torch.zeros(0, self.way * self.query, dtype=torch.int64)
            return Episodes(empty, empty, rows, rows)
        return Episodes(*(torch.from_numpy(np.concatenate(part)) for part in zip(*parts, strict=True)))

    def _draw(self, first: int, n: int) -> tuple[Ints, Ints, Ints, Ints]:
        N, shot, Q = self.way, self.shot, self.way * self.query
        keys = counter.words(self._key, np.arange(first, first + n))
        chosen = self._choose_classes(keys)  # [n, N]
        available = self._count[chosen]
        if self.alpha is None:
            counts = np.full((n, N), self.query)
        else:
            shares = counter.gamma(counter.words(keys[:, None], _PROPORTIONS, np.arange(N)), self.alpha)
            shares /= np.maximum(shares.sum(1, keepdims=True), np.finfo(float).tiny)
            counts = apportion(shares, available - shot, Q)
        picked = self._choose_samples(keys, available, shot + int(counts.max(initial=0)))  # [n, N, draws]

        ends = np.cumsum(counts, axis=1)
        query_labels = (np.arange(Q)[None, :, None] >= ends[:, None, :]).sum(2)
        within = np.arange(Q) - np.take_along_axis(ends - counts, query_labels, 1)
        episode = np.arange(n)[:, None]
        query = picked[episode, query_labels, shot + within] + self._first[chosen[episode, query_labels]]
        support = (picked[:, :, :shot] + self._first[chosen][:, :, None]).reshape(n, N * shot)
        support_labels = np.broadcast_to(np.repeat(np.arange(N), shot), support.shape)
        return self._rows[support], support_labels, self._rows[query], query_labels

    def _choose_classes(self, keys: counter.Words) -> Ints:
        """[n] keys -> [n, N] positions among the split's classes, each row without repetition."""
        C = len(self._count)
        random = counter.words(keys[:, None], _CLASSES, np.arange(self.way))
        order = np.broadcast_to(np.arange(C), (len(keys), C)).copy()
        episode = np.arange(len(keys))
        for i in range(self.way):
            j = i + counter.below(random[:, i], C - i)
            order[episode, j], order[:, i] = order[:, i].copy(), order[episode, j]
        return order[:, : self.way]

    def _choose_samples(self, keys: counter.Words, available: Ints, draws: int) -> Ints:
        """[n, N, draws]: the start of a shuffle of 0..available-1, for every episode and class.

        The scratch permutations are put back as they were, so that the cost does not grow with the classes.
        """
        n, N = available.shape
        size = available.reshape(-1)
        draws = min(draws, int(size.max(initial=0)))
        random = counter.words(keys[:, None, None], _SAMPLES, np.arange(N)[None, :, None], np.arange(draws)).reshape(
            n * N, draws
        )
        row = np.arange(n * N)
        order = self._permutation
        swapped = np.empty((draws, n * N), dtype=np.int64)
        for i in range(draws):
            # A class with no more than i samples swaps its last one with itself; nobody reads that draw.
            here = np.minimum(i, size - 1)
            j = here + counter.below(random[:, i], size - here)
            swapped[i] = j
            order[row, j], order[row, here] = order[row, here], order[row, j]
        picked = order[: n * N, :draws].astype(np.int64).reshape(n, N, draws)
        order[: n * N, :draws] = np.arange(draws, dtype=np.int32)
        for j in swapped:
            order[row, j] = j
        return picked


def apportion(shares: counter.Floats, limit: Ints, total: int) -> Ints:
    """Whole numbers [n, N] close to ``total * shares`` (largest remainder), at most ``limit``.

    Each row sums to ``total``; each row of ``limit`` must sum to at least that.
    """
    wanted = shares * total
    counts = np.minimum(np.floor(wanted).astype(np.int64), limit)
    while True:
        short = np.flatnonzero(counts.sum(1) < total)
        if not short.size:
            return counts
        deficit = np.where(counts[short] < limit[short], wanted[short] - counts[short], -np.inf)
        counts[short, deficit.argmax(1)] += 1
