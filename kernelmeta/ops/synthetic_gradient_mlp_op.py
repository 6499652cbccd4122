"""The synthetic-gradient MLP: what d loss / d logits would be, guessed from the logits (Hu et al. 2020, sec. 4)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kernelmeta import reference
from kernelmeta.backends import select
from kernelmeta.mlp_parameters import MLPParameters
from kernelmeta.ops import _checks
from kernelmeta.ops._differentiable import DifferentiableOp
from kernelmeta.ops._signature import mlp_of, mlp_tensors


def _plain(call: Any) -> tuple[Tensor, ...]:
    mode = "task" if call.running_stats is None else "running"
    mlp = mlp_of(call)
    return (reference.synthetic_gradient_mlp(call.logits, mlp, norm_stats=mode, running_stats=call.running_stats),)


def _work(call: Any) -> int:
    (T, Q, N), H = call.logits.shape, call.weight1.shape[0]
    return T * Q * H * (2 * N + H)


OP = DifferentiableOp(
    "synthetic_gradient_mlp",
    f"Tensor logits, {mlp_tensors()}, Tensor? running_stats",
    results=("gradients",),
    differentiable=("logits", *MLPParameters._fields),
    rows={},
    fake=lambda call: (call.logits.new_empty(call.logits.shape),),
    plain=_plain,
    work=_work,
)


def synthetic_gradient_mlp(
    logits: Tensor,
    mlp: MLPParameters,
    *,
    norm_stats: str = "task",
    running_stats: Tensor | None = None,
) -> Tensor:
    """Guess the gradient of the loss with respect to the logits: Linear - ReLU - BatchNorm, twice, then Linear.

    Args:
        logits: [T, Q, N], or [Q, N] for one task.
        mlp: the ten parameters.
        norm_stats: whose statistics BatchNorm uses: "task" (the Q rows of each task), "batch" (all T*Q rows
            together), "running" (``running_stats``).
        running_stats: [2, 2, H]: layer; mean, variance; unit.

    Returns:
        The guessed gradients, of the shape of ``logits``, in the dtype that logits and parameters promote to (under
        autocast float32 at least).

    Raises:
        ValueError: shapes, devices or options that do not fit, named.
        TypeError: logits that are not floating point.
    """
    _checks.tensors(logits=logits, weight1=mlp[0])
    N, H = _checks.mlp(mlp)
    if logits.dim() not in (2, 3) or logits.shape[-1] != N or logits.shape[-2] == 0:
        raise ValueError(
            f"logits: expected shape [T, Q, N] or [Q, N] with N = {N} and at least one row, "
            f"got {_checks.shape_text(logits)}"
        )
    _checks.norm_stats(norm_stats, running_stats, H, False)
    rows = logits if logits.dim() == 3 and norm_stats != "batch" else logits.reshape(1, -1, N)
    stats = running_stats if norm_stats == "running" else None
    gradients: Tensor = OP.run(select(logits.device.type), OP.arguments(logits=rows, mlp=mlp, running_stats=stats))
    return gradients.reshape(logits.shape)
