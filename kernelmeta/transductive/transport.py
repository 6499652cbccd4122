"""Entropic optimal transport between the query rows of a task and its classes, by Sinkhorn's algorithm."""

from __future__ import annotations

import torch
from torch import Tensor

from kernelmeta.reference.precision import without_autocast

TOLERANCE, MOST_STEPS = 1e-6, 1000
# How far apart the logits of a row may be for products of exponentials to stay within what float64 holds.
_MOST_RANGE = 300.0


@without_autocast
def transport(
    logits: Tensor,
    proportions: Tensor | None = None,
    *,
    tolerance: float = TOLERANCE,
    most_steps: int = MOST_STEPS,
) -> Tensor:
    """The logarithm of the plan ``exp(logits + f_q + g_n)`` whose rows sum to 1 and whose columns to Q times the
    classes' proportions (Cuturi 2013, algorithm 1; with ``logits = -lambda cost``).

    The columns' sums are exact. A task is done when no row's sum moves by more than the tolerance in a step; tasks do
    not depend on each other. It is done in float64, and on logarithms where exponentials would underflow.

    Args:
        logits: [T, Q, N].
        proportions: [T, N], 0 or more, each task's summing to 1; uniform if None. A class of proportion 0 gets nothing.
        tolerance: of the rows' sums.
        most_steps: at most so many steps.

    Returns:
        [T, Q, N].
    """
    T, Q, N = logits.shape
    Z = logits.double()
    Z = Z - Z.amax(-1, keepdim=True) if Z.numel() else Z
    shares = Z.new_full((T, N), 1 / N) if proportions is None else proportions.to(Z)
    log_plan = torch.empty_like(Z)
    sharp = (Z < -_MOST_RANGE).flatten(1).any(-1)
    for own, scaled in ((~sharp, _by_scaling), (sharp, _by_logarithms)):
        if own.any():
            log_plan[own] = scaled(Z[own], Q * shares[own], tolerance, most_steps)
    return log_plan.to(logits.dtype)


def _by_scaling(Z: Tensor, columns: Tensor, tolerance: float, most_steps: int) -> Tensor:
    """By products with ``exp(Z)``: one exponential a number, not one a number and step."""
    kernel, columns = Z.exp(), columns.unsqueeze(-1)
    transposed = kernel.mT.contiguous()
    rows = kernel.sum(-1, keepdim=True)  # K v
    sums = rows / rows.sum(-2, keepdim=True)
    u, v = torch.ones_like(rows), torch.ones_like(columns)
    found = kernel.clone()
    running = torch.arange(len(Z), device=Z.device)  # tasks that are not done
    for step in range(1, most_steps + 1):
        u = 1 / rows
        v = columns / (transposed @ u)
        rows = kernel @ v
        before, sums = sums, u * rows
        moving = ((sums - before).abs() > tolerance).flatten(1).any(-1)
        if step == most_steps or not moving.all():
            done = running[~moving] if step < most_steps else running
            left = ~moving if step < most_steps else torch.ones_like(moving)
            found[done] = Z[left] + u[left].log() + v[left].log().mT
            if step == most_steps or len(done) == len(running):
                break
            running, Z, kernel, transposed = running[moving], Z[moving], kernel[moving], transposed[moving]
            columns, rows, sums = columns[moving], rows[moving], sums[moving]
    return found


def _by_logarithms(Z: Tensor, columns: Tensor, tolerance: float, most_steps: int) -> Tensor:
    """The same where ``exp(Z)`` would be 0."""
    Z, columns = Z.mT, columns.log().unsqueeze(-1)  # [T, N, Q]: the reduction over classes runs along whole rows
    f, g = -Z.flatten(1).logsumexp(-1)[:, None, None], torch.zeros_like(columns)
    over_classes = Z.logsumexp(-2, keepdim=True)  # [T, 1, Q]
    sums, running = (f + over_classes).exp(), torch.ones_like(f, dtype=torch.bool)
    for _ in range(most_steps):
        f = torch.where(running, -over_classes, f)
        g = torch.where(running, columns - (Z + f).logsumexp(-1, keepdim=True), g)
        over_classes = (Z + g).logsumexp(-2, keepdim=True)
        before, sums = sums, (f + over_classes).exp()
        running = running & ((sums - before).abs() > tolerance).any(-1, keepdim=True)
        if not running.any():
            break
    return (Z + f + g).mT
