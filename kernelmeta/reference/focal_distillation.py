"""Focal distillation: a new classifier that keeps what its predecessor does right (Yan et al. 2021, section 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import nll_loss

from kernelmeta.backends import is_traced
from kernelmeta.flip_counts import COUNTED, NEW_RIGHT, OLD_RIGHT, FlipCounts
from kernelmeta.reference.precision import promoted, without_autocast

DISTANCES = ("kl", "squared", "squared_mean", "ldi", "ldi_mean")
REDUCTIONS = ("mean", "sum", "none")


@without_autocast
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
    """Cross entropy, and the distance from the old logits. See :func:`kernelmeta.ops.focal_distillation`.

    L = CE + weight mean_i (alpha + beta [old right on i]) D(new_i, old_i), equations 4 and 5 of the paper.
    """
    new, old = promoted(new_logits, old_logits)
    C = new.shape[-1]
    distances, label_losses, codes = distillation_rows(
        new.reshape(-1, C), old.reshape(-1, C), labels.reshape(-1), class_weight,
        alpha=alpha, beta=beta, tau=tau, distance=distance, margin=margin, power=power, label_loss=label_loss,
        label_smoothing=label_smoothing, ignore_index=ignore_index,
    )  # fmt: skip
    loss = reduced(
        distances, label_losses, codes, labels, class_weight, weight=weight, ignore_index=ignore_index,
        reduction=reduction,
    ).to(new_logits.dtype)  # fmt: skip
    return (loss, FlipCounts.of_codes(codes)) if return_flips else loss


def distillation_rows(
    new: Tensor,
    old: Tensor,
    labels: Tensor,
    class_weight: Tensor | None,
    *,
    alpha: float,
    beta: float,
    tau: float,
    distance: str,
    margin: float,
    power: float,
    label_loss: bool,
    label_smoothing: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Of each row of logits [R, C]: its weighted distance, the loss of its label, and what flipped, [R] each.

    Rows whose label is ``ignore_index`` are 0. The loss of the label is None without ``label_loss``.
    """
    counted = labels != ignore_index
    # What a row that is left out holds is not looked at.
    labels = torch.where(counted, labels, 0)
    new, old = (torch.where(counted.unsqueeze(-1), logits, 0.0) for logits in (new, old.detach()))
    if not is_traced():
        check_labels(labels, new.shape[-1])
    old_right, new_right = (rows_right(logits.detach(), labels) for logits in (old, new))
    # [R] times [R]: each row its own weight
    focus = alpha + beta * old_right.to(new.dtype)
    distances = torch.where(counted, focus * distance_of(new, old, tau, distance, margin, power), 0.0)
    codes = counted * (COUNTED + OLD_RIGHT * old_right.long() + NEW_RIGHT * new_right.long())
    if not label_loss:
        return distances, None, codes.to(torch.uint8)
    own, smooth = (1 - label_smoothing), label_smoothing / new.shape[-1]
    log_p = new.log_softmax(-1)
    w = None if class_weight is None else class_weight.detach().to(new.dtype)
    label_losses = own * nll_loss(log_p, labels, w, reduction="none")
    if label_smoothing > 0:
        label_losses = label_losses - smooth * (log_p if w is None else log_p * w).sum(-1)
    return distances, torch.where(counted, label_losses, 0.0), codes.to(torch.uint8)


def reduced(
    distances: Tensor,
    label_losses: Tensor | None,
    codes: Tensor,
    labels: Tensor,
    class_weight: Tensor | None,
    *,
    weight: float,
    ignore_index: int,
    reduction: str,
) -> Tensor:
    """The loss from its rows [R]: [] or, with reduction "none", in the shape of the labels."""
    if reduction != "mean":
        rows = weight * distances if label_losses is None else label_losses + weight * distances
        return rows.sum() if reduction == "sum" else rows.reshape(labels.shape)
    counted = (codes & COUNTED) != 0
    n = counted.sum()
    loss = weight * (distances.sum() / n)
    if label_losses is None:
        return loss
    if class_weight is None:
        return label_losses.sum() / n + loss
    own = class_weight.detach().to(label_losses.dtype)[torch.where(counted, labels.reshape(-1), 0)]
    return label_losses.sum() / torch.where(counted, own, 0.0).sum() + loss


