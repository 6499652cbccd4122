"""How the Triton kernels are launched: tile sizes, precision, device."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_TYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


def interpreted() -> bool:
    return bool(triton.knobs.runtime.interpret)


def cover(n: int, most: int) -> int:
    """The tile for n elements: a power of two of at least 16 (what tl.dot takes) and at most ``most``."""
    return min(most, max(16, triton.next_power_of_2(n)))


def precision(like: Tensor) -> dict[str, Any]:
    """The type to compute in and how tl.dot treats float32: plain TF32 only where PyTorch is told to use it."""
    allowed = like.is_cuda and torch.backends.cuda.matmul.allow_tf32
    return {"C": _TYPES[like.dtype], "PRECISION": "tf32" if allowed else "ieee"}


def launch(kernel: Any, grid: int, *args: Any, **options: Any) -> None:
    """``grid`` programs on the device and current stream of the first tensor."""
    device = args[0].device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[(grid,)](*args, **options)


def plain(formula: Any, *args: Any) -> Any:
    """A backward formula in plain PyTorch, which differentiates; the raw ops are called below autograd."""
    exclude = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradCPU", "AutogradCUDA", "AutogradOther"):
        exclude = exclude.remove(getattr(torch._C.DispatchKey, key))
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), exclude):
        return formula(*args)
