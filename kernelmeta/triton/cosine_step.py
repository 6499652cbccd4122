"""One step of a cosine classifier and its adjoint, on the tiles of one task (the formulas: csrc/engine/cosine_step.h).

u, g, ag and their gradients are tiles [rows, ways], r2 and what else there is of a class [ways]; g is zero outside of
the rows that drive the step.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

_MOST_LOST, _LEAST_APART = tl.constexpr(1.5), tl.constexpr(1 / 16)  # as in csrc/engine/cosine_step.h


@triton.jit
def loses(of_norm, of_direction, growth, terms, left):
    """The errors of norms and directions after a step, and 1 where too much is lost (csrc/engine/cosine_step.h)."""
    cancelled = terms / left
    of_norm = growth * growth * of_norm + cancelled
    of_direction = tl.abs(growth) * of_direction + tl.sqrt(cancelled)
    return of_norm, of_direction, tl.where(of_norm < of_direction * _MOST_LOST, 0, 1)


@triton.jit
def nearly_parallel(u, mine):
    """1 where all rows that drive the steps, ``mine``, are nearly parallel to theta (csrc/engine/cosine_step.h)."""
    apart = tl.max(tl.where(mine, 1 - u * u, 0.0), 0)
    return tl.where(apart > _LEAST_APART, 0, 1)


@triton.jit
def _scalars(u, g, ag, r2, e):
    """dot, c, |w|^2 / r2, and r2 after the step."""
    dot = tl.sum(u * g, 0)
    growth = (tl.sum(g * ag, 0) - dot * dot) / r2
    return dot, e * dot / r2, growth, r2 + e * e * growth


@triton.jit
def cosine_step(u, g, ag, r2, e, of_norm, of_direction):
    """U and r2 after the step; the factors 1 + c and e / r, with which theta moves: P' = (1 + c) P - (e / r) G; and
    what `loses` gives.
    """
    _, c, _, grown = _scalars(u, g, ag, r2, e)
    r, grown_r = tl.sqrt(r2), tl.sqrt(grown)
    alpha = (1 + c) * r / grown_r
    terms = r2 + e * e * tl.sum(g * ag, 0) / r2
    of_norm, of_direction, lost = loses(of_norm, of_direction, alpha, terms, grown)
    u = alpha[None, :] * u - (e / (r * grown_r))[None, :] * ag
    return u, grown, 1 + c, e / r, of_norm, of_direction, lost


@triton.jit
def cosine_step_backward(u, g, ag, r2, e, gu, gr2, p, a, gp, ga, COEFFICIENTS: tl.constexpr):
    """Gradients of the state after the step -> gu, gr2, gp and ga of that before it; then those of G (but for what
    comes by way of A G), of A G and of e. Without COEFFICIENTS, p, a, gp and ga are not looked at.
    """
    dot, c, growth, grown = _scalars(u, g, ag, r2, e)
    r, grown_r = tl.sqrt(r2), tl.sqrt(grown)
    alpha = (1 + c) * r / grown_r  # U' = alpha U - beta A G
    beta = e / (r * grown_r)
    galpha = tl.sum(gu * u, 0)
    gbeta = -tl.sum(gu * ag, 0)
    gc = galpha * r / grown_r
    ggrown = gr2 - (galpha * alpha + gbeta * beta) / (2 * grown)
    gr2 = (galpha * alpha - gbeta * beta) / (2 * r2)
    ge = gbeta / (r * grown_r)
    gg = gu * 0
    if COEFFICIENTS:  # P' = (1 + c) P - (e / r) G, a' = (1 + c) a
        gc += tl.sum(gp * p, 0) + ga * a
        along = tl.sum(gp * g, 0)
        gr2 += along * e / (2 * r * r2)
        ge -= along / r
        gg -= (e / r)[None, :] * gp
        gp = (1 + c)[None, :] * gp
        ga = (1 + c) * ga
    gquad = ggrown * e * e / r2
    gdot = gc * e / r2 - 2 * gquad * dot
    gr2 += ggrown * (1 - e * e * growth / r2) - gc * c / r2
    ge += gc * dot / r2 + 2 * ggrown * e * growth
    gg += gdot[None, :] * u + gquad[None, :] * ag
    gag = gquad[None, :] * g - beta[None, :] * gu
    gu = gdot[None, :] * g + alpha[None, :] * gu
    return gu, gr2, gp, ga, gg, gag, ge
