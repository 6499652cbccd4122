"""Lengths of rows and the rows divided by them, whatever their size: squares may be beyond what numbers hold."""

from __future__ import annotations

import torch
from torch import Tensor

FLOOR = 1e-12  # the least that a row is divided by, as in torch.nn.functional.normalize


def unit_and_length(rows: Tensor) -> tuple[Tensor, Tensor]:
    """``x / max(|x|, 1e-12)`` and ``max(|x|, 1e-12)`` of rows [..., D], as [..., D] and [..., 1].

    Their derivatives are finite at zero, all of them.
    """
    # Over its largest element, a constant: neither the length nor the normalised row depends on it. The sum of squares
    # is then at least 1, but where the row is at the floor.
    least = max(FLOOR, torch.finfo(rows.dtype).tiny)
    largest = rows.detach().abs().amax(-1, keepdim=True).clamp_min(least)
    scaled = rows / largest
    over_largest = scaled.square().sum(-1, keepdim=True).clamp_min((FLOOR / least) ** 2).sqrt()
    return scaled / over_largest, largest * over_largest


def unit(rows: Tensor) -> Tensor:
    """``x / max(|x|, 1e-12)`` of rows [..., D]."""
    return unit_and_length(rows)[0]
