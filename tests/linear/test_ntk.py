"""Neural tangent kernels, against Jacobians that are formed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

import kernelmeta as km
from kernelmeta.linear import ntk

MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "perceptron": (
        lambda: nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 3)),
        (6,),
    ),
    "no bias": (lambda: nn.Sequential(nn.Linear(6, 9, bias=False), nn.GELU(), nn.Linear(9, 3, bias=False)), (6,)),
    "linear": (lambda: nn.Linear(6, 3), (6,)),
    "ends with an activation": (lambda: nn.Sequential(nn.Linear(6, 3), nn.SiLU()), (6,)),
    "nested": (lambda: nn.Sequential(nn.Sequential(nn.Linear(6, 4), nn.ELU(), nn.Identity()), nn.Linear(4, 2)), (6,)),
    "convolutions": (
        lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2)).eval(),
        (1, 6, 6),
    ),
    "many outputs": (lambda: nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 12)), (6,)),
}


def formed(module: nn.Module, x1: Tensor, x2: Tensor) -> Tensor:
    """[T, n, C, m, C]"""
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    jacobian = vmap(vmap(jacrev(lambda p, x: functional_call(module, p, (x[None],))[0]), (None, 0)), (None, 0))
    pairs = zip(jacobian(trained, x1).values(), jacobian(trained, x2).values(), strict=True)
    return torch.stack([torch.einsum("ticp,tjep->ticje", a.flatten(3), b.flatten(3)) for a, b in pairs]).sum(0)


def draw(name: str, T: int = 2, n: int = 5, m: int = 4) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    make, row = MODULES[name]
    return make().double(), torch.randn(T, n, *row).double(), torch.randn(T, m, *row).double()


@pytest.mark.parametrize("name", MODULES)
def test_against_jacobians(name: str) -> None:
    module, x1, x2 = draw(name)
    want = formed(module, x1, x2)
    trace = torch.einsum("ticjc->tij", want)
    assert (km.linear.ntk_gram(module, x1, x2, full=True) - want).abs().max() < 1e-10
    assert (km.linear.ntk_gram(module, x1, x2) - trace).abs().max() < 1e-10
    own = km.linear.ntk_gram(module, x1)
    assert (own - torch.einsum("ticjc->tij", formed(module, x1, x1))).abs().max() < 1e-10
    assert (own - own.mT).abs().max() < 1e-12


@pytest.mark.parametrize("way", [ntk._contracted, ntk._by_vectors])
@pytest.mark.parametrize("chunk_size", [None, 1, 2, 100])
@pytest.mark.parametrize("full", [False, True])
def test_both_ways_of_differentiating(way: Callable[..., Tensor], chunk_size: int | None, full: bool) -> None:
    module, x1, x2 = draw("perceptron")
    trained = dict(module.named_parameters())

    def one_row(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        return functional_call(module, parameters, (row[None],))[0]

    want = formed(module, x1, x2)[0] if full else torch.einsum("icjc->ij", formed(module, x1, x2)[0])
    assert (way(one_row, trained, x1[0], x2[0], full, chunk_size) - want).abs().max() < 1e-10
    own = formed(module, x1, x1)[0] if full else torch.einsum("icjc->ij", formed(module, x1, x1)[0])
    rows = x1[0]
    assert (way(one_row, trained, rows, rows, full, chunk_size) - own).abs().max() < 1e-10


def test_jacobians_of_rows_with_themselves_are_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x1, _ = draw("convolutions")
    whole, rows = ntk._contracted, x1.shape[1]
    counted: list[int] = []

    def counting(one_row: Callable[..., Tensor], *args: Any) -> Tensor:
        def one(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
            counted.append(1)
            return one_row(parameters, row)

        return whole(one, *args)

    monkeypatch.setattr(ntk, "_contracted", counting)
    monkeypatch.setattr(ntk, "_by_vectors", counting)
    for chunk_size, calls in ((None, 1), (1, rows * (rows + 1) // 2)):
        counted.clear()
        km.linear.ntk_gram(module, x1[:1], chunk_size=chunk_size)
        assert len(counted) == calls


def test_parameters_that_are_not_trained_have_no_part() -> None:
    module, x1, x2 = draw("perceptron")
    for frozen in (("0.weight",), ("0.bias", "4.bias"), ("0.weight", "0.bias", "2.weight")):
        for name, p in module.named_parameters():
            p.requires_grad_(name not in frozen)
        want = torch.einsum("ticjc->tij", formed(module, x1, x2))
        assert (km.linear.ntk_gram(module, x1, x2) - want).abs().max() < 1e-10


class Doubled(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def tied() -> nn.Module:
    net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    net[2].weight = net[0].weight
    return net


@pytest.mark.parametrize("make", [lambda: Doubled(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), tied])
@pytest.mark.parametrize("full", [False, True])
def test_what_only_looks_like_a_perceptron(make: Callable[[], nn.Module], full: bool) -> None:
    module, x1, x2 = make().double(), torch.randn(2, 5, 6).double(), torch.randn(2, 4, 6).double()
    want = formed(module, x1, x2)
    want = want if full else torch.einsum("ticjc->tij", want)
    assert (km.linear.ntk_gram(module, x1, x2, full=full) - want).abs().max() < 1e-10


def test_the_infinite_kernel_has_gradients() -> None:
    x = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    y = torch.randn(3, 8, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: km.linear.relu_ntk(x, y, depth=3), x)
    (gradient,) = torch.autograd.grad(km.linear.relu_ntk(x).sum(), x)
    assert gradient.isfinite().all()


def test_gradients_flow() -> None:
    module, x1, x2 = draw("perceptron")
    parameters = tuple(module.parameters())[:-1]  # (the last bias has no part in it)
    weights = torch.randn(2, 5, 4).double()
    for got, want in zip(
        torch.autograd.grad((km.linear.ntk_gram(module, x1, x2) * weights).sum(), parameters),
        torch.autograd.grad((torch.einsum("ticjc->tij", formed(module, x1, x2)) * weights).sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6), st.integers(1, 4), st.booleans())
@settings(max_examples=25, deadline=None)
def test_any_shape(T: int, n: int, m: int, C: int, full: bool) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 5), nn.LeakyReLU(), nn.Linear(5, C)).double()
    x1, x2 = torch.randn(T, n, 3).double(), torch.randn(T, m, 3).double()
    got = km.linear.ntk_gram(module, x1, x2, full=full)
    assert got.shape == ((T, n, C, m, C) if full else (T, n, m))
    want = formed(module, x1, x2)
    assert (got - (want if full else torch.einsum("ticjc->tij", want))).abs().max() < 1e-10


def test_a_wide_network_is_near_the_infinite_one() -> None:
    torch.manual_seed(0)
    D, H = 8, 4096
    x = torch.randn(1, 6, D).double()
    first, second, last = nn.Linear(D, H, bias=False), nn.Linear(H, H, bias=False), nn.Linear(H, 1, bias=False)

    class Scaled(nn.Module):
        """Weights of variance 1, and what they lack in front of them (the NTK's parametrisation)."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = first, last

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.relu(self.first(x)) / D**0.5) * (2 / H) ** 0.5

    for layer in (first, second, last):
        nn.init.normal_(layer.weight)
    finite = km.linear.ntk_gram(Scaled().double(), x)
    infinite = km.linear.relu_ntk(x, depth=1)
    assert (finite - infinite).abs().max() < 0.15 * infinite.abs().max()
    assert torch.linalg.eigvalsh(km.linear.relu_ntk(x, depth=3, bias=0.1)).min() > 0
    assert torch.equal(km.linear.relu_ntk(x, depth=0), x @ x.mT / D)


