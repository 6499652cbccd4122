"""Ridge regression in the space of the rows against the D x D system, in float64."""

from __future__ import annotations

import pytest
import torch
from episodes import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import kernelmeta as km


def draw(T: int, S: int, Q: int, N: int, D: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    support, query = (torch.randn(T, n, D, dtype=torch.float64, generator=g) for n in (S, Q))
    parameters = [torch.tensor([v], dtype=torch.float64) for v in (0.7, 3.0, 0.2)]
    return [support, torch.randint(N, (T, S), generator=g), query, *parameters]


@settings(max_examples=25)
@given(st.integers(1, 4), st.integers(1, 30), st.integers(1, 20), st.integers(1, 6), st.integers(1, 40))
def test_against_the_reference(T: int, S: int, Q: int, N: int, D: int) -> None:
    found = []
    for f in (km.ops.ridge, km.reference.ridge):
        arguments = [t.clone().requires_grad_(t.is_floating_point()) for t in draw(T, S, Q, N, D)]
        logits = f(*arguments, n_way=N)
        leaves = [t for t in arguments if t.requires_grad]
        found.append([logits, *torch.autograd.grad(logits.square().sum(), leaves)])
    assert_close(*found, 1e-9)


def test_compile_and_second_derivative() -> None:
    support, labels, query, lam, scale, bias = draw(2, 5, 4, 3, 6)

    def call(s: Tensor, lam: Tensor) -> Tensor:
        return km.ops.ridge(s, labels, query, lam, scale, bias, n_way=3)

    assert torch.autograd.gradgradcheck(call, (support.requires_grad_(), lam.requires_grad_()))
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(support, lam)
    assert_close([compiled], [call(support, lam)], 1e-12)


def test_singular_system_names_its_task() -> None:
    support, labels, query, lam, scale, bias = draw(3, 5, 4, 3, 6)
    support[1, 1] = support[1, 0]
    with pytest.raises(ValueError, match="task 1 is singular"):
        km.ops.ridge(support, labels, query, torch.zeros_like(lam), scale, bias, n_way=3)


def test_errors() -> None:
    arguments = draw(2, 5, 4, 3, 6)
    with pytest.raises(ValueError, match=r"0\.\.0"):
        km.ops.ridge(*arguments, n_way=1)
    with pytest.raises(ValueError, match="lam"):
        km.ops.ridge(*arguments[:3], torch.ones(2), *arguments[4:], n_way=3)
    with pytest.raises(ValueError, match="lam"):
        km.nn.RidgeHead(5, 4, lam=0)


def test_module() -> None:
    support, labels, query, *_ = draw(2, 5, 4, 3, 6)
    module = km.nn.RidgeHead(3, 6).double()
    logits = module(support, labels, query)
    bank = torch.cat([support.flatten(0, 1), query.flatten(0, 1)])
    index = torch.arange(len(bank))
    from_bank = module.from_bank(bank, index[:10].view(2, 5), labels, index[10:].view(2, 4))
    assert_close([from_bank], [logits], 1e-12)
    logits.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
