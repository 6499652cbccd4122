"""LQF as a learner: a linearised network, fitted to every task."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from episodes import assert_close, draw
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize, one_hot

import kernelmeta as km
from kernelmeta.linear import Linearised

EPISODE = draw()  # 3 ways, 13 features, float64


def made(**options: Any) -> Any:
    torch.manual_seed(0)
    return km.nn.LQF(3, 13, **{"hidden": 7, **options}).double()


def by_hand(head: Any, support: Tensor, query: Tensor) -> tuple[Tensor, nn.Module, Tensor, Tensor]:
    """The Jacobian of a plain module on the support rows [S N, P], that module, and its rows, of one task."""
    parts: list[nn.Module] = []
    for weight, bias in zip(head.weights, head.biases, strict=True):
        layer = nn.Linear(weight.shape[1], weight.shape[0]).double()
        layer.weight, layer.bias = nn.Parameter(weight.detach()), nn.Parameter(bias.detach())
        parts += [layer, nn.LeakyReLU(head.slope)]
    network = nn.Sequential(*parts[:-1])
    x, q = (normalize(rows, dim=-1) * math.sqrt(rows.shape[-1]) for rows in (support, query))
    J = torch.func.jacrev(lambda p: torch.func.functional_call(network, p, x))(dict(network.named_parameters()))
    jacobian = torch.cat([J[name].flatten(2) for name, _ in network.named_parameters()], 2).flatten(0, 1)
    return jacobian, network, x, q


@pytest.mark.parametrize("hidden", [7, (6, 5)])
def test_equals_ridge_regression_on_the_weights(hidden: Any) -> None:
    head = made(hidden=hidden, target_scale=15.0, regularization=0.3, slope=0.1)
    got = head(EPISODE.support, EPISODE.labels, EPISODE.query)
    for t in range(len(EPISODE.support)):
        J, network, x, q = by_hand(head, EPISODE.support[t], EPISODE.query[t])
        strength = 0.3 * (J @ J.mT).diagonal().mean()  # of the task alone
        gap = (15 * one_hot(EPISODE.labels[t], 3).double() - network(x)).flatten()
        moved = torch.linalg.solve(J.mT @ J + strength * torch.eye(J.shape[1]).double(), J.mT @ gap)
        model = Linearised(network)
        with torch.no_grad():
            at = 0
            for name, parameter in network.named_parameters():
                size = parameter.numel()
                model.moved[name.replace(".", "_")].copy_(moved[at : at + size].view_as(parameter))
                at += size
            assert_close([got[t].detach()], [model(q)], 1e-8)


def test_gradients_of_everything() -> None:
    head = made()
    parameters = list(head.parameters())

    def logits(support: Tensor, query: Tensor, *values: Tensor) -> Tensor:
        named = dict(zip((name for name, _ in head.named_parameters()), values, strict=True))
        found: Tensor = torch.func.functional_call(head, named, (support, EPISODE.labels, query))
        return found

    assert torch.autograd.gradcheck(logits, (EPISODE.support.requires_grad_(), EPISODE.query, *parameters), atol=1e-5)


def test_classes_and_rows_in_another_order() -> None:
    head = made()
    rows = torch.randperm(EPISODE.labels.shape[1], generator=torch.Generator().manual_seed(1))
    again = head(EPISODE.support[:, rows], EPISODE.labels[:, rows], EPISODE.query)
    assert_close([again], [head(EPISODE.support, EPISODE.labels, EPISODE.query)], 1e-9)


def test_it_learns() -> None:
    head = made().float()
    support, query = EPISODE.support.detach().float(), EPISODE.query.float()
    labels = torch.randint(3, query.shape[:2], generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = cross_entropy(head(support, EPISODE.labels, query).flatten(0, 1), labels.flatten())
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.8 * losses[0]


def corner(name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Support rows [4, 6, D], labels, query rows [4, 5, D] of three ways, float64."""
    g = torch.Generator().manual_seed(0)
    D = 1 if name == "one feature" else 13
    support, query = (torch.randn(4, rows, D, generator=g, dtype=torch.float64) for rows in (6, 5))
    if name == "collinear rows":
        support = support[:, :1] * torch.arange(1.0, 7.0, dtype=torch.float64)[:, None]
    elif name == "repeated rows":
        support = support[:, :1].expand_as(support)
    elif name == "rows of zeros":
        support, query = torch.zeros_like(support), torch.zeros_like(query)
    elif name == "tiny rows":
        support, query = 1e-9 * support, 1e-9 * query
    elif name == "huge rows":
        support, query = 1e12 * support, 1e12 * query
    return support, (torch.arange(6) % 3).expand(4, 6), query


