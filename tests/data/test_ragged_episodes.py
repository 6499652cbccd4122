"""Episodes of unequal sizes: what they hold, that they are pure functions of seed and number."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernelmeta.data import FeatureBank, RaggedEpisodeSampler


def make_bank(counts: list[int], split: list[int] | None = None) -> FeatureBank:
    """A bank with so many samples of each class, in a shuffled order."""
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    class_split = torch.tensor(split or [0] * len(counts), dtype=torch.uint8)
    return FeatureBank(
        torch.zeros(len(labels), 1), labels, class_split, tuple(f"class {c}" for c in range(len(counts)))
    )


SMALL = {"ways": (2, 6), "shots": (1, 4), "queries": (1, 5)}


def tensors(episodes):
    return [*episodes[:4], *episodes.ragged[:3]]


@pytest.mark.parametrize("balance", ["even", "dirichlet:2", "dirichlet:0.1"])
def test_rows_belong_to_their_classes_and_never_repeat(balance):
    bank = make_bank([12, 16, 41, 25, 90, 13, 17, 33], split=[0, 0, 0, 1, 0, 0, 2, 0])
    episodes = RaggedEpisodeSampler(bank, "train", **SMALL, balance=balance, seed=3).draw(0, 300)
    assert all(t.dtype == torch.int64 for t in tensors(episodes))
    assert episodes.ragged.support_offsets.shape == episodes.ragged.query_offsets.shape == (301,)
    assert episodes.ragged.support_offsets[-1] == len(episodes.support_index) == len(episodes.support_labels)
    assert episodes.ragged.query_offsets[-1] == len(episodes.query_index) == len(episodes.query_labels)
    assert set(episodes.ragged.n_ways.tolist()) == {2, 3, 4, 5, 6}
    for t in range(300):
        support_index, support_labels, query_index, query_labels = (x[0] for x in episodes.task(t))
        N = int(episodes.ragged.n_ways[t])
        shots = torch.bincount(support_labels, minlength=N)
        queries = torch.bincount(query_labels, minlength=N)
        assert len(shots) == len(queries) == N
        assert 1 <= shots.min() <= shots.max() <= 4
        assert N <= queries.sum() <= 5 * N
        if balance == "even":
            assert 1 <= queries.min() <= queries.max() <= 5
        rows = torch.cat([support_index, query_index])
        assert len(rows.unique()) == len(rows)
        classes = torch.tensor([int(bank.labels[support_index[support_labels == c]].unique()) for c in range(N)])
        assert len(classes.unique()) == N
        assert (bank.class_split[classes] == 0).all()
        assert (bank.labels[query_index] == classes[query_labels]).all()
        assert (support_labels.diff() >= 0).all() and (query_labels.diff() >= 0).all()


@given(
    first=st.integers(0, 2**40),
    skip=st.integers(0, 30),
    n=st.integers(1, 40),
    balance=st.sampled_from(["even", "dirichlet:2"]),
)
def test_any_range_can_be_drawn_alone(first, skip, n, balance):
    sampler = RaggedEpisodeSampler(make_bank([20] * 9), "train", **SMALL, balance=balance, seed=1)
    whole, alone = sampler.draw(first, skip + n), sampler.draw(first + skip, n)
    for t in range(n):
        for a, b in zip(whole.task(skip + t), alone.task(t), strict=True):
            assert torch.equal(a, b)
    assert torch.equal(whole.ragged.n_ways[skip:], alone.ragged.n_ways)


def test_cutting_a_draw_by_memory_changes_nothing(monkeypatch):
    bank = make_bank([20] * 9)
    whole = RaggedEpisodeSampler(bank, "train", **SMALL).draw(5, 50)
    monkeypatch.setattr("kernelmeta.data.class_draws._SCRATCH", 20 * 6 * 7)
    cut = RaggedEpisodeSampler(bank, "train", **SMALL).draw(5, 50)
    assert all(torch.equal(a, b) for a, b in zip(tensors(whole), tensors(cut), strict=True))


def test_the_episodes_do_not_change():
    # Runs that are resumed with a later version must see the same episodes.
    bank = make_bank([20] * 9)
    episodes = RaggedEpisodeSampler(bank, "train", **SMALL, seed=5).draw(1000, 2)
    assert episodes.ragged.n_ways.tolist() == [3, 3]
    assert bank.labels[episodes.support_index].tolist() == [7, 7, 7, 4, 4, 4, 3, 8, 8, 2, 5, 5, 5]


def test_sizes_are_drawn_evenly():
    bank = make_bank([30] * 60)
    episodes = RaggedEpisodeSampler(bank, "train", ways=(5, 50), shots=(1, 5), queries=(1, 3)).draw(0, 4600)
    ways = torch.bincount(episodes.ragged.n_ways, minlength=51)
    assert ways[:5].sum() == 0
    assert abs(ways[5:] - 100).max() < 5 * np.sqrt(100)
    one = episodes.task(0)
    assert one.support_index.shape[0] == 1
    task = torch.repeat_interleave(torch.arange(4600), episodes.ragged.support_offsets.diff())
    shots = torch.bincount(task * 50 + episodes.support_labels)
    shots = torch.bincount(shots[shots > 0], minlength=6)
    total = int(episodes.ragged.n_ways.sum())
    assert abs(shots[1:] - total / 5).max() < 5 * np.sqrt(total / 5)
    classes = torch.bincount(bank.labels[episodes.query_index], minlength=60).double()
    assert abs(classes / classes.mean() - 1).max() < 0.05


def test_dirichlet_shares_have_their_variance_and_keep_the_total():
    bank = make_bank([300] * 8)
    options = {"ways": (5, 5), "shots": (1, 3), "queries": (40, 40)}
    episodes = RaggedEpisodeSampler(bank, "train", **options, balance="dirichlet:2").draw(0, 3000)
    assert (episodes.ragged.query_offsets.diff() == 200).all()
    labels = episodes.query_labels.view(3000, 200)
    shares = torch.stack([(labels == c).double().mean(1) for c in range(5)], 1)
    assert shares.var(0).numpy() == pytest.approx(0.2 * 0.8 / 11, rel=0.12)


def test_no_episodes_is_no_error():
    episodes = RaggedEpisodeSampler(make_bank([20] * 6), "train", **SMALL).draw(9, 0)
    assert [len(t) for t in tensors(episodes)] == [0, 0, 0, 0, 1, 1, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ways": (5, 6)}, "way: 6 classes asked for, the train split has 5"),
        ({"ways": (1, 3)}, r"ways: expected \(least, most\) with 2 <= least <= most, got \(1, 3\)"),
        ({"shots": (3, 2)}, "shots: expected"),
        ({"queries": (0, 2)}, "queries: expected"),
        ({"shots": (1, 10), "queries": (1, 7)}, "class 'class 2' of the train split has 16 samples; 17 are needed"),
        ({"queries": (1, 30), "balance": "dirichlet:1"}, "only 28 samples left for 2 x 30 query rows"),
        ({"split": "val"}, "the val split has 0"),
        ({"balance": "uneven"}, "query_balance: expected 'even'"),
    ],
)
def test_what_cannot_be_drawn_is_refused_by_name(options, message):
    bank = make_bank([40, 20, 16, 22, 30])
    with pytest.raises(ValueError, match=message):
        RaggedEpisodeSampler(bank, **{"split": "train", "ways": (2, 5), "shots": (1, 4), "queries": (1, 5), **options})


def test_a_thousand_large_episodes_take_less_than_a_second():
    sampler = RaggedEpisodeSampler(make_bank([60] * 64), "train")
    best = np.inf
    for _ in range(3):
        began = time.perf_counter()
        sampler.draw(0, 1000)
        best = min(best, time.perf_counter() - began)
    assert best < 1.0


def test_small_classes_are_no_error_and_give_none_but_their_own_rows():
    # The last class of the bank has fewer samples than are drawn of the first.
    bank = make_bank([40, 40, 40, 6, 5])
    sampler = RaggedEpisodeSampler(
        bank, "train", ways=(2, 3), shots=(1, 2), queries=(1, 3), balance="dirichlet:0.1", seed=3
    )
    for episode in map(sampler.draw(0, 500).task, range(500)):
        classes = [set(bank.labels[episode.support_index[episode.support_labels == c]].tolist()) for c in range(3)]
        for row, answer in zip(episode.query_index[0].tolist(), episode.query_labels[0].tolist(), strict=True):
            assert classes[answer] == {int(bank.labels[row])}
    # Two classes, the smallest, have (6 - 2) + (5 - 2) rows left; three would have more than enough.
    with pytest.raises(ValueError, match="2 classes of the train split may have only 7 samples left for 2 x 4"):
        RaggedEpisodeSampler(bank, "train", ways=(2, 3), shots=(1, 2), queries=(1, 4), balance="dirichlet:0.1")


def test_classes_of_an_episode_with_the_same_shots():
    bank = make_bank([20] * 8)
    episodes = RaggedEpisodeSampler(bank, "train", **SMALL, same_shots=True, seed=3).draw(0, 200)
    counts = {tuple(set(torch.bincount(episodes.task(t).support_labels[0]).tolist())) for t in range(200)}
    assert counts == {(1,), (2,), (3,), (4,)}


def test_tasks_out_of_a_batch_are_those_drawn_alone():
    sampler = RaggedEpisodeSampler(make_bank([20] * 8), "train", **SMALL, seed=3)
    for a, b in zip(tensors(sampler.draw(0, 30).tasks(7, 5)), tensors(sampler.draw(7, 5)), strict=True):
        assert torch.equal(a, b)
