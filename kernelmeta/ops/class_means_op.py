"""The classifier that a support set proposes: weighted means of its normalised rows (Hu et al. 2020, section 4.1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernelmeta import reference
from kernelmeta.backends import select
from kernelmeta.ops import _checks
from kernelmeta.ops._differentiable import DifferentiableOp
from kernelmeta.reference.task_rows import as_labels


def _type(call: Any) -> torch.dtype:
    """What is computed in."""
    return torch.float64 if call.support.dtype is torch.float64 else torch.float32


def _fake(call: Any) -> tuple[Tensor, ...]:
    T, _, D = call.support.shape
    return (call.support.new_empty((T, call.n_way, D), dtype=_type(call)),)


def _plain(call: Any) -> tuple[Tensor, ...]:
    return (reference.class_means(call.support.to(_type(call)), call.support_labels, call.n_way, call.weight),)


def _work(call: Any) -> int:
    T, S, D = call.support.shape
    return T * (2 * S + call.n_way) * D


OP = DifferentiableOp(
    "class_means",
    "Tensor support, Tensor support_labels, Tensor? weight, int n_way",
    results=("theta0",),
    differentiable=("support", "weight"),
    rows={"support": None},
    fake=_fake,
    plain=_plain,
    work=_work,
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
    _checks.ways(n_way)
    if support.shape[2] == 0:
        raise ValueError(f"support: expected at least one feature, got {_checks.shape_text(support)}")
    if weight is not None:
        _checks.shape("weight", weight, (support.shape[2],), "[D]")
    support_labels = as_labels(support_labels)
    _checks.labels("support_labels", support_labels, (support.shape[0], support.shape[1]), support)
    args = OP.arguments(support=support, support_labels=support_labels, weight=weight, n_way=n_way)
    theta0: Tensor = OP.run(select(support.device.type), args)
    return theta0
