"""How things are timed: in one process, interleaved, warmed up, as medians and quantiles."""

from __future__ import annotations

import ctypes
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

# Runs the thing once, on the i-th copy of the inputs (modulo their number).
Runner = Callable[[int], Any]


class Timing(NamedTuple):
    """Seconds a call."""

    median: float
    low: float  # 10 % quantile
    high: float  # 90 % quantile
    calls: int
    rounds: tuple[float, ...]  # the median of each round


@contextmanager
def quiet() -> Iterator[None]:
    """No garbage collection while the clock runs."""
    gc.collect()
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def interleave(
    runners: Mapping[str, Runner], *, seconds: float = 2.0, rounds: int = 15, warm_up: int = 3
) -> dict[str, Timing]:
    """Time several runners in turn, in short blocks, so that a busy minute falls on all of them.

    Args:
        runners: name -> runner.
        seconds: to spend on each, about.
        rounds: blocks of each, at most; fewer if a call takes longer than its share.
        warm_up: calls of each before anything counts.

    A block's first fifth, at least one call, does not count: its caches hold the runner before, which may still be
    freeing its memory on threads of its own.
    """
    clock = time.perf_counter_ns
    blocks: dict[str, int] = {}
    index = dict.fromkeys(runners, 0)
    for name, run in runners.items():
        spent = []
        for _ in range(max(1, warm_up)):
            start = clock()
            run(index[name])
            index[name] += 1
            spent.append((clock() - start) * 1e-9)
        blocks[name] = max(3, min(2000, int(seconds / rounds / max(min(spent), 1e-7))))
    # A slow runner gets fewer rounds, but never less than three.
    samples: dict[str, list[list[float]]] = {name: [] for name in runners}
    began = clock()
    budget = seconds * len(runners)
    with quiet():
        for r in range(rounds):
            if r >= 3 and (clock() - began) * 1e-9 > budget:
                break
            for name, run in runners.items():
                times = []
                i = index[name]
                for _ in range(blocks[name]):
                    start = clock()
                    run(i)
                    times.append((clock() - start) * 1e-9)
                    i += 1
                index[name] = i
                samples[name].append(times[max(1, len(times) // 5) :])
    return {name: summary(rounds_of) for name, rounds_of in samples.items()}


def summary(rounds: list[list[float]]) -> Timing:
    """The quantiles over all calls, and each round's median."""
    times = sorted(t for r in rounds for t in r)
    return Timing(
        statistics.median(times),
        quantile(times, 0.1),
        quantile(times, 0.9),
        len(times),
        tuple(statistics.median(r) for r in rounds),
    )


def quantile(ordered: list[float], q: float) -> float:
    """Linear interpolation between the two nearest of sorted values."""
    at = q * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def ratio(slow: Timing, fast: Timing) -> tuple[float, float, float]:
    """How many times faster the second is: median over the rounds (each compares one moment), lowest, highest."""
    ratios = [s / f for s, f in zip(slow.rounds, fast.rounds, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def peak_memory(run: Callable[[], Any]) -> int | None:
    """Bytes by which the process grew, at most, while ``run`` ran; None where the system does not say.

    Resident memory: what an earlier call kept for reuse is not counted again. Linux only.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = _status("VmRSS")
        run()
        return max(0, _status("VmHWM") - before)
    except (OSError, AttributeError, KeyError):
        return None


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)
