"""Which classes are for training, validation and test: drawn, in given shares, alike among large and small classes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kernelmeta.data.counter import check_seed, words

SHARES = "60/20/20"  # of the classes, if nobody says otherwise
_STRATUM = 10  # classes of about the same size, among which the splits are drawn


def parse_shares(text: str) -> tuple[float, float, float]:
    """ "60/20/20", in percent, or "0.6/0.2/0.2" -> (0.6, 0.2, 0.2), of train, val and test. Raises ValueError."""
    try:
        parts = [float(part) for part in text.split("/")]
    except ValueError:
        parts = []
    if len(parts) != 3 or not all(0 <= part < float("inf") for part in parts) or not sum(parts):
        raise ValueError(f"split: expected shares of train, val and test such as 60/20/20, got {text!r}")
    if not any(math.isclose(sum(parts), whole, rel_tol=1e-3) for whole in (1, 100)):
        raise ValueError(f"split: expected shares that sum to 100 (or to 1), got {text}, which sum to {sum(parts):g}")
    train, val, test = (part / sum(parts) for part in parts)
    return train, val, test


def split_classes(sizes: Sequence[int], shares: Sequence[float], seed: int = 0) -> Tensor:
    """A split for each class, [C] uint8: 0 train, 1 val, 2 test.

    Classes are sorted by size, and the splits are drawn within strata of ten: each split gets its share of the large
    classes and of the small ones. A split with a share has a class at least.

    Args:
        sizes: samples of each class.
        shares: of train, val and test; their sum is 1.
        seed: of the draw.

    Raises:
        ValueError: there are fewer classes than splits, or the seed is none.
    """
    check_seed(seed)
    C = len(sizes)
    wanted = [split for split in range(3) if shares[split] > 0]
    if len(wanted) > C:
        raise ValueError(f"split: expected at least {len(wanted)} classes, one for each split, got {C}")
    counts = _counts(C, [shares[split] for split in wanted])
    # The next class goes to the split that lacks most of what it should have by now.
    order: list[int] = []
    given = [0] * len(wanted)
    for i in range(C):
        most = max(range(len(wanted)), key=lambda k: counts[k] * (i + 1) / C - given[k])
        given[most] += 1
        order.append(wanted[most])
    random = words(seed, np.arange(C))
    by_size = sorted(range(C), key=lambda c: (-sizes[c], int(random[c])))
    split = torch.empty(C, dtype=torch.uint8)
    for first in range(0, C, _STRATUM):
        stratum = by_size[first : first + _STRATUM]
        drawn = sorted(stratum, key=lambda c: int(words(random[c], 1)))
        split[drawn] = torch.tensor(order[first : first + _STRATUM], dtype=torch.uint8)
    return split


def _counts(C: int, shares: Sequence[float]) -> list[int]:
    """C in whole numbers by shares, none of them 0: the largest remainders are rounded up."""
    counts = [max(1, int(C * share)) for share in shares]
    while sum(counts) != C:
        over = sum(counts) > C
        off = [C * share - n for share, n in zip(shares, counts, strict=True)]
        k = min(range(len(shares)), key=lambda k: off[k] if counts[k] > 1 else 1e9) if over else off.index(max(off))
        counts[k] += -1 if over else 1
    return counts
