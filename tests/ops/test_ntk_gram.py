"""torch.ops.kernelmeta.ntk_gram against Jacobians that are formed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from episodes import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from perceptrons import UNUSUAL, Rows, draw, jacobian, network, sizes, unusual
from torch import Tensor

import kernelmeta as km
from kernelmeta.ops import TangentKernel

CPU = km.backends()["cpu"]
needs_kernel = pytest.mark.skipif(not CPU.available, reason=f"no CPU kernels: {CPU.reason}")
BACKENDS = ["cpu", "reference"] if CPU.available else ["reference"]


def kernel(rows: Rows, **options: Any) -> TangentKernel:
    return km.ops.ntk_gram(rows.support, rows.query, rows.weights, rows.biases, **options)


def with_gradients(rows: Rows, results: Any) -> list[Tensor]:
    g = torch.Generator().manual_seed(3)
    loss = sum((r * torch.randn(r.shape, dtype=torch.float64, generator=g).to(r.dtype)).sum() for r in results)
    return [*results, *torch.autograd.grad(loss, rows.leaves())]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("slope", [0.0, 0.2])
@pytest.mark.parametrize("widths", [(11, 13, 12, 4), (17, 16, 3), (6, 5)])
def test_against_jacobians(backend: str, full: bool, slope: float, widths: tuple[int, ...]) -> None:
    rows = draw(widths, S=18)
    module = network(rows, slope)
    with km.use_backend(backend):
        found = kernel(rows, full=full, slope=slope)
    for t in range(2):
        J, Jq = jacobian(module, rows.support[t]), jacobian(module, rows.query[t])
        product = "icp,jep->icje" if full else "icp,jcp->ij"
        want = [torch.einsum(product, a, J) for a in (J, Jq)]
        assert_close([found.gram[t], found.cross[t]], want, 1e-10)
        assert_close([found.support_outputs[t], found.query_outputs[t]], [module(x[t]) for x in rows[:2]], 1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", UNUSUAL)
def test_rows_out_of_the_ordinary(backend: str, name: str) -> None:
    rows = unusual(name)
    module = network(rows, 0.0)
    with km.use_backend(backend):
        found = kernel(rows)
        gradients = torch.autograd.grad([k.sum() / k.detach().abs().amax() for k in found], rows.leaves())
    assert all(g.isfinite().all() for g in gradients)
    for t in range(2):
        J, Jq = jacobian(module, rows.support[t]), jacobian(module, rows.query[t])
        assert_close([found.gram[t], found.cross[t]], [torch.einsum("icp,jcp->ij", a, J) for a in (J, Jq)], 1e-10)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("S", [1, 2, 9, 23])
@pytest.mark.parametrize("widths", [(3, 3101, 9, 2), (6001, 7, 5, 2), (3, 9, 3101, 2)])
def test_products_that_exceed_the_cache(widths: tuple[int, ...], S: int, dtype: torch.dtype) -> None:
    """They are taken a part at a time, down to a tile of columns or rows; the last part is any size."""
    rows = draw(widths, S=S, Q=17).fresh(dtype)
    got = with_gradients(rows, kernel(rows))
    with km.use_backend("reference"):
        exact = draw(widths, S=S, Q=17).fresh()
        want = with_gradients(exact, kernel(exact))
    assert_close(got, want, 1e-10 if dtype is torch.float64 else 2e-4)


@needs_kernel
@settings(max_examples=60)
@given(sizes(), st.booleans(), st.sampled_from([0.0, 0.3]))
def test_shapes(given: dict[str, Any], full: bool, slope: float) -> None:
    rows = draw(**given).fresh()
    got = with_gradients(rows, kernel(rows, full=full, slope=slope))
    with km.use_backend("reference"):
        want = with_gradients(rows, kernel(rows, full=full, slope=slope))
    assert_close(got, want, 1e-10)


@needs_kernel
@pytest.mark.parametrize("full", [False, True])
def test_float32(full: bool) -> None:
    single = draw((64, 32, 32, 5), S=25, Q=20).fresh(torch.float32)
    double = single.fresh(torch.float64)
    got = with_gradients(single, kernel(single, full=full))
    assert_close([t.double() for t in got], with_gradients(double, kernel(double, full=full)), 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_query_rows_or_tasks(backend: str) -> None:
    rows = draw()
    with km.use_backend(backend):
        alone = km.ops.ntk_gram(rows.support, None, rows.weights, rows.biases)
        assert_close([alone.gram], [kernel(rows).gram], 1e-12)
        assert alone.cross.shape == (2, 0, 7)
        none = km.ops.ntk_gram(rows.support[:0], rows.query[:0], rows.weights, rows.biases, full=True)
    assert [tuple(t.shape) for t in none] == [(0, 7, 4, 7, 4), (0, 9, 4, 7, 4), (0, 7, 4), (0, 9, 4)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_a_bank(backend: str) -> None:
    rows = draw().fresh()
    g = torch.Generator().manual_seed(0)
    s, q = (torch.randint(14, (3, n), generator=g) for n in (5, 6))
    bank = rows.support.flatten(0, 1)
    with km.use_backend(backend):
        got = km.ops.ntk_gram(bank, bank, rows.weights, rows.biases, support_index=s, query_index=q)
        want = km.ops.ntk_gram(bank[s], bank[q], rows.weights, rows.biases)
        gradients = [torch.autograd.grad(k.cross.square().sum(), bank) for k in (got, want)]
    assert_close([*got, *gradients[0]], [*want, *gradients[1]], 1e-11)


def test_equals_the_kernel_of_the_module() -> None:
    rows = draw()
    want = km.linear.ntk_gram(network(rows, 0.0), rows.query, rows.support, full=True)
    assert_close([kernel(rows, full=True).cross], [want], 1e-12)


@needs_kernel
def test_inference_mode() -> None:
    rows = draw()
    with torch.inference_mode():
        found = kernel(rows)
    assert_close(list(found), list(kernel(rows)), 1e-15)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weights": []}, "weights: expected those of 1 to 8 layers"),
        ({"weights": [torch.ones(3, 10).double()], "biases": None}, r"weights\[0\]: expected \[units, 11\]"),
        ({"biases": [torch.ones(13).double()]}, "biases: expected one for each of the 3 layers"),
        ({"slope": -0.1}, "slope: expected a number of at least 0"),
        ({"support": torch.ones(2, 0, 11).double()}, "support: expected at least one row"),
        ({"query": torch.ones(3, 4, 11).double()}, "support: expected 3 tasks as in query"),
    ],
)
def test_what_does_not_fit_is_named(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        km.ops.ntk_gram(**(draw()._asdict() | changed))
