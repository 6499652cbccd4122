"""Rates of gradient descent that are certain, for a two-layer linear network of any width, from any initialisation.

The network is ``X W1 W2``, its loss ``L = |X W1 W2 - Y|^2 / 2`` above its minimum, and a step moves both layers along
minus its gradient. Let X = U S V^T have rank r, A = V^T W1 [r, h], B = W2 [h, m], mu and Kx the smallest and the
largest squared singular value, E = S A B - U^T Y, so that L = |E|_F^2 / 2, G = S E, and
g^2 = |G B^T|_F^2 + |A^T G|_F^2, the squared length of the gradient.

* One step from here (`local_rate`; `adaptive_step` is the best one). With lam = s_1(A)^2 + s_1(B)^2 and
  K = |G|_2 + Kx (sqrt(lam) + lr g / 2)^2, the curvature along the step: if lr K < 2, then
  L' <= (1 - 2 lr mu (s_r(A)^2 + s_m(B)^2) (1 - lr K / 2)) L.
* All steps from the initialisation (`certificate`), in four parts.

  1. A step, exactly. With the tangent kernel T(E) = S^2 E B^T B + S A A^T S E, which is symmetric, g^2 = <E, T(E)>, and
     the step's second order N = S (G B^T) (A^T G), the residual becomes E - lr T(E) + lr^2 N. Since
     <E, N> <= |G|_2 g^2 / 2, |N|_F <= sqrt(Kx) g^2 / 2 and |T(E)|_F <= sqrt(t1) g, where T's eigenvalues are between t0
     and t1, 2 L' <= <E, q(T) E> with q(t) = 1 - 2 lr t (1 - lr (t + c) / 2) and
     c = |G|_2 + lr sqrt(Kx t1) g + lr^2 Kx g^2 / 4. q is convex: L' <= max(q(t0), q(t1)) L. And
     L - L' >= lr g^2 (1 - lr K / 2) with K = t1 + c.
  2. The imbalance D = A^T A - B B^T becomes D + lr^2 (B G^T G B^T - A^T G G^T A). While every lr K < 2, all that is
     added to D from the first step to this one, and all that is taken from it, are at most a and b with
     a + b <= lr^2 sum g^2 <= lr (L0 - L) / (1 - lr K / 2) <= delta (1 - L / L0).
  3. So the eigenvalues of T stay away from zero: s_r(A)^2 >= lambda_r(D) and s_m(B)^2 >= lambda_m(-D), t0 >= mu alpha,
     alpha = [lambda_r(D0)_+ + lambda_m(-D0)_+ - a - b]_+.
  4. And from infinity: t1 <= |S A|_2^2 + Kx s_1(B)^2. From (A A^T)^2 = A D A^T + A B B^T A^T, with w = S u for the unit
     u that |S A|_2 is reached at, x = |A^T w|^2 has x^2 <= Kx (lambda_max(D)_+ x + |S A B|_2^2); B alike. With
     f(d, p) = (d + sqrt(d^2 + 4 p^2)) / 2, t1 <= Kx (f(lambda_max(D0)_+ + a, p_A) + f(lambda_max(-D0)_+ + b, p_B)),
     p_A = (|U^T Y|_2 + |E|_F) / sqrt(Kx) and p_B = |S^-1 U^T Y|_2 + |E|_F / sqrt(mu). It is convex in a and b, so that
     the worst they can do is a = delta, b = 0, or the other way round.

  The loss only falls: |E|_F <= sqrt(2 L0), and the least delta that 2 and 4 agree on, a fixed point, holds for all
  steps. rho is the largest q at any share L / L0 that is left: early the residual is large and little of the imbalance
  is spent, late it is the other way round. The learning rate is the one with the least rho, found by search.

Everything is computed in float64, and batched: leading dimensions of the arguments are networks of their own.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

_GRID, _ROUNDS = 24, 4  # learning rates looked at in each round of the search, from coarse to fine
_FIXED_POINT, _CLOSE = 50, 1e-4  # steps towards the least move of the imbalance, and how near is near enough
_SHARES = 16  # parts that the way of the loss from its start to its minimum is looked at in


class Certificate(NamedTuple):
    """What is certain of gradient descent with this learning rate, from this initialisation."""

    valid: Tensor
    """[...] bool: whether there is a certificate: the loss falls by the factor ``rho`` or more at every step."""
    reason: str | tuple[str, ...]
    """Why there is none, for each network (flattened where there are several); empty where there is one."""
    lr: Tensor
    """[...] the learning rate: the one that was asked about, or the best one (NaN if there is none)."""
    rho: Tensor
    """[...] L_{t+1} <= rho L_t; NaN where nothing is certain."""
    imbalance: Tensor
    """[..., h] the eigenvalues of A^T A - B B^T at the start, falling."""
    alpha: Tensor
    """[...] what s_r(A)^2 + s_m(B)^2 never falls below."""
    curvature: Tensor
    """[...] what K never exceeds: a step lowers the loss by ``lr g^2 (1 - lr K / 2)`` or more, g the slope."""
    loss: Tensor
    """[...] the loss at the start, above its minimum."""


class _Spectra(NamedTuple):
    """What the certificate is made of; [...], the imbalance [..., h]."""

    loss: Tensor
    mu: Tensor
    largest: Tensor
    imbalance: Tensor
    target: Tensor  # |U^T Y|_2
    solution: Tensor  # |S^-1 U^T Y|_2
    ranks: tuple[Tensor, int]  # r, m

    def slack(self) -> tuple[Tensor, Tensor]:
        """lambda_r(D0) and lambda_m(-D0), [...]; 0 where there are not so many eigenvalues."""
        r, m = self.ranks
        h = self.imbalance.shape[-1]
        first = self.imbalance.gather(-1, (r.clamp_max(h) - 1).clamp_min(0).unsqueeze(-1)).squeeze(-1)
        second = -self.imbalance[..., max(h - m, 0)]
        return torch.where(r <= h, first, 0.0), second if m <= h else torch.zeros_like(second)


def _checked(X: Tensor, Y: Tensor, W1: Tensor, W2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    given = {"X": X, "Y": Y, "W1": W1, "W2": W2}
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            got = str(tensor.dtype) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name}: expected a floating-point tensor, got {got}")
        if tensor.dim() < 2 or 0 in tensor.shape[-2:]:
            raise ValueError(f"{name}: expected a matrix [..., rows, columns], got shape {list(tensor.shape)}")
        if not tensor.isfinite().all():
            raise ValueError(f"{name}: expected finite numbers")
    n, d, h, m = *X.shape[-2:], *W2.shape[-2:]
    for name, want in (("Y", (n, m)), ("W1", (d, h))):
        if tuple(given[name].shape[-2:]) != want:
            raise ValueError(f"{name}: expected {list(want)} as last dimensions, got shape {list(given[name].shape)}")
    batch = torch.broadcast_shapes(*(t.shape[:-2] for t in given.values()))
    with torch.no_grad():
        x, y, w1, w2 = (t.detach().double().expand(*batch, *t.shape[-2:]) for t in given.values())
    return x, y, w1, w2


def _reduced(X: Tensor, Y: Tensor, W1: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """S [..., k], U^T Y [..., k, m], A [..., k, h], and which of the k singular values count, [..., k]."""
    U, S, Vh = torch.linalg.svd(X, full_matrices=False)
    counts = S[..., :1] * (max(X.shape[-2:]) * torch.finfo(S.dtype).eps) < S
    S = S * counts
    kept = counts.unsqueeze(-1)
    return S, (U.mT @ Y) * kept, (Vh @ W1) * kept, counts


def _spectra(X: Tensor, Y: Tensor, W1: Tensor, W2: Tensor) -> _Spectra:
    S, target, A, counts = _reduced(X, Y, W1)
    h, m = W2.shape[-2:]
    inverse = torch.where(counts, 1 / S, 0.0)
    mu = torch.where(counts, S, torch.inf).square().amin(-1)
    loss = (S.unsqueeze(-1) * (A @ W2) - target).square().sum((-2, -1)) / 2
    imbalance = torch.linalg.eigvalsh(A.mT @ A - W2 @ W2.mT).flip(-1)
    wanted, solution = (torch.linalg.matrix_norm(t, 2) for t in (target, inverse.unsqueeze(-1) * target))
    return _Spectra(loss, mu, S.square().amax(-1), imbalance, wanted, solution, (counts.sum(-1), m))


def _at(spectra: _Spectra, lr: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """rho, alpha and the curvature for learning rates [..., k]; rho is infinite where nothing is certain."""
    loss, mu, Kx = (v.unsqueeze(-1) for v in (spectra.loss, spectra.mu, spectra.largest))
    target, solution = spectra.target.unsqueeze(-1), spectra.solution.unsqueeze(-1)
    top, bottom = (v.clamp_min(0).unsqueeze(-1) for v in (spectra.imbalance[..., 0], -spectra.imbalance[..., -1]))
    of_first, of_second = spectra.slack()
    slack = (of_first.clamp_min(0) + of_second.clamp_min(0)).unsqueeze(-1)

    def largest(d: Tensor, p: Tensor) -> Tensor:
        return (d + (d * d + 4 * p * p).sqrt()) / 2

    def bounds(spent: Tensor, share: float) -> tuple[Tensor, Tensor]:
        """t1 and c, where the imbalance has moved by at most ``spent`` and at most this share of the loss is left."""
        off = (2 * share * loss).sqrt()
        p_A, p_B = (target + off) / Kx.sqrt(), solution + off / mu.sqrt()
        first = largest(top + spent, p_A) + largest(bottom, p_B)
        second = largest(top, p_A) + largest(bottom + spent, p_B)
        t1, steep = Kx * torch.maximum(first, second), Kx.sqrt() * off
        return t1, steep * (1 + lr * t1 + lr.square() * steep * t1 / 4)

    def after(delta: Tensor) -> tuple[Tensor, Tensor]:
        """How far the imbalance moves where it moves by at most ``delta``; the curvature."""
        t1, more = bounds(delta, 1.0)
        left = 1 - lr * (t1 + more) / 2
        return torch.where(left > 0, lr * loss / left, torch.inf), t1 + more

    delta = torch.zeros_like(lr)
    for _ in range(_FIXED_POINT):  # from below: it only grows
        moved, _ = after(delta)
        if torch.isclose(moved, delta, rtol=_CLOSE, atol=0).all():
            break
        delta = moved
    delta = delta * (1 + 2 * _CLOSE)
    moved, K = after(delta)
    alpha = (slack - delta).clamp_min(0)
    rho = torch.zeros_like(lr)
    for part in range(_SHARES):  # between part and part + 1 of these is left
        spent = delta * (1 - part / _SHARES)
        t1, more = bounds(spent, (part + 1) / _SHARES)
        for t in (mu * (slack - spent).clamp_min(0), t1):
            rho = torch.maximum(rho, 1 - 2 * lr * t * (1 - lr * (t + more) / 2))
    certain = moved.isfinite() & (moved <= delta) & (alpha > 0)
    return torch.where(certain, rho, torch.inf), alpha, K


def certificate(X: Tensor, Y: Tensor, W1: Tensor, W2: Tensor, lr: float | Tensor | None = None) -> Certificate:
    """What is certain of gradient descent on ``|X W1 W2 - Y|^2 / 2`` from this initialisation, before it is run.

    Args:
        X: [..., n, d], the inputs; leading dimensions are networks of their own.
        Y: [..., n, m], the targets.
        W1, W2: [..., d, h] and [..., h, m], the initialisation.
        lr: the learning rate, a number or [...]; the one with the smallest ``rho`` if None.

    Returns:
        A `Certificate`. There is one only if the layers are out of balance enough (``alpha`` above 0), which wants
        h >= r + m in general, r the rank of X, and if the learning rate is small enough.

    Raises:
        ValueError, TypeError: shapes that do not fit, numbers that are not finite, a learning rate that is not above 0.
    """
    x, y, w1, w2 = _checked(X, Y, W1, W2)
    spectra = _spectra(x, y, w1, w2)
    batch = spectra.loss.shape
    if lr is not None:
        rates = torch.as_tensor(lr, dtype=torch.float64, device=spectra.loss.device)
        if not (rates > 0).all() or not rates.isfinite().all():
            raise ValueError("lr: expected numbers above 0")
        rates = rates.expand(batch)
    else:
        rates = _best_rate(spectra)
    rho, alpha, curvature = (v.squeeze(-1) for v in _at(spectra, rates.unsqueeze(-1)))
    valid = rho.isfinite() & (rho < 1)
    reasons = tuple(
        "" if fine else _reason(spectra, i, given=lr is not None) for i, fine in enumerate(valid.flatten().tolist())
    )
    nothing = torch.full_like(rho, torch.nan)
    return Certificate(
        valid,
        reasons if batch else reasons[0],
        rates if lr is not None else torch.where(valid, rates, nothing),
        torch.where(valid, rho, nothing),
        spectra.imbalance,
        alpha,
        curvature,
        spectra.loss,
    )


def _best_rate(spectra: _Spectra) -> Tensor:
    """[...] the learning rate with the smallest rho, by a grid that closes in on it."""
    size = spectra.solution + (2 * spectra.loss / spectra.mu).sqrt() + spectra.imbalance.abs().amax(-1)
    longest = 4 / (spectra.largest * size).clamp_min(torch.finfo(torch.float64).tiny)
    low, high = longest.log() - math.log(1e12), longest.log()
    where = torch.linspace(0, 1, _GRID, dtype=torch.float64, device=low.device)
    for _ in range(_ROUNDS):
        rates = (low.unsqueeze(-1) + (high - low).unsqueeze(-1) * where).exp()
        best = _at(spectra, rates)[0].argmin(-1, keepdim=True)
        found = rates.gather(-1, best).squeeze(-1)
        step = (high - low) / (_GRID - 1)
        low, high = found.log() - step, found.log() + step
    return found


def _reason(spectra: _Spectra, i: int, *, given: bool) -> str:
    """Why the ``i``-th network has no certificate."""
    r, m, h = int(spectra.ranks[0].flatten()[i]), spectra.ranks[1], spectra.imbalance.shape[-1]
    if r == 0:
        return "X is zero: nothing can be learned from it"
    if max(float(v.flatten()[i]) for v in spectra.slack()) <= 0:
        return (
            "the layers are in balance: too few eigenvalues of A^T A - B B^T are positive, and too few negative "
            f"(h = {h}, r + m = {r + m}: a wider network helps, or one layer larger than the other)"
        )
    if given:
        return "the learning rate is too large for what is certain"
    return "the imbalance of the layers is too small for the loss at the start: it may be lost on the way"


class LocalRate(NamedTuple):
    """What one step is certain to do."""

    factor: Tensor
    """[...] L' <= factor L; infinite where lr K is 2 or more."""
    curvature: Tensor
    """[...] K."""


