"""One phase of a program and its adjoint, one program a task (the formulas: csrc/engine/program.h).

The live rows of a task stand one below the other: support rows from 0 on, where a phase uses them, query rows from
``query_at`` on. The state and everything beside it are tiles [LP, NP] of the live rows; G is zero outside of the
phase's own rows. ``numbers`` holds scale, bias and target; a linear classifier has scale 1 and bias 0 there, a
Euclidean one bias 0. Between launches the state waits in the trace, and the adjoint in arrays of its own.
"""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: E741 -- sizes are capitals

from __future__ import annotations

import triton
import triton.language as tl

from kernelmeta.triton.cosine_step import cosine_step, cosine_step_backward, loses, nearly_parallel
from kernelmeta.triton.euclidean_step import euclidean_step, euclidean_step_backward
from kernelmeta.triton.mlp_kernels import mlp_backward, mlp_forward
from kernelmeta.triton.oracle_kernels import (
    CROSS_ENTROPY,
    ENTROPY,
    EQUIVARIANT_GRADIENT,
    HINGE,
    SOFT_ASSIGNMENT,
    SQUARED_ERROR,
    SYNTHETIC_GRADIENT,
    oracle,
    oracle_backward,
)
from kernelmeta.triton.pair_kernels import PAIR_TILE, pair_backward, pair_forward
from kernelmeta.triton.tiles import product, store_matrix

_FLOOR2 = tl.constexpr(1e-24)  # of a squared norm


@triton.jit
def _counts(counts, t, S, Q, N, RAGGED: tl.constexpr):
    """This task's live support rows, query rows and ways."""
    if RAGGED:
        S, Q, N = tl.load(counts + 3 * t), tl.load(counts + 3 * t + 1), tl.load(counts + 3 * t + 2)
    return S, Q, N


@triton.jit
def _class_sizes(labels, n, ways, S, NP: tl.constexpr, C: tl.constexpr):
    """Support rows of every class; one where there is no class."""
    sizes = tl.zeros([NP], C)
    for start in range(0, S, 16):
        s = start + tl.arange(0, 16)
        label = tl.load(labels + s, mask=s < S, other=-1)
        sizes += tl.sum(tl.where(label[:, None] == n[None, :], 1.0, 0.0).to(C), 0)
    return tl.where(ways, sizes, 1.0)


@triton.jit
def _one_hot(labels, row, count, n, C: tl.constexpr):
    label = tl.load(labels + row, mask=row < count, other=-1)
    return tl.where(label[:, None] == n[None, :], 1.0, 0.0).to(C)


@triton.jit
def _times(matrix, xi, xk, value, work, i, k, n, I, K, N, NP: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr):
    """sum_k matrix[i, k] value[k, n], by way of a tile [K, NP] at ``work``."""
    tl.debug_barrier()  # nobody still reads what the last call left
    store_matrix(work, NP, k, n, K, N, value)
    tl.debug_barrier()
    return product(matrix, xi, xk, work, NP, 1, i, n, I, N, K, C, PRECISION)


@triton.jit
def _anchor_weights(sizes, p):
    """Support rows of every class; one where (nearly) no row belongs to it, so that it stays where it is."""
    return tl.where(sizes + tl.sum(p, 0) < 1e-12, 1.0, sizes)


@triton.jit
def _assignment(p, u, ua, ap, r2, na, anchor, sizes, rate):
    """Scalars of a step of soft assignment, one a class: m, <theta_a, X^T p>, <theta, new>, |new|^2, <new, theta_a>,
    |theta'|^2. ``a`` marks the classifier at the start of the phase, ``sizes`` is its weight.
    """
    m = sizes + tl.sum(p, 0)
    anchored = tl.sqrt(na) * tl.sum(p * ua, 0)
    along = (sizes * anchor + tl.sqrt(r2) * tl.sum(p * u, 0)) / m
    norm2 = (sizes * sizes * na + 2 * sizes * anchored + tl.sum(p * ap, 0)) / (m * m)
    with_anchor = (sizes * na + anchored) / m
    kept = 1 - rate
    next_r2 = kept * kept * r2 + 2 * rate * kept * along + rate * rate * norm2
    return m, anchored, along, norm2, with_anchor, next_r2


