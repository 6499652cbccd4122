"""Rows of extreme length: right results, or NaN for their task; never a row of zeros."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from episodes import draw
from extremes import SIZES, check

import kernelmeta as km

LABELS = torch.arange(3).repeat(1, 2)
EPISODE = draw(T=1, S=6, Q=9, N=3, D=8)


def sib(support: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    own = EPISODE.map(lambda t: t.to(torch.float64 if support.dtype is torch.float64 else torch.float32))
    return km.ops.sib(support, LABELS, query, own.weight, own.scale, own.bias, own.mlp, steps=2, inner_lr=0.01)


def program(support: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    phases = [km.nn.Phase("cross_entropy", 2, 0.1), km.nn.Phase("soft_assignment", 2, 1.0)]
    dtype = torch.float64 if support.dtype is torch.float64 else torch.float32
    return km.ops.program(support, LABELS, query, phases, n_way=3, scale=torch.full((1,), 10.0, dtype=dtype))


def prototypes(support: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    return km.ops.class_means(support, LABELS, 3)


@pytest.mark.parametrize("f", [sib, program, prototypes])
@pytest.mark.parametrize(("dtype", "support", "query"), SIZES)
def test_extreme_rows(f: Any, dtype: torch.dtype, support: float, query: float) -> None:
    rows = [EPISODE.support, EPISODE.query]
    check(f, rows, dtype, [support, query], "cpu")


@pytest.mark.parametrize("f", [sib, program, prototypes])
def test_one_row_of_the_task(f: Any) -> None:
    """Among rows of the usual length."""
    for row, size in ((0, 1e25), (2, 1e-21)):
        support, query = EPISODE.support.clone(), EPISODE.query.clone()
        support[:, row] *= size
        query[:, row] *= size
        check(f, [support, query], torch.float32, [1.0, 1.0], "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("f", [sib, program])
def test_a_class_of_zeros(f: Any, dtype: torch.dtype) -> None:
    """The kernel and the reference agree, and their gradients are finite."""
    support = EPISODE.support.clone()
    support[:, LABELS[0] == 1] = 0
    check(f, [support, EPISODE.query], dtype, [1.0, 1.0], "cpu")
    leaves = [support.to(dtype).requires_grad_(), EPISODE.query.to(dtype).requires_grad_()]
    for backend in ("cpu", "reference"):
        with km.use_backend(backend):
            logits = f(*leaves)
        assert all(g.isfinite().all() for g in torch.autograd.grad(logits.square().sum(), leaves)), backend
