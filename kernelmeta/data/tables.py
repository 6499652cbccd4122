"""Features, labels and names of rows from the files that other programs write, a piece at a time.

.npy, .npz, .pt and .safetensors hold arrays; .csv, .tsv, .parquet and folders of Hugging Face's ``datasets`` hold
columns. Names, types and shapes say which array or column is what. Nothing in a file is executed.
"""

from __future__ import annotations

import contextlib
import csv
import itertools
import os
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernelmeta.data.bank import FEATURE_DTYPES
from kernelmeta.data.dataset_folders import DatasetFolder, is_dataset_folder
from kernelmeta.data.files import check_dense, read_weights
from kernelmeta.data.label_codes import as_array
from kernelmeta.data.tensor_files import read_tensors
from kernelmeta.data.whole_numbers import check_whole
from kernelmeta.data.words import listing, one_line

LABEL_NAMES = ("label", "labels", "class", "target", "targets", "y")
FEATURE_NAMES = ("features", "X", "x", "embeddings", "embedding", "data")
ID_NAMES = ("id", "ids", "name", "file", "path", "filename")
SUFFIXES = (".npy", ".npz", ".pt", ".pth", ".safetensors", ".csv", ".tsv", ".parquet")
PIECE = 1 << 22  # elements in a piece
_CSV_ROWS = 4096
_WHOLE = re.compile(r"[+-]?\d+", re.ASCII)
_EXCELS = "sep="  # how a first line begins that only says what stands between the columns
_GROUPED = re.compile(r"[+-]?\d{1,3}((\.\d{3})+,|(,\d{3})+\.)\d+", re.ASCII)
_DECIMAL_COMMA = re.compile(r"[+-]?\d*,\d+([eE][+-]?\d+)?", re.ASCII)
_DECIMAL_POINT = re.compile(r"[+-]?\d*\.\d+([eE][+-]?\d+)?", re.ASCII)


@dataclass(frozen=True)
class Table:
    """What a file holds: features, labels, or both, and what its rows are called.

    Args:
        path: the file.
        n_features: D; 0 where there are no features.
        dtype: in which `features` come.
        features: () -> pieces [m, D], in order; None if there are none.
        labels: () -> pieces of labels of any kind; None if there are none.
        ids: () -> pieces of names; None if the rows have none.
        notes: what was left out, to tell the user.
        columns: what the features are called, in order; empty where they have no names.
    """

    path: Path
    n_features: int = 0
    dtype: torch.dtype = torch.float32
    features: Callable[[], Iterator[Tensor]] | None = None
    labels: Callable[[], Iterator[Sequence[Any]]] | None = None
    ids: Callable[[], Iterator[Sequence[Any]]] | None = None
    notes: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()


def open_table(
    path: str | os.PathLike[str],
    label: str | None = None,
    *,
    labelled: bool = True,
    columns: Sequence[str] = (),
) -> Table:
    """Look into a file; rows are read when they are asked for.

    Args:
        label: the name of the column or array with the labels; the usual names (`LABEL_NAMES`) if None.
        labelled: a file without that column or array is an error.
        columns: what the features are called in another file. If they have names here too, those must be the same ones,
            and the features come in that order.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: of another kind, damaged, it holds no features and no labels, or other features than ``columns``.
        ImportError: a .parquet or a dataset without pyarrow.
    """
    file = Path(path)
    if file.is_dir() and is_dataset_folder(file):
        return _dataset(file, label, labelled, columns)
    suffix = file.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"{path}: expected a file {', '.join(SUFFIXES)}")
    with open(file, "rb"):  # the usual errors
        pass
    if suffix in (".csv", ".tsv"):
        return _csv(file, label, labelled, columns)
    if suffix == ".parquet":
        return _parquet(file, label, labelled, columns)
    return _of_arrays(file, _arrays(file, suffix), label, labelled)


# ---- arrays


def _arrays(file: Path, suffix: str) -> dict[str, Any]:
    if suffix == ".safetensors":
        tensors, metadata = read_tensors(file)
        if metadata.get("format", "").startswith("kernelmeta-bank"):
            raise ValueError(f"{file}: a feature bank already")
        return dict(tensors)
    if suffix in (".pt", ".pth"):
        return _torch(file)
    try:
        if suffix == ".npy":
            return {"": np.load(file, mmap_mode="r", allow_pickle=False)}
        with np.load(file, allow_pickle=False) as content:
            return {name: content[name] for name in content.files}
    except Exception as error:  # NumPy raises nearly anything on a damaged file
        objects = "; save numbers, or text by .astype(str), instead" if "Python objects" in str(error) else ""
        raise ValueError(f"{file}: not a NumPy file of numbers or text ({one_line(error)}){objects}") from None