@triton.jit
def phase_forward_kernel(
    trace, numbers, rates, labels, counts, p, fixed, work, errors,
    rows, S, Q, N, H, query_at, start, steps, states, work_size,
    size, ld, gram_at, r2_at, u_at, ag_at, anchor_at, lost_at, a_at, p_at,
    LP: tl.constexpr, NP: tl.constexpr, HP: tl.constexpr, PP: tl.constexpr, ORACLE: tl.constexpr,
    QUERY: tl.constexpr, MEAN: tl.constexpr, COSINE: tl.constexpr, EUCLIDEAN: tl.constexpr,
    COEFFICIENTS: tl.constexpr, RAGGED: tl.constexpr, FIXED: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """State number ``start`` of the trace -> the next ``steps`` (of which those below ``states`` are stored).

    ``errors`` [T, 2, N]: of norms and directions, see `loses`.
    """
    t = tl.program_id(0).to(tl.int64)
    trace += t * size
    work += t * work_size
    labels += t * rows
    n_way = N
    S, Q, N = _counts(counts, t, S, Q, N, RAGGED)
    line, n, h = tl.arange(0, LP), tl.arange(0, NP), tl.arange(0, HP)
    if QUERY:
        row, count = (line + LP - query_at) % LP, Q  # the number of a live row among those of the phase
    else:
        row, count = line, S
    ways = (n < N)[None, :]
    inside = ((line < S) | ((line >= query_at) & (line < query_at + Q)))[:, None] & ways
    mine = (row < count)[:, None] & ways
    tile = n[None, :] * ld + line[:, None]
    state = n_way * ld
    scale, bias, target = tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2)
    share = tl.full([], 1.0, C)
    if MEAN:
        share = share / count
    y = _one_hot(labels, row, count, n, C) if not QUERY else tl.zeros([LP, NP], C)

    u = tl.load(trace + u_at + start * state + tile, mask=inside, other=0.0)
    combination = tl.zeros([LP, NP], C)
    if COEFFICIENTS:
        combination = tl.load(trace + p_at + start * state + tile, mask=inside, other=0.0)
    if COSINE:
        r2 = tl.load(trace + r2_at + start * n_way + n, mask=n < N, other=1.0)
        lost = tl.where(r2 > _FLOOR2, 0, 1)  # a step is not orthogonal to a smaller theta
        errors += 2 * t * n_way
        of_norm = tl.load(errors + n, mask=n < N, other=1.0)
        of_direction = tl.load(errors + n_way + n, mask=n < N, other=1.0)
        if COEFFICIENTS:
            a = tl.load(trace + a_at + start * n_way + n, mask=n < N, other=0.0)
    if EUCLIDEAN:
        r2 = tl.load(trace + r2_at + start * n_way + n, mask=n < N, other=0.0)
        if COEFFICIENTS:
            a = tl.load(trace + a_at + start * n_way + n, mask=n < N, other=0.0)
    if ORACLE == SOFT_ASSIGNMENT:
        sizes = _class_sizes(labels, n, n < N, rows, NP, C)
        ua, na, anchor = u, r2, r2
        if COEFFICIENTS:
            first_a, first_combination = a, combination
    for step in range(0, steps):
        k = start + step
        rate = tl.load(rates + k)
        shift = bias
        if EUCLIDEAN:
            shift = -r2[None, :] / 2
        z = tl.where(mine, scale * (u + shift), 0.0)
        if ORACLE == SYNTHETIC_GRADIENT:
            g, _, _, _, _ = mlp_forward(
                z, p, fixed, work, row, n, n, h, count, n_way, n_way, H, LP, HP, FIXED, C, PRECISION
            )
            g = g * share
        elif ORACLE == EQUIVARIANT_GRADIENT:
            g, _, _, _, _, _, _ = pair_forward(
                z, p, fixed, work, mine, ways, row, n, h, count, N, H, PP, HP, FIXED, C, PRECISION
            )
            g = g * share
        else:
            g = oracle(z, y, ways, share, target, ORACLE)
        g = tl.where(mine, g, 0.0)
        ag = _times(trace + gram_at, 1, ld, g, work, line, row, n, ld, count, n_way, NP, C, PRECISION)
        ag = tl.where(inside, ag, 0.0)
        if EUCLIDEAN:
            u, r2, grown = euclidean_step(u, g, ag, r2, rate * scale)
            if COEFFICIENTS:
                a = grown * a
                combination = grown[None, :] * combination - rate * scale * g
        elif not COSINE:
            u = u - rate * ag
            if COEFFICIENTS:
                combination = combination - rate * g
        elif ORACLE == SOFT_ASSIGNMENT:
            kept = 1 - rate
            weights = _anchor_weights(sizes, g)
            m, anchored, _, _, with_anchor, grown = _assignment(g, u, ua, ag, r2, na, anchor, weights, rate)
            terms = weights * weights * na + 2 * weights * tl.abs(anchored) + tl.sum(tl.abs(g * ag), 0)
            terms = kept * kept * r2 + rate * rate * terms / (m * m)
            of_norm, of_direction, too_much = loses(of_norm, of_direction, tl.sqrt(terms / grown), terms, grown)
            lost = lost | too_much
            grown = tl.where(grown < _FLOOR2, _FLOOR2, grown)
            inverse = 1 / tl.sqrt(grown)
            of_u = kept * tl.sqrt(r2) * inverse
            of_a = rate * weights * tl.sqrt(na) / m * inverse
            u = of_u[None, :] * u + of_a[None, :] * ua + (rate / m * inverse)[None, :] * ag
            anchor = kept * anchor + rate * with_anchor
            r2 = grown
            tl.store(trace + anchor_at + (k + 1) * n_way + n, anchor, mask=n < N)
            if COEFFICIENTS:
                a = kept * a + rate * weights * first_a / m
                moved = (weights / m)[None, :] * first_combination + g / m[None, :]
                combination = kept * combination + rate * moved
        else:
            u, r2, grown, moved, of_norm, of_direction, too_much = cosine_step(
                u, g, ag, r2, rate * scale, of_norm, of_direction
            )
            lost = lost | too_much
            if COEFFICIENTS:
                a = grown * a
                combination = grown[None, :] * combination - moved[None, :] * g
        if COSINE:
            lost = lost | nearly_parallel(u, mine)
        if k + 1 < states:
            tl.store(trace + u_at + (k + 1) * state + tile, u, mask=inside)
        if COEFFICIENTS:
            tl.store(trace + p_at + (k + 1) * state + tile, combination, mask=inside)
        if COSINE or EUCLIDEAN:
            tl.store(trace + ag_at + k * state + tile, ag, mask=inside)
            tl.store(trace + r2_at + (k + 1) * n_way + n, r2, mask=n < N)
            if COEFFICIENTS:
                tl.store(trace + a_at + (k + 1) * n_way + n, a, mask=n < N)

    if COSINE:
        lost = lost | (tl.load(trace + lost_at + n, mask=n < N, other=0.0) != 0).to(tl.int32)
        tl.store(trace + lost_at + n, lost.to(C), mask=n < N)
        tl.store(errors + n, of_norm, mask=n < N)
        tl.store(errors + n_way + n, of_direction, mask=n < N)


