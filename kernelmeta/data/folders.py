"""What lies in a folder of images: splits, classes, files, and what is left out."""

from __future__ import annotations

import os
import re
import stat
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from kernelmeta.data.bank import SPLITS
from kernelmeta.data.class_split import SHARES, parse_shares, split_classes
from kernelmeta.data.decoding import extensions
from kernelmeta.data.words import listing, printable

_FEWEST = 3  # classes of a folder without splits, which are split here

# Folders and files that programs put beside images.
_SYSTEM = {
    "__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found", "thumbs.db",
    "desktop.ini", "__pycache__",
}  # fmt: skip
# What people call splits.
_ALIASES = {
    "train": ("training", "base", "meta_train", "meta-train", "metatrain"),
    "val": ("valid", "validation", "dev", "meta_val", "meta-val", "metaval"),
    "test": ("testing", "eval", "novel", "meta_test", "meta-test", "metatest"),
}


@dataclass
class ImageFolder:
    """A folder with ``train/``, ``val/`` and ``test/`` as it was found.

    Args:
        classes: (split, name) -> its image files, in order.
        notes: lines to show: what was left out, which classes are in two splits.
    """

    root: Path
    classes: dict[tuple[str, str], list[Path]]
    notes: list[str] = field(default_factory=list)


def scan_classes(root: str | os.PathLike[str]) -> ImageFolder:
    """A folder with one folder of images a class, or, of one class without a name, a folder of images and of folders of
    them. Their split is "test".

    Raises:
        OSError: there is no such folder, or it cannot be read.
        ValueError: it holds no image; a class's name is not UTF-8.
    """
    base = Path(root)
    if not base.is_dir():
        raise FileNotFoundError(f"{printable(base)}: no such folder")
    left = _LeftOut(base)
    folders = [entry for entry in left.visible(base) if entry.is_dir()]
    classes = {("test", _utf8(folder)): _images(folder, left) for folder in folders}
    for folder, files in zip(folders, classes.values(), strict=True):
        if not files:
            left.other("class folders without an image", folder, named=True)
    loose = _images(base, _LeftOut(base))
    if loose:
        classes = {("test", ""): [*loose, *(file for files in classes.values() for file in files)]}
    classes = {key: files for key, files in classes.items() if files}
    if not classes:
        raise ValueError(f"{printable(base)}: no images, and no folders of images")
    return ImageFolder(base, classes, [f"{printable(base)}: left out: {note}" for note in left.notes()])


def scan(root: str | os.PathLike[str]) -> ImageFolder:
    """Look into a folder of images. Nothing is decoded.

    Where there is neither train/ nor val/ nor test/, but a folder of images for each of three classes or more, the
    classes are split 60/20/20, alike among large ones and small ones, always in the same way; a note says so.

    Hidden entries, those of systems (``__MACOSX``, ``Thumbs.db``), files that are no images, empty classes and whatever
    lies elsewhere are left out, and counted in a note.

    Raises:
        OSError: there is no such folder, or it cannot be read.
        ValueError: it holds no class of images; a split is called otherwise; a class's name is not UTF-8.
    """
    base = Path(root)
    if not base.is_dir():
        raise FileNotFoundError(f"{printable(base)}: no such folder")
    left = _LeftOut(base)
    others = [entry for entry in left.visible(base) if entry.name not in SPLITS]
    for split in SPLITS:
        _check_spelling(base, split, others)
    if not any((base / split).is_dir() for split in SPLITS):
        flat = _flat(base)
        if flat is not None:
            return flat
    classes: dict[tuple[str, str], list[Path]] = {}
    for split in SPLITS:
        if not (base / split).is_dir():
            continue
        for entry in left.visible(base / split):
            if not entry.is_dir():
                left.other("files outside of class folders", entry)
                continue
            files = _images(entry, left)
            if files:
                classes[split, _utf8(entry)] = files
            else:
                left.other("class folders without an image", entry, named=True)
    for entry in others:
        left.other("folders beside train, val and test" if entry.is_dir() else "files beside them", entry, named=True)
    if not classes:
        raise ValueError(
            f"{printable(base)}: expected train/, val/ or test/ with one folder of images a class, or three of"
            " those without train/, val/ and test/" + "".join(f"; left out: {note}" for note in left.notes())
        )
    notes = [f"{printable(base)}: left out: {note}" for note in left.notes()]
    return ImageFolder(base, classes, notes + _in_two_splits(base, classes))


