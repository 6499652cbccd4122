"""``kernelmeta predict``: labels for rows or images from a few that are labelled."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from kernelmeta.command_line import HELP, Add, at_option, check_outputs, feature_options, machine_options, say_of
from kernelmeta.data.words import counted
from kernelmeta.training.answers import TAKE_PROPORTIONS, UNTRAINED, method_or_weights
from kernelmeta.training.foreign_backbones import is_foreign
from kernelmeta.training.prediction import Backbone, backbone_of, check_folders, predict, read_rows
from kernelmeta.training.proportions import parse_proportions
from kernelmeta.training.report import write_report


def add_commands(add: Add) -> None:
    """Adds this command to the parser."""
    command = add(
        "predict",
        _predict,
        "Label rows or images from a few that are labelled.",
        "predict soft_kmeans --support labelled.csv --query rows.csv --out labels.csv",
    )
    rows = "CSV, Parquet, NumPy, a bank, or a folder"
    command.add_argument("what", metavar="RUN|METHOD", help=f"what train made, or one of {', '.join(UNTRAINED)}")
    command.option(
        "data", "--support", required=True, metavar="ROWS", help=f"the labelled rows: {rows} of class folders"
    )
    command.option("data", "--query", required=True, metavar="ROWS", help=f"the rows to label: {rows} of images")
    command.option("output", "--out", type=Path, required=True, metavar="FILE", help="the labels to write, CSV")
    command.option("output", "--report", type=Path, metavar="FILE", help="write a page about them too, HTML")
    command.option(
        "data", "--label", metavar="NAME", help="the column or array of the labels (default: label, class, target or y)"
    )
    feature_options(command)
    at_option(command)
    command.option("learner", "--alone", action="store_true", help="judge each row alone, not all of them together")
    command.option(
        "learner",
        "--proportions",
        metavar="LABEL=SHARE,...",
        help=f"the classes' shares of the query rows, which sum to 1; for {', '.join(TAKE_PROPORTIONS)}",
    )
    command.option(
        "learner",
        "--counts",
        metavar="LABEL=NUMBER,...",
        help="instead of --proportions: how many rows of each class a sample of such rows had",
    )
    command.option("data", "--weights", metavar="FILE", help=HELP["weights"] + " (default: those of the run)")
    command.option("data", "--backbone", help=HELP["backbone"])
    machine_options(command)


def _predict(args: argparse.Namespace) -> None:
    proportions = None if args.proportions is None else parse_proportions(args.proportions)
    counts = None if args.counts is None else parse_proportions(args.counts, "counts")
    weights, name = args.weights, args.backbone
    if weights is None and not is_foreign(name):
        weights, name = backbone_of(args.what)
        if args.backbone is not None and args.backbone != name:
            own = f"; that of the run is {name}" if name else ""
            raise ValueError(f"--backbone: {args.backbone} needs --weights{own}")
    if args.out.suffix.lower() not in ("", ".csv"):
        raise ValueError(f"--out: {args.out}: labels are written as CSV, so expected a name that ends with .csv")
    backbone = Backbone(weights, name, args.device, args.workers, not args.quiet, args.skip_bad)
    check_outputs({"--out": args.out, "--report": args.report}, [args.support, args.query])
    method_or_weights(args.what)
    check_folders(args.support, args.query)
    support = read_rows(args.support, label=args.label, backbone=backbone, say=say_of(args))
    query = read_rows(
        args.query, label=args.label, labelled=False, backbone=backbone, columns=support.columns, say=say_of(args)
    )
    try:
        answers = predict(
            args.what, support, query, at=args.at, transductive=not args.alone, proportions=proportions,
            counts=counts, transform=args.transform, center=args.center, device=args.device,
        )  # fmt: skip
    except ValueError as error:
        raise ValueError(_as_options(str(error))) from None
    if answers.doubt is not None:
        answers = replace(answers, doubt=_as_options(answers.doubt))
    answers.write_csv(args.out)
    told = {
        "labelled rows from": args.support, "rows to label from": args.query, "backbone": args.backbone,
        "weights of the backbone": args.weights,
    }  # fmt: skip
    answers.settings.update({name: value for name, value in told.items() if value is not None})
    if args.report is not None:
        write_report(args.report, answers)
    if answers.mixed is not None:
        say_of(args)(f"warning: {answers.mixed}")
    if answers.doubt is not None:
        say_of(args)(f"warning: {answers.doubt}")
    if answers.which:
        say_of(args)(f"weights of {args.what}: {answers.which}")
    right = ""
    if answers.accuracy is not None:
        right = f"; {answers.accuracy:.1f} % of those that were labelled are right{answers.apart}"
    print(f"{args.out}: {counted(len(query.ids), 'label')} by {answers.method}{right}")


def _as_options(text: str) -> str:
    """Arguments as the options that they are here."""
    return text.replace("transductive=False", "--alone").replace("proportions=", "--proportions")
