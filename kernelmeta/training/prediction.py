"""Labels for rows that nobody has labelled, from files to a file: ``kernelmeta predict``."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernelmeta.data import FeatureBank
from kernelmeta.data.bank import SPLITS
from kernelmeta.data.dataset_folders import is_dataset_folder
from kernelmeta.data.file_kinds import is_safetensors
from kernelmeta.data.files import write_text
from kernelmeta.data.folders import scan_classes
from kernelmeta.data.images import FolderImages
from kernelmeta.data.label_codes import LabelCodes
from kernelmeta.data.tables import open_table, read_all
from kernelmeta.data.tensor_files import read_metadata
from kernelmeta.data.words import counted, listing, printable
from kernelmeta.training.answers import (
    check_use,
    doubts,
    make_learner,
    method_or_weights,
    mixed_backbones,
    probabilities,
)
from kernelmeta.training.backbones import load_backbone, trained_style
from kernelmeta.training.extraction import extract
from kernelmeta.training.foreign_backbones import is_foreign
from kernelmeta.training.loading import load_learner
from kernelmeta.training.proportions import proportions_of
from kernelmeta.transforms import Transform

COLUMNS = ("id", "label", "probability", "runner_up")


@dataclass(frozen=True)
class Rows:
    """Rows of one file or folder.

    Args:
        features: [n, D].
        ids: what each row is called: its id, its file, or its number.
        labels: what each row is labelled with; None where nothing says so.
        files: the image of each row, if the rows are images.
        columns: what the features are called; empty where they have no names.
        backbone: whose features they are, see :class:`kernelmeta.data.FeatureBank`; empty if nobody knows.
    """

    features: Tensor
    ids: list[str]
    labels: list[str] | None = None
    files: list[Path] | None = None
    columns: tuple[str, ...] = ()
    backbone: str = ""


_NO_LABELS = (
    "support: no labels; --label names their column, images belong into a folder for each class, and of arrays"
    " 'kernelmeta import X.npy y.npy' makes a bank"
)


class Backbone(NamedTuple):
    """What turns images into features.

    Args:
        weights, name: as `kernelmeta.training.backbones.load_backbone` takes them.
        device: where it runs.
        workers: processes that decode images.
        progress: show a bar.
        skip_bad: go on without images that cannot be read.
    """

    weights: str | None = None
    name: str | None = None
    device: str = "cpu"
    workers: int = 0
    progress: bool = False
    skip_bad: bool = False


def read_rows(
    source: str,
    *,
    label: str | None = None,
    labelled: bool = True,
    backbone: Backbone | None = None,
    columns: Sequence[str] = (),
    say: Callable[[str], None] = lambda line: None,
) -> Rows:
    """The rows of a table or arrays (`kernelmeta.data.tables`), of a feature bank, or of a folder of images.

    Args:
        label: the column or array of the labels.
        labelled: a table without that column is an error.
        backbone: for images; its ``skip_bad`` leaves out rows that are not finite, too.
        columns: what the features are called in another table; they come in that order.
        say: takes lines about what was left out.

    Raises:
        OSError: there is no such file or folder, or it cannot be read.
        ValueError: it cannot be used; a row with features that are not finite, and is not to be left out.
        ImportError: a .parquet without pyarrow.
    """
    path = Path(source)
    if path.is_dir() and not is_dataset_folder(path):
        return _images(source, backbone or Backbone(), say)
    if not path.is_dir() and is_safetensors(path) and "kernelmeta-bank" in read_metadata(path).get("format", ""):
        skip_bad = backbone is not None and backbone.skip_bad
        bank = FeatureBank.load(path, non_finite="keep" if skip_bad else "refuse")
        classes = _without_split(bank)
        names = [classes[c] for c in bank.labels.tolist()]
        rows = Rows(bank.features, [str(row) for row in range(len(names))], names, backbone=bank.backbone)
        return _finite(source, rows, backbone, say)
    table = open_table(path, label, labelled=labelled, columns=columns)
    for note in table.notes:
        say(note)
    if table.features is None:
        raise ValueError(f"{source}: no features, [n, D] or columns of numbers")
    try:
        features = read_all(table.features())
    except ValueError as error:
        raise ValueError(str(error) if source in str(error) else f"{source}: {error}") from None
    labels = None if table.labels is None else _texts(part for piece in table.labels() for part in piece)
    ids = (
        [str(row) for row in range(len(features))]
        if table.ids is None
        else _texts(part for piece in table.ids() for part in piece)
    )
    return _finite(source, Rows(features, ids, labels, columns=table.columns), backbone, say)


def _finite(source: str, rows: Rows, backbone: Backbone | None, say: Callable[[str], None]) -> Rows:
    """The rows, or those that are finite, if bad ones are to be left out. Raises ValueError."""
    good = rows.features.isfinite().all(1)
    bad = (~good).nonzero().flatten().tolist()
    if not bad:
        return rows
    text = f"{counted(len(bad), 'row')} with NaN or infinite features, counted from 0: {listing(bad)}"
    if backbone is None or not backbone.skip_bad:
        raise ValueError(f"{source}: {text}")
    say(f"{source}: left out: {text}")
    kept = good.nonzero().flatten().tolist()
    labels = None if rows.labels is None else [rows.labels[i] for i in kept]
    return replace(rows, features=rows.features[good], ids=[rows.ids[i] for i in kept], labels=labels)


def _without_split(bank: FeatureBank) -> Sequence[str]:
    """The classes' names, without the folder of their split before it where they came from one."""
    splits = {number: f"{split}/" for split, number in SPLITS.items()}
    own = [splits.get(number, "/") for number in bank.class_split.tolist()]
    plain = [name.removeprefix(split) for name, split in zip(bank.class_names, own, strict=True)]
    alone = len(set(plain)) == len(plain)
    return plain if alone and all(map(str.startswith, bank.class_names, own)) else bank.class_names


