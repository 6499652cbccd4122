"""Warps and stages are measured once for every class of shapes, and never where nothing may be measured."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import pytest
import torch
from episodes import assert_close, draw
from triton_kernels.interpreter import both, interpreted

import kernelmeta as km

pytest.importorskip("triton", reason="Triton is not installed")

from kernelmeta.triton import tuning

DEFAULT = {"num_warps": 8}


class Clock:
    """A timer that runs what it is given and finds the times of a list, one after the other."""

    def __init__(self, times: list[float]) -> None:
        self.times, self.calls = iter(times), 0

    def __call__(self, run: Callable[[], None]) -> float:
        self.calls += 1
        run()
        return next(self.times)


def choose(tuner: tuning.Tuner, key: Hashable = "class", run: Any = lambda **choice: None) -> tuning.Options:
    return tuner.choose(key, tuning.candidates(DEFAULT), lambda: run)


def test_candidates() -> None:
    assert tuning.candidates(DEFAULT) == [{"num_warps": w} for w in (8, 4, 16)]
    assert tuning.candidates({"num_warps": 4}) == [{"num_warps": w} for w in (4, 8)]
    staged = tuning.candidates({"num_warps": 16}, (2, 4))
    assert staged[0] == {"num_warps": 16} and len(staged) == 5
    assert {"num_warps": 8, "num_stages": 4} in staged


def test_the_fastest_is_measured_once_for_a_class() -> None:
    clock = Clock([3.0, 1.0, 2.0, 1.0, 2.0, 3.0])
    tuner = tuning.Tuner(clock, lambda: True)
    assert [choose(tuner) for _ in range(2)] == [{"num_warps": 4}] * 2
    assert clock.calls == 3
    assert choose(tuner, "another") == DEFAULT and clock.calls == 6


def test_a_little_faster_is_not_worth_another_choice() -> None:
    assert choose(tuning.Tuner(Clock([1.0, 0.99, 0.98]), lambda: True)) == DEFAULT


def test_nothing_is_measured_during_capture() -> None:
    capturing = True
    clock = Clock([3.0, 1.0, 2.0])
    tuner = tuning.Tuner(clock, lambda: not capturing)
    assert choose(tuner) == DEFAULT and clock.calls == 0
    capturing = False
    assert choose(tuner) == {"num_warps": 4}  # the default was not kept for good
    capturing = True
    assert choose(tuner) == {"num_warps": 4} and clock.calls == 3


def test_what_does_not_fit_the_card_is_not_chosen() -> None:
    def run(num_warps: int) -> None:
        if num_warps == 4:
            raise tuning.OutOfResources(300_000, 200_000, "shared memory")

    assert choose(tuning.Tuner(Clock([2.0, 1.0]), lambda: True), run=run) == {"num_warps": 16}


def test_no_measurement_where_the_stream_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose(tuning.Tuner(Clock([]))) == DEFAULT


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> tuning.Tuner:
    """Every launch of this test is tuned, by a clock that runs each candidate."""
    from kernelmeta.triton import launch

    tuner = tuning.Tuner(lambda run: run() or 1.0, lambda: True)  # type: ignore[func-returns-value]
    monkeypatch.setattr(launch, "TUNER", tuner)
    return tuner


@interpreted
def test_tuning_leaves_results_alone(timed: tuning.Tuner) -> None:
    e = draw(T=1, S=4, Q=5, H=4).fresh()
    steps: dict[str, Any] = {"steps": 2, "inner_lr": 0.05, "return_weights": True}
    got, want = both(lambda: km.ops.sib(*e.arguments(), **steps), e.leaves())
    assert_close(got, want, 1e-6)
    classes = len(timed.chosen)
    assert classes >= 4
    with km.use_backend("triton"):
        km.ops.sib(*e.arguments(), **steps)
    assert len(timed.chosen) == classes

    leaves = [e.support, e.query, e.scale]
    one = torch.ones(1, dtype=torch.float64)
    got, want = both(lambda: km.ops.ridge(e.support, e.labels, e.query, one, e.scale, one, n_way=3), leaves)
    assert_close(got, want, 1e-9)
    phases = [km.nn.Phase("soft_assignment", 1, 1.0), km.nn.Phase("synthetic_gradient", 1, 0.1)]
    got, want = both(
        lambda: km.ops.program(e.support, e.labels, e.query, phases, n_way=3, scale=e.scale, mlp=e.mlp),
        [*leaves, *e.mlp],
    )
    assert_close(got, want, 1e-8)


@interpreted
def test_kernels_that_change_what_they_read_are_tuned_on_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """However often a candidate is run, the bits are those without tuning."""
    from kernelmeta.triton import launch

    e = draw(T=1, S=4, Q=5, H=4).fresh()
    one = torch.ones(1, dtype=torch.float64)
    learners: dict[str, Callable[[], Any]] = {
        "sib": lambda: km.ops.sib(*e.arguments(), steps=2, inner_lr=0.05, return_weights=True),
        "ridge": lambda: km.ops.ridge(e.support, e.labels, e.query, one, e.scale, one, n_way=3),
        **{
            oracle: lambda oracle=oracle: km.ops.program(
                e.support, e.labels, e.query, [km.nn.Phase(oracle, 2, 0.5)], n_way=3, scale=4 * e.scale, mlp=e.mlp
            )
            for oracle in ("cross_entropy", "entropy", "soft_assignment", "synthetic_gradient")
        },
    }

    def bits(run: Callable[[], Any]) -> list[torch.Tensor]:
        with km.use_backend("triton"):
            found = run()
        found = [found] if isinstance(found, torch.Tensor) else [found[0], found[1].weight]
        loss = sum(f.square().sum() for f in found)
        leaves = [leaf for leaf in e.leaves() if leaf.requires_grad]
        grads = torch.autograd.grad(loss, leaves, allow_unused=True)
        return [*found, *(g for g in grads if g is not None)]

    for name, run in learners.items():
        monkeypatch.setattr(launch, "TUNER", None)
        want = bits(run)
        monkeypatch.setattr(launch, "TUNER", tuning.Tuner(lambda run: [run() for _ in range(3)] and 1.0, lambda: True))
        got = bits(run)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), name
