"""The command ``demo``: experiments, each with its numbers, settings, table and plot in a folder."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from kernelmeta.command_line import Add, run_folder, say_of
from kernelmeta.data.files import read_json, write_json
from kernelmeta.training import runs

# Where ``run(out, quick=..., say=...)`` is, which returns a table, and what it is about.
DEMOS = {
    "graceful": ("kernelmeta.graceful.demo", "successors that keep what the old model got right"),
    "double-descent": ("kernelmeta.linear.double_descent", "test loss over the width, through interpolation"),
    "ntk": ("kernelmeta.linear.width", "networks and their linearisations, over the width"),
    "lqf": ("kernelmeta.linear.lqf_demo", "linear-quadratic fine-tuning beside the whole network's"),
    "spinning-lines": ("kernelmeta.demos.spinning_lines", "slopes guessed from unlabelled rows, against the posterior"),
    "domains": ("kernelmeta.demos.domains", "digits of a domain that no training saw, a minibatch at a time"),
    "proportions": ("kernelmeta.demos.proportions", "rows whose classes' shares are known, counted or of bags"),
    "certificate": ("kernelmeta.linear.certificates", "convergence that is certain, and what happens"),
}


def add_commands(add: Add) -> None:
    """Adds this command to the parser."""
    command = add("demo", _demo, "Experiments on data that come with packages.", "demo double-descent --quick")
    command.add_argument(
        "name",
        choices=list(DEMOS),
        metavar="NAME",
        help="; ".join(f"{name}: {about}" for name, (_, about) in DEMOS.items()),
    )
    command.option("run", "--quick", action="store_true", help="short: to see that it runs, and roughly what comes")
    command.option("run", "--out", type=Path, metavar="DIR", help="folder (default: a new one below runs/)")
    command.option("run", "--threads", type=int, help="threads of PyTorch (default: its own choice)")
    command.option("run", "--quiet", action="store_true", help="no lines about the progress")
    command.set_defaults(resume=False, device="cpu", workers=0)


def _demo(args: argparse.Namespace) -> None:
    run: Callable[..., str] = import_module(DEMOS[args.name][0]).run
    out = run_folder(args, f"demo-{args.name}")
    with runs.claimed(out):
        mark = {"command": f"demo {args.name}", "quick": args.quick}
        if (out / runs.CONFIG).exists() and read_json(out / runs.CONFIG) != mark:
            raise ValueError(f"out: {out} already holds a demo with other settings, or a run; give another folder")
        write_json(out / runs.CONFIG, mark)
        text = run(out, quick=args.quick, say=(lambda line: None) if args.quiet else say_of(args))
    print(text, end="")
    print(f"{out}")
