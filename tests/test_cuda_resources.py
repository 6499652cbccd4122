"""Registers, stack and static shared memory of the CUDA kernels, as ptxas reported them when the library was built
in this tree, against the limits in the table of docs/cuda.md; and their instructions, where a disassembler is there. No
GPU needed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.cuda_build

ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(\w+)'(.*?)(?=Compiling entry function|\Z)", re.DOTALL)
FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
# As mangled: the kernel's name, and the precision, the storage and the sizes of its TeamBlock.
NAME = re.compile(r"\d+([a-z_]+)_kernelI")
BLOCK = re.compile(r"CudaTeamILi\d+EEE(?P<compute>[fd])(?P<storage>f|d|6__half|13__nv_bfloat16)(?P<sizes>.*?Sizes)")


@dataclass(frozen=True)
class Kernel:
    name: str
    architecture: str
    single: bool  # float32 arithmetic, whatever the features are
    registers: int
    stack: int
    spilled: int
    shared: int


def objects() -> list[Path]:
    """What this tree's builds compiled of the CUDA sources; not what an earlier state of them has left behind."""
    return [
        path
        for commands in sorted(ROOT.glob("build/cmake-*/compile_commands.json"))
        for command in json.loads(commands.read_text())
        if command["file"].endswith(".cu") and (path := commands.parent / command["output"]).is_file()
    ]


def kernels() -> list[Kernel]:
    """Every kernel of the builds in this tree, for every architecture that it was compiled for."""
    found = []
    for messages in (path.with_name(f"{path.name}.messages") for path in objects()):
        for mangled, architecture, said in ENTRY.findall(messages.read_text()):
            frames = [tuple(map(int, frame)) for frame in FRAME.findall(said)]
            name, block = NAME.search(mangled), BLOCK.search(mangled)
            used = re.search(r"Used (\d+) registers", said)
            shared = re.search(r"(\d+) bytes smem", said)
            assert name and block and used and frames, mangled
            found.append(
                Kernel(
                    name[1], architecture, block["compute"] == "f", int(used[1]),
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


def cuobjdump() -> str | None:
    """The CUDA toolkit's disassembler, or Triton's copy of it."""
    folders = [f"{home}/bin" for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    triton = find_spec("triton")
    for folder in triton.submodule_search_locations or () if triton else ():
        folders.append(f"{folder}/backends/nvidia/bin")
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=os.pathsep.join(folders))


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_features_meet_on_the_tensor_cores(architecture: str) -> None:
    ridge = [
        path
        for path in objects()
        if path.name == "ridge.cu.o" and f"for '{architecture}'" in path.with_name(f"{path.name}.messages").read_text()
    ]
    tool = cuobjdump()
    if not ridge or tool is None:
        pytest.skip(f"needs CUDA kernels compiled for {architecture} in this tree (make test-rare), and cuobjdump")
    command = [tool, "-sass", "-arch", architecture, str(ridge[0])]
    sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {}
    for function in sass.split("Function : ")[1:]:
        block = BLOCK.search(function)
        if block and "ridge_fwd" in function[: function.index("\n")]:
            used[block["storage"]] = set(re.findall(r"HMMA\.[.\w]+", function))
    assert used == {
        "f": {"HMMA.1688.F32.TF32"},
        "d": set(),
        "6__half": {"HMMA.16816.F32"},
        "13__nv_bfloat16": {"HMMA.16816.F32.BF16"},
    }
