"""The Triton kernels compile for cards that are not there; shared memory is held against a limit, stack is recorded.

No GPU runs here: that a cubin comes out and fits the card says nothing about its results or its speed.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

# Bytes: shared memory that one block may use; stack (spilled registers) of a thread, in kernels that have any, with
# some room for other versions of the compilers.
_SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
_NVIDIA = {"loop_forward_kernel": 320, "loop_backward_kernel": 1600, "mlp_backward_kernel": 160}
_STACK = dict.fromkeys(("sm_80", "sm_90", "sm_100"), _NVIDIA)
_STACK["gfx942"] = {"loop_forward_kernel": 128, "loop_backward_kernel": 2304}
_CODE = """
import re, subprocess, sys, tempfile
from pathlib import Path
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernelmeta.triton import loop_kernels, mlp_kernels, products

name = sys.argv[1]
target = GPUTarget("cuda", int(name[3:]), 32) if name.startswith("sm_") else GPUTarget("hip", name, 64)
tiles = mlp_kernels.tiles(75, 5, 40)
options = {"num_warps": tiles.pop("num_warps")}
tiles |= {"BI": 64, "BJ": 64, "BD": 32}
flags = ["FIXED", "STATS", "WEIGHTS", "ROWS", "INDEXED", "X_INDEXED", "Y_INDEXED"]
known = {**tiles, **dict.fromkeys(flags, False), "C": tl.float32, "PRECISION": "ieee"}
pointers = set(
    "trace gram work p fixed logits stats grad_logits gp_last ga_last partial gc_out gn0_out gs gag_out grad "
    "gz_out gp out x y rows coefficients x_index y_index index".split()
)
kernels = [
    loop_kernels.loop_forward_kernel, loop_kernels.loop_backward_kernel, mlp_kernels.mlp_forward_kernel,
    mlp_kernels.mlp_backward_kernel, products.rows_dots_kernel, products.rows_combine_kernel,
    products.squared_norms_kernel,
]
tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

def usage(built):
    if "amdgcn" in built.asm:
        keys = ("private_segment_fixed_size", "vgpr_count")
        return [re.search(key + r": +(\\d+)", built.asm["amdgcn"])[1] for key in keys]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    return [re.search(key + r":(\\d+)", text)[1] for key in ("STACK", "REG")]

for kernel in kernels:
    names = kernel.arg_names
    constants = {name: value for name, value in known.items() if name in names}
    kinds = {name: "*i64" if "index" in name else "*fp32" if name in pointers else "i32" for name in names}
    kinds.update(dict.fromkeys(constants, "constexpr"), **({"lr": "fp32"} if "lr" in names else {}))
    source = ASTSource(fn=kernel, signature={n: kinds[n] for n in names}, constexprs=constants)
    built = triton.compile(source, target=target, options=options)
    print(kernel.__name__, built.metadata.shared, *usage(built))
"""


@pytest.mark.parametrize("target", list(_SHARED))
def test_compiles_at_the_published_sizes(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _CODE, target],
        cwd=Path(__file__).parents[2], capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    print(f"{target}: kernel, shared memory, stack, registers\n{done.stdout}")
    lines = re.findall(r"^(\w+_kernel) (\d+) (\d+) (\d+)$", done.stdout, re.MULTILINE)
    assert len(lines) == 7
    for name, shared, stack, _ in lines:
        assert int(shared) <= _SHARED[target], name
        assert int(stack) <= _STACK[target].get(name, 0), name
