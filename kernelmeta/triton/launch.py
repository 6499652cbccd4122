"""How the Triton kernels are launched: tile sizes, precision, device."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernelmeta.triton import tuning

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


TUNER: tuning.Tuner | None = tuning.Tuner() if tuning.wanted() and not interpreted() else None


def _copy(tensor: Tensor) -> Tensor:
    """With the same strides, which the kernel was told."""
    return tensor.new_empty_strided(tensor.shape, tensor.stride()).copy_(tensor)


def launch(
    kernel: Any, grid: int, *args: Any, in_place: bool = False, sizes: Any = (), stages: Any = (), **options: Any
) -> None:
    """``grid`` programs on the device and current stream of the first tensor.

    Args:
        in_place: the kernel changes what it reads: it is tuned on copies of all tensors.
        sizes: what makes a class of shapes besides tiles, flags and dtypes; each up to the next power of two.
        stages: numbers of pipeline stages worth trying.
    """
    device = args[0].device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        if TUNER is not None and "num_warps" in options:
            default = {"num_warps": options.pop("num_warps")}
            given = tuple(str(a.dtype) for a in args if isinstance(a, Tensor))
            extent = tuple(triton.next_power_of_2(n) for n in (grid, *sizes))
            key = (kernel.__name__, device, extent, given, tuple((k, str(v)) for k, v in sorted(options.items())))

            def prepare() -> Any:
                own = [_copy(a) if in_place and isinstance(a, Tensor) else a for a in args]
                return lambda **choice: kernel[(grid,)](*own, **options, **choice)

            options |= TUNER.choose(key, tuning.candidates(default, stages), prepare)
        kernel[(grid,)](*args, **options)
