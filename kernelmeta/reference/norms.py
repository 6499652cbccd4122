"""Lengths of rows and the rows divided by them, whatever their size: squares may be beyond what numbers hold."""

from __future__ import annotations

import torch
from torch import Tensor

FLOOR = 1e-12  # the least that a row is divided by, as in torch.nn.functional.normalize


def _scaled(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The rows over a number near their length; that number; their length over it. For D features: [..., D], [..., 1].

    The number is a constant: neither the length nor the normalised row depends on it.
    """
    least = max(FLOOR, torch.finfo(rows.dtype).tiny)
    number = rows.detach().abs().amax(-1, keepdim=True).clamp_min(least)
    scaled = rows / number
    squares = scaled.square().sum(-1, keepdim=True)
    return scaled, number, squares.clamp_min((FLOOR / number).square()).sqrt()


def unit(rows: Tensor) -> Tensor:
    """``x / max(|x|, 1e-12)`` of rows [..., D]. Its derivatives are finite at zero, all of them."""
    scaled, _, length = _scaled(rows)
    return scaled / length


def length(rows: Tensor) -> Tensor:
    """``max(|x|, 1e-12)`` of rows [..., D], as [..., 1]."""
    _, number, over_number = _scaled(rows)
    return number * over_number
