"""``kernelmeta import``: a feature bank from the files of other programs."""

from __future__ import annotations

import argparse
from pathlib import Path

from kernelmeta.command_line import Add, check_outputs, say_of, tell_bank
from kernelmeta.data.importing import import_bank


def add_commands(add: Add) -> None:
    """Adds this command to the parser."""
    command = add(
        "import",
        _import,
        "Turn features and labels from other programs into a feature bank.",
        "import X.npy y.npy --out bank.safetensors",
    )
    command.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help=".npy, .npz, .pt, .safetensors, .csv, .tsv, .parquet, or a folder of Hugging Face's datasets",
    )
    command.option("output", "--out", type=Path, required=True, metavar="BANK", help="the bank to write")
    command.option(
        "data", "--label", metavar="NAME", help="the column or array of the labels (default: label, class, target or y)"
    )
    command.option(
        "data",
        "--split",
        help="shares of the classes for train/val/test (default: 60/20/20; one class or two are all for training)",
    )
    command.option("data", "--seed", type=int, default=0, help="seed of the split (default: 0)")
    command.option("run", "--quiet", action="store_true", help="no progress bar")


def _import(args: argparse.Namespace) -> None:
    check_outputs({"--out": args.out}, args.files)
    if args.out.suffix.lower() not in ("", ".safetensors"):
        raise ValueError(f"--out: {args.out}: expected a name that ends with .safetensors, as a bank is")
    bank = import_bank(
        args.files, args.out, label=args.label, split=args.split, seed=args.seed, progress=not args.quiet,
        say=say_of(args),
    )  # fmt: skip
    tell_bank(args.out, bank)
