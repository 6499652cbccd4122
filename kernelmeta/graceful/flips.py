"""What an update breaks and what it mends: flip rates of an old and a new classifier on the same rows."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kernelmeta.ops import _checks
from kernelmeta.reference.focal_distillation import check_labels, rows_right
from kernelmeta.reference.task_rows import as_labels


class Interval(NamedTuple):
    """Half of a 95 % interval for each rate of `Flips` (``negative``, ``positive``, ``relative_negative``,
    ``negative_impact``, ``error_old``, ``error_new``, ``gain``): NaN where there are fewer
    than two samples (or episodes)."""

    negative: float
    positive: float
    relative_negative: float
    negative_impact: float
    error_old: float
    error_new: float
    gain: float


class Flips(NamedTuple):
    """Rates between 0 and 1. Rows that are left out (``ignore_index``) are in none."""

    negative: float
    """Negative flip rate (Yan et al. 2021): rows that the old classifier gets right and the new one wrong."""
    positive: float
    """Positive flip rate: rows that the old one gets wrong and the new one right."""
    relative_negative: float
    """``negative / ((1 - error_old) error_new)`` (Yan et al. 2021): 1 if the two err independently of each other. NaN
    where the new one makes no errors, or the old one nothing else."""
    negative_impact: float
    """Negative flip impact, ``negative / error_new`` (Cai et al. 2022, "Measuring and Reducing Model Update Regression
    in Structured Prediction for NLP"): the share of the new one's errors that the old one does not make."""
    error_old: float  # rows that the old one gets wrong
    error_new: float  # rows that the new one gets wrong
    gain: float
    """``error_old - error_new``, which is ``positive - negative``."""
    ci95: Interval
    """Half of the interval of each of these. All are paired: both classifiers are looked at on the same rows; and of
    logits [T, Q, N] they are taken over episodes, whose rows are no independent samples."""
    rows: int
    """Rows that count."""


def flips(new_logits: Tensor, old_logits: Tensor, labels: Tensor, *, ignore_index: int = -100) -> Flips:
    """Flip rates of an update, with 95 % intervals.

    Args:
        new_logits: [R, C], or [T, Q, N] of the query rows of episodes: then intervals are over episodes.
        old_logits: the same of the old classifier.
        labels: int64, one for each row, in 0..C-1 or ``ignore_index``.
        ignore_index: rows with this label are left out.

    Returns:
        The rates and their intervals. A row is right where the largest logit (the first of equal ones) is that of its
        label; one with a NaN is wrong.

    Raises:
        ValueError: shapes or labels that do not fit, named; no row that counts.
        TypeError: logits that are not floating point, labels that are not integers.
    """
    labels = as_labels(labels)
    _checks.tensors(new_logits=new_logits, old_logits=old_logits)
    if new_logits.dim() not in (2, 3) or new_logits.shape[-1] == 0:
        raise ValueError(f"new_logits: expected [R, C] or [T, Q, N], got {_checks.shape_text(new_logits)}")
    if old_logits.shape != new_logits.shape:
        raise ValueError(
            f"old_logits: expected {_checks.shape_text(new_logits)} as new_logits, the same rows and the same classes, "
            f"got {_checks.shape_text(old_logits)}"
        )
    _checks.labels("labels", labels, tuple(new_logits.shape[:-1]), new_logits, "new_logits.shape[:-1]")
    counted = labels != ignore_index
    check_labels(torch.where(counted, labels, 0).flatten(), new_logits.shape[-1])
    if not counted.any():
        raise ValueError("labels: expected a row that counts, got none")
    return flip_rates(rows_right(new_logits, labels), rows_right(old_logits, labels), counted)


def flip_rates(new_right: Tensor, old_right: Tensor, counted: Tensor) -> Flips:
    """From who is right on which row, [R] or [T, Q] of booleans, and which rows count."""
    # Sums over what is sampled: a row, or the rows of an episode.
    units = [
        (t.double().sum(-1) if t.dim() == 2 else t.double()).cpu()
        for t in (
            counted & old_right & ~new_right, counted & new_right & ~old_right, counted & ~old_right,
            counted & ~new_right, counted,
        )
    ]  # fmt: skip
    n = units.pop()
    negative, positive, error_old, error_new = (float(u.sum() / n.sum()) for u in units)
    # How far each sampled unit moves each rate: its linearisation, for rates of rates too.
    moves = [(u - r * n) / n.mean() for u, r in zip(units, (negative, positive, error_old, error_new), strict=True)]
    chance = (1 - error_old) * error_new
    relative = negative / chance if chance > 0 else math.nan
    impact = negative / error_new if error_new > 0 else math.nan
    relative_moves = impact_moves = torch.full_like(n, math.nan)
    if error_new > 0:
        impact_moves = (moves[0] - impact * moves[3]) / error_new
    if chance > 0:
        relative_moves = moves[0] / chance + relative * (moves[2] / (1 - error_old) - moves[3] / error_new)
    half = [
        1.96 * float(m.std()) / math.sqrt(len(m)) if len(m) > 1 else math.nan
        for m in (moves[0], moves[1], relative_moves, impact_moves, moves[2], moves[3], moves[1] - moves[0])
    ]
    return Flips(
        negative, positive, relative, impact, error_old, error_new, error_old - error_new, Interval(*half), int(n.sum())
    )
