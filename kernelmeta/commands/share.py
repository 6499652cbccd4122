"""``kernelmeta share``: a trained learner in a folder for others."""

from __future__ import annotations

import argparse
from pathlib import Path

from kernelmeta.command_line import Add, at_option
from kernelmeta.data.files import read_json
from kernelmeta.nn.pretrained import CONFIG, Pretrained
from kernelmeta.training.loading import load_learner
from kernelmeta.training.model_card import model_card
from kernelmeta.training.runs import RESULTS, WHERE


def add_commands(add: Add) -> None:
    """Adds this command to the parser."""
    command = add(
        "share",
        _share,
        "Write a trained learner to a folder for others: weights, settings and a model card.",
        "share runs/one --out shared/",
    )
    command.add_argument("checkpoint", metavar="RUN|CHECKPOINT", help="what train made, or a published checkpoint")
    command.option("output", "--out", type=Path, required=True, metavar="DIR", help="the folder to write")
    at_option(command)


def _share(args: argparse.Namespace) -> None:
    learner, settings = load_learner(args.checkpoint, args.at)
    if not isinstance(learner, Pretrained):
        raise ValueError(f"{args.checkpoint}: {settings['learner']} is a whole network, which cannot be shared")
    if (args.out / CONFIG).exists() and "command" in read_json(args.out / CONFIG):
        raise ValueError(f"--out: {args.out} holds a run")
    results_file = Path(args.checkpoint) / RESULTS
    results = read_json(results_file) if results_file.exists() else None
    if results is not None and results.get("at") != settings.get("at"):
        results = None  # those of other weights
    # Where the data were is nobody else's business.
    kept = {name: value for name, value in settings.items() if name not in WHERE}
    learner.save_pretrained(args.out, settings=kept, card=model_card(type(learner).__name__, kept, results))
    print(f"{args.out}: {type(learner).__name__}" + ("" if results else "; its card has no accuracy"))