def test_wrong_input_is_named() -> None:
    module, x1, x2 = draw("perceptron")
    with pytest.raises(TypeError, match=r"module: expected a torch\.nn\.Module"):
        km.linear.ntk_gram(len, x1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"x1: expected \[T, rows, ...\]"):
        km.linear.ntk_gram(module, x1[0])
    with pytest.raises(ValueError, match="x2: expected 2 tasks"):
        km.linear.ntk_gram(module, x1, x2[:1])
    with pytest.raises(ValueError, match="normalises over the rows"):
        km.linear.ntk_gram(nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3)).double(), x1)
    with pytest.raises(ValueError, match="none of its parameters"):
        km.linear.ntk_gram(module.requires_grad_(False), x1)
    with pytest.raises(ValueError, match="PReLU"):
        km.linear.ntk_gram(nn.Sequential(nn.Linear(6, 3), nn.PReLU()).double(), x1)
    with pytest.raises(ValueError, match="at random"):
        km.linear.ntk_gram(nn.Sequential(nn.Linear(6, 3), nn.Dropout()).double(), x1)
    with pytest.raises(ValueError, match=r"expected one type, got torch\.float32, torch\.float64"):
        km.linear.ntk_gram(nn.Linear(6, 3), x1)
    with pytest.raises(ValueError, match="at least one task"):
        km.linear.ntk_gram(nn.Linear(6, 3).double(), x1[:0])
    with pytest.raises(ValueError, match="chunk_size"):
        km.linear.ntk_gram(draw("perceptron")[0], x1, chunk_size=0)


def test_opposite_rows_in_float64() -> None:
    """At an angle of exactly pi, depth 1: <x, y> / D and nothing else, since both slopes and lengths vanish."""
    x = torch.tensor([[1.0, 2.0], [-3.0, -6.0]], dtype=torch.float64)
    kernel = km.linear.relu_ntk(x, depth=1)
    assert kernel[0, 1].abs() <= 1e-14 * kernel.abs().max()
