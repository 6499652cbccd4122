"""Typefaces for the Glyphs data set: fetched from Debian's archive, with family, style, licence and coverage."""

from __future__ import annotations

import hashlib
import logging
import re
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fontTools.ttLib import TTCollection, TTFont, TTLibError

PACKAGES = Path(__file__).with_name("glyph_packages.txt").read_text().split()

# What a face says of its licence in its name table; the first that matches names it. A face that says
# nothing, or that mentions the GPL and no more liberal licence, is not shipped.
LICENCES = {
    "SIL Open Font License": r"open font licen[cs]e|\bOFL\b",
    "Apache License 2.0": r"apache",
    "GPL": r"\bGPL|general public licen[cs]e",
    "Bitstream Vera": r"bitstream",
    "GUST Font License": r"gust font licen[cs]e",
    "MIT": r"permission is hereby granted, free of charge",
    "public domain": r"public domain",
}
SHIPPABLE = frozenset(LICENCES) - {"GPL"}

# Their letters stand on key caps.
UNFIT_FAMILIES = {"Linux Biolinum Keyboard O"}

_STYLE_WORDS = re.compile(
    r"\b((semi|demi|extra|ultra)?-?(condensed|bold|light|black|expanded)|cond|thin|medium|regular|heavy|book"
    r"|italic|oblique|ui)\b",
    re.IGNORECASE,
)


class Face(NamedTuple):
    """One typeface in one style."""

    path: Path
    index: int  # in a collection
    package: str
    family: str
    style: str
    licence: str | None  # a key of LICENCES
    characters: frozenset[int]

    @property
    def name(self) -> str:
        return f"{self.family} {self.style}"


def download(packages: list[str], folder: Path) -> None:
    """Fetches packages with apt-get and unpacks each into folder/<package>; installs nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [package for package in packages if not (folder / package).is_dir()]
    if wanted:
        subprocess.run(["apt-get", "download", "-q", *wanted], cwd=folder, check=True)
    for archive in sorted(folder.glob("*.deb")):
        subprocess.run(["dpkg", "-x", archive, folder / archive.name.split("_")[0]], check=True)
        archive.unlink()


def find_faces(folder: Path) -> list[Face]:
    """The faces under folder/<package>/, the first style of every family before the second of any.

    The order is a shuffle that depends on names alone, so it is the same everywhere.
    """
    logging.getLogger("fontTools").setLevel(logging.ERROR)
    families: dict[str, dict[str, Face]] = defaultdict(dict)
    for package in sorted(path for path in folder.iterdir() if path.is_dir()):
        for path in sorted(package.rglob("*")):
            if path.suffix.lower() in (".ttf", ".otf", ".ttc") and not path.is_symlink():
                for face in _faces_of(path, package.name):
                    if face.family not in UNFIT_FAMILIES:
                        families[_plain(face.family)].setdefault(face.name, face)
    ranked = [
        (rank, _shuffled(family), face)
        for family, faces in families.items()
        for rank, face in enumerate(sorted(faces.values(), key=lambda face: _shuffled(face.name)))
    ]
    return [face for _, _, face in sorted(ranked, key=lambda entry: entry[:2])]


def family_of(face: Face) -> str:
    """The family without width and weight, so that "DejaVu Sans Condensed" counts as "DejaVu Sans"."""
    return _plain(face.family)


def _plain(family: str) -> str:
    return " ".join(_STYLE_WORDS.sub(" ", family).split()) or family


def _shuffled(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def _faces_of(path: Path, package: str) -> Iterator[Face]:
    try:
        fonts = TTCollection(path).fonts if path.suffix.lower() == ".ttc" else [TTFont(path, lazy=True)]
        for index, font in enumerate(fonts):
            names = font["name"]
            said = " ".join(names.getDebugName(key) or "" for key in (13, 14, 0, 1))  # licence, URL, copyright, family
            licence = next((name for name, how in LICENCES.items() if re.search(how, said, re.I)), None)
            yield Face(
                path,
                index,
                package,
                (names.getDebugName(16) or names.getDebugName(1) or path.stem).strip(),
                (names.getDebugName(17) or names.getDebugName(2) or "Regular").strip(),
                licence,
                frozenset(font.getBestCmap() or {}),
            )
    except (TTLibError, KeyError, AssertionError) as error:
        print(f"skipped {path.name}: {error}")
