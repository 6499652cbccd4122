"""MAML as a module, and rows of a bank for the learners that gather them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import kernelmeta as km


def tasks(dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(0)
    bank = torch.randn(40, 6, generator=generator).to(dtype)
    support, query = (torch.randint(40, (3, n), generator=generator) for n in (6, 5))
    return bank, support, torch.tensor([0, 1, 2, 0, 1, 2]).expand(3, 6), query


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


@pytest.mark.parametrize("first_order", [False, True])
def test_the_module_is_the_function(first_order):
    bank, support, labels, query = tasks()
    net = network()
    head = km.nn.MAML(net, 3, steps=2, inner_lr=0.3, first_order=first_order, n_features=6)
    expected = km.func.maml(net, steps=2, inner_lr=0.3, first_order=first_order)(bank[support], labels, bank[query])
    assert torch.equal(head(bank[support], labels, bank[query]), expected)
    assert torch.equal(head.from_bank(bank, support, labels, query), expected)
    assert {id(p) for p in head.parameters()} == {id(p) for p in net.parameters()}
    assert (head.n_way, head.n_features, head.steps) == (3, 6, 2)


def test_rates_are_learned_one_for_each_step():
    bank, support, labels, query = tasks()
    head = km.nn.MAML(network(), 3, steps=2, inner_lr=0.3, learn_rates=True)
    plain = km.nn.MAML(network(), 3, steps=2, inner_lr=0.3)
    outputs = head.from_bank(bank, support, labels, query)
    torch.testing.assert_close(outputs, plain.from_bank(bank, support, labels, query))
    outputs.square().sum().backward()
    assert head.rates.shape == (2,)
    assert (head.rates.grad != 0).all()
    # A step later the rates are other ones.
    with torch.no_grad():
        head.rates.zero_()
    untouched = km.nn.MAML(network(), 3, steps=0)
    torch.testing.assert_close(
        head.from_bank(bank, support, labels, query), untouched.from_bank(bank, support, labels, query)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rows_are_computed_in_the_networks_dtype(dtype):
    bank, support, labels, query = tasks(dtype)
    head = km.nn.MAML(network(), 3, steps=2, inner_lr=0.3)
    found = head.from_bank(bank, support, labels, query)
    assert found.dtype == torch.float32
    assert torch.equal(found, head.from_bank(bank.float(), support, labels, query))


def test_what_cannot_be_is_said_when_it_is_made():
    with pytest.raises(ValueError, match="steps: expected at least 0"):
        km.nn.MAML(network(), 3, steps=-1)
    with pytest.raises(ValueError, match="norm_stats: expected one of task, running"):
        km.nn.MAML(network(), 3, norm_stats="batch")


@pytest.mark.parametrize("head", [km.nn.Prototypes(3, 6), km.nn.SoftKMeans(3)], ids=["prototypes", "soft k-means"])
def test_rows_of_a_bank_are_those_gathered(head):
    bank, support, labels, query = tasks()
    assert torch.equal(head.from_bank(bank, support, labels, query), head(bank[support], labels, bank[query]))
