"""torch.ops.kernelmeta.ridge against the normal equations in D dimensions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from episodes import assert_close, draw_labels
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import one_hot

import kernelmeta as km

CPU = km.backends()["cpu"]
needs_kernel = pytest.mark.skipif(not CPU.available, reason=f"no CPU kernels: {CPU.reason}")
BACKENDS = ["cpu", "reference"] if CPU.available else ["reference"]


def draw(T: int = 2, S: int = 7, Q: int = 9, N: int = 3, D: int = 12, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    """Everything that gets a gradient, and labels."""
    g = torch.Generator().manual_seed(seed)
    features = [torch.randn(T, rows, D, dtype=torch.float64, generator=g) for rows in (S, Q)]
    values = [torch.tensor([v], dtype=torch.float64) for v in (0.7, 3.1, -0.4)]
    return [t.requires_grad_() for t in (*features, *values)], draw_labels(T, S, N, g)


def in_d_dimensions(leaves: list[Tensor], labels: Tensor, N: int) -> tuple[Tensor, Tensor]:
    """Logits and W = (X^T X + lambda)^-1 X^T Y, not scaled."""
    support, query, regularization, scale, bias = leaves
    D = support.shape[-1]
    normal = support.mT @ support + regularization * torch.eye(D, dtype=support.dtype)
    W = torch.linalg.solve(normal, support.mT @ one_hot(labels, N).to(support.dtype)).mT
    return scale * query @ W.mT + bias, W


def with_gradients(leaves: list[Tensor], results: list[Tensor]) -> list[Tensor]:
    g = torch.Generator().manual_seed(3)
    loss = sum((r * torch.randn(r.shape, dtype=r.dtype, generator=g)).sum() for r in results)
    return [*results, *torch.autograd.grad(loss, leaves)]


def check(leaves: list[Tensor], labels: Tensor, N: int, tolerance: float) -> None:
    support, query, *parameters = leaves
    z, alpha = km.ops.ridge(support, labels, query, *parameters, n_way=N, return_coefficients=True)
    want = with_gradients(leaves, list(in_d_dimensions(leaves, labels, N)))
    assert_close(with_gradients(leaves, [z, alpha.mT @ support]), want, tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("S", [3, 7, 25])
def test_equals_the_normal_equations(backend: str, S: int) -> None:
    with km.use_backend(backend):
        check(*draw(S=S), 3, 1e-9)


@needs_kernel
@given(st.data())
def test_shapes(data: Any) -> None:
    N = data.draw(st.integers(1, 7))
    leaves, labels = draw(
        data.draw(st.integers(1, 4)), data.draw(st.integers(N, 5 * N)), data.draw(st.integers(1, 40)), N,
        data.draw(st.integers(1, 70)), data.draw(st.integers(0, 99)),
    )  # fmt: skip
    check(leaves, labels, N, 1e-8)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_singular_system_is_named(backend: str, dtype: torch.dtype) -> None:
    leaves, labels = draw(T=3, S=7, D=12)
    support = leaves[0].detach().clone()
    support[1, 4] = support[1, 2]
    values = [leaves[1], torch.zeros(1), *leaves[3:]]
    with km.use_backend(backend), pytest.raises(ValueError, match="the system of task 1 is singular"):
        km.ops.ridge(support.to(dtype), labels, *(v.detach().to(dtype) for v in values), n_way=3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_singular_system_of_a_ragged_batch_is_named(backend: str) -> None:
    leaves, labels = draw(T=3, S=7, D=12)
    support = leaves[0].detach().clone()
    support[2, 4] = support[2, 2]
    rows = (support.flatten(0, 1), labels.flatten(), leaves[1].detach().flatten(0, 1))
    offsets = [torch.arange(4) * count for count in (7, leaves[1].shape[1])]
    zero, one = torch.zeros(1).double(), torch.ones(1).double()
    with km.use_backend(backend), pytest.raises(ValueError, match="the system of task 2 is singular"):
        km.ops.ridge(*rows, zero, one, zero, n_way=3, ragged=km.Ragged(*offsets))
    empty = offsets[1].clone()
    empty[1] = 0
    with km.use_backend(backend), pytest.raises(ValueError, match="query: task 0 has no row; every task needs one"):
        km.ops.ridge(*rows, one, one, zero, n_way=3, ragged=km.Ragged(offsets[0], empty))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_not_a_number_comes_out_as_such(poison: float) -> None:
    leaves, labels = draw()
    support = leaves[0].detach().clone()
    want = km.ops.ridge(support, labels, *leaves[1:], n_way=3)
    support[1, 2, 3] = poison
    z = km.ops.ridge(support, labels, *leaves[1:], n_way=3)
    assert torch.isnan(z[1]).all() and torch.equal(z[0], want[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_ragged_batch_equals_its_tasks_one_by_one(backend: str) -> None:
    sizes = [(3, 7, 9), (5, 5, 1), (2, 11, 20), (4, 30, 3)]
    S, Q = torch.tensor([s for _, s, _ in sizes]).cumsum(0), torch.tensor([q for _, _, q in sizes]).cumsum(0)
    offsets = [torch.cat([torch.zeros(1, dtype=torch.int64), o]) for o in (S, Q)]
    g = torch.Generator().manual_seed(0)
    labels = torch.cat([draw_labels(1, s, n, g)[0] for n, s, _ in sizes])
    leaves, _ = draw()
    support, query = (torch.randn(int(o[-1]), 8, generator=g, dtype=torch.float64, requires_grad=True) for o in offsets)
    leaves = [support, query, *leaves[2:]]
    with km.use_backend(backend):
        z, alpha = km.ops.ridge(
            support, labels, query, *leaves[2:], n_way=5, return_coefficients=True,
            ragged=km.Ragged(*offsets, torch.tensor([n for n, _, _ in sizes])),
        )  # fmt: skip
        got = torch.autograd.grad(z.where(z.isfinite(), 0).square().sum() + alpha.square().sum(), leaves)
        total: Any = 0
        for t, (n, _, _) in enumerate(sizes):
            s, q = (slice(*o[t : t + 2].tolist()) for o in offsets)
            z1, alpha1 = km.ops.ridge(
                support[None, s], labels[None, s], query[None, q], *leaves[2:], n_way=n, return_coefficients=True
            )
            assert_close([z[q, :n], alpha[s, :n]], [z1[0], alpha1[0]], 1e-12)
            assert (z[q, n:] == -torch.inf).all() and (alpha[s, n:] == 0).all()
            total = total + z1.square().sum() + alpha1.square().sum()
    assert_close(got, torch.autograd.grad(total, leaves), 1e-12)


def test_reads_straight_from_a_bank() -> None:
    leaves, labels = draw()
    bank, index = torch.randn(30, 12).double(), [torch.randint(30, (2, rows)) for rows in (7, 9)]
    want = km.ops.ridge(bank[index[0]], labels, bank[index[1]], *leaves[2:], n_way=3)
    got = km.ops.ridge(bank, labels, bank, *leaves[2:], n_way=3, support_index=index[0], query_index=index[1])
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"n_way": 8}, ValueError, "8 ways and 7 support rows|labels must be|no row of class"),
        ({"n_way": 0}, ValueError, "n_way: expected an int of at least 1"),
        ({"scale": torch.ones(2)}, ValueError, "scale: expected one value"),
        ({"query": torch.zeros(2, 9, 11)}, ValueError, "support: expected 11 features"),
        ({"query": torch.zeros(3, 9, 12)}, ValueError, "support: expected 3 tasks"),
        ({"support_labels": torch.zeros(2, 7)}, TypeError, "support_labels: expected int64"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    leaves, labels = draw()
    names = ("support", "query", "regularization", "scale", "bias")
    arguments: dict[str, Any] = {**dict(zip(names, leaves, strict=True)), "support_labels": labels, "n_way": 3}
    with pytest.raises(error, match=message):
        km.ops.ridge(**(arguments | change))
