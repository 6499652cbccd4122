"""The classifier that a support set proposes: weighted means of its normalised rows (Hu et al. 2020, section 4.1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernelmeta import reference
from kernelmeta.backends import select
from kernelmeta.ops import _checks
from kernelmeta.ops._differentiable import Args, DifferentiableOp

_SUPPORT, _WEIGHT = 0, 2
_ARGUMENTS = "Tensor support, Tensor support_labels, Tensor? weight, int n_way"


def _fake(support: Tensor, labels: Tensor, weight: Tensor | None, n_way: int) -> Tensor:
    dtype = torch.float64 if support.dtype is torch.float64 else torch.float32
    return support.new_empty((support.shape[0], n_way, support.shape[2]), dtype=dtype)


def _fake_backward(
    grad: Tensor, support: Tensor, labels: Tensor, weight: Tensor | None, n_way: int, need_support: bool
) -> tuple[Tensor, Tensor]:
    return (
        grad.new_empty(support.shape if need_support else 0),
        grad.new_empty(0 if weight is None else weight.shape),
    )


def _fallback(support: Tensor, labels: Tensor, weight: Tensor | None, n_way: int) -> Tensor:
    dtype = torch.float64 if support.dtype is torch.float64 else torch.float32
    return reference.class_means(support.to(dtype), labels, n_way, weight)


def _fallback_backward(
    grad: Tensor, support: Tensor, labels: Tensor, weight: Tensor | None, n_way: int, need_support: bool
) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        rows = support.to(grad.dtype).detach().requires_grad_()
        scale = None if weight is None else weight.detach().requires_grad_()
        wanted = [rows] if scale is None else [rows, scale]
        found = torch.autograd.grad(_fallback(rows, labels, scale, n_way), wanted, grad)
    none = grad.new_empty(0)
    return found[0].contiguous() if need_support else none, none.clone() if scale is None else found[1].contiguous()


def _backward_args(args: Args, residuals: Args, grads: Args, needs: Any) -> Args:
    grad = grads[0] if grads[0] is not None else torch.zeros_like(_fake(*args))
    return (grad, *args, needs[_SUPPORT])


OP = DifferentiableOp(
    "class_means",
    schema=f"({_ARGUMENTS}) -> Tensor",
    backward_schema=f"(Tensor grad, {_ARGUMENTS}, bool need_support) -> (Tensor, Tensor)",
    fake=_fake,
    fake_backward=_fake_backward,
    fallback=_fallback,
    fallback_backward=_fallback_backward,
    differentiable=(_SUPPORT, _WEIGHT),
    n_outputs=1,
    backward_args=_backward_args,
)


def class_means(support: Tensor, support_labels: Tensor, n_way: int, weight: Tensor | None = None) -> Tensor:
    """``theta0[n] = weight * mean of x / max(|x|, 1e-12) over the support rows of class n``.

    Args:
        support: [T, S, D]; every class needs at least one row. Classes may have unequal counts.
        support_labels: [T, S] int64 in 0..n_way-1.
        n_way: N, the number of classes.
        weight: [D], or None for ones.

    Returns:
        theta0, [T, N, D], in the dtype that ``support`` and ``weight`` promote to (under autocast float32 at least).

    Raises:
        ValueError: shapes, devices or labels that do not fit, named; a class without a support row.
        TypeError: features that are not floating point, labels that are not int64.
    """
    if weight is None:
        _checks.tensors(support=support)
    else:
        _checks.tensors(support=support, weight=weight)
    _checks.dimensions("support", support, "[T, S, D]")
    if not isinstance(n_way, int) or n_way < 1:
        raise ValueError(f"n_way: expected an int of at least 1, got {n_way!r}")
    if support.shape[2] == 0:
        raise ValueError(f"support: expected at least one feature, got {_checks.shape_text(support)}")
    if weight is not None:
        _checks.shape("weight", weight, (support.shape[2],), "[D]")
    _checks.labels("support_labels", support_labels, (support.shape[0], support.shape[1]), support)
    precision = _checks.precisions((support,) if weight is None else (support, weight))
    if precision is not None:
        weight = None if weight is None else weight.to(precision[0])
        if precision[0] is torch.float64:
            support = support.to(precision[0])
    backend = select(support.device.type)
    if backend == "reference":
        theta0 = _fallback(support, support_labels, weight, n_way)
    else:
        theta0 = OP.on(backend)(support, support_labels, weight, n_way)
    return theta0 if precision is None else theta0.to(precision[1])
