"""``kernelmeta predict``: labels for rows or images from a few that are labelled."""

from __future__ import annotations

import argparse
from pathlib import Path

from kernelmeta.command_line import HELP, Add, at_option, check_outputs, machine_options, say_of
from kernelmeta.training.answers import UNTRAINED
from kernelmeta.training.prediction import Backbone, backbone_of, predict, read_rows
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
        "data", "--label", metavar="NAME", help="the column or array of the labels (default: label, class, y)"
    )
    at_option(command)
    command.option("learner", "--alone", action="store_true", help="judge each row alone, not all of them together")
    command.option("data", "--weights", metavar="FILE", help=HELP["weights"] + " (default: those of the run)")
    command.option("data", "--backbone", help=HELP["backbone"])
    machine_options(command, skips=False)


def _predict(args: argparse.Namespace) -> None:
    weights, name = (args.weights, args.backbone) if args.weights is not None else backbone_of(args.what)
    backbone = Backbone(weights, name, args.device, args.workers, not args.quiet)
    check_outputs({"--out": args.out, "--report": args.report}, [args.support, args.query])
    support = read_rows(args.support, label=args.label, backbone=backbone, say=say_of(args))
    query = read_rows(
        args.query, label=args.label, labelled=False, backbone=backbone, columns=support.columns, say=say_of(args)
    )
    answers = predict(args.what, support, query, at=args.at, transductive=not args.alone, device=args.device)
    answers.write_csv(args.out)
    if args.report is not None:
        write_report(args.report, answers)
    if answers.doubt is not None:
        say_of(args)(f"warning: {answers.doubt.replace('transductive=False', '--alone')}")
    if answers.which:
        say_of(args)(f"weights of {args.what}: {answers.which}")
    right = "" if answers.accuracy is None else f"; {answers.accuracy:.1f} % of those that were labelled are right"
    print(f"{args.out}: {len(query.ids)} labels by {answers.method}{right}")