@pytest.mark.parametrize(
    "name", ["collinear rows", "repeated rows", "rows of zeros", "one feature", "tiny rows", "huge rows"]
)
def test_rows_that_say_little(name: str) -> None:
    """Finite in float32, forward and backward, and what float64 says."""
    support, labels, query = corner(name)
    torch.manual_seed(0)
    head = km.nn.LQF(3, support.shape[-1], hidden=7)
    results = []
    for dtype in (torch.float32, torch.float64):
        head = head.to(dtype)
        rows = support.to(dtype).requires_grad_()
        logits = head(rows, labels, query.to(dtype))
        grads = torch.autograd.grad(logits.sin().sum(), [rows, *head.parameters()])
        assert all(torch.isfinite(t).all() for t in (logits, *grads))
        results.append([logits.double(), *(g.double() for g in grads[1:])])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * float(want.abs().max().clamp_min(1e-3)))


def test_a_task_does_not_depend_on_the_others() -> None:
    head, (support, labels, query) = made(), corner("")
    together = head(support * torch.tensor([1.0, 3.0, 0.1, 9.0], dtype=torch.float64).view(-1, 1, 1), labels, query)
    rows = normalize(torch.randn(4, 6, 13, generator=torch.Generator().manual_seed(1), dtype=torch.float64), dim=-1)
    other = support.clone()
    other[1:] = 5 + rows[1:]
    assert_close([head(other, labels, query)[:1]], [together[:1]], 1e-9)


def test_no_tasks() -> None:
    head = made()
    empty = torch.zeros(0, 6, 13, dtype=torch.float64)
    logits = head(empty, torch.zeros(0, 6, dtype=torch.int64), empty[:, :5])
    assert logits.shape == (0, 5, 3)
    logits.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in head.parameters())


def test_a_task_that_is_not_a_number_stays_alone() -> None:
    head, (support, labels, query) = made(), corner("")
    want = head(support, labels, query)
    support[2, 1, 3] = math.nan
    got = head(support, labels, query)
    kept = [0, 1, 3]
    assert not torch.isfinite(got[2]).any()
    torch.testing.assert_close(got[kept], want[kept])


def test_autocast_and_inference() -> None:
    head, (support, labels, query) = made().float(), corner("")
    support, query = support.float(), query.float()
    want = head(support, labels, query)
    with torch.autocast("cpu", torch.bfloat16):
        half = head(support.bfloat16(), labels, query.bfloat16())
    assert half.dtype is torch.float32
    torch.testing.assert_close(half, want, rtol=0.2, atol=0.2 * float(want.abs().max()))
    with torch.inference_mode():
        torch.testing.assert_close(head(support, labels, query), want)


def test_tasks_of_unequal_size_are_refused() -> None:
    ragged = km.Ragged(torch.tensor([0, 3, 9]), torch.tensor([0, 2, 5]))
    rows = torch.randn(9, 13, dtype=torch.float64)
    with pytest.raises(ValueError, match="equal size"):
        made()(rows, torch.arange(9) % 3, rows[:5], ragged=ragged)


def test_what_it_is_not() -> None:
    head = made()
    assert not head.transductive
    with pytest.raises(ValueError, match="not one weight a class"):
        head(EPISODE.support, EPISODE.labels, EPISODE.query, return_weights=True)
    for options, message in (
        ({"n_way": 0}, "at least 1"), ({"hidden": ()}, "at least 1"), ({"hidden": 0}, "at least 1"),
        ({"target_scale": 0.0}, "target_scale: expected a positive number"),
        ({"regularization": math.inf}, "regularization: expected a positive number"), ({"slope": -1.0}, "slope"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            km.nn.LQF(**{"n_way": 3, "n_features": 4, **options})  # type: ignore[arg-type]
