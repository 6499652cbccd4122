"""What the kernels that own a whole task share: tiles of small matrices that lie in memory.

Registers hold one or two tiles of a task at a time; everything else waits in a workspace in global memory, which the
caches hold. Whoever reads there what other threads have written puts a barrier between.
"""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: E741 -- sizes are capitals

from __future__ import annotations

import triton
import triton.language as tl

_TURN = tl.constexpr(16)  # of the summed dimension: what tl.dot takes at least


@triton.jit
def product(x, xi, xk, y, yk, yj, i, j, I, J, K, C: tl.constexpr, PRECISION: tl.constexpr):
    """The tile sum_k x[i, k] y[k, j] of the matrices at ``x`` and ``y`` with these strides, zeros around them."""
    sums = tl.zeros([i.shape[0], j.shape[0]], C)
    for start in range(0, K, _TURN):
        k = start + tl.arange(0, _TURN)
        a = tl.load(x + i[:, None] * xi + k[None, :] * xk, mask=(i < I)[:, None] & (k < K)[None, :], other=0.0)
        b = tl.load(y + k[:, None] * yk + j[None, :] * yj, mask=(k < K)[:, None] & (j < J)[None, :], other=0.0)
        sums += tl.dot(a.to(C), b.to(C), input_precision=PRECISION, out_dtype=C)
    return sums


@triton.jit
def load_vector(at, i, I, C: tl.constexpr):
    return tl.load(at + i, mask=i < I, other=0.0).to(C)


@triton.jit
def load_matrix(at, ld, i, j, I, J, C: tl.constexpr):
    return tl.load(at + i[:, None] * ld + j[None, :], mask=(i < I)[:, None] & (j < J)[None, :], other=0.0).to(C)


@triton.jit
def store_matrix(at, ld, i, j, I, J, value):
    tl.store(at + i[:, None] * ld + j[None, :], value, mask=(i < I)[:, None] & (j < J)[None, :])


@triton.jit
def add_matrix(at, ld, i, j, I, J, value):
    inside = (i < I)[:, None] & (j < J)[None, :]
    at = at + i[:, None] * ld + j[None, :]
    tl.store(at, tl.load(at, mask=inside, other=0.0) + value, mask=inside)


@triton.jit
def add_vector(at, i, I, value):
    tl.store(at + i, tl.load(at + i, mask=i < I, other=0.0) + value, mask=i < I)
