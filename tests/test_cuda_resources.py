"""Registers, stack and static shared memory of the CUDA kernels, as ptxas reported them when the library was built
in this tree, against the limits in the table of docs/cuda.md. No GPU needed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(\w+)'(.*?)(?=Compiling entry function|\Z)", re.DOTALL)
FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
# As mangled: the kernel's name, and the precision, the storage and the sizes of its TeamBlock.
NAME = re.compile(r"\d+([a-z_]+)_kernelI")
BLOCK = re.compile(r"CudaTeamILi256EEE(?P<compute>[fd])(?P<storage>f|d|6__half|13__nv_bfloat16)(?P<sizes>.*?Sizes)")


@dataclass(frozen=True)
class Kernel:
    name: str
    architecture: str
    single: bool  # float32 features and arithmetic
    registers: int
    stack: int
    spilled: int
    shared: int


def kernels() -> list[Kernel]:
    """Every kernel of the build in this tree, for every architecture that it was compiled for."""
    found = []
    for messages in sorted(ROOT.glob("build/cmake-*/**/*.cu.o.messages")):
        for mangled, architecture, said in ENTRY.findall(messages.read_text()):
            frames = [tuple(map(int, frame)) for frame in FRAME.findall(said)]
            name, block = NAME.search(mangled), BLOCK.search(mangled)
            used = re.search(r"Used (\d+) registers", said)
            shared = re.search(r"(\d+) bytes smem", said)
            assert name and block and used and frames, mangled
            found.append(
                Kernel(
                    name[1], architecture, block["compute"] == "f" and block["storage"] == "f", int(used[1]),
                    max(f[0] for f in frames), sum(f[1] + f[2] for f in frames), int(shared[1]) if shared else 0,
                )
            )  # fmt: skip
    return found


def limits() -> dict[str, tuple[int, ...]]:
    """Rows `name | registers | stack | spilled | static shared memory` of the table in docs/cuda.md."""
    rows = re.findall(r"^\| `(\w+)` \|([\d |]+)\|$", (ROOT / "docs/cuda.md").read_text(), re.MULTILINE)
    return {name: tuple(int(n) for n in numbers.split("|")) for name, numbers in rows}


def test_kernels_stay_within_the_limits_of_the_table() -> None:
    built = [k for k in kernels() if k.single and k.architecture in ("sm_80", "sm_90")]
    if not built:
        pytest.skip("no CUDA kernels were compiled for sm_80 or sm_90 in this tree (nvcc is needed, no GPU)")
    table = limits()
    assert {k.name for k in built} == table.keys()
    beyond = [
        (k, limit)
        for k in built
        for got, limit in zip((k.registers, k.stack, k.spilled, k.shared), table[k.name], strict=True)
        if got > limit
    ]
    assert not beyond
