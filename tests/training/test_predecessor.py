"""Runs that update another run: ``kernelmeta train --update-from``."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import kernelmeta as km
from kernelmeta.cli import main
from kernelmeta.data import FeatureBank
from kernelmeta.training import TrainConfig, Trainer
from kernelmeta.training.loading import load_learner
from kernelmeta.training.predecessor import load_predecessor, paired_flips

COMMON = ("--way", "3", "--query", "6", "--quiet", "--threads", "1", "--eval-episodes", "60", "--validate-every", "0")


def train(*args: object) -> int:
    return main(["train", *COMMON, *map(str, args)])


@pytest.fixture(scope="module")
def old_run(tmp_path_factory: pytest.TempPathFactory, bank_file: Path) -> Path:
    out = tmp_path_factory.mktemp("old") / "run"
    assert train("--data", bank_file, "--out", out, "--learner", "ridge", "--episodes", 40) == 0
    return out


def no_bank(settings: dict[str, Any]) -> FeatureBank:
    raise AssertionError("the banks are the same")


@pytest.mark.parametrize("learner", ["sib", "anil"])
def test_results_hold_paired_flips(
    learner: str, old_run: Path, bank_file: Path, bank: FeatureBank, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new"
    args = ("--data", bank_file, "--out", out, "--learner", learner, "--episodes", 60, "--update-from", old_run)
    assert train(*args) == 0
    results = json.loads((out / "results.json").read_text())
    flips = results["flips"]
    assert flips["positive"] - flips["negative"] == pytest.approx(flips["gain"])
    assert flips["error_new"] == pytest.approx(100 - results["accuracy"])
    assert flips["negative_ci95"] > 0 and "relative_negative" in flips
    old = json.loads((old_run / "results.json").read_text())  # the same test episodes
    assert flips["error_old"] == pytest.approx(100 - old["accuracy"])
    assert "negative flips" in capsys.readouterr().out
    config = json.loads((out / "config.json").read_text())
    assert (config["update_distance"], config["update_beta"], config["update_tau"]) == ("kl", 5.0, 100.0)

    head, settings = load_learner(out)
    config = TrainConfig.from_dict(settings)
    predecessor = load_predecessor(old_run, config, bank, no_bank)
    found = paired_flips(head, bank.features, predecessor, config.make_sampler(bank, "test"), 60)
    assert 100 * found.negative == pytest.approx(flips["negative"])


def test_a_step_is_focal_distillation_on_the_same_episodes(old_run: Path, bank_file: Path, bank: FeatureBank) -> None:
    config = TrainConfig(
        data=str(bank_file), way=3, query=6, learner="sib", episodes=1, update_from=str(old_run), update_weight=0.5,
        validate_every=0,
    )  # fmt: skip
    predecessor = load_predecessor(old_run, config, bank, no_bank)
    trainer = Trainer(config, bank, predecessor=predecessor)
    support, labels, query, answers = config.make_sampler(bank, "train").draw(0, 1)
    new = config.make_learner(bank.n_features).train()(bank.features[support], labels, bank.features[query])
    old = load_learner(old_run)[0](bank.features[support], labels, bank.features[query])
    want = km.graceful.focal_distillation(new, old.detach(), answers, weight=0.5)
    loss, _ = trainer._run_block(1)
    assert loss == pytest.approx(float(want.detach()), rel=1e-5)


def test_a_large_weight_keeps_the_old_answers(old_run: Path, bank_file: Path, tmp_path: Path) -> None:
    """That the loss is wired the right way round: held firmly, a learner flips less than one left alone."""
    negative = {}
    for weight in (0, 20):
        out = tmp_path / str(weight)
        assert train(
            "--data", bank_file, "--out", out, "--learner", "anil", "--episodes", 400, "--update-from", old_run,
            "--update-weight", weight, "--update-tau", 1, "--eval-episodes", 300,
        ) == 0  # fmt: skip
        negative[weight] = json.loads((out / "results.json").read_text())["flips"]["negative"]
    assert negative[20] < negative[0]


def test_resumes_bit_for_bit(old_run: Path, bank_file: Path, tmp_path: Path) -> None:
    args = ("--data", bank_file, "--learner", "anil", "--tasks-per-step", 1, "--update-from", old_run)
    assert train(*args, "--episodes", 256, "--out", tmp_path / "whole") == 0
    assert train(*args, "--episodes", 128, "--out", tmp_path / "parts") == 0
    assert train("--episodes", 256, "--out", tmp_path / "parts", "--resume") == 0
    whole, parts = (load_learner(tmp_path / name)[0].state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("kernelmeta train: error: "), said
    return said


def test_another_backbones_bank(old_run: Path, bank: FeatureBank, tmp_path: Path, capsys: Any) -> None:
    """The new features may be others, and as many as they like: the rows must be the same."""
    wider = replace(bank, features=torch.cat([bank.features * 2, bank.features.square()], 1))
    wider.save(tmp_path / "wider.safetensors")
    args = ("--data", tmp_path / "wider.safetensors", "--episodes", 20, "--update-from", old_run)
    assert train(*args, "--out", tmp_path / "new") == 0
    flips = json.loads((tmp_path / "new/results.json").read_text())["flips"]
    old = json.loads((old_run / "results.json").read_text())
    assert flips["error_old"] == pytest.approx(100 - old["accuracy"])  # on its own features

    order = torch.randperm(len(bank.labels), generator=torch.Generator().manual_seed(0))
    replace(bank, features=bank.features[order], labels=bank.labels[order]).save(tmp_path / "mixed.safetensors")
    capsys.readouterr()
    assert train("--data", tmp_path / "mixed.safetensors", "--update-from", old_run, "--out", tmp_path / "x") == 2
    assert "the labels must match row by row" in one_line(capsys)
    names = tuple(f"other {name}" for name in bank.class_names)
    replace(bank, class_names=names).save(tmp_path / "others.safetensors")
    assert train("--data", tmp_path / "others.safetensors", "--update-from", old_run, "--out", tmp_path / "x") == 2
    assert "are not those of" in one_line(capsys) and not (tmp_path / "x").exists()


def test_wrong_inputs(old_run: Path, bank_file: Path, tmp_path: Path, capsys: Any) -> None:
    data = ("--data", bank_file, "--out", tmp_path / "x", "--episodes", 4)
    capsys.readouterr()
    for args, message in (
        (("--update-from", tmp_path / "none"), "update_from"),
        (("--update-from", tmp_path), "update_from: .* holds no checkpoint"),
        (("--update-from", bank_file), "update_from"),
        (("--update-from", old_run, "--way", 4), "update_from: .* trained on 3 ways, this run is on 4"),
        (("--update-from", old_run, "--update-tau", 0), "update_tau: expected a temperature above 0"),
        (("--update-from", old_run, "--update-tau", "nan"), "update_tau: expected"),
        (("--update-from", old_run, "--update-weight", -1), "update_weight: expected a number of at least 0"),
        (("--update-from", old_run, "--update-distance", "l1"), "update_distance: expected one of kl"),
        (("--update-beta", 2), "update_beta: there is no run to update; give update_from too"),
    ):
        assert train(*data, *args) == 2
        said = one_line(capsys)
        assert re.search(message, said), said


def test_the_run_that_is_updated_may_not_change(old_run: Path, bank_file: Path, tmp_path: Path, capsys: Any) -> None:
    other = tmp_path / "other"
    assert train("--data", bank_file, "--out", other, "--learner", "ridge", "--episodes", 80) == 0
    out = tmp_path / "new"
    assert train("--data", bank_file, "--out", out, "--episodes", 20, "--update-from", old_run) == 0
    capsys.readouterr()
    assert train("--out", out, "--resume", "--episodes", 40, "--update-from", other) == 2
    assert "update_from: not the run, on its bank, that this one began with" in one_line(capsys)


def test_a_diverging_update_stops_with_a_message(old_run: Path, bank_file: Path, tmp_path: Path, capsys: Any) -> None:
    args = ("--data", bank_file, "--out", tmp_path / "x", "--learner", "anil", "--episodes", 600, "--lr", 1e30)
    capsys.readouterr()
    assert train(*args, "--optimizer", "SGD", "--update-from", old_run) == 2
    assert "training stopped" in one_line(capsys)


def test_a_trainer_asks_for_what_its_configuration_names(bank: FeatureBank) -> None:
    with pytest.raises(ValueError, match="predecessor: expected where"):
        Trainer(TrainConfig(way=3, query=6, update_from="somewhere"), bank)
