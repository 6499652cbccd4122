"""One step of a classifier by distances and its adjoint, on the tiles of one task (the formulas:
csrc/engine/euclidean_step.h). Tiles are as in `cosine_step`.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def euclidean_step(u, g, ag, r2, e):
    """U and r2 after the step, and the factor 1 + c: P' = (1 + c) P - e G."""
    grown = 1 + e * tl.sum(g, 0)
    r2 = grown * (grown * r2 - 2 * tl.sum(u * (e * g), 0)) + tl.sum(e * g * (e * ag), 0)
    return grown[None, :] * u - e * ag, r2, grown


@triton.jit
def euclidean_step_backward(u, g, ag, r2, e, gu, gr2, p, a, gp, ga, COEFFICIENTS: tl.constexpr):
    """As `cosine_step_backward`."""
    sigma, dot, quad = tl.sum(g, 0), tl.sum(u * g, 0), tl.sum(g * (e * ag), 0)
    grown = 1 + e * sigma
    ggrown = tl.sum(gu * u, 0) + 2 * gr2 * (grown * r2 - e * dot)
    ge = 2 * gr2 * (quad - grown * dot) - tl.sum(gu * ag, 0)
    gg = gu * 0
    if COEFFICIENTS:
        ggrown += tl.sum(gp * p, 0) + ga * a
        ge -= tl.sum(gp * g, 0)
        gg -= e * gp
        gp = grown[None, :] * gp
        ga = grown * ga
    ge += ggrown * sigma
    gdot, gquad = -2 * grown * e * gr2, e * e * gr2
    gg += gdot[None, :] * u + gquad[None, :] * ag + (ggrown * e)[None, :]
    gag = gquad[None, :] * g - e * gu
    gu = gdot[None, :] * g + grown[None, :] * gu
    return gu, grown * grown * gr2, gp, ga, gg, gag, ge
