"""Instructions of a training step, counted: ``python -m benchmarks.instructions``.

What one task of km.nn.SIB.gradients executes inside the kernels (forward, cross entropy and backward), by valgrind's
callgrind, which knows neither caches nor how instructions overlap: a count that no other process disturbs, the same on
every machine, for each instruction set that valgrind can run (AVX-512 is none of them). Two minutes each.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys

import torch

from benchmarks import metadata
from benchmarks.peers import PEERS
from benchmarks.problem import Size, draw

SIZES = (Size(T=8, D=64), Size(T=8, D=640), Size(T=1, N=20, S=20, D=640))
# Counting begins and ends where this function does; it is a thread's whole range of tasks.
COUNTED = "*sib_training<true, float>*"


def count(instruction_set: str, size: Size) -> float:
    """Instructions a task.

    Raises:
        RuntimeError: valgrind failed, or nothing was counted.
    """
    found = subprocess.run(
        ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", "--collect-atstart=no",
         f"--toggle-collect={COUNTED}", sys.executable, "-m", "benchmarks.instructions",
         "--once", str(SIZES.index(size))],
        env={**os.environ, "KERNELMETA_ISA": instruction_set}, capture_output=True, text=True,
    )  # fmt: skip
    collected = re.search(r"Collected : (\d+)", found.stderr)
    if found.returncode or collected is None or collected[1] == "0":
        raise RuntimeError(f"valgrind, {instruction_set}: exit code {found.returncode}\n{found.stderr[-2000:]}")
    return int(collected[1]) / size.T


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.instructions", description=__doc__)
    parser.add_argument("--isa", nargs="+", default=["avx2", "sse2"], help="instruction sets")
    parser.add_argument("--once", type=int, help=argparse.SUPPRESS)
    options = metadata.parse(parser)
    if options.once is not None:
        torch.set_num_threads(1)
        PEERS["at_once"].prepare(draw(SIZES[options.once], copies=1), "train")(0)
        return 0
    if shutil.which("valgrind") is None:
        parser.error("valgrind was not found")
    print("| instruction set | " + " | ".join(f"N={s.N} D={s.D}" for s in SIZES) + " |")
    print("|---|" + "---:|" * len(SIZES))
    for name in options.isa:
        print(f"| {name} | " + " | ".join(f"{count(name, size):,.0f}" for size in SIZES) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