def distance_of(new: Tensor, old: Tensor, tau: float, distance: str, margin: float, power: float) -> Tensor:
    """D of each row, [R]. A class whose logits are equal (minus infinity in both, say) is at no distance."""
    if distance == "kl":
        return tau * tau * divergence(new, old, tau)
    apart = torch.where(new == old, 0.0, new - old)
    if distance.startswith("squared"):
        each = apart.square() / 2
    else:
        over = apart.abs() - margin
        each = torch.where(over <= 0, 0.0, over) ** power  # (NaN stays NaN)
    return each.mean(-1) if distance.endswith("mean") else each.sum(-1)


# Beyond it e^u is not taken of u alone, which may overflow.
LARGEST_SHIFT = 20.0


def divergence(new: Tensor, old: Tensor, tau: float) -> Tensor:
    """KL(softmax(old / tau) || softmax(new / tau)) of each row, [R].

    With p = softmax(old / tau), v = (new - old) / tau and u = v - E_p[v] it is log E_p[e^u], and since E_p[u] = 0,
    log1p(E_p[e^u - 1 - u]): no digit is lost where new and old are nearly the same, as they are at a large tau. All v
    are taken relative to that of the likeliest class, whose u is much smaller than its v where p is nearly 1.
    """
    p = (old / tau).softmax(-1)
    old_sum = (old / tau).logsumexp(-1, keepdim=True)
    # A class that the new one alone rules out: infinite, with a gradient.
    lost = ((p > 0) & (new == -float("inf"))).any(-1, keepdim=True)
    any_lost = is_traced() or bool(lost.any())
    kept = torch.where(lost, old, new) if any_lost else new
    pivot = (kept - old).detach().gather(-1, old.argmax(-1, keepdim=True))
    v = ((kept - old) - pivot) / tau
    # Where p is 0 a class takes part by e^u alone.
    present = (p != 0) | new.isnan()
    centre = torch.where(present, p * v, 0.0).sum(-1, keepdim=True)
    u = v - centre
    far = ~(u <= LARGEST_SHIFT)
    terms = torch.where(present & ~far, p * exp_excess(torch.where(far, 0.0, u)), 0.0)
    if is_traced() or bool(far.any()):
        # There e^u may be too large for a number, and p too small: log(p e^u) is taken instead.
        log_q = torch.where(far, (kept - pivot) / tau - old_sum - centre, 0.0)
        largest = log_q.detach().amax(-1, keepdim=True).clamp_min(0)
        rest = torch.where(far & present, p * (1 + torch.where(far & present, u, 0.0)), 0.0)
        terms = torch.where(far, (log_q - largest).exp(), 0.0) + (terms - rest) * torch.exp(-largest)
        shifted, scale = terms.sum(-1), largest.squeeze(-1)
        found = torch.where(scale > 0, (shifted + torch.exp(-scale)).log() + scale, torch.log1p(shifted))
    else:
        found = torch.log1p(terms.sum(-1))
    if not any_lost:
        return found
    spread = torch.where(p > 0, p * ((new - old) / tau), 0.0).sum(-1, keepdim=True)
    infinite = (new / tau).logsumexp(-1, keepdim=True) - old_sum - spread
    return torch.where(lost, infinite, found.unsqueeze(-1)).squeeze(-1)


def exp_excess(u: Tensor) -> Tensor:
    """e^u - 1 - u, to the last digits: by its series where |u| is at most 1."""
    terms = 18 if u.dtype is torch.float64 else 11
    near = torch.where(u.abs() <= 1, u, 0.0)
    sum_ = torch.full_like(near, 1.0)
    for k in range(terms, 2, -1):
        sum_ = 1 + sum_ * near / k
    series = near.square() / 2 * sum_
    away = torch.where(u.abs() <= 1, 0.0, u)
    return torch.where(u.abs() <= 1, series, torch.expm1(away) - away)


def rows_right(logits: Tensor, labels: Tensor) -> Tensor:
    """Whether the largest logit, the first of equal ones, is that of the label; a row with a NaN is wrong."""
    return (logits.argmax(-1) == labels) & ~logits.isnan().any(-1)


def check_labels(labels: Tensor, C: int) -> None:
    """Labels [R] in range.

    Raises:
        ValueError: one that is not, named.
    """
    outside = (labels < 0) | (labels >= C)
    if outside.any():
        row = int(outside.nonzero()[0])
        raise ValueError(
            f"labels: row {row} has label {int(labels[row])}; labels must be in 0..{C - 1}, or ignore_index"
        )
