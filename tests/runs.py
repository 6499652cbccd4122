"""A bank and images on which learning takes seconds, and runs of the command, in a process of their own too."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import torch
from PIL import Image

from kernelmeta.cli import main
from kernelmeta.data import FeatureBank

TRAIN = ("train", "--way", "3", "--query", "4", "--episodes", "300", "--inner-lr", "0.01", "--quiet")
COMPARE = (
    "compare", "--way", "3", "--query", "4", "--shots", "1", "--learners", "prototypes,soft_kmeans,sib", "--quick",
)  # fmt: skip
LITTLE = ("--episodes", "64", "--trial-episodes", "32", "--validation-episodes", "20", "--eval-episodes", "30")


def make_bank(classes: tuple[int, int, int] = (12, 6, 6), samples: int = 20, D: int = 24) -> FeatureBank:
    """Gaussian classes in all directions, most of their spread in a few of them."""
    generator = torch.Generator().manual_seed(0)
    C = sum(classes)
    spread = torch.ones(D)
    spread[: D // 3] = 3
    means = torch.randn(C, 1, D, generator=generator)
    features = (means + spread * 0.6 * torch.randn(C, samples, D, generator=generator)).flatten(0, 1)
    split = torch.tensor([0] * classes[0] + [1] * classes[1] + [2] * classes[2], dtype=torch.uint8)
    names = tuple(f"class {c}" for c in range(C))
    return FeatureBank(features, torch.arange(C).repeat_interleave(samples), split, names, "a test")


def start(*args: object, launcher: tuple[str, ...] = (), **options) -> subprocess.Popen[str]:
    """``python -m kernelmeta <args>`` in a process of its own, with one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [sys.executable, "-m", *launcher, *(("-m",) if launcher else ()), "kernelmeta", *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **options,
    )


def refused(capsys, *args: object) -> str:
    """Runs a command that must end with 2 and one line on stderr; returns the line."""
    capsys.readouterr()
    try:
        code = main([str(arg) for arg in args])
    except SystemExit as stopped:
        code = stopped.code
    errors = capsys.readouterr().err.strip()
    assert code == 2, errors
    assert "\n" not in errors
    assert errors.startswith("kernelmeta")
    return errors


def draw_images(root):
    """Three classes a split, six images of 32 x 32 each: noise around a colour."""
    random = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for name in ("a", "b", "c"):
            (root / split / name).mkdir(parents=True)
            tint = random.integers(0, 200, 3)
            for i in range(6):
                pixels = (tint + random.integers(0, 50, (32, 32, 3))).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
