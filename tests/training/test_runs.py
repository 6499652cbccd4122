"""Run folders: one process at a time, gone on with wherever the data are, and never with other settings."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from runs import draw_images, make_bank, start
from safetensors import safe_open

from kernelmeta.cli import main
from kernelmeta.data.locks import FolderLock
from kernelmeta.training.runs import claimed

FEW = ("--way", "3", "--query", "4", "--quiet", "--eval-episodes", "0")


def state(out: Path) -> dict:
    with safe_open(out / "checkpoint.safetensors", "pt") as file:
        return json.loads(file.metadata()["kernelmeta"])["state"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder to work in, with a bank and a run of 128 episodes on it, both named by relative paths."""
    monkeypatch.chdir(tmp_path)
    make_bank().save("bank.safetensors")
    assert main(["train", *FEW, "--data", "bank.safetensors", "--out", "run", "--episodes", "128"]) == 0
    return tmp_path


def go_on(*more: str, out: str = "run") -> int:
    return main(["train", "--resume", "--quiet", "--eval-episodes", "0", "--out", out, *more])


def test_the_bank_may_be_spelled_otherwise(place, monkeypatch):
    (place / "sub").mkdir()
    (place / "link").symlink_to("bank.safetensors")
    for n, data in enumerate(
        ("./bank.safetensors", str(place / "bank.safetensors"), "sub/../bank.safetensors", "link")
    ):
        assert go_on("--data", data, "--episodes", str(256 + n)) == 0
    monkeypatch.chdir("sub")
    assert go_on("--episodes", "300", out="../run") == 0
    assert go_on("--episodes", "310", "--data", "../bank.safetensors", out="../run") == 0
    assert state(place / "run")["step"] == 310
    assert main(["evaluate", "../run", "--episodes", "4", "--quiet"]) == 0


def test_the_bank_may_have_moved_alone_or_with_the_run(place, capsys):
    whole = place / "whole"
    whole.mkdir()
    for name in ("bank.safetensors", "run"):
        shutil.move(name, whole)
    assert go_on("--episodes", "256", out="whole/run") == 0
    shutil.move(whole / "bank.safetensors", place / "other name")
    assert go_on("--episodes", "300", out="whole/run") == 2
    assert "bank.safetensors: No such file" in capsys.readouterr().err
    assert go_on("--episodes", "300", "--data", "other name", out="whole/run") == 0
    make_bank(samples=21).save("another.safetensors")
    assert go_on("--episodes", "400", "--data", "another.safetensors", out="whole/run") == 2
    assert "data: not the bank that the run began with" in capsys.readouterr().err
    assert state(whole / "run")["step"] == 300


def test_fewer_episodes_than_are_done_change_nothing(place, capsys):
    before = {path.name: path.read_bytes() for path in (place / "run").iterdir()}
    for episodes in ("10", "127"):
        assert go_on("--episodes", episodes) == 0
        assert "trained for 128 episodes already" in capsys.readouterr().out
        assert {path.name: path.read_bytes() for path in (place / "run").iterdir()} == before
    assert go_on() == 0


def test_a_configuration_that_was_edited_is_not_gone_on_with(place, capsys):
    config = json.loads((place / "run" / "config.json").read_text())
    before = (place / "run" / "checkpoint.safetensors").read_bytes()
    for name, value in (("seed", 7), ("lr", 0.5), ("learner", "anil"), ("shot", 2)):
        (place / "run" / "config.json").write_text(json.dumps({**config, name: value}))
        assert go_on("--episodes", "256") == 2
        error = capsys.readouterr().err
        assert f"{name}: run/config.json says {value!r}, but its checkpoint was trained with {config[name]!r}" in error
    assert (place / "run" / "checkpoint.safetensors").read_bytes() == before
    (place / "run" / "config.json").write_text(json.dumps({**config, "data": "nowhere", "episodes": 5}))
    assert go_on("--episodes", "256") == 0


def test_a_checkpoint_of_another_run_is_not_gone_on_with(place, capsys):
    assert main(["train", *FEW, "--data", "bank.safetensors", "--out", "b", "--episodes", "128", "--seed", "1"]) == 0
    shutil.copy("b/checkpoint.safetensors", "run")
    assert go_on("--episodes", "256") == 2
    assert "seed: run/config.json says 0, but its checkpoint was trained with 1" in capsys.readouterr().err


