"""The commands, as a user meets them: what they write, what they refuse and how."""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import re
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import make_bank, start
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kernelmeta.cli import main, parser
from kernelmeta.command_line import GROUPS
from kernelmeta.data import FeatureBank
from kernelmeta.training.learners import LEARNERS
from kernelmeta.training.loading import load_learner

TRAIN = ("train", "--way", "3", "--query", "4", "--episodes", "300", "--inner-lr", "0.01", "--quiet")


@pytest.fixture(scope="module")
def bank_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("bank") / "bank.safetensors"
    make_bank().save(path)
    return str(path)


@pytest.fixture(scope="module")
def run(tmp_path_factory, bank_file):
    out = tmp_path_factory.mktemp("runs") / "run"
    assert main([*TRAIN, "--data", bank_file, "--eval-episodes", "50", "--seed", "5", "--out", str(out)]) == 0
    return out


def refused(capsys, *args: object) -> str:
    """Runs a command that must end with 2 and one line on stderr; returns the line."""
    capsys.readouterr()
    try:
        code = main([str(arg) for arg in args])
    except SystemExit as stopped:
        code = stopped.code
    errors = capsys.readouterr().err.strip()
    assert code == 2, errors
    assert "\n" not in errors
    assert errors.startswith("kernelmeta")
    return errors


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


RESUMABLE = {
    "train": (), "pretrain": ("glyphs",), "compare": (), "update": ("runs/one",), "search": ("--gallery", "runs/one"),
}  # fmt: skip


@pytest.mark.parametrize("command", RESUMABLE)
def test_resume_without_a_run_is_an_error_that_names_the_likeliest(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for run in ("runs/first", "runs/second", "ruins/third"):
        os.makedirs(run)
        Path(run, "compare.json" if command == "compare" else "config.json").write_text("{}")
    os.makedirs("runs/empty")
    before = sorted(Path().rglob("*"))
    for out, message in (
        ("runs/frist", "--resume: runs/frist is not there; did you mean runs/first?"),
        ("rnus/first", "--resume: rnus/first is not there; did you mean runs/first?"),
        ("runs/empty", "--resume: runs/empty holds no run to go on with (without"),
        ("runs/third", "--resume: runs/third is not there (without"),  # runs/ is, and no slip for another folder
        ("runs", "--resume: runs holds no run to go on with; it holds the runs runs/first, runs/second (without"),
        ("far/from/all", "--resume: far/from/all is not there (without"),
    ):
        assert message in refused(capsys, command, *RESUMABLE[command], "--out", out, "--resume")
    assert sorted(Path().rglob("*")) == before


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs /proc")
def test_ctrl_c_while_the_command_is_imported_is_no_traceback():
    for library in ("_multiarray_umath", "libtorch_cpu"):
        process = start("info")
        while process.poll() is None and library not in Path(f"/proc/{process.pid}/maps").read_text():
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate()
        assert (process.returncode, out, errors) == (130, "", "")


@pytest.mark.skipif(os.name == "nt", reason="pipes break otherwise there")
@pytest.mark.parametrize("args", [("info",), ("--version",), ("completion", "bash"), ("train", "--help")])
def test_that_nobody_reads_on_is_no_error(args):
    """``kernelmeta info | head -1``"""
    if args[0] == "completion":
        pytest.importorskip("shtab", reason="shtab is not installed (kernelmeta[completion])")
    process = start(*args)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() in (0, 141)


@pytest.mark.parametrize("option", ["--device", "--out", "--way", "--data"])
def test_two_dashes_are_no_value(capsys, bank_file, option):
    assert f"argument {option}: expected a value, got --" in refused(
        capsys, "train", "--data", bank_file, f"{option}=--"
    )


def test_a_shell_completes_commands_and_options(capsys):
    pytest.importorskip("shtab", reason="shtab is not installed")
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    asked = f'{script}\nCOMP_WORDS=(kernelmeta extract --pre) COMP_CWORD=2\n_shtab_kernelmeta\necho "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["--precision"]


@pytest.mark.parametrize("words", [["train"], ["--help"], ["info"], ["--version"]])
def test_without_what_it_needs_the_command_says_so(words):
    blocked = f"import sys; sys.modules.update(tqdm=None, PIL=None); sys.argv[1:] = {words}"
    blocked += "; from kernelmeta.__main__ import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", blocked], capture_output=True, text=True)
    if words in (["info"], ["--version"]):
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith("kernelmeta ")
    else:
        assert done.returncode == 2
        assert done.stderr == "kernelmeta: error: the command needs tqdm, pillow: pip install 'kernelmeta[train]'\n"


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


