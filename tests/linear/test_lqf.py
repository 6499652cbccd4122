"""Linearised networks, against the terms of the Taylor series."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call

import kernelmeta as km
from kernelmeta.training.backbones import make_backbone


def network() -> nn.Module:
    torch.manual_seed(0)
    parts = [nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(48, 4)]
    return nn.Sequential(*parts).double()


def moved(module: km.linear.Linearised, by: float) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p.copy_(by * torch.randn(p.shape, generator=generator, dtype=p.dtype))


def test_it_is_the_network_at_its_weights_and_linear_around_them() -> None:
    net, x = network(), torch.randn(5, 1, 6, 6).double()
    linear = km.linear.lqf(net).train()
    leaky = copy.deepcopy(net).eval()
    leaky[2] = nn.LeakyReLU(0.01)
    at_start = leaky(x)
    torch.testing.assert_close(linear(x), at_start)
    moved(linear, 0.3)
    once = linear(x) - at_start
    moved(linear, 0.6)
    torch.testing.assert_close(linear(x) - at_start, 2 * once)
    # The first term of the series: what is left over shrinks as the square.
    left = []
    for by in (1e-3, 1e-4):
        moved(linear, by)
        left.append((linear.folded()(x) - linear(x)).abs().max().item())
    assert left[1] < 0.02 * left[0]


def test_the_network_and_its_statistics_stay_as_they_are() -> None:
    net, x = network(), torch.randn(5, 1, 6, 6).double()
    before = copy.deepcopy(net.state_dict())
    linear = km.linear.lqf(net)
    optimizer = torch.optim.SGD([p for p in linear.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (linear(x) - 15 * torch.eye(4).double()[torch.arange(5) % 4]).square().sum() / 2
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert isinstance(net[2], nn.ReLU)
    other = km.linear.lqf(net)
    other.load_state_dict(linear.state_dict())
    assert torch.equal(other(x), linear(x))


def test_gradients_are_those_of_the_network_at_its_weights() -> None:
    net, x = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)).double(), torch.randn(7, 6).double()
    linear = km.linear.Linearised(net)
    parameters = dict(net.named_parameters())
    want = torch.autograd.grad(functional_call(net, parameters, (x,)).sum(), tuple(parameters.values()))
    moved(linear, 0.5)
    got = torch.autograd.grad(linear(x).sum(), tuple(linear.moved.values()))
    by_name = dict(zip((name.replace(".", "_") for name in parameters), want, strict=True))
    for name, gradient in zip(linear.moved, got, strict=True):
        torch.testing.assert_close(gradient, by_name[name])


@pytest.mark.parametrize(
    "call",
    [
        torch.relu, lambda h: h.relu(), nn.functional.relu, lambda h: nn.functional.relu(h, True),
        lambda h: nn.functional.relu(input=h.clone(), inplace=True), lambda h: torch.relu_(h), lambda h: h.relu_(),
        nn.functional.relu_, nn.ReLU(), nn.ReLU(inplace=True),
    ],
)  # fmt: skip
def test_relus_are_found_however_they_are_called(call: Any) -> None:
    class Network(nn.Module):
        def __init__(self, act: Any) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)
            self.act = act

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.second(self.act(self.first(x)))
            return found

    x = torch.randn(9, 4, dtype=torch.float64)
    got, want = (
        km.linear.lqf(Network(call).double(), slope=0.3),
        km.linear.Linearised(Network(nn.LeakyReLU(0.3)).double()),
    )
    for linear in (got, want):
        moved(linear, 0.5)
    torch.testing.assert_close(got(x), want(x))
    torch.testing.assert_close(got.folded()(x), want.folded()(x))
    kernels = [km.linear.ntk_gram(linear.folded(), x[None]) for linear in (got, want)]
    torch.testing.assert_close(*kernels)
    assert not torch.allclose(Network(call).double()(x), Network(nn.LeakyReLU(0.3)).double()(x))


def test_backbones_get_leaky_relus() -> None:
    """Ours call ReLU as a function."""
    torch.manual_seed(0)
    backbone = make_backbone("small-1.1-4.4.4-3.3.3-8", 1, 14).eval()
    x = torch.randn(3, 1, 14, 14)
    assert not torch.allclose(km.linear.lqf(backbone, slope=0.3)(x), backbone(x))
    torch.testing.assert_close(km.linear.lqf(backbone, slope=0.0)(x), backbone(x))


def test_wrong_input_is_named() -> None:
    with pytest.raises(TypeError, match=r"module: expected a torch\.nn\.Module, got int"):
        km.linear.lqf(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="none of its parameters"):
        km.linear.lqf(network().requires_grad_(False))
