"""The synthetic-gradient MLP: what d loss / d logits would be, guessed from the logits (Hu et al. 2020, sec. 4)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernelmeta import reference
from kernelmeta.backends import select
from kernelmeta.ops import _checks
from kernelmeta.ops._differentiable import Args, DifferentiableOp
from kernelmeta.reference import MLPParameters

_ARGUMENTS = (
    "Tensor logits, Tensor weight1, Tensor bias1, Tensor gain1, Tensor shift1, Tensor weight2, Tensor bias2, "
    "Tensor gain2, Tensor shift2, Tensor weight3, Tensor bias3, Tensor? running_stats"
)


def _plain(*args: Any) -> Tensor:
    logits, *mlp, running_stats = args
    mode = "task" if running_stats is None else "running"
    return reference.synthetic_gradient_mlp(logits, MLPParameters(*mlp), norm_stats=mode, running_stats=running_stats)


def _fallback_backward(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        inputs = [a.detach().requires_grad_() for a in args[:11]]
        found = torch.autograd.grad(_plain(*inputs, args[11]), inputs, grad, allow_unused=True)
    return tuple(torch.zeros_like(i) if g is None else g.contiguous() for g, i in zip(found, inputs, strict=True))


def _backward_args(args: Args, residuals: Args, grads: Args, needs: Any) -> Args:
    return (torch.zeros_like(args[0]) if grads[0] is None else grads[0], *args)


OP = DifferentiableOp(
    "synthetic_gradient_mlp",
    schema=f"({_ARGUMENTS}) -> Tensor",
    backward_schema=f"(Tensor grad, {_ARGUMENTS}) -> ({', '.join(['Tensor'] * 11)})",
    fake=lambda *args: args[0].new_empty(args[0].shape),
    fake_backward=lambda grad, *args: tuple(a.new_empty(a.shape) for a in args[:11]),
    fallback=_plain,
    fallback_backward=_fallback_backward,
    differentiable=range(11),
    n_outputs=1,
    backward_args=_backward_args,
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
    if norm_stats != "running":
        running_stats = None
    parameters: Any = mlp
    precision = _checks.precisions((logits, *mlp))
    if precision is not None:
        logits, *parameters = (t.to(precision[0]) for t in (logits, *mlp))
        running_stats = None if running_stats is None else running_stats.to(precision[0])
    backend = select(logits.device.type)
    if backend == "reference":
        result = reference.synthetic_gradient_mlp(
            logits, MLPParameters(*parameters), norm_stats=norm_stats, running_stats=running_stats
        )
    else:
        rows = logits if logits.dim() == 3 and norm_stats != "batch" else logits.reshape(1, -1, N)
        result = OP.on(backend)(rows, *parameters, running_stats).reshape(logits.shape)
    return result if precision is None else result.to(precision[1])