def draw_images(root):
    """Three classes a split, six images of 32 x 32 each: noise around a colour."""
    random = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for name in ("a", "b", "c"):
            (root / split / name).mkdir(parents=True)
            tint = random.integers(0, 200, 3)
            for i in range(6):
                pixels = (tint + random.integers(0, 50, (32, 32, 3))).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")


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


COMPARE = (
    "compare", "--way", "3", "--query", "4", "--shots", "1", "--learners", "prototypes,soft_kmeans,sib", "--quick",
)  # fmt: skip
LITTLE = ("--episodes", "64", "--trial-episodes", "32", "--validation-episodes", "20", "--eval-episodes", "30")


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


def test_compare_refuses_what_cannot_be(bank_file, tmp_path, capsys):
    (tmp_path / "c.json").write_text('{"sib": [{"inner_lr": -1}]}')
    for more, message in (
        (("--learners", "svm"), "learners: expected some of"),
        (("--shots", "one"), "invalid"),
        (("--balances", "odd"), "query_balance: expected"),
        (("--candidates", tmp_path / "c.json"), "inner_lr: expected a number of at least 0"),
        (("--candidates", tmp_path / "none.json"), "none.json: No such file"),
        (("--resume",), "give --out DIR"),
    ):
        out = () if "--resume" in more else ("--out", tmp_path / "x")
        assert message in refused(capsys, *COMPARE, "--data", bank_file, "--quiet", *out, *more)
    assert not (tmp_path / "x").exists()


def test_info_says_what_runs(capsys):
    assert main(["info"]) == 0
    assert "reference" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--way", 13), "way: 13 classes asked for, the train split has 12"),
        (("--way", 7), "way: 7 classes asked for, the test split has 6|the val split has 6"),
        (("--query", 20), "class 'class 0' of the train split has 20 samples; 21 are needed"),
        (("--query-balance", "dirichlet:x"), "query_balance: expected 'even' or 'dirichlet:ALPHA'"),
        (("--lr", "fast"), "invalid float value: 'fast'"),
        (("--lr", -1), "lr: expected a number of at least 0"),
        (("--steps", -3), "steps: expected at least 0"),
        (("--optimizer", "SGDX"), "optimizer: expected the name"),
        (("--learner", "x"), "learner: expected one of"),
        (("--norm-stats", "x"), "norm_stats: expected one of"),
        (("--device", "tpu"), "--device: expected cpu"),
        (("--threads", 0), "--threads: expected at least 1"),
        (("--data", "/nowhere.safetensors"), "/nowhere.safetensors: No such file or directory"),
        (("--hidden", 100_000), "hidden 100000: that takes 200.0 GB of memory; this machine has"),
        (("--hidden", 10**30), "of memory; this machine has"),
        (("--learner", "combined", "--hidden", 100_000), "of memory; this machine has"),
        (("--learner", "maml", "--hidden", 10**13), "of memory; this machine has"),
        (("--steps", 10**9), "steps: expected at most 10000, got 1000000000"),
        (("--learner", "anil", "--steps", 10**9), "steps: expected at most 10000"),
        (("--learner", "combined", "--phases", "cross_entropy:9999:1,hinge:2:1"), "phases: expected at most 10000"),
        (("--seed", 2**64), "seed: expected 0 to 2**64 - 1"),
        (("--seed", -1), "seed: expected at least 0"),
        (("--tasks-per-step", 10**9), "tasks_per_step: 1000000000: that takes 400.0 GB of memory"),
        (("--episodes", 2**64), "episodes: expected at most"),
        (("--lr", "1e400"), "lr: expected a number of at least 0, got inf"),
        (("--query-balance", "dirichlet:1e400"), "query_balance: expected"),
        (("--threads", 10**9), "--threads: expected at least 1 and at most 1024"),
        (("--workers", 10**9), "--workers: expected 0 to 1024"),
        (("--data", ""), "data: expected glyphs, a bank or a folder of images"),
        (("--eval-episodes", 1), "--eval-episodes: expected 0 or at least 2"),
        (("--colour", "red"), "unrecognized arguments: --colour red (see"),
        (
            ("--episode", "5"),
            "unrecognized arguments: --episode 5 (there is no --episode; did you mean --episodes?) (see",
        ),
    ],
)
def test_train_refuses_what_cannot_be(capsys, bank_file, tmp_path, args, message):
    out = tmp_path / "run"
    line = refused(capsys, "train", "--data", bank_file, "--query", 4, "--quiet", "--out", out, *args)
    assert any(part in line for part in message.split("|")), line
    assert not out.exists()


