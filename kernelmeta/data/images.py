"""Labelled images: folders as the published few-shot code lays them out, or arrays in memory.

A folder holds ``train/``, ``val/`` and ``test/``, each with one folder of images a class (miniImageNet,
CIFAR-FS).
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from kernelmeta.data.bank import SPLITS
from kernelmeta.data.decoding import decode, shorter_side
from kernelmeta.data.folders import ImageFolder, scan
from kernelmeta.data.tensor_files import bytes_of
from kernelmeta.data.words import listing, printable
from kernelmeta.ranks import Ranks

BACKBONE_SPLIT = 3
# Of an image whose longer side is more than so many times the shorter one, the middle is taken.
LONGEST = 16


class ImageStyle(NamedTuple):
    """Sizes and normalisation (of 0..255) with which Hu et al. (ICLR 2020) trained."""

    size: int  # side that the backbone sees
    stored: int  # shorter side of the stored images; others are resized to it
    padding: int  # of the random crop
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


STYLES = {
    "miniimagenet": ImageStyle(
        80, 84, 8, (120.39586422, 115.59361427, 104.54012653), (70.68188272, 68.27635443, 72.54505529)
    ),
    "cifar-fs": ImageStyle(
        32, 32, 4, (129.37731888, 124.10583864, 112.47758569), (68.20947949, 65.43124043, 70.45866994)
    ),
}
# Brightness, contrast and saturation are each scaled by 1 - JITTER to 1 + JITTER, as published.
JITTER = 0.4


class LabelledImages(Protocol):
    """What pretraining and extraction need to know of a set of images."""

    labels: Tensor  # [n] int64 in 0..C-1
    class_split: Tensor  # [C] uint8: as in a feature bank, or 3: for the backbone alone
    class_names: tuple[str, ...]
    source: str
    channels: int
    size: int
    notes: tuple[str, ...]  # lines to show before anything is done with them

    def name(self, index: int) -> str:
        """What to call an image in an error."""

    def fingerprint(self) -> int:
        """Tells whether two sets are the same."""

    def check(
        self, *, skip_bad: bool = False, workers: int = 0, progress: bool = False, processes: Ranks | None = None
    ) -> None:
        """Raises ValueError if an image cannot be read, or leaves it out."""

    def image(self, index: int) -> Image.Image:
        """One image as it is, RGB of 8 bits."""

    def load(self, index: int) -> Tensor:
        """One normalised image [channels, size, size], float32."""

    def load_augmented(self, index: int, random: np.random.Generator) -> Tensor:
        """The same, augmented for training."""


@dataclass
class ArrayImages:
    """Grey images in memory.

    Args:
        pixels: [n, H, H], uint8 or float in 0..255.
        labels, class_split, class_names, source: see `LabelledImages`.
        padding: training shifts an image by up to so many pixels either way.
        groups: [n] int64, what images have in common that a held-out part shall not share (the typeface's family).
    """

    pixels: Tensor
    labels: Tensor
    class_split: Tensor
    class_names: tuple[str, ...]
    source: str
    padding: int = 2
    channels: int = 1
    notes: tuple[str, ...] = ()
    groups: Tensor | None = None

    def __post_init__(self) -> None:
        self.size = self.pixels.shape[-1]
        self.labels = self.labels.long()

    def name(self, index: int) -> str:
        return f"image {index}"

    def fingerprint(self) -> int:
        crc = 0
        for tensor in (self.labels, self.class_split, self.pixels):
            crc = zlib.crc32(bytes_of(tensor), crc)
        return crc

    def check(
        self, *, skip_bad: bool = False, workers: int = 0, progress: bool = False, processes: Ranks | None = None
    ) -> None:
        pass

    def image(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index].round().to(torch.uint8).numpy()).convert("RGB")

    def load(self, index: int) -> Tensor:
        return (self.pixels[index].float() / 127.5 - 1)[None]

    def load_augmented(self, index: int, random: np.random.Generator) -> Tensor:
        return self._shifted([index], [random])[0]

    def load_batch(self, rows: Sequence[int], key: tuple[int, ...] | None) -> Tensor:
        """Images [B, 1, size, size]; what `load` and `load_augmented` give for each, without a loop over them."""
        if key is None:
            return (self.pixels[list(rows)].float() / 127.5 - 1)[:, None]
        return self._shifted(rows, [np.random.default_rng((*key, row)) for row in rows])

    def _shifted(self, rows: Sequence[int], random: Sequence[np.random.Generator]) -> Tensor:
        p, size = self.padding, self.size
        images = self.load_batch(rows, None)
        B = len(images)
        padded = images[:, :, :1, :1].expand(B, 1, size + 2 * p, size + 2 * p).clone()
        padded[:, :, p : p + size, p : p + size] = images
        shifts = torch.from_numpy(np.stack([r.integers(0, 2 * p + 1, 2) for r in random]))
        down, right = (shifts[:, i, None] + torch.arange(size) for i in range(2))  # [B, size]
        return padded[torch.arange(B)[:, None, None], 0, down[:, :, None], right[:, None]][:, None]


class FolderImages:
    """Images of a folder, decoded when asked for.

    Args:
        root: the folder, with ``train/``, ``val/`` and ``test/``, or as ``scan`` takes it. A split without a folder is
            empty. What is left out of it: see
            :func:`kernelmeta.data.folders.scan`; ``notes`` says what was.
        style: a name of `STYLES`; without, "cifar-fs" if the first image's shorter side is at most 32
            pixels, else "miniimagenet". For training, as published: random crop after padding, jitter of
            brightness, contrast and saturation, horizontal flip.
        scan: looks into the folder; :func:`kernelmeta.data.folders.scan_classes` takes one without splits.

    Raises:
        ValueError: the folder holds no class of images; a split or a class is not called as it should be.
        OSError: it cannot be read.
    """

    channels = 3

    def __init__(
        self,
        root: str | os.PathLike[str],
        style: str | None = None,
        scan: Callable[[str | os.PathLike[str]], ImageFolder] = scan,
    ) -> None:
        if style is not None and style not in STYLES:
            raise ValueError(f"style: expected one of {', '.join(STYLES)}, got {style!r}")
        folder = scan(root)
        self.root, self.source, self.notes = folder.root, printable(folder.root), tuple(folder.notes)
        self._set(folder.classes)
        if style is None:
            sides = (side for side in map(shorter_side, self.paths) if side is not None)
            style = "cifar-fs" if next(sides, STYLES["miniimagenet"].size) <= 32 else "miniimagenet"
        self.style_name, self.style = style, STYLES[style]
        self.size = self.style.size

    def _set(self, classes: dict[tuple[str, str], list[Path]]) -> None:
        self._classes = classes
        self.paths = [path for files in classes.values() for path in files]
        self.labels = torch.tensor([c for c, files in enumerate(classes.values()) for _ in files])
        self.class_split = torch.tensor([SPLITS[split] for split, _ in classes], dtype=torch.uint8)
        self.class_names = tuple(f"{split}/{name}" for split, name in classes)

    def name(self, index: int) -> str:
        return printable(self.paths[index])

    def fingerprint(self) -> int:
        """By names and sizes of the files: their content takes long to read."""
        crc = 0
        for path in self.paths:
            line = f"{printable(path.relative_to(self.root))} {path.stat().st_size}\n"
            crc = zlib.crc32(line.encode(), crc)
        return crc

    def check(
        self, *, skip_bad: bool = False, workers: int = 0, progress: bool = False, processes: Ranks | None = None
    ) -> None:
        """Decode every image once, so that all that cannot be read are known before anything is done with the others.

        Args:
            skip_bad: leave them out, with a note, and classes that have no other.
            workers: processes that decode; 0: this one.
            processes: of a run, each of which looks at some.

        Raises:
            ValueError: there are such images, all of them named; or with ``skip_bad``, no other.
        """
        ranks = processes or Ranks()
        own = self.paths[ranks.rank :: ranks.size]
        loader = DataLoader(_Faults(own), 64, num_workers=workers, collate_fn=list)
        bar = tqdm(total=len(own), desc="check", unit="image", disable=not progress)
        faults: list[str | None] = []
        for found in loader:
            faults += found
            bar.update(len(found))
        bar.close()
        faults = ranks.gather(faults)
        bad = {path: fault for path, fault in zip(self.paths, faults, strict=True) if fault}
        if not bad:
            return
        named = listing([f"{printable(path)}: {fault}" for path, fault in bad.items()], 1000)
        text = f"{len(bad)} image{'s' if len(bad) > 1 else ''} cannot be read ({named})"
        if not skip_bad:
            raise ValueError(f"{text}; --skip-bad goes on without")
        classes = {key: [path for path in files if path not in bad] for key, files in self._classes.items()}
        gone = [f"{split}/{name}" for (split, name), files in classes.items() if not files]
        if len(gone) == len(classes):
            raise ValueError(f"{self.source}: no image can be read; {text}")
        self._set({key: files for key, files in classes.items() if files})
        lost = f", and with them classes {listing(gone)}" if gone else ""
        self.notes = (*self.notes, f"{self.source}: left out: {text}{lost}")

    def image(self, index: int) -> Image.Image:
        path = self.paths[index]
        try:
            return decode(path)
        except ValueError as error:
            raise ValueError(f"{printable(path)}: not an image that can be read ({error})") from None

    def _stored(self, index: int) -> Image.Image:
        image = self.image(index)
        shorter = min(image.size)
        if max(image.size) > LONGEST * shorter:
            left, top = (max(0, side - LONGEST * shorter) // 2 for side in image.size)
            image = image.crop((left, top, image.width - left, image.height - top))
        if shorter == self.style.stored:
            return image
        width, height = (max(self.size, round(side * self.style.stored / shorter)) for side in image.size)
        return image.resize((width, height), Image.Resampling.BILINEAR)

    def _normalised(self, image: Image.Image) -> Tensor:
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.style.mean, self.style.std))
        return (torch.from_numpy(np.array(image)).permute(2, 0, 1).float() - mean) / std

    def load(self, index: int) -> Tensor:
        image = self._stored(index)
        left, top = ((side - self.size) // 2 for side in image.size)
        return self._normalised(image.crop((left, top, left + self.size, top + self.size)))

    def load_augmented(self, index: int, random: np.random.Generator) -> Tensor:
        image, p = self._stored(index), self.style.padding
        left, top = (int(random.integers(-p, side + p - self.size + 1)) for side in image.size)
        image = image.crop((left, top, left + self.size, top + self.size))  # black outside
        enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
        for i in random.permutation(3):
            image = enhancers[i](image).enhance(float(random.uniform(1 - JITTER, 1 + JITTER)))
        if random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return self._normalised(image)


class _Faults(Dataset[str | None]):
    """What is wrong with each of some files, if anything."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> str | None:
        try:
            decode(self.paths[i])
        except ValueError as error:
            return str(error)
        return None


class _Rows(Dataset[tuple[Tensor, int]]):
    def __init__(
        self,
        images: LabelledImages,
        rows: Sequence[int],
        key: tuple[int, ...] | None,
        prepare: Callable[[Image.Image], Tensor] | None,
    ) -> None:
        self.images, self.rows, self.key, self.prepare = images, rows, key, prepare

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        row = self.rows[i]
        label = int(self.images.labels[row])
        if self.prepare is not None:
            return self.prepare(self.images.image(row)), label
        if self.key is None:
            return self.images.load(row), label
        return self.images.load_augmented(row, np.random.default_rng((*self.key, row))), label


def batches(
    images: LabelledImages,
    rows: Sequence[int],
    batch_size: int,
    *,
    key: tuple[int, ...] | None = None,
    drop_last: bool = False,
    workers: int = 0,
    prepare: Callable[[Image.Image], Tensor] | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches (images [B, channels, H, H] float32, labels [B] int64) of the given rows, in their order.

    Args:
        key: if given, augment; what an image gets is a function of the key and its row, not of the workers.
        workers: processes that decode; 0: this one.
        prepare: from an image to a backbone's own input; without, as the set of images does it.
    """
    if isinstance(images, ArrayImages) and not workers and prepare is None:
        for start in range(0, len(rows), batch_size):
            batch = list(rows[start : start + batch_size])
            if len(batch) == batch_size or not drop_last:
                yield images.load_batch(batch, key), images.labels[batch]
        return
    loader = DataLoader(
        _Rows(images, rows, key, prepare), batch_size, shuffle=False, drop_last=drop_last, num_workers=workers
    )
    yield from loader
