"""What the commands have in common: settings that were given, run folders, lines about the progress."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from kernelmeta.training import runs

# Settings of a training of backbones, as the commands' help tells of them.
PRETRAIN_HELP = {
    "style": "size, normalisation and augmentation: miniimagenet (80 pixels) or cifar-fs (32); by size if not given",
    "epochs": "passes over the images",
    "warmup_epochs": "epochs in which the learning rate rises",
    "milestone": "epoch after which the learning rate is a tenth",
    "batch_size": "images in each step",
    "holdout": "share of each class's images (of the typeface families, of glyphs) that is kept to judge by",
    "lr": "learning rate of the optimizer",
    "momentum": "(Nesterov) momentum of SGD",
    "weight_decay": "weight decay of the optimizer",
}


def given_settings(args: argparse.Namespace, config: type[Any]) -> dict[str, Any]:
    """The settings of a dataclass that the user gave."""
    found = {field.name: getattr(args, field.name) for field in fields(config) if hasattr(args, field.name)}
    return runs.absolute(found)


def reading(args: argparse.Namespace) -> dict[str, Any]:
    """How images and banks are read."""
    return {"workers": args.workers, "progress": not args.quiet, "skip_bad": args.skip_bad, "say": say_of(args)}


def check_outputs(outputs: Mapping[str, Path | None], inputs: Sequence[str]) -> None:
    """Raise a ValueError where an output would take the place of an input, or of another output."""
    taken = {os.path.realpath(name): name for name in inputs if os.path.isfile(name)}
    for option, path in outputs.items():
        if path is None or (path.exists() and not path.is_file()):  # a device or a pipe takes many
            continue
        real = os.path.realpath(path)
        if real in taken:
            raise ValueError(f"{option}: {path} would take the place of {taken[real]}")
        taken[real] = f"what {option} writes"


def say_of(args: argparse.Namespace) -> Callable[[str], None]:
    """A function that shows a line on stderr, with the command's name."""

    def say(line: str) -> None:
        print(f"kernelmeta {args.command}: {' '.join(line.splitlines())}", file=sys.stderr, flush=True)

    return say


def run_folder(args: argparse.Namespace, name: str) -> Path:
    """``--out``, or a new folder below runs/. Raises ValueError where a run is to be gone on with and not named."""
    if args.out is not None:
        return Path(args.out)
    if args.resume:
        raise ValueError("--resume: give --out DIR, the run to go on with")
    folders = [Path("runs") / name, *(Path("runs") / f"{name}-{i}" for i in range(2, 10_000))]
    return next(folder for folder in folders if not folder.exists())
