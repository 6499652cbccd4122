"""The whole grid of sizes: ``python -m benchmarks.grid``.

One line a cell: the time of km.nn.SIB, forward, mean cross entropy and backward; that over its floor; and how many
times longer each peer takes. Cells that would take seconds a call are left out, and said. Half an hour with two cores
and the peers taken by default; writes benchmarks/results/<machine>-<date>-grid-<dtype>.json and .md.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks import counts, floors, metadata
from benchmarks.peers import PEERS
from benchmarks.problem import MODES, Size
from benchmarks.report import DISTURBED, OWN, RESULTS, against_best_peer, measure

GRID = [
    Size(T=T, N=N, S=S, K=K, D=D, dtype=dtype)
    for dtype, T, (N, S), K, D in itertools.product(
        ("float32", "bfloat16"), (1, 8, 64, 512), ((5, 5), (5, 25), (20, 20)), (1, 3, 5, 10, 50), (64, 640, 1600)
    )
]
# FLOPs of a call above which a cell takes too long, its float64 check above all.
MOST_FLOPS = 3e10


def summary(cell: dict[str, Any], ceilings: floors.Ceilings, names: Sequence[str]) -> str:
    """The cell's line."""
    size, peers = cell["size"], cell["peers"]
    floor = ceilings.floor(counts.Work(cell["flops"], cell["bytes"]))
    mine = peers["kernelmeta"]["median"]
    ratios = [f"{peers[n]['times_kernelmeta'][0]:.2f}" if n in peers else "-" for n in names if n != "kernelmeta"]
    shape = (size[key] for key in ("T", "N", "S", "D", "K"))
    return (
        "| " + " | ".join([*map(str, shape), size["dtype"], f"{mine * 1e3:.3f}", f"{mine / floor:.1f}", *ratios]) + " |"
    )


def verdict(cells: Sequence[dict[str, Any]], ceilings: floors.Ceilings) -> list[str]:
    """What holds over all cells."""
    lost = [c for c in cells if min(_peer_ratios(c), default=9) < 1]
    single = [min(_peer_ratios(c)) for c in cells if c["size"]["T"] == 1 and _peer_ratios(c)]
    many = [
        c["peers"]["kernelmeta"]["median"] / ceilings.floor(counts.Work(c["flops"], c["bytes"]))
        for c in cells
        if c["size"]["T"] >= 64
    ]
    lines = [against_best_peer(cells), f"Cells in which a peer is faster: {len(lost)} of {len(cells)}."]
    lines += [f"  {Size(**c['size'])}: {min(_peer_ratios(c)):.2f}" for c in lost]
    if single:
        lines.append(f"T = 1: the best peer takes {min(single):.1f} times as long where that is least.")
    if many:
        within = sum(x <= 2 for x in many)
        lines.append(
            f"T >= 64: {within} of {len(many)} cells within twice the floor, the worst at {max(many):.1f} times."
        )
    return lines


def _peer_ratios(cell: dict[str, Any]) -> list[float]:
    return [found["times_kernelmeta"][0] for name, found in cell["peers"].items() if name not in OWN]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.grid", description=__doc__)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--seconds", type=float, default=0.3, help="for each peer of each cell")
    parser.add_argument("--mode", choices=MODES, default="train")
    parser.add_argument("--peers", default="dual,jax", help=f"of {', '.join(PEERS)}")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--only", default="", help="T=1,K=3: cells of these sizes alone")
    options = parser.parse_args(arguments)
    names = [*OWN, *(n for n in options.peers.split(",") if n)]
    torch.set_num_threads(options.threads)
    only = dict(pair.split("=") for pair in options.only.split(",") if pair)
    sizes = [s for s in GRID if s.dtype == options.dtype and all(getattr(s, k) == int(v) for k, v in only.items())]
    left_out = [s for s in sizes if counts.sib(s, options.mode).flops > MOST_FLOPS]
    facts = metadata.collect()
    ceilings = floors.measure()
    head = ["T", "N", "S", "D", "K", "features", "ms", "x floor", *(n for n in names if n != "kernelmeta")]
    about = (
        f"{facts['processor']}, {options.threads} threads, commit {facts['commit']}, mode {options.mode}; {ceilings}"
    )
    lines = [about, "", "| " + " | ".join(head) + " |", "|" + " ---: |" * len(head)]
    print("\n".join(lines), flush=True)
    cells, notes = [], []
    for size in sizes:
        if size in left_out:
            continue
        # After 50 steps through ReLUs two right float32 gradients may have nothing in common.
        checked_in = "float64" if size.K > 10 else None
        cell, note = measure(size, options.mode, names, seconds=options.seconds, checked_in=checked_in)
        cells.append(cell)
        if note:
            notes.append(f"{size}: {note}")
        lines.append(summary(cell, ceilings, names))
        print(lines[-1], flush=True)
    busy = max((c["others_cpus"] or 0 for c in cells), default=0)
    tail = ["", *verdict(cells, ceilings)]
    tail.append(f"Left out for their length: {', '.join(map(str, left_out)) or 'none'}.")
    if busy > DISTURBED:
        tail.append(f"DISTURBED: other processes kept up to {busy:.2f} CPUs busy.")
    print("\n".join(tail))
    stem = RESULTS / f"{metadata.machine_name()}-{datetime.date.today().isoformat()}-grid-{options.dtype}"
    record = {"metadata": facts, "ceilings": ceilings._asdict(), "disturbed": busy > DISTURBED, "cells": cells}
    stem.with_suffix(".json").write_text(json.dumps(record | {"notes": notes}) + "\n")
    stem.with_suffix(".md").write_text("\n".join([*lines, *tail]) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
