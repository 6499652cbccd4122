"""Feature banks: the features of a whole data set in one memory-mapped safetensors file.

Format "kernelmeta-bank-1": tensors ``features`` [n, D] (float32, float16 or bfloat16), ``labels`` [n] of integers
in 0..C-1, ``class_split`` [C] uint8 (see `SPLITS`: classes are split, not samples); string metadata
``format``, ``class_names`` (JSON list of C strings), ``source`` (free text), if the rows are images
``image_shape`` (JSON list: channels, height, width), where it is known which backbone made the features ``backbone``
(its name and a checksum of its weights), and a checksum, see `kernelmeta.data.tensor_files`.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernelmeta.data.class_split import parse_shares, split_classes
from kernelmeta.data.files import parse_json
from kernelmeta.data.label_codes import LabelCodes
from kernelmeta.data.mapped_file import MappedFile
from kernelmeta.data.tensor_files import CHECKSUM, Pieces, bytes_of, read_tensors, write_tensors
from kernelmeta.data.whole_numbers import check_whole
from kernelmeta.data.words import listing

FORMAT = "kernelmeta-bank-1"
SPLITS = {"train": 0, "val": 1, "test": 2}
FEATURE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LABEL_DTYPES = (
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32,
)  # fmt: skip
# Elements that are looked at at a time.
_PIECE = 1 << 22


@dataclass(frozen=True)
class FeatureBank:
    """Features with labels, and which classes are for meta-training, validation and test.

    Args:
        features: [n, D] float32, float16 or bfloat16.
        labels: [n] integers in 0..C-1, kept as int64; every class has a sample.
        class_split: [C] uint8: 0 meta-train, 1 meta-validation, 2 meta-test.
        class_names: C names.
        source: where the features come from, free text.
        image_shape: (channels, height, width) if the features are an image's pixels, flattened.
        backbone: whose features they are: a name and a checksum of its weights; empty if nobody knows.
        file: the file that the features are mapped from.

    Features may be NaN or infinite here; `load` refuses them.

    Raises:
        ValueError, TypeError: anything of this does not hold.
    """

    features: Tensor
    labels: Tensor
    class_split: Tensor
    class_names: tuple[str, ...]
    source: str = ""
    image_shape: tuple[int, ...] | None = None
    backbone: str = ""
    file: MappedFile | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check_tensor("features", self.features, 2, FEATURE_DTYPES)
        _check_tensor("labels", self.labels, 1, LABEL_DTYPES)
        object.__setattr__(self, "labels", self.labels.long())  # frozen for its users
        _check_tensor("class_split", self.class_split, 1, (torch.uint8,))
        n, D = self.features.shape
        C = len(self.class_split)
        if n == 0 or D == 0 or C == 0:
            raise ValueError(f"features: expected at least one sample, feature and class, got {n}, {D} and {C}")
        if self.image_shape is not None and (len(self.image_shape) != 3 or math.prod(self.image_shape) != D):
            raise ValueError(f"image_shape: expected (channels, height, width) of {D} pixels, got {self.image_shape}")
        if len(self.labels) != n:
            raise ValueError(f"labels: expected one for each of the {n} rows of features, got {len(self.labels)}")
        if len(self.class_names) != C:
            raise ValueError(f"class_names: expected {C} as in class_split, got {len(self.class_names)}")
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or high >= C:
            raise ValueError(f"labels: expected 0..{C - 1}, got {low}..{high}")
        if int(self.class_split.max()) > 2:
            raise ValueError(f"class_split: expected 0, 1 or 2, got {int(self.class_split.max())}")
        empty = (torch.bincount(self.labels, minlength=C) == 0).nonzero().flatten().tolist()
        if empty:
            raise ValueError(f"labels: class {empty[0]} ({self.class_names[empty[0]]!r}) has no sample")

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, non_finite: str = "refuse") -> FeatureBank:
        """Open a bank; the features stay memory-mapped, once all of them were read.

        Do not write into the file while it is in use (replace it by another, `save` does): see
        :class:`kernelmeta.data.mapped_file.MappedFile`.

        Args:
            non_finite: what becomes of rows with NaN or infinite features: "refuse" them, "drop" them, or "keep" them.

        Raises:
            OSError: there is no such file, or it cannot be read.
            ValueError: truncated, damaged, foreign, or it breaks a rule of the format; a row that is not finite.
        """
        if non_finite not in ("refuse", "drop", "keep"):
            raise ValueError(f"non_finite: expected one of refuse, drop, keep, got {non_finite!r}")
        bank = cls._read(path)
        if non_finite == "keep":
            return bank
        rows = bank.non_finite_rows()
        if not len(rows):
            return bank
        if non_finite == "drop":
            return bank.without_rows(rows)
        raise ValueError(f"{path}: {bank.describe_rows(rows)}")

    @classmethod
    def _read(cls, path: str | os.PathLike[str]) -> FeatureBank:
        tensors, metadata = read_tensors(path)
        checksum = int(metadata[CHECKSUM], 16) if CHECKSUM in metadata else None
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{path}: expected metadata format {FORMAT!r}, got {metadata.get('format')!r}")
        missing = sorted({"features", "labels", "class_split"} - tensors.keys())
        if missing:
            raise ValueError(f"{path}: no tensor {missing[0]!r}")
        try:
            names = parse_json(metadata.get("class_names", ""))
        except ValueError:
            names = None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{path}: metadata class_names is not a JSON list of strings")
        try:
            shape = parse_json(metadata.get("image_shape", "null"))
            image_shape = None if shape is None else tuple(int(side) for side in shape)
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"{path}: metadata image_shape is not a JSON list of numbers") from None
        try:
            return cls(
                tensors["features"],
                tensors["labels"],
                tensors["class_split"],
                tuple(names),
                metadata.get("source", ""),
                image_shape,
                metadata.get("backbone", ""),
                MappedFile.of(path, checksum),
            )
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def from_arrays(
        cls,
        X: Any,
        y: Any,
        split: str | Sequence[Any] | Any | None = None,
        seed: int = 0,
        class_names: Sequence[str] | None = None,
        source: str = "arrays",
    ) -> FeatureBank:
        """A bank from arrays as other libraries have them.

        Args:
            X: [n, D], an array or tensor; float32, float16 and bfloat16 are kept, and not copied; other numbers become
                float32.
            y: [n] labels: whole numbers or text, of any values. Classes are numbered in the order of their values.
            split: which classes are for training, validation and test: None, all for training; shares such as
                "60/20/20", drawn with ``seed``, alike among large classes and small ones; or "train", "val", "test"
                (or 0, 1, 2) for each class, or for each row.
            seed: of the draw.
            class_names: names of the classes, if ``y`` holds the numbers 0..C-1; without, the values of ``y`` are.
            source: where the features come from, free text.

        Raises:
            ValueError, TypeError: arrays that do not fit each other, named; rows that are not finite; too few classes
                for the shares; rows of one class in two splits; two classes of one name.
        """
        features = as_features(X)
        codes = LabelCodes()
        codes.add(y)
        labels, values = codes.finish()
        if len(labels) != len(features):
            raise ValueError(f"y: expected one label for each of the {len(features)} rows of X, got {len(labels)}")
        if class_names is not None:
            if values != list(range(len(class_names))):
                raise ValueError(f"class_names: expected a name for each of the labels {listing(values)} in y")
            values = [str(name) for name in class_names]
            if len(set(values)) < len(values):
                raise ValueError(f"class_names: expected a name of its own for each class, got {listing(values)}")
        bad = (~features.isfinite().all(1)).nonzero().flatten().tolist()
        if bad:
            raise ValueError(f"X: {len(bad)} rows hold NaN or numbers that are infinite in float32: {listing(bad)}")
        class_split = _class_split(split, labels, len(values), seed)
        return cls(features, labels, class_split, tuple(map(str, values)), source)

    def save(self, path: str | os.PathLike[str], features: Pieces | None = None) -> None:
        """Write the bank, whole or not at all. Raises OSError.

        Args:
            features: written in the place of the bank's own, of the same shape.
        """
        tensors = {
            "features": self.features if features is None else features,
            "labels": self.labels,
            "class_split": self.class_split,
        }
        metadata = {
            "format": FORMAT,
            "class_names": json.dumps(list(self.class_names), ensure_ascii=False),
            "source": self.source,
        }
        if self.image_shape is not None:
            metadata["image_shape"] = json.dumps(self.image_shape)
        if self.backbone:
            metadata["backbone"] = self.backbone
        write_tensors(path, tensors, metadata)

    @property
    def n_features(self) -> int:
        """D."""
        return self.features.shape[1]

    @cached_property
    def crc32(self) -> int:
        """Of features, labels and class_split: tells whether two banks hold the same."""
        crc = 0
        for tensor in (self.labels, self.class_split, self.features):
            rows = max(1, _PIECE // max(1, tensor[0].numel()))
            for piece in tensor.split(rows):
                crc = zlib.crc32(bytes_of(piece), crc)
        return crc

    def check_file(self) -> None:
        """Raises ValueError if the file that the features are mapped from was cut or written to."""
        if self.file is not None:
            self.file.check()

    def non_finite_rows(self) -> Tensor:
        """Numbers of the rows with a NaN or infinite feature, int64."""
        rows = max(1, _PIECE // self.n_features)
        return torch.cat([~piece.isfinite().all(1) for piece in self.features.split(rows)]).nonzero().flatten()

    def describe_rows(self, rows: Tensor) -> str:
        """ "2 rows hold NaN or infinite features: row 7 (class 'ant'), row 9 (class 'bee')"."""
        named = [f"row {row} (class {self.class_names[self.labels[row]]!r})" for row in rows.tolist()]
        return f"{len(named)} row{'s hold' if len(named) > 1 else ' holds'} NaN or infinite features: {listing(named)}"

    def without_rows(self, rows: Tensor) -> FeatureBank:
        """The bank without some rows, in memory; classes that have no other are left out too. Raises ValueError if
        nothing is left.
        """
        kept = torch.ones(len(self.labels), dtype=torch.bool)
        kept[rows] = False
        classes, labels = self.labels[kept].unique(return_inverse=True)
        names = tuple(self.class_names[c] for c in classes.tolist())
        split = self.class_split[classes]
        return FeatureBank(self.features[kept], labels, split, names, self.source, self.image_shape, self.backbone)

    def classes(self, split: str) -> Tensor:
        """Labels of the classes of "train", "val" or "test", int64."""
        if split not in SPLITS:
            raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
        return (self.class_split == SPLITS[split]).nonzero().flatten()


def as_features(X: Any) -> Tensor:
    """[n, D] in a type that a bank has. Raises TypeError or ValueError for what is no matrix of numbers."""
    features = X.detach() if isinstance(X, Tensor) else torch.from_numpy(np.ascontiguousarray(_numbers(X)))
    if features.dtype not in FEATURE_DTYPES:
        if features.is_complex():
            raise TypeError(f"X: expected real numbers, got {features.dtype}")
        if not features.is_floating_point():
            try:
                check_whole(features.cpu())
            except ValueError as error:
                raise ValueError(f"X: {error}") from None
        features = features.float()
    if features.dim() != 2:
        raise ValueError(f"X: expected a matrix [n, D], got shape {list(features.shape)}")
    return features


def _numbers(X: Any) -> Any:
    array = np.asarray(X)
    if array.dtype.kind not in "fiub":
        raise TypeError(f"X: expected numbers, got {array.dtype}")
    # What PyTorch has no type for becomes float32.
    return array if array.dtype.kind != "f" or array.dtype.itemsize <= 8 else array.astype(np.float64)


def _class_split(split: Any, labels: Tensor, C: int, seed: int) -> Tensor:
    if split is None:
        return torch.zeros(C, dtype=torch.uint8)
    if isinstance(split, str):
        return split_classes(torch.bincount(labels, minlength=C).tolist(), parse_shares(split), seed)
    given = split.tolist() if hasattr(split, "tolist") else list(split)
    numbers = []
    for value in given:
        number = SPLITS.get(value) if isinstance(value, str) else value
        if number not in (0, 1, 2):
            raise ValueError(f"split: expected train, val or test, or 0, 1 or 2, got {value!r}")
        numbers.append(int(number))
    found = torch.tensor(numbers, dtype=torch.uint8)
    if len(found) == C:
        return found
    if len(found) != len(labels):
        raise ValueError(f"split: expected one for each of {C} classes or {len(labels)} rows, got {len(found)}")
    of_class = torch.empty(C, dtype=torch.uint8)
    of_class[labels] = found
    torn = (of_class[labels] != found).nonzero()
    if len(torn):
        raise ValueError(f"split: row {int(torn[0])} is in another split than the rest of its class; classes are split")
    return of_class


def _check_tensor(name: str, tensor: Tensor, dimensions: int, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name}: expected {accepted}, got {str(tensor.dtype).removeprefix('torch.')}")
    if tensor.dim() != dimensions:
        raise ValueError(f"{name}: expected {dimensions} dimensions, got shape {list(tensor.shape)}")