def _torch(file: Path) -> dict[str, Any]:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # nearly anything
        content = read_weights(file)  # which says what is wrong
    if isinstance(content, Tensor):
        content = {"": content}
    if isinstance(content, (tuple, list)):
        content = dict(zip(("X", "y"), content, strict=False))
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a tensor, a list or a dict of them, got {type(content).__name__}")
    arrays = {str(name): value for name, value in content.items() if isinstance(value, (Tensor, list, tuple))}
    return {name: _array(file, name, value) for name, value in arrays.items()}


def _array(file: Path, name: str, values: Any) -> Any:
    if isinstance(values, Tensor):
        check_dense(file, name, values)
        return values
    try:
        return as_array(values)
    except ValueError as error:  # rows of unequal lengths
        raise ValueError(f"{file}: {name}: {one_line(error)}") from None


def _of_arrays(file: Path, arrays: dict[str, Any], label: str | None, labelled: bool) -> Table:
    matrices = {name: a for name, a in arrays.items() if len(a.shape) == 2 and _is_number(a)}
    vectors = {name: a for name, a in arrays.items() if len(a.shape) == 1}
    features = _pick(file, "features", matrices, FEATURE_NAMES, None)
    rows = None if features is None else len(features)
    fitting = {name: a for name, a in vectors.items() if rows is None or len(a) == rows or name == label}
    named = {name: a for name, a in fitting.items() if name in ID_NAMES}
    labels = _pick(file, "labels", {k: v for k, v in fitting.items() if k not in named}, LABEL_NAMES, label)
    if label is not None and labels is None and labelled and set(arrays) != {""}:
        raise ValueError(f"{file}: no array {label!r}; there are {listing(list(arrays))}")
    if features is None and labels is None:
        shapes = [f"{name or 'array'} {list(a.shape)}" for name, a in arrays.items()]
        raise ValueError(f"{file}: expected features [n, D] or labels [n], got {listing(shapes) or 'nothing'}")
    ids = next(iter(named.values()), None)
    dtype = torch.float32
    D = 0
    if features is not None:
        D = features.shape[1]
        kept = features.dtype if isinstance(features, Tensor) else _torch_type(features.dtype)
        dtype = kept if kept in FEATURE_DTYPES else torch.float32
    return Table(
        file, D, dtype,
        None if features is None else lambda: _matrix_pieces(file, features, dtype),
        None if labels is None else lambda: _vector_pieces(labels),
        None if ids is None else lambda: _vector_pieces(ids),
    )  # fmt: skip


def _is_number(array: Any) -> bool:
    if isinstance(array, Tensor):
        return not array.is_complex()
    return array.dtype.kind in "fiub"


def _torch_type(dtype: Any) -> torch.dtype:
    return {2: torch.float16, 4: torch.float32}.get(dtype.itemsize, torch.float32) if dtype.kind == "f" else torch.int64


def _pick(file: Path, what: str, arrays: dict[str, Any], names: Sequence[str], wanted: str | None) -> Any | None:
    if wanted is not None:
        return arrays.get(wanted, arrays.get(""))
    for name in names:
        if name in arrays:
            return arrays[name]
    if len(arrays) > 1:
        raise ValueError(f"{file}: which array holds the {what}, {listing(list(arrays))}? call it {names[0]!r}")
    return next(iter(arrays.values()), None)


