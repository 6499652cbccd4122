"""Labels of any kind as numbers, and the classes' names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def as_array(labels: Any) -> np.ndarray[Any, Any]:
    """Labels as an array in which each is what it was: NumPy makes text of all if some are, and rounds whole numbers
    beside floats.
    """
    if isinstance(labels, Tensor):
        labels = labels.detach().cpu()
        return (labels.double() if labels.is_floating_point() else labels).numpy()  # which knows few floating types
    if hasattr(labels, "dtype"):  # an array, a column of a table
        return np.asarray(labels)
    values = list(labels)
    if len({type(value) for value in values}) > 1 and all(np.ndim(value) == 0 for value in values):
        array = np.empty(len(values), object)
        array[:] = values
        return array
    return np.asarray(values)


class LabelCodes:
    """Takes labels, some at a time, and numbers the classes: by value if all are whole numbers, else by name."""

    def __init__(self) -> None:
        self._codes: dict[int | str, int] = {}
        self._parts: list[np.ndarray[Any, np.dtype[np.int64]]] = []
        self.n = 0

    def add(self, labels: Iterable[Any]) -> None:
        """Raises ValueError for what is no label: NaN, 0.5, an empty text."""
        values = as_array(labels)
        if values.dtype.kind in "OSU":
            keys: Sequence[int | str] = [_key(value, self.n + i) for i, value in enumerate(values.tolist())]
            codes = np.fromiter((self._code(key) for key in keys), np.int64, len(keys))
        else:
            distinct, first, inverse = np.unique(values, return_index=True, return_inverse=True)
            pairs = zip(distinct.tolist(), first.tolist(), strict=True)
            own = [self._code(_key(value, self.n + row)) for value, row in pairs]
            codes = np.asarray(own, np.int64)[inverse.reshape(-1)]
        self._parts.append(codes)
        self.n += len(codes)

    def _code(self, key: int | str) -> int:
        return self._codes.setdefault(key, len(self._codes))

    def finish(self) -> tuple[Tensor, list[int | str]]:
        """Labels [n] int64 in 0..C-1, and the values of the classes."""
        if not self.n:
            raise ValueError("labels: expected at least one")
        values = list(self._codes)
        twice = [value for value in values if isinstance(value, int) and str(value) in self._codes]
        if twice:
            raise ValueError(
                f"labels: both the number {twice[0]} and the text {str(twice[0])!r} are there; give numbers or text"
            )
        if any(isinstance(value, str) for value in values):
            values.sort(key=str)
        else:
            values.sort()
        new = np.empty(len(values), np.int64)
        for code, value in enumerate(values):
            new[self._codes[value]] = code
        return torch.from_numpy(new[np.concatenate(self._parts)]), values


def _key(value: Any, row: int) -> int | str:
    if isinstance(value, bytes):
        value = value.decode("utf-8", "backslashreplace")
    if isinstance(value, str):
        if value.strip():
            return value.strip()
        raise ValueError(f"labels: row {row} has none")
    if isinstance(value, (int, np.integer)):  # bool among them
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    shown = "none" if value is None else repr(value)
    raise ValueError(f"labels: expected whole numbers or names, got {shown} in row {row}")