@triton.jit
def phase_backward_kernel(
    trace, numbers, rates, labels, counts, p, fixed, work, gu_at, gr2_at, gp_at, ga_at, partial, gnumbers, grates,
    gs, gag_out, rows, S, Q, N, H, P, K, query_at, start, steps, work_size,
    size, ld, gram_at, r2_at, u_at, ag_at, anchor_at, lost_at, a_at, p_at,
    LP: tl.constexpr, NP: tl.constexpr, HP: tl.constexpr, PP: tl.constexpr, ORACLE: tl.constexpr,
    QUERY: tl.constexpr, MEAN: tl.constexpr, COSINE: tl.constexpr, EUCLIDEAN: tl.constexpr,
    COEFFICIENTS: tl.constexpr, RAGGED: tl.constexpr, FIRST_ORDER: tl.constexpr, ROWS: tl.constexpr,
    FIXED: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the state after the phase, in gu [T, N, ld], gr2 [T, N] and, with COEFFICIENTS, gp and ga alike ->
    those of the state before it, in the same place; adds to this task's gradients of the MLP (``partial`` [T, P]) and
    of scale, bias and target (``gnumbers`` [T, 3]), and leaves those of the rates ([T, K]) and, where ROWS says so, G
    of every step and the gradient of A G, [T, K, N, ld].
    """
    t = tl.program_id(0).to(tl.int64)
    trace += t * size
    work += t * work_size
    product_work = work
    if ORACLE == SYNTHETIC_GRADIENT:
        product_work = work + 5 * LP * HP + 2 * LP * NP  # the MLP's activations are still wanted
    if ORACLE == EQUIVARIANT_GRADIENT:
        product_work = work + 5 * PP * HP + 3 * PP * PAIR_TILE + PP
    labels += t * rows
    partial += t * P
    gnumbers += 3 * t
    n_way = N
    S, Q, N = _counts(counts, t, S, Q, N, RAGGED)
    line, n, h = tl.arange(0, LP), tl.arange(0, NP), tl.arange(0, HP)
    if QUERY:
        row, count = (line + LP - query_at) % LP, Q
    else:
        row, count = line, S
    ways = (n < N)[None, :]
    inside = ((line < S) | ((line >= query_at) & (line < query_at + Q)))[:, None] & ways
    mine = (row < count)[:, None] & ways
    tile = n[None, :] * ld + line[:, None]
    state = n_way * ld
    scale, bias, target = tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2)
    share = tl.full([], 1.0, C)
    if MEAN:
        share = share / count
    y = _one_hot(labels, row, count, n, C) if not QUERY else tl.zeros([LP, NP], C)

    gu_at += t * state
    gr2_at += t * n_way
    gp_at += t * state
    ga_at += t * n_way
    gu = tl.load(gu_at + tile, mask=inside, other=0.0)
    gr2 = tl.zeros([NP], C)
    gp = tl.zeros([LP, NP], C)
    ga = tl.zeros([NP], C)
    if COSINE or EUCLIDEAN:
        gr2 += tl.load(gr2_at + n, mask=n < N, other=0.0)
    if COEFFICIENTS:
        gp += tl.load(gp_at + tile, mask=inside, other=0.0)
        if COSINE or EUCLIDEAN:
            ga += tl.load(ga_at + n, mask=n < N, other=0.0)
    gscale = tl.zeros([NP], C)
    gbias = tl.zeros([NP], C)
    gtarget = tl.zeros([NP], C)
    if ORACLE == SOFT_ASSIGNMENT:
        sizes = _class_sizes(labels, n, n < N, rows, NP, C)
        ua = tl.load(trace + u_at + start * state + tile, mask=inside, other=0.0)
        na = tl.load(trace + r2_at + start * n_way + n, mask=n < N, other=1.0)
        # Gradients of what the steps ask of the anchor: <theta, theta_a>, R_a, |theta_a|^2, P_a, a_a.
        ganchor = tl.zeros([NP], C)
        gra = tl.zeros([LP, NP], C)
        gna = tl.zeros([NP], C)
        if COEFFICIENTS:
            first_p = tl.load(trace + p_at + start * state + tile, mask=inside, other=0.0)
            first_a = tl.load(trace + a_at + start * n_way + n, mask=n < N, other=0.0)
            gpa = tl.zeros([LP, NP], C)
            gaa = tl.zeros([NP], C)
    for back in range(0, steps):
        k = start + steps - 1 - back
        rate = tl.load(rates + k)
        u = tl.load(trace + u_at + k * state + tile, mask=inside, other=0.0)
        shift = bias
        if EUCLIDEAN:
            r2 = tl.load(trace + r2_at + k * n_way + n, mask=n < N, other=0.0)
            shift = -r2[None, :] / 2
        z = tl.where(mine, scale * (u + shift), 0.0)
        if ORACLE == SYNTHETIC_GRADIENT:
            g, mean1, variance1, mean2, variance2 = mlp_forward(
                z, p, fixed, work, row, n, n, h, count, n_way, n_way, H, LP, HP, FIXED, C, PRECISION
            )
            g = g * share
        elif ORACLE == EQUIVARIANT_GRADIENT:
            g, inputs, istd, mean1, variance1, mean2, variance2 = pair_forward(
                z, p, fixed, work, mine, ways, row, n, h, count, N, H, PP, HP, FIXED, C, PRECISION
            )
            g = g * share
        else:
            g = oracle(z, y, ways, share, target, ORACLE)
        g = tl.where(mine, g, 0.0)
        if EUCLIDEAN:
            ag = tl.load(trace + ag_at + k * state + tile, mask=inside, other=0.0)
            last_p, last_a = gp, ga
            if COEFFICIENTS:
                last_p = tl.load(trace + p_at + k * state + tile, mask=inside, other=0.0)
                last_a = tl.load(trace + a_at + k * n_way + n, mask=n < N, other=0.0)
            gu, gr2, gp, ga, gg, gag, ge = euclidean_step_backward(
                u, g, ag, r2, rate * scale, gu, gr2, last_p, last_a, gp, ga, COEFFICIENTS
            )
            gscale += rate * ge
            grate = scale * ge
            gg += _times(trace + gram_at, ld, 1, gag, product_work, row, line, n, count, ld, n_way, NP, C, PRECISION)
        elif not COSINE:
            gag = -rate * gu
            # u' = u - rate A G, P' = P - rate G: the gradient of G, but for the rate, is that of the rate but for G.
            gg = _times(trace + gram_at, ld, 1, gu, product_work, row, line, n, count, ld, n_way, NP, C, PRECISION)
            gg += gp
            grate = -tl.sum(gg * g, 0)
            gg = -rate * gg
        else:
            r2 = tl.load(trace + r2_at + k * n_way + n, mask=n < N, other=1.0)
            ag = tl.load(trace + ag_at + k * state + tile, mask=inside, other=0.0)
            r = tl.sqrt(r2)
            last_p, last_a = gp, ga
            if COEFFICIENTS:
                last_p = tl.load(trace + p_at + k * state + tile, mask=inside, other=0.0)
                last_a = tl.load(trace + a_at + k * n_way + n, mask=n < N, other=0.0)
            if ORACLE == SOFT_ASSIGNMENT:
                kept = 1 - rate
                anchor = na
                if back < steps - 1:
                    anchor = tl.load(trace + anchor_at + k * n_way + n, mask=n < N, other=1.0)
                sizes_now = _anchor_weights(sizes, g)
                m, anchored, along, norm2, with_anchor, grown = _assignment(
                    g, u, ua, ag, r2, na, anchor, sizes_now, rate
                )
                floored = grown <= _FLOOR2
                grown = tl.where(floored, _FLOOR2, grown)
                inverse = 1 / tl.sqrt(grown)
                weight = sizes_now / m
                # gR' = gU' / r'; with T = (c R_a + A p) / m the state is R' = kept R + rate T.
                gr = gu * inverse[None, :]
                gr_u = tl.sum(gr * u, 0)
                gt_t = weight * tl.sqrt(na) * tl.sum(gr * ua, 0) + tl.sum(gr * ag, 0) / m  # <gR', T>
                gu_next = kept * r * gr_u + rate * gt_t  # <gR', R'>
                gnext = tl.where(floored, 0.0, gr2 - gu_next / (2 * grown))
                grate = gt_t - r * gr_u + ganchor * (with_anchor - anchor)
                grate += gnext * (2 * (1 - 2 * rate) * along - 2 * kept * r2 + 2 * rate * norm2)
                galong = 2 * rate * kept * gnext
                gnorm2 = rate * rate * gnext
                gwith = rate * ganchor
                gm = -(rate * gt_t + 2 * gnorm2 * norm2 + galong * along + gwith * with_anchor) / m
                ganchored = (2 * gnorm2 * weight + gwith) / m
                gpap = gnorm2 / (m * m)
                gg = (ganchored * tl.sqrt(na))[None, :] * ua + gpap[None, :] * ag + (galong * r / m)[None, :] * u
                if COEFFICIENTS:
                    moved = weight * tl.sum(gp * first_p, 0) + tl.sum(gp * g, 0) / m + weight * first_a * ga
                    grate += moved - tl.sum(gp * last_p, 0) - last_a * ga
                    gm -= rate * moved / m
                    gg += (rate / m)[None, :] * gp
                    gpa += (rate * weight)[None, :] * gp
                    gaa += rate * weight * ga
                    gp = kept * gp
                    ga = kept * ga
                gg += gm[None, :]
                gag = (rate / m)[None, :] * gr + gpap[None, :] * g
                gra += (rate * weight)[None, :] * gr + ganchored[None, :] * g
                gr = kept * gr + (galong / m)[None, :] * g
                gna += gnorm2 * weight * weight + gwith * weight
                ganchor = kept * ganchor + galong * weight
                gr2 = kept * kept * gnext + tl.sum(gr * u, 0) / (2 * r)
                gu = r[None, :] * gr
            else:
                gu, gr2, gp, ga, gg, gag, ge = cosine_step_backward(
                    u, g, ag, r2, rate * scale, gu, gr2, last_p, last_a, gp, ga, COEFFICIENTS
                )
                gscale += rate * ge
                grate = scale * ge
            gg += _times(trace + gram_at, ld, 1, gag, product_work, row, line, n, count, ld, n_way, NP, C, PRECISION)
        tl.store(grates + t * K + k, tl.sum(tl.where(n < N, grate, 0.0)))
        if ROWS:
            tl.store(gs + (t * K + k) * state + tile, g, mask=inside)
            tl.store(gag_out + (t * K + k) * state + tile, gag, mask=inside)
        if not FIRST_ORDER:
            gg = tl.where(mine, gg, 0.0)
            if ORACLE == SYNTHETIC_GRADIENT:
                gz = mlp_backward(
                    z, gg * share, p, partial, work, mean1, variance1, mean2, variance2, row, n, n, h, count, n_way,
                    n_way, H, LP, NP, NP, HP, FIXED, C, PRECISION,
                )  # fmt: skip
                tl.debug_barrier()  # before the next step adds to the parameter gradients in memory
            elif ORACLE == EQUIVARIANT_GRADIENT:
                gz = pair_backward(
                    z, gg * share, p, partial, work, inputs, istd, mean1, variance1, mean2, variance2, mine, ways, row,
                    n, h, count, N, H, PP, HP, FIXED, C, PRECISION,
                )  # fmt: skip
                tl.debug_barrier()
            else:
                gz = oracle_backward(z, gg, ways, share, ORACLE)
            if ORACLE == SQUARED_ERROR:
                gtarget -= tl.sum(y * gg, 0) * share
            gz = tl.where(mine, gz, 0.0)
            if COSINE:
                gscale += tl.sum(gz * u, 0)
                # `blind_to_shift` in csrc/engine/oracles.h: there it sums to zero but for rounding.
                if (
                    ORACLE != CROSS_ENTROPY and ORACLE != HINGE and ORACLE != ENTROPY and ORACLE != SOFT_ASSIGNMENT
                    and ORACLE != EQUIVARIANT_GRADIENT
                ):  # fmt: skip
                    per_class = tl.sum(gz, 0)
                    gscale += bias * per_class
                    gbias += scale * per_class
            if EUCLIDEAN:
                per_class = tl.sum(gz, 0)
                gscale += tl.sum(gz * u, 0) - per_class * r2 / 2
                gr2 -= scale * per_class / 2
            gu += scale * gz
    if ORACLE == SOFT_ASSIGNMENT:
        gr2 += ganchor + gna + tl.sum(gra * ua, 0) / (2 * tl.sqrt(na))
        gu += tl.sqrt(na)[None, :] * gra
        if COEFFICIENTS:
            gp += gpa
            ga += gaa
    tl.store(gu_at + tile, gu, mask=inside)
    if COSINE or EUCLIDEAN:
        tl.store(gr2_at + n, gr2, mask=n < N)
        tl.store(gnumbers, tl.load(gnumbers) + tl.sum(tl.where(n < N, gscale, 0.0)))
        tl.store(gnumbers + 1, tl.load(gnumbers + 1) + tl.sum(tl.where(n < N, gbias, 0.0)))
        if COEFFICIENTS:
            tl.store(gp_at + tile, gp, mask=inside)
            tl.store(ga_at + n, ga, mask=n < N)
    if ORACLE == SQUARED_ERROR:
        tl.store(gnumbers + 2, tl.load(gnumbers + 2) + tl.sum(tl.where(n < N, gtarget, 0.0)))
