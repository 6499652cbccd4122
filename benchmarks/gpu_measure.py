"""What gpu_check measures, one part a process: ``python -m benchmarks.gpu_measure cells --out FILE``.

km.nn.SIB beside eager PyTorch and CUDA graphs (and torch.compile, if asked for), learners by the CUDA kernels, by
Triton's and in plain PyTorch, and whole training steps. Each cell of SIB is checked against float64 on the CPU, all are
timed by CUDA events, and saved as they come.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import agreement, counts
from benchmarks.peers import PEERS, PeerRunner, Result, Unavailable
from benchmarks.problem import Problem, Size, draw
from kernelmeta import nn, use_backend
from kernelmeta.mlp_parameters import MLPParameters

COMPARED = ("kernelmeta", "published", "dual")
COMPILED = ("compile-dual",)
SIZES = (Size(T=1024), Size(T=1), Size(T=64))


def on_card(problem: Problem) -> Problem:
    inputs = [type(i)(*(t.cuda() for t in i)) for i in problem.inputs]
    weight, scale, bias, *mlp = (t.detach().cuda() for t in problem.parameters.leaves())
    return problem._replace(
        inputs=inputs, parameters=type(problem.parameters)(weight, scale, bias, MLPParameters(*mlp))
    )


def graphed(run: Callable[[int], Any]) -> Callable[[int], Any]:
    """One call of run, captured: the same inputs every time."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run(0)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(0)
    return lambda _: graph.replay()


def interleave(runners: Mapping[str, Callable[[int], Any]], *, rounds: int = 9, seconds: float = 0.1) -> dict[str, Any]:
    """Seconds a call, by CUDA events around blocks of calls, in turn."""
    calls = {}
    for name, run in runners.items():
        for i in range(3):
            run(i)
        torch.cuda.synchronize()
        start = time.perf_counter()
        run(0)
        torch.cuda.synchronize()
        calls[name] = max(3, min(500, int(seconds / (time.perf_counter() - start))))
    samples: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(rounds):
        for name, run in runners.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            for i in range(calls[name]):
                run(i)
            end.record()
            end.synchronize()
            samples[name].append(begin.elapsed_time(end) * 1e-3 / calls[name])
    return {
        name: {"median": statistics.median(s), "low": min(s), "high": max(s), "calls": calls[name]}
        for name, s in samples.items()
    }


def ceilings() -> dict[str, float]:
    """Bytes/s of a copy, FLOP/s of a float32 product, as measured here."""
    source = torch.empty(1 << 28, device="cuda")
    target, a = torch.empty_like(source), torch.rand(4096, 4096, device="cuda")
    found = interleave({"copy": lambda _: target.copy_(source), "sgemm": lambda _: a @ a}, rounds=5)
    return {"copy": 2 * 4 * source.numel() / found["copy"]["low"], "sgemm": 2 * 4096**3 / found["sgemm"]["low"]}


