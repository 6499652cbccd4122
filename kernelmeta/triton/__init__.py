"""The ops as Triton kernels: ``torch.ops.kernelmeta.triton_sib`` and so on, chosen where the backend is "triton".

One program owns a task: its state, MLP and activations are tiles padded to powers of two. The kernels take float32
(features float32, bfloat16 or float16; sums in float32), norm_stats "task" and "running", up to 128 query rows,
and activations and weights [H, H] of up to 128 x 64; what is larger, and float64, runs in plain PyTorch on the same
device. Unlike the other backends they do not look at the labels: a class without a support row gives NaN.

Compiled for sm_80 at 75 query rows and 40 units (tiles 128 x 64, no GPU at hand) the loop spills registers, 1.6 KB a
thread forward and 10.8 KB backward; at 32 x 32 none forward and 0.9 KB backward. None of it has run on a GPU.

Triton is imported by the first call, and no decorator asks for a driver. There is nothing to tune at run time: tiles
and warps follow from the sizes (`mlp_kernels.tiles`), so that capture in a CUDA graph never measures anything; Triton
itself compiles at the first call with new sizes, which has to come before the capture.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kernelmeta.backends import backends
from kernelmeta.ops import class_means_op, sib_op, synthetic_gradient_mlp_op


def _class_means(*args: Any) -> Tensor:
    from kernelmeta.triton import class_means_kernels

    return class_means_kernels.forward(*args)


def _class_means_backward(*args: Any) -> tuple[Tensor, ...]:
    from kernelmeta.triton import class_means_kernels

    return class_means_kernels.backward(*args)


def _mlp(*args: Any) -> Tensor:
    from kernelmeta.triton import mlp_kernels

    logits, *mlp, running_stats = args
    if not mlp_kernels.fits(logits.shape[1], logits.shape[2], mlp[0].shape[0], logits.dtype):
        return synthetic_gradient_mlp_op.OP.fallback(*args).contiguous()
    return mlp_kernels.forward(logits, mlp, running_stats)


def _mlp_backward(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    from kernelmeta.triton import mlp_kernels
    from kernelmeta.triton.launch import plain

    logits, *mlp, running_stats = args
    if not mlp_kernels.fits(logits.shape[1], logits.shape[2], mlp[0].shape[0], logits.dtype):
        return plain(synthetic_gradient_mlp_op._fallback_backward, grad, *args)
    return mlp_kernels.backward(grad, logits, mlp, running_stats)


def _sib(*args: Any) -> tuple[Tensor, ...]:
    from kernelmeta.triton import sib

    return sib.forward(*args)


def _sib_backward(*args: Any) -> tuple[Tensor, ...]:
    from kernelmeta.triton import sib

    return sib.backward(*args)


if backends()["triton"].available:
    class_means_op.OP.define_on("triton", _class_means, _class_means_backward)
    synthetic_gradient_mlp_op.OP.define_on("triton", _mlp, _mlp_backward)
    sib_op.OP.define_on("triton", _sib, _sib_backward)
