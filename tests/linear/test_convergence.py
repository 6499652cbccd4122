"""Certificates of convergence, against gradient descent as it goes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import kernelmeta as km
from kernelmeta.linear.certificates import adaptive_against_constant

STEPS = 100


def draw(
    T: int, n: int, d: int, m: int, h: int, scale: float = 1.0, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(T, *shape, generator=generator, dtype=torch.float64)

    X = normal(n, d) / math.sqrt(d)
    return X, X @ normal(d, m) + 0.1 * normal(n, m), scale * normal(d, h), scale * normal(h, m)


def minimum(X: Tensor, Y: Tensor) -> Tensor:
    residual = Y - X @ (torch.linalg.pinv(X) @ Y)
    return residual.square().sum((-2, -1)) / 2


def step(X: Tensor, Y: Tensor, W1: Tensor, W2: Tensor, lr: Tensor) -> tuple[Tensor, Tensor]:
    R, rate = X @ W1 @ W2 - Y, lr.reshape(*lr.shape, 1, 1)
    return W1 - rate * (X.mT @ R @ W2.mT), W2 - rate * (W1.mT @ X.mT @ R)


def loss(X: Tensor, Y: Tensor, W1: Tensor, W2: Tensor) -> Tensor:
    return (X @ W1 @ W2 - Y).square().sum((-2, -1)) / 2 - minimum(X, Y)


def violations(tasks: tuple[Tensor, ...], lr: Tensor, rho: Tensor) -> int:
    """Steps that the certificate, or the local rate, does not hold for."""
    X, Y, W1, W2 = tasks
    before, found = loss(X, Y, W1, W2), 0
    rounding = 1e-10 * (before + Y.square().sum((-2, -1)))
    for _ in range(STEPS):
        local = km.linear.local_rate(X, Y, W1, W2, lr)
        W1, W2 = step(X, Y, W1, W2, lr)
        after = loss(X, Y, W1, W2)
        found += int((after > rho * before + rounding).sum() + (after > local.factor * before + rounding).sum())
        before = after
    return found


@pytest.mark.parametrize(("n", "d", "m", "h"), [(20, 5, 3, 16), (6, 10, 2, 8), (30, 1, 1, 2), (12, 4, 4, 40)])
def test_no_step_breaks_a_certificate(n: int, d: int, m: int, h: int) -> None:
    tasks = draw(12, n, d, m, h)
    found = km.linear.certificate(*tasks)
    assert found.valid.all(), found.reason
    assert (found.rho < 1).all() and (found.rho > 0).all() and set(found.reason) == {""}
    assert violations(tasks, found.lr, found.rho) == 0


def test_certificates_are_of_use() -> None:
    tasks = draw(40, 20, 5, 3, 16)
    found = km.linear.certificate(*tasks)
    assert (1 - found.rho).median() > 2e-2
    X, Y, W1, W2 = tasks
    for _ in range(STEPS):
        W1, W2 = step(X, Y, W1, W2, found.lr)
    measured = (loss(X, Y, W1, W2) / found.loss).clamp_min(1e-12).log() / STEPS
    assert (measured / found.rho.log()).median() < 4


def test_every_certificate_of_many_draws_is_worth_having() -> None:
    """That of draw 269 of the second thousand is the least: its imbalance is a quarter of what is usual."""
    least = []
    for seed in range(3):
        found = km.linear.certificate(*draw(1000, 20, 5, 3, 16, seed=seed))
        assert found.valid.all()
        least.append(1 - found.rho)
    assert torch.stack(least).min() >= 1e-3 and torch.stack(least).argmin() == 1269


@pytest.mark.parametrize(("n", "d", "m", "h"), [(20, 5, 3, 16), (6, 10, 2, 8)])
def test_what_a_certificate_is_made_of_holds_along_the_way(n: int, d: int, m: int, h: int) -> None:
    X, Y, W1, W2 = draw(20, n, d, m, h, seed=1)
    found = km.linear.certificate(X, Y, W1, W2)
    U, S, Vh = torch.linalg.svd(X, full_matrices=False)
    s, target = S.unsqueeze(-1), U.mT @ Y
    r = S.shape[-1]
    eye = torch.eye(m, dtype=X.dtype), torch.eye(r, dtype=X.dtype)
    for _ in range(STEPS):
        A, B = Vh @ W1, W2
        weakest = torch.linalg.svdvals(A)[..., r - 1].square() + torch.linalg.svdvals(B)[..., m - 1].square()
        assert (weakest >= found.alpha * (1 - 1e-9)).all()
        # The eigenvalues of T on [r, m], rows first, between mu alpha and K.
        kernel = torch.einsum("tij,kl->tikjl", torch.diag_embed(S.square()), eye[0]).flatten(3).flatten(1, 2)
        kernel = kernel @ torch.einsum("tkl,ij->tikjl", B.mT @ B, eye[1]).flatten(3).flatten(1, 2)
        first = torch.einsum("tij,kl->tikjl", (s * A) @ (s * A).mT, eye[0]).flatten(3).flatten(1, 2)
        values = torch.linalg.eigvalsh(kernel + first)
        assert (values[:, 0] >= S[:, -1].square() * found.alpha * (1 - 1e-9)).all()
        assert (values[:, -1] <= found.curvature).all()
        G = s * (s * (A @ B) - target)
        squared = (G @ B.mT).square().sum((-2, -1)) + (A.mT @ G).square().sum((-2, -1))
        before = loss(X, Y, W1, W2)
        W1, W2 = step(X, Y, W1, W2, found.lr)
        least = found.lr * (1 - found.lr * found.curvature / 2) * squared
        assert (before - loss(X, Y, W1, W2) >= least - 1e-10 * (found.loss + Y.square().sum((-2, -1)))).all()


def test_the_best_rate_is_the_best() -> None:
    X, Y, W1, W2 = draw(1, 20, 5, 3, 16)
    best = km.linear.certificate(X, Y, W1, W2)
    for factor in (0.1, 0.5, 0.8, 0.95, 1.05, 1.2):
        other = km.linear.certificate(X, Y, W1, W2, lr=best.lr * factor)
        assert not other.valid or other.rho >= best.rho - 1e-6
    far = km.linear.certificate(X, Y, W1, W2, lr=best.lr * 100)
    assert not far.valid and "too large" in far.reason[0] and far.rho.isnan()


@given(
    st.integers(1, 8), st.integers(1, 8), st.integers(1, 4), st.integers(1, 16), st.floats(0.05, 3), st.integers(0, 99)
)
@settings(max_examples=25, deadline=None)
def test_whatever_is_certain_holds(n: int, d: int, m: int, h: int, scale: float, seed: int) -> None:
    tasks = draw(3, n, d, m, h, scale, seed)
    found = km.linear.certificate(*tasks)
    for valid, reason in zip(found.valid.tolist(), found.reason, strict=True):
        assert valid == (reason == "")
    some = tuple(t[found.valid] for t in tasks)
    if len(some[0]):
        assert violations(some, found.lr[found.valid], found.rho[found.valid]) == 0


def test_one_network_is_one_of_many() -> None:
    tasks = draw(3, 20, 5, 3, 16)
    many = km.linear.certificate(*tasks)
    one = km.linear.certificate(*(t[1] for t in tasks))
    assert one.valid and one.reason == "" and one.rho.dim() == 0
    torch.testing.assert_close(one.rho, many.rho[1])
    torch.testing.assert_close(km.linear.adaptive_step(*(t[1] for t in tasks)), km.linear.adaptive_step(*tasks)[1])


def test_why_there_is_none() -> None:
    X, Y, W1, W2 = (t[0] for t in draw(1, 20, 5, 3, 16))
    assert "balance" in km.linear.certificate(X, Y, torch.zeros_like(W1), torch.zeros_like(W2)).reason
    assert "X is zero" in km.linear.certificate(torch.zeros_like(X), Y, W1, W2).reason
    assert "too small" in km.linear.certificate(X, 100 * Y, 1e-9 * W1, 1e-9 * W2).reason


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize(
    ("X", "size"),
    [
        (normal(9, 1) @ normal(1, 4), 1.0), (normal(1, 4).expand(9, 4), 1.0), (normal(1, 4), 1.0), (normal(9, 1), 1.0),
        (torch.cat([normal(6, 4), torch.zeros(3, 4).double()]), 1.0), (normal(9, 4), 1e8), (normal(9, 4), 1e-8),
    ],
)  # fmt: skip
def test_inputs_out_of_the_ordinary(X: Tensor, size: float) -> None:
    """Collinear columns, equal rows, one row, one column, rows of zeros, huge and tiny data."""
    n, d = X.shape
    task = (size * X, size * normal(n, 2), normal(d, 12), normal(12, 2))
    found, rate = km.linear.certificate(*task), km.linear.adaptive_step(*task)
    assert rate.isfinite() and rate > 0
    assert found.valid and 0 < found.rho < 1 and found.lr > 0
    minimum = (task[1] - task[0] @ (torch.linalg.pinv(task[0]) @ task[1])).square().sum() / 2
    before = loss(*task) - minimum
    for lr, factor in ((found.lr, found.rho), (rate, 1.0)):
        after = loss(task[0], task[1], *step(*task, lr)) - minimum
        assert after <= factor * before + 1e-10 * task[1].square().sum()


def test_no_network() -> None:
    found = km.linear.certificate(*(t[:0] for t in draw(1, 20, 5, 3, 16)))
    assert found.rho.shape == (0,) and found.imbalance.shape == (0, 16) and found.reason == ()


def test_adaptive_steps_keep_up_with_the_best_constant_rate() -> None:
    found = adaptive_against_constant(20, (20, 5, 3, 16), 1, 3000)
    assert all(row["constant"] < 3000 for row in found)
    assert max(row["adaptive"] / row["constant"] for row in found) <= 3


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 4), st.integers(1, 9), st.floats(-9, 9), st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_no_rate_lowers_the_loss_more(n: int, d: int, m: int, h: int, magnitude: float, seed: int) -> None:
    X, Y, W1, W2 = draw(3, n, d, m, h, seed=seed)
    # (small and huge networks: the rate has no scale of its own)
    X, Y = X * 10**magnitude, Y * 10**magnitude
    best = km.linear.adaptive_step(X, Y, W1, W2)
    assert best.isfinite().all() and (best > 0).all()

    def after(lr: Tensor) -> Tensor:
        return loss(X, Y, *step(X, Y, W1, W2, lr))

    least = after(best)
    assert (least <= loss(X, Y, W1, W2)).all()
    for factor in (0.0, 1e-3, 0.3, 0.7, 0.97, 1.03, 1.5, 3.0, 10.0, 100.0):
        assert (least <= after(factor * best) * (1 + 1e-9) + 1e-12 * Y.square().sum((-2, -1))).all()


def test_the_step_from_a_minimum_is_zero() -> None:
    X, Y, W1, W2 = (t[0] for t in draw(1, 20, 5, 3, 16))
    assert km.linear.adaptive_step(torch.zeros_like(X), Y, W1, W2) == 0
    assert km.linear.adaptive_step(X, Y, torch.zeros_like(W1), torch.zeros_like(W2)) == 0


def test_wrong_input_is_named() -> None:
    X, Y, W1, W2 = (t[0] for t in draw(1, 20, 5, 3, 16))
    with pytest.raises(ValueError, match=r"Y: expected \[20, 3\]"):
        km.linear.certificate(X, Y[:5], W1, W2)
    with pytest.raises(ValueError, match="W1: expected finite"):
        km.linear.certificate(X, Y, W1 / 0, W2)
    with pytest.raises(TypeError, match="X: expected a floating-point tensor, got list"):
        km.linear.certificate([[1.0]], Y, W1, W2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="lr: expected numbers above 0"):
        km.linear.certificate(X, Y, W1, W2, lr=0.0)
