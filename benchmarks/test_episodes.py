"""Drawing episodes: index tensors, no features touched."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernelmeta.data import EpisodeSampler, FeatureBank


def bank(classes: int = 64, samples: int = 600, D: int = 1) -> FeatureBank:
    """As large as the training split of miniImageNet; the features are noise."""
    features = torch.randn(classes * samples, D, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(classes).repeat_interleave(samples)
    return FeatureBank(features, labels, torch.zeros(classes, dtype=torch.uint8), tuple(map(str, range(classes))))


@pytest.mark.parametrize("balance", ["even", "dirichlet:2"])
@pytest.mark.parametrize("n", [1, 64, 10_000])
def test_episodes(n: int, balance: str, benchmark: Any) -> None:
    sampler = EpisodeSampler(bank(), "train", balance=balance)
    benchmark.group = f"{n} episodes, 5-way 1-shot 15-query, {balance}"
    first = iter(range(0, 1 << 60, n))
    drawn = benchmark(lambda: sampler.draw(next(first), n))
    assert drawn.query_index.shape == (n, 75)
