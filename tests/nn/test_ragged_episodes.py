"""Ragged episodes go into a learner as they are drawn."""

from __future__ import annotations

import torch
from runs import make_bank

import kernelmeta as km


def test_a_ragged_batch_is_its_tasks_one_by_one():
    bank = make_bank((12, 4, 4))
    sampler = km.data.RaggedEpisodeSampler(
        bank, "train", ways=(2, 8), shots=(1, 5), queries=(1, 6), balance="dirichlet:2"
    )
    episodes = sampler.draw(3, 9)
    features = bank.features.double()
    head = km.nn.Program(8, bank.n_features, [km.nn.Phase("cross_entropy", 2, 0.5)]).double()
    logits = head.from_bank(
        features,
        episodes.support_index,
        episodes.support_labels,
        episodes.query_index,
        ragged=episodes.ragged,
    )
    assert len(set(episodes.ragged.n_ways.tolist())) > 2
    for t in range(9):
        N = int(episodes.ragged.n_ways[t])
        alone = km.nn.Program(N, bank.n_features, [km.nn.Phase("cross_entropy", 2, 0.5)]).double()
        support_index, support_labels, query_index, query_labels = episodes.task(t)
        expected = alone.from_bank(features, support_index, support_labels, query_index)[0]
        own = logits[int(episodes.ragged.query_offsets[t]) : int(episodes.ragged.query_offsets[t + 1])]
        torch.testing.assert_close(own[:, :N], expected, rtol=1e-12, atol=1e-12)
        # What lies beyond a task's ways is never the answer.
        assert (own.argmax(1) < N).all()
        assert query_labels.max() < N
