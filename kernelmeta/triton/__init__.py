"""The ops as Triton kernels: ``torch.ops.kernelmeta.triton_sib`` and so on, chosen where the backend is "triton".

One program owns a task: its state is tiles padded to powers of two, its activations wait in a workspace in global
memory (`tiles`). The kernels take float32 (features float32, bfloat16 or float16; sums in float32). What is larger
than this, and float64, runs in plain PyTorch on the same device:

* ``sib``, ``synthetic_gradient_mlp``: 128 query rows, activations and weights [H, H] of 128 x 64;
* ``program``, ``linear_head``: 256 live rows (support rows too, where a phase uses them, both rounded up to 16) times
  16 ways, or 128 times 32; with synthetic gradients as ``sib``; with equivariant ones
  512 pairs of a row and a class;
* ``ridge``: 128 support rows;
* ``focal_distillation``: 8,192 classes.

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

import importlib
from collections.abc import Callable
from typing import Any

from kernelmeta.backends import backends
from kernelmeta.ops import (
    class_means_op,
    focal_distillation_op,
    linear_head_op,
    program_op,
    ridge_op,
    sib_op,
    synthetic_gradient_mlp_op,
)

_OPS = {
    "class_means": class_means_op,
    "synthetic_gradient_mlp": synthetic_gradient_mlp_op,
    "sib": sib_op,
    "linear_head": linear_head_op,
    "program": program_op,
    "ridge": ridge_op,
    "focal_distillation": focal_distillation_op,
}


def _kernel(op: str, direction: str) -> Callable[[Any], Any]:
    """``forward``, ``backward`` or ``trace`` of kernelmeta.triton.<op>, which is imported by the first call."""
    return lambda call: getattr(importlib.import_module(f"kernelmeta.triton.{op}"), direction)(call)


if backends()["triton"].available:
    for _name, _op in _OPS.items():
        _op.OP.define_on(
            "triton",
            _kernel(_name, "forward"),
            _kernel(_name, "backward"),
            _kernel(_name, "trace") if _op.OP.has_trace else None,
        )
