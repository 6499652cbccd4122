"""Shares that the classes have of the rows to be labelled, as users give them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernelmeta.data.words import listing

TOLERANCE = 1e-6  # of their sum
_PART = re.compile(r"(.*?)=([^=,]*)(?:,|$)", re.DOTALL)


def parse_proportions(text: str) -> dict[str, float]:
    """ "cat=0.7,dog=0.3" -> {"cat": 0.7, "dog": 0.3}; a label may hold commas and equals signs. Raises ValueError."""
    found: dict[str, float] = {}
    place = 0
    while place < len(text):
        part = _PART.match(text, place)
        try:
            if part is None:
                raise ValueError
            label, share = part[1].strip(), float(part[2])
        except ValueError:
            raise ValueError(
                f"proportions: expected LABEL=SHARE, or several with commas, got {text[place:]!r}"
            ) from None
        if label in found:
            raise ValueError(f"proportions: {label!r} is given twice")
        found[label] = share
        place = part.end()
    return found


def shares_of(given: Any, classes: Sequence[Any]) -> Tensor:
    """Shares of the classes, in their order: [N] float64, which sum to 1.

    Args:
        given: a mapping, label -> share (a pandas Series is one), or N numbers in the order of ``classes``.
        classes: the labels of the N classes.

    Raises:
        ValueError: a class that is missing or that there is not, named; other than N numbers; less than 0, or a sum
            that is further than 1e-6 from 1.
    """
    if isinstance(given, Mapping) or hasattr(given, "items"):
        of_label = dict(given.items())
        known = set(classes)
        missing = [label for label in classes if label not in of_label]
        unknown = [label for label in of_label if label not in known]
        if missing or unknown:
            wrong = [f"no share of {_names(missing)}"] if missing else []
            wrong += [f"there is no class {_names(unknown)}"] if unknown else []
            raise ValueError(f"proportions: {'; '.join(wrong)}; the classes are {_names(classes)}")
        given = [of_label[label] for label in classes]
    if isinstance(given, Tensor):
        given = given.detach().cpu().double().numpy()
    try:
        shares = np.asarray(given, np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"proportions: expected a mapping, label -> share, or numbers, got {_short(given)}") from None
    if shares.shape != (len(classes),):
        raise ValueError(
            f"proportions: expected {len(classes)} shares, one for each of the classes {_names(classes)}, got"
            f" {_short(given)}"
        )
    total = float(shares.sum())
    if not (shares >= 0).all() or not abs(total - 1) <= TOLERANCE:
        raise ValueError(
            f"proportions: expected shares of 0 or more that sum to 1, got {_short(shares.tolist())}, whose sum is"
            f" {total:.7g}"
        )
    return torch.from_numpy(shares / total)


def _names(labels: Sequence[Any]) -> str:
    return listing([repr(label) for label in labels])


def _short(given: Any) -> str:
    text = repr(given)
    return text if len(text) <= 200 else f"{text[:200]}..."
