"""Few-shot episodes as index tensors.

Episode number e of a seed and split is a pure function of (seed, split, e): it can be drawn again, on any
rank, after a resume, without drawing those before it. Step t of T tasks holds the episodes t*T .. t*T + T-1.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kernelmeta.data.bank import FeatureBank
from kernelmeta.data.class_draws import ClassDraws, Ints, balanced


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


def parse_balances(text: str) -> tuple[float | None, ...]:
    """ "even,dirichlet:2" -> (None, 2.0): balances, as `parse_balance` takes each. Raises ValueError."""
    found = tuple(parse_balance(word.strip()) for word in text.split(","))
    if len(set(found)) < len(found):
        raise ValueError(f"query_balance: expected each once, got {text!r}")
    return found


class EpisodeSampler:
    """Draws episodes from the classes of one split of a bank.

    Args:
        bank: the bank.
        split: "train", "val" or "test".
        way, shot: N classes an episode, support rows a class.
        query: query rows a class; Q = way * query rows an episode.
        balance: "even": every class has ``query`` rows. "dirichlet:ALPHA": the classes' shares of the Q rows are drawn
            from Dirichlet(ALPHA) (Veilleux et al., NeurIPS 2021), rounded, and cut where a class has not that many
            samples left; what is cut goes to the other classes. A class may have no query row. Several, with commas:
            each episode has one of them, drawn.
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
        self.alphas = parse_balances(balance)
        self._draws = ClassDraws(bank, split, way, seed)
        self._draws.check_samples(shot, query if None in self.alphas else 0)
        self._draws.check_left(way, shot, query)

    def draw(self, first: int, n: int) -> Episodes:
        """Episodes first .. first+n-1; the same however a range is cut into calls."""
        per_call = self._draws.per_call
        parts = [self._draw(e, min(per_call, first + n - e)) for e in range(first, first + n, per_call)]
        if not parts:
            empty = torch.zeros(0, self.way * self.shot, dtype=torch.int64)
            rows = torch.zeros(0, self.way * self.query, dtype=torch.int64)
            return Episodes(empty, empty, rows, rows)
        return Episodes(*(torch.from_numpy(np.concatenate(part)) for part in zip(*parts, strict=True)))

    def _draw(self, first: int, n: int) -> tuple[Ints, Ints, Ints, Ints]:
        N, shot, Q, draws = self.way, self.shot, self.way * self.query, self._draws
        keys = draws.keys(first, n)
        chosen = draws.choose_classes(keys)  # [n, N]
        available = draws.count[chosen]
        counts = balanced(keys, self.alphas, np.full((n, N), self.query), available - shot)
        picked = draws.choose_samples(keys, available, shot + int(counts.max(initial=0)))  # [n, N, draws]

        ends = np.cumsum(counts, axis=1)
        query_labels = (np.arange(Q)[None, :, None] >= ends[:, None, :]).sum(2)
        within = np.arange(Q) - np.take_along_axis(ends - counts, query_labels, 1)
        episode = np.arange(n)[:, None]
        query = picked[episode, query_labels, shot + within] + draws.first[chosen[episode, query_labels]]
        support = (picked[:, :, :shot] + draws.first[chosen][:, :, None]).reshape(n, N * shot)
        support_labels = np.broadcast_to(np.repeat(np.arange(N), shot), support.shape)
        return draws.rows[support], support_labels, draws.rows[query], query_labels
