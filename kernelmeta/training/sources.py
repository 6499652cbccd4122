"""What ``--data`` may name: the built-in glyphs, a feature bank, or a folder of images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kernelmeta.data import FeatureBank
from kernelmeta.data.file_kinds import is_safetensors
from kernelmeta.data.images import BACKBONE_SPLIT, ArrayImages, FolderImages, LabelledImages
from kernelmeta.data.tables import SUFFIXES
from kernelmeta.data.words import printable
from kernelmeta.training.backbones import load_backbone, trained_style
from kernelmeta.training.extraction import extract
from kernelmeta.training.foreign_backbones import is_foreign

Say = Callable[[str], None]


def open_images(data: str, style: str | None = None) -> LabelledImages:
    """Images of "glyphs", of a file of the same format (.npz), or of a folder.

    Raises:
        OSError: there is no such file or folder.
        ValueError: it does not hold images as expected.
    """
    if data == "glyphs" or (data.endswith(".npz") and not Path(data).is_dir()):
        from kernelmeta.data.glyphs import glyph_families, load_glyphs

        path = None if data == "glyphs" else data
        glyphs, (families, _) = load_glyphs(path), glyph_families(path)
        return ArrayImages(
            glyphs.images, glyphs.labels, glyphs.class_split, glyphs.class_names, printable(data), groups=families
        )
    _check_named(data)
    return FolderImages(data, style)


def _check_named(data: str) -> None:
    if not data:  # which would be the folder that one is in
        raise ValueError("data: expected glyphs, a bank or a folder of images, got an empty name")


def open_bank(
    data: str,
    *,
    weights: str | None = None,
    backbone: str | None = None,
    pixels: bool = False,
    style: str | None = None,
    device: str = "cpu",
    workers: int = 0,
    progress: bool = False,
    skip_bad: bool = False,
    say: Say = lambda line: None,
) -> FeatureBank:
    """The bank that ``data`` names; with ``weights``, images go through that backbone.

    Glyphs without ``weights`` are their pixels: 784 features, ink 1, paper 0. With ``pixels``, so are other images:
    normalised, as a backbone sees them, in float16.

    Args:
        skip_bad: go on without images that cannot be read, and without rows that are not finite.
        say: takes lines about what was left out.

    Raises:
        OSError: there is no such file or folder, or it cannot be read.
        ValueError: it cannot be used; the message says why.
    """
    _check_named(data)
    reading: dict[str, Any] = {"workers": workers, "progress": progress, "skip_bad": skip_bad, "say": say}
    if data != "glyphs" and not Path(data).is_dir():
        if weights is not None:
            raise ValueError(f"weights: {data} is not a folder of images; a bank's features are used as they are")
        return _bank(data, skip_bad, say)
    if weights is None and not is_foreign(backbone):
        if data != "glyphs" and pixels:
            return _pixels_of(open_images(data, style), reading)
        if data != "glyphs":
            raise ValueError(
                f"{data} is a folder of images: give the --weights of a backbone ('kernelmeta pretrain'"
                " trains one), --backbone timm:NAME or the like, or a bank that 'kernelmeta extract' wrote"
            )
        return _glyph_pixels()
    images = open_images(data, style or trained_style(weights))
    eyes = load_backbone(weights, backbone, images.channels, images.size)
    source = f"{images.source}, {eyes.name}"
    return extract(images, eyes.module, source, name=eyes.name, prepare=eyes.prepare, device=device, **reading)


def _bank(path: str, skip_bad: bool, say: Say) -> FeatureBank:
    try:
        bank = FeatureBank.load(path, non_finite="keep")
    except ValueError as error:
        if Path(path).suffix.lower() not in SUFFIXES or is_safetensors(path):
            raise
        raise ValueError(f"{error}; 'kernelmeta import' makes a bank of such files") from None
    bad = bank.non_finite_rows()
    if not len(bad):
        return bank
    text = f"{path}: {bank.describe_rows(bad)}"
    if not skip_bad:
        raise ValueError(f"{text}; --skip-bad goes on without")
    say(f"left out: {text}")
    return bank.without_rows(bad)


def _glyph_pixels() -> FeatureBank:
    images = open_images("glyphs")
    assert isinstance(images, ArrayImages)
    kept = (images.class_split != BACKBONE_SPLIT).nonzero().flatten()
    new_label = torch.full((len(images.class_split),), -1).index_copy(0, kept, torch.arange(len(kept)))
    labels = new_label[images.labels]
    rows = labels >= 0
    return FeatureBank(
        images.pixels[rows].flatten(1).float() / 255,
        labels[rows],
        images.class_split[kept],
        tuple(images.class_names[c] for c in kept.tolist()),
        "glyphs, pixels",
        (1, images.size, images.size),
    )


def _pixels_of(images: LabelledImages, reading: dict[str, Any]) -> FeatureBank:
    bank = extract(images, torch.nn.Flatten(), f"{images.source}, pixels", dtype=torch.float16, **reading)
    return replace(bank, image_shape=(images.channels, images.size, images.size))