def _matrix_pieces(file: Path, matrix: Any, dtype: torch.dtype) -> Iterator[Tensor]:
    rows = max(1, PIECE // max(1, matrix.shape[1]))
    for first in range(0, len(matrix), rows):
        piece = matrix[first : first + rows]
        if not (isinstance(piece, Tensor) and piece.is_floating_point()):
            try:
                check_whole(piece)
            except ValueError as error:
                raise ValueError(f"{file}: {error}") from None
        if not isinstance(piece, Tensor):
            kind = piece.dtype
            small = kind.kind == "f" and kind.itemsize in (2, 4) and kind.isnative
            piece = torch.from_numpy(np.array(piece, dtype=kind if small else np.float32))
        yield piece.to(dtype)


def _vector_pieces(vector: Any) -> Iterator[Sequence[Any]]:
    array: Any = as_array(vector)
    for first in range(0, len(array), PIECE):
        yield array[first : first + PIECE]


# ---- columns


def _columns(
    file: Path, columns: Sequence[str], label: str | None, labelled: bool, wanted: Sequence[str]
) -> tuple[str | None, str | None]:
    """The columns of labels and of names, which none of the features ``wanted`` is."""
    doubled = next((name for i, name in enumerate(columns) if name in columns[:i]), None)
    if doubled is not None:
        raise ValueError(f"{file}: two columns are called {doubled!r}")
    if label is not None and label not in columns and labelled:
        raise ValueError(f"{file}: no column {label!r}; there are {listing(columns)}")
    if label not in columns:
        label = next((name for name in LABEL_NAMES if name in columns and name not in wanted), None)
    return label, next((name for name in ID_NAMES if name in columns and name not in (label, *wanted)), None)


def _ordered(file: Path, found: list[str], wanted: Sequence[str]) -> list[str]:
    """The columns of features as another file has them."""
    if not wanted or not found:
        return found
    missing = [name for name in wanted if name not in found]
    unknown = [name for name in found if name not in wanted]
    if missing or unknown:
        parts = [f"{what} {listing(names)}" for what, names in (("without", missing), ("with", unknown)) if names]
        raise ValueError(
            f"{file}: expected the same columns of features as in the other file, got them {', '.join(parts)};"
            f" a column of another kind is left out if it is called {' or '.join(ID_NAMES[:2])}"
        )
    return list(wanted)


def _notes(file: Path, ignored: Sequence[str]) -> tuple[str, ...]:
    return (f"{file}: columns that are no numbers are left out: {listing(ignored)}",) if ignored else ()


def _delimiter(file: Path) -> str:
    """What stands most often between the columns' names, outside of quotes; of "sep=;", which Excel writes, the ";"."""
    with open(file, encoding="utf-8-sig") as stream:
        line = next((line for line in stream if line.strip()), "")
    if line.startswith(_EXCELS):
        return line[len(_EXCELS) :].strip("\r\n")[:1]
    bare = re.sub('"[^"]*"', "", line)
    return max(",;\t", key=bare.count)


def _rows_of(file: Path) -> Generator[tuple[int, list[str]], None, None]:
    """Lines with their numbers; the first names the columns. Blank ones are left out, and so are those at the end in
    which only delimiters stand.
    """
    only_delimiters: list[tuple[int, list[str]]] = []
    names = False
    with open(file, encoding="utf-8-sig", newline="") as stream:
        try:
            reader = csv.reader(stream, delimiter=_delimiter(file))
            for row in reader:
                if any(map(str.strip, row)):
                    if not names and row[0].startswith(_EXCELS):
                        continue
                    yield from only_delimiters
                    only_delimiters.clear()
                    names = True
                    yield reader.line_num, row
                elif len(row) > 1:
                    only_delimiters.append((reader.line_num, row))
        except (csv.Error, UnicodeDecodeError, TypeError) as error:  # (TypeError: a delimiter that is none)
            raise ValueError(f"{file}: not a text file of columns ({one_line(error)})") from None


def _check_column(file: Path, name: str, values: Any) -> None:
    try:
        check_whole(values)
    except ValueError as error:
        raise ValueError(f"{file}: column {name!r}: {error}") from None


def _whole(texts: Sequence[str]) -> np.ndarray[Any, Any]:
    """Whole numbers, those beyond int64 as the nearest that is not."""
    return np.array([max(-(2**63), min(2**63 - 1, int(text))) for text in texts], np.int64)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _decimal_commas(
    file: Path, columns: Sequence[str], rows: Sequence[tuple[int, list[str]]], among: Sequence[int]
) -> bool:
    """Whether numbers are written 0,5, as they may be where semicolons stand between the columns; looks at some rows.

    Args:
        rows: with the numbers of their lines.
        among: the columns that may hold numbers.
    """

    def first(pattern: re.Pattern[str], holding: str) -> str | None:
        cells = ((line, i, row[i]) for line, row in rows for i in among if i < len(row) and holding in row[i])
        found = ((line, i, cell) for line, i, cell in cells if pattern.fullmatch(cell.strip()))
        return next((f"line {line}, column {columns[i]!r}: {cell!r}" for line, i, cell in found), None)

    grouped, comma = first(_GROUPED, ","), first(_DECIMAL_COMMA, ",")
    if grouped is not None:
        raise ValueError(f"{file}: {grouped} has separators of thousands; expected a number without any")
    if comma is None:
        return False
    if _delimiter(file) != ";":
        raise ValueError(
            f"{file}: {comma} has a decimal comma; expected decimal points, or semicolons between the columns"
        )
    point = first(_DECIMAL_POINT, ".")
    if point is not None:
        raise ValueError(f"{file}: {comma} has a decimal comma, but {point} has a decimal point; expected either")
    return True


def _csv(file: Path, label: str | None, labelled: bool, wanted: Sequence[str]) -> Table:
    rows = list(itertools.islice(_rows_of(file), 1 + _CSV_ROWS))
    if not rows:
        raise ValueError(f"{file}: empty; expected a line that names the columns, and below it a line for each row")
    columns = [name.strip() for name in rows[0][1]]
    if all(_number(name.replace(",", ".")) is not None for name in columns):
        raise ValueError(f"{file}: expected a first line that names the columns, got numbers")
    if len(rows) == 1:
        raise ValueError(f"{file}: no rows below its first line, which names the columns {listing(columns)}")
    label_column, id_column = _columns(file, columns, label, labelled, wanted)
    others = [i for i, name in enumerate(columns) if name not in (label_column, id_column)]
    commas = _decimal_commas(file, columns, rows[1:], others)

    def plain(text: str) -> str:
        return text if not commas else "" if "." in text else text.replace(",", ".")

    def number(text: str) -> float | None:
        return _number(plain(text))

    # The first cell that is not blank says what a column holds: a blank one is an error where there should be a number.
    examples = {i: next((row[i] for _, row in rows[1:] if i < len(row) and row[i].strip()), "") for i in others}
    numbers = [i for i in others if number(examples[i]) is not None]
    ignored = [columns[i] for i in others if i not in numbers]
    numbers = [columns.index(name) for name in _ordered(file, [columns[i] for i in numbers], wanted)]

    def pieces(read: Callable[[list[tuple[int, list[str]]]], Any]) -> Iterator[Any]:
        with contextlib.closing(_rows_of(file)) as lines:
            next(lines)
            while piece := list(itertools.islice(lines, _CSV_ROWS)):
                for line, row in piece:
                    if len(row) != len(columns):
                        raise ValueError(f"{file}: line {line}: expected {len(columns)} columns, got {len(row)}")
                yield read(piece)

    def matrix(piece: list[tuple[int, list[str]]]) -> Tensor:
        texts = np.array([[plain(row[i]) for i in numbers] for _, row in piece])
        for at, i in enumerate(numbers):
            # Whole numbers of so many digits that float32 may round them.
            long = [text for text in texts[:, at].tolist() if len(text) > 7 and _WHOLE.fullmatch(text.strip())]
            if long:
                _check_column(file, columns[i], _whole(long))
        try:
            values = texts.astype(np.float32)
        except ValueError:
            line, i, text = next((line, i, row[i]) for line, row in piece for i in numbers if number(row[i]) is None)
            raise ValueError(f"{file}: line {line}, column {columns[i]!r}: expected a number, got {text!r}") from None
        return torch.from_numpy(values)

    def column(name: str) -> Callable[[], Iterator[list[str]]]:
        at = columns.index(name)
        return lambda: pieces(lambda piece: [row[at] for _, row in piece])

    if not numbers and label_column is None:
        between = "; expected commas, semicolons or tabs between columns" if len(columns) == 1 else ""
        raise ValueError(f"{file}: no column of numbers and no labels; there are {listing(columns)}{between}")
    notes = _notes(file, ignored)
    if commas:
        notes += (f"{file}: commas in its numbers are read as decimal commas",)
    return Table(
        file, len(numbers), torch.float32, (lambda: pieces(matrix)) if numbers else None,
        None if label_column is None else column(label_column), None if id_column is None else column(id_column),
        notes, tuple(columns[i] for i in numbers),
    )  # fmt: skip


def _parquet(file: Path, label: str | None, labelled: bool, wanted: Sequence[str]) -> Table:
    try:
        import pyarrow.parquet as pq
    except ImportError:
        raise ImportError(f"{file}: reading .parquet needs pyarrow: pip install 'kernelmeta[parquet]'") from None
    try:
        content = pq.ParquetFile(file)
        schema = content.schema_arrow
    except Exception as error:  # some of its errors are no ArrowException
        raise ValueError(f"{file}: not a Parquet file ({one_line(error)})") from None

    def batches(rows: int, columns: Sequence[str]) -> Iterator[Any]:
        try:
            yield from content.iter_batches(batch_size=rows, columns=list(columns))
        except Exception as error:
            raise ValueError(f"{file}: damaged ({one_line(error)})") from None

    return _of_columns(file, schema, batches, label, labelled, wanted)


def _dataset(folder: Path, label: str | None, labelled: bool, wanted: Sequence[str]) -> Table:
    content = DatasetFolder(folder)
    return _of_columns(folder, content.schema, content.batches, label, labelled, wanted, content.class_names)


def _of_columns(
    file: Path,
    schema: Any,
    batches: Callable[[int, Sequence[str]], Iterator[Any]],
    label: str | None,
    labelled: bool,
    wanted: Sequence[str],
    class_names: Callable[[str], list[str] | None] = lambda column: None,
) -> Table:
    """Of Arrow's record batches.

    Args:
        batches: (rows, columns) -> batches of at most so many rows.
        class_names: column -> what its numbers stand for, None if for nothing.
    """
    import pyarrow as pa

    label_column, id_column = _columns(file, schema.names, label, labelled, wanted)
    others = [field for field in schema if field.name not in (label_column, id_column)]
    lists = [f.name for f in others if _is_list(pa, f.type) and _is_plain(pa, f.type.value_type)]
    if len(lists) > 1:
        preferred = [name for name in FEATURE_NAMES if name in lists]
        if not preferred:
            raise ValueError(f"{file}: which column holds the features, {listing(lists)}? call it 'features'")
        lists = preferred[:1]
    scalars = [field.name for field in others if _is_plain(pa, field.type)]
    used = lists or _ordered(file, scalars, wanted)
    ignored = [field.name for field in others if field.name not in used]

    def pieces(names: Sequence[str], read: Callable[[Any], Any], rows: int) -> Iterator[Any]:
        return (read(batch) for batch in batches(rows, names) if batch.num_rows)

    def matrix(batch: Any) -> Tensor:
        for name in used:
            if batch.column(name).null_count:
                raise ValueError(f"{file}: column {name!r} has rows without a value")
        if not lists:
            return torch.from_numpy(np.stack([numbers(name, batch.column(name)) for name in used], 1))
        values = batch.column(lists[0])
        flat = numbers(lists[0], values.flatten())
        if len(flat) != len(values) * D or not (
            pa.types.is_fixed_size_list(values.type) or np.all(np.diff(np.asarray(values.offsets)) == D)
        ):
            raise ValueError(f"{file}: column {lists[0]!r}: expected {D} numbers in each row")
        return torch.from_numpy(flat.reshape(len(values), D).copy())

    def numbers(name: str, values: Any) -> np.ndarray[Any, Any]:
        if pa.types.is_integer(values.type) and not values.null_count:
            _check_column(file, name, values)
        return np.asarray(values.cast(pa.float32(), safe=False))

    def column(name: str) -> Callable[[], Iterator[list[Any]]]:
        called = class_names(name)

        def values(batch: Any) -> list[Any]:
            found: list[Any] = batch.column(name).to_pylist()
            if called is None:
                return found
            return [called[i] if i is not None and 0 <= i < len(called) else None for i in found]

        return lambda: pieces([name], values, 1 << 16)

    D = len(scalars) if not lists else 0
    if lists:
        first = next(pieces(lists, lambda batch: batch.column(lists[0]), 1), None)
        D = 0 if first is None or first.null_count else len(first.flatten())
    if not D and label_column is None:
        raise ValueError(f"{file}: no column of numbers and no labels; there are {listing(schema.names)}")
    rows = max(1, PIECE // max(D, 1))
    return Table(
        file, D, torch.float32, (lambda: pieces(used, matrix, rows)) if D else None,
        None if label_column is None else column(label_column), None if id_column is None else column(id_column),
        _notes(file, ignored), () if lists else tuple(used),
    )  # fmt: skip


def _is_list(pa: Any, kind: Any) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _is_plain(pa: Any, kind: Any) -> bool:
    return bool(pa.types.is_floating(kind) or pa.types.is_integer(kind))


def read_all(pieces: Iterable[Tensor]) -> Tensor:
    """All rows in memory. Raises ValueError if there are none."""
    parts = list(pieces)
    if not parts:
        raise ValueError("no rows")
    return torch.cat(parts)
