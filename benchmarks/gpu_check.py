"""Everything that needs a card, in one command of eight minutes: ``make gpu-check``.

Step by step, each with a time limit that ends whatever it has started: a build (unless the library that is here was
built from these sources for this card), the GPU tests, the benchmarks, compute-sanitizer's four tools. ``--step NAME``
runs some of them. What is found is written after every step and every cell, into ``$OUT`` where that is set, else into
benchmarks/results/. Installs nothing, needs no network. Ends with 1 if anything failed, with 2 where there is no card.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import metadata

BUDGET = 480  # seconds, for all steps
PYTHON = sys.executable


class Step(NamedTuple):
    """A command, how long it may take, and what else its environment holds."""

    words: Sequence[str]
    seconds: float
    environment: dict[str, str] = {}  # noqa: RUF012


def steps(measured: Path, compiled: bool) -> dict[str, Step]:
    """In the order in which they are run: what must not be lost first."""
    measure = [PYTHON, "-m", "benchmarks.gpu_measure"]
    peers = ["--compile-peers"] if compiled else []
    out = ["--out", str(measured)]
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    small = [PYTHON, "tests/gpu/every_kernel.py"]
    own = ["--kernel-name", "kns=kernelmeta"]
    at_once = ["-n", "8"] if find_spec("xdist") else []  # Triton's kernels take minutes to compile one by one
    return {
        "build": Step(
            [PYTHON, "setup.py", "build_ext", "--inplace"],
            400,
            {"KERNELMETA_BUILD": "cuda", "TORCH_CUDA_ARCH_LIST": capability},
        ),
        "tests": Step([PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", *at_once, "tests/gpu"], 180),
        "cells": Step([*measure, "cells", *out, *peers], 400 if compiled else 120),
        "learners": Step([*measure, "learners", *out], 240),  # Triton's kernels are compiled and tuned first
        "training-step": Step([*measure, "training-step", *out], 30),
        **{
            name: Step(
                [sanitizer, "--tool", name, "--error-exitcode", "9", *only, *small],
                300 if name == "racecheck" else 120,
                {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            )
            # initcheck has to see PyTorch's kernels too: they write what these read.
            for name, only in (("memcheck", own), ("racecheck", own), ("synccheck", own), ("initcheck", []))
        },
    }


def run(step: Step, limit: float) -> dict[str, Any]:
    """Its status, the seconds it took, and the end of what it said. What it started is gone when this returns."""
    start = time.monotonic()
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1", **step.environment}
    with tempfile.TemporaryFile() as output:  # a pipe would wait for children that outlive the step
        try:
            process = subprocess.Popen(
                step.words, cwd=metadata.ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            return {"status": "could not be run", "seconds": 0.0, "end": str(error)}
        try:
            status = str(process.wait(limit))
        except subprocess.TimeoutExpired:
            status = f"not finished in {limit:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):  # compilers and tests have processes of their own
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        said = output.read().decode(errors="replace")
    return {"status": status, "seconds": time.monotonic() - start, "end": said[-4000:]}


def is_built() -> bool:
    """Whether the library here was built from these sources for this card, here or on another machine."""
    sys.path.insert(0, str(metadata.ROOT / "build_backend"))
    from kernelmeta_build import fingerprint

    path = metadata.ROOT / "kernelmeta/_native/build.json"
    report = json.loads(path.read_text()) if path.is_file() else {}
    major, minor = torch.cuda.get_device_capability()
    return (
        path.with_name("libkernelmeta_cuda.so").is_file()
        and 10 * major + minor in report.get("cuda_architectures", [])
        and report.get("sources") == fingerprint(metadata.ROOT)
    )


def results_path(card: str) -> Path:
    """Where the record goes: the same file for all steps of a day."""
    if os.environ.get("OUT"):
        return Path(os.environ["OUT"]) / "gpu-check.json"
    name = re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")
    return metadata.ROOT / f"benchmarks/results/{name}-{datetime.date.today()}.json"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__)
    parser.add_argument("--step", action="append", metavar="NAME", help="only this one; may be given several times")
    parser.add_argument("--seconds", type=float, default=BUDGET, help=f"for all steps together (default: {BUDGET})")
    parser.add_argument("--compile-peers", action="store_true", help="torch.compile among the peers: minutes more")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(f"no GPU: PyTorch {torch.__version__} finds none; nothing was checked or measured")
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what a step has started is ended
    card = torch.cuda.get_device_name()
    path = results_path(card)
    measured = path.with_name(f"{path.stem}-measured.json")
    if options.step is None:
        for old in (path, measured):
            old.unlink(missing_ok=True)
    every = steps(measured, options.compile_peers)
    unknown = set(options.step or ()) - every.keys()
    if unknown:
        parser.error(f"--step {unknown.pop()}: expected one of {', '.join(every)}")
    record: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"steps": {}}
    record |= {**metadata.collect(), "card": card}
    return check(every, options.step or list(every), options.seconds, record, path, measured)


def check(
    every: dict[str, Step],
    chosen: Sequence[str],
    seconds: float,
    record: dict[str, Any],
    path: Path,
    measured: Path,
    built: Callable[[], bool] = is_built,
) -> int:
    """Run the chosen steps one after the other, and write the record after each."""
    end = time.monotonic() + seconds
    for name in (n for n in every if n in chosen):
        left = end - time.monotonic()
        print(f"== {name} ({left:.0f} s left)", flush=True)
        found: dict[str, Any]
        if name == "build" and built():
            found = {"status": "0", "seconds": 0.0, "end": "the library is from these sources, for this card"}
        elif left < 5:
            found = {"status": "not started: no time left", "seconds": 0.0, "end": ""}
        else:
            found = run(every[name], min(every[name].seconds, left))
        print(f"{found['end'][-1500:]}\n-- {name}: status {found['status']}, {found['seconds']:.0f} s", flush=True)
        record["steps"][name] = found
        if measured.is_file():
            record["measured"] = json.loads(measured.read_text())
        path.write_text(json.dumps(record, indent=1) + "\n")
        if name == "build" and found["status"] != "0":
            break  # nothing else would test what is here
    failed = [name for name, step in record["steps"].items() if step["status"] != "0"]
    print(f"{path}: {'FAILED: ' + ', '.join(failed) if failed else 'all passed'}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
