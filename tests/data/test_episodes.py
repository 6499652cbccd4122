"""Episodes: what they hold, that they are pure functions of seed and number, and how fast they are drawn."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernelmeta.data import EpisodeSampler, FeatureBank, counter
from kernelmeta.data.class_draws import apportion, shares
from kernelmeta.data.episodes import parse_balance


def make_bank(counts: list[int], split: list[int] | None = None) -> FeatureBank:
    """A bank with so many samples of each class, in a shuffled order."""
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    class_split = torch.tensor(split or [0] * len(counts), dtype=torch.uint8)
    names = tuple(f"class {c}" for c in range(len(counts)))
    return FeatureBank(torch.zeros(len(labels), 1), labels, class_split, names)


@pytest.mark.parametrize("balance", ["even", "dirichlet:2", "dirichlet:0.1"])
def test_rows_belong_to_their_classes_and_never_repeat(balance):
    bank = make_bank([30, 16, 41, 25, 90, 20, 17, 33], split=[0, 0, 0, 1, 0, 0, 2, 0])
    sampler = EpisodeSampler(bank, "train", way=4, shot=3, query=10, balance=balance, seed=3)
    support_index, support_labels, query_index, query_labels = sampler.draw(0, 200)
    assert support_index.shape == support_labels.shape == (200, 12)
    assert query_index.shape == query_labels.shape == (200, 40)
    assert all(t.dtype == torch.int64 for t in sampler.draw(0, 1))
    for t in range(200):
        rows = torch.cat([support_index[t], query_index[t]])
        assert len(rows.unique()) == 52
        classes = bank.labels[support_index[t]].view(4, 3)
        assert (classes == classes[:, :1]).all()
        assert len(classes[:, 0].unique()) == 4
        assert (bank.class_split[classes] == 0).all()
        assert (support_labels[t] == torch.arange(4).repeat_interleave(3)).all()
        assert (bank.labels[query_index[t]] == classes[query_labels[t], 0]).all()
    if balance == "even":
        assert (query_labels == torch.arange(4).repeat_interleave(10)).all()


@settings(max_examples=40, deadline=None)
@given(
    first=st.integers(0, 2**40),
    skip=st.integers(0, 60),
    n=st.integers(1, 70),
    balance=st.sampled_from(["even", "dirichlet:2"]),
)
def test_any_range_can_be_drawn_alone(first, skip, n, balance):
    sampler = EpisodeSampler(make_bank([40] * 9), "train", way=3, shot=2, query=6, balance=balance, seed=1)
    whole = sampler.draw(first, skip + n)
    alone = sampler.draw(first + skip, n)
    for a, b in zip(whole, alone, strict=True):
        assert torch.equal(a[skip:], b)


def test_cutting_a_draw_by_memory_changes_nothing(monkeypatch):
    bank = make_bank([40] * 9)
    whole = EpisodeSampler(bank, "train", way=3, query=6).draw(5, 50)
    monkeypatch.setattr("kernelmeta.data.class_draws._SCRATCH", 40 * 3 * 7)
    cut = EpisodeSampler(bank, "train", way=3, query=6).draw(5, 50)
    assert all(torch.equal(a, b) for a, b in zip(whole, cut, strict=True))


def test_seed_and_split_choose_the_sequence():
    bank = make_bank([40] * 12, split=[0] * 6 + [1] * 6)
    draws = [EpisodeSampler(bank, "train", way=3, seed=seed).draw(0, 20).query_index for seed in (0, 1)]
    assert not torch.equal(*draws)
    validation = EpisodeSampler(bank, "val", way=3, seed=0).draw(0, 20)
    relative = bank.labels[validation.support_index] - 6
    assert not torch.equal(relative, bank.labels[EpisodeSampler(bank, "train", way=3).draw(0, 20).support_index])


def test_the_episodes_do_not_change():
    # Runs that are resumed with a later version must see the same episodes.
    bank = make_bank([20] * 6)
    episode = EpisodeSampler(bank, "train", way=3, query=2, seed=5).draw(1000, 1)
    assert bank.labels[episode.support_index].tolist() == [[5, 2, 1]]


def test_classes_and_samples_are_drawn_evenly():
    bank = make_bank([16] * 10)
    episodes = EpisodeSampler(bank, "train", way=5, shot=1, query=5).draw(0, 4000)
    classes = torch.bincount(bank.labels[episodes.support_index].flatten(), minlength=10)
    assert abs(classes - 2000).max() < 5 * np.sqrt(4000 * 0.25)
    first_class = torch.bincount(bank.labels[episodes.support_index[:, 0]], minlength=10)
    assert abs(first_class - 400).max() < 5 * np.sqrt(4000 * 0.09)
    for index, share in ((episodes.support_index, 125), (episodes.query_index, 625)):
        samples = torch.bincount(index.flatten(), minlength=160)
        assert abs(samples - share).max() < 5.5 * np.sqrt(share)


def test_dirichlet_shares_have_their_mean_and_variance():
    sampler = EpisodeSampler(make_bank([400] * 8), "train", way=5, query=60, balance="dirichlet:2")
    labels = sampler.draw(0, 3000).query_labels
    shares = torch.stack([(labels == c).double().mean(1) for c in range(5)], 1)
    assert abs(shares.mean(0) - 0.2).max() < 0.01
    # Dirichlet(2, ..., 2): variance 0.2 * 0.8 / 11
    assert shares.var(0).numpy() == pytest.approx(0.2 * 0.8 / 11, rel=0.12)


@pytest.mark.parametrize("alpha", [5e-324, 1e-9, 1e-6, 1e-3, 0.1, 0.9, 1.0, 2.0, 100.0, 1e6, 1e300])
def test_shares_have_the_moments_of_dirichlet_whatever_alpha(alpha):
    N, n = 5, 20_000
    drawn = shares(counter.words(3, np.arange(n)), N, alpha)
    assert np.isfinite(drawn).all()
    assert abs(drawn.sum(1) - 1).max() < 1e-12
    variance = (1 / N) * (1 - 1 / N) / (N * alpha + 1)
    assert abs(drawn.mean(0) - 1 / N).max() <= 5 * np.sqrt(variance / n) + 1e-12
    # Of a variable in [0, 1], (x - mean)^2 has at most the variance of x as its own.
    spread = variance * np.sqrt(3 / n) if alpha >= 1 else np.sqrt(variance / n)
    assert abs(drawn.var(0) - variance).max() < 5 * spread + 1e-16
    together = (drawn[:, 0] * drawn[:, 1]).mean()  # alpha^2 / (N alpha (N alpha + 1))
    assert together == pytest.approx(alpha / (N * (N * alpha + 1)) if alpha < 1e100 else 1 / N**2, rel=0.2, abs=2e-3)


def test_shares_that_are_used_are_a_smaller_dirichlet():
    used = np.arange(6) < np.array([2, 3, 6])[np.arange(30_000) % 3][:, None]
    for alpha in (1e-6, 0.5, 3.0):
        drawn = shares(counter.words(3, np.arange(30_000)), 6, alpha, used)
        assert (drawn[~used] == 0).all() and abs(drawn.sum(1) - 1).max() < 1e-12
        for row, n in enumerate((2, 3, 6)):
            some = drawn[row::3, :n]
            variance = (1 / n) * (1 - 1 / n) / (n * alpha + 1)
            assert abs(some.mean(0) - 1 / n).max() < 5 * np.sqrt(variance / 10_000)
            assert abs(some.var(0) - variance).max() < 5 * np.sqrt(variance / 10_000)


@pytest.mark.parametrize("alpha", [1e-9, 1e-4])
def test_of_a_tiny_alpha_one_class_takes_all_and_no_label_is_preferred(alpha):
    sampler = EpisodeSampler(make_bank([400] * 8), "train", way=5, query=15, balance=f"dirichlet:{alpha}")
    counts = torch.nn.functional.one_hot(sampler.draw(0, 2000).query_labels, 5).sum(1)
    assert (counts.max(1).values == 75).double().mean() > 0.99
    # Where classes run out of samples, the others take over, none more than another.
    sampler = EpisodeSampler(make_bank([40] * 8), "train", way=5, query=15, balance=f"dirichlet:{alpha}")
    counts = torch.nn.functional.one_hot(sampler.draw(0, 4000).query_labels, 5).sum(1).double()
    assert abs(counts.mean(0) - 15).max() < 5 * counts.std() / np.sqrt(4000)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_apportioned_numbers_sum_and_stay_within_limits(data):
    n, N = data.draw(st.integers(1, 4)), data.draw(st.integers(2, 6))
    random = np.random.default_rng(data.draw(st.integers(0, 1000)))
    shares = random.dirichlet(np.full(N, 0.5), n)
    limit = random.integers(0, 30, (n, N))
    total = data.draw(st.integers(0, int(limit.sum(1).min())))
    counts = apportion(shares, limit, total)
    assert (counts.sum(1) == total).all()
    assert ((counts >= 0) & (counts <= limit)).all()
    free = (total * shares <= limit).all(1)
    assert (np.abs(counts - total * shares)[free] < 1).all()


def test_no_episodes_is_no_error():
    episodes = EpisodeSampler(make_bank([20] * 6), "train", way=3, query=2).draw(9, 0)
    assert episodes.support_index.shape == (0, 3)
    assert episodes.query_labels.shape == (0, 6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"way": 6}, "way: 6 classes asked for, the train split has 5"),
        ({"query": 16}, "class 'class 2' of the train split has 16 samples; 17 are needed"),
        ({"query": 30, "balance": "dirichlet:1"}, "only 123 samples left for 5 x 30 query rows"),
        ({"way": 1}, "way: expected at least 2, got 1"),
        ({"shot": 0}, "shot: expected at least 1"),
        ({"query": 0}, "query: expected at least 1"),
        ({"split": "testing"}, "split: expected one of train, val, test"),
        ({"split": "val"}, "the val split has 0"),
        ({"seed": 2**64}, "seed: expected 0 to"),
        ({"seed": -1}, "seed: expected 0 to"),
        ({"balance": "uneven"}, "query_balance: expected 'even' or 'dirichlet:ALPHA'"),
    ],
)
def test_what_cannot_be_drawn_is_refused_by_name(options, message):
    bank = make_bank([40, 20, 16, 22, 30])
    with pytest.raises(ValueError, match=message):
        EpisodeSampler(bank, **{"split": "train", **options})


@pytest.mark.parametrize("text", ["dirichlet", "dirichlet:", "dirichlet:0", "dirichlet:-1", "dirichlet:inf", "Even"])
def test_bad_balances_are_refused(text):
    with pytest.raises(ValueError, match="query_balance"):
        parse_balance(text)


def test_ten_thousand_episodes_take_well_under_a_second():
    sampler = EpisodeSampler(make_bank([600] * 64), "train")
    best = np.inf
    for _ in range(3):
        began = time.perf_counter()
        sampler.draw(0, 10_000)
        best = min(best, time.perf_counter() - began)
    assert best < 1.0  # 0.1 s on a quiet core
