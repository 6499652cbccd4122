"""Glyphs: the data set that comes with the package. A class is a character, a sample that character in one
typeface. docs/glyphs.md is its data card."""

from __future__ import annotations

import os
import re
from importlib import resources
from importlib.abc import Traversable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class ImageSet(NamedTuple):
    """Labelled grey images whose classes are split."""

    images: Tensor  # [n, H, H] uint8, paper 0 to ink 255
    labels: Tensor  # [n] int64 in 0..C-1
    class_split: Tensor  # [C] uint8: 0 meta-train, 1 meta-val, 2 meta-test, 3 for the backbone alone
    class_names: tuple[str, ...]  # C names


# What a style adds to the name of a typeface's family.
_WEIGHTS = "condensed|bold|light|black|expanded|thin|medium|heavy"
_STYLE = re.compile(
    rf"\b((semi|demi|extra|ultra)?[- ]?({_WEIGHTS})|cond|demi|regular|book|roman|italic|oblique|slanted|\d+pt|ui)\b",
    re.IGNORECASE,
)


def load_glyphs(path: str | os.PathLike[str] | None = None) -> ImageSet:
    """The built-in glyphs, 28x28: 164 characters in 24 typefaces each, sorted by class.

    Args:
        path: another file of the same format, such as the large set that ``tools/build_glyphs.py`` renders.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a file of glyphs.
    """
    with _source(path).open("rb") as file:
        try:
            archive = np.load(file, allow_pickle=False)
            glyphs = ImageSet(
                torch.from_numpy(archive["images"]),
                torch.from_numpy(archive["labels"].astype(np.int64)),
                torch.from_numpy(archive["class_split"]),
                tuple(archive["class_names"].tolist()),
            )
        except OSError:
            raise
        except Exception as error:  # numpy and zipfile raise anything from EOFError to BadZipFile
            raise ValueError(f"path: {_source(path)} is not a file of glyphs: {error}") from error
    _check(glyphs, str(_source(path)))
    return glyphs


def glyph_families(path: str | os.PathLike[str] | None = None) -> tuple[Tensor, tuple[str, ...]]:
    """The typeface family of every glyph, whatever the style: [n] int64, and the families' names in order.

    Args:
        path: as of `load_glyphs`.

    Raises:
        OSError: the file cannot be read.
        ValueError: it does not say which faces its glyphs are of.
    """
    with _source(path).open("rb") as file:
        try:
            archive = np.load(file, allow_pickle=False)
            faces, names = archive["faces"].astype(np.int64), archive["face_names"].tolist()
            family_of = [" ".join(_STYLE.sub(" ", name).split()) or name for name in names]
            families = sorted(set(family_of))
            number = torch.tensor([families.index(family) for family in family_of])
            return number[torch.from_numpy(faces)], tuple(families)
        except OSError:
            raise
        except Exception as error:
            raise ValueError(f"path: {_source(path)} does not name the glyphs' typefaces: {error}") from error


def _source(path: str | os.PathLike[str] | None) -> Traversable | Path:
    return resources.files("kernelmeta.data") / "glyphs.npz" if path is None else Path(path)


def _check(glyphs: ImageSet, source: str) -> None:
    images, labels, class_split, names = glyphs
    n, n_classes = len(labels), len(names)
    if images.dtype != torch.uint8 or images.dim() != 3 or images.shape[1] != images.shape[2] or len(images) != n:
        raise ValueError(
            f"path: {source} holds images {list(images.shape)} of {images.dtype} and {n} labels;"
            " expected uint8 [n, H, H] and n labels"
        )
    if class_split.dtype != torch.uint8 or class_split.shape != (n_classes,) or bool((class_split > 3).any()):
        raise ValueError(f"path: {source}: class_split is not one code of 0 to 3 for each of {n_classes} classes")
    if labels.dim() != 1 or not torch.equal(labels.unique(), torch.arange(n_classes)):
        raise ValueError(f"path: {source}: the labels are not 0 to {n_classes - 1}, each at least once")
