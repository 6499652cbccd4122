"""The raw op ``synthetic_gradient_mlp`` in Triton. What one program cannot hold runs in plain PyTorch."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kernelmeta.ops._signature import mlp_of
from kernelmeta.ops.synthetic_gradient_mlp_op import OP
from kernelmeta.triton import mlp_kernels


def _fits(call: Any) -> bool:
    _, Q, N = call.logits.shape
    return mlp_kernels.fits(Q, N, call.weight1.shape[0], call.logits.dtype)


def forward(call: Any) -> Tensor:
    if not _fits(call):
        result: Tensor = OP.plain_forward(*call)
        return result
    return mlp_kernels.forward(call.logits, mlp_of(call), call.running_stats)


def backward(call: Any) -> tuple[Tensor, ...]:
    if not _fits(call):
        results: tuple[Tensor, ...] = OP.plain_backward(*call)
        return results
    return mlp_kernels.backward(call.grad_gradients, call.logits, mlp_of(call), call.running_stats)
