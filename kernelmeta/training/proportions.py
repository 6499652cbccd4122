"""Shares that the classes have of the rows to be labelled, as users give them: known, or counted on a sample."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kernelmeta.data.words import listing
from kernelmeta.ops.label_proportions import smoothed_proportions
from kernelmeta.reference.task_rows import one_hot_targets
from kernelmeta.tasks import Ragged

TOLERANCE = 1e-6  # of their sum
# Of counts (docs/scikit_learn.md): rows that each class has before any is counted; how many counted rows are trusted by
# half; and how many as if the shares were known, because just below 1 few digits are left of what `relax` relaxes.
_BEFOREHAND, _HALF_TRUSTED, _TRUSTED = 1.0, 16.0, 1000.0
_PART = re.compile(r"(.*?)=([^=,]*)(?:,|$)", re.DOTALL)


class Proportions(NamedTuple):
    """What is known about the query rows of a task."""

    shares: Tensor
    """[N] float64, of the classes; they sum to 1."""
    relax: float = 1.0
    """How far they are trusted, see :class:`kernelmeta.nn.Phase`; 1 for shares that are known."""


def query_shares(answers: Tensor, n_way: int, ragged: Ragged | None = None) -> Tensor:
    """The classes' shares of the query rows of T tasks, [T, N] float64, from their labels.

    Args:
        answers: [T, Q] int64 in 0..N-1; [all query rows] of tasks of unequal size.
        n_way: N.
        ragged: tasks of unequal size.
    """
    rows = one_hot_targets(answers, n_way, torch.float64)
    if ragged is None:
        return rows.mean(1)
    counts = ragged.query_offsets.diff()
    task = torch.arange(len(counts), device=counts.device).repeat_interleave(counts, output_size=len(answers))
    return rows.new_zeros(len(counts), n_way).index_add_(0, task, rows) / counts.unsqueeze(-1)


def parse_proportions(text: str, name: str = "proportions") -> dict[str, float]:
    """ "cat=0.7,dog=0.3" -> {"cat": 0.7, "dog": 0.3}; a label may hold commas and equals signs.

    Args:
        name: what errors call it.

    Raises:
        ValueError: the text is not like that, or holds a label twice.
    """
    found: dict[str, float] = {}
    place = 0
    while place < len(text):
        part = _PART.match(text, place)
        try:
            if part is None:
                raise ValueError
            label, share = part[1].strip(), float(part[2])
        except ValueError:
            raise ValueError(f"{name}: expected LABEL=NUMBER, or several with commas, got {text[place:]!r}") from None
        if label in found:
            raise ValueError(f"{name}: {label!r} is given twice")
        found[label] = share
        place = part.end()
    return found


def proportions_of(given: Any, counts: Any, classes: Sequence[Any]) -> Proportions | None:
    """From shares, or from counts of a sample; None where neither is given.

    Args:
        given: the classes' shares of the query rows: a mapping, label -> share (a pandas Series is one), or N numbers
            in the order of ``classes``.
        counts: likewise, how many rows of each class there were among others of the same source.
        classes: the labels of the N classes.

    Raises:
        ValueError: both; a class that is missing or that there is not, named; other than N numbers; less than 0; shares
            whose sum is further than 1e-6 from 1; counts that are no whole numbers, or all 0.
    """
    if given is not None and counts is not None:
        raise ValueError("counts: expected either proportions or counts, got both")
    if given is not None:
        return Proportions(_shares_of(_in_order("proportions", given, classes)))
    return None if counts is None else counted_proportions(counts, classes)


def counted_proportions(counts: Any, classes: Sequence[Any]) -> Proportions:
    """From counts of a sample, see `proportions_of`. Raises ValueError."""
    numbers = _in_order("counts", counts, classes)
    total = float(numbers.sum())
    if not (numbers >= 0).all() or not 0 < total < np.inf or (numbers != np.round(numbers)).any():
        raise ValueError(
            f"counts: expected whole numbers from 0, at least one of them above, got {_short(numbers.tolist())}; shares"
            " are given as proportions"
        )
    shares = smoothed_proportions(torch.from_numpy(numbers), by=_BEFOREHAND)
    return Proportions(shares, 1.0 if total > _TRUSTED else total / (total + _HALF_TRUSTED))


def _in_order(name: str, given: Any, classes: Sequence[Any]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """A number for each class, [N]. Raises ValueError."""
    if isinstance(given, Mapping) or hasattr(given, "items"):
        of_label = dict(given.items())
        known = set(classes)
        missing = [label for label in classes if label not in of_label]
        unknown = [label for label in of_label if label not in known]
        if missing or unknown:
            wrong = [f"no number for {_names(missing)}"] if missing else []
            wrong += [f"there is no class {_names(unknown)}"] if unknown else []
            raise ValueError(f"{name}: {'; '.join(wrong)}; the classes are {_names(classes)}")
        given = [of_label[label] for label in classes]
    if isinstance(given, Tensor):
        given = given.detach().cpu().double().numpy()
    try:
        numbers = np.asarray(given, np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{name}: expected a mapping, label -> number, or numbers, got {_short(given)}") from None
    if numbers.shape != (len(classes),):
        raise ValueError(
            f"{name}: expected {len(classes)} numbers, one for each of the classes {_names(classes)}, got"
            f" {_short(given)}"
        )
    return numbers


def _shares_of(numbers: np.ndarray[Any, np.dtype[np.float64]]) -> Tensor:
    total = float(numbers.sum())
    if not (numbers >= 0).all() or not abs(total - 1) <= TOLERANCE:
        hint = ""
        if total > 1 and (numbers >= 0).all() and (numbers == np.round(numbers)).all():
            hint = "; rows that were counted are given as counts"
        raise ValueError(
            f"proportions: expected shares of 0 or more that sum to 1, got {_short(numbers.tolist())}, whose sum is"
            f" {total:.7g}{hint}"
        )
    return torch.from_numpy(numbers / total)


def _names(labels: Sequence[Any]) -> str:
    return listing([repr(label) for label in labels])


def _short(given: Any) -> str:
    text = repr(given)
    return text if len(text) <= 200 else f"{text[:200]}..."
