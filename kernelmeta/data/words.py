"""What errors say: on one line, with names that can be printed, and not endlessly long."""

from __future__ import annotations

import os
from collections.abc import Sequence


def one_line(error: BaseException) -> str:
    """What an error says, on one line of no more than 200 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


def listing(items: Sequence[object], most: int = 20) -> str:
    """ "a, b, c and 5 more": the first ``most`` items, and how many there are beyond."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(map(str, items[:most])) + more


def counted(n: int, what: str) -> str:
    """ "1 row", "2 rows"."""
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def printable(path: str | os.PathLike[str]) -> str:
    """A file's name as UTF-8; bytes that are none are written as ``\\xe9``."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def size_text(n_bytes: int) -> str:
    """ "1.5 GB"."""
    value, unit = float(n_bytes), "bytes"
    for unit in ("bytes", "KB", "MB", "GB", "TB", "PB", "EB"):
        if value < 1000:
            break
        if unit != "EB":
            value /= 1000
    return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:,.1f} {unit}"
