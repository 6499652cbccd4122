"""The machine's own ceilings, measured in the run whose results they stand beside."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from benchmarks import timing
from benchmarks.counts import Work
from kernelmeta.backends import backends


class Ceilings(NamedTuple):
    """Best seen, with the number of threads that PyTorch uses."""

    sgemm: float  # FLOP/s of a large float32 product
    copy: float  # bytes/s, read and written, of a copy that no cache holds
    dispatch: float  # seconds of a call of an op that does nothing (NaN without the compiled library)

    def floor(self, work: Work) -> float:
        return work.floor(self.sgemm, self.copy)

    def or_better(self, other: Ceilings) -> Ceilings:
        """The best of two measurements: whatever disturbs one can only lower it."""
        return Ceilings(max(self.sgemm, other.sgemm), max(self.copy, other.copy), min(self.dispatch, other.dispatch))

    def __str__(self) -> str:
        return (
            f"sgemm {self.sgemm / 1e9:.0f} GFLOP/s, copy {self.copy / 1e9:.1f} GB/s, "
            f"empty op {self.dispatch * 1e6:.1f} us"
        )


def measure(*, seconds: float = 0.5, n: int = 1536, megabytes: int = 256) -> Ceilings:
    """Measure all three; the 10 % quantile of the calls, since these are ceilings.

    Args:
        seconds: for each.
        n: of the n x n x n product.
        megabytes: of the array that is copied.
    """
    a, b, c = (torch.rand(n, n) for _ in range(3))
    source = torch.ones(megabytes << 18)
    target = torch.empty_like(source)
    one = torch.ones(1)

    def product(_: int) -> None:
        torch.mm(a, b, out=c)

    def copy(_: int) -> None:
        target.copy_(source)

    runners: dict[str, Callable[[int], None]] = {"sgemm": product, "copy": copy}
    if backends()["cpu"].available:
        noop = torch.ops.kernelmeta.noop.default

        def dispatch(_: int) -> None:
            noop(one)

        runners["dispatch"] = dispatch
    with torch.no_grad():
        found = timing.interleave(runners, seconds=seconds, rounds=6)
    return Ceilings(
        2.0 * n**3 / found["sgemm"].low,
        2.0 * source.numel() * 4 / found["copy"].low,
        found["dispatch"].low if "dispatch" in found else float("nan"),
    )
