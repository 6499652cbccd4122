"""Training on episodes whose ways, shots and balance are drawn, on transformed features."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

import kernelmeta as km
from kernelmeta.cli import main
from kernelmeta.data import EpisodeSampler, FeatureBank
from kernelmeta.data.files import read_json
from kernelmeta.training import TrainConfig, Trainer
from kernelmeta.training.answers import check_use, make_learner
from kernelmeta.training.calibration import Calibration
from kernelmeta.training.checkpoint import CHECKPOINT, Checkpoint
from kernelmeta.training.comparison import CompareConfig, Comparison
from kernelmeta.training.learners import LEARNERS
from kernelmeta.training.loading import load_learner

DRAWN = TrainConfig(
    learner="equivariant", way="2:5", shot="1:3", query=4, query_balance="even,dirichlet:2", transform="power:0.5",
    center="task", episodes=256, tasks_per_step=4, data="a test", seed=3, schedule="one_cycle", clip=1.0,
)  # fmt: skip
OPTIONS = (
    "--learner", "equivariant", "--way", "2:5", "--shot", "1:3", "--query", "4", "--query-balance", "even,dirichlet:2",
    "--transform", "power:0.5", "--center", "task", "--schedule", "one_cycle", "--clip", "1", "--lr", "3e-3",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(bank_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("drawn") / "run"
    more = ("--data", str(bank_file), "--episodes", "640", "--eval-episodes", "20", "--quiet", "--out", str(out))
    assert main(["train", *OPTIONS, *more]) == 0
    return out


def test_a_run_has_a_fixed_set_of_cells(run: Path) -> None:
    results = read_json(run / "results.json")
    names = [
        f"{way}-way {shot}-shot, {balance} queries"
        for way in (2, 3, 5)
        for shot in (1, 3)
        for balance in ("even", "dirichlet:2")
    ]
    assert list(results["cells"]) == names
    assert results["transform"] == "power:0.5" and results["center"] == "task"
    state = Checkpoint.load(run / CHECKPOINT, "train").state
    assert set(state["cell_validations"]) == set(names)
    for (seen, mean, _), *of_cells in zip(state["validations"], *state["cell_validations"].values(), strict=True):
        assert {row[0] for row in of_cells} == {seen}
        assert mean == pytest.approx(sum(row[1] for row in of_cells) / len(of_cells))


@pytest.mark.parametrize("way", [2, 4, 6])
def test_its_checkpoint_is_evaluated_on_any_number_of_classes(run: Path, way: int, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    assert main(["evaluate", str(run), "--way", str(way), "--episodes", "100", "--quiet", "--json", str(file)]) == 0
    results = read_json(file)
    assert (results["way"], results["shot"], results["query_balance"]) == (way, 1, "even")
    assert results["accuracy"] > 150 / way
    # The baselines see what the learner sees.
    head, _ = load_learner(run)
    assert (head.transform, head.center, head.n_way) == ("power:0.5", "task", 5)


def test_evaluated_by_default_on_the_most_ways_and_fewest_shots(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    assert main(["evaluate", str(run), "--episodes", "20", "--quiet", "--json", str(file)]) == 0
    results = read_json(file)
    assert (results["way"], results["shot"], results["query"]) == (5, 1, 4)


def test_a_shared_folder_keeps_sizes_and_features(run: Path, tmp_path: Path) -> None:
    assert main(["share", str(run), "--out", str(tmp_path / "shared")]) == 0
    head, settings = load_learner(tmp_path / "shared")
    own, _ = load_learner(run)
    assert settings["way"] == "2:5" and (head.transform, head.center) == ("power:0.5", "task")
    assert all(torch.equal(a, b) for a, b in zip(head.parameters(), own.parameters(), strict=True))


def test_a_cut_run_goes_on_bit_for_bit(bank: FeatureBank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernelmeta.training.trainer.BLOCK_STEPS", 8)
    whole = Trainer(DRAWN, bank)
    assert whole.run(tmp_path / "whole")
    cut = Trainer(DRAWN, bank)
    for _ in range(3):
        cut._run_block(8)
    cut.validations, cut.cell_validations = whole.validations[:1], cut.cell_validations
    rest = Trainer(DRAWN, bank)
    rest.restore(Checkpoint.load(_saved(cut, tmp_path), "train"))
    assert rest.step == 24 and rest.run(tmp_path / "rest")
    for a, b in zip(whole.head.parameters(), rest.head.parameters(), strict=True):
        assert torch.equal(a, b)


def _saved(trainer: Trainer, folder: Path) -> Path:
    trainer.checkpoint().save(folder / CHECKPOINT)
    return folder / CHECKPOINT


def test_every_task_of_a_step_counts_alike(bank: FeatureBank) -> None:
    config = replace(DRAWN, schedule="constant", clip=None, optimizer="SGD", momentum=0.0, weight_decay=0.0, lr=0.1)
    trainer, expected = Trainer(config, bank), Trainer(config, bank).head
    episodes = trainer.sampler.draw(0, 4)
    losses = []
    for t in range(4):
        support, labels, query, answers = episodes.task(t)
        head = expected.for_ways(int(labels.max()) + 1)
        logits = head(bank.features[support], labels, bank.features[query])
        losses.append(cross_entropy(logits[0], answers[0]))
    assert len({t.shape for t in (episodes.task(t).query_index for t in range(4))}) > 1
    torch.stack(losses).mean().backward()
    loss, _ = trainer._run_block(1)
    assert loss == pytest.approx(float(torch.stack(losses).detach().mean()), abs=1e-5)
    for trained, start in zip(trainer.head.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(trained, start - 0.1 * start.grad, atol=1e-5, rtol=1e-4)


def test_rates_and_clipped_gradients(bank: FeatureBank) -> None:
    config = replace(DRAWN, lr=0.5, episodes=400)
    rates = [config.rate(step) for step in range(config.n_steps)]
    assert rates[0] == pytest.approx(0.5 / 25) and rates[10] == pytest.approx(0.5) and 0 < rates[-1] < 1e-3
    assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert {replace(config, schedule="constant").rate(step) for step in (0, 7, 99)} == {0.5}
    at_once = TrainConfig(learner="sib", way=3, query=4, episodes=8, tasks_per_step=8, lr=1.0, momentum=0.0,
                          weight_decay=0.0, data="a test", clip=1e-3)  # fmt: skip
    for settings in (at_once, replace(config, optimizer="SGD", momentum=0.0, weight_decay=0.0, clip=1e-3, lr=1.0,
                                      schedule="constant")):  # fmt: skip
        trainer = Trainer(settings, bank)
        before = [p.detach().clone() for p in trainer.head.parameters()]
        trainer._run_block(1)
        moved = torch.cat([(p - q).flatten() for p, q in zip(trainer.head.parameters(), before, strict=True)])
        assert float(moved.detach().norm()) == pytest.approx(1e-3, rel=1e-2)


def test_a_rate_that_knows_the_end_needs_the_same_end(bank: FeatureBank, tmp_path: Path) -> None:
    trainer = Trainer(replace(DRAWN, episodes=16), bank)
    trainer.run(tmp_path)
    longer = Trainer(replace(DRAWN, episodes=32), bank)
    with pytest.raises(ValueError, match="episodes: the checkpoint was trained with 16, not 32"):
        longer.restore(Checkpoint.load(tmp_path / CHECKPOINT, "train"))


def test_a_checkpoint_that_knows_of_no_transform_has_none(bank: FeatureBank, tmp_path: Path) -> None:
    config = TrainConfig(way=3, query=4, episodes=64, data="a test")
    Trainer(config, bank).run(tmp_path)
    old = Checkpoint.load(tmp_path / CHECKPOINT, "train")
    for name in ("transform", "center", "schedule", "clip"):
        del old.state["config"][name]
    old.save(tmp_path / CHECKPOINT)
    head, _ = load_learner(tmp_path)
    assert (head.transform, head.center, head.train_mean) == ("none", "none", None)
    longer = Trainer(replace(config, episodes=128), bank)
    longer.restore(Checkpoint.load(tmp_path / CHECKPOINT, "train"))
    assert longer.step == 64


@pytest.mark.parametrize("learner", [name for name, kind in LEARNERS.items() if "transform" in kind.defaults])
def test_every_learner_is_trained_on_features_centred_by_training_rows(
    learner: str, bank: FeatureBank, tmp_path: Path
) -> None:
    config = TrainConfig(learner=learner, way=3, query=4, episodes=16, data="a test", transform="power:0.5",
                         center="train")  # fmt: skip
    Trainer(config, bank).run(tmp_path)
    head, _ = load_learner(tmp_path)
    training = bank.features[bank.class_split[bank.labels] == 0]
    mean = km.Transform.of_training(training, "power:0.5", "train").mean
    assert mean is not None
    torch.testing.assert_close(head.train_mean, mean)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learner": "sib", "way": "2:5"}, "way: the parameters of this sib are those of a fixed number of classes"),
        ({"learner": "anil", "way": "2:5"}, "way: the parameters of this anil"),
        ({"learner": "combined", "way": "2:5"}, "way: the parameters of this combined"),
        ({"learner": "sib", "shot": "1:2"}, "shot: sib takes episodes of one size only, not 1:2"),
        ({"learner": "maml", "query": "1:4"}, "query: maml takes episodes of one size only"),
        ({"way": "5:2"}, "way: expected LEAST:MOST, got '5:2'"),
        ({"way": "1:3"}, "way: expected at least 2, got 1"),
        ({"way": 2.5}, "way: expected a number, or LEAST:MOST, got '2.5'"),
        ({"shot": "few"}, "shot: expected a number, or LEAST:MOST, got 'few'"),
        ({"query_balance": "even,even"}, "query_balance: expected each once"),
        ({"query_balance": "even,odd"}, "query_balance: expected 'even' or"),
        ({"learner": "maml", "transform": "power:0.5"}, "transform: the learner 'maml' takes no such setting"),
        ({"transform": "root"}, "transform: expected 'none' or 'power:P'"),
        ({"center": "all"}, "center: expected one of none, task, train, got 'all'"),
        ({"schedule": "cosine"}, "schedule: expected one of constant, one_cycle"),
        ({"clip": 0.0}, "clip: expected a number above 0"),
        ({"way": "2:3", "update_from": "runs/one"}, "update_from: expected episodes of one size"),
    ],
)
def test_settings_that_cannot_be(bank: FeatureBank, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Trainer(TrainConfig(**{"way": 3, "query": 4, "data": "a test", **change}), bank)


def test_a_range_of_one_number_is_that_number() -> None:
    config = TrainConfig(way="5:5", shot="2")
    assert (config.way, config.shot, config.uneven) == (5, 2, False)


def test_a_combined_learner_without_synthetic_gradients_takes_any_ways(bank: FeatureBank, tmp_path: Path) -> None:
    config = TrainConfig(learner="combined", phases="soft_assignment:2:1", way="2:4", query=4, episodes=16,
                         data="a test")  # fmt: skip
    assert Trainer(config, bank).run(tmp_path)


def test_more_ways_than_validation_classes_are_cut(bank: FeatureBank) -> None:
    cells = replace(DRAWN, way="3:12", shot=1, query_balance="even").cells(bank, "val")
    assert [sampler.way for sampler in cells.values()] == [3, 4, 6]  # of 6 classes


def test_several_balances_are_each_somebodys(bank: FeatureBank) -> None:
    def sampler(balance: str) -> EpisodeSampler:
        return EpisodeSampler(bank, "train", way=4, shot=1, query=4, balance=balance, seed=1)

    mixed, even, uneven = (sampler(b).draw(0, 200) for b in ("even,dirichlet:0.5", "even", "dirichlet:0.5"))
    of_even, of_uneven = ((mixed.query_index == other.query_index).all(1) for other in (even, uneven))
    assert (of_even | of_uneven).all() and 70 < int(of_even.sum()) < 130
    assert torch.equal(mixed.support_index, even.support_index)


def test_a_temperature_for_tasks_of_other_numbers_of_classes() -> None:
    g = torch.Generator().manual_seed(0)
    some, others = torch.randn(1, 200, 3, generator=g), torch.randn(1, 100, 5, generator=g)
    answers = [logits.mul(2).softmax(-1)[0].multinomial(1, generator=g).view(1, -1) for logits in (some, others)]
    mixed, padded = Calibration(), Calibration()
    mixed.add(some, answers[0])
    padded.add(torch.nn.functional.pad(some, (0, 2), value=-1e4), answers[0])
    for calibration in (mixed, padded):
        calibration.add(others, answers[1])
    assert mixed.temperature() == pytest.approx(padded.temperature(), rel=1e-6)
    assert 0.3 < mixed.temperature() < 0.8


def test_a_comparison_takes_a_run_that_is_trained_already(run: Path, bank: FeatureBank, tmp_path: Path) -> None:
    config = CompareConfig(data="a test", learners=("soft_kmeans", "equivariant"), way=4, query=4, shots=(1,),
                           balances=("even",), episodes=16, trial_episodes=16, validation_episodes=20,
                           eval_episodes=40)  # fmt: skip
    candidates = {"equivariant": [{"run": str(run)}]}
    results = Comparison(config, bank, tmp_path, candidates=candidates).run()
    chosen = results["cells"][0]["learners"]["equivariant"]["chosen"]
    assert chosen["run"] == str(run) and "checksum" in chosen
    for other, message in (
        ({"sib": [{"run": str(run)}]}, "run: a learner of the kind 'equivariant'"),
        ({"equivariant": [{"run": str(run), "steps": 3}]}, "run: a learner that is trained already takes no other"),
    ):
        with pytest.raises(ValueError, match=message):
            Comparison(replace(config, learners=tuple(other)), bank, tmp_path, candidates=other)


def test_methods_without_training_take_transforms_too(run: Path) -> None:
    chosen = make_learner("soft_kmeans", None, 3, 24, transform="power:0.5", center="task")
    assert (chosen.learner.transform, chosen.learner.center) == ("power:0.5", "task")
    with pytest.raises(ValueError, match=r"transductive=False: soft_kmeans takes from each row the mean"):
        check_use(chosen, transductive=False, proportions=False)
    peer = make_learner("laplacian_shot", None, 3, 24, center="task")
    with pytest.raises(ValueError, match="cannot judge a row alone"):
        check_use(peer, transductive=False, proportions=False)
    with pytest.raises(ValueError, match="center: 'train' is for the weights of a training"):
        make_learner("prototypes", None, 3, 24, center="train")
    with pytest.raises(ValueError, match="transform: 'none', but weights of a training come with"):
        make_learner(None, run, 3, 24, transform="none")


def test_a_classifier_of_scikit_learn_transforms(run: Path) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    g = torch.Generator().manual_seed(1)
    means = 2 * torch.randn(4, 24, generator=g)
    rows = (means.repeat(5, 1) + torch.randn(20, 24, generator=g) / 2).numpy()
    labels = torch.arange(4).repeat(5).numpy()
    for given in (
        {"weights": run},
        {"method": "soft_kmeans", "feature_transform": "power:0.5", "feature_center": "task"},
    ):
        classifier = km.FewShotClassifier(**given).fit(rows[:8], labels[:8])
        assert (classifier.predict(rows[8:]) == labels[8:]).all()
        head = classifier.learner_
        assert (head.transform, head.center) == ("power:0.5", "task")
        of_rows = km.Transform("power:0.5", "task")(torch.from_numpy(rows[None, :8]), torch.from_numpy(rows[None, 8:]))
        plain = type(head)(4, 24, **({} if "method" in given else {"steps": head.steps}))
        plain.load_state_dict(head.state_dict())
        logits = plain(of_rows[0], torch.from_numpy(labels[None, :8]), of_rows[1])[0] / classifier.temperature_
        found = torch.from_numpy(classifier.predict_proba(rows[8:])).float()
        torch.testing.assert_close(found, logits.softmax(-1), atol=1e-5, rtol=1e-5)
