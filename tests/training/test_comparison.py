"""Comparisons: the same episodes for all, settings chosen on the validation classes, runs that are gone on with."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from runs import make_bank
from torch.nn.functional import one_hot

from kernelmeta import nn
from kernelmeta.data import EpisodeSampler
from kernelmeta.data.tensor_files import read_tensors
from kernelmeta.training.candidates import CANDIDATES, read_candidates
from kernelmeta.training.comparison import CONTESTANTS, CompareConfig, Comparison, summarise
from kernelmeta.training.comparison_table import markdown
from kernelmeta.training.config import TrainConfig
from kernelmeta.training.evaluation import episode_accuracies, interval
from kernelmeta.training.trainer import Trainer
from kernelmeta.transductive import pt_map
from kernelmeta.transforms import Transform

SMALL = CompareConfig(
    data="a test",
    learners=("prototypes", "soft_kmeans", "sib"),
    way=3,
    query=4,
    shots=(1, 2),
    balances=("even", "dirichlet:2"),
    episodes=256,
    trial_episodes=64,
    validation_episodes=60,
    eval_episodes=80,
    seed=5,
)
FEW = {
    "prototypes": [{"untrained": True}],
    "soft_kmeans": [{"steps": 1}, {"steps": 10}],
    "sib": [{"inner_lr": 1e-2, "tasks_per_step": 4}, {"inner_lr": 10.0, "tasks_per_step": 4}],
}


@pytest.fixture(scope="module")
def compared(bank, tmp_path_factory):
    out = tmp_path_factory.mktemp("compare")
    lines = []
    results = Comparison(SMALL, bank, out, candidates=FEW, say=lines.append).run()
    return results, out, lines


def test_every_cell_has_all_learners_on_the_same_episodes(bank, compared):
    results, out, _ = compared
    assert [(cell["shot"], cell["query_balance"]) for cell in results["cells"]] == [
        (1, "even"), (1, "dirichlet:2"), (2, "even"), (2, "dirichlet:2"),
    ]  # fmt: skip
    cell = results["cells"][1]
    values, _ = read_tensors(out / "1-shot-dirichlet-2" / "accuracies.safetensors")
    assert set(values) == set(SMALL.learners)
    sampler = EpisodeSampler(bank, "test", way=3, shot=1, query=4, balance="dirichlet:2", seed=5)
    steps = cell["learners"]["soft_kmeans"]["chosen"]["steps"]
    alone = {"prototypes": nn.Prototypes(3, bank.n_features), "soft_kmeans": nn.SoftKMeans(3, steps=steps)}
    for name, head in alone.items():
        expected = episode_accuracies({name: head}, bank.features, sampler, 80)[name]
        assert torch.equal(values[name], expected)
        assert cell["learners"][name]["accuracy"] == interval(expected)[0]
    pair = cell["pairs"]["sib"]["soft_kmeans"]
    assert (pair["difference"], pair["difference_ci95"]) == interval(values["sib"] - values["soft_kmeans"])
    assert cell["pairs"]["soft_kmeans"]["sib"]["difference"] == pytest.approx(-pair["difference"])


def test_settings_are_chosen_on_the_validation_classes(bank, compared):
    results, _, _ = compared
    for cell in results["cells"]:
        for name in ("soft_kmeans", "sib"):
            entry = cell["learners"][name]
            tried = [record["validation_accuracy"] for record in entry["tried"]]
            assert entry["validation_accuracy"] == max(tried)
            best = entry["tried"][tried.index(max(tried))]
            assert {**best["settings"], "episodes": best["episodes"]} == {"episodes": 0, **entry["chosen"]}
        assert len(cell["learners"]["soft_kmeans"]["tried"]) == 2
        assert [record["episodes"] for record in cell["learners"]["sib"]["tried"]] == [64, 64, 128, 256, 128, 256]
    sampler = EpisodeSampler(bank, "val", way=3, shot=1, query=4, seed=5)
    for record in results["cells"][0]["learners"]["soft_kmeans"]["tried"]:
        head = nn.SoftKMeans(3, **record["settings"])
        expected = interval(episode_accuracies({"own": head}, bank.features, sampler, 60)["own"])
        assert (record["validation_accuracy"], record["validation_ci95"]) == expected


def test_a_learner_is_what_training_alone_gives(bank, compared, tmp_path):
    results, out, _ = compared
    entry = results["cells"][2]["learners"]["sib"]
    config = TrainConfig(
        way=3, shot=2, query=4, seed=5, validate_every=0, data="a test",
        **{"tasks_per_step": 1, **entry["chosen"]},
    )  # fmt: skip
    trainer = Trainer(config, bank)
    trainer.run(tmp_path)
    sampler = EpisodeSampler(bank, "test", way=3, shot=2, query=4, seed=5)
    found = episode_accuracies({"own": trainer.head.eval()}, bank.features, sampler, 80)["own"]
    values, _ = read_tensors(out / "2-shot-even" / "accuracies.safetensors")
    assert torch.equal(found, values["sib"])


def test_what_is_done_is_not_done_again(bank, compared, monkeypatch):
    results, out, _ = compared

    def no_training(*args, **more):
        raise AssertionError("trained again")

    monkeypatch.setattr(Trainer, "_run_block", no_training)
    monkeypatch.setattr("kernelmeta.training.comparison.episode_accuracies", no_training)
    # Soft k-means has no file of its own for its validation accuracy: cheap enough to be told again.
    config = replace(SMALL, learners=("prototypes", "sib"))
    again = Comparison(config, bank, out, candidates=FEW).run()
    for cell, before in zip(again["cells"], results["cells"], strict=True):
        for name in config.learners:
            assert cell["learners"][name] == before["learners"][name]


def test_an_interrupted_comparison_goes_on_to_the_same_end(bank, compared, tmp_path, monkeypatch):
    results, _, _ = compared
    blocks = []
    run_block = Trainer._run_block

    def stop_after_five(self, n):
        blocks.append(n)
        if len(blocks) == 5:
            raise KeyboardInterrupt
        return run_block(self, n)

    monkeypatch.setattr(Trainer, "_run_block", stop_after_five)
    with pytest.raises(KeyboardInterrupt):
        Comparison(SMALL, bank, tmp_path, candidates=FEW).run()
    again = Comparison(SMALL, bank, tmp_path, candidates=FEW).run()
    assert again["cells"] == results["cells"]


def test_the_table_has_every_number(compared):
    results, _, lines = compared
    text = markdown(json.loads(json.dumps(results)))
    for cell in results["cells"]:
        for entry in cell["learners"].values():
            assert f"{entry['accuracy']:.2f} ± {entry['ci95']:.2f}" in text
        for row in cell["pairs"].values():
            for pair in row.values():
                shown = f"{pair['difference']:+.2f} ± {pair['difference_ci95']:.2f}"
                bold = abs(pair["difference"]) > pair["difference_ci95"]
                assert (f"**{shown}**" if bold else f" {shown} ") in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("| ")}
    assert widths == {6, 5}  # four cells; three learners
    assert any("on the validation classes: inner_lr 0.01" in line for line in lines)


def test_pairs_are_of_the_differences():
    values = {
        "a": torch.tensor([1.0, 0.5, 0.5], dtype=torch.float64),
        "b": torch.tensor([0.9, 0.4, 0.4], dtype=torch.float64),
    }
    summary = summarise(values)
    assert summary["pairs"]["a"]["b"]["difference"] == pytest.approx(10)
    assert summary["pairs"]["a"]["b"]["difference_ci95"] == pytest.approx(0, abs=1e-10)
    assert summary["learners"]["a"]["ci95"] > 30


@pytest.mark.parametrize("learner", CONTESTANTS)
def test_every_candidate_of_every_learner_can_be(bank, tmp_path, learner):
    # Comparison makes each once before anything runs.
    Comparison(replace(SMALL, learners=(learner,)), bank, tmp_path)
    assert CANDIDATES[learner]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learners": ("sib", "svm")}, "learners: expected some of prototypes, .*, got 'svm'"),
        ({"learners": ()}, "learners: expected some, each once, got none"),
        ({"shots": (1, 1)}, "shots: expected some, each once, got 1, 1"),
        ({"shots": (0,)}, "shots: expected at least 1, got 0"),
        ({"balances": ("uneven",)}, "query_balance: expected"),
        ({"way": 1}, "way: expected at least 2"),
        ({"trial_episodes": 257}, "trial_episodes: expected at most the 256 episodes"),
        ({"eval_episodes": 1}, "eval_episodes: expected at least 2"),
        ({"finalists": 0}, "finalists: expected at least 1"),
        ({"most_candidates": 0}, "most_candidates: expected at least 1"),
        ({"way": 7}, "way: 7 classes asked for, the val split has 6"),
        ({"shots": (1, 20)}, "class 'class 0' of the train split has 20 samples; 24 are needed"),
    ],
)
def test_what_cannot_be_compared_is_refused_by_name(bank, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        Comparison(replace(SMALL, **change), bank, tmp_path)


@pytest.mark.parametrize(
    ("candidates", "message"),
    [
        ({"sib": []}, "candidates: none for the learner 'sib'"),
        ({"sib": [{"way": 4}]}, "candidates: sib way 4: way: the same for all"),
        ({"sib": [{"shot": 17}]}, "candidates: sib shot 17: class 'class 0' of the train split has 20 samples; 21 are"),
        ({"sib": [{"step": 3}]}, "candidates: sib step 3: step: no such setting"),
        ({"sib": [{"channels": 3}]}, "candidates: sib channels 3: channels: the learner 'sib' takes no such setting"),
        ({"sib": [{"norm_stats": "x"}]}, "candidates: sib norm_stats x: norm_stats: expected one of"),
        ({"soft_kmeans": [{"step": 3}]}, "candidates: soft_kmeans step 3: .*unexpected keyword"),
        ({"soft_kmeans": [{"steps": 10**9}]}, "candidates: soft_kmeans steps 1000000000: steps: expected 0 to 10000"),
        ({"soft_kmeans": [{"steps": "3"}]}, "steps: expected 0 to 10000, got 3"),
        ({"soft_kmeans": [{"scale": "a"}]}, "scale: expected a finite number, got a"),
        ({"sib": [{"steps": "3"}]}, "candidates: sib steps 3: steps: expected int, got '3'"),
        ({"sib": [{"hidden": 2.5}]}, "hidden: expected int, got '2.5'"),
        ({"sib": [{"steps": True}]}, "steps: expected int, got 'True'"),
        ({"sib": [{"lr": 10**400}]}, "lr: expected a number of at least 0, got 1000"),
        ({"sib": [{"optimizer": 3}]}, "optimizer: expected str, got '3'"),
        (
            {"soft_kmeans": [{"transform": "sqrt"}]},
            "soft_kmeans transform sqrt: transform: expected 'none' or 'power:P'",
        ),
        ({"pt_map": [{"step": 3}]}, "candidates: pt_map step 3: step: no such setting"),
        ({"pt_map": [{"proportions": 3}]}, "proportions: no such setting"),
        ({"pt_map": [{"rate": "a"}]}, "candidates: pt_map rate a: rate: expected a number, got 'a'"),
        ({"tim": [{"center": "mean"}]}, "candidates: tim center mean: center: expected one of none, task, train"),
        ({"soft_kmeans": [{"steps": -1}]}, "candidates: soft_kmeans steps -1: n_way and steps"),
    ],
)
def test_candidates_that_cannot_be_are_refused_before_anything_runs(bank, tmp_path, candidates, message):
    config = replace(SMALL, learners=(*SMALL.learners, "pt_map", "tim"))
    with pytest.raises(ValueError, match=message):
        Comparison(config, bank, tmp_path, candidates=candidates)
    assert not list(tmp_path.iterdir())


PEERS = replace(
    SMALL, learners=("prototypes", "soft_kmeans", "pt_map", "tim", "bd_cspn"), shots=(1,),
    balances=("dirichlet:2", "known:dirichlet:2"), validation_episodes=20, eval_episodes=30,
)  # fmt: skip
ROOTED = {"transform": "power:0.5", "center": "train"}
FEW_PEERS = {
    "prototypes": [{"untrained": True}],
    "soft_kmeans": [{"steps": 3, **ROOTED}],
    "pt_map": [{"steps": 3, "transform": "power:0.5", "center": "task"}],
    "tim": [{"steps": 10, "rate": 1e-2}, {"steps": 20, "rate": 1e-2}],
    "bd_cspn": [{}],
}


def test_known_proportions_are_told_to_those_who_take_them(bank, tmp_path):
    lines = []
    results = Comparison(PEERS, bank, tmp_path, candidates=FEW_PEERS, say=lines.append).run()
    plain, known = results["cells"]
    assert [cell["proportions_known"] for cell in results["cells"]] == [False, True]
    assert {cell["query_balance"] for cell in results["cells"]} == {"dirichlet:2"}
    for name in ("prototypes", "soft_kmeans", "bd_cspn"):
        assert known["learners"][name] == plain["learners"][name]
    assert known["learners"]["pt_map"]["accuracy"] > plain["learners"]["pt_map"]["accuracy"]
    # The same by hand.
    sampler = EpisodeSampler(bank, "test", way=3, shot=1, query=4, balance="dirichlet:2", seed=5)
    episodes = sampler.draw(0, 30)
    support, query = bank.features[episodes.support_index], bank.features[episodes.query_index]
    shares = one_hot(episodes.query_labels, 3).double().mean(1)
    rows = Transform("power:0.5", "task")(support, query)
    for cell, told in ((plain, None), (known, shares)):
        scores = pt_map(rows[0], episodes.support_labels, rows[1], n_way=3, steps=3, proportions=told)
        right = (scores.argmax(-1) == episodes.query_labels).double().mean(1)
        assert cell["learners"]["pt_map"]["accuracy"] == pytest.approx(interval(right)[0])
    # The mean of "train" is that of the rows of the training classes.
    training = bank.features[bank.class_split[bank.labels] == 0]
    rows = Transform.of_training(training, **ROOTED)(support, query)
    logits = nn.SoftKMeans(3, steps=3)(rows[0], episodes.support_labels, rows[1])
    right = (logits.argmax(-1) == episodes.query_labels).double().mean(1)
    assert plain["learners"]["soft_kmeans"]["accuracy"] == pytest.approx(interval(right)[0])
    text = markdown(json.loads(json.dumps(results)))
    assert "1 shot, dirichlet:2 queries, proportions known" in text
    assert "These assume that all classes have equally many query rows: PT-MAP, TIM, BD-CSPN." in text
    assert "are told the proportions of the classes where they are known, the others not: PT-MAP, TIM." in text
    # Those who are not told are chosen and evaluated once.
    assert sum("BD-CSPN" in line and "validation" in line for line in lines) == 1
    assert sum("TIM" in line and "validation" in line for line in lines) == 4
    # And again from what was written.
    again = Comparison(PEERS, bank, tmp_path, candidates=FEW_PEERS).run()
    assert again["cells"] == results["cells"]


def test_candidates_come_from_a_file(tmp_path):
    (tmp_path / "c.json").write_text('{"sib": [{"steps": 2}]}')
    assert read_candidates(tmp_path / "c.json") == {"sib": [{"steps": 2}]}
    (tmp_path / "c.json").write_text('{"sib": {"steps": 2}}')
    with pytest.raises(ValueError, match=r"c\.json: expected a list of settings for 'sib'"):
        read_candidates(tmp_path / "c.json")


def test_a_bank_without_validation_classes_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the val split has 0"):
        Comparison(SMALL, make_bank((12, 0, 6)), tmp_path)
