"""The comparison that the README quotes: ``python -m benchmarks.report``.

Forward, cross entropy and backward of km.nn.SIB beside its peers, in one process and interleaved; then a sweep over
T, K, D and N. Writes benchmarks/results/<machine>-<date>.json, .md, -<axis>.png and -roofline.png.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import agreement, counts, floors, metadata, timing
from benchmarks.peers import OWN, PEERS, Unavailable
from benchmarks.problem import MODES, Size, draw

RESULTS = Path(__file__).parent / "results"
HEADLINE = (Size(T=1), Size(T=64))
SWEEPS: dict[str, Sequence[Size]] = {
    "T": [Size(T=T) for T in (1, 8, 64, 512)],
    "K": [Size(T=8, K=K) for K in (1, 3, 5, 10, 50)],
    "D": [Size(T=8, D=D) for D in (64, 640, 1600)],
    "N": [Size(T=8, N=N, S=N) for N in (2, 5, 10, 20)],
}
# CPUs kept busy by other processes above which a run is not to be quoted.
DISTURBED = 0.1
QUICK = (*OWN, "published", "dual", "vmap", "jax")


def measure(
    size: Size, mode: str, names: Sequence[str], *, seconds: float, memory: bool = False, checked_in: str | None = None
) -> tuple[dict[str, Any], str]:
    """One cell, every peer checked against float64 first. Returns its record and what was left out, and why.

    ``checked_in`` is the precision of that check where it is not the cell's own.

    Raises:
        Disagreement: kernelmeta itself disagrees, either way of calling it; a peer that does is left out.
    """
    problem = draw(size)
    checked = draw(size._replace(dtype=checked_in), copies=1) if checked_in else None
    runners, notes = {}, []
    record: dict[str, dict[str, Any]] = {}
    for name in names:
        try:
            runner = PEERS[name].prepare(problem, mode)
            judged = PEERS[name].prepare(checked, mode) if checked else runner
            errors = agreement.check(name, PEERS[name], judged, checked or problem, mode)
        except (Unavailable, agreement.Disagreement) as reason:
            if name in OWN and isinstance(reason, agreement.Disagreement):
                raise
            notes.append(f"{name} left out: {reason}")
            continue
        runners[name] = runner
        record[name] = {"logits_error": errors[0], "gradients_error": errors[1]}
    others = metadata.Others()
    times = timing.interleave(runners, seconds=seconds)
    busy = others.cpus()
    for name, found in times.items():
        record[name] |= found._asdict()
        record[name]["times_kernelmeta"] = timing.ratio(found, times["kernelmeta"])
        if memory:
            record[name]["peak_bytes"] = timing.peak_memory(lambda run=runners[name]: run(0))  # type: ignore[misc]
    work = counts.sib(size, mode)
    cell = {"size": size._asdict(), "mode": mode, "flops": work.flops, "bytes": work.bytes, "peers": record}
    cell["others_cpus"] = busy
    return cell, "; ".join(notes)


def lines(cell: dict[str, Any], ceilings: floors.Ceilings) -> list[str]:
    """Markdown rows of one cell, fastest first."""
    floor = ceilings.floor(counts.Work(cell["flops"], cell["bytes"]))
    size = cell["size"]
    rows = []
    for name, found in sorted(cell["peers"].items(), key=lambda item: item[1]["median"]):
        median, least, most = found["times_kernelmeta"]
        peak = found.get("peak_bytes")
        rows.append(
            f"| {size['T']} | {size['N']} | {size['S']} | {size['D']} | {size['K']} | {size['dtype']} | {cell['mode']} "
            f"| {PEERS[name].title} | {found['median'] * 1e3:.3f} ({found['low'] * 1e3:.3f}-{found['high'] * 1e3:.3f}) "
            f"| {floor * 1e3:.3f} | {found['median'] / floor:.1f} | {median:.1f} ({least:.1f}-{most:.1f}) "
            f"| {'-' if peak is None else f'{peak / 2**20:.1f}'} |"
        )
    return rows


HEADER = [
    "| T | N | S | D | K | features | mode | what | ms: median (10-90 %) | floor ms | x floor "
    "| time / kernelmeta: median (range over rounds) | peak MiB |",
    "|" + " ---: |" * 5 + " --- | --- | --- |" + " ---: |" * 5,
]


def plot(axis: str, cells: Sequence[dict[str, Any]], ceilings: floors.Ceilings, path: Path) -> None:
    """Milliseconds over one size, all peers and the floor."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    for name in PEERS:
        points = [(c["size"][axis], c["peers"][name]["median"] * 1e3) for c in cells if name in c["peers"]]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=PEERS[name].title)
    floor = [(c["size"][axis], ceilings.floor(counts.Work(c["flops"], c["bytes"])) * 1e3) for c in cells]
    axes.plot(*zip(*floor, strict=True), "k--", label="floor")
    fixed = {k: v for k, v in cells[0]["size"].items() if k != axis and not (axis == "N" and k == "S")}
    axes.set(
        xscale="log",
        yscale="log",
        xlabel=axis,
        ylabel="ms a call",
        title=f"{cells[0]['mode']}: " + ", ".join(f"{k}={v}" for k, v in fixed.items()),
    )
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def roofline(cells: Sequence[dict[str, Any]], ceilings: floors.Ceilings, path: Path) -> None:
    """FLOP/s that kernelmeta reaches over FLOP a byte, under what products and memory allow."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    intensity = [c["flops"] / c["bytes"] for c in cells]
    edges = [
        min(intensity) / 2,
        ceilings.sgemm / ceilings.copy,
        max(max(intensity), ceilings.sgemm / ceilings.copy) * 2,
    ]
    axes.plot(edges, [min(x * ceilings.copy, ceilings.sgemm) / 1e9 for x in edges], "k-", label=str(ceilings))
    for T in sorted({c["size"]["T"] for c in cells}):
        mine = [c for c in cells if c["size"]["T"] == T]
        axes.plot(
            [c["flops"] / c["bytes"] for c in mine],
            [c["flops"] / c["peers"]["kernelmeta"]["median"] / 1e9 for c in mine],
            "o",
            label=f"T={T}",
        )
    axes.set(xscale="log", yscale="log", xlabel="FLOP a byte, counted", ylabel="GFLOP/s", title="kernelmeta")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def against_best_peer(cells: Sequence[dict[str, Any]]) -> str:
    """How the best peer of each cell compares with kernelmeta there, in one line."""
    ratios = {}
    for cell in cells:
        peers = {name: found["times_kernelmeta"][0] for name, found in cell["peers"].items() if name not in OWN}
        if peers:
            name = min(peers, key=peers.__getitem__)
            ratios[f"{Size(**cell['size'])}: {PEERS[name].title}"] = peers[name]
    if not ratios:
        return ""
    least = min(ratios, key=ratios.__getitem__)
    mean = math.exp(statistics.fmean(math.log(r) for r in ratios.values()))
    return (
        f"Time of the best peer / kernelmeta: geometric mean {mean:.1f} over {len(ratios)} cells, "
        f"least {ratios[least]:.1f} ({least})."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--seconds", type=float, default=2.0, help="for each peer of each cell")
    parser.add_argument("--mode", choices=MODES, default="train")
    parser.add_argument("--peers", default=",".join(QUICK), help=f"of {', '.join(PEERS)}")
    parser.add_argument("--headline", action="store_true", help="T = 1 and 64 only, no sweep and no plots")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = metadata.parse(parser, arguments)
    names = [*OWN, *(n for n in options.peers.split(",") if n and n not in OWN)]
    unknown = set(names) - set(PEERS)
    if unknown:
        parser.error(f"--peers: {', '.join(sorted(unknown))} unknown; there are {', '.join(PEERS)}")
    torch.set_num_threads(options.threads)

    facts = metadata.collect()
    before = floors.measure()
    print(f"{facts['processor']}, {options.threads} threads: {before}")
    headline, sweeps, notes = [], {}, []

    def run(size: Size, memory: bool) -> dict[str, Any]:
        cell, note = measure(size, options.mode, names, seconds=options.seconds, memory=memory)
        print("\n".join(lines(cell, before) + ([note] if note else [])), flush=True)
        if note:
            notes.append(f"{size}: {note}")
        return cell

    print("\n".join(HEADER))
    headline = [run(size, True) for size in HEADLINE]
    if not options.headline:
        sweeps = {axis: [run(size, False) for size in sizes] for axis, sizes in SWEEPS.items()}
    ceilings = before.or_better(floors.measure())

    cells = [*headline, *(cell for swept in sweeps.values() for cell in swept)]
    known = [cell["others_cpus"] for cell in cells if cell["others_cpus"] is not None]
    busy = max(known, default=None)
    disturbed = busy is None or busy > DISTURBED
    if disturbed:
        notes.append(
            f"DISTURBED: other processes kept {'an unknown number of' if busy is None else f'{busy:.2f}'} CPUs busy "
            "while some cell was timed. PyTorch's threads wait for each other, so the eager peers suffer most: "
            "no ratio here is to be quoted."
        )
        print(notes[-1])
    notes.append(against_best_peer(cells))
    print(notes[-1])
    options.out.mkdir(parents=True, exist_ok=True)
    stem = options.out / f"{metadata.machine_name()}-{datetime.date.today().isoformat()}"
    record = {
        "metadata": facts,
        "disturbed": disturbed,
        "others_cpus": busy,
        "ceilings": ceilings._asdict(),
        "headline": headline,
        "sweeps": sweeps,
        "left_out": notes,
    }
    Path(f"{stem}.json").write_text(json.dumps(record, indent=1) + "\n")
    table = [row for cell in cells for row in lines(cell, ceilings)]
    about = (
        f"{facts['processor']}, {options.threads} threads, PyTorch {facts['versions']['torch']}, "
        f"commit {facts['commit']}, load {facts['load_average'][0]}; {ceilings}"
    )
    Path(f"{stem}.md").write_text("\n".join([about, "", *HEADER, *table, "", *notes]).rstrip() + "\n")
    if sweeps:
        for axis, swept in sweeps.items():
            plot(axis, swept, ceilings, Path(f"{stem}-{axis}.png"))
        roofline(cells, ceilings, Path(f"{stem}-roofline.png"))
    print(f"wrote {stem}.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
