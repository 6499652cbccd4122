"""Descent on the losses of TIM and of alpha-TIM: a classifier for each task, its gradient written out, by Adam."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kernelmeta.reference.norms import unit_and_length
from kernelmeta.transductive.tasks import Tasks

CLASSIFIERS = ("euclidean", "cosine")
# What Adam divides by at least, and the two means it keeps (Kingma and Ba 2015).
_EPS, _BETA1, _BETA2 = 1e-8, 0.9, 0.999

Derivative = Callable[[Tensor], Tensor]


def softmax_adjoint(p: Tensor, gradient: Tensor) -> Tensor:
    """What a gradient with respect to ``p = softmax(z)`` is with respect to z: ``p (g - <p, g>)``, [..., N]."""
    weighted = p * gradient
    return weighted - p * weighted.sum(-1, keepdim=True)


def descended(
    tasks: Tasks,
    *,
    classifier: str,
    temperature: float,
    steps: int,
    rate: float,
    support_weight: float,
    of_marginal: Derivative,
    of_rows: Derivative,
) -> Tensor:
    """Logits [T, Q, N] after so many steps of Adam from the class means.

    The loss of a task is ``support_weight`` times the cross-entropy of its support rows, plus what the two derivatives
    belong to.

    Args:
        classifier: "euclidean", ``temperature (x w - |w|^2 / 2)``, or "cosine", ``temperature cos(x, w)``.
        of_marginal: mean prediction [T, N] -> derivative of a loss of it.
        of_rows: predictions [T, Q, N] -> derivative of a loss of each row; the mean over rows is taken.
    """
    S, Q = tasks.support.shape[-2], tasks.query.shape[-2]
    rows, w = torch.cat([tasks.support, tasks.query], -2), tasks.means()
    cosine = classifier == "cosine"
    if cosine:
        rows = unit_and_length(rows)[0]

    def logits(of: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if cosine:
            direction, length = unit_and_length(w)
            return temperature * of @ direction.mT, direction, length
        return temperature * (of @ w.mT - w.square().sum(-1).unsqueeze(-2) / 2), w, w

    first, second = torch.zeros_like(w), torch.zeros_like(w)
    for step in range(1, steps + 1):
        z, direction, length = logits(rows)
        p = z.softmax(-1)
        of_query = p[..., S:, :]
        change = (of_marginal(of_query.mean(-2)).unsqueeze(-2) + of_rows(of_query)) / Q
        G = torch.cat([(p[..., :S, :] - tasks.members) * (support_weight / S), softmax_adjoint(of_query, change)], -2)
        G = G.mT * temperature  # [T, N, rows]
        if cosine:
            pulled = G @ rows
            gradient = (pulled - direction * (pulled * direction).sum(-1, keepdim=True)) / length
        else:
            gradient = G @ rows - w * G.sum(-1, keepdim=True)
        first = torch.lerp(first, gradient, 1 - _BETA1)
        second = torch.lerp(second, gradient.square(), 1 - _BETA2)
        size = (second / (1 - _BETA2**step)).sqrt() + _EPS
        w = w - rate / (1 - _BETA1**step) * first / size
    return logits(rows[..., S:, :])[0]
