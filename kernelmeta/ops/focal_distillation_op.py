"""Focal distillation: the loss of a new classifier that must not break what its predecessor does right."""

from __future__ import annotations

import math
from typing import Any, Literal, overload

import torch
from torch import Tensor

from kernelmeta.backends import select
from kernelmeta.flip_counts import FlipCounts
from kernelmeta.ops import _checks
from kernelmeta.ops._differentiable import DifferentiableOp
from kernelmeta.reference.focal_distillation import DISTANCES, REDUCTIONS, distillation_rows, reduced
from kernelmeta.reference.task_rows import as_labels

# What the kernels leave of a row for their backward pass; ``DistillationRow`` in csrc/engine/focal_distillation.h.
ROW_TRACE = 12


def _type(call: Any) -> torch.dtype:
    """What is computed in."""
    return torch.float64 if call.new_logits.dtype is torch.float64 else torch.float32


def _fake(call: Any) -> tuple[Tensor, ...]:
    R, new = call.new_logits.shape[0], call.new_logits
    rows = new.new_empty((R,), dtype=_type(call))
    label_losses = new.new_empty((R if call.label_loss else 0,), dtype=_type(call))
    return rows, label_losses, new.new_empty((R,), dtype=torch.uint8)


def _plain(call: Any) -> tuple[Tensor | None, ...]:
    dtype = _type(call)
    return distillation_rows(
        call.new_logits.to(dtype), call.old_logits.to(dtype), call.labels, call.class_weight,
        alpha=call.alpha, beta=call.beta, tau=call.tau, distance=DISTANCES[call.distance], margin=call.margin,
        power=call.power, label_loss=call.label_loss, label_smoothing=call.label_smoothing,
        ignore_index=call.ignore_index,
    )  # fmt: skip


def _trace(call: Any) -> Any:
    return call.new_logits.shape[0] * ROW_TRACE


def _work(call: Any) -> int:
    """An exponential as ten multiplications."""
    R, C = call.new_logits.shape
    return 40 * R * C


OP = DifferentiableOp(
    "focal_distillation",
    "Tensor new_logits, Tensor old_logits, Tensor labels, Tensor? class_weight, int distance, float alpha, "
    "float beta, float tau, float margin, float power, bool label_loss, float label_smoothing, int ignore_index",
    results=("distances", "label_losses", "codes"),
    outputs=2,
    differentiable=("new_logits",),
    rows={"new_logits": None},
    trace=_trace,
    fake=_fake,
    plain=_plain,
    work=_work,
)


