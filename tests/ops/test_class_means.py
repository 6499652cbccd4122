from __future__ import annotations

from typing import Any

import pytest
import torch
from episodes import assert_close, draw, shapes
from hypothesis import given
from hypothesis import strategies as st

import kernelmeta as km


@given(shapes(), st.booleans())
def test_equals_the_reference(sizes: dict[str, int], weighted: bool) -> None:
    episode = draw(**sizes).fresh()
    weight = episode.weight if weighted else None
    leaves = [episode.support, *([episode.weight] if weighted else [])]
    outs = []
    for op in (km.ops.class_means, km.reference.class_means):
        theta0 = op(episode.support, episode.labels, sizes["N"], weight)
        outs.append([theta0, *torch.autograd.grad(theta0.pow(3).sum(), leaves)])
    assert_close(*outs, 1e-11)


def test_a_row_of_zeros_counts_as_zero() -> None:
    support = torch.zeros(1, 2, 4, requires_grad=True)
    theta0 = km.ops.class_means(support, torch.tensor([[0, 1]]), 2)
    assert theta0.abs().max() == 0
    want = km.reference.class_means(support, torch.tensor([[0, 1]]), 2)
    assert_close(torch.autograd.grad(theta0.sum(), support), torch.autograd.grad(want.sum(), support), 1e-6)


@pytest.mark.parametrize("backend", ["automatic", "reference"])
@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        ([[0, 0]], ValueError, "task 0 has no row of class 1"),
        ([[0, 2]], ValueError, r"label 2; labels must be in 0\.\.1"),
        ([[0.0, 1.0]], TypeError, "expected int64"),
        ([[0, 1, 1]], ValueError, "support_labels: expected shape"),
    ],
)
def test_bad_labels(labels: Any, error: type[Exception], message: str, backend: str) -> None:
    with km.use_backend(None if backend == "automatic" else backend), pytest.raises(error, match=message):
        km.ops.class_means(torch.randn(1, 2, 4), torch.tensor(labels), 2)


def test_low_precision() -> None:
    support = torch.randn(2, 4, 9).bfloat16()
    labels = torch.tensor([[0, 1, 1, 0]] * 2)
    got = km.ops.class_means(support, labels, 2)
    assert got.dtype is torch.bfloat16
    assert_close([got], [km.reference.class_means(support.double(), labels, 2)], 1e-2)
