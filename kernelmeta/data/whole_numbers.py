"""Whole numbers as features: those that float32 would round are refused, for they are ids more often than features."""

from __future__ import annotations

from typing import Any

import numpy as np

_DIGITS = 24  # bits of float32


def check_whole(values: Any) -> None:
    """Raise a ValueError where an array of whole numbers holds one that float32 rounds; other arrays pass."""
    array = np.asarray(values)
    if array.dtype.kind not in "iu" or array.dtype.itemsize < 4 or not array.size:
        return
    # The magnitude, of the smallest int64 too; without its trailing zeros it must fit.
    magnitude = np.where(array < 0, ~array.astype(np.uint64) + np.uint64(1), array.astype(np.uint64))
    if magnitude.max() <= 1 << _DIGITS:
        return
    lowest = np.maximum(magnitude & (~magnitude + np.uint64(1)), np.uint64(1))
    rounded = magnitude // lowest >= 1 << _DIGITS
    if rounded.any():
        raise ValueError(
            f"{int(rounded.sum())} whole numbers, {array[rounded][0]} the first, have more digits than float32 holds"
            " and would be rounded; scale them, give them as floats, or leave them out, if they are ids"
        )
