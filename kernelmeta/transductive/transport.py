"""Entropic optimal transport between the query rows of a task and its classes, by Sinkhorn's algorithm."""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCE, MOST_STEPS = 1e-6, 1000


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
    not depend on each other. All of it is done on logarithms, so that nothing underflows.

    Args:
        logits: [T, Q, N].
        proportions: [T, N], 0 or more, each task's summing to 1; uniform if None. A class of proportion 0 gets nothing.
        tolerance: of the rows' sums.
        most_steps: at most so many steps.

    Returns:
        [T, Q, N].
    """
    Z = logits.mT  # [T, N, Q]: the reduction over classes runs along whole rows
    T, N, Q = Z.shape
    if proportions is None:
        columns = Z.new_full((T, N, 1), Q / N).log()
    else:
        columns = (Q * proportions.to(Z)).log().unsqueeze(-1)
    if Z.numel() == 0:
        return logits.clone()
    f = -Z.flatten(1).logsumexp(-1)[:, None, None]
    g = torch.zeros_like(columns)
    over_classes = Z.logsumexp(-2, keepdim=True)  # [T, 1, Q]
    sums, f = (f + over_classes).exp(), f.expand(T, 1, Q)
    running = torch.arange(T, device=Z.device)  # tasks that are not done
    done_f, done_g = f.clone(), g.clone()
    for _ in range(most_steps):
        f = -over_classes
        g = columns - (Z + f).logsumexp(-1, keepdim=True)
        over_classes = (Z + g).logsumexp(-2, keepdim=True)
        before, sums = sums, (f + over_classes).exp()
        moving = ((sums - before).abs() > tolerance).any(-1).squeeze(-1)
        if not moving.all():
            done_f[running], done_g[running] = f, g
            running, Z, columns = running[moving], Z[moving], columns[moving]
            f, g, over_classes, sums = f[moving], g[moving], over_classes[moving], sums[moving]
            if not len(running):
                break
    done_f[running], done_g[running] = f, g
    return (logits.mT + done_f + done_g).mT
