"""The commands of updates: what they leave, that they go on, and that what is wrong is one line and exit code 2."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from kernelmeta.cli import main
from kernelmeta.graceful import demo

FAST = ("--threads", "1", "--quiet")
SHORT = ("--epochs", "2", "--warmup-epochs", "0", "--milestone", "2", "--lr", "0.05", "--batch-size", "8")


@pytest.fixture(scope="module")
def data(bars, tmp_path_factory):
    """The bars, as a file of glyphs."""
    path = tmp_path_factory.mktemp("data") / "bars.npz"
    np.savez(
        path,
        images=bars.pixels.numpy(),
        labels=bars.labels.numpy().astype(np.uint16),
        class_names=np.array(bars.class_names),
        class_split=bars.class_split.numpy(),
        faces=bars.groups.numpy().astype(np.uint16),
        face_names=np.array(["Ah Sans Bold", "Ah Sans", "Be Serif", "Ce", "De Mono Extra Light"]),
    )
    return path


@pytest.fixture(scope="module")
def old(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "old"
    backbone = "small-1.1-8.16.24-3.3.3-12"
    assert (
        main(["pretrain", str(data), "--backbone", backbone, "--holdout", "0.5", *SHORT, "--out", str(out), *FAST]) == 0
    )
    return out


@pytest.fixture(scope="module")
def new(old, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "new"
    assert main(["update", str(old), "--method", "bct", "--out", str(out), *FAST]) == 0
    return out


def refused(capsys, *args):
    capsys.readouterr()
    assert main([str(arg) for arg in args]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "Traceback" not in said
    return said


def test_an_update_is_a_run_with_a_judgement(old, new, capsys):
    for name in ("checkpoint.safetensors", "config.json", "results.json", "results.md", "flips.png", "backfill.png"):
        assert (new / name).exists(), name
    results = json.loads((new / "results.json").read_text())
    assert results["held_out"] and results["method"] == "bct" and results["classes"] == 6
    assert set(results["flips"]) >= {"error_old", "error_new", "negative", "positive", "relative_negative"}
    assert len(json.loads((new / "flipped.json").read_text())["negative_flips"]) == round(
        results["flips"]["negative"] * results["images"] / 100
    )
    config = json.loads((new / "config.json").read_text())
    assert (config["holdout"], config["seed"], config["epochs"]) == (0.5, 1, 2)  # as the old run, but for the seed


def test_a_successor_is_an_old_model_too_and_an_update_goes_on(new, tmp_path, capsys):
    out = tmp_path / "next"
    command = ["update", new, "--method", "none", "--out", out, *FAST]
    assert main([*map(str, command), "--epochs", "1"]) == 0
    assert "already holds a run" in refused(capsys, *command)
    assert main([*map(str, command), "--epochs", "2", "--resume"]) == 0
    whole = tmp_path / "whole"
    assert main(["update", str(new), "--method", "none", "--out", str(whole), *FAST]) == 0
    assert (whole / "checkpoint.safetensors").read_bytes() == (out / "checkpoint.safetensors").read_bytes()
    assert "method: the run in" in refused(capsys, *command[:2], "--method", "bct", "--out", out, "--resume", *FAST)


def test_compare_models(old, new, tmp_path, capsys):
    command = ["compare-models", old, new, "--free", old, "--out", tmp_path / "out", *FAST]
    assert main([*map(str, command)]) == 0
    said = capsys.readouterr().out
    assert "new in old (nothing indexed anew)" in said and "compatibility tax" in said
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["known"]["free_free"] == results["known"]["old_old"]
    assert (tmp_path / "out/flips.png").exists() and (tmp_path / "out/backfill.png").exists()


def test_search_leaves_a_table_and_a_plot_and_goes_on(old, tmp_path, capsys):
    command = ["search", "--gallery", old, "--budget", "1.5", "--judged", "3", "--epochs", "1", "--final-epochs", "1"]
    command += ["--batch-size", "8", "--out", tmp_path / "out", *FAST]
    assert main([*map(str, command)]) == 0
    first = capsys.readouterr().out
    assert "| evolution, cross |" in first
    for name in ("search.json", "search.md", "search.png", "config.json", "judged.json"):
        assert (tmp_path / "out" / name).exists(), name
    assert "already holds a run" in refused(capsys, *command)
    assert main([*map(str, command), "--resume"]) == 0
    assert capsys.readouterr().out == first
    assert "seed: the search in" in refused(capsys, *command, "--resume", "--seed", "5")
    # The network that was kept is a run to compare with.
    kept = first.splitlines()[-1].rpartition("/")[0]
    assert main(["compare-models", str(old), kept, "--out", str(tmp_path / "compared"), *FAST]) == 0


def test_what_is_wrong_is_one_line(old, new, data, tmp_path, capsys):
    out = ("--out", tmp_path / "out", *FAST)
    assert "there is no such run" in refused(capsys, "update", tmp_path / "none", *out)
    assert "holds no checkpoint" in refused(capsys, "update", tmp_path, *out)
    assert "there is no such run" in refused(capsys, "compare-models", old, tmp_path / "none", *out)
    assert "there is no such run" in refused(capsys, "compare-models", tmp_path / "none", new, *out)
    assert "there is no such run" in refused(capsys, "search", "--gallery", tmp_path / "none", *out)
    assert "method: expected one of" in refused(capsys, "update", old, "--method", "magic", *out)
    assert "no architecture is that small" in refused(capsys, "search", "--gallery", old, "--budget", "1e-9", *out)
    assert "of the old model's 6 are not there" in refused(capsys, "update", old, "--data", "glyphs", *out)
    assert "data: glyphs has no class that" in refused(capsys, "compare-models", old, new, "--data", "glyphs", *out)
    assert "training stopped" in refused(capsys, "update", old, "--lr", "1e12", *out)
    assert "features; the old classifier takes 12" in refused(
        capsys, "update", old, "--backbone", "small-1.1-8.16.24-3.3.3-8", *out
    )
    broken = tmp_path / "broken"
    shutil.copytree(old, broken)
    content = (broken / "checkpoint.safetensors").read_bytes()
    (broken / "checkpoint.safetensors").write_bytes(content[: len(content) // 2])
    assert "checkpoint.safetensors" in refused(capsys, "update", broken, *out)
    np.savez(tmp_path / "no.npz", images=np.zeros((2, 28, 28), np.uint8))
    assert "is not a file of glyphs" in refused(capsys, "update", old, "--data", tmp_path / "no.npz", *out)


def test_a_gallery_without_images_to_judge_by_is_refused(data, tmp_path, capsys):
    run = tmp_path / "all"
    backbone = ("--backbone", "small-1.1-8.16.24-3.3.3-12")
    assert main(["pretrain", str(data), *backbone, *SHORT, "--out", str(run), *FAST]) == 0
    assert "none is left to judge by" in refused(capsys, "search", "--gallery", run, "--out", tmp_path / "out", *FAST)


def test_the_demo_runs_and_goes_on(tmp_path, capsys):
    command = ["demo", "graceful", "--quick", "--out", str(tmp_path), *FAST]
    assert main(command) == 0
    first = capsys.readouterr().out
    assert {"demo.json", "demo.md", "flips.png", "compatible.png", "search.png"} <= {p.name for p in tmp_path.iterdir()}
    for text in ("**Flips**", "**Backward compatibility**", "| random search |"):
        assert text in first
    assert main(command) == 0
    assert capsys.readouterr().out == first
    assert set(json.loads((tmp_path / "demo.json").read_text())) == set(demo.EXPERIMENTS)
    assert "other settings" in refused(capsys, "demo", "graceful", "--out", tmp_path, *FAST)