def _flat(base: Path) -> ImageFolder | None:
    """A folder of class folders, which are split here; None where there are too few of them."""
    left = _LeftOut(base)
    found = {}
    for entry in left.visible(base):
        if not entry.is_dir():
            left.other("files outside of class folders", entry)
        elif files := _images(entry, left):
            found[entry] = files
        else:
            left.other("class folders without an image", entry, named=True)
    if len(found) < _FEWEST:
        return None
    split = split_classes([len(files) for files in found.values()], parse_shares(SHARES)).tolist()
    names = {number: name for name, number in SPLITS.items()}
    # In the order of the splits, as if they were folders.
    order = sorted(zip(split, found, strict=True), key=lambda own: own[0])
    classes = {(names[number], _utf8(entry)): found[entry] for number, entry in order}
    note = (
        f"{printable(base)}: its {len(found)} classes are split {SHARES} into train, val and test; folders of these"
        " names would say otherwise"
    )
    return ImageFolder(base, classes, [note, *(f"{printable(base)}: left out: {line}" for line in left.notes())])


def _images(folder: Path, left: _LeftOut) -> list[Path]:
    files = []
    for entry in left.visible(folder):
        if entry.is_dir():
            left.other("folders within class folders", entry)
        elif entry.suffix.lower() not in extensions():
            left.other(f"files named *{printable(entry.suffix.lower())}", entry)
        elif entry.exists() and not stat.S_ISREG(entry.stat().st_mode):
            left.other("special files (pipes or devices)", entry)
        else:
            files.append(entry)
    return files


def _check_spelling(base: Path, split: str, others: list[Path]) -> None:
    """Raises ValueError if a split is not there, but a folder that looks like it is."""
    if (base / split).is_dir():
        return
    for entry in others:
        if entry.is_dir() and entry.name.lower().strip() in (split, *_ALIASES[split]):
            raise ValueError(f"{printable(entry)}: is this {split}/? Rename it, or move it away")


def _utf8(folder: Path) -> str:
    try:
        folder.name.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{printable(folder)}: the name of this class is not UTF-8; rename the folder") from None
    return folder.name


def _in_two_splits(base: Path, classes: dict[tuple[str, str], list[Path]]) -> list[str]:
    splits: dict[str, list[str]] = defaultdict(list)
    for split, name in classes:
        splits[name].append(split)
    shared = [f"{name!r} ({', '.join(where)})" for name, where in splits.items() if len(where) > 1]
    if not shared:
        return []
    return [f"{printable(base)}: classes of the same name in two splits, which should share none: {listing(shared)}"]


class _LeftOut:
    """Counts what is left out, by kind."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.counts: Counter[str] = Counter()
        self.names: dict[str, list[str]] = defaultdict(list)

    def visible(self, folder: Path) -> list[Path]:
        """The entries of a folder, in order, but for hidden ones and those of systems."""
        entries = sorted(folder.iterdir())
        seen = [p for p in entries if not p.name.startswith(".") and p.name.lower() not in _SYSTEM]
        self.counts["hidden or of a system"] += len(entries) - len(seen)
        return seen

    def other(self, kind: str, entry: Path, named: bool = False) -> None:
        self.counts[kind] += 1
        if named:
            self.names[kind].append(printable(entry.relative_to(self.base)))

    def notes(self) -> list[str]:
        """One line, or none."""
        parts = []
        for kind, n in self.counts.items():
            if n:
                told = re.sub(r"\b(file|folder)s\b", r"\1", kind, count=1) if n == 1 else kind
                parts.append(f"{n} {told}" + (f" ({listing(self.names[kind])})" if self.names[kind] else ""))
        return ["; ".join(parts)] if parts else []
