"""Starts from bags of rows, and proportions from counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from episodes import assert_close
from torch import Tensor
from torch.nn.functional import normalize

import kernelmeta as km
from kernelmeta.nn import Phase


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_mean_map_is_the_solution_of_the_normal_equations() -> None:
    query, P = drawn(2, 10, 6), drawn(2, 4, 3, seed=1).softmax(-1)
    sizes = [3, 0, 5, 2]
    offsets = torch.tensor([0, 3, 3, 8, 10])
    theta = km.ops.mean_map(query, P, offsets, ridge=0.1)
    for t in range(2):
        bags = normalize(query[t], dim=-1).split(sizes)
        rows = [i for i, n in enumerate(sizes) if n]
        M, own = torch.stack([bags[i].mean(0) for i in rows]), P[t, rows]
        want = torch.linalg.solve(own.T @ own + 0.1 * torch.eye(3).double(), own.T @ M)
        assert_close([theta[t]], [want], 1e-12)
    flat = km.ops.mean_map(query.flatten(0, 1), P, offsets.expand(2, -1), ridge=0.1)
    assert_close([flat], [theta], 1e-14)
    assert torch.autograd.gradcheck(
        lambda q, p: km.ops.mean_map(q, p.softmax(-1), offsets),
        (query.requires_grad_(), drawn(2, 4, 3).requires_grad_()),
    )


def test_bags_of_one_class_each_give_the_class_means() -> None:
    query = drawn(1, 9, 5)
    theta = km.ops.mean_map(query, torch.eye(3).double()[None], torch.tensor([0, 2, 5, 9]), ridge=1e-9, normalize=False)
    want = torch.stack([rows.mean(0) for rows in query[0].split([2, 3, 4])])
    assert_close([theta[0]], [want], 1e-8)


def test_a_program_learns_from_proportions_alone() -> None:
    g = torch.Generator().manual_seed(0)
    answers = torch.rand(4, 8, 3, generator=g).flatten(0, 1).multinomial(12, replacement=True, generator=g).view(4, 96)
    centres = drawn(4, 3, 20)
    query = centres.gather(1, answers.unsqueeze(-1).expand(-1, -1, 20)) + 1.2 * drawn(4, 96, 20, seed=1)
    shares = torch.nn.functional.one_hot(answers.view(4, 8, 12), 3).double().mean(2)
    offsets = torch.arange(9) * 12
    phases = [Phase("soft_assignment", 5, 1.0, marginals="given")]
    found = {}
    for name, own in (("start", []), ("refined", phases)):
        head = km.nn.Program(3, 20, own, start="mean_map").double()
        z = head(None, None, query, proportions=shares, bag_offsets=offsets)
        found[name] = (z.argmax(-1) == answers).double().mean()
    assert found["refined"] > 0.97 and found["refined"] > found["start"]
    with pytest.raises(ValueError, match="start: 'mean_map' needs proportions and bag_offsets"):
        head(None, None, query)


def test_smoothed_proportions() -> None:
    counts = torch.tensor([[3, 0, 7], [0, 0, 1]])
    assert_close(
        [km.ops.smoothed_proportions(counts)], [torch.tensor([[5, 2, 9], [2, 2, 3]]) / torch.tensor([[16], [7]])], 1e-7
    )
    assert_close([km.ops.smoothed_proportions(counts.double(), by=0)], [counts / counts.sum(-1, keepdim=True)], 1e-7)
    with pytest.raises(ValueError, match="counts: expected numbers from 0"):
        km.ops.smoothed_proportions(torch.tensor([1, -1]))
    with pytest.raises(ValueError, match="counts: expected numbers from 0"):
        km.ops.smoothed_proportions(torch.zeros(3), by=0.0)
    with pytest.raises(ValueError, match="by: expected 0 or more"):
        km.ops.smoothed_proportions(torch.ones(3), by=-1.0)


def on_corners(name: str) -> tuple[Tensor, Tensor]:
    """Three tasks of 20 rows in four bags, of which the first is a corner."""
    query, shares = drawn(3, 20, 6), drawn(3, 4, 3, seed=1).softmax(-1)
    if name == "zero rows":
        query[0, :4] = 0
    elif name == "only zero rows":
        query[0] = 0
    elif name == "collinear rows":
        query[0] = query[0, :1] * torch.linspace(-2, 2, 20).double()[:, None]
    elif name == "repeated rows":
        query[0] = query[0, :1]
    elif name == "one feature":
        query = query[..., :1]
    elif name == "one share":
        shares[0] = shares[0, :1]
    elif name == "certain shares, one class left out":
        shares[0] = torch.eye(3).double()[[0, 0, 1, 1]]
    else:
        query[0] *= float(name)
    return query, shares


CORNERS = ["zero rows", "only zero rows", "collinear rows", "repeated rows", "one feature", "one share",
           "certain shares, one class left out", "1e19", "1e30", "1e-19", "1e-30"]  # fmt: skip


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("corner", CORNERS)
def test_mean_map_on_corners(corner: str, normalize: bool) -> None:
    """In float32 as in float64, as far as the normal equations' condition lets it; gradients of rows alike."""
    found = {}
    for dtype in (torch.float64, torch.float32):
        query, shares = (t.to(dtype) for t in on_corners(corner))
        query.requires_grad_()
        theta = km.ops.mean_map(query, shares, torch.tensor([0, 3, 9, 14, 20]), normalize=normalize)
        largest = theta.detach().abs().amax((1, 2), keepdim=True)
        theta = theta / torch.where(largest > 0, largest, 1)
        weights = drawn(*theta.shape, seed=2).to(dtype)
        found[dtype] = [theta.detach(), torch.autograd.grad((theta * weights).sum(), query)[0]]
    least = 1e-6 if corner == "one feature" else 1e-30  # (a unit row of one feature has no gradient but rounding)
    for single, double in zip(found[torch.float32], found[torch.float64], strict=True):
        error = (single.double() - double).abs().amax((1, 2))
        assert (error <= 3e-4 * double.abs().amax((1, 2)) + least).all(), error


BAD: list[tuple[dict[str, Any], str]] = [
    ({"ridge": 0.0}, "ridge: expected a positive number"),
    ({"bag_offsets": torch.tensor([0, 3, 9])}, "bag_offsets: expected bags of 20 rows in all, got 18"),
    ({"bag_offsets": torch.tensor([0, 10])}, r"bag_offsets: expected shape \[T, B \+ 1\] = \[2, 3\]"),
    ({"proportions": torch.ones(2, 3)}, r"proportions: expected shape \[T, B, N\]"),
    ({"query": torch.ones(10)}, "query: expected shape"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    given = {
        "query": drawn(2, 10, 6),
        "proportions": torch.ones(2, 2, 3).double() / 3,
        "bag_offsets": torch.tensor([0, 4, 10]),
    }
    given |= change
    with pytest.raises((ValueError, TypeError), match=message):
        km.ops.mean_map(given.pop("query"), given.pop("proportions"), given.pop("bag_offsets"), **given)
