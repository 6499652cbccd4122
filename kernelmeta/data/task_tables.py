"""Tasks in Parquet files, a row each: rows of a bank and labels in, answers out. A piece at a time."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kernelmeta.data.replacing import replacing
from kernelmeta.data.words import listing, one_line

COLUMNS = ("task", "support_rows", "support_labels", "query_rows")
_Ints = np.ndarray[Any, np.dtype[np.int64]]


class Piece(NamedTuple):
    """Consecutive tasks of one row group: what is done and written at a time."""

    file: int
    group: int
    first: int
    """The number of its first task within the row group."""
    n: int

    @property
    def name(self) -> str:
        """Of the file with its answers; these sort as the tasks do."""
        return f"part-{self.file:05d}-{self.group:06d}-{self.first:09d}.parquet"


@dataclass(frozen=True)
class Tasks:
    """Some tasks, their rows one after the other.

    Args:
        ids: [T], an Arrow array.
        support_rows, query_rows: rows of the bank, int64.
        support_offsets, query_offsets: [T + 1], where each task's begin.
        labels: of the support rows, 0..n_ways[t]-1 in each task, in the order of the labels' values.
        classes: the values of the labels of all tasks, one task after the other, an Arrow array.
        class_offsets: [T + 1], where each task's begin.
        problems: why tasks that nobody can answer cannot be; they have no rows here.
    """

    ids: Any
    support_rows: _Ints
    support_offsets: _Ints
    labels: _Ints
    classes: Any
    class_offsets: _Ints
    query_rows: _Ints
    query_offsets: _Ints
    problems: dict[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.support_offsets) - 1


class TaskFiles:
    """The tasks of a Parquet file, or of all those of a folder in the order of their names.

    Args:
        path: the file or folder.
        per_piece: tasks that are read at a time.
        skip_bad: a task without support, or with another number of labels than of rows, is kept as one that nobody can
            answer (`Tasks.problems`).

    Raises:
        OSError: there is no such file or folder, or it cannot be read.
        ValueError: no Parquet file, or without one of `COLUMNS`.
        ImportError: pyarrow is missing.
    """

    def __init__(self, path: str | os.PathLike[str], per_piece: int, skip_bad: bool = False) -> None:
        self._pa, self._skip_bad = arrow(), skip_bad
        folder = Path(path)
        self.paths = sorted(folder.glob("*.parquet")) if folder.is_dir() else [folder]
        if not self.paths:
            raise ValueError(f"tasks: {path} holds no .parquet files")
        self.per_piece = per_piece
        self.groups: list[list[int]] = []  # the number of tasks of each row group of each file
        for file in self.paths:
            metadata = self._open(file).metadata
            self.groups.append([metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)])

    def __len__(self) -> int:
        return sum(map(sum, self.groups))

    @property
    def fingerprint(self) -> list[list[int]]:
        """Bytes, row groups and tasks of each file: tells whether they are those that a run began with."""
        sizes = (path.stat().st_size for path in self.paths)
        return [[size, len(groups), sum(groups)] for size, groups in zip(sizes, self.groups, strict=True)]

    def pieces(self) -> list[Piece]:
        """All pieces, in the order of the tasks."""
        return [
            Piece(file, group, first, min(self.per_piece, n - first))
            for file, groups in enumerate(self.groups)
            for group, n in enumerate(groups)
            for first in range(0, n, self.per_piece)
        ]

    def read(self, wanted: Sequence[Piece]) -> Iterator[tuple[Piece, Tasks]]:
        """The tasks of some pieces, in their order; row groups without any are not looked at.

        Raises:
            OSError, ValueError: the file is damaged; a task (named) that has no support, or not as many labels as rows,
                unless such are skipped.
        """
        pieces = sorted(wanted)
        for file, group in sorted({(piece.file, piece.group) for piece in pieces}):
            ours = {piece.first: piece for piece in pieces if (piece.file, piece.group) == (file, group)}
            for first, batch in self._batches(file, group, max(ours)):
                if first in ours:
                    yield ours[first], self._tasks(self.paths[file], batch)

    def _open(self, path: Path) -> Any:
        import pyarrow.parquet as pq

        with open(path, "rb"):  # the usual errors
            pass
        try:
            # (without a buffer a whole row group is held)
            file = pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
            schema = file.schema_arrow
        except Exception as error:  # some of its errors are no ArrowException
            raise ValueError(f"{path}: not a Parquet file ({one_line(error)})") from None
        missing = [name for name in COLUMNS if name not in schema.names]
        if missing:
            raise ValueError(f"{path}: no column {missing[0]!r}; there are {listing(schema.names)}")
        types = self._pa.types
        for name in COLUMNS[1:]:
            kind = schema.field(name).type
            if not (types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)):
                raise ValueError(f"{path}: column {name!r}: expected lists, got {kind}")
            inner = kind.value_type
            text = types.is_string(inner) or types.is_large_string(inner)
            if not (types.is_integer(inner) or (name == "support_labels" and text)):
                what = "whole numbers or text" if name == "support_labels" else "whole numbers"
                raise ValueError(f"{path}: column {name!r}: expected lists of {what}, got {kind}")
        return file

    def _batches(self, file: int, group: int, last: int) -> Iterator[tuple[int, Any]]:
        """A row group in pieces of `per_piece`, each with the number of its first task, to the one that begins at
        ``last``.
        """
        content = self._open(self.paths[file])
        batches = content.iter_batches(batch_size=self.per_piece, row_groups=[group], columns=list(COLUMNS))
        held: list[Any] = []
        first = 0
        left = self.groups[file][group]
        while left and first <= last:
            n = min(self.per_piece, left)
            try:
                while sum(batch.num_rows for batch in held) < n:
                    held.append(next(batches))
            except Exception as error:  # StopIteration too
                raise ValueError(f"{self.paths[file]}: damaged ({one_line(error)})") from None
            table = self._pa.Table.from_batches(held)
            yield first, table.slice(0, n).combine_chunks()
            held = table.slice(n).to_batches()
            first, left = first + n, left - n

    def _tasks(self, path: Path, table: Any) -> Tasks:
        ids = _one(self._pa, table.column("task"))
        problems: dict[int, str] = {}
        support, support_offsets = self._lists(path, table, "support_rows", problems)
        labels, label_offsets = self._lists(path, table, "support_labels", problems)
        query, query_offsets = self._lists(path, table, "query_rows", problems)
        rows, names = np.diff(support_offsets), np.diff(label_offsets)
        for task in np.flatnonzero(rows != names).tolist():
            problems.setdefault(task, f"{rows[task]} support_rows, but {names[task]} support_labels")
        for task in np.flatnonzero(rows == 0).tolist():
            problems.setdefault(task, "no support_rows")
        if problems:
            first = min(problems)
            if not self._skip_bad:
                raise ValueError(f"{path}: task {ids[first]}: {problems[first]}")
            bad = np.isin(np.arange(len(ids)), list(problems))
            support, support_offsets = _without(self._pa, support, support_offsets, bad)
            labels, _ = _without(self._pa, labels, label_offsets, bad)
            query, query_offsets = _without(self._pa, query, query_offsets, bad)
        own, classes, class_offsets = _own_labels(self._pa, labels, support_offsets)
        return Tasks(
            ids, _ints(support), support_offsets, own, classes, class_offsets, _ints(query), query_offsets, problems
        )  # fmt: skip

    def _lists(self, path: Path, table: Any, name: str, problems: dict[int, str]) -> tuple[Any, _Ints]:
        """All values of a column of lists, and the offsets of the rows; a row that lacks something has a problem."""
        import pyarrow.compute as pc

        column = _one(self._pa, table.column(name))
        lengths = pc.list_value_length(column)
        values = column.flatten()
        offsets = np.concatenate([[0], np.cumsum(np.asarray(lengths.fill_null(0), np.int64))])
        for task in np.flatnonzero(np.asarray(lengths.is_null())).tolist():
            problems.setdefault(task, f"no {name}")
        holes = np.flatnonzero(np.asarray(values.is_null()))
        for task in (np.searchsorted(offsets, holes, "right") - 1).tolist():
            problems.setdefault(task, f"{name} has an element without a value")
        return values, offsets


def _without(pa: Any, values: Any, offsets: _Ints, bad: np.ndarray[Any, np.dtype[np.bool_]]) -> tuple[Any, _Ints]:
    """The lists of tasks, those of the bad ones empty."""
    lengths = np.diff(offsets)
    return values.filter(pa.array(np.repeat(~bad, lengths))), np.concatenate([[0], np.cumsum(lengths * ~bad)])


def write_answers(
    path: Path, tasks: Tasks, best: _Ints, probabilities: np.ndarray[Any, Any], problems: Mapping[int, str]
) -> None:
    """Write one file of answers, whole or not at all: a row a task, ``task``, the lists ``query_rows``, ``labels`` and
    ``probabilities``, and ``problem``. Raises OSError.

    Args:
        tasks: the tasks.
        best: of each query row the class, 0..n_ways[t]-1.
        probabilities: of these.
        problems: of tasks without an answer: these have no lists of labels and probabilities.
    """
    pa = arrow()
    import pyarrow.parquet as pq

    bad = np.isin(np.arange(len(tasks)), list(problems))
    task = np.repeat(np.arange(len(tasks)), np.diff(tasks.query_offsets))
    labels = tasks.classes.take(pa.array(tasks.class_offsets[task] + best, mask=bad[task]))
    offsets = pa.array(tasks.query_offsets, pa.int32())

    def lists(values: Any, mask: Any = None) -> Any:
        return pa.ListArray.from_arrays(offsets, values, mask=mask)

    missing = pa.array(bad) if problems else None
    table = pa.table(
        {
            "task": tasks.ids,
            "query_rows": lists(pa.array(tasks.query_rows)),
            "labels": lists(labels, missing),
            "probabilities": lists(pa.array(probabilities.astype(np.float32)), missing),
            "problem": pa.array([problems.get(t) for t in range(len(tasks))], pa.string()),
        }
    )
    with replacing(path) as temporary:
        pq.write_table(table, temporary)


def unanswered(paths: Iterable[Path]) -> tuple[int, str]:
    """How many tasks of files of answers have a problem, and the first of them, in words."""
    arrow()
    import pyarrow.parquet as pq

    count, first = 0, ""
    for path in paths:
        with pq.ParquetFile(path) as file:
            if "problem" not in file.schema_arrow.names:
                continue
            problems = file.read(["problem"]).column(0)
            here = len(problems) - problems.null_count
            if here and not first:
                at = problems.is_valid().index(True).as_py()
                first = f"task {file.read(['task']).column(0)[at]}: {problems[at]}"
        count += here
    return count, first


def arrow() -> Any:
    """pyarrow. Raises ImportError that says how to get it."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ImportError("tasks in Parquet files need pyarrow: pip install 'kernelmeta[parquet]'") from None
    return pyarrow


def _one(pa: Any, column: Any) -> Any:
    return column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)


def _ints(values: Any) -> _Ints:
    return np.asarray(values.cast("int64"))


def _own_labels(pa: Any, labels: Any, offsets: _Ints) -> tuple[_Ints, Any, _Ints]:
    """Labels numbered within each task by their values, the values of each task's classes, and where these begin."""
    import pyarrow.compute as pc

    T = len(offsets) - 1
    task = np.repeat(np.arange(T), np.diff(offsets))
    values = labels.unique()
    values = values.take(pc.sort_indices(values))
    codes = np.asarray(pc.index_in(labels, value_set=values), np.int64)
    # The classes of all tasks: pairs (task, code), each once.
    pairs, own = np.unique(task * len(values) + codes, return_inverse=True)
    class_task = pairs // len(values)
    class_offsets = np.concatenate([[0], np.cumsum(np.bincount(class_task, minlength=T))])
    classes = values.take(pa.array(pairs % len(values)))
    return own.reshape(-1) - class_offsets[task], classes, class_offsets