class _Local(NamedTuple):
    slope: Tensor  # g
    steepness: Tensor  # |G|_2
    size: Tensor  # sqrt(lam)
    strength: Tensor  # mu (s_r(A)^2 + s_m(B)^2)
    largest: Tensor  # Kx


def _local(X: Tensor, Y: Tensor, W1: Tensor, W2: Tensor) -> _Local:
    S, target, A, counts = _reduced(X, Y, W1)
    G = S.unsqueeze(-1) * (S.unsqueeze(-1) * (A @ W2) - target)
    slope = ((G @ W2.mT).square().sum((-2, -1)) + (A.mT @ G).square().sum((-2, -1))).sqrt()
    of_a, of_b = torch.linalg.svdvals(A), torch.linalg.svdvals(W2)
    r, (h, m) = counts.sum(-1), W2.shape[-2:]
    last = of_a.gather(-1, (r - 1).clamp(0, of_a.shape[-1] - 1).unsqueeze(-1)).squeeze(-1)
    weakest = torch.where(r <= h, last.square(), 0.0) + (of_b[..., m - 1].square() if m <= h else 0.0)
    mu = torch.where(counts, S, torch.inf).square().amin(-1)
    size = (of_a[..., 0].square() + of_b[..., 0].square()).sqrt()
    return _Local(slope, torch.linalg.matrix_norm(G, 2), size, mu * weakest, S.square().amax(-1))


