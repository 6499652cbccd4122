"""``kernelmeta pretrain``: a backbone from images."""

from __future__ import annotations

import argparse
import sys

from kernelmeta.command_line import (
    PRETRAIN_HELP,
    Add,
    given_settings,
    machine_options,
    nothing_to_do,
    run_folder,
    say_of,
    settings_options,
)
from kernelmeta.data.files import write_json
from kernelmeta.training import runs
from kernelmeta.training.checkpoint import CHECKPOINT
from kernelmeta.training.plots import training_plot
from kernelmeta.training.pretraining import FREE, PretrainConfig, Pretrainer
from kernelmeta.training.sources import open_images

# The published settings are for 600 images a class; the glyphs have 24, and on the validation classes longer
# training is worse.
_GLYPHS = {"epochs": 6, "warmup_epochs": 1, "milestone": 4}


def add_commands(add: Add) -> None:
    """Adds this command to the parser."""
    command = add(
        "pretrain",
        _pretrain,
        "Train a backbone as a classifier of its classes.",
        "pretrain photos/ --backbone wrn28_10 --out runs/backbone",
    )
    command.add_argument(
        "data", metavar="FOLDER|glyphs", help="a folder with train/, val/ and test/, glyphs, or a file of glyphs (.npz)"
    )
    settings_options(command, PretrainConfig, PRETRAIN_HELP, {"data": None})
    machine_options(command)


def _pretrain(args: argparse.Namespace) -> None:
    given = given_settings(args, PretrainConfig)
    out = run_folder(args, f"pretrain-{given.get('backbone', 'conv4')}")
    with runs.claimed(out):
        settings, checkpoint = runs.prepare(out, "pretrain", given, args.resume, FREE)
        config = PretrainConfig.from_dict({**(_GLYPHS if settings["data"] == "glyphs" else {}), **settings})
        images = open_images(config.data, config.style)
        images.check(skip_bad=args.skip_bad, workers=args.workers, progress=not args.quiet)
        trainer = Pretrainer(config, images, device=args.device, workers=args.workers)
        if checkpoint:
            trainer.restore(checkpoint)
            if config.epochs < checkpoint.state["config"]["epochs"] and config.epochs <= trainer.epoch:
                return nothing_to_do(out, "epochs", trainer.epoch, config.epochs)
        for note in images.notes:
            say_of(args)(note)
        runs.write_config(out, "pretrain", config.to_dict())
        with runs.scalars(out, trainer.epoch) as report:
            finished = trainer.run(out, report=report, progress=not args.quiet)
        if not finished:
            print(f"stopped after {trainer.epoch} epochs; to go on: --out {out} --resume", file=sys.stderr)
            raise KeyboardInterrupt
        training_plot(out / "training.png", "epochs", *zip(*trainer.history, strict=True))
        write_json(
            out / runs.RESULTS,
            {"epochs": trainer.epoch, **dict(zip(("loss", "accuracy"), trainer.history[-1][1:], strict=True))},
        )
    print(f"{out / CHECKPOINT}: accuracy {trainer.history[-1][2]:.1f} % on its own classes")
