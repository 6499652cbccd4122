"""The inner loop of one task and its adjoint, one program a task (the formulas: csrc/engine/cosine_step.h).

The state U and everything beside it are tiles [QP, NP]; the Gram matrix of the raw rows is one tile [QP, QP],
read again at every step and normalised by its factors: A G = inverse * (gram @ (inverse * G)).
``p`` is scale, bias and the packed MLP.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from kernelmeta.triton.cosine_step import cosine_step, cosine_step_backward, nearly_parallel
from kernelmeta.triton.mlp_kernels import mlp_backward, mlp_forward
from kernelmeta.triton.tiles import product, store_matrix


@triton.jit
def _times_gram(gram, inverse, value, work, q, n, Q, N, ld, NP: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr):
    """A ``value``, by way of a tile [Q, NP] at ``work``."""
    tl.debug_barrier()  # nobody still reads what the last call left
    store_matrix(work, NP, q, n, Q, N, value * inverse[:, None])
    tl.debug_barrier()
    return product(gram, ld, 1, work, NP, 1, q, n, Q, N, Q, C, PRECISION) * inverse[:, None]


@triton.jit
def loop_forward_kernel(
    trace, gram, work, p, fixed, logits, stats, Q, N, H, K, lr, work_size,
    size, ld, gram_stride, inverse_at, r2_at, u_at, ag_at, lost_at, a_at, p_at,
    QP: tl.constexpr, NP: tl.constexpr, HP: tl.constexpr, FIXED: tl.constexpr, STATS: tl.constexpr,
    WEIGHTS: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """trace: inverse, r2[0] = |theta0|^2 and u[0] = rows times theta0 -> all of every step; lost; logits."""
    t = tl.program_id(0).to(tl.int64)
    trace += t * size
    gram += t * gram_stride
    work += t * work_size
    product_work = work + 5 * QP * HP + 2 * QP * NP
    q, n, h = tl.arange(0, QP), tl.arange(0, NP), tl.arange(0, HP)
    inside = (q < Q)[:, None] & (n < N)[None, :]
    tile = n[None, :] * ld + q[:, None]
    scale, bias = tl.load(p), tl.load(p + 1)
    e = (lr * scale).to(C)
    inverse = tl.load(trace + inverse_at + q, mask=q < Q, other=0.0)
    r2 = tl.load(trace + r2_at + n, mask=n < N, other=1.0)
    lost = tl.where(r2 > 1e-24, 0, 1)  # a step is not orthogonal to a smaller theta
    r2 = tl.where(r2 < 1e-24, 1e-24, r2)
    u = tl.load(trace + u_at + tile, mask=inside, other=0.0) * inverse[:, None] / tl.sqrt(r2)[None, :]
    tl.debug_barrier()
    tl.store(trace + r2_at + n, r2, mask=n < N)
    tl.store(trace + u_at + tile, u, mask=inside)
    of_norm, of_direction = tl.full([NP], 1.0, C), tl.full([NP], 1.0, C)
    a = tl.full([NP], 1.0, C)
    combination = tl.zeros([QP, NP], C)
    if WEIGHTS:
        tl.store(trace + a_at + n, a, mask=n < N)
        tl.store(trace + p_at + tile, combination, mask=inside)
    for k in range(0, K):
        z = tl.where(inside, scale * (u + bias), 0.0)
        g, mean1, variance1, mean2, variance2 = mlp_forward(
            z, p + 2, fixed, work, q, n, n, h, Q, N, N, H, QP, HP, FIXED, C, PRECISION
        )
        if STATS:
            rows = tl.maximum(Q - 1, 1)
            to = stats + (t * K + k) * 4 * H + h
            tl.store(to, mean1, mask=h < H)
            tl.store(to + H, variance1 * Q / rows, mask=h < H)
            tl.store(to + 2 * H, mean2, mask=h < H)
            tl.store(to + 3 * H, variance2 * Q / rows, mask=h < H)
        ag = _times_gram(gram, inverse, g, product_work, q, n, Q, N, ld, NP, C, PRECISION)
        u, r2, grown, moved, of_norm, of_direction, too_much = cosine_step(u, g, ag, r2, e, of_norm, of_direction)
        lost = lost | too_much | nearly_parallel(u, inside)
        tl.store(trace + ag_at + k * N * ld + tile, ag, mask=inside)
        tl.store(trace + u_at + (k + 1) * N * ld + tile, u, mask=inside)
        tl.store(trace + r2_at + (k + 1) * N + n, r2, mask=n < N)
        if WEIGHTS:
            a = grown * a
            combination = grown[None, :] * combination - moved[None, :] * g
            tl.store(trace + a_at + (k + 1) * N + n, a, mask=n < N)
            tl.store(trace + p_at + (k + 1) * N * ld + tile, combination, mask=inside)
    tl.store(trace + lost_at + n, lost.to(C), mask=n < N)
    tl.store(logits + t * Q * N + q[:, None] * N + n[None, :], scale * (u + bias), mask=inside)


@triton.jit
def loop_backward_kernel(
    trace, gram, work, p, fixed, grad_logits, gp_last, ga_last, partial, gc_out, gn0_out, gs, gag_out,
    Q, N, H, K, P, lr, work_size, size, ld, gram_stride, inverse_at, r2_at, u_at, ag_at, lost_at, a_at, p_at,
    QP: tl.constexpr, NP: tl.constexpr, HP: tl.constexpr, FIXED: tl.constexpr,
    WEIGHTS: tl.constexpr, ROWS: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the logits (and of P_K, a_K) -> this task's parameter gradients ``partial`` [T, P], the gradient
    of rows times theta0, over |row|, in ``gc_out`` [T, N, Q], that of |theta0|^2 in ``gn0_out`` [T, N], and, where
    ROWS says so, G of every step and the gradient of A G, [T, K, N, Q].
    """
    t = tl.program_id(0).to(tl.int64)
    trace += t * size
    gram += t * gram_stride
    work += t * work_size
    product_work = work + 5 * QP * HP + 2 * QP * NP
    partial += t * P
    q, n, h = tl.arange(0, QP), tl.arange(0, NP), tl.arange(0, HP)
    inside = (q < Q)[:, None] & (n < N)[None, :]
    tile = n[None, :] * ld + q[:, None]
    dense = n[None, :] * Q + q[:, None]
    scale, bias = tl.load(p), tl.load(p + 1)
    e = (lr * scale).to(C)
    inverse = tl.load(trace + inverse_at + q, mask=q < Q, other=0.0)

    gz = tl.load(grad_logits + t * Q * N + q[:, None] * N + n[None, :], mask=inside, other=0.0)
    u = tl.load(trace + u_at + K * N * ld + tile, mask=inside, other=0.0)
    per_class = tl.sum(gz, 0)
    gscale = tl.sum(gz * u, 0) + bias * per_class
    gbias = scale * per_class
    gu = scale * gz
    gr2 = tl.zeros([NP], C)
    gp = tl.zeros([QP, NP], C)
    ga = tl.zeros([NP], C)
    if WEIGHTS:
        gp += tl.load(gp_last + t * N * Q + dense, mask=inside, other=0.0)
        ga += tl.load(ga_last + t * N + n, mask=n < N, other=0.0)
    for back in range(0, K):
        k = K - 1 - back
        r2 = tl.load(trace + r2_at + k * N + n, mask=n < N, other=1.0)
        u = tl.load(trace + u_at + k * N * ld + tile, mask=inside, other=0.0)
        ag = tl.load(trace + ag_at + k * N * ld + tile, mask=inside, other=0.0)
        z = tl.where(inside, scale * (u + bias), 0.0)
        g, mean1, variance1, mean2, variance2 = mlp_forward(
            z, p + 2, fixed, work, q, n, n, h, Q, N, N, H, QP, HP, FIXED, C, PRECISION
        )
        last_p, last_a = gp, ga
        if WEIGHTS:
            last_p = tl.load(trace + p_at + k * N * ld + tile, mask=inside, other=0.0)
            last_a = tl.load(trace + a_at + k * N + n, mask=n < N, other=0.0)
        gu, gr2, gp, ga, gg, gag, ge = cosine_step_backward(u, g, ag, r2, e, gu, gr2, last_p, last_a, gp, ga, WEIGHTS)
        gg += _times_gram(gram, inverse, gag, product_work, q, n, Q, N, ld, NP, C, PRECISION)
        gscale += lr * ge
        if ROWS:
            tl.store(gs + (t * K + k) * N * Q + dense, g, mask=inside)
            tl.store(gag_out + (t * K + k) * N * Q + dense, gag, mask=inside)
        gz = mlp_backward(
            z, gg, p + 2, partial + 2, work, mean1, variance1, mean2, variance2, q, n, n, h, Q, N, N, H,
            QP, NP, NP, HP, FIXED, C, PRECISION,
        )  # fmt: skip
        gz = tl.where(inside, gz, 0.0)
        per_class = tl.sum(gz, 0)
        gscale += tl.sum(gz * u, 0) + bias * per_class
        gbias += scale * per_class
        gu += scale * gz
        tl.debug_barrier()  # before the next step adds to the parameter gradients in memory
    r2 = tl.load(trace + r2_at + n, mask=n < N, other=1.0)
    u = tl.load(trace + u_at + tile, mask=inside, other=0.0)
    gn0 = tl.where(r2 <= 1e-24, 0.0, gr2 - tl.sum(gu * u, 0) / (2 * r2))
    tl.store(partial, tl.sum(tl.where(n < N, gscale, 0.0)))
    tl.store(partial + 1, tl.sum(tl.where(n < N, gbias, 0.0)))
    tl.store(gn0_out + t * N + n, gn0, mask=n < N)
    tl.store(gc_out + t * N * Q + dense, gu / tl.sqrt(r2)[None, :] * inverse[:, None], mask=inside)