@pytest.mark.parametrize("kind", ["truncated", "foreign", "labels", "integers", "pickle"])
def test_banks_that_cannot_be_used_are_refused(capsys, bank_file, tmp_path, kind):
    path, harm = tmp_path / "bad.safetensors", tmp_path / "harm"
    tensors = load_file(bank_file)
    bank = {"format": "kernelmeta-bank-1", "class_names": json.dumps([str(c) for c in range(24)])}
    if kind == "truncated":
        path.write_bytes(Path(bank_file).read_bytes()[:-10])
    elif kind == "foreign":
        save_file(tensors, path, {"format": "other"})
    elif kind == "labels":
        save_file({**tensors, "labels": tensors["labels"] + 1}, path, bank)
    elif kind == "integers":
        save_file({**tensors, "features": tensors["features"].long()}, path, bank)
    else:
        path.write_bytes(pickle.dumps(Harm(str(harm))))
    line = refused(capsys, *TRAIN, "--data", path, "--out", tmp_path / "run")
    assert str(path) in line
    assert not harm.exists()
    assert not (tmp_path / "run").exists()


class Harm:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (self.path,))


def test_checkpoints_that_cannot_be_used_are_refused(capsys, run, bank_file, tmp_path):
    whole = (run / "checkpoint.safetensors").read_bytes()
    harm = tmp_path / "harm"
    (tmp_path / "cut.safetensors").write_bytes(whole[:-7])
    (tmp_path / "empty.safetensors").write_bytes(b"")
    torch.save({"SIB": Harm(str(harm)), "lr": 1, "nbStep": 1, "netFeat": {}}, tmp_path / "harm.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Harm(str(harm))))
    torch.save({"SIB": {}, "netFeat": {}}, tmp_path / "less.pth")
    torch.save({"SIB": {"x": torch.zeros(1)}, "lr": 1, "nbStep": 1, "netFeat": {}}, tmp_path / "other.pth")
    files = ("cut.safetensors", "empty.safetensors", "harm.pth", "plain.pth", "less.pth", "other.pth")
    for name in (*files, "none.safetensors"):
        line = refused(capsys, "evaluate", tmp_path / name, "--data", bank_file, "--json", tmp_path / "r.json")
        assert name in line
    assert "no checkpoint of kernelmeta" in refused(capsys, "evaluate", bank_file)
    assert "it holds no checkpoint" in refused(capsys, "evaluate", tmp_path)
    assert not harm.exists()
    assert not (tmp_path / "r.json").exists()
    # A run whose checkpoint was cut is not resumed, and not overwritten.
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_bytes((run / "config.json").read_bytes())
    (tmp_path / "run" / "checkpoint.safetensors").write_bytes(whole[:-7])
    assert "truncated" in refused(capsys, "train", "--out", tmp_path / "run", "--resume")
    assert (tmp_path / "run" / "checkpoint.safetensors").read_bytes() == whole[:-7]


def test_evaluate_refuses_what_does_not_fit(capsys, run, tmp_path):
    make_bank(D=23).save(tmp_path / "other.safetensors")
    assert "takes 24 features" in refused(capsys, "evaluate", run, "--data", tmp_path / "other.safetensors")
    assert "split: expected one of" in refused(capsys, "evaluate", run, "--split", "tests")
    assert "samples; 101 are needed" in refused(capsys, "evaluate", run, "--query", 100)
    assert "episodes: expected at least 2" in refused(capsys, "evaluate", run, "--episodes", 0)


def test_folders_that_cannot_be_written_to_are_refused(capsys, bank_file, run, tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "run", tmp_path / "file"):
        assert "file" in refused(capsys, *TRAIN, "--data", bank_file, "--out", out)
    line = refused(capsys, "evaluate", run, "--episodes", 5, "--quiet", "--json", tmp_path / "file" / "r.json")
    assert "file" in line


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(capsys, bank_file, tmp_path, monkeypatch):
    def full(path, tensors, metadata):
        with open("/dev/full", "wb", buffering=0) as file:
            file.write(b"x")

    monkeypatch.setattr("kernelmeta.data.tensor_files._write", full)
    line = refused(capsys, *TRAIN, "--data", bank_file, "--out", tmp_path / "run")
    assert "No space left on device" in line
    assert not [name for name in os.listdir(tmp_path / "run") if "checkpoint" in name]


def test_rows_that_are_not_finite_stop_a_command_or_are_left_out(capsys, run, tmp_path):
    bank, path = make_bank(), tmp_path / "nan.safetensors"
    bank.features[7, 3] = float("nan")
    bank.features[-1, 0] = float("inf")
    bank.save(path)
    named = "2 rows hold NaN or infinite features: row 7 (class 'class 0'), row 479 (class 'class 23')"
    json_file = tmp_path / "r.json"
    for args in (
        (*TRAIN, "--out", tmp_path / "run"),
        ("evaluate", run),
        (*COMPARE, *LITTLE, "--quiet", "--out", tmp_path / "compare"),
    ):
        assert named in refused(capsys, *args, "--data", path)
    args = ("evaluate", str(run), "--data", str(path), "--skip-bad", "--episodes", "20", "--quiet")
    assert main([*args, "--json", str(json_file)]) == 0
    assert f"{path}: {named}" in capsys.readouterr().err
    assert json.loads(json_file.read_text())["not_finite"] == {"own": 0, "prototypes": 0, "soft_kmeans": 0}
    args = (*TRAIN, "--data", str(path), "--skip-bad", "--out", str(tmp_path / "run"), "--eval-episodes", "0")
    assert main([*args]) == 0


def test_images_that_cannot_be_read_are_listed_or_left_out(capsys, tmp_path):
    draw_images(tmp_path / "images")
    for name in ("train/a/1.png", "val/b/0.png", "test/c/5.png"):
        (tmp_path / "images" / name).write_bytes(b"nothing")
    out = tmp_path / "bank.safetensors"
    line = refused(capsys, "extract", tmp_path / "images", "--out", out, "--quiet")
    assert "3 images cannot be read" in line
    assert all(name in line for name in ("train/a/1.png", "val/b/0.png", "test/c/5.png"))
    line = refused(capsys, "pretrain", tmp_path / "images", "--out", tmp_path / "p", "--quiet", "--batch-size", 6)
    assert "3 images cannot be read" in line
    assert main(["extract", str(tmp_path / "images"), "--out", str(out), "--quiet", "--skip-bad"]) == 0
    errors = capsys.readouterr().err
    assert "left out: 3 images cannot be read" in errors
    assert "classes of the same name in two splits" in errors
    assert len(FeatureBank.load(out).labels) == 51


def test_results_go_where_their_path_leads(run, tmp_path, capfd):
    args = ("evaluate", str(run), "--episodes", "4", "--quiet")
    assert main([*args, "--json", "/dev/null", "--plot", "/dev/null"]) == 0
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    (tmp_path / "disk").mkdir()
    (tmp_path / "link.json").symlink_to("disk/real.json")
    assert main([*args, "--json", str(tmp_path / "link.json")]) == 0
    assert json.loads((tmp_path / "disk" / "real.json").read_text())["episodes"] == 4
    capfd.readouterr()
    assert main([*args, "--json", "/dev/fd/1"]) == 0
    text = capfd.readouterr().out
    assert json.JSONDecoder().raw_decode(text)[0]["episodes"] == 4
    assert "prototypes" in text.partition("\n}\n")[2]


def test_what_a_name_or_a_terminal_cannot_show_is_no_reason_to_fail(run, tmp_path, monkeypatch):
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", output)
    json_file = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.json")
    assert main(["evaluate", str(run), "--episodes", "4", "--quiet", "--json", json_file]) == 0
    output.flush()
    assert b"\\xb1" in output.buffer.getvalue()
    assert Path(json_file).exists()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory:"
                      " you tried to allocate 40000000000 bytes. Error code 12"), "40.0 GB were asked for at once"),
        (RuntimeError("Storage size calculation overflowed with sizes=[1, 2]"), "out of memory"),
        (RuntimeError("std::bad_alloc"), "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0"), "20.00 GiB were asked for"),
        (MemoryError("Unable to allocate 7.45 GiB for an array"), "Unable to allocate 7.45 GiB"),
        (OverflowError("int too large"), "int too large"),
    ],
)  # fmt: skip
def test_memory_that_is_not_there_is_one_line(capsys, run, monkeypatch, error, said):
    def fail(*args, **more):
        raise error

    monkeypatch.setattr("kernelmeta.commands.evaluate.evaluate", fail)
    assert said in refused(capsys, "evaluate", run)


