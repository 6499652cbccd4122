"""Focal distillation written once more, term by term in float64, with nothing of the package in it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def expected(
    new: Tensor, old: Tensor, labels: Tensor, *, alpha: float = 1.0, beta: float = 5.0, weight: float = 1.0,
    tau: float = 100.0, distance: str = "kl", margin: float = 0.5, power: float = 2.0, label_loss: bool = True,
    label_smoothing: float = 0.0, ignore_index: int = -100, class_weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """The loss, of rows looped over; the gradient is autograd's."""
    new, old, labels = (
        new.double().reshape(-1, new.shape[-1]),
        old.double().reshape(-1, old.shape[-1]),
        labels.flatten(),
    )
    w = None if class_weight is None else class_weight.double()
    total = new.new_zeros(())
    rows = 0
    for z, z_old, y in zip(new, old, labels.tolist(), strict=True):
        if y == ignore_index:
            continue
        rows += 1
        if distance == "kl":
            p = F.softmax(z_old / tau, 0)
            each = p * (F.log_softmax(z_old / tau, 0) - F.log_softmax(z / tau, 0))
            d = tau**2 * each.sum()
        elif distance.startswith("squared"):
            d = ((z - z_old) ** 2 / 2).sum()
        else:
            d = ((z - z_old).abs() - margin).clamp_min(0).pow(power).sum()
        if distance.endswith("mean"):
            d = d / len(z)
        total = total + (alpha + beta * (int(z_old.argmax()) == y)) * d
    loss = weight * (total / rows if reduction == "mean" else total)
    if label_loss:
        loss = loss + F.cross_entropy(
            new, labels, w, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction=reduction
        )
    return loss


def draw_logits(R: int, C: int, *, spread: float = 2.0, near: float = 1.0, seed: int = 0) -> tuple[Tensor, ...]:
    """New and old logits [R, C] that are alike, float64 but exact in float32, and labels that are often right."""
    g = torch.Generator().manual_seed(seed)
    old = spread * torch.randn(R, C, generator=g)
    new = old + near * torch.randn(R, C, generator=g)
    labels = torch.where(torch.rand(R, generator=g) < 0.5, old.argmax(-1), torch.randint(C, (R,), generator=g))
    return new.double(), old.double(), labels


def with_gradient(function: Any, new: Tensor, *args: Any, **options: Any) -> list[Tensor]:
    """A loss, and the gradient of the new logits."""
    leaf = new.detach().clone().requires_grad_()
    loss = function(leaf, *args, **options)
    return [loss, *torch.autograd.grad(loss.sum(), leaf)]
