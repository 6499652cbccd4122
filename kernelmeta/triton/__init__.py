"""The ops as Triton kernels: ``torch.ops.kernelmeta.triton_sib`` and so on, chosen where the backend is "triton".

One program owns a task: its state is tiles padded to powers of two, its activations wait in a workspace in global
memory (`tiles`). The kernels take float32 (features float32, bfloat16 or float16; sums in float32). What is larger
than this, and float64, runs in plain PyTorch on the same device:

* ``sib``, ``synthetic_gradient_mlp``: 128 query rows, activations and weights [H, H] of 128 x 64;
* ``program``, ``linear_head``: 256 live rows (support rows too, where a phase uses them, both rounded up to 16) times
  16 ways, or 128 times 32; with synthetic gradients as ``sib``;
* ``ridge``: 128 support rows.

Unlike the other backends they do not raise for bad values, which would wait for the device: a class without a support
row, a label out of range, a singular system give that task NaN. Ragged tasks do wait, once a call, for their offsets,
and so cannot be captured in a CUDA graph.

None of it has run on a GPU. The larger kernels spill registers: compiled for sm_80 at 75 query rows, 5 ways and 40
units, `sib` 0.2 KB a thread forward and 1.3 KB backward, a phase of synthetic gradients 0.6 KB and 1.8 KB, one of soft
assignment 0.6 KB backward (tests/triton_kernels/test_compiled.py holds the figures).

Triton is imported by the first call, and no decorator asks for a driver. The first call with new sizes compiles, and
measures which number of warps is the fastest (`tuning`); it has to come before a capture, which measures nothing.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kernelmeta.backends import backends
from kernelmeta.ops import class_means_op, linear_head_op, program_op, ridge_op, sib_op, synthetic_gradient_mlp_op


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


def _linear_head(*args: Any) -> tuple[Tensor, ...]:
    from kernelmeta.triton import linear_head

    return linear_head.forward(*args)


def _linear_head_backward(*args: Any) -> tuple[Tensor, ...]:
    from kernelmeta.triton import linear_head

    return linear_head.backward(*args)


def _program(*args: Any) -> tuple[Tensor, ...]:
    from kernelmeta.triton import program

    return program.forward(*args)


def _program_backward(*args: Any) -> tuple[Tensor, ...]:
    from kernelmeta.triton import program

    return program.backward(*args)


def _ridge(*args: Any) -> tuple[Tensor, ...]:
    from kernelmeta.triton import ridge

    return ridge.forward(*args)


def _ridge_backward(*args: Any) -> tuple[Tensor, ...]:
    from kernelmeta.triton import ridge

    return ridge.backward(*args)


if backends()["triton"].available:
    class_means_op.OP.define_on("triton", _class_means, _class_means_backward)
    synthetic_gradient_mlp_op.OP.define_on("triton", _mlp, _mlp_backward)
    sib_op.OP.define_on("triton", _sib, _sib_backward)
    linear_head_op.OP.define_on("triton", _linear_head, _linear_head_backward)
    program_op.OP.define_on("triton", _program, _program_backward)
    ridge_op.OP.define_on("triton", _ridge, _ridge_backward)
