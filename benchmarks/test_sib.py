"""SIB, the whole episode: kernelmeta beside its peers. Each cell is checked against float64 before it is timed."""

from __future__ import annotations

from functools import lru_cache
from itertools import product
from typing import Any

import pytest

from benchmarks import agreement, counts
from benchmarks.floors import Ceilings
from benchmarks.peers import OWN, PEERS, Unavailable
from benchmarks.problem import MODES, Problem, Size, draw

FULL = [
    (Size(T, N, S, D, K, dtype), mode)
    for T, (N, S), D, K, dtype, mode in product(
        (1, 8, 64, 512),
        ((5, 5), (5, 25), (20, 20)),
        (64, 640, 1600),
        (1, 3, 5, 10, 50),
        ("float32", "bfloat16"),
        MODES,
    )
]
# From the published setting, one step away in each direction.
SMALL = [
    *((Size(T=T), mode) for T in (1, 8, 64, 512) for mode in MODES),
    *((Size(T=T, S=25), "train") for T in (1, 64)),
    *((Size(T=T, N=20, S=20), "train") for T in (1, 8)),
    *((Size(T=8, D=D), "train") for D in (64, 1600)),
    *((Size(T=8, K=K), "train") for K in (1, 5, 10, 50)),
    *((Size(T=T, dtype="bfloat16"), mode) for T in (1, 64) for mode in ("forward", "train")),
]
# Tens of seconds to compile, or slow: in the small grid only at the headline cells.
SLOW = ("compile-published", "compile-dual", "loop", "vmap")
HEADLINE = [(Size(), "train"), (Size(T=64), "train")]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    full = metafunc.config.getoption("--grid") == "full"
    wanted = [name for name in metafunc.config.getoption("--peers").split(",") if name]
    unknown = set(wanted) - set(PEERS)
    if unknown:
        raise pytest.UsageError(f"--peers: {', '.join(sorted(unknown))} unknown; there are {', '.join(PEERS)}")
    cells = [
        pytest.param(size, mode, name, id=f"{size}-{mode}-{name}")
        for size, mode in (FULL if full else SMALL)
        for name in PEERS
        if (name in wanted) or (not wanted and (full or name not in SLOW or (size, mode) in HEADLINE))
    ]
    metafunc.parametrize(("size", "mode", "name"), cells)


@lru_cache(maxsize=1)
def _problem(size: Size) -> Problem:
    return draw(size)


@lru_cache(maxsize=2)
def _reference(size: Size, mode: str, norm_stats: str) -> agreement.Result:
    return agreement.reference(_problem(size), mode, norm_stats)


def test_sib(size: Size, mode: str, name: str, benchmark: Any, ceilings: Ceilings) -> None:
    problem, peer = _problem(size), PEERS[name]
    try:
        runner = peer.prepare(problem, mode)
    except Unavailable as reason:
        pytest.skip(str(reason))
    try:
        logits_error, gradients_error = agreement.check(
            name, peer, runner, problem, mode, want=_reference(size, mode, peer.norm_stats)
        )
    except agreement.Disagreement as error:
        if name in OWN:
            raise
        pytest.skip(f"not timed: {error}")
    floor = ceilings.floor(counts.sib(size, mode))
    benchmark.group = f"sib {size} {mode}"
    benchmark.extra_info.update(
        {**size._asdict(), "mode": mode, "peer": name, "floor_us": floor * 1e6},
        logits_error=logits_error,
        gradients_error=gradients_error,
        ceilings=ceilings._asdict(),
    )
    turn = iter(range(1 << 60))

    def call() -> None:
        runner(next(turn))

    benchmark(call)
    if benchmark.stats:  # not with --benchmark-disable
        benchmark.extra_info["times_floor"] = benchmark.stats.stats.median / floor
