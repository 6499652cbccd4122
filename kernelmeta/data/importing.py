"""A feature bank from the files of other programs, a piece at a time: nothing has to fit into memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from kernelmeta.data.bank import FeatureBank
from kernelmeta.data.class_split import SHARES, parse_shares, split_classes
from kernelmeta.data.label_codes import LabelCodes
from kernelmeta.data.tables import Table, open_table
from kernelmeta.data.tensor_files import Pieces
from kernelmeta.data.words import printable


def import_bank(
    files: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    label: str | None = None,
    split: str | None = None,
    seed: int = 0,
    progress: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> FeatureBank:
    """Write a feature bank from one file or more.

    Features of several files follow each other in the order of the files, and so do labels; both may stand in the same
    files or in others.

    Args:
        files: .npy, .npz, .pt, .safetensors, .csv, .tsv, .parquet, or datasets' folders; see `kernelmeta.data.tables`.
        out: the bank to write, whole or not at all.
        label: the name of the column or array with the labels.
        split: shares of the classes for training, validation and test, drawn with ``seed``, alike among large classes
            and small ones. None: "60/20/20", but one class or two are all for training.
        progress: show a bar.
        say: takes lines about what was left out, or not split.

    Returns:
        The bank, mapped from its file.

    Raises:
        OSError: a file cannot be read, or the bank cannot be written.
        ValueError: files that do not fit each other, a row without a label or with features that are not finite,
            named.
        ImportError: a .parquet or a dataset without pyarrow.
    """
    shares = parse_shares(SHARES if split is None else split)
    tables: list[Table] = []
    for file in files:
        tables.append(open_table(file, label, columns=next((t.columns for t in tables if t.columns), ())))
    for note in (note for table in tables for note in table.notes):
        say(note)
    with_features = [table for table in tables if table.features is not None]
    labels, names = _labels(tables)
    D, dtype = _width(with_features)
    sizes = torch.bincount(labels).tolist()
    if split is None and len(sizes) < len(shares):
        say(f"too few classes to be split {SHARES} ({', '.join(names)}): all are for training")
        shares = (1.0, 0.0, 0.0)
    class_split = split_classes(sizes, shares, seed)
    source = f"imported from {', '.join(printable(os.path.basename(os.fspath(file))) for file in files)}"
    # Its features are none, of the right shape: what stands in the file is read below.
    bank = FeatureBank(torch.zeros(1, D, dtype=dtype).expand(len(labels), D), labels, class_split, names, source)
    with tqdm(total=len(labels), desc="import", unit="row", disable=not progress) as bar:
        pieces = _pieces(with_features, bank, dtype, bar)
        bank.save(out, Pieces((len(labels), D), dtype, pieces))
    return FeatureBank.load(out, non_finite="keep")  # all rows were looked at


def _labels(tables: Sequence[Table]) -> tuple[Tensor, tuple[str, ...]]:
    labelled = [table for table in tables if table.labels is not None]
    alone = [table for table in labelled if table.features is None]
    if alone and len(alone) < len(labelled):
        raise ValueError(
            f"{labelled[0].path} and {alone[0].path}: expected labels beside the features in every file, or apart from "
            "them in every file"
        )
    bare = [table for table in tables if table.labels is None]
    if bare and not alone:
        raise ValueError(f"{bare[0].path}: no labels; --label names their column, or give a file of labels, [n], too")
    codes = LabelCodes()
    for table in labelled:
        assert table.labels is not None
        try:
            for piece in table.labels():
                codes.add(piece)
        except ValueError as error:
            raise ValueError(f"{table.path}: {str(error).removeprefix(f'{table.path}: ')}") from None
    labels, values = codes.finish()
    return labels, tuple(map(str, values))


def _width(tables: Sequence[Table]) -> tuple[int, torch.dtype]:
    if not tables:
        raise ValueError("features: none of the files holds any, [n, D] or columns of numbers")
    first = tables[0]
    for table in tables:
        if table.n_features != first.n_features:
            raise ValueError(
                f"{table.path}: expected {first.n_features} features as in {first.path}, got {table.n_features}"
            )
    dtypes = {table.dtype for table in tables}
    return first.n_features, dtypes.pop() if len(dtypes) == 1 else torch.float32


def _pieces(tables: Sequence[Table], bank: FeatureBank, dtype: torch.dtype, bar: Any) -> Iterator[Tensor]:
    at, n = 0, len(bank.labels)
    for table in tables:
        assert table.features is not None
        for piece in table.features():
            if at + len(piece) > n:
                raise ValueError(f"{table.path}: more rows of features than the {n} labels")
            bad = (~piece.isfinite().all(1)).nonzero().flatten() + at
            if len(bad):
                raise ValueError(f"{table.path}: {bank.describe_rows(bad)}")
            yield piece.to(dtype)
            at += len(piece)
            bar.update(len(piece))
    if at != n:
        raise ValueError(f"labels: {n}, but there are {at} rows of features")
