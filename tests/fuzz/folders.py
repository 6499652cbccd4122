"""The classes of an image folder, however much else lies in it, and each thing that is left out counted once."""

# ruff: noqa: PT017 (what an error says is part of the case)

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
from PIL import Image

from kernelmeta.data.images import FolderImages

SPLITS = ("train", "val", "test")
SYSTEM = (".git", ".ipynb_checkpoints", "__MACOSX", "@eaDir", "Thumbs.db", ".DS_Store", "._0.png", "desktop.ini")
OTHER = ("a.txt", "labels.csv", "noextension", "movie.mp4", "b.npy", "c.PDF")
IMAGES = (".png", ".PNG", ".jpg", ".jfif", ".gif", ".webp", ".bmp", ".tiff")
NAMES = ("ant", "bee", "Zebra", "ünïcode", "with space", "7", "n01532829", "two\nlines", "quote'")


def check(random: np.random.Generator, folder: Path) -> None:
    root = folder / "data"
    root.mkdir()
    expected: dict[str, list[str]] = {}
    bad: list[str] = []
    left = 0
    for split in SPLITS:
        if random.random() < 0.15 and (root / "train").exists():
            continue
        for name in random.choice(NAMES, int(random.integers(0, 5)), replace=False):
            place = root / split / str(name)
            place.mkdir(parents=True)
            left += junk(random, place)
            files = []
            for i in range(int(random.integers(0, 4))):
                path = place / f"{i}{random.choice(IMAGES)}"
                if random.random() < 0.1:
                    path.write_bytes(random.bytes(int(random.integers(0, 50))))
                    bad.append(str(path))
                else:
                    kind = {".jpg": "JPEG", ".jfif": "JPEG", ".tiff": "TIFF"}.get(path.suffix, path.suffix[1:].upper())
                    Image.new("RGB", (9, 9), "red").save(path, kind)
                files.append(str(path))
            if files:
                expected[f"{split}/{name}"] = sorted(files)
            else:
                left += 1
        if (root / split).exists():
            left += junk(random, root / split)
    left += junk(random, root)
    case = f"{expected}, bad {bad}, {left} left out"
    try:
        images = FolderImages(root, "cifar-fs")
    except ValueError as error:
        assert not expected and "expected train/, val/ or test/" in str(error), (case, error)
        return
    assert sorted(images.class_names) == sorted(expected), case
    found = {name: [] for name in images.class_names}
    for path, label in zip(images.paths, images.labels.tolist(), strict=True):
        found[images.class_names[label]].append(str(path))
    assert {name: sorted(files) for name, files in found.items()} == expected, case
    lines = [note for note in images.notes if "left out" in note]
    counted = sum(int(n) for line in lines for n in re.findall(r"(?:left out: |; )(\d+) ", line))
    assert counted == left, (case, lines)
    good = {name: [f for f in files if f not in bad] for name, files in expected.items()}
    try:
        images.check()
        assert not bad, case
    except ValueError as error:
        assert bad and all(path in str(error) for path in bad), (case, error)
    try:
        images.check(skip_bad=True)
        assert sorted(map(str, images.paths)) == sorted(f for files in good.values() for f in files), case
        assert set(images.class_names) == {name for name, files in good.items() if files}, case
    except ValueError as error:
        assert not any(good.values()), (case, error)


def junk(random: np.random.Generator, place: Path) -> int:
    """Puts things there that are no images; returns how many."""
    n = 0
    for name in random.choice(SYSTEM + OTHER, int(random.integers(0, 4)), replace=False):
        path = place / str(name)
        if str(name) in SYSTEM[:4]:
            path.mkdir()
            if random.random() < 0.5:
                Image.new("RGB", (9, 9)).save(path / "0.png")
        else:
            path.write_bytes(b"\0\5\26\7")
        n += 1
    if random.random() < 0.1 and place.parent.name in SPLITS:
        os.mkfifo(place / "pipe.png")
        n += 1
    return n
