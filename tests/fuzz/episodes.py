"""Episodes hold what they promise: distinct rows, of the split's classes, as many as asked for, again and again."""

# ruff: noqa: PT017 (what an error says is part of the case)

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from kernelmeta.data import EpisodeSampler, FeatureBank, RaggedEpisodeSampler


def check(random: np.random.Generator, folder: Path) -> None:
    C = int(random.integers(2, 12))
    counts = random.integers(1, 40, C)
    labels = random.permutation(np.repeat(np.arange(C), counts))
    split = random.integers(0, 3, C).astype(np.uint8)
    kind = random.choice([torch.int64, torch.int32, torch.int16, torch.uint8])
    bank = FeatureBank(
        torch.zeros(len(labels), 1),
        torch.from_numpy(labels).to(kind),
        torch.from_numpy(split),
        tuple(map(str, range(C))),
    )
    name = str(random.choice(["train", "val", "test"]))
    balance = "even" if random.random() < 0.4 else f"dirichlet:{10.0 ** random.integers(-12, 12)}"
    way, shot, query = (int(random.integers(low, high)) for low, high in ((2, 6), (1, 6), (1, 12)))
    seed, first, n = int(random.integers(0, 2**63)), int(random.integers(0, 2**50)), int(random.integers(1, 9))
    ragged = random.random() < 0.4
    case = f"{counts.tolist()}, {split.tolist()}, {name}, {balance}, {way}, {shot}, {query}, {seed}, {first}, {n}"
    own = np.flatnonzero(split == ["train", "val", "test"].index(name))
    left = np.sort(counts[own])[:way] - shot
    fewest = left[: 2 if ragged else way]
    enough = (
        len(own) >= way and (left >= (query if balance == "even" else 0)).all() and fewest.sum() >= len(fewest) * query
    )
    try:
        if ragged:
            sampler = RaggedEpisodeSampler(
                bank, name, ways=(2, way), shots=(1, shot), queries=(1, query), balance=balance, seed=seed
            )
        else:
            sampler = EpisodeSampler(bank, name, way=way, shot=shot, query=query, balance=balance, seed=seed)
    except ValueError as error:
        assert not enough, (case, error)
        return
    assert enough, case
    drawn = sampler.draw(first, n)
    for t in range(n):
        alone = sampler.draw(first + t, 1)
        one, again = (drawn.task(t), alone.task(0)) if ragged else ([x[t : t + 1] for x in drawn], alone)
        assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True)), case
        support, support_labels, rows, answers = (x[0].numpy() for x in one)
        together = np.concatenate([support, rows])
        assert len(set(together.tolist())) == len(together), case
        N = int(support_labels.max()) + 1
        classes = [set(labels[support[support_labels == c]].tolist()) for c in range(N)]
        assert all(len(c) == 1 for c in classes) and len(set.union(*classes)) == N, case
        assert set.union(*classes) <= set(own.tolist()), case
        assert all({int(labels[row])} == classes[answer] for row, answer in zip(rows, answers, strict=True)), case
        per_class = np.bincount(answers, minlength=N)
        if ragged:
            assert 2 <= N <= way and N <= len(rows) <= N * query, case
            assert (np.bincount(support_labels) <= shot).all() and (balance != "even" or (per_class <= query).all()), (
                case
            )
        else:
            assert way == N and (np.bincount(support_labels) == shot).all() and len(rows) == way * query, case
            assert balance != "even" or (per_class == query).all(), case