def test_a_flipped_bit_in_a_checkpoint_is_noticed(place, capsys):
    path = place / "run" / "checkpoint.safetensors"
    whole = path.read_bytes()
    for at in (len(whole) // 2, len(whole) - 3, whole.index(b'\\"step\\": 128') + 12):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        for args in (["train", "--resume", "--out", "run", "--episodes", "256"], ["evaluate", "run"]):
            assert main([*args, "--quiet"]) == 2
            assert "damaged: its checksum is" in capsys.readouterr().err


def test_of_two_runs_in_one_folder_the_second_is_refused(place, capsys):
    other = start("train", *FEW, "--data", "bank.safetensors", "--out", "long", "--episodes", 10**8)
    try:
        deadline = time.monotonic() + 60
        while not (place / "long" / "checkpoint.safetensors").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        for more in ((), ("--resume",), ("--seed", "1")):
            assert main(["train", *FEW, "--data", "bank.safetensors", "--out", "long", *more]) == 2
            error = capsys.readouterr().err
            assert "out: another process is at work in long" in error
            assert error.count("\n") == 1
        for command in ("pretrain", "compare"):
            data = ("glyphs",) if command == "pretrain" else ("--data", "bank.safetensors")
            assert main([command, *data, "--out", "long", "--resume", "--quiet"]) == 2
            assert "another process is at work in long" in capsys.readouterr().err
    finally:
        other.send_signal(signal.SIGTERM)
        other.communicate(timeout=60)
    assert other.returncode == 130
    assert state(place / "long")["seed"] == 0
    steps = state(place / "long")["step"]
    assert go_on("--episodes", str(steps + 1), out="long") == 0


def test_a_lock_ends_with_its_process_even_if_its_children_live(tmp_path):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        FolderLock(tmp_path)
        if os.fork() == 0:  # a process that decodes images, say
            time.sleep(30)
            os._exit(0)
        os.write(write, b"x")
        time.sleep(30)
        os._exit(0)
    os.read(read, 1)
    with pytest.raises(BlockingIOError):
        FolderLock(tmp_path)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    FolderLock(tmp_path).close()


def test_a_folder_that_stays_empty_is_taken_away(tmp_path):
    with claimed(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
    assert os.listdir(tmp_path) == []
    (tmp_path / "mine").mkdir()
    with claimed(tmp_path / "mine"):
        pass
    with claimed(tmp_path / "new" / "run"):
        (tmp_path / "new" / "run" / "file").write_text("x")
    assert sorted(os.listdir(tmp_path)) == ["mine", "new"]
    (tmp_path / "new" / "run" / ".checkpoint.safetensors.0123456789ab.tmp").write_text("half")
    with claimed(tmp_path / "new"):
        assert os.listdir(tmp_path / "new" / "run") == ["file"]


def test_a_comparison_goes_on_wherever_its_bank_is(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_bank().save("bank.safetensors")
    few = ("--way", "3", "--query", "4", "--shots", "1", "--balances", "even", "--learners", "prototypes,sib")
    little = (
        "--quick",
        "--episodes",
        "64",
        "--trial-episodes",
        "32",
        "--validation-episodes",
        "9",
        "--eval-episodes",
        "9",
    )
    assert main(["compare", *few, *little, "--data", "bank.safetensors", "--quiet", "--out", "cmp"]) == 0
    made = sorted(str(path) for path in Path("cmp").rglob("*-episodes"))
    times = {path: path.stat().st_mtime_ns for path in Path("cmp").rglob("checkpoint.safetensors")}
    Path("bank.safetensors").rename("moved.safetensors")
    assert main(["compare", "--resume", "--out", "cmp", "--quiet"]) == 2
    assert "No such file" in capsys.readouterr().err
    assert main(["compare", "--resume", "--out", "cmp", "--quiet", "--data", "./moved.safetensors"]) == 0
    assert sorted(str(path) for path in Path("cmp").rglob("*-episodes")) == made
    assert times == {path: path.stat().st_mtime_ns for path in Path("cmp").rglob("checkpoint.safetensors")}
    make_bank(samples=21).save("another.safetensors")
    assert main(["compare", "--resume", "--out", "cmp", "--quiet", "--data", "another.safetensors"]) == 2
    assert "data: not the bank that the comparison began with" in capsys.readouterr().err


def test_pretraining_goes_on_wherever_its_images_are(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    draw_images(tmp_path / "images")
    args = ("--epochs", "2", "--warmup-epochs", "1", "--batch-size", "6", "--quiet", "--out", "run")
    assert main(["pretrain", "images", *args]) == 0
    (tmp_path / "images").rename(tmp_path / "elsewhere")
    assert main(["pretrain", "elsewhere", *args, "--resume", "--epochs", "3"]) == 0
    before = (tmp_path / "run" / "config.json").read_bytes()
    assert main(["pretrain", "./elsewhere", *args, "--resume", "--epochs", "1"]) == 0
    assert (tmp_path / "run" / "config.json").read_bytes() == before
    assert state(tmp_path / "run")["epoch"] == 3
    (tmp_path / "elsewhere" / "train" / "a" / "0.png").unlink()
    assert main(["pretrain", "elsewhere", *args, "--resume", "--epochs", "4"]) == 2
    assert "data: not the images that the run began with" in capsys.readouterr().err


def test_pretraining_stops_at_what_is_not_finite(tmp_path, capsys):
    args = ("--epochs", "2", "--batch-size", "64", "--warmup-epochs", "0", "--quiet", "--lr", "1e30")
    assert main(["pretrain", "glyphs", *args, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "training stopped: the loss is nan after epoch 1, batch" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run" / "checkpoint.safetensors").exists()


@pytest.mark.parametrize(
    ("command", "args"),
    [
        ("train", ("--data", "bank.safetensors", "--way", "3", "--query", "4", "--optimizer", "SGD")),
        ("pretrain", ("glyphs", "--epochs", "1", "--batch-size", "64", "--warmup-epochs", "0")),
    ],
)
def test_an_error_under_a_progress_bar_is_a_line_of_its_own(tmp_path, monkeypatch, capsys, command, args):
    monkeypatch.chdir(tmp_path)
    make_bank().save("bank.safetensors")
    assert main([command, *args, "--lr", "1e30", "--out", "run"]) == 2
    bar, _, error = capsys.readouterr().err.rstrip("\n").rpartition("\n")
    assert "0%" in bar and error.startswith(f"kernelmeta {command}: error: training stopped: ")


def test_a_short_comparison_has_no_longer_trials(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_bank().save("bank.safetensors")
    few = ("--way", "3", "--query", "4", "--shots", "1", "--balances", "even", "--learners", "prototypes")
    args = (*few, "--episodes", "9", "--validation-episodes", "9", "--eval-episodes", "9", "--data", "bank.safetensors")
    for form in ((), ("--quick",)):
        out = f"cmp{len(form)}"
        assert main(["compare", *args, *form, "--quiet", "--out", out]) == 0
        assert main(["compare", *args, *form, "--quiet", "--out", out, "--resume"]) == 0
        assert json.loads(Path(out, "compare.json").read_text())["trial_episodes"] == 9
    assert main(["compare", *args, "--trial-episodes", "10", "--quiet", "--out", "another"]) == 2
    assert "trial_episodes: expected at most the 9 episodes" in capsys.readouterr().err


def test_a_comparison_stops_at_what_is_not_finite(tmp_path, capsys):
    make_bank().save(tmp_path / "bank.safetensors")
    (tmp_path / "c.json").write_text('{"sib": [{"lr": 1e30}]}')
    cell = ("--way", "3", "--query", "4", "--shots", "1", "--balances", "even", "--learners", "sib")
    files = ("--data", tmp_path / "bank.safetensors", "--candidates", tmp_path / "c.json", "--out", tmp_path / "cmp")
    assert main(["compare", *cell, "--quick", "--quiet", *map(str, files)]) == 2
    error = capsys.readouterr().err
    assert "training stopped: " in error and "lr 1e+30" in error and "episodes" in error


def test_weights_that_are_not_finite_are_refused(place, capsys):
    from kernelmeta.training.checkpoint import Checkpoint

    checkpoint = Checkpoint.load("run/checkpoint.safetensors", "train")
    checkpoint.tensors["model"]["weight"][3] = float("nan")
    checkpoint.save("run/checkpoint.safetensors")
    assert main(["evaluate", "run", "--at", "last", "--quiet"]) == 2
    assert "holds NaN or infinite weights (weight)" in capsys.readouterr().err
    assert go_on("--episodes", "256") == 2
    assert "holds NaN or infinite numbers (model.weight)" in capsys.readouterr().err
