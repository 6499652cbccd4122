"""What updates keep and cost: ``python -m benchmarks.graceful flips|compatible|search --data glyphs-large.npz``.

Trains everything into --out, going on from what is there, and writes docs/comparisons/graceful-<experiment>.json, .md
and .png. ``tools/build_glyphs.py --large`` renders the data.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.metadata import collect
from kernelmeta.data.files import write_json, write_text
from kernelmeta.graceful.demo import EXPERIMENTS, plot, table

RESULTS = Path(__file__).parents[1] / "docs/comparisons"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("experiment", choices=list(EXPERIMENTS))
    parser.add_argument("--data", default="glyphs", help="the large set's file (default: the built-in glyphs)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the models")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=JSON", help="other settings of the experiment")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    kind, run = EXPERIMENTS[arguments.experiment]
    change: dict[str, Any] = {name: json.loads(value) for name, _, value in (s.partition("=") for s in arguments.set)}
    change = {name: tuple(value) if isinstance(value, list) else value for name, value in change.items()}
    settings = dataclasses.replace(kind(data=arguments.data), **change)
    arguments.out.mkdir(parents=True, exist_ok=True)
    results = run(settings, arguments.out, lambda line: print(line, file=sys.stderr, flush=True))
    results["settings"]["data"] = Path(arguments.data).name
    results["machine"] = collect()
    name = f"graceful-{arguments.experiment}"
    write_json(arguments.results / f"{name}.json", results)
    plot(arguments.experiment, arguments.results / f"{name}.png", results, arguments.out)
    text = table(arguments.experiment, results)
    write_text(arguments.results / f"{name}.md", text)
    print(text, end="")


if __name__ == "__main__":
    main()
