"""The raw op ``focal_distillation`` in Triton, and its backward. Rows too wide for one program run in plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernelmeta.ops.focal_distillation_op import OP, ROW_TRACE
from kernelmeta.triton import focal_distillation_kernels as kernels


def trace(call: Any) -> Any:
    return call.new_logits.shape[0] * ROW_TRACE if kernels.fits(call.new_logits) else 0


def forward(call: Any) -> tuple[Tensor, ...]:
    if not kernels.fits(call.new_logits):
        results: tuple[Tensor, ...] = OP.plain_forward(*call)
        return results
    return kernels.forward(call, torch.float64 if call.new_logits.dtype is torch.float64 else torch.float32)


def backward(call: Any) -> Tensor:
    if not call.need_new_logits:
        none: Tensor = call.grad_distances.new_empty(0)
        return none
    if not kernels.fits(call.new_logits):
        result: Tensor = OP.plain_backward(*call)
        return result
    return kernels.backward(call)
