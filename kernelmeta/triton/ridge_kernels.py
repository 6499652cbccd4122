"""Factorisation and solution of one task's symmetric system, one program a task: L d L^T with ones on L's diagonal.

L lies below the diagonal of a matrix [S, ld] in memory. ``counts`` [T, 3] starts with each task's own rows.
"""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: SIM108 -- a branch on a constexpr is taken at compile time

from __future__ import annotations

import triton
import triton.language as tl

from kernelmeta.triton.tiles import load_matrix, store_matrix


@triton.jit
def factorise_kernel(
    matrix, pivots, counts, S, ld, matrix_stride, pivots_stride, eps,
    SP: tl.constexpr, RAGGED: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """A [S, ld] -> L below the diagonal, and d. Pivots that are nothing but rounding mean a singular matrix: they come
    out as NaN, and with them everything that the task's solution touches.
    """
    t = tl.program_id(0).to(tl.int64)
    matrix += t * matrix_stride
    if RAGGED:
        own = tl.load(counts + 3 * t).to(tl.int32)
    else:
        own = S
    i, j = tl.arange(0, SP), tl.arange(0, SP)
    a = load_matrix(matrix, ld, i, j, own, own, C)
    on_diagonal = i[:, None] == j[None, :]
    largest = tl.max(tl.sum(tl.where(on_diagonal, a, 0.0), 0))
    smallest = largest * own * eps
    for k in range(0, own):
        column = tl.sum(tl.where(j[None, :] == k, a, 0.0), 1)
        pivot = tl.sum(tl.where(i == k, column, 0.0))
        pivot = tl.where(pivot <= smallest, float("nan"), pivot)
        tl.store(pivots + t * pivots_stride + k, pivot)
        below = tl.where(i > k, column, 0.0)  # the rest of the matrix is symmetric: also the row
        low = below / pivot
        a -= low[:, None] * below[None, :]
        a = tl.where((j[None, :] == k) & (i > k)[:, None], low[:, None], a)
    tl.debug_barrier()  # nobody still reads what is replaced
    store_matrix(matrix, ld, i, j, own, own, a)


@triton.jit
def solve_kernel(
    matrix, pivots, counts, x_at, S, N, ld, matrix_stride, pivots_stride, x_stride, x_ld,
    SP: tl.constexpr, NP: tl.constexpr, RAGGED: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """x [N, x_ld] <- the solution for these right-hand sides; zeros in rows that are not the task's own."""
    t = tl.program_id(0).to(tl.int64)
    matrix += t * matrix_stride
    x_at += t * x_stride
    if RAGGED:
        own = tl.load(counts + 3 * t).to(tl.int32)
    else:
        own = S
    i, n = tl.arange(0, SP), tl.arange(0, NP)
    tile = n[None, :] * x_ld + i[:, None]
    x = tl.load(x_at + tile, mask=(i < own)[:, None] & (n < N)[None, :], other=0.0)
    for k in range(0, own):
        low = tl.load(matrix + i * ld + k, mask=(i > k) & (i < own), other=0.0)
        known = tl.sum(tl.where(i[:, None] == k, x, 0.0), 0)
        x -= low[:, None] * known[None, :]
    x = x / tl.load(pivots + t * pivots_stride + i, mask=i < own, other=1.0)[:, None]
    for back in range(0, own):
        k = own - 1 - back
        low = tl.load(matrix + i * ld + k, mask=(i > k) & (i < own), other=0.0)
        rest = tl.sum(low[:, None] * x, 0)
        x -= tl.where(i[:, None] == k, rest[None, :], 0.0)
    tl.debug_barrier()
    tl.store(x_at + tile, x, mask=(i < S)[:, None] & (n < N)[None, :])
