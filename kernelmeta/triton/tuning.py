"""Warps and pipeline stages of a kernel, measured once for every class of shapes and kept for the process.

A class is a kernel with its tile sizes, flags and dtypes on one kind of device, and its number of programs up to the
next power of two. Nothing is measured while a CUDA graph is captured (that would break the capture): there it is what
was chosen before, or the default. KERNELMETA_TUNE=0 keeps to the defaults everywhere: another number of warps may add
up in another order, so that two processes that chose differently agree up to rounding only.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from triton.runtime.errors import OutOfResources, PTXASError

Options = dict[str, int]

_RUNS = 5
_WORTH = 0.97  # of the default's time: what a choice has to reach to replace it


def milliseconds(run: Callable[[], None]) -> float:
    """The fastest of some runs on the current stream, after one that compiles."""
    run()
    times = []
    for _ in range(_RUNS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return min(times)


def _may_measure() -> bool:
    return not torch.cuda.is_current_stream_capturing()


def candidates(default: Options, stages: Sequence[int] = ()) -> list[Options]:
    """The default first; then half and twice its warps, each with these pipeline stages (Triton's own if none)."""
    warps = [default["num_warps"], *(w for w in (default["num_warps"] // 2, default["num_warps"] * 2) if 4 <= w <= 16)]
    found = [default]
    for w in warps:
        for option in [{"num_stages": s} for s in stages] or [{}]:
            choice = {**default, "num_warps": w, **option}
            if choice not in found:
                found.append(choice)
    return found


class Tuner:
    """Remembers the fastest options of every class.

    Args:
        timer: time of a call.
        may_measure: whether that is possible now.
    """

    def __init__(
        self,
        timer: Callable[[Callable[[], None]], float] = milliseconds,
        may_measure: Callable[[], bool] = _may_measure,
    ) -> None:
        self.timer, self.may_measure = timer, may_measure
        self.chosen: dict[Hashable, Options] = {}

    def choose(self, key: Hashable, options: Sequence[Options], prepare: Callable[[], Callable[..., Any]]) -> Options:
        """The options for a class; the first of them are the default. ``prepare()(**options)`` runs the kernel where
        it does no harm.
        """
        if key in self.chosen:
            return self.chosen[key]
        default = options[0]
        if not self.may_measure():
            return default
        run = prepare()
        times = [self._time(run, choice) for choice in options]
        best = min(range(len(options)), key=times.__getitem__)
        self.chosen[key] = options[best] if times[best] < _WORTH * times[0] else default
        return self.chosen[key]

    def _time(self, run: Callable[..., Any], choice: Options) -> float:
        try:
            return self.timer(lambda: run(**choice))
        except (OutOfResources, PTXASError):  # too many registers or too much shared memory
            return float("inf")


def wanted() -> bool:
    return os.environ.get("KERNELMETA_TUNE", "1") != "0"