def benchmark(size: Size, mode: str, limits: dict[str, float], names: Sequence[str]) -> dict[str, Any]:
    """Every peer that agrees with float64, and CUDA graphs of those that can be captured."""
    host = draw(size, copies=max(2, min(8, (1 << 30) // (size.T * size.Q * size.D * 4))))
    problem = on_card(host)
    runners: dict[str, Callable[[int], Any]] = {}
    left_out = []
    wanted: dict[str, Result] = {}  # by the statistics that a peer's BatchNorm uses
    for name in names:
        stats = PEERS[name].norm_stats
        if stats not in wanted:
            wanted[stats] = agreement.reference(host, mode, stats)
        try:
            run = PEERS[name].prepare(problem, mode)
            agreement.check(name, PEERS[name], _to_host(run), host, mode, want=wanted[stats])
        except (Unavailable, agreement.Disagreement, RuntimeError) as reason:
            left_out.append(f"{name}: {reason}")
            continue
        runners[name] = run
        try:
            runners[f"{name}, CUDA graph"] = graphed(run)
        except RuntimeError as reason:
            left_out.append(f"{name}, CUDA graph: {reason}")
            torch.cuda.synchronize()
    times = interleave(runners)
    work = counts.sib(size, mode)
    floor = work.floor(limits["sgemm"], limits["copy"])
    own = [t["median"] for n, t in times.items() if n.startswith("kernelmeta")]
    others = [t["median"] for n, t in times.items() if not n.startswith("kernelmeta")]
    return {
        "size": str(size), "mode": mode, "times": times, "left_out": left_out, "flops": work.flops, "bytes": work.bytes,
        "floor": floor, "times_the_floor": min(own) / floor if own else None,
        "against_the_best_peer": min(others) / min(own) if own and others else None,
    }  # fmt: skip


def _to_host(run: PeerRunner) -> PeerRunner:
    def on_host(i: int) -> Result:
        logits, gradients = run(i)
        return logits.cpu(), [g.cpu() for g in gradients]

    return on_host


def training_step() -> dict[str, Any]:
    """Steps of one task from a bank on the device, the whole step in a CUDA graph; and what 50,000 would take."""
    bank = torch.rand(60_000, 640, device="cuda")
    head = nn.SIB(5, 640).cuda()
    optimizer = torch.optim.SGD(
        head.parameters(), lr=1e-3, momentum=0.9, nesterov=True, weight_decay=5e-4, foreach=True
    )
    labels, answers = torch.arange(5, device="cuda").view(1, 5), (torch.arange(75, device="cuda") % 5)
    rows = torch.randint(60_000, (4096, 80), device="cuda")
    row = torch.zeros(1, dtype=torch.int64, device="cuda")

    def step(_: int) -> None:
        index = rows[row]
        row.add_(1).remainder_(4096)
        loss = F.cross_entropy(head.from_bank(bank, index[:, :5], labels, index[:, 5:])[0], answers)
        optimizer.zero_grad(set_to_none=False)
        loss.backward()
        optimizer.step()

    found = interleave({"eager": step, "CUDA graph": graphed(step)})
    return {"times": found, "seconds_of_50000": 50_000 * found["CUDA graph"]["median"]}


def forced(backend: str, run: Callable[[int], Any], i: int) -> None:
    with use_backend(backend):
        run(i)


def learners(T: int) -> dict[str, Any]:
    """Forward and backward of learners, into parameters and features: 5-way 5-shot, 75 query rows."""
    N, S, Q, D = 5, 25, 75, 640
    labels = (torch.arange(S, device="cuda") % N).expand(T, S).contiguous()
    support, query = (torch.randn(T, rows, D, device="cuda", requires_grad=True) for rows in (S, Q))
    heads: dict[str, torch.nn.Module] = {
        "SIB, 3 steps": nn.SIB(N, D),
        "ANIL, 5 steps": nn.ANIL(N, D, steps=5, inner_lr=0.01),
        "cross entropy, then synthetic gradient": nn.Program(
            N, D, [nn.Phase("cross_entropy", 3, 0.1), nn.Phase("synthetic_gradient", 3, 1e-3)], hidden=40
        ),
        "soft k-means": nn.SoftKMeans(N, D),
        "ridge": nn.RidgeHead(N, D),
    }
    found = {}
    for name, module in heads.items():
        head = module.cuda()
        leaves = [support, query, *(p for p in head.parameters() if p.requires_grad)]

        def run(_: int, head: torch.nn.Module = head, leaves: list[torch.Tensor] = leaves) -> None:
            torch.autograd.grad(head(support, labels, query).square().mean(), leaves, allow_unused=True)

        runners: dict[str, Callable[[int], Any]] = {
            "kernelmeta": run,
            "Triton": partial(forced, "triton", run),
            "plain PyTorch": partial(forced, "reference", run),
        }
        # (Plain PyTorch cannot be captured, and a capture that fails leaves PyTorch's generator unusable.)
        runners["kernelmeta, CUDA graph"] = graphed(run)
        found[name] = interleave(runners, rounds=5)
    return {"T": T, "times": found}


def cells(save: Callable[[str, Any], None], compiled: bool) -> None:
    """Every size and mode, forward first."""
    limits = ceilings()
    save("ceilings", limits)
    names = COMPARED + COMPILED if compiled else COMPARED
    for size in SIZES:
        for mode in ("forward", "train"):
            save("cells", benchmark(size, mode, limits, names))


def table(found: Mapping[str, Any]) -> str:
    """What was measured, for reading: microseconds a call, medians."""

    def microseconds(times: Mapping[str, Any], name: str) -> str:
        return f"{1e6 * times[name]['median']:,.0f}" if name in times else ""

    lines = []
    if "ceilings" in found:
        copy, sgemm = found["ceilings"]["copy"], found["ceilings"]["sgemm"]
        lines += [f"A copy moves {copy / 1e12:.1f} TB/s, `sgemm` computes {sgemm / 1e12:.0f} TFLOP/s.", ""]
    peers = ("kernelmeta", "kernelmeta, CUDA graph", "published, CUDA graph", "dual, CUDA graph", "compile-dual")
    if "cells" in found:
        lines += [f"| | {' | '.join(peers)} | x the best peer | x floor |", "|---|" + "---|" * (len(peers) + 2)]
        for cell in found["cells"]:
            cells = " | ".join(microseconds(cell["times"], name) for name in peers)
            ratios = f"{cell['against_the_best_peer']:.1f} | {cell['times_the_floor']:.1f}"
            lines.append(f"| {cell['size']} {cell['mode']} | {cells} | {ratios} |")
    columns = ("kernelmeta", "kernelmeta, CUDA graph", "Triton", "plain PyTorch")
    if "learners" in found:
        lines += ["", f"| forward and backward | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
        for of_size in found["learners"]:
            for name, times in of_size["times"].items():
                cells = " | ".join(microseconds(times, column) for column in columns)
                lines.append(f"| T = {of_size['T']:,}, {name} | {cells} |")
    if "training_step" in found:
        times, whole = found["training_step"]["times"], found["training_step"]["seconds_of_50000"]
        lines += ["", f"A training step of one task: {microseconds(times, 'eager')} us, in a CUDA graph "
                  f"{microseconds(times, 'CUDA graph')} us; 50,000 of them take {whole:.0f} s."]  # fmt: skip
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_measure", description=__doc__)
    parser.add_argument("what", choices=("cells", "learners", "training-step", "table"))
    parser.add_argument("--out", type=Path, required=True, help="JSON file: what it holds stays, and is added to")
    parser.add_argument("--compile-peers", action="store_true", help="torch.compile among the peers: minutes each")
    options = parser.parse_args(arguments)
    found: dict[str, Any] = json.loads(options.out.read_text()) if options.out.is_file() else {}

    def save(name: str, result: Any) -> None:
        """Each result as it comes, so that a process that is stopped leaves those that it had."""
        if isinstance(result, dict) and name in ("cells", "learners"):
            found.setdefault(name, []).append(result)
        else:
            found[name] = result
        options.out.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{name}: {json.dumps(result)}", flush=True)

    if options.what == "table":
        print(table(found))
    elif options.what == "cells":
        cells(save, options.compile_peers)
    elif options.what == "learners":
        for T in (1024, 1, 64):
            save("learners", learners(T))
    else:
        save("training_step", training_step())
    return 0


if __name__ == "__main__":
    sys.exit(main())
