"""Folders that ``datasets.Dataset.save_to_disk`` of Hugging Face writes: Arrow streams, and JSON about them.

They are read with pyarrow, without the package ``datasets``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kernelmeta.data.words import listing, one_line

_STATE, _INFO, _SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"


def is_dataset_folder(path: Path) -> bool:
    """Whether a folder holds such a dataset, or several of them, its splits."""
    return (path / _STATE).is_file() or (path / _SPLITS).is_file()


class DatasetFolder:
    """One dataset, whose rows are read where they lie.

    Args:
        folder: which ``save_to_disk`` wrote.

    Attributes:
        schema: its columns, as pyarrow describes them.

    Raises:
        OSError: a file is missing or cannot be read.
        ValueError: damaged, several splits, or rows in another order than that of the files.
        ImportError: no pyarrow.
    """

    def __init__(self, folder: Path) -> None:
        try:
            import pyarrow as pa
        except ImportError:
            raise ImportError(f"{folder}: reading it needs pyarrow: pip install 'kernelmeta[parquet]'") from None
        self._pa, self.folder = pa, folder
        if not (folder / _STATE).is_file():
            splits = [str(folder / name) for name in _json(folder / _SPLITS).get("splits", [])]
            raise ValueError(f"{folder}: a dataset of several splits; name one or more of them: {listing(splits)}")
        state = _json(folder / _STATE)
        if state.get("_indices_data_files") or state.get("_indices_files"):
            raise ValueError(f"{folder}: its rows have an order of their own; save it after flatten_indices()")
        try:
            self._files = [folder / Path(entry["filename"]).name for entry in state["_data_files"]]
        except (KeyError, TypeError):
            raise ValueError(f"{folder / _STATE}: does not say which files hold the rows") from None
        if not self._files:
            raise ValueError(f"{folder}: no rows")
        with self._stream(self._files[0]) as stream:
            self.schema = stream.schema

    def class_names(self, column: str) -> list[str] | None:
        """What the numbers in a column stand for, if they stand for classes. Raises OSError or ValueError."""
        path = self.folder / _INFO
        described = (_json(path).get("features") or {}).get(column) if path.is_file() else None
        if not isinstance(described, dict) or described.get("_type") != "ClassLabel":
            return None
        return [str(name) for name in described.get("names") or []]

    def batches(self, rows: int, columns: Sequence[str]) -> Iterator[Any]:
        """Record batches of at most so many rows. Raises OSError, ValueError."""
        for file in self._files:
            with self._stream(file) as stream:
                try:
                    for batch in stream:
                        chosen = batch.select(list(columns))
                        yield from (chosen.slice(first, rows) for first in range(0, batch.num_rows, rows))
                except (self._pa.ArrowException, KeyError, OSError) as error:
                    raise ValueError(f"{file}: damaged ({one_line(error)})") from None

    def _stream(self, file: Path) -> Any:
        with open(file, "rb"):  # the usual errors
            pass
        try:
            return self._pa.ipc.open_stream(self._pa.memory_map(str(file)))
        except (self._pa.ArrowException, OSError) as error:
            raise ValueError(f"{file}: not a stream of Arrow ({one_line(error)})") from None


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({one_line(error)})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return content