def test_a_backend_that_cannot_run_is_refused(capsys, bank_file, monkeypatch):
    def unavailable(device_type):
        raise RuntimeError("backend 'cpu' cannot run: no native build")

    monkeypatch.setattr("kernelmeta.command_line.select", unavailable)
    assert "backend 'cpu' cannot run: no native build" in refused(capsys, *TRAIN, "--data", bank_file)


def test_no_command_and_help(capsys):
    assert "required: COMMAND" in refused(capsys)
    assert "(see kernelmeta evaluate --help)" in refused(capsys, "evaluate", "run", "--eval-episodes", "200")
    assert "(see kernelmeta --help)" in refused(capsys, "--colour")
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--help"])
    assert stopped.value.code == 0
    assert "--tasks-per-step" in capsys.readouterr().out


COMMANDS = next(a.choices for a in parser()._actions if isinstance(a, argparse._SubParsersAction))


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_in_parts_and_ends_with_a_command_to_copy(capsys, name):
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    parts = [line[:-1] for line in text.splitlines() if re.fullmatch(r"[a-z]+:", line)]
    assert [part for part in parts if part in GROUPS] == [part for part in GROUPS if part in parts]
    assert text.splitlines()[0].startswith(f"usage: kernelmeta {name}")
    example = text.splitlines()[-1].split()
    assert example[:2] == ["kernelmeta", name]
    assert parser().parse_args(example[1:]).command == name
    for action in COMMANDS[name]._actions:
        assert action.help, action.dest


