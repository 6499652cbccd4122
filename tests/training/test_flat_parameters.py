"""Parameters in one tensor are trained as they would be one by one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kernelmeta.training.flat_parameters import FlatParameters, can_be_flat


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.BatchNorm1d(4), nn.Linear(4, 2))


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "NAdam"])
def test_steps_are_those_of_the_parameters_one_by_one(name):
    one_by_one, together = network().double(), network().double()
    flat = FlatParameters(list(together.parameters()))
    options = {"lr": 0.05, "weight_decay": 0.01, **({"momentum": 0.9} if name == "SGD" else {})}
    kind = getattr(torch.optim, name)
    optimizers = [kind(one_by_one.parameters(), **options), kind([flat.flat], **options)]
    for step in range(5):
        x = torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        for network_, optimizer in zip((one_by_one, together), optimizers, strict=True):
            network_.zero_grad()
            network_(x).square().mean().backward()
            if network_ is together:
                flat.gather()
            optimizer.step()
    for a, b in zip(one_by_one.parameters(), together.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_modules_notice_nothing():
    net = network()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    parameters = list(net.parameters())
    flat = FlatParameters(parameters)
    assert [id(p) for p in net.parameters()] == [id(p) for p in parameters]
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    with torch.no_grad():
        flat.flat.zero_()
    assert all(not p.any() for p in net.parameters())
    net.load_state_dict(before)
    assert torch.equal(flat.flat, torch.cat([before[name].flatten() for name, _ in net.named_parameters()]))


def test_a_parameter_without_a_gradient_has_one_of_zeros():
    net = network()
    flat = FlatParameters(list(net.parameters()))
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    flat.gather()
    assert bool((flat.flat.grad == 1).all())
    net[0].bias.grad = None
    flat.gather()
    assert int((flat.flat.grad == 0).sum()) == 4


def test_what_cannot_be_flat():
    parameters = list(network().parameters())
    assert can_be_flat(parameters, "Adam")
    assert not can_be_flat(parameters, "Adafactor")  # it looks at rows and columns
    assert not can_be_flat([*parameters, torch.zeros(2, dtype=torch.float64)], "Adam")
    assert not can_be_flat([], "Adam")
