"""How many rows two classifiers decide alike, and how many differently: `FlipCounts`."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

# What an op says of a row, as a sum of these; 0 where the row is left out.
OLD_RIGHT, NEW_RIGHT, COUNTED = 1, 2, 4


class FlipCounts(NamedTuple):
    """Rows that flipped between an old and a new classifier, int64 [] each. Rows that were left out are in none."""

    negative: Tensor
    """The old one is right, the new one wrong."""
    positive: Tensor
    """The old one is wrong, the new one right."""
    old_right: Tensor
    """The old one is right."""
    new_right: Tensor
    """The new one is right."""
    rows: Tensor
    """All rows that count."""

    @staticmethod
    def of_codes(codes: Tensor) -> FlipCounts:
        """From what the op says of each row."""
        negative = codes == COUNTED + OLD_RIGHT
        positive = codes == COUNTED + NEW_RIGHT
        old, new, counted = ((codes & bit) != 0 for bit in (OLD_RIGHT, NEW_RIGHT, COUNTED))
        return FlipCounts(*(found.sum() for found in (negative, positive, old, new, counted)))
