"""The whole grid of sizes: ``python -m benchmarks.grid``.

One line a cell: the time of km.nn.SIB, forward, mean cross entropy and backward; that over its floor; and how many
times longer each peer takes. Cells that would take seconds a call are left out, and said. Half an hour with two cores
and the peers taken by default; writes benchmarks/results/<machine>-<date>-grid-<dtype>-<mode>[-<sizes>].json and .md.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import math
import os
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks import counts, floors, metadata
from benchmarks.peers import OWN, PEERS, parts_of_training
from benchmarks.problem import MODES, Size, draw
from benchmarks.report import DISTURBED, RESULTS, measure
from benchmarks.timing import interleave

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
    """What holds over all cells, for each way of calling kernelmeta that was timed."""
    return [line for own in OWN if own in cells[0]["peers"] for line in _verdict_on(own, cells, ceilings)]


def _verdict_on(own: str, cells: Sequence[dict[str, Any]], ceilings: floors.Ceilings) -> list[str]:
    best = {Size(**c["size"]): min(ratios) for c in cells if (ratios := _peer_ratios(c, own))}
    lines = [f"{PEERS[own].title}:"]
    if best:
        mean = math.exp(statistics.fmean(map(math.log, best.values())))
        lines.append(f"* The best peer takes {mean:.1f} times as long in the geometric mean over {len(best)} cells.")
        lost = {size: ratio for size, ratio in best.items() if ratio < 1}
        named = "".join(f"; {size}: {ratio:.2f}" for size, ratio in lost.items())
        lines.append(f"* A peer is faster in {len(lost)} of {len(best)} cells{named}.")
    single = {size: ratio for size, ratio in best.items() if size.T == 1}
    if single:
        least = min(single, key=single.__getitem__)
        lines.append(f"* T = 1: the best peer takes {single[least]:.1f} times as long where that is least ({least}).")
    many = {Size(**c["size"]): times_floor(c, own, ceilings) for c in cells if c["size"]["T"] >= 64}
    if many:
        within, worst = sum(x <= 2 for x in many.values()), max(many, key=many.__getitem__)
        lines.append(
            f"* T >= 64: {within} of {len(many)} cells within twice the floor, the worst at {many[worst]:.1f} times "
            f"({worst})."
        )
    return lines


def times_floor(cell: dict[str, Any], own: str, ceilings: floors.Ceilings) -> float:
    """The time over the floor."""
    return float(cell["peers"][own]["median"] / ceilings.floor(counts.Work(cell["flops"], cell["bytes"])))


def _peer_ratios(cell: dict[str, Any], own: str) -> list[float]:
    """How many times as long as ``own`` the peers take."""
    mine = cell["peers"][own]["times_kernelmeta"][0]
    return [found["times_kernelmeta"][0] / mine for name, found in cell["peers"].items() if name not in OWN]


def parts(size: Size, mode: str, seconds: float) -> str:
    """Which part of a training step's time is what."""
    problem = draw(size)
    runners = parts_of_training(problem, mode)
    found = {name: timing.median * 1e3 for name, timing in interleave(runners, seconds=seconds).items()}
    backward = found["all"] - found["forward"] - found["cross entropy"]
    return (
        f"{size}: {found['all']:.2f} ms = forward {found['forward']:.2f}, cross entropy and its backward pass "
        f"{found['cross entropy']:.2f}, backward {backward:.2f}; the MLP's share of forward and backward, timed "
        f"alone: {found['mlp']:.2f}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.grid", description=__doc__)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--seconds", type=float, default=0.3, help="for each peer of each cell")
    parser.add_argument("--mode", choices=MODES, default="train")
    parser.add_argument("--peers", default="dual,jax", help=f"of {', '.join(PEERS)}")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--only", default="", help="T=1,K=3: cells of these sizes alone")
    options = metadata.parse(parser, arguments)
    names = [*OWN, *(n for n in options.peers.split(",") if n)]
    torch.set_num_threads(options.threads)
    only = dict(pair.split("=") for pair in options.only.split(",") if pair)
    sizes = [s for s in GRID if s.dtype == options.dtype and all(getattr(s, k) == int(v) for k, v in only.items())]
    left_out = [s for s in sizes if counts.sib(s, options.mode).flops > MOST_FLOPS]
    facts = metadata.collect()
    before = floors.measure()
    head = ["T", "N", "S", "D", "K", "features", "ms", "x floor", *(n for n in names if n != "kernelmeta")]
    heading = ["| " + " | ".join(head) + " |", "|" + " ---: |" * len(head)]
    print("\n".join([str(before), *heading]), flush=True)
    cells, notes, shares = [], [], []
    for size in sizes:
        if size in left_out:
            continue
        # After 50 steps through ReLUs two right float32 gradients may have nothing in common.
        checked_in = "float64" if size.K > 10 else None
        cell, note = measure(size, options.mode, names, seconds=options.seconds, checked_in=checked_in)
        cells.append(cell)
        if note:
            notes.append(f"{size}: {note}")
        print(summary(cell, before, names), flush=True)
        if options.mode != "forward" and size.T >= 64 and times_floor(cell, "kernelmeta", before) > 2:
            shares.append(parts(size, options.mode, options.seconds))
    ceilings = before.or_better(floors.measure())
    busy = max((c["others_cpus"] or 0 for c in cells), default=0)
    about = (
        f"{facts['processor']}, {options.threads} threads, commit {facts['commit']}, mode {options.mode}; {ceilings}"
    )
    tail = ["", *verdict(cells, ceilings)]
    if shares:
        tail += ["", "Where the time goes in cells above twice the floor:", *(f"* {line}" for line in shares), ""]
    tail.append(f"Left out for their length: {', '.join(map(str, left_out)) or 'none'}.")
    if busy > DISTURBED:
        tail.append(f"DISTURBED: other processes kept up to {busy:.2f} CPUs busy.")
    print("\n".join(tail))
    lines = [about, "", *heading, *(summary(cell, ceilings, names) for cell in cells)]
    cut = [options.dtype, options.mode, *(f"{name}{value}" for name, value in only.items())]
    stem = RESULTS / f"{metadata.machine_name()}-{datetime.date.today().isoformat()}-grid-{'-'.join(cut)}"
    record = {"metadata": facts, "ceilings": ceilings._asdict(), "disturbed": busy > DISTURBED, "cells": cells}
    stem.with_suffix(".json").write_text(json.dumps(record | {"notes": notes, "parts": shares}) + "\n")
    stem.with_suffix(".md").write_text("\n".join([*lines, *tail]) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