def _texts(values: Any) -> list[str]:
    """As `LabelCodes` names classes; text as it is."""
    return [v.decode() if isinstance(v, bytes) else "" if v is None else str(v).strip() for v in map(_plain, values)]


def _plain(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value
    return int(value) if isinstance(value, (bool, float)) and float(value).is_integer() else value


def check_folders(support: str, query: str) -> None:
    """What can be said of folders of images before any goes through a backbone, which may take hours.

    Raises:
        OSError: a folder cannot be read.
        ValueError: no image in one of them; the labelled ones are not in folders of two classes or more.
    """
    for source in (support, query):
        if not os.path.isdir(source) or is_dataset_folder(Path(source)):
            continue
        names = [name for _, name in scan_classes(source).classes]
        if source == support:
            if names == [""]:
                raise ValueError(_NO_LABELS)
            _check_classes(names)


def _check_classes(names: Sequence[str]) -> None:
    if len(names) < 2:
        raise ValueError(f"support: expected labels of at least two classes, got one class: {names[0]!r}")


def _images(source: str, backbone: Backbone, say: Callable[[str], None]) -> Rows:
    if backbone.weights is None and not is_foreign(backbone.name):
        raise ValueError(f"{source} is a folder of images: give the --weights of a backbone, or --backbone timm:NAME")
    images = FolderImages(source, trained_style(backbone.weights), scan=scan_classes)
    if backbone.skip_bad:
        images.check(skip_bad=True, workers=backbone.workers, progress=backbone.progress)
    eyes = load_backbone(backbone.weights, backbone.name, images.channels, images.size)
    bank = extract(
        images, eyes.module, eyes.name, name=eyes.name, prepare=eyes.prepare, device=backbone.device,
        workers=backbone.workers, progress=backbone.progress, say=say,
    )  # fmt: skip
    names = [bank.class_names[c].removeprefix("test/") for c in bank.labels.tolist()]
    ids = [printable(path.relative_to(images.root)) for path in images.paths]
    return Rows(bank.features, ids, names if any(names) else None, list(images.paths), backbone=bank.backbone)


@dataclass(frozen=True)
class Prediction:
    """The answers to the query rows, in their order.

    Args:
        method: the learner's name.
        classes: the labels of the support rows, in the order of `probabilities`.
        probabilities: [n, C].
        query: the rows.
        doubt: why a transductive answer is doubtful; None if it is not.
        accuracy: in percent, of the query rows whose labels are known; None if there are none.
        settings: what to tell a reader.
        which: the weights of the run that were taken; empty where there is none.
        mixed: that the rows, or the weights, are of different backbones; None where they are not, or nobody knows.
        others: how many query rows have a label that is none of the classes'; the accuracy is without them.
    """

    method: str
    classes: tuple[str, ...]
    probabilities: Tensor
    query: Rows
    doubt: str | None
    accuracy: float | None
    settings: dict[str, Any]
    which: str = ""
    mixed: str | None = None
    others: int = 0

    @property
    def apart(self) -> str:
        """What stands behind the accuracy, if rows with labels do not count."""
        return f", apart from {counted(self.others, 'row')} whose label is none of the support's" if self.others else ""

    def rows(self) -> list[tuple[str, str, float, str]]:
        """id, label, probability and runner-up of each row."""
        sorted_, order = self.probabilities.sort(dim=1, descending=True, stable=True)
        return [
            (name, self.classes[best], p, self.classes[other])
            for name, (best, other), p in zip(
                self.query.ids, order[:, :2].tolist(), sorted_[:, 0].tolist(), strict=True
            )
        ]

    def write_csv(self, path: str | os.PathLike[str]) -> None:
        """`COLUMNS`, a line a row, in the order of the query. Raises OSError."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows((name, label, f"{p:.6f}", other) for name, label, p, other in self.rows())
        write_text(path, text.getvalue())


def predict(
    what: str,
    support: Rows,
    query: Rows,
    *,
    at: str | None = None,
    transductive: bool = True,
    proportions: Mapping[str, float] | None = None,
    counts: Mapping[str, float] | None = None,
    transform: str | None = None,
    center: str | None = None,
    device: str = "cpu",
) -> Prediction:
    """Answers for the query rows from the labelled support rows.

    Args:
        what: one of `METHODS` that needs no training, or a run folder, its checkpoint or a published one.
        at: which weights of a run: "best" on its validation classes, "last", or None for the best if there are any.
        transductive: whether a method that can judges the query rows together.
        proportions: the classes' shares of the query rows, label -> share, for a method that takes them.
        counts: likewise, label -> how many rows of it there were in a sample of such rows.
        transform, center: of the features, for a method without training, see `make_learner`.
        device: where the learner runs.

    Raises:
        OSError: the weights cannot be read.
        ValueError: rows without a label, of other numbers of features, a learner that does not fit them, or
            proportions that are none or that it does not take.
    """
    if support.labels is None:
        raise ValueError(_NO_LABELS)
    if not len(query.features):
        raise ValueError("query: no rows")
    D = support.features.shape[1]
    if query.features.shape[1] != D:
        raise ValueError(f"query: expected {D} features as in the support, got {query.features.shape[1]}")
    codes = LabelCodes()
    try:
        codes.add(support.labels)
    except ValueError as error:
        raise ValueError(f"support: {error}") from None
    labels, values = codes.finish()
    classes = tuple(map(str, values))
    _check_classes(classes)
    named, weights = method_or_weights(what)
    chosen = make_learner(named, weights, len(classes), D, at, transform=transform, center=center)
    check_use(chosen, transductive=transductive, proportions=proportions is not None or counts is not None)
    of_query_rows = proportions_of(proportions, counts, classes)
    method, learner, which, temperature, features_of = chosen
    dtype = torch.promote_types(torch.promote_types(support.features.dtype, query.features.dtype), torch.float32)
    rows, of_query = (r.features.to(device, dtype) for r in (support, query))
    learner, labels = learner.to(device), labels.to(device)
    found = probabilities(
        learner, rows, labels, of_query, transductive=transductive, temperature=temperature, proportions=of_query_rows
    ).cpu()
    accuracy, others = None, 0
    if query.labels is not None:
        known = [i for i, name in enumerate(query.labels) if name in classes]
        others = sum(bool(name) for name in query.labels) - len(known)
        if known:
            right = [classes[int(found[i].argmax())] == query.labels[i] for i in known]
            accuracy = 100 * sum(right) / len(right)
    of_features = learner.transform if isinstance(learner.transform, Transform) else learner
    settings = {
        "method": method,
        "weights": "none" if named else f"{what}: {which}" if which else what,
        "judged": "together" if learner.transductive and transductive else "each row alone",
        "classes": len(classes),
        "support rows": len(rows),
        "query rows": len(of_query),
        "features": D,
        "transform": of_features.transform,
        "center": of_features.center,
        "temperature": f"{temperature:.3g}",
    }
    if of_query_rows is not None:
        told = [f"{name} {share:.4g}" for name, share in zip(classes, of_query_rows.shares.tolist(), strict=True)]
        settings["proportions"] = ", ".join(told)
    elif getattr(learner, "assumes_even", False):
        settings["proportions"] = "taken to be equal"
    doubt = doubts(learner, rows, labels, of_query, classes, of_query_rows) if transductive else None
    mixed = mixed_backbones({what: features_of, "the support": support.backbone, "the query": query.backbone})
    return Prediction(method, classes, found, query, doubt, accuracy, settings, which, mixed, others)


def backbone_of(what: str) -> tuple[str | None, str | None]:
    """The backbone's weights and name that a run was trained with, as far as it says."""
    _, weights = method_or_weights(what)
    if weights is None:
        return None, None
    _, settings = load_learner(weights)
    return settings.get("weights"), settings.get("backbone")
