"""Steps that cancel in the space of the rows: tasks done anew in D dimensions; see tests/cancelling.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cancelling import bias_gradients, draw_tasks, judge, program, sib
from episodes import assert_close, draw
from extremes import SIZES, check
from ops.test_extreme_rows import EPISODE, prototypes
from ops.test_extreme_rows import program as extreme_program
from ops.test_extreme_rows import sib as extreme_sib
from triton_kernels.interpreter import both, interpreted

import kernelmeta as km

pytest.importorskip("triton", reason="Triton is not installed")


# Half as many as on the CPU: the interpreter takes its time.
TASKS = 12


@interpreted
@pytest.mark.parametrize("rows", ["random", "duplicate"])
def test_sib(rows: str) -> None:
    for shape, rate in (("one feature", 1e-3), ("few features", 10.0)):
        assert not judge(lambda e, rate=rate: sib(e, rate), draw_tasks(shape, rows, tasks=TASKS), "triton"), (
            shape,
            rate,
        )


@interpreted
@pytest.mark.parametrize("oracle", ["squared_error", "soft_assignment", "synthetic_gradient"])
def test_program(oracle: str) -> None:
    for shape, rate in (("one feature", 1e-3), ("few features", 0.5)):
        phase = km.nn.Phase(oracle, 3, rate)
        episode = draw_tasks(shape, "duplicate", tasks=TASKS)
        complaints = judge(lambda e, phase=phase: program(e, phase), episode, "triton")
        assert not complaints, (shape, rate)


@interpreted
def test_gradients_of_the_mlp() -> None:
    triton, reference = (bias_gradients(backend, torch.float32) for backend in ("triton", "reference"))
    assert (triton < 3 * reference).all(), (triton, reference)


@interpreted
@pytest.mark.parametrize("bank", [False, True])
def test_some_tasks_are_done_anew(bank: bool) -> None:
    """They and their neighbours, with weights, and with rows of a bank."""
    episode = draw(T=4, S=4, Q=9, N=2, D=6)
    near = episode.support[:, :1] + 1e-3 * episode.query
    query = torch.where(torch.tensor([True, False, True, False]).view(-1, 1, 1), near, episode.query)
    episode = episode._replace(query=query).fresh()
    options: dict[str, Any] = {"steps": 2, "inner_lr": 1.0}
    index = [torch.arange(4 * n).view(4, n).flip(1) for n in (4, 9)]

    def call() -> Any:
        if not bank:
            return km.ops.sib(*episode.arguments(), **options, return_weights=True)
        support, labels, query, *rest = episode.arguments()
        banks = support.flatten(0, 1), labels, query.flatten(0, 1)
        return km.ops.sib(*banks, *rest, **options, support_index=index[0], query_index=index[1])

    assert_close(*both(call, episode.leaves()), 1e-5)


@interpreted
def test_unequal_tasks_done_anew() -> None:
    g = torch.Generator().manual_seed(0)
    counts = {"support": [3, 6, 4], "query": [9, 2, 17]}
    features = {k: torch.randn(sum(n), 5, generator=g, dtype=torch.float64) for k, n in counts.items()}
    features["query"][9:] = features["support"][:1] * torch.randn(19, 1, generator=g, dtype=torch.float64)
    offsets = {k: torch.tensor([0, *n]).cumsum(0) for k, n in counts.items()}
    labels = torch.tensor([0, 1, 2, 0, 1, 0, 1, 0, 0, 0, 1, 2, 1])
    leaves = [features["support"].requires_grad_(), features["query"].requires_grad_()]
    scale = torch.tensor([10.0], dtype=torch.float64, requires_grad=True)
    phases = [km.nn.Phase("squared_error", 2, 0.5), km.nn.Phase("soft_assignment", 2, 1.0)]

    def call() -> Any:
        return km.ops.program(
            leaves[0], labels, leaves[1], phases, n_way=3, scale=scale, return_weights=True,
            ragged=km.Ragged(offsets["support"], offsets["query"], torch.tensor([3, 2, 3])),
        )  # fmt: skip

    def finite() -> Any:
        logits, weights = call()
        return logits.masked_fill(logits == -float("inf"), 0), weights

    assert_close(*both(finite, [*leaves, scale]), 1e-5)


@interpreted
@pytest.mark.parametrize(("dtype", "support", "query"), SIZES)
def test_extreme_rows(dtype: torch.dtype, support: float, query: float) -> None:
    for f in (extreme_sib, extreme_program, prototypes):
        check(f, [EPISODE.support, EPISODE.query], dtype, [support, query], "triton")
