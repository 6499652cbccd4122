"""``kernelmeta extract``: a feature bank from images."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from kernelmeta.command_line import HELP, PRETRAIN_HELP, Add, machine_options, reading, tell_bank
from kernelmeta.data.counter import check_seed
from kernelmeta.data.words import printable
from kernelmeta.training.backbones import BACKBONES, load_backbone, make_backbone
from kernelmeta.training.extraction import extract
from kernelmeta.training.sources import open_images


def add_commands(add: Add) -> None:
    """Adds this command to the parser."""
    command = add(
        "extract",
        _extract,
        "Turn images into a feature bank.",
        "extract photos/ --weights runs/backbone/checkpoint.safetensors --out bank.safetensors",
    )
    command.add_argument("data", metavar="FOLDER|glyphs", help="a folder with train/, val/ and test/, or glyphs")
    command.option("data", "--backbone", help=f"{', '.join(BACKBONES)}; a checkpoint of pretrain says it itself")
    command.option("data", "--weights", metavar="FILE", help=HELP["weights"] + " (default: untrained)")
    command.option("data", "--style", help=PRETRAIN_HELP["style"])
    command.option("run", "--seed", type=int, default=0, help="seed of untrained weights (default: 0)")
    command.option("output", "--out", type=Path, required=True, metavar="FILE", help="the bank to write")
    machine_options(command)


def _extract(args: argparse.Namespace) -> None:
    images = open_images(args.data, args.style)
    if args.weights is not None:
        backbone, name = load_backbone(args.weights, args.backbone, images.channels, images.size)
        source = f"{images.source}, {name}, weights of {printable(args.weights)}"
    else:
        check_seed(args.seed)
        torch.manual_seed(args.seed)
        name = args.backbone or "conv4"
        backbone = make_backbone(name, images.channels, images.size)
        source = f"{images.source}, {name}, untrained, seed {args.seed}"
    bank = extract(images, backbone, source, device=args.device, **reading(args))
    bank.save(args.out)
    tell_bank(args.out, bank)
