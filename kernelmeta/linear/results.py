"""What a demonstration leaves in its folder: numbers, a plot, a table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from kernelmeta.data.files import write_json, write_text

Say = Callable[[str], None]


def silent(line: str) -> None:
    """Takes a line about the progress, and leaves it."""


def write_results(
    out: Path,
    name: str,
    found: dict[str, Any],
    *,
    quick: bool,
    table: Callable[[dict[str, Any]], Iterable[str]],
    plot: Callable[[Path, dict[str, Any]], None],
) -> str:
    """Into ``out``: the numbers with their configuration, the plot and the table, each in a file of this name.

    Args:
        out: a folder.
        name: of the demonstration.
        found: "settings" and whatever was found.
        quick: whether it was the short form.
        table: makes the lines of the table, as Markdown.
        plot: draws it, into a file.

    Returns:
        The table.

    Raises:
        OSError: files cannot be written.
    """
    found = {"command": f"demo {name}", "quick": quick, **found}
    stem = name.replace("-", "_")
    write_json(out / f"{stem}.json", found)
    plot(out / f"{stem}.png", found)
    text = "\n".join(table(found)).rstrip() + "\n"
    write_text(out / f"{stem}.md", text)
    return text


def markdown_table(titles: Sequence[str], rows: Iterable[Sequence[object]], *, words: int = 1) -> list[str]:
    """The lines of a table in Markdown.

    Args:
        titles: of the columns.
        rows: cells.
        words: columns with words, at the left; the others hold numbers.
    """
    rule = ["---" if column < words else "---:" for column in range(len(titles))]
    return [f"| {' | '.join(map(str, row))} |" for row in (titles, rule, *rows)]
