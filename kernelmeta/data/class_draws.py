"""Draws of classes and of their samples, from the classes of one split of a bank."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kernelmeta.data import counter
from kernelmeta.data.bank import SPLITS, FeatureBank

Ints = NDArray[np.int64]

# What a key is drawn for.
CLASSES, SAMPLES, PROPORTIONS, WAYS, SHOTS, QUERIES, BALANCES = range(7)
# Elements of the permutations that are shuffled at a time.
_SCRATCH = 1 << 21
# Smaller shares than exp of that are told apart by their order alone.
_LEAST_LOG = -600.0


class ClassDraws:
    """The samples of a split's classes, and draws from them without repetition.

    Args:
        bank, split: whose classes.
        way: the most classes an episode may have.
        seed: chooses the sequence of episodes.

    Raises:
        ValueError: the split has fewer classes; a seed out of range.
    """

    def __init__(self, bank: FeatureBank, split: str, way: int, seed: int) -> None:
        counter.check_seed(seed)
        classes = bank.classes(split).numpy()
        if way > len(classes):
            raise ValueError(f"way: {way} classes asked for, the {split} split has {len(classes)}: ask for fewer")
        labels = bank.labels.numpy()
        counts = np.bincount(labels, minlength=len(bank.class_names))
        self.split, self.way = split, way
        self._bank = bank
        self.names = [bank.class_names[c] for c in classes]
        self.rows = np.argsort(labels, kind="stable")
        self.first = (np.cumsum(counts) - counts)[classes]  # of every class, its place in rows
        self.count = counts[classes]
        self._key = counter.words(seed, SPLITS[split])
        widest = int(self.count.max())
        scratch_rows = max(1, _SCRATCH // (widest * way)) * way
        self._permutation = np.broadcast_to(np.arange(widest, dtype=np.int32), (scratch_rows, widest)).copy()

    @property
    def per_call(self) -> int:
        """Episodes that `choose_samples` takes at a time."""
        return max(1, len(self._permutation) // self.way)

    def keys(self, first: int, n: int) -> counter.Words:
        """[n] keys, of the episodes first .. first+n-1, whose rows are soon to be read.

        Raises ValueError if the bank's file has changed.
        """
        self._bank.check_file()
        return counter.words(self._key, np.arange(first, first + n))

    def check_samples(self, shot: int, query: int) -> None:
        """Raises ValueError if a class, named, has not ``shot + query`` samples."""
        least = int(np.argmin(self.count))
        if self.count[least] < shot + query:
            raise ValueError(
                f"class {self.names[least]!r} of the {self.split} split has {self.count[least]} samples;"
                f" {shot + query} are needed ({shot} shot + {query} query)"
            )

    def check_left(self, way: int, shot: int, query: int) -> None:
        """Raises ValueError if ``way`` classes may have fewer than ``way * query`` samples beside the support."""
        left = int(np.sort(self.count - shot)[:way].sum())
        if left < way * query:
            least = int(np.argmin(self.count))
            raise ValueError(
                f"query: {way} classes of the {self.split} split may have only {left} samples left for"
                f" {way} x {query} query rows (smallest: {self.names[least]!r}, {self.count[least]} samples)"
            )

    def choose_classes(self, keys: counter.Words) -> Ints:
        """[n] keys -> [n, way] positions among the split's classes, each row without repetition; its start too is a
        fair draw.
        """
        C = len(self.count)
        random = counter.words(keys[:, None], CLASSES, np.arange(self.way))
        order = np.broadcast_to(np.arange(C), (len(keys), C)).copy()
        episode = np.arange(len(keys))
        for i in range(self.way):
            j = i + counter.below(random[:, i], C - i)
            order[episode, j], order[:, i] = order[:, i].copy(), order[episode, j]
        return order[:, : self.way]

    def choose_samples(self, keys: counter.Words, available: Ints, draws: int) -> Ints:
        """[n, way, draws]: the start of a shuffle of 0..available-1, for every episode and class.

        The scratch permutations are put back as they were, so that the cost does not grow with the classes.
        """
        n, N = available.shape
        size = available.reshape(-1)
        draws = min(draws, int(size.max(initial=0)))
        random = counter.words(keys[:, None, None], SAMPLES, np.arange(N)[None, :, None], np.arange(draws)).reshape(
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


def shares(keys: counter.Words, way: int, alpha: float, used: NDArray[np.bool_] | None = None) -> counter.Floats:
    """[n] keys -> [n, way] shares drawn from Dirichlet(alpha), of the classes in ``used`` [n, way] if given.

    Each row sums to 1. Gamma variates divided by their sum, by their logarithms: of alpha 1e-3 most are too small for a
    float. Those stay above 0, in their order.
    """
    words = counter.words(keys[:, None], PROPORTIONS, np.arange(way))
    if alpha >= 1:
        logs, unit = counter.log_gamma(words, alpha), 1.0
    else:  # Gamma(alpha) = Gamma(alpha + 1) u^(1 / alpha); alpha times the logarithm does not overflow
        logs, unit = (
            alpha * counter.log_gamma(words, alpha + 1) + np.log(counter.uniform(counter.words(words, -1, 0))),
            alpha,
        )
    if used is not None:
        logs = np.where(used, logs, -np.inf)
    with np.errstate(over="ignore"):
        logs = (logs - logs.max(1, keepdims=True)) / unit
    rank = np.argsort(np.argsort(-logs, axis=1), axis=1)
    parts = np.exp(np.maximum(logs, _LEAST_LOG - rank))
    if used is not None:
        parts = parts * used
    return np.asarray(parts / parts.sum(1, keepdims=True))


def balanced(
    keys: counter.Words, alphas: Sequence[float | None], even: Ints, limit: Ints, used: NDArray[np.bool_] | None = None
) -> Ints:
    """[n] keys -> query rows [n, N] of the classes, as many in each episode as in ``even``.

    Args:
        alphas: balances, None for an even one; where there are several, every episode has one of them, each equally
            likely.
        even: [n, N], where the balance is even.
        limit: [n, N], the most that there can be.
        used: [n, N], as of `shares`.
    """
    if len(alphas) == 1:
        chosen = np.zeros(len(keys), dtype=np.int64)
    else:
        chosen = counter.below(counter.words(keys, BALANCES), len(alphas))
    counts = even
    for i, alpha in enumerate(alphas):
        here = np.flatnonzero(chosen == i)
        if alpha is None or not len(here):
            continue
        if counts is even:
            counts = even.copy()
        own = shares(keys[here], even.shape[1], alpha, None if used is None else used[here])
        counts[here] = apportion(own, limit[here], even[here].sum(1))
    return counts


def apportion(shares: counter.Floats, limit: Ints, total: Ints | int) -> Ints:
    """Whole numbers [n, N] close to ``total * shares`` (largest remainder), at most ``limit``.

    Each row sums to its ``total`` ([n], or one for all); each row of ``limit`` must sum to at least that.
    """
    total = np.broadcast_to(np.asarray(total), len(shares))
    wanted = shares * total[:, None]
    counts = np.minimum(np.floor(wanted).astype(np.int64), limit)
    while True:
        short = np.flatnonzero(counts.sum(1) < total)
        if not short.size:
            return counts
        deficit = np.where(counts[short] < limit[short], wanted[short] - counts[short], -np.inf)
        counts[short, deficit.argmax(1)] += 1
