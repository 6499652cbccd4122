"""The commands, as a user meets them: what they do, write and go on with."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from runs import COMPARE, LITTLE, TRAIN, draw_images, make_bank, refused
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kernelmeta.cli import main
from kernelmeta.data import FeatureBank
from kernelmeta.training.learners import LEARNERS
from kernelmeta.training.loading import load_learner


def test_a_run_leaves_all_its_files(run, bank_file):
    names = {path.name for path in run.iterdir()}
    events = [name for name in names if name.startswith("events.out.tfevents")]
    assert len(events) == 1
    assert names - set(events) == {
        "config.json",
        "checkpoint.safetensors",
        "results.json",
        "training.png",
        "accuracy_over_steps.png",
    }
    config = json.loads((run / "config.json").read_text())
    expected = {
        "command": "train",
        "way": 3,
        "shot": 1,
        "query": 4,
        "episodes": 300,
        "seed": 5,
        "data": bank_file,
    }
    assert {name: config[name] for name in expected} == expected
    assert config["momentum"] == 0.9
    assert config["weight_decay"] == 5e-4
    for name in ("training.png", "accuracy_over_steps.png"):
        assert Image.open(run / name).size[0] > 300
    scalars = EventAccumulator(str(run)).Reload()
    assert {"loss", "accuracy", "validation accuracy"} <= set(scalars.Tags()["scalars"])
    assert scalars.Scalars("loss")[-1].step == 300


def test_results_have_the_promised_keys_and_evaluate_agrees(run, tmp_path, capsys):
    results = json.loads((run / "results.json").read_text())
    promised = {"episodes", "way", "shot", "query", "steps", "accuracy", "ci95", "baselines"}
    promised |= {"query_balance", "seconds", "backend", "seed"}
    assert promised <= set(results)
    for name in ("prototypes", "soft_kmeans"):
        assert set(results["baselines"][name]) == {"accuracy", "ci95", "difference", "difference_ci95"}
    files = ("--json", str(tmp_path / "r.json"), "--plot", str(tmp_path / "p.png"))
    assert main(["evaluate", str(run), "--episodes", "50", "--seed", "5", "--quiet", *files]) == 0
    again = json.loads((tmp_path / "r.json").read_text())
    for name in promised - {"seconds"}:
        assert again[name] == results[name], name
    assert (tmp_path / "p.png").exists()
    printed = capsys.readouterr().out
    for word in ("prototypes", "soft k-means", "SIB, K = 3", f"{results['accuracy']:.2f}"):
        assert word in printed


def test_evaluate_takes_other_episodes_and_the_checkpoint_itself(run, tmp_path):
    json_file = tmp_path / "r.json"
    more = (
        "--shot",
        "2",
        "--query",
        "5",
        "--query-balance",
        "dirichlet:2",
        "--split",
        "val",
        "--episodes",
        "20",
    )
    checkpoint = str(run / "checkpoint.safetensors")
    assert main(["evaluate", checkpoint, *more, "--quiet", "--json", str(json_file)]) == 0
    results = json.loads(json_file.read_text())
    assert (results["shot"], results["query"], results["query_balance"]) == (2, 5, "dirichlet:2")


def test_results_say_which_weights_they_are_of(run, bank_file, tmp_path, capsys, monkeypatch):
    """With an optimizer that destroys in the second half what was learned, the best weights are not the last."""
    step, steps = torch.optim.SGD.step, {}

    def destroys(self, *args):
        loss = step(self, *args)
        steps[self] = steps.get(self, 0) + 1
        if steps[self] > 150:
            for parameter in self.param_groups[0]["params"]:
                parameter.data.normal_()
        return loss

    monkeypatch.setattr(torch.optim.SGD, "step", destroys)
    few, json_file = ("--episodes", "50", "--seed", "3", "--quiet"), tmp_path / "r.json"
    args = [*TRAIN, "--data", bank_file, "--seed", "3", "--eval-episodes", "50", "--validate-every", "60"]
    found = {}
    for at in ("best", "last"):
        out = tmp_path / at
        assert main([*args, "--optimizer", "SGD", "--lr", "0.01", "--at", at, "--out", str(out)]) == 0
        results = json.loads((out / "results.json").read_text())
        assert results["at"] == at
        assert (results["at_episodes"] < 300) == (at == "best")
        said = "the best on the validation classes, after " if at == "best" else "the last, after 300 episodes"
        assert f"SIB's weights: {said}" in capsys.readouterr().out
        for more in ((), ("--at", "best")) if at == "best" else (("--at", "last"),):
            assert main(["evaluate", str(out), *few, *more, "--json", str(json_file)]) == 0
            again = json.loads(json_file.read_text())
            assert {k: again[k] for k in ("accuracy", "at", "at_episodes")} == {
                k: results[k] for k in ("accuracy", "at", "at_episodes")
            }
            assert said in capsys.readouterr().out
        found[at] = results["accuracy"]
    assert found["best"] > found["last"]


def test_evaluate_says_what_a_checkpoint_is_and_takes_other_ways_where_it_can(run, bank_file, tmp_path, capsys):
    few = ("--episodes", "10", "--quiet")
    assert main(["evaluate", str(run), *few]) == 0
    printed = capsys.readouterr().out
    assert f"{run}: SIB, trained on 300 3-way 1-shot episodes of {bank_file}" in printed
    line = refused(capsys, "evaluate", run, "--way", 4, *few)
    assert "--way: " in line and "was trained for 3 classes at a time, not 4" in line
    assert "--way: expected at least 2, got 1" in refused(capsys, "evaluate", run, "--way", 1, *few)
    ridge, json_file = tmp_path / "ridge", tmp_path / "r.json"
    args = (*TRAIN[:-3], "--learner", "ridge", "--quiet", "--data", bank_file, "--eval-episodes", "0")
    assert main([*args, "--out", str(ridge)]) == 0
    assert main(["evaluate", str(ridge), "--way", "6", *few, "--json", str(json_file)]) == 0
    assert json.loads(json_file.read_text())["way"] == 6
    assert "way: 7 classes asked for" in refused(capsys, "evaluate", ridge, "--way", 7, *few)
    assert "but a feature bank" in refused(capsys, "evaluate", bank_file, *few)


def published(bank: FeatureBank) -> dict:
    D, N, H = bank.n_features, 3, 24
    state = {"wnLayerFavg.weight": torch.ones(D), "scale_cls": torch.full((1,), 10.0), "bias": torch.zeros(1)}
    for layer, shape in (("layer1", (H, N)), ("layer2", (H, H))):
        state |= {f"dni.{layer}.0.weight": torch.randn(shape) * 0.3, f"dni.{layer}.0.bias": torch.zeros(H)}
        state |= {f"dni.{layer}.2.{name}": torch.ones(H) for name in ("weight", "running_var")}
        state |= {f"dni.{layer}.2.{name}": torch.zeros(H) for name in ("bias", "running_mean")}
    state |= {"dni.layer3.weight": torch.randn(N, H) * 0.3, "dni.layer3.bias": torch.zeros(N)}
    return {"netFeat": {}, "SIB": state, "lr": 1e-3, "nbStep": 2}


def test_a_published_checkpoint_is_evaluated(bank_file, tmp_path, capsys):
    torch.manual_seed(0)
    torch.save(published(make_bank()), tmp_path / "netSIBBest.pth")
    json_file = tmp_path / "r.json"
    args = ("evaluate", str(tmp_path / "netSIBBest.pth"), "--query", "4", "--episodes", "20", "--quiet")
    assert main([*args, "--data", bank_file, "--json", str(json_file)]) == 0
    results = json.loads(json_file.read_text())
    assert (results["steps"], results["way"]) == (2, 3)
    wrapped = published(make_bank())
    wrapped["SIB"] = {f"module.{name}": tensor for name, tensor in wrapped["SIB"].items()}  # of DataParallel
    torch.manual_seed(0)
    torch.save(wrapped, tmp_path / "wrapped.pth")
    assert "SIB" in str(load_learner(tmp_path / "wrapped.pth")[0])
    wrapped["SIB"]["module.bias"][0] = float("nan")
    torch.save(wrapped, tmp_path / "nan.pth")
    assert "holds NaN or infinite weights (bias)" in refused(
        capsys, "evaluate", tmp_path / "nan.pth", "--data", bank_file
    )
    assert "does not say what it was trained on" in refused(capsys, *args)


def test_resume_goes_on_and_refuses_another_run(bank_file, tmp_path, capsys):
    out = str(tmp_path / "run")
    args = (*TRAIN, "--data", bank_file, "--eval-episodes", "0")
    assert main([*args, "--out", out]) == 0
    assert "already holds a run" in refused(capsys, *args, "--out", out)
    assert "steps: the run in" in refused(capsys, *args, "--out", out, "--resume", "--steps", 5)
    assert "give --out DIR" in refused(capsys, *args, "--resume")
    assert main(["train", "--out", out, "--resume", "--episodes", "500", "--eval-episodes", "20", "--quiet"]) == 0
    assert json.loads((tmp_path / "run" / "results.json").read_text())["trained_episodes"] == 500
    assert "not of 'pretrain'" in refused(capsys, "pretrain", "glyphs", "--out", out, "--resume")


def test_ctrl_c_leaves_a_checkpoint_to_go_on_from(bank_file, tmp_path, capsys):
    out = str(tmp_path / "run")
    args = [
        "train",
        "--data",
        bank_file,
        "--way",
        "3",
        "--query",
        "4",
        "--quiet",
        "--eval-episodes",
        "0",
        "--out",
        out,
    ]

    def interrupt():
        while not (tmp_path / "run" / "checkpoint.safetensors").exists():
            time.sleep(0.01)
        signal.raise_signal(signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    assert main([*args, "--episodes", "10000000"]) == 130
    assert "--resume" in capsys.readouterr().err
    step = json.loads(metadata(tmp_path / "run" / "checkpoint.safetensors"))["state"]["step"]
    assert step > 0
    assert (
        main(
            [
                "train",
                "--resume",
                "--out",
                out,
                "--episodes",
                str(step + 10),
                "--quiet",
                "--eval-episodes",
                "0",
            ]
        )
        == 0
    )


def metadata(path) -> str:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.metadata()["kernelmeta"]


def test_a_folder_of_images_from_pixels_to_accuracy(tmp_path, capsys):
    draw_images(tmp_path / "images")
    images, backbone, bank = (str(tmp_path / name) for name in ("images", "backbone", "bank.safetensors"))
    pretrain = ("--epochs", "2", "--warmup-epochs", "1", "--batch-size", "6", "--quiet", "--out", backbone)
    assert main(["pretrain", images, *pretrain]) == 0
    assert {"config.json", "checkpoint.safetensors", "results.json", "training.png"} <= set(os.listdir(backbone))
    weights = f"{backbone}/checkpoint.safetensors"
    assert main(["extract", images, "--weights", weights, "--out", bank, "--quiet"]) == 0
    assert FeatureBank.load(bank).n_features == 256
    few = ("--way", "3", "--query", "2", "--episodes", "20", "--eval-episodes", "10", "--quiet")
    for data, more, out in ((bank, (), "1"), (images, ("--weights", weights), "2")):
        assert main(["train", "--data", data, *more, *few, "--out", str(tmp_path / out)]) == 0
    runs = [json.loads((tmp_path / out / "results.json").read_text()) for out in "12"]
    assert runs[0]["accuracy"] == runs[1]["accuracy"]
    assert main(["evaluate", str(tmp_path / "2"), "--episodes", "10", "--quiet"]) == 0
    assert "give the --weights of a backbone" in refused(capsys, "train", "--data", images)
    (tmp_path / "images" / "val" / "b" / "3.png").write_bytes(b"nothing")
    for workers in ("0", "1"):
        more = ("--workers", workers, "--quiet", "--out", tmp_path / "x.safetensors")
        assert "b/3.png: not an image" in refused(capsys, "extract", images, "--weights", weights, *more)
    assert not (tmp_path / "x.safetensors").exists()


def test_an_untrained_backbone_is_said_to_be_one(tmp_path):
    (tmp_path / "images" / "train" / "a").mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(tmp_path / "images" / "train" / "a" / "0.png")
    out = tmp_path / "bank.safetensors"
    assert main(["extract", str(tmp_path / "images"), "--out", str(out), "--quiet"]) == 0
    assert "untrained" in FeatureBank.load(out).source


@pytest.mark.parametrize("learner", LEARNERS)
def test_every_learner_is_trained_resumed_and_evaluated(bank_file, tmp_path, capsys, learner):
    out, results = tmp_path / "run", tmp_path / "r.json"
    small = ("--way", "3", "--query", "4", "--quiet", "--learner", learner, "--data", bank_file, "--out", str(out))
    assert main(["train", *small, "--episodes", "64", "--eval-episodes", "0"]) == 0
    assert main(["train", *small, "--episodes", "128", "--eval-episodes", "20", "--resume"]) == 0
    trained = json.loads((out / "results.json").read_text())
    assert main(["evaluate", str(out), "--episodes", "20", "--quiet", "--json", str(results)]) == 0
    evaluated = json.loads(results.read_text())
    assert trained["learner"] == learner
    assert 100 / 3 < trained["accuracy"] == evaluated["accuracy"]
    assert trained["accuracy_over_steps"][-1] == {name: trained[name] for name in ("steps", "accuracy", "ci95")}
    assert LEARNERS[learner].title in capsys.readouterr().out


def test_a_whole_network_is_trained_on_pixels(tmp_path, capsys):
    draw_images(tmp_path / "images")
    small = ("--way", "3", "--query", "2", "--learner", "maml", "--channels", "4", "--steps", "2", "--quiet")
    few = ("--episodes", "8", "--eval-episodes", "4")
    for data in ("glyphs", str(tmp_path / "images")):
        out = tmp_path / Path(data).name.replace("images", "folder")
        assert main(["train", *small, *few, "--data", data, "--out", str(out)]) == 0
        trained = json.loads((out / "results.json").read_text())
        assert (trained["learner"], trained["steps"]) == ("maml", 2)
        assert main(["evaluate", str(out), "--episodes", "4", "--quiet", "--json", str(tmp_path / "r.json")]) == 0
        assert json.loads((tmp_path / "r.json").read_text())["accuracy"] == trained["accuracy"]
    assert "takes no such setting" in refused(capsys, "train", *small, "--norm-stats", "task")
    assert "takes no such setting" in refused(capsys, "train", "--learner", "sib", "--first-order")


def test_compare_leaves_a_table_and_a_plot_and_goes_on(bank_file, tmp_path, capsys):
    out = tmp_path / "compare"
    args = (*COMPARE, *LITTLE, "--data", bank_file, "--quiet", "--out", str(out))
    assert main(args) == 0
    printed = capsys.readouterr().out
    table = (out / "comparison.md").read_text()
    assert table in printed
    results = json.loads((out / "comparison.json").read_text())
    assert [cell["query_balance"] for cell in results["cells"]] == ["even", "dirichlet:2"]
    assert all(set(cell["learners"]) == {"prototypes", "soft_kmeans", "sib"} for cell in results["cells"])
    assert (
        len(results["cells"][0]["learners"]["sib"]["tried"]) == 4
    )  # two candidates, of more, and one of them longer, looked at twice: --quick
    assert Image.open(out / "comparison.png").size[0] > 600
    assert "already holds a comparison" in refused(capsys, *args)
    assert "seed: the comparison in" in refused(capsys, *args, "--resume", "--seed", 1)
    assert main([*args, "--resume"]) == 0
    assert json.loads((out / "comparison.json").read_text())["cells"] == results["cells"]
    # What a comparison has trained is a run like any other.
    run = next((out / "1-shot-even" / "sib").glob("*/*-episodes"))
    assert main(["evaluate", str(run), "--data", bank_file, "--episodes", "10", "--quiet"]) == 0
