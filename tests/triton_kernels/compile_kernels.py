"""Compiles the Triton kernels for one card, at the published sizes: ``python compile_kernels.py sm_80``.

Prints a line a kernel: name, shared memory of a block, stack of a thread (what registers were spilled to), registers.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernelmeta.triton import (
    focal_distillation_kernels,
    loop_kernels,
    mlp_kernels,
    oracle_kernels,
    phase_kernels,
    phases,
    products,
    ridge,
    ridge_kernels,
)

# Arguments of all kernels; what is not named here is an int32.
_POINTERS = (
    "trace", "gram", "work", "p", "fixed", "logits", "stats", "grad_logits", "gp_last", "ga_last", "partial", "gc_out",
    "gn0_out", "gs", "gag_out", "grad", "gz_out", "gp", "out", "x", "y", "rows", "coefficients", "numbers", "rates",
    "gu_at", "gr2_at", "gp_at", "ga_at", "gnumbers", "grates", "matrix", "pivots", "x_at", "errors", "now", "old",
    "class_weight", "distances", "label_losses", "grad_distances", "grad_label_losses", "grad_now",
)  # fmt: skip
_NUMBERS = {"lr", "eps", "alpha", "beta", "tau", "margin", "power", "smoothing"}
_DUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
_FLAGS = (
    "FIXED", "STATS", "WEIGHTS", "ROWS", "INDEXED", "X_INDEXED", "Y_INDEXED", "RAGGED", "COEFFICIENTS", "MEAN",
    "FIRST_ORDER", "EUCLIDEAN",
)  # fmt: skip


def _kind(kernel: Any, name: str) -> str:
    if "index" in name or name in ("labels", "counts"):
        return "*i64"
    if name == "rows" and "labels" in kernel.arg_names:  # their number
        return "i32"
    if name == "codes":
        return "*u8"
    return "*fp32" if name in _POINTERS else "fp32" if name in _NUMBERS else "i32"


def _usage(built: Any) -> list[str]:
    if "amdgcn" in built.asm:
        keys = ("private_segment_fixed_size", "vgpr_count")
        return [re.search(key + r": +(\d+)", built.asm["amdgcn"])[1] for key in keys]  # type: ignore[index]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        text = subprocess.run([_DUMP, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    return [re.search(key + r":(\d+)", text)[1] for key in ("STACK", "REG")]  # type: ignore[index]


def _compile(label: str, kernel: Any, target: GPUTarget, known: dict[str, Any]) -> None:
    known = {**dict.fromkeys(_FLAGS, False), "C": tl.float32, "PRECISION": "ieee", **known}
    options = {"num_warps": known.pop("num_warps", 8)}
    names = kernel.arg_names
    constants = {name: value for name, value in known.items() if name in names}
    kinds = {name: "constexpr" if name in constants else _kind(kernel, name) for name in names}
    built = triton.compile(ASTSource(fn=kernel, signature=kinds, constexprs=constants), target=target, options=options)
    print(label, built.metadata.shared, *_usage(built))


def main(name: str) -> None:
    target = GPUTarget("cuda", int(name[3:]), 32) if name.startswith("sm_") else GPUTarget("hip", name, 64)
    rows, ways, units, S = 75, 5, 40, 25
    cases = []
    mlp = mlp_kernels.tiles(rows, ways, units)
    for kernel in (
        loop_kernels.loop_forward_kernel, loop_kernels.loop_backward_kernel, mlp_kernels.mlp_forward_kernel,
        mlp_kernels.mlp_backward_kernel,
    ):  # fmt: skip
        cases.append((kernel.__name__, kernel, mlp))
    blocks = {"BI": 64, "BJ": 64, "BD": 32}
    for kernel in (products.rows_dots_kernel, products.rows_combine_kernel, products.squared_norms_kernel):
        cases.append((kernel.__name__, kernel, blocks))
    live = 32 + 80  # support and query rows, padded
    for label, oracle, cosine, H, pairs in (
        ("cross_entropy", oracle_kernels.CROSS_ENTROPY, False, 0, 0),
        ("soft_assignment", oracle_kernels.SOFT_ASSIGNMENT, True, 0, 0),
        ("synthetic_gradient", oracle_kernels.SYNTHETIC_GRADIENT, True, units, 0),
        ("equivariant_gradient", oracle_kernels.EQUIVARIANT_GRADIENT, True, 16, rows * ways),
    ):
        known = {"ORACLE": oracle.value, "QUERY": cosine, "COSINE": cosine, "ROWS": True, "COEFFICIENTS": True}
        known |= phases.tiles(live, ways, H, pairs)
        cases.append((f"{label}_forward", phase_kernels.phase_forward_kernel, known))
        cases.append((f"{label}_backward", phase_kernels.phase_backward_kernel, known))
    for label, rows_of_task in (("", S), ("_of_100_rows", 100)):
        size = ridge.tiles(rows_of_task, ways)
        cases.append((f"factorise{label}", ridge_kernels.factorise_kernel, size["factorise"]))
        cases.append((f"solve{label}", ridge_kernels.solve_kernel, size["solve"]))
    flags = {"DISTANCE": 0, "POWER": 2, "WEIGHTED": True, "LABELLED": True, "SAVES": True, "num_warps": 4}
    known = focal_distillation_kernels.tiles(1000) | flags
    cases.append(("distillation_forward", focal_distillation_kernels.forward_kernel, known))
    cases.append(("distillation_backward", focal_distillation_kernels.backward_kernel, known))
    for label, kernel, known in cases:
        _compile(label, kernel, target, known)


if __name__ == "__main__":
    main(sys.argv[1])
