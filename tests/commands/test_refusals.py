"""What the commands refuse, and how: one line, exit 2, nothing half done."""

from __future__ import annotations

import json
import os
import pickle
import stat
from pathlib import Path

import pytest
import torch
from runs import COMPARE, LITTLE, TRAIN, draw_images, make_bank, refused
from safetensors.torch import load_file, save_file

from kernelmeta.cli import main
from kernelmeta.data import FeatureBank

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
