"""``kernelmeta import``: a feature bank from the files of other programs."""

from __future__ import annotations

import argparse
from pathlib import Path

from kernelmeta.command_line import Add, check_outputs, say_of, tell_bank
from kernelmeta.data.importing import import_bank


def add_commands(add: Add) -> None:
    """Adds this command to the parser."""
    command = add("import", _import, "Turn features and labels from other programs into a feature bank.")
    command.add_argument("files", nargs="+", metavar="FILE", help=".npy, .npz, .pt, .safetensors, .csv, .tsv, .parquet")
    command.add_argument("--out", type=Path, required=True, metavar="BANK", help="the bank to write")
    command.add_argument("--label", metavar="NAME", help="the column or array of the labels (default: label, class, y)")
    command.add_argument(
        "--split", default="60/20/20", help="shares of the classes for train/val/test (default: 60/20/20)"
    )
    command.add_argument("--seed", type=int, default=0, help="seed of the split (default: 0)")
    command.add_argument("--quiet", action="store_true", help="no progress bar")
    command.epilog = "example: kernelmeta import X.npy y.npy --out bank.safetensors"


def _import(args: argparse.Namespace) -> None:
    check_outputs({"--out": args.out}, args.files)
    bank = import_bank(
        args.files, args.out, label=args.label, split=args.split, seed=args.seed, progress=not args.quiet,
        say=say_of(args),
    )  # fmt: skip
    tell_bank(args.out, bank)
