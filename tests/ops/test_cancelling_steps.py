"""Steps of a cosine classifier that cancel in the space of the rows: repeated and collinear rows, few features, pulls
parallel to the classifier, at rates from 1e-6 to 10.
"""

from __future__ import annotations

import pytest
import torch
from cancelling import RATES, ROWS, SHAPES, draw_tasks, judge, program, sib

import kernelmeta as km

ORACLES = ("cross_entropy", "squared_error", "hinge", "entropy", "soft_assignment", "synthetic_gradient")


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", SHAPES)
def test_sib(shape: str, rows: str) -> None:
    for seed, rate in enumerate(RATES[ROWS.index(rows) % 2 :: 2]):
        assert not judge(lambda e, rate=rate: sib(e, rate), draw_tasks(shape, rows, seed), "cpu"), rate


@pytest.mark.parametrize("oracle", ORACLES)
@pytest.mark.parametrize("shape", SHAPES)
def test_program(shape: str, oracle: str) -> None:
    for seed, rate in enumerate((1e-3, 0.1, 0.5, 10.0)):
        phase = km.nn.Phase(oracle, 4, rate)
        episode = draw_tasks(shape, ("random", "duplicate")[seed % 2], seed)
        assert not judge(lambda e, phase=phase: program(e, phase), episode, "cpu"), rate


def test_squared_error_of_one_shot() -> None:
    """Squared error on a cosine classifier, 1-shot: the pull of a class's own row is parallel to the classifier."""
    torch.manual_seed(0)
    support, query = torch.randn(20, 5, 64), torch.randn(20, 15, 64)
    labels = torch.arange(5).expand(20, 5)
    for rate in (0.01, 0.1, 0.5, 1.0):
        phases = [km.nn.Phase("squared_error", 5, rate)]
        logits = km.ops.program(support, labels, query, phases, n_way=5, scale=torch.tensor([10.0]))
        with km.use_backend("reference"):
            want = km.ops.program(
                support.double(), labels, query.double(), phases, n_way=5, scale=torch.tensor([10.0]).double()
            )
        assert float((logits - want).abs().max() / want.abs().max()) < 1e-4
