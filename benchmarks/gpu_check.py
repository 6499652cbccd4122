"""Everything that needs a card, in one command of eight minutes: ``make gpu-check``.

Builds for the card that is there, runs the tests, compute-sanitizer's four tools on small cases, and the benchmarks of
km.nn.SIB beside eager PyTorch, torch.compile and CUDA graphs. Writes benchmarks/results/<card>-<date>.json. Installs
nothing, needs no network. Ends with 1 if anything failed, with 2 where there is no card.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import agreement, counts, metadata
from benchmarks.peers import PEERS, PeerRunner, Result, Unavailable
from benchmarks.problem import Problem, Size, draw
from kernelmeta import nn, use_backend
from kernelmeta.reference import MLPParameters

BUDGET = 480  # seconds, for everything
RESULTS = metadata.ROOT / "benchmarks/results"
COMPARED = ("kernelmeta", "published", "dual", "compile-dual")
SIZES = (Size(T=1), Size(T=64), Size(T=1024))


class Clock:
    """What is left of the budget."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def left(self) -> float:
        return BUDGET - (time.monotonic() - self._start)


def command(name: str, words: list[str], clock: Clock, *, share: float, **environment: str) -> dict[str, Any]:
    """Run a command within a share of what is left; its result and the end of what it said."""
    print(f"== {name}", flush=True)
    start, limit = time.monotonic(), max(5.0, share * clock.left())
    try:
        done = subprocess.run(
            words, cwd=metadata.ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=limit
        )
        status, said = str(done.returncode), done.stdout + done.stderr
    except subprocess.TimeoutExpired as late:
        status, said = f"not finished in {limit:.0f} s", (late.stdout or b"").decode(errors="replace")
    except OSError as error:
        status, said = "could not be run", str(error)
    print(said[-1500:], flush=True)
    return {"status": status, "seconds": time.monotonic() - start, "end": said[-4000:]}


def build(clock: Clock) -> dict[str, Any]:
    major, minor = torch.cuda.get_device_capability()
    words = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return command("build", words, clock, share=0.5, KERNELMETA_BUILD="cuda", TORCH_CUDA_ARCH_LIST=f"{major}.{minor}")


def sanitize(clock: Clock) -> dict[str, Any]:
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    found = {}
    for name in ("memcheck", "racecheck", "initcheck", "synccheck"):
        words = [tool, "--tool", name, "--error-exitcode", "9", "--kernel-regex", "kns=kernelmeta"]
        words += [sys.executable, "-m", "pytest", "-q", "-x", "tests/gpu", "-k", "small_ops or bad_labels"]
        found[name] = command(name, words, clock, share=0.2, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    return found


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


def benchmark(size: Size, mode: str, limits: dict[str, float]) -> dict[str, Any]:
    """Every peer that agrees with float64, and CUDA graphs of those that can be captured."""
    host = draw(size, copies=max(2, min(8, (1 << 30) // (size.T * size.Q * size.D * 4))))
    problem = on_card(host)
    runners: dict[str, Callable[[int], Any]] = {}
    left_out = []
    for name in COMPARED:
        try:
            run = PEERS[name].prepare(problem, mode)
            agreement.check(name, PEERS[name], _to_host(run), host, mode)
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


def learners(T: int) -> dict[str, Any]:
    """Forward and backward of the other learners, into parameters and features: 5-way 5-shot, 75 query rows."""
    N, S, Q, D = 5, 25, 75, 640
    labels = (torch.arange(S, device="cuda") % N).expand(T, S).contiguous()
    support, query = (torch.randn(T, rows, D, device="cuda", requires_grad=True) for rows in (S, Q))
    heads: dict[str, torch.nn.Module] = {
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

        def plain(i: int, run: Callable[[int], Any] = run) -> None:
            with use_backend("reference"):
                run(i)

        runners: dict[str, Callable[[int], Any]] = {"kernelmeta": run, "plain PyTorch": plain}
        try:
            runners["kernelmeta, CUDA graph"] = graphed(run)
        except RuntimeError as reason:
            print(f"{name}: no CUDA graph: {reason}")
            torch.cuda.synchronize()
        found[name] = interleave(runners, rounds=5)
    return {"T": T, "times": found}


def main() -> int:
    if not torch.cuda.is_available():
        print(f"no GPU: PyTorch {torch.__version__} finds none; nothing was checked or measured")
        return 2
    clock = Clock()
    record: dict[str, Any] = {**metadata.collect(), "card": torch.cuda.get_device_name(), "build": build(clock)}
    failed = record["build"]["status"] != "0"
    if not failed:
        # In a process of its own: this one may have loaded the library from before the build.
        words = [sys.executable, "-m", "benchmarks.gpu_check", "--measure"]
        record["measured"] = command("benchmarks", words, clock, share=0.45)
        record["tests"] = command("tests", [sys.executable, "-m", "pytest", "-q", "-x"], clock, share=0.6)
        record["gpu_tests"] = command(
            "GPU tests", [sys.executable, "-m", "pytest", "-q", "tests/gpu"], clock, share=0.5
        )
        record["sanitizers"] = sanitize(clock)
        steps = [record["measured"], record["tests"], record["gpu_tests"], *record["sanitizers"].values()]
        failed = any(step["status"] != "0" for step in steps)
        measured = RESULTS / "gpu-measured.json"
        if measured.is_file():
            record["measured"] = json.loads(measured.read_text())
            measured.unlink()
    name = re.sub(r"[^a-z0-9]+", "-", record["card"].lower()).strip("-")
    path = RESULTS / f"{name}-{datetime.date.today()}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{path} ({BUDGET - clock.left():.0f} s, {'FAILED' if failed else 'all passed'})")
    return int(failed)


def measure() -> int:
    """The benchmarks alone, into benchmarks/results/gpu-measured.json after each cell."""
    record: dict[str, Any] = {"ceilings": ceilings(), "cells": []}
    path = RESULTS / "gpu-measured.json"
    for size in SIZES:
        for mode in ("forward", "train"):
            record["cells"].append(benchmark(size, mode, record["ceilings"]))
            path.write_text(json.dumps(record, indent=1) + "\n")
    record["learners"] = [learners(T) for T in (1, 64, 1024)]
    path.write_text(json.dumps(record, indent=1) + "\n")
    record["training_step"] = training_step()
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(measure() if "--measure" in sys.argv[1:] else main())
