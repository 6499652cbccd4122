"""Lengths of rows and the rows divided by them, whatever their size: squares may be beyond what numbers hold."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from kernelmeta.backends import holds_numbers

FLOOR = 1e-12  # the least that a row is divided by, as in torch.nn.functional.normalize
MANY = 2**15  # numbers from which on the passes over them take longer than the calls


def unit_and_length(rows: Tensor) -> tuple[Tensor, Tensor]:
    """``x / max(|x|, 1e-12)`` and ``max(|x|, 1e-12)`` of rows [..., D], as [..., D] and [..., 1].

    Their derivatives are finite at zero, all of them.
    """
    # (on a GPU, to look at numbers is to wait for them)
    if rows.device.type != "cpu" or not holds_numbers(rows) or rows.numel() < MANY:
        return _of_any(rows)
    rows = rows.view_as(rows)  # where the parts of its gradient meet, in one order whatever else rows are used for
    length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    known, (least, most) = length.detach(), _common_lengths(rows.dtype)
    shortest, longest = known.aminmax()
    if least < shortest.item() and longest.item() < most:
        return rows / length, length
    # Each row its own way, so that no result depends on the rows beside it.
    common = (known > least) & (known < most)
    h, length = unit_and_length(torch.where(common, rows, 1.0)) if common.any() else (rows, length)
    of_any = _of_any(rows)
    return torch.where(common, h, of_any[0]), torch.where(common, length, of_any[1])


@functools.cache
def _common_lengths(dtype: torch.dtype) -> tuple[float, float]:
    """Between them squares of products of lengths, which derivatives have, are numbers, too."""
    numbers = torch.finfo(dtype)
    return max(FLOOR, numbers.tiny**0.25), numbers.max**0.25


def unit(rows: Tensor) -> Tensor:
    """``x / max(|x|, 1e-12)`` of rows [..., D]."""
    return unit_and_length(rows)[0]


def _of_any(rows: Tensor) -> tuple[Tensor, Tensor]:
    # Over its largest element, a constant: neither the length nor the normalised row depends on it. The sum of squares
    # is then at least 1, but where the row is at the floor.
    least = max(FLOOR, torch.finfo(rows.dtype).tiny)
    largest = rows.detach().abs().amax(-1, keepdim=True).clamp_min(least)
    scaled = rows / largest
    over_largest = scaled.square().sum(-1, keepdim=True).clamp_min((FLOOR / least) ** 2).sqrt()
    return scaled / over_largest, largest * over_largest
