"""Tasks of unequal size."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise


def check_sizes(offsets: Sequence[int], most: int | None, name: str) -> None:
    """No task has more rows than ``most``, which is called ``name``."""
    for t, (first, end) in enumerate(pairwise(offsets)):
        if most is not None and end - first > most:
            raise ValueError(f"{name}: task {t} has {end - first} rows, more than {most}")
