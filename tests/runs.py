"""A bank on which learning takes seconds, and runs of the command in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys

import torch

from kernelmeta.data import FeatureBank


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