def local_rate(X: Tensor, Y: Tensor, W1: Tensor, W2: Tensor, lr: float | Tensor) -> LocalRate:
    """What one step from here with this learning rate is certain to do to the loss.

    Args:
        X, Y, W1, W2: as in `certificate`; leading dimensions are networks of their own.
        lr: the learning rate, a number or [...].

    Raises:
        ValueError, TypeError: as `certificate`.
    """
    at = _local(*_checked(X, Y, W1, W2))
    rate = torch.as_tensor(lr, dtype=torch.float64, device=at.slope.device)
    K = at.steepness + at.largest * (at.size + rate * at.slope / 2).square()
    left = 1 - rate * K / 2
    return LocalRate(torch.where(left > 0, 1 - 2 * rate * at.strength * left, torch.inf), K)


def adaptive_step(X: Tensor, Y: Tensor, W1: Tensor, W2: Tensor) -> Tensor:
    """The learning rate of the next step that lowers the loss the most.

    Along a step the loss is a polynomial of the learning rate, ``|R - lr P + lr^2 Q|^2 / 2`` with R = X W1 W2 - Y, the
    gradients G1 and G2, P = X (G1 W2 + W1 G2) and Q = X G1 G2: its least value is known before the step is taken, and
    is no more than what `local_rate` makes certain for any learning rate.

    Args:
        X, Y, W1, W2: as in `certificate`; leading dimensions are networks of their own.

    Returns:
        [...] float64; 0 where the gradient is zero.

    Raises:
        ValueError, TypeError: as `certificate`.
    """
    x, y, w1, w2 = _checked(X, Y, W1, W2)

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum((-2, -1))

    R = x @ w1 @ w2 - y
    back = x.mT @ R
    G1, G2 = back @ w2.mT, w1.mT @ back
    P, Q = x @ (G1 @ w2 + w1 @ G2), x @ (G1 @ G2)
    slope = dot(G1, G1) + dot(G2, G2)  # minus the derivative at 0
    moves = slope > 0
    # In units of a rate that is near enough, and of what the loss falls by with it.
    unit = 1 / (back.square().sum((-2, -1)).sqrt() + dot(x, x) * (dot(w1, w1) + dot(w2, w2)))
    unit = torch.where(moves, unit, 1.0)
    scale = torch.where(moves, slope * unit, 1.0)
    b1 = unit.square() * (dot(P, P) + 2 * dot(R, Q)) / scale
    b2, b3 = -3 * unit**3 * dot(P, Q) / scale, 2 * unit**4 * dot(Q, Q) / scale
    # The derivative is -1 + b1 t + b2 t^2 + b3 t^3; 1 / t are the eigenvalues of its companion matrix.
    companion = x.new_zeros(*slope.shape, 3, 3)
    companion[..., 0, 0], companion[..., 0, 1], companion[..., 0, 2] = b1, b2, b3
    companion[..., 1, 0] = companion[..., 2, 1] = 1
    roots = torch.linalg.eigvals(companion)
    real = (roots.real > 0) & (roots.imag.abs() <= 1e-6 * roots.real)
    t = 1 / torch.where(real, roots.real, 1.0)
    c1, c2, c3 = (b.unsqueeze(-1) for b in (b1, b2, b3))
    fall = torch.where(real, t * (-1 + t * (c1 / 2 + t * (c2 / 3 + t * c3 / 4))), torch.inf)
    best = t.gather(-1, fall.argmin(-1, keepdim=True)).squeeze(-1)
    return torch.where(moves, unit * best, 0.0)