# fmt: off
@overload
def focal_distillation(
    new_logits: Tensor, old_logits: Tensor, labels: Tensor, *, alpha: float = ..., beta: float = ...,
    weight: float = ..., tau: float = ..., distance: str = ..., margin: float = ..., power: float = ...,
    label_loss: bool = ..., label_smoothing: float = ..., ignore_index: int = ..., class_weight: Tensor | None = ...,
    reduction: str = ..., return_flips: Literal[False] = ...,
) -> Tensor: ...
@overload
def focal_distillation(
    new_logits: Tensor, old_logits: Tensor, labels: Tensor, *, alpha: float = ..., beta: float = ...,
    weight: float = ..., tau: float = ..., distance: str = ..., margin: float = ..., power: float = ...,
    label_loss: bool = ..., label_smoothing: float = ..., ignore_index: int = ..., class_weight: Tensor | None = ...,
    reduction: str = ..., return_flips: Literal[True],
) -> tuple[Tensor, FlipCounts]: ...
@overload
def focal_distillation(
    new_logits: Tensor, old_logits: Tensor, labels: Tensor, *, alpha: float = ..., beta: float = ...,
    weight: float = ..., tau: float = ..., distance: str = ..., margin: float = ..., power: float = ...,
    label_loss: bool = ..., label_smoothing: float = ..., ignore_index: int = ..., class_weight: Tensor | None = ...,
    reduction: str = ..., return_flips: bool,
) -> Tensor | tuple[Tensor, FlipCounts]: ...
# fmt: on
def focal_distillation(
    new_logits: Tensor,
    old_logits: Tensor,
    labels: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 5.0,
    weight: float = 1.0,
    tau: float = 100.0,
    distance: str = "kl",
    margin: float = 0.5,
    power: float = 2.0,
    label_loss: bool = True,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    class_weight: Tensor | None = None,
    reduction: str = "mean",
    return_flips: bool = False,
) -> Tensor | tuple[Tensor, FlipCounts]:
    """``L = CE + weight mean_i (alpha + beta [old right on i]) D(new_i, old_i)``, with D a distance of logits.

    The rows that the old classifier gets right are held to it more firmly than those that it gets wrong (focal
    distillation, Yan et al. 2021, "Positive-Congruent Training", equations 4 and 5). All of it is one pass over the
    logits, and one more for the gradient; nothing wider than a number a row is kept in between.

    Args:
        new_logits: [R, C], or [..., C] with any leading sizes: [T, Q, N] logits of episodes, say. They get the
            gradient.
        old_logits: [R, C], those of the old classifier for the same rows and the same classes; constants. The mean
            over an ensemble, where one is followed (Zhao et al. 2024, ELODI): then it is the ensemble whose being
            right counts.
        labels: [R] int64 in 0..C-1, or ``ignore_index``.
        alpha: weight of the distance in every row.
        beta: what is added to it in rows that the old classifier gets right (whose own class has the largest logit,
            the first of equal ones).
        weight: weight of the distances against the cross entropy, lambda.
        tau: temperature of "kl".
        distance: one of

            - "kl": ``tau^2 KL(softmax(old / tau) || softmax(new / tau))``;
            - "squared": logit matching, half the squared distance, summed over the classes; "squared_mean": averaged;
            - "ldi": logit-difference inhibition, ``max(|new - old| - margin, 0)^power``, summed over the classes;
              "ldi_mean": averaged.
        margin: differences of logits that "ldi" allows.
        power: its exponent, at least 1.
        label_loss: whether the cross entropy is part of the loss.
        label_smoothing, class_weight: of the cross entropy, as in ``torch.nn.functional.cross_entropy``:
            a number in 0..1, and [C] weights. Distances do not look at them.
        ignore_index: rows with this label take no part: not in the loss, not in a mean, not in the flips.
        reduction: "mean", over all rows that take part, the cross entropy as
            ``torch.nn.functional.cross_entropy`` does, by weight; "sum"; or "none", a loss for each row.
        return_flips: return the numbers of flips too; they cost nothing.

    Returns:
        The loss, [] (with "none" in the shape of the labels), in the dtype that both logits promote to (under autocast
        float32 at least); with ``return_flips`` a pair of it and :class:`kernelmeta.FlipCounts`. A class whose logits
        are minus infinity in both is no class of that row; one that the new classifier alone rules out makes "kl"
        infinite.

    Raises:
        ValueError: shapes, devices, labels or options that do not fit, named; old logits that require a gradient. (On
            a GPU a row whose label is out of range gives NaN instead.)
        TypeError: logits that are not floating point, labels that are not integers.
    """
    labels = as_labels(labels)
    _check_tensors(new_logits, old_logits, labels, class_weight)
    _check_options(alpha, beta, weight, tau, distance, margin, power, label_smoothing, ignore_index, reduction)
    C, backend = new_logits.shape[-1], select(new_logits.device.type)
    compute, result_type = _checks.precisions([new_logits, old_logits]) or (new_logits.dtype, new_logits.dtype)
    if compute is torch.float64 or backend == "reference":
        new_logits, old_logits = new_logits.to(compute), old_logits.to(compute)
    args = OP.arguments(
        new_logits=new_logits.reshape(-1, C), old_logits=old_logits.detach().reshape(-1, C),
        labels=labels.reshape(-1), class_weight=None if class_weight is None else class_weight.detach().to(compute),
        distance=DISTANCES.index(distance), alpha=float(alpha), beta=float(beta), tau=float(tau),
        margin=float(margin), power=float(power), label_loss=bool(label_loss),
        label_smoothing=float(label_smoothing), ignore_index=ignore_index,
    )  # fmt: skip
    # (on a backend, rows stay in the precision of the computation; the loss alone is rounded)
    results = OP.run(backend, args) if backend == "reference" else OP.on(backend)(args)
    distances, label_losses, codes = results
    loss = reduced(
        distances, label_losses if label_loss else None, codes, labels, class_weight, weight=float(weight),
        ignore_index=ignore_index, reduction=reduction,
    )  # fmt: skip
    loss = loss.to(result_type)
    return (loss, FlipCounts.of_codes(codes)) if return_flips else loss


def _check_tensors(new_logits: Tensor, old_logits: Tensor, labels: Tensor, class_weight: Tensor | None) -> None:
    _checks.tensors(new_logits=new_logits, old_logits=old_logits)
    if new_logits.dim() < 1 or new_logits.shape[-1] == 0:
        raise ValueError(f"new_logits: expected [..., C] with a class at least, got {_checks.shape_text(new_logits)}")
    if old_logits.shape != new_logits.shape:
        raise ValueError(
            f"old_logits: expected {_checks.shape_text(new_logits)} as new_logits, the same rows and the same classes, "
            f"got {_checks.shape_text(old_logits)}"
        )
    if torch.is_grad_enabled() and old_logits.requires_grad:
        raise ValueError(
            "old_logits: requires a gradient, and gets none: the old classifier stays as it is. Compute them under "
            "torch.no_grad(), or detach() them"
        )
    _checks.labels("labels", labels, tuple(new_logits.shape[:-1]), new_logits, "new_logits.shape[:-1]")
    if class_weight is not None:
        _checks.tensors(new_logits=new_logits, class_weight=class_weight)
        _checks.shape("class_weight", class_weight, (new_logits.shape[-1],), "[C]")


def _check_options(
    alpha: float,
    beta: float,
    weight: float,
    tau: float,
    distance: str,
    margin: float,
    power: float,
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
) -> None:
    numbers = {
        "alpha": (alpha, 0.0), "beta": (beta, 0.0), "weight": (weight, 0.0), "tau": (tau, 0.0),
        "margin": (margin, 0.0), "power": (power, 1.0), "label_smoothing": (label_smoothing, 0.0),
    }  # fmt: skip
    for name, (number, least) in numbers.items():
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise TypeError(f"{name}: expected a number, got {type(number).__name__}")
        if not math.isfinite(number) or number < least:
            raise ValueError(f"{name}: expected a finite number of at least {least:g}, got {number}")
    if tau == 0:
        raise ValueError("tau: expected a temperature above 0, got 0")
    if label_smoothing > 1:
        raise ValueError(f"label_smoothing: expected 0..1, got {label_smoothing}")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index: expected an int, got {type(ignore_index).__name__}")
    if distance not in DISTANCES:
        raise ValueError(f"distance: expected one of {', '.join(DISTANCES)}, got {distance!r}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}, got {reduction!r}")
