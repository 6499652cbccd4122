"""The transductive methods on rows that tests of accuracy never draw."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transductive.test_transductive import METHODS, SHORT, episodes

WAY = 4


def corner(name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Three tasks, of which the first is a corner: support, labels, query."""
    support, labels, query, _ = episodes(3, WAY, 3, 20)
    if name == "zero rows":
        support[0, 0], query[0, 3] = 0, 0
    elif name == "only zero rows":
        support[0], query[0] = 0, 0
    elif name == "a class of zero rows":
        support[0, :3] = 0
    elif name == "repeated rows":
        support[0, 1], query[0] = support[0, 0], query[0, :1].clone()
    elif name == "queries that are support rows":
        query[0, :12] = support[0]
    elif name == "collinear rows":
        query[0] = support[0, :1] * torch.linspace(-2, 2, 20)[:, None].double()
        support[0] = support[0, :1].clone() * torch.arange(1, 13)[:, None]
    elif name == "one feature":
        support, query = support[..., :1], query[..., :1]
    elif name != "usual":
        support[0] *= float(name)
        query[0] *= float(name)
    return support, labels, query


# Float32 has no order to find there that float64 has: rows tie exactly, or neighbours are as near as each other.
TIES = {"only zero rows", "repeated rows", "collinear rows", "one feature"}
CORNERS = ["usual", "zero rows", "a class of zero rows", "queries that are support rows", *sorted(TIES)]


@pytest.mark.parametrize("name", CORNERS)
@pytest.mark.parametrize("method", METHODS)
def test_corners_are_finite_and_in_float32_as_in_float64(method: str, name: str) -> None:
    support, labels, query = corner(name)
    options = {"n_way": WAY, **SHORT.get(method, {})}
    double = METHODS[method](support, labels, query, **options)
    single = METHODS[method](support.float(), labels, query.float(), **options)
    assert double.isfinite().all() and single.isfinite().all()
    if name not in TIES:
        assert torch.equal(double.argmax(-1), single.argmax(-1))
    if name != "one feature":  # (every task has it)
        usual = METHODS[method](*corner("usual"), **options)
        assert torch.equal(double[1:], usual[1:])


@pytest.mark.parametrize("length", ["1e-30", "1e-19", "1e19", "1e30"])
@pytest.mark.parametrize("method", sorted(set(METHODS) - {"logistic_regression"}))  # (scikit-learn's, on the CPU)
def test_rows_of_extreme_length_are_right_or_not_finite(method: str, length: str) -> None:
    support, labels, query = corner(length)
    options = {"n_way": WAY, **SHORT.get(method, {})}
    double = METHODS[method](support, labels, query, **options)
    single = METHODS[method](support.float(), labels, query.float(), **options)
    assert torch.equal(single[1:].argmax(-1), double[1:].argmax(-1))
    own = single[0].double()
    if own.isfinite().all():
        assert (own.argmax(-1) == double[0].argmax(-1)).all() or (
            own.softmax(-1) - double[0].softmax(-1)
        ).abs().max() < 1e-6
    else:
        assert not own.isfinite().any(-1).any()  # no row of that task pretends
