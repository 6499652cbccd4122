"""Tasks that the space of the rows loses too many digits of (csrc/engine/cosine_step.h), done anew in D dimensions: in
plain PyTorch, as seldom as they are. To know of them waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernelmeta.triton.trace import Trace


def lost(trace: Trace, theta0: Tensor) -> Tensor | None:
    """The numbers of these tasks, [n]; without those whose start is NaN already. None if there are none."""
    found = (trace["lost"] != 0).any(-1) & theta0.isfinite().flatten(1).all(-1)
    numbers = found.nonzero()[:, 0]
    return numbers if len(numbers) else None


def rows_of(tasks: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of some of the tasks of unequal size, and the offsets of these tasks alone."""
    first, count = offsets[tasks], offsets[tasks + 1] - offsets[tasks]
    own = torch.cat([count.new_zeros(1), count.cumsum(0)])
    shift = torch.repeat_interleave(first - own[:-1], count)
    return torch.arange(len(shift), device=shift.device) + shift, own


def put(results: Sequence[Tensor], where: Sequence[Tensor], anew: Sequence[Tensor]) -> None:
    """Those of the tasks done anew in their places; results that nobody wanted are empty."""
    for result, at, values in zip(results, where, anew, strict=True):
        if result.numel():
            result[at] = values.to(result.dtype)


def add(results: Sequence[Tensor], anew: Sequence[Tensor]) -> list[Any]:
    """Gradients of parameters, sums over tasks."""
    return [r + a.view(r.shape) if r.numel() else r for r, a in zip(results, anew, strict=True)]
