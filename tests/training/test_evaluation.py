"""Evaluation: the accuracies, intervals and differences are those of the episodes."""

from __future__ import annotations

import math

import pytest
import torch

from kernelmeta import nn
from kernelmeta.data import EpisodeSampler
from kernelmeta.training.evaluation import episode_accuracies, evaluate, interval, table


@pytest.fixture(scope="module")
def head(bank):
    torch.manual_seed(0)
    return nn.SIB(4, bank.n_features, steps=2, inner_lr=0.05).eval()


def sampler(bank, **more):
    return EpisodeSampler(bank, "test", **{"way": 4, "shot": 1, "query": 3, "seed": 7, **more})


def test_accuracies_are_those_of_the_episodes_one_by_one(bank, head):
    found = episode_accuracies({"sib": head}, bank.features, sampler(bank), 70)["sib"]
    expected = []
    for e in range(70):
        support_index, labels, query_index, answers = sampler(bank).draw(e, 1)
        logits = head(bank.features[support_index], labels, bank.features[query_index])
        expected.append((logits.argmax(-1) == answers).double().mean().item())
    assert found.tolist() == expected
    assert 0.3 < found.mean() < 1


def test_the_summary_is_that_of_the_accuracies(bank, head):
    results = evaluate(head, bank.features, sampler(bank, balance="dirichlet:2"), 130)
    learners = {
        "own": head,
        "prototypes": nn.Prototypes(4, bank.n_features),
        "soft_kmeans": nn.SoftKMeans(4, bank.n_features),
    }
    values = episode_accuracies(learners, bank.features, sampler(bank, balance="dirichlet:2"), 130)
    assert results["accuracy"] == pytest.approx(100 * values["own"].mean().item())
    assert results["ci95"] == pytest.approx(196 * values["own"].std().item() / math.sqrt(130))
    assert set(results["baselines"]) == {"prototypes", "soft_kmeans"}
    for name, row in results["baselines"].items():
        difference = values["own"] - values[name]
        assert row["accuracy"] == pytest.approx(100 * values[name].mean().item())
        assert row["ci95"] == pytest.approx(196 * values[name].std().item() / math.sqrt(130))
        assert row["difference"] == pytest.approx(100 * difference.mean().item())
        assert row["difference_ci95"] == pytest.approx(196 * difference.std().item() / math.sqrt(130))
    expected = {"episodes": 130, "way": 4, "shot": 1, "query": 3, "steps": 2}
    assert {name: results[name] for name in expected} == expected
    assert [row["steps"] for row in results["accuracy_over_steps"]] == [0, 1, 2]
    assert results["accuracy_over_steps"][2]["accuracy"] == results["accuracy"]
    # Untrained, SIB before its first step is the prototypes.
    assert results["accuracy_over_steps"][0]["accuracy"] == results["baselines"]["prototypes"]["accuracy"]
    assert head.steps == 2
    assert "prototypes" in table(results)


def test_the_interval_covers_the_mean_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(400):
        mean, half = interval(torch.rand(50, generator=generator, dtype=torch.float64))
        covered += abs(mean - 50) < half
    assert 0.90 < covered / 400 < 0.98


def test_nan_features_cost_their_episodes_alone(bank, head):
    features = bank.features.clone()
    features[bank.labels == 20] = float("nan")
    clean = episode_accuracies({"sib": head}, bank.features, sampler(bank), 40)["sib"]
    found = episode_accuracies({"sib": head}, features, sampler(bank), 40)["sib"]
    touched = (bank.labels[sampler(bank).draw(0, 40).support_index] == 20).any(1)
    assert 0 < touched.sum() < 40
    assert torch.equal(found[~touched], clean[~touched])
    assert (found[touched] == 0).all()


def test_one_episode_has_no_interval(bank, head):
    with pytest.raises(ValueError, match="episodes: expected at least 2, got 1"):
        evaluate(head, bank.features, sampler(bank), 1)
