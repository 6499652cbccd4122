"""Evaluation: the accuracies, intervals and differences are those of the episodes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from kernelmeta import nn
from kernelmeta.data import EpisodeSampler
from kernelmeta.training import TrainConfig
from kernelmeta.training.evaluation import _counts, ahead, episode_accuracies, evaluate, interval, table


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
    values = episode_accuracies({"sib": head}, features, sampler(bank), 40)
    found = values["sib"]
    assert values.rows == 40 * 12
    assert values.not_finite["sib"] == 12 * int((found == 0).sum())
    touched = (bank.labels[sampler(bank).draw(0, 40).support_index] == 20).any(1)
    assert 0 < touched.sum() < 40
    assert torch.equal(found[~touched], clean[~touched])
    assert (found[touched] == 0).all()


def test_one_episode_has_no_interval(bank, head):
    with pytest.raises(ValueError, match="episodes: expected at least 2, got 1"):
        evaluate(head, bank.features, sampler(bank), 1)


def test_rows_that_are_not_finite_are_counted_and_told(bank, head):
    features = bank.features.clone()
    features[-3, 0] = float("nan")
    results = evaluate(head, features, sampler(bank), 200)
    index = sampler(bank).draw(0, 200)
    row = len(features) - 3
    in_support, in_query = (index.support_index == row).any(1), (index.query_index == row)
    expected = int((in_query & ~in_support[:, None]).sum()) + 12 * int(in_support.sum())
    assert expected > 0
    # A transductive learner's whole episode depends on each of its query rows.
    assert results["not_finite"]["prototypes"] == expected
    episodes = int((in_support | in_query.any(1)).sum())
    assert results["not_finite"]["own"] == results["not_finite"]["soft_kmeans"] == 12 * episodes
    assert results["query_rows"] == 200 * 12
    last = table(results).splitlines()[-1]
    assert last.startswith("of 2400 query rows, some have NaN or infinite logits and count as wrong")
    assert f"prototypes {expected}" in last and f"SIB, K = 2 {12 * episodes}" in last
    finite = table(evaluate(head, bank.features, sampler(bank), 20)).splitlines()
    assert len(finite) == 4 and finite[-1].startswith("calibration error")


@pytest.mark.parametrize("together", [1, 3, 7, 100])
@pytest.mark.parametrize("episodes", [20, 64, 70])
def test_batch_statistics_are_those_of_as_many_tasks_as_in_training(bank, together, episodes):
    config = TrainConfig(way=4, query=3, norm_stats="batch", tasks_per_step=together, inner_lr=0.5, seed=7)
    head = config.make_learner(bank.n_features).eval()
    results = evaluate(head, bank.features, sampler(bank), episodes)
    assert results["tasks_per_call"] == together
    expected = []
    with torch.no_grad():
        for first in range(0, episodes, together):
            support_index, labels, query_index, answers = sampler(bank).draw(first, together)
            logits = head(bank.features[support_index], labels, bank.features[query_index])
            expected.append((logits.argmax(-1) == answers).double().mean(1))
    own = torch.cat(expected)[:episodes]
    assert results["accuracy"] == interval(own)[0]
    task = replace(config, norm_stats="task").make_learner(bank.n_features).eval()
    assert evaluate(task, bank.features, sampler(bank), 20)["tasks_per_call"] == 64


def test_learners_that_want_calls_of_different_sizes_see_the_same_episodes(bank, head):
    batch = TrainConfig(way=4, query=3, norm_stats="batch", tasks_per_step=5).make_learner(bank.n_features).eval()
    other = TrainConfig(way=4, query=3, norm_stats="batch", tasks_per_step=2).make_learner(bank.n_features).eval()
    together = episode_accuracies({"a": head, "b": batch, "c": other}, bank.features, sampler(bank), 33)
    for name, learner in (("a", head), ("b", batch), ("c", other)):
        assert torch.equal(together[name], episode_accuracies({name: learner}, bank.features, sampler(bank), 33)[name])


def test_ahead_and_behind():
    assert ahead(0.774, 0.3) == "0.77 ± 0.30 points ahead"
    assert ahead(-0.774, 0.3) == "0.77 ± 0.30 points behind"
    assert ahead(-0.004, 0.3) == ahead(0.0, 0.3) == "level (± 0.30 points)"


def test_many_steps_are_looked_at_here_and_there():
    assert _counts(0) == [0]
    assert _counts(3) == [0, 1, 2, 3]
    many = _counts(1000)
    assert len(many) == 51 and many[0] == 0 and many[-1] == 1000
