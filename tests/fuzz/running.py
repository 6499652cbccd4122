"""Runs targets: finds them, draws their cases in a process of its own, tells what became of it."""

from __future__ import annotations

import importlib
import os
import pkgutil
import select
import shutil
import signal
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np
import torch

# Seconds that a process draws cases for, by default, and that a case may take.
SLICE, LIMIT = 20.0, 60.0
_NO_TARGETS = ("running",)


def targets() -> list[str]:
    """Names of all targets: the modules of this package but for those that run them."""
    package = str(Path(__file__).parent)
    names = [module.name for module in pkgutil.iter_modules([package])]
    return sorted(n for n in names if n not in _NO_TARGETS and not n.startswith(("_", "test_")))


def one_case(name: str, seed: int, folder: Path) -> None:
    """One case of a target, in this process."""
    target = importlib.import_module(f"tests.fuzz.{name}")
    target.check(np.random.default_rng((seed, sum(name.encode()))), folder)


def cases(name: str, first: int, seconds: float, most: int | None = None) -> tuple[int, list[str]]:
    """Cases of a target from seed ``first`` on.

    Returns:
        How many were drawn within ``seconds`` (at least one), and a text for each that failed.
    """
    limit = getattr(importlib.import_module(f"tests.fuzz.{name}"), "LIMIT", LIMIT)
    failures: list[str] = []
    n, end = 0, time.monotonic() + seconds
    while (n == 0 or time.monotonic() < end) and (most is None or n < most):
        drawn, failed = _one_process(name, first + n, end, limit, None if most is None else most - n)
        n += drawn
        failures += failed
    return n, failures


def _one_process(name: str, first: int, end: float, limit: float, most: int | None) -> tuple[int, list[str]]:
    """Cases until one fails or the time is over."""
    folder = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-"))
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        _draw(name, first, end, most, folder, write)
    os.close(write)
    done, text = 0, b""
    try:
        while True:
            ready, _, _ = select.select([read], [], [], limit * _crowding())
            if not ready:
                os.kill(child, signal.SIGKILL)
                break
            some = os.read(read, 1 << 16)
            if not some:
                break
            text += some
    finally:
        os.close(read)
        _, status = os.waitpid(child, 0)
        shutil.rmtree(folder, ignore_errors=True)
    done, _, fault = text.partition(b"F")
    passed = len(done)
    if fault:
        return passed + 1, [_told(name, first + passed, fault.decode(errors="replace"))]
    if not ready:
        return passed + 1, [_told(name, first + passed, f"no end within {limit:g} seconds")]
    if status:
        return passed + 1, [_told(name, first + passed, f"the process ended with {os.waitstatus_to_exitcode(status)}")]
    return passed, []


def _crowding() -> float:
    """By how much others on this machine slow a process down, at least 1."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def _draw(name: str, first: int, end: float, most: int | None, folder: Path, write: int) -> None:
    """In the child: one byte for every case that passed, F and what happened for one that did not."""
    torch.set_num_threads(1)
    code, seed = 0, first
    try:
        while (seed == first or time.monotonic() < end) and (most is None or seed - first < most):
            place = folder / str(seed)
            place.mkdir()
            one_case(name, seed, place)
            shutil.rmtree(place)
            os.write(write, b".")
            seed += 1
    except BaseException:
        os.write(write, b"F" + traceback.format_exc().encode(errors="replace")[-8000:])
        code = 1
    finally:
        os._exit(code)


def _told(name: str, seed: int, what: str) -> str:
    return f"FAILED: python -m tests.fuzz --only {name} --seed {seed}\n{what}"
