"""Command lines: whatever is asked for, the exit code is 0 with results or 2 with one line; nothing else is said."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import math
import os
import tempfile
from pathlib import Path

import numpy as np
from tests.runs import make_bank

from kernelmeta.cli import main

LIMIT = 180.0
HOSTILE = (
    "-1", "0", "1", "2", "3", "2.5", "1e400", "-1e400", "nan", "inf", "", " ", "x", "a\nb", str(2**31), str(2**63),
    str(2**64), str(10**30), "9" * 5000, "0x10", "1_0", "\u0663", "None", "true", "\udce9", "-", "--", ",", "1,1", "..",
    "/dev/null",
)  # fmt: skip
USUAL = {
    "--way": ("2", "3"), "--shot": ("1", "2"), "--query": ("1", "4"), "--steps": ("0", "1", "4"), "--lr": ("0.01", "0"),
    "--inner-lr": ("0.1", "1e-3"), "--hidden": ("1", "8"), "--norm-stats": ("task", "batch", "running"),
    "--learner": ("prototypes", "anil", "ridge", "sib", "combined", "maml"), "--tasks-per-step": ("1", "3", "16"),
    "--query-balance": ("even", "dirichlet:2", "dirichlet:1e-9"), "--seed": ("0", "7", str(2**64 - 1)),
    "--optimizer": ("SGD", "Adam", "AdamW", "RMSprop"), "--momentum": ("0", "0.9"), "--weight-decay": ("0", "1e-3"),
    "--average": ("0", "32"), "--validate-every": ("0", "20"), "--scale": ("1", "20"),
    "--phases": ("cross_entropy:2:0.1", "soft_assignment:1:1,synthetic_gradient:1:0.1", "equivariant_gradient:1:0.1",
                 "cross_entropy+entropy:1:0.1"),
    "--classifier": ("cosine", "linear", "euclidean", "dot"), "--start": ("class_means", "learned", "zero"),
    "--threads": ("1",),
    "--device": ("cpu", "cuda", "tpu"), "--workers": ("0",), "--weights": ("none.pth",), "--backbone": ("conv4", "vgg"),
    "--update-from": ("none",), "--update-distance": ("kl", "squared", "ldi_mean"), "--update-weight": ("0", "1"),
    "--update-alpha": ("0", "1"), "--update-beta": ("0", "5"), "--update-tau": ("1", "100"),
    "--first-order": None, "--learn-rates": None, "--skip-bad": None,
}  # fmt: skip
# What takes long, however right it is.
LONG = {f"--episodes={n}" for n in (str(2**31), str(2**63), str(2**64), str(10**30))}


@functools.cache
def bank() -> str:
    path = os.path.join(tempfile.gettempdir(), f"fuzz-bank-{os.getpid()}.safetensors")
    make_bank(samples=12, D=8).save(path)
    return path


def options(random: np.random.Generator, usual: dict, n: int) -> list[str]:
    drawn = []
    for name in random.choice(sorted(usual), n, replace=False):
        values = usual[name]
        if values is None:
            drawn.append(str(name))
        elif random.random() < 0.25:
            drawn.append(f"{name}={random.choice(HOSTILE)}")
        else:
            drawn.append(f"{name}={random.choice(values)}")
    return drawn


def call(*args: str) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(args)
        except SystemExit as stopped:
            code = stopped.code
    return code, out.getvalue(), err.getvalue()


def judge(args: list[str], result: tuple[int, str, str]) -> bool:
    """Whether it went well; raises if it ended otherwise than by 0, or by 2 and one line."""
    code, out, err = result
    case = f"kernelmeta {' '.join(args)}"[:600]
    assert code in (0, 2), (case, code, err)
    lines = err.splitlines()
    if code == 2:
        assert len(lines) == 1 and lines[0].startswith("kernelmeta") and "error: " in lines[0], (case, err)
        assert "Traceback" not in err and "0x7f" not in err, (case, err)
    return code == 0


def check(random: np.random.Generator, folder: Path) -> None:
    before = os.getcwd()
    os.chdir(folder)  # hostile values are paths too
    try:
        _check(random, folder)
        assert Path.cwd() == folder.resolve()
    finally:
        os.chdir(before)


def _check(random: np.random.Generator, folder: Path) -> None:
    run = str(folder / "run")
    args = [
        "train",
        f"--data={bank()}",
        "--way=3",
        "--query=4",
        "--episodes=24",
        "--eval-episodes=6",
        "--quiet",
        f"--out={run}",
    ]
    args += options(random, USUAL, int(random.integers(0, 6)))
    if not judge(args, call(*args)):
        return
    results = json.loads((Path(run) / "results.json").read_text())
    assert 0 <= results["accuracy"] <= 100 and math.isfinite(results["ci95"]), (args, results)
    again = ["evaluate", run, "--episodes=6", "--quiet", f"--json={folder / 'r.json'}", f"--seed={results['seed']}"]
    assert judge(again, call(*again)), again
    assert json.loads((folder / "r.json").read_text())["accuracy"] == results["accuracy"], args
    usual = {name: USUAL[name] for name in ("--shot", "--query", "--query-balance", "--seed", "--device")}
    usual |= {"--split": ("train", "val", "test"), "--episodes": ("2", "9"), "--json": ("/dev/null",)}
    more = ["evaluate", run, "--quiet", "--episodes=4", *options(random, usual, int(random.integers(0, 5)))]
    if not LONG & set(more):
        judge(more, call(*more))
    left = [p for p in folder.rglob("*") if p.name.endswith(".tmp")]
    assert not left, (args, left)
