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

_SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes that one block may use
_STACK = {"loop_backward_kernel": 1024, "mlp_backward_kernel": 256}  # bytes a thread, at these tiles; others 0
_CODE = """
import re, subprocess, sys, tempfile
from pathlib import Path
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernelmeta.triton import loop_kernels, mlp_kernels, products

capability = int(sys.argv[1])
tiles = {"QP": 32, "NP": 16, "HP": 32, "BI": 32, "BJ": 32, "BD": 32}
flags = ["FIXED", "STATS", "WEIGHTS", "ROWS", "INDEXED", "X_INDEXED", "Y_INDEXED"]
known = {**tiles, **dict.fromkeys(flags, False), "C": tl.float32, "PRECISION": "ieee"}
pointers = set(
    "trace gram scratch p fixed logits stats grad_logits gp_last ga_last partial gc_out gn0_out gs gag_out grad "
    "gz_out gp out x y rows coefficients x_index y_index index".split()
)
kernels = [
    loop_kernels.loop_forward_kernel, loop_kernels.loop_backward_kernel, mlp_kernels.mlp_forward_kernel,
    mlp_kernels.mlp_backward_kernel, products.rows_dots_kernel, products.rows_combine_kernel,
    products.squared_norms_kernel,
]
tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
for kernel in kernels:
    names = kernel.arg_names
    constants = {name: value for name, value in known.items() if name in names}
    kinds = {name: "*i64" if "index" in name else "*fp32" if name in pointers else "i32" for name in names}
    kinds.update(dict.fromkeys(constants, "constexpr"), **({"lr": "fp32"} if "lr" in names else {}))
    source = ASTSource(fn=kernel, signature={n: kinds[n] for n in names}, constexprs=constants)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    stack = re.search(r"STACK:(\\d+)", usage)
    registers = re.search(r"REG:(\\d+)", usage)
    print(kernel.__name__, built.metadata.shared, stack[1] if stack else -1, registers[1] if registers else -1)
"""


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_compiles_to_a_cubin(capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _CODE, str(capability)],
        cwd=Path(__file__).parents[2], capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    lines = re.findall(r"^(\w+_kernel) (\d+) (-?\d+) (-?\d+)$", done.stdout, re.MULTILINE)
    assert len(lines) == 7
    for name, shared, stack, _ in lines:
        assert int(shared) <= _SHARED[capability], name
        assert 0 <= int(stack) <= _STACK.get(name, 0), name
