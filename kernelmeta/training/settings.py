"""Settings that come from a command line or from JSON: how they are read, their types, and what they would take."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

from kernelmeta.data.counter import check_seed
from kernelmeta.data.words import size_text

# Inner steps beyond that are a mistake: each is held until the backward pass.
MOST_STEPS = 10_000
# Numbers of episodes are those of 64-bit words.
MOST_EPISODES = 2**60

_TYPES: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "str": (str,), "bool": (bool,)}

Size = int | str
"""A whole number, or "LEAST:MOST" where every episode draws one between them."""


@dataclass(frozen=True)
class Settings:
    """A dataclass of settings, as the commands keep them in JSON."""

    @classmethod
    def from_dict(cls: type[Kind], settings: Mapping[str, Any]) -> Kind:
        """From what `to_dict` gave; other keys are left aside. Raises ValueError."""
        names = {field.name for field in fields(cls)}
        known = {n: tuple(v) if isinstance(v, list) else v for n, v in settings.items() if n in names}
        try:
            return cls(**known)
        except TypeError as error:
            raise ValueError(f"config: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """The settings, as JSON takes them."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


Kind = TypeVar("Kind", bound=Settings)


def check_types(config: Any) -> None:
    """Every setting of a dataclass is of its type. None is taken where a setting may be left open.

    Raises:
        ValueError: it is not, named.
    """
    for field in fields(config):
        name, _, optional = str(field.type).partition(" | ")
        value = getattr(config, field.name)
        if name not in _TYPES or (value is None and optional):
            continue
        if not isinstance(value, _TYPES[name]) or (isinstance(value, bool) and name != "bool"):
            raise ValueError(f"{field.name}: expected {name}, got {str(value)[:40]!r}")


def as_size(name: str, value: object, least: int = 1) -> Size:
    """A number as an int, whatever it is written as; a range of several numbers as "LEAST:MOST".

    Raises:
        ValueError: it is neither, or begins below ``least``; ``name`` is the setting's.
    """
    first, colon, last = str(value).partition(":")
    try:
        if isinstance(value, (bool, float)):
            raise ValueError
        low, high = int(first), int(last if colon else first)
    except ValueError:
        raise ValueError(f"{name}: expected a number, or LEAST:MOST, got {str(value)[:40]!r}") from None
    if low < least:
        raise ValueError(f"{name}: expected at least {least}, got {low}")
    if high < low:
        raise ValueError(f"{name}: expected LEAST:MOST, got {value!r}")
    return low if low == high else f"{low}:{high}"


def bounds(size: Size) -> tuple[int, int]:
    """The least and the most of what `as_size` returned."""
    first, _, last = str(size).partition(":")
    return int(first), int(last or first)


def size_words(size: Size) -> str:
    """ "3 to 20", or "5"."""
    return str(size).replace(":", " to ")


def check_numbers(config: Any, least: Mapping[str, int], rates: tuple[str, ...]) -> None:
    """Whole numbers are at least so large, and rates finite and not negative; the seed is one.

    Raises:
        ValueError: it is not so, named.
    """
    for name, low in least.items():
        value = getattr(config, name)
        if value is not None and value < low:
            raise ValueError(f"{name}: expected at least {low}, got {value}")
    for name in rates:
        value = getattr(config, name)
        if value is not None and not 0 <= as_float(value) < math.inf:
            raise ValueError(f"{name}: expected a number of at least 0, got {str(value)[:40]}")
    check_seed(config.seed)


def as_float(value: float) -> float:
    """Infinite, where a whole number is larger than any float."""
    try:
        return float(value)
    except OverflowError:
        return math.inf


def check_memory(what: str, n_bytes: int) -> None:
    """Raises MemoryError if ``what`` takes more than the machine has."""
    try:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # not told
        return
    if n_bytes > there:
        raise MemoryError(f"{what}: that takes {size_text(n_bytes)} of memory; this machine has {size_text(there)}")
