"""The equivariant gradient on the rows of one task, and its adjoint (the formulas: csrc/engine/pair_inputs.h).

What the MLP is told of the pairs of a row and a class is made on tiles [LP, NP] of the live rows, and goes through
memory into tiles [PP, 16] of the pairs, row times ways plus class, of which the first seven columns are inputs, and the
first is the output. Behind the MLP's own part of the workspace lie the inputs [PP, 16] and the output [PP].
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from kernelmeta.triton.mlp_kernels import mlp_backward, mlp_forward
from kernelmeta.triton.oracle_kernels import softmax
from kernelmeta.triton.tiles import load_matrix, store_matrix

PAIR_TILE = tl.constexpr(16)  # inputs and output of the MLP, padded to what tl.dot takes
_INPUTS = tl.constexpr(7)
_CLAMP = tl.constexpr(20.0)
_EPS = tl.constexpr(1e-9)
_TINY = tl.constexpr(1e-30)


@triton.jit
def _others(value, n, N):
    """The sum over the other classes of a row, which loses no digits where one class has nearly all."""
    sums = value * 0.0
    for m in range(0, N):
        of_class = tl.sum(tl.where((n == m)[None, :], value, 0.0), 1)
        sums += tl.where((n == m)[None, :], 0.0, of_class[:, None])
    return sums


@triton.jit
def _terms(z, mine, ways, n, count, N):
    """p, log p, m + eps, 1 - p, the odds and the entropy."""
    p, log_sum = softmax(z, ways)
    p = tl.where(mine, p, 0.0)
    log_p = tl.where(mine, z - log_sum[:, None], 0.0)
    mass = tl.sum(p, 0) * N / count + _EPS
    rest = _others(p, n, N)
    rest = tl.where(rest < _TINY, _TINY, rest)
    odds = log_p - tl.log(rest)
    return p, log_p, mass, rest, odds, -tl.sum(p * log_p, 1)


@triton.jit
def _normalised(x, pair, f, pairs, C: tl.constexpr):
    """The inputs [PP, 16] at ``x`` over all pairs, and one over their standard deviations."""
    raw = load_matrix(x, PAIR_TILE, pair, f, pairs, _INPUTS, C)
    valid = (pair < pairs)[:, None]
    centred = tl.where(valid, raw - (tl.sum(raw, 0) / pairs)[None, :], 0.0)
    istd = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / pairs + 1e-5)
    return centred * istd[None, :], istd


@triton.jit
def pair_forward(
    z, p, fixed, work, mine, ways, row, n, h, count, N, H,
    PP: tl.constexpr, HP: tl.constexpr, FIXED: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """z [LP, NP] of the phase's rows (``mine``) -> g; what `pair_backward` wants besides."""
    x = work + 5 * PP * HP + 2 * PP * PAIR_TILE
    out = x + PP * PAIR_TILE
    pair, f, pairs = tl.arange(0, PP), tl.arange(0, PAIR_TILE), count * N
    at = row[:, None] * N + n[None, :]
    share, log_p, mass, _, odds, entropy = _terms(z, mine, ways, n, count, N)
    tl.debug_barrier()  # nobody still reads what was there
    own = x + at * PAIR_TILE
    tl.store(own, tl.where(log_p < -_CLAMP, -_CLAMP, log_p), mask=mine)
    tl.store(own + 1, share, mask=mine)
    tl.store(own + 2, tl.log(mass)[None, :] + 0.0 * z, mask=mine)
    odds = tl.where(odds < -_CLAMP, -_CLAMP, odds)
    tl.store(own + 3, tl.where(odds > _CLAMP, _CLAMP, odds), mask=mine)
    tl.store(own + 4, entropy[:, None] + 0.0 * z, mask=mine)
    tl.store(own + 5, z - (tl.sum(tl.where(mine, z, 0.0), 0) / count)[None, :], mask=mine)
    tl.store(own + 6, share / mass[None, :], mask=mine)
    tl.debug_barrier()
    inputs, istd = _normalised(x, pair, f, pairs, C)
    guess, mean1, variance1, mean2, variance2 = mlp_forward(
        inputs, p, fixed, work, pair, f, f, h, pairs, _INPUTS, 1, H, PP, HP, FIXED, C, PRECISION
    )
    tl.store(out + pair, tl.sum(tl.where((f == 0)[None, :], guess, 0.0), 1), mask=pair < pairs)
    tl.debug_barrier()
    g = tl.load(out + at, mask=mine, other=0.0)
    return g, inputs, istd, mean1, variance1, mean2, variance2


@triton.jit
def pair_backward(
    z, gg, p, gp, work, inputs, istd, mean1, variance1, mean2, variance2, mine, ways, row, n, h, count, N, H,
    PP: tl.constexpr, HP: tl.constexpr, FIXED: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """gg [LP, NP] -> gz, after `pair_forward`; adds to this task's gradients of the MLP."""
    x = work + 5 * PP * HP + 2 * PP * PAIR_TILE
    out = x + PP * PAIR_TILE
    pair, f, pairs = tl.arange(0, PP), tl.arange(0, PAIR_TILE), count * N
    at = row[:, None] * N + n[None, :]
    tl.debug_barrier()
    tl.store(out + at, gg, mask=mine)
    tl.debug_barrier()
    of_guess = tl.load(out + pair, mask=pair < pairs, other=0.0)
    of_guess = tl.where((f == 0)[None, :], of_guess[:, None], 0.0)
    g = mlp_backward(
        inputs, of_guess, p, gp, work, mean1, variance1, mean2, variance2, pair, f, f, h, pairs, _INPUTS, 1, H,
        PP, PAIR_TILE, PAIR_TILE, HP, FIXED, C, PRECISION,
    )  # fmt: skip
    valid = (pair < pairs)[:, None]
    g = tl.where(valid, g - inputs * (tl.sum(g * inputs, 0) / pairs)[None, :], 0.0)
    g = g - (tl.sum(g, 0) / pairs)[None, :]  # as in `mlp_kernels`
    store_matrix(x, PAIR_TILE, pair, f, pairs, _INPUTS, g * istd[None, :])
    tl.debug_barrier()

    share, log_p, mass, rest, odds, entropy = _terms(z, mine, ways, n, count, N)
    own = x + at * PAIR_TILE
    of_class = tl.load(own + 6, mask=mine, other=0.0) / mass[None, :]
    of_mass = tl.load(own + 2, mask=mine, other=0.0) / mass[None, :] - of_class * share / mass[None, :]
    of_p = tl.load(own + 1, mask=mine, other=0.0) + of_class + (tl.sum(of_mass, 0) * N / count)[None, :]
    of_log = tl.where(log_p > -_CLAMP, tl.load(own, mask=mine, other=0.0), 0.0)
    of_odds = tl.where(tl.abs(odds) < _CLAMP, tl.load(own + 3, mask=mine, other=0.0), 0.0)
    of_entropy = tl.sum(tl.load(own + 4, mask=mine, other=0.0), 1)
    of_z = tl.load(own + 5, mask=mine, other=0.0)
    along = of_p - tl.sum(share * of_p, 1)[:, None] - tl.sum(of_log, 1)[:, None]
    along = along - of_entropy[:, None] * (log_p + entropy[:, None]) - _others(of_odds / rest, n, N)
    return share * along + of_log + of_odds + of_z - (tl.sum(of_z, 0) / count)[None, :]
