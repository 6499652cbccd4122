"""A run that is killed at any moment, again and again, ends as one that was not, and leaves nothing else behind."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import signal
import time
from pathlib import Path

import numpy as np
from tests.fuzz.commands import bank

from kernelmeta.cli import main
from kernelmeta.training import trainer

LIMIT = 600.0  # (many starts of a process; a busy machine takes long)
LEARNERS = (
    ("--learner=sib",), ("--learner=sib", "--tasks-per-step=8", "--average=64"), ("--learner=anil",),
    ("--learner=combined", "--optimizer=Adam"), ("--learner=prototypes",),
)  # fmt: skip


def arguments(out: Path, which: int) -> list[str]:
    more = LEARNERS[which]
    few = ("--way=3", "--query=4", "--episodes=1500", "--eval-episodes=4", "--quiet")
    go_on = ("--resume",) if (out / "config.json").exists() else ()
    return ["train", f"--data={bank()}", f"--out={out}", *few, *more, *go_on]


def run(args: list[str]) -> int:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return main(args)


@functools.cache
def whole(which: int) -> tuple[bytes, float]:
    """The checkpoint of a run that nobody killed, and how long it took."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        assert run(arguments(Path(folder) / "run", which)) == 0
        return (Path(folder) / "run" / "checkpoint.safetensors").read_bytes(), time.monotonic() - began


def check(random: np.random.Generator, folder: Path) -> None:
    which = int(random.integers(len(LEARNERS)))
    before, trainer.CHECKPOINT_SECONDS = trainer.CHECKPOINT_SECONDS, 0.0
    try:
        expected, seconds = whole(which)
        out = folder / "run"
        signals = []
        for _ in range(int(random.integers(1, 5))):
            signals.append(random.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT]))
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    code = run(arguments(out, which))
                finally:
                    os._exit(code)
            time.sleep(float(random.random()) * seconds)
            os.kill(child, signals[-1])
            os.waitpid(child, 0)
        code = run(arguments(out, which))
    finally:
        trainer.CHECKPOINT_SECONDS = before
    case = f"{LEARNERS[which]}, {[int(s) for s in signals]}"
    assert code == 0, case
    assert (out / "checkpoint.safetensors").read_bytes() == expected, case
    left = {path.name for path in out.iterdir() if not path.name.startswith("events.out")}
    plots = {"training.png", "accuracy_over_steps.png"}
    assert left == {"config.json", "checkpoint.safetensors", "results.json"} | plots, (case, left)
