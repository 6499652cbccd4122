"""Products with the D-dimensional features, tiled: the only kernels that see D."""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: E741, SIM108 -- sizes are capitals; a branch on a constexpr is taken at compile time

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernelmeta.triton.launch import cover, launch, precision

_STAGES = (2, 4)  # of their pipelines, besides Triton's own choice


@triton.jit
def rows_dots_kernel(
    x, x_index, y, y_index, out, I, J, D, xt, xi, xd, yt, yj, yd, ot, oi, oj,
    BI: tl.constexpr, BJ: tl.constexpr, BD: tl.constexpr,
    X_INDEXED: tl.constexpr, Y_INDEXED: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[t, i, j] = sum_d x[t, i, d] y[t, j, d], one tile of one task a program."""
    tiles_j = tl.cdiv(J, BJ)
    tiles = tl.cdiv(I, BI) * tiles_j
    program = tl.program_id(0)
    t = (program // tiles).to(tl.int64)
    tile = program % tiles
    i = tile // tiles_j * BI + tl.arange(0, BI)
    j = tile % tiles_j * BJ + tl.arange(0, BJ)
    if X_INDEXED:
        row_i = tl.load(x_index + t * I + i, mask=i < I, other=0) * xi
    else:
        row_i = t * xt + i.to(tl.int64) * xi
    if Y_INDEXED:
        row_j = tl.load(y_index + t * J + j, mask=j < J, other=0) * yj
    else:
        row_j = t * yt + j.to(tl.int64) * yj
    sums = tl.zeros([BI, BJ], C)
    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)
        step = d.to(tl.int64)
        a = tl.load(x + row_i[:, None] + step[None, :] * xd, mask=(i < I)[:, None] & (d < D)[None, :], other=0.0)
        b = tl.load(y + row_j[None, :] + step[:, None] * yd, mask=(j < J)[None, :] & (d < D)[:, None], other=0.0)
        sums += tl.dot(a.to(C), b.to(C), input_precision=PRECISION, out_dtype=C)
    at = out + t * ot + i.to(tl.int64)[:, None] * oi + j.to(tl.int64)[None, :] * oj
    tl.store(at, sums, mask=(i < I)[:, None] & (j < J)[None, :])


@triton.jit
def rows_combine_kernel(
    coefficients, rows, index, out, I, J, D, ct, ci, cj,
    BI: tl.constexpr, BJ: tl.constexpr, BD: tl.constexpr,
    INDEXED: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[t, i, d] = sum_j coefficients[t, i, j] rows[t, j, d], one tile of one task a program."""
    tiles_d = tl.cdiv(D, BD)
    tiles = tl.cdiv(I, BI) * tiles_d
    program = tl.program_id(0)
    t = (program // tiles).to(tl.int64)
    tile = program % tiles
    i = tile // tiles_d * BI + tl.arange(0, BI)
    d = tile % tiles_d * BD + tl.arange(0, BD)
    sums = tl.zeros([BI, BD], C)
    for start in range(0, J, BJ):
        j = start + tl.arange(0, BJ)
        if INDEXED:
            row = tl.load(index + t * J + j, mask=j < J, other=0)
        else:
            row = t * J + j
        at = coefficients + t * ct + i.to(tl.int64)[:, None] * ci + j.to(tl.int64)[None, :] * cj
        a = tl.load(at, mask=(i < I)[:, None] & (j < J)[None, :], other=0.0)
        b = tl.load(rows + row[:, None] * D + d[None, :], mask=(j < J)[:, None] & (d < D)[None, :], other=0.0)
        sums += tl.dot(a.to(C), b.to(C), input_precision=PRECISION, out_dtype=C)
    tl.store(out + (t * I + i)[:, None] * D + d[None, :], sums, mask=(i < I)[:, None] & (d < D)[None, :])


@triton.jit
def inverse_norms_kernel(
    rows, index, out, J, D, ot, oj, BD: tl.constexpr, INDEXED: tl.constexpr, SHRINK: tl.constexpr,
    SMALLEST: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """out[t, j] = 1 / max(|rows[t, j]|, 1e-12), one row a program (`inverse_norm` in csrc/engine/feature_rows.h)."""
    program = tl.program_id(0).to(tl.int64)
    row = program
    if INDEXED:
        row = tl.load(index + program)
    sums, shrunk = tl.zeros([BD], C), tl.zeros([BD], C)
    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)
        value = tl.load(rows + row * D + d, mask=d < D, other=0.0).to(C)
        sums += value * value
        shrunk += (value * SHRINK) * (value * SHRINK)
    squares, shrunk_squares = tl.sum(sums), tl.sum(shrunk)
    inverse = 1 / tl.maximum(tl.sqrt(squares), 1e-12)
    of_long = SHRINK / tl.sqrt(shrunk_squares)
    of_long = tl.where(of_long >= SMALLEST, of_long, float("nan"))
    tl.store(out + program // J * ot + program % J * oj, tl.where(squares < float("inf"), inverse, of_long))


@triton.jit
def squared_norms_kernel(
    rows, index, out, J, D, ot, oj, BD: tl.constexpr, INDEXED: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    """out[t, j] = |rows[t, j]|^2, one row a program."""
    program = tl.program_id(0).to(tl.int64)
    row = program
    if INDEXED:
        row = tl.load(index + program)
    sums = tl.zeros([BD], C)
    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)
        value = tl.load(rows + row * D + d, mask=d < D, other=0.0).to(C)
        sums += value * value
    tl.store(out + program // J * ot + program % J * oj, tl.sum(sums))


def dots(x: Tensor, y: Tensor, out: Tensor, x_index: Tensor | None = None, y_index: Tensor | None = None) -> None:
    """out[t, i, j] = x[t, i] . y[t, j]; x, y [T, rows, D] of any strides, or banks [n, D] with an index [T, rows]."""
    T, I, J = out.shape
    D = x.shape[-1]
    if out.numel() == 0:
        return
    BI, BJ, BD = cover(I, 64), cover(J, 64), cover(D, 32)
    grid = T * triton.cdiv(I, BI) * triton.cdiv(J, BJ)
    launch(
        rows_dots_kernel, grid, x, x_index, y, y_index, out, I, J, D, *_strides(x), *_strides(y), *out.stride(),
        BI=BI, BJ=BJ, BD=BD, X_INDEXED=x_index is not None, Y_INDEXED=y_index is not None,
        num_warps=8, sizes=(D,), stages=_STAGES, **precision(out),
    )  # fmt: skip


def combine(coefficients: Tensor, rows: Tensor, index: Tensor | None = None) -> Tensor:
    """[T, I, J] coefficients of any strides times contiguous rows [T, J, D], or rows of a bank -> [T, I, D]."""
    T, I, J = coefficients.shape
    D = rows.shape[-1]
    out = coefficients.new_empty(T, I, D)
    if out.numel():
        BI, BJ, BD = cover(I, 64), cover(J, 32), cover(D, 64)
        grid = T * triton.cdiv(I, BI) * triton.cdiv(D, BD)
        launch(
            rows_combine_kernel, grid, coefficients, rows, index, out, I, J, D, *coefficients.stride(),
            BI=BI, BJ=BJ, BD=BD, INDEXED=index is not None, num_warps=8, sizes=(D,),
            stages=_STAGES, **precision(out),
        )  # fmt: skip
    return out


def squared_norms(rows: Tensor, index: Tensor | None, out: Tensor) -> None:
    """out [T, J] = squared norms of contiguous rows [T, J, D], or of rows of a bank."""
    if out.numel():
        launch(
            squared_norms_kernel, out.numel(), rows, index, out, out.shape[1], rows.shape[-1], *out.stride(),
            BD=cover(rows.shape[-1], 1024), INDEXED=index is not None, C=precision(out)["C"],
        )  # fmt: skip


def inverse_norms(rows: Tensor, index: Tensor | None, dtype: torch.dtype) -> Tensor:
    """1 / max(|row|, 1e-12), [T, J]; NaN where |row| is beyond the largest number, or nearly."""
    out = rows.new_empty(rows.shape[:2] if index is None else index.shape, dtype=dtype)
    if out.numel():
        launch(
            inverse_norms_kernel, out.numel(), rows, index, out, out.shape[1], rows.shape[-1], *out.stride(),
            BD=cover(rows.shape[-1], 1024), INDEXED=index is not None,
            SHRINK=2.0**-96 if dtype is torch.float32 else 2.0**-600, SMALLEST=torch.finfo(dtype).tiny,
            C=precision(out)["C"],
        )  # fmt: skip
    return out


def out_of_range(squares: Tensor) -> Tensor:
    """Whether products of rows with these squared norms may be beyond what numbers hold."""
    return (squares != 0) & ~((squares > 1e-24) & squares.isfinite())


def without_radial_part(grad: Tensor, rows: Tensor, inverse: Tensor) -> Tensor:
    """Gradient of normalised rows, times 1 / |row| already -> gradient of the rows (constant below the floor)."""
    rows = rows.to(grad.dtype) * inverse.unsqueeze(-1)  # the square of 1 / |row| may be no number
    along = (grad * rows).sum(-1)
    floor = torch.full((), 1e-12, dtype=inverse.dtype, device=inverse.device).reciprocal()
    along = torch.where(inverse < floor, along, torch.zeros_like(along))
    return grad.sub_(rows * along.unsqueeze(-1))


def _strides(rows: Tensor) -> tuple[Any, ...]:
    return rows.stride() if rows.dim() == 3 else (0, *rows.stride())
