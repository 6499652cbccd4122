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
    strengths, solved = [], []
    for t in range(len(EPISODE.support)):
        J, network, x, q = by_hand(head, EPISODE.support[t], EPISODE.query[t])
        strengths.append((J @ J.mT).diagonal())
        solved.append((J, network, x, q))
    strength = 0.3 * torch.cat(strengths).mean()
    for t, (J, network, x, q) in enumerate(solved):
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