@pytest.mark.parametrize("columns", [60, 100])
@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_whole_words_placeholders_in_capitals_and_the_choices(capsys, monkeypatch, name, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit):
        main([name, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for action in COMMANDS[name]._actions:
        assert " ".join(action.help.replace("%%", "%").split()) in text, action.dest
        if action.nargs == 0:
            continue
        shown = action.metavar or "{" + ",".join(action.choices) + "}"
        assert shown != "X", action.dest
        assert shown.startswith("{") or shown.replace("glyphs", "").isupper(), action.dest
        assert all(str(choice) in text for choice in action.choices or ()), action.dest
    assert ("--device {cpu,cuda}" in text) == ("--device" in COMMANDS[name]._option_string_actions)


def test_what_python_warns_of_is_a_line_of_the_command():
    program = """
import sys, warnings
from kernelmeta.cli import main
from kernelmeta.commands import info

info._info = lambda args: warnings.warn("one\\ntwo", RuntimeWarning)
sys.exit(main(["info"]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "kernelmeta info: warning: one two\n")


def test_the_settings_of_a_training_stand_where_one_looks_for_them(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = capsys.readouterr().out
    places = {"--weights": "data", "--shot": "episodes", "--inner-lr": "learner", "--momentum": "optimizer",
              "--update-tau": "update", "--resume": "run"}  # fmt: skip
    for option, part in places.items():
        assert re.findall(r"^([a-z]+):$", text[: text.index(f"  {option} ")], re.MULTILINE)[-1] == part
