"""``kernelmeta extract``: a feature bank from images."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from kernelmeta.command_line import Add, check_outputs, machine_options, reading, say_of, tell_bank
from kernelmeta.data.counter import check_seed
from kernelmeta.data.words import printable
from kernelmeta.ranks import ranks
from kernelmeta.training.backbones import BACKBONES, load_backbone, make_backbone, trained_style
from kernelmeta.training.extraction import extract
from kernelmeta.training.foreign_backbones import NAMES, ImageBackbone, is_foreign
from kernelmeta.training.sources import open_images

_PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_commands(add: Add) -> None:
    """Adds this command to the parser."""
    command = add(
        "extract",
        _extract,
        "Turn images into a feature bank.",
        "extract photos/ --backbone timm:vit_small_patch14_dinov2.lvd142m --out bank.safetensors",
    )
    command.add_argument(
        "data",
        metavar="FOLDER|glyphs",
        help="a folder of class folders, or of train/, val/ and test/ with these in them; or glyphs",
    )
    command.option(
        "data", "--backbone",
        help=f"{', '.join(BACKBONES)}, or of another library {NAMES} (default: what a checkpoint of pretrain says of"
        " itself; conv4 without --weights)",
    )  # fmt: skip
    command.option(
        "data",
        "--weights",
        metavar="FILE",
        help="of the backbone: a checkpoint of pretrain, or published ones (default: those that"
        " timm:, torchvision: and hf: come with; others are untrained)",
    )
    command.option(
        "data",
        "--style",
        help="size and normalisation: miniimagenet (80 pixels) or cifar-fs (32) (default: as the backbone of --weights"
        " was trained, else by the size of the first image)",
    )
    command.option("run", "--seed", type=int, default=0, help="seed of untrained weights (default: 0)")
    command.option(
        "run", "--precision", choices=list(_PRECISIONS), default="float32",
        help="what the backbone computes in, and what is kept (default: float32)",
    )  # fmt: skip
    command.option(
        "output",
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help="the bank to write; until it is whole, features are kept in FILE.parts, from which the same command"
        " goes on after a kill",
    )
    machine_options(command)


def _extract(args: argparse.Namespace) -> None:
    check_outputs({"--out": args.out}, [])
    with ranks(args.device) as processes:
        images = open_images(args.data, args.style or trained_style(args.weights))
        trained = args.weights is not None or is_foreign(args.backbone)
        if trained:
            eyes = load_backbone(args.weights, args.backbone, images.channels, images.size)
            source = f"{images.source}, {eyes.name}"
            source += f", weights of {printable(args.weights)}" if args.weights is not None else ""
        else:
            check_seed(args.seed)
            torch.manual_seed(args.seed)
            name = args.backbone or "conv4"
            eyes = ImageBackbone(make_backbone(name, images.channels, images.size), name)
            source = f"{images.source}, {name}, untrained, seed {args.seed}"
        parts = args.out.with_name(args.out.name + ".parts")
        settings = reading(args) if processes.first else reading(args) | {"progress": False, "say": lambda line: None}
        bank = extract(
            images, eyes.module, source, name=eyes.name, prepare=eyes.prepare, device=args.device,
            dtype=_PRECISIONS[args.precision], parts=parts, processes=processes, **settings,
        )  # fmt: skip
        if processes.first:
            bank.save(args.out)
            tell_bank(args.out, bank)
            if not trained:
                say_of(args)("warning: the backbone is untrained; with --weights its features are better")
