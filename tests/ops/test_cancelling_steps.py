"""Steps of a cosine classifier that cancel in the space of the rows: repeated and collinear rows, few features, pulls
parallel to the classifier, at rates from 1e-6 to 10.
"""

from __future__ import annotations

import pytest
import torch
from cancelling import RATES, ROWS, SHAPES, TASKS, draw_tasks, errors, judge, program, run, sib
from long_doubles import HAS_MORE_DIGITS, marginal_entropy_steps

import kernelmeta as km

ORACLES = tuple(km.phases.ORACLES)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", SHAPES)
def test_sib(shape: str, rows: str) -> None:
    # Most is lost where rows are collinear, and differs most from task to task.
    rates, tasks = ((1e-3, 0.1, 10.0), 24) if rows == "collinear" else (RATES[ROWS.index(rows) % 2 :: 2], TASKS)
    for seed, rate in enumerate(rates):
        assert not judge(lambda e, rate=rate: sib(e, rate), draw_tasks(shape, rows, seed, tasks), "cpu"), rate


@pytest.mark.parametrize("oracle", ORACLES)
@pytest.mark.parametrize("shape", SHAPES)
def test_program(shape: str, oracle: str) -> None:
    # Newton's steps end where they meet the shares, to 1e-10 and in float32 to 1e-5.
    exact, few = (1e-7, 1e-5) if oracle == "assignment" else (1e-9, 1e-6)
    for seed, rate in enumerate((1e-3, 0.1, 0.5, 10.0)):
        phase = km.nn.Phase(oracle, 4, rate)
        episode = draw_tasks(shape, ("random", "duplicate")[seed % 2], seed, tasks=24)
        want = None
        if (shape, oracle, rate) == ("few features", "marginal_entropy", 10.0):
            # Here two classes are alike. What a product of matrices rounds apart grows forty times a step, in the
            # reference too.
            if not HAS_MORE_DIGITS:
                continue
            want = marginal_entropy_steps(episode, 4, rate)
        assert not judge(lambda e, phase=phase: program(e, phase), episode, "cpu", exact, few, want), rate


def test_errors_over_many_draws() -> None:
    """Where one draw says little, since digits are lost in any form: a rate of 10, cross-entropy."""
    phase, ratios = km.nn.Phase("cross_entropy", 4, 10.0), []
    for seed in range(16):
        episode = draw_tasks("1-shot", ("random", "duplicate")[seed % 2], seed)
        want, plain, single = (
            run(lambda e: program(e, phase), episode, dtype, backend)
            for dtype, backend in (
                (torch.float64, "reference"),
                (torch.float32, "reference"),
                (torch.float32, "cpu"),
            )
        )
        of_plain, of_kernel = (errors(found, want).median(0).values[:6] for found in (plain, single))
        ratios.append(of_kernel / of_plain.clamp_min(1e-6))
    assert (torch.stack(ratios).median(0).values < 3).all()


def test_squared_error_of_one_shot() -> None:
    """On a cosine classifier: the pull of a class's own row is parallel to the classifier."""
    torch.manual_seed(0)
    support, query = torch.randn(20, 5, 64), torch.randn(20, 15, 64)
    labels = torch.arange(5).expand(20, 5)

    def logits(dtype: torch.dtype, rate: float, backend: str) -> torch.Tensor:
        phases = [km.nn.Phase("squared_error", 5, rate)]
        scale = torch.tensor([10.0], dtype=dtype)
        with km.use_backend(backend):
            return km.ops.program(support.to(dtype), labels, query.to(dtype), phases, n_way=5, scale=scale)

    for rate in (0.003, 0.01, 0.03, 0.1, 0.5, 1.0):
        want = logits(torch.float64, rate, "reference")
        of_task = [
            (logits(dtype, rate, backend) - want).abs().flatten(1).amax(1).median()
            for dtype, backend in ((torch.float64, "cpu"), (torch.float32, "cpu"), (torch.float32, "reference"))
        ]
        assert of_task[0] < 1e-11, rate
        assert of_task[1] < 3 * of_task[2] + 5e-6, rate
