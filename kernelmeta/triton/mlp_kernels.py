"""The synthetic-gradient MLP on the rows of one task, and its adjoint; one task a program.

The ten parameters lie packed in one array, in the order of ``MLPParameters``. An activation is one tile [QP, HP], rows
and units padded to powers of two. Of each task's workspace the first five such tiles are both layers' results and
what their ReLU kept, and a gradient; behind them lie three tiles [QP, NP].
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernelmeta.triton.launch import cover, interpreted, launch, precision
from kernelmeta.triton.tiles import add_matrix, add_vector, load_matrix, load_vector, product, store_matrix

_LARGEST_TILE = 128 * 64  # elements of an activation, and of weight2: what the registers of one program hold


@triton.jit
def _statistics(kept, valid, Q, fixed, h, H, FIXED: tl.constexpr, C: tl.constexpr):
    """Mean and variance of every unit: of these rows, or as given, [2, H] at ``fixed``."""
    if FIXED:
        mean = load_vector(fixed, h, H, C)
        variance = load_vector(fixed + H, h, H, C)
    else:
        mean = tl.sum(kept, 0) / Q
        centred = tl.where(valid, kept - mean[None, :], 0.0)
        variance = tl.sum(centred * centred, 0) / Q
    return mean, variance


@triton.jit
def _layer(a, at, kept_at, gain_at, fixed, q, h, Q, H, HP: tl.constexpr, FIXED: tl.constexpr, C: tl.constexpr):
    """ReLU (NaN stays NaN), BatchNorm. The result goes to ``at``, what ReLU kept to ``kept_at``, both [Q, HP]."""
    valid = (q < Q)[:, None]
    kept = tl.where(valid & ~(a <= 0), a, 0.0)
    mean, variance = _statistics(kept, valid, Q, fixed, h, H, FIXED, C)
    n = (kept - mean[None, :]) / tl.sqrt(variance + 1e-5)[None, :]
    gain, shift = load_vector(gain_at, h, H, C), load_vector(gain_at + H, h, H, C)
    tl.debug_barrier()  # nobody still reads what was there
    store_matrix(at, HP, q, h, Q, H, n * gain[None, :] + shift[None, :])
    store_matrix(kept_at, HP, q, h, Q, H, kept)
    tl.debug_barrier()
    return mean, variance


@triton.jit
def mlp_forward(
    z, p, fixed, work, q, n, o, h, Q, N, outputs, H,
    QP: tl.constexpr, HP: tl.constexpr, FIXED: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """z [QP, NP], N inputs -> g [QP, OP] and each layer's mean and variance; leaves in ``work`` what `mlp_backward`
    needs.
    """
    second = p + H * N + 3 * H
    third = second + H * H + 3 * H
    x1, kept1, x2, kept2 = work, work + QP * HP, work + 2 * QP * HP, work + 3 * QP * HP
    w1 = tl.load(p + h[None, :] * N + n[:, None], mask=(h < H)[None, :] & (n < N)[:, None], other=0.0).to(C)
    a = tl.dot(z, w1, input_precision=PRECISION, out_dtype=C) + load_vector(p + H * N, h, H, C)[None, :]
    mean1, variance1 = _layer(a, x1, kept1, p + H * N + H, fixed, q, h, Q, H, HP, FIXED, C)
    a = product(x1, HP, 1, second, 1, H, q, h, Q, H, H, C, PRECISION) + load_vector(second + H * H, h, H, C)[None, :]
    mean2, variance2 = _layer(a, x2, kept2, second + H * H + H, fixed + 2 * H, q, h, Q, H, HP, FIXED, C)
    bias3 = load_vector(third + outputs * H, o, outputs, C)
    g = product(x2, HP, 1, third, 1, H, q, o, Q, outputs, H, C, PRECISION) + bias3[None, :]
    return tl.where((q < Q)[:, None], g, 0.0), mean1, variance1, mean2, variance2


@triton.jit
def _layer_backward(
    g, at, kept_at, gain_at, ggain_at, mean, variance, q, h, Q, H,
    HP: tl.constexpr, FIXED: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Gradient of a layer's result -> that of the linear layer before it, also at ``at`` [Q, HP]."""
    istd = 1.0 / tl.sqrt(variance + 1e-5)
    kept = load_matrix(kept_at, HP, q, h, Q, H, C)
    n = tl.where((q < Q)[:, None], (kept - mean[None, :]) * istd[None, :], 0.0)
    add_vector(ggain_at, h, H, tl.sum(g * n, 0))
    add_vector(ggain_at + H, h, H, tl.sum(g, 0))
    g = g * load_vector(gain_at, h, H, C)[None, :]
    if not FIXED:
        g = g - n * (tl.sum(g * n, 0) / Q)[None, :]
        g = g - (tl.sum(g, 0) / Q)[None, :]  # now: the mean of n is rounding, which istd magnifies
    g = tl.where((kept > 0) & (q < Q)[:, None], g * istd[None, :], 0.0)
    tl.debug_barrier()
    store_matrix(at, HP, q, h, Q, H, g)
    tl.debug_barrier()
    return g


@triton.jit
def mlp_backward(
    z, gg, p, gp, work, mean1, variance1, mean2, variance2, q, n, o, h, Q, N, outputs, H,
    QP: tl.constexpr, NP: tl.constexpr, OP: tl.constexpr, HP: tl.constexpr, FIXED: tl.constexpr, C: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """gg [QP, OP] -> gz [QP, NP]; adds to this task's own gradients of the parameters, packed alike, at ``gp``."""
    second, gsecond = p + H * N + 3 * H, gp + H * N + 3 * H
    third, gthird = second + H * H + 3 * H, gsecond + H * H + 3 * H
    x1, kept1, x2, kept2 = work, work + QP * HP, work + 2 * QP * HP, work + 3 * QP * HP
    gh = work + 4 * QP * HP
    rows, grads = work + 5 * QP * HP, work + 5 * QP * HP + QP * NP
    store_matrix(rows, NP, q, n, Q, N, z)
    store_matrix(grads, OP, q, o, Q, outputs, gg)
    tl.debug_barrier()
    k = h

    add_matrix(gthird, H, o, h, outputs, H, product(grads, 1, OP, x2, HP, 1, o, h, outputs, H, Q, C, PRECISION))
    add_vector(gthird + outputs * H, o, outputs, tl.sum(gg, 0))
    w3 = load_matrix(third, H, o, h, outputs, H, C)
    g = tl.dot(gg, w3, input_precision=PRECISION, out_dtype=C)
    g = _layer_backward(
        g, gh, kept2, second + H * H + H, gsecond + H * H + H, mean2, variance2, q, h, Q, H, HP, FIXED, C
    )
    add_vector(gsecond + H * H, h, H, tl.sum(g, 0))
    add_matrix(gsecond, H, h, k, H, H, product(gh, 1, HP, x1, HP, 1, h, k, H, H, Q, C, PRECISION))
    g = product(gh, HP, 1, second, H, 1, q, h, Q, H, H, C, PRECISION)
    g = _layer_backward(g, gh, kept1, p + H * N + H, gp + H * N + H, mean1, variance1, q, h, Q, H, HP, FIXED, C)
    add_vector(gp + H * N, h, H, tl.sum(g, 0))
    add_matrix(gp, N, h, n, H, N, product(gh, 1, HP, rows, NP, 1, h, n, H, N, Q, C, PRECISION))
    return product(gh, HP, 1, p, N, 1, q, n, Q, N, H, C, PRECISION)


@triton.jit
def mlp_forward_kernel(
    logits, p, fixed, work, out, Q, N, H, size,
    QP: tl.constexpr, NP: tl.constexpr, HP: tl.constexpr, FIXED: tl.constexpr,
    C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    q, n, h = tl.arange(0, QP), tl.arange(0, NP), tl.arange(0, HP)
    z = load_matrix(logits + t * Q * N, N, q, n, Q, N, C)
    g, _, _, _, _ = mlp_forward(z, p, fixed, work + t * size, q, n, n, h, Q, N, N, H, QP, HP, FIXED, C, PRECISION)
    store_matrix(out + t * Q * N, N, q, n, Q, N, g)


@triton.jit
def mlp_backward_kernel(
    logits, grad, p, fixed, work, gz_out, gp, Q, N, H, P, size,
    QP: tl.constexpr, NP: tl.constexpr, HP: tl.constexpr, FIXED: tl.constexpr,
    C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    work += t * size
    q, n, h = tl.arange(0, QP), tl.arange(0, NP), tl.arange(0, HP)
    z = load_matrix(logits + t * Q * N, N, q, n, Q, N, C)
    gg = load_matrix(grad + t * Q * N, N, q, n, Q, N, C)
    _, mean1, variance1, mean2, variance2 = mlp_forward(
        z, p, fixed, work, q, n, n, h, Q, N, N, H, QP, HP, FIXED, C, PRECISION
    )
    gz = mlp_backward(
        z, gg, p, gp + t * P, work, mean1, variance1, mean2, variance2, q, n, n, h, Q, N, N, H, QP, NP, NP, HP,
        FIXED, C, PRECISION,
    )  # fmt: skip
    store_matrix(gz_out + t * Q * N, N, q, n, Q, N, gz)


def tiles(Q: int, N: int, H: int) -> dict[str, Any]:
    """Tile sizes and warps of the kernels that own a whole task."""
    QP, NP, HP = cover(Q, 1 << 30), cover(N, 1 << 30), cover(H, 1 << 30)
    return {"QP": QP, "NP": NP, "HP": HP, "num_warps": 4 if QP * HP <= 32 * 64 else 8}


def fits(Q: int, N: int, H: int, dtype: torch.dtype) -> bool:
    """Whether one program can own a task: else the op runs in plain PyTorch. float64 only in the interpreter."""
    t = tiles(Q, N, H)
    largest = max(t["QP"] * t["HP"], t["HP"] * t["HP"], t["QP"] * t["NP"], t["HP"] * t["NP"])
    known = dtype is torch.float32 or (dtype is torch.float64 and interpreted())
    return known and largest <= _LARGEST_TILE and t["QP"] <= 128


def workspace(like: Tensor, T: int, tiles: dict[str, int]) -> Tensor:
    """[T, size]: what the programs keep in memory while they run."""
    QP, NP, HP = tiles["QP"], tiles["NP"], tiles["HP"]
    return like.new_empty(T, 5 * QP * HP + 3 * QP * NP)


def pack(parameters: Any) -> Tensor:
    return torch.cat([p.reshape(-1) for p in parameters])


def unpack(partial: Tensor, parameters: Any) -> list[Tensor]:
    """Partial gradients [T, P] -> one gradient a parameter, summed over the tasks in a fixed order."""
    parts: Any = torch.split_with_sizes_copy(  # type: ignore[func-returns-value]
        partial.sum(0), [p.numel() for p in parameters]
    )
    return [g.view(p.shape) for g, p in zip(parts, parameters, strict=True)]


def forward(logits: Tensor, mlp: Any, running_stats: Tensor | None) -> Tensor:
    """[T, Q, N] -> guessed gradients [T, Q, N]."""
    T, Q, N = logits.shape
    H = mlp[0].shape[0]
    logits = logits.contiguous()
    out = torch.empty_like(logits)
    if T:
        packed = pack(mlp)
        fixed = packed if running_stats is None else running_stats.contiguous()
        size = tiles(Q, N, H)
        work = workspace(out, T, size)
        launch(
            mlp_forward_kernel, T, logits, packed, fixed, work, out, Q, N, H, work.stride(0),
            FIXED=running_stats is not None, **size, **precision(out),
        )  # fmt: skip
    return out


def backward(grad: Tensor, logits: Tensor, mlp: Any, running_stats: Tensor | None) -> tuple[Tensor, ...]:
    """Gradients of the logits and of the ten parameters."""
    T, Q, N = logits.shape
    H = mlp[0].shape[0]
    logits, grad = logits.contiguous(), grad.contiguous()
    gz, packed = torch.empty_like(logits), pack(mlp)
    partial = packed.new_zeros(T, packed.numel())
    if T:
        fixed = packed if running_stats is None else running_stats.contiguous()
        size = tiles(Q, N, H)
        work = workspace(gz, T, size)
        launch(
            mlp_backward_kernel, T, logits, grad, packed, fixed, work, gz, partial, Q, N, H, packed.numel(),
            work.stride(0), FIXED=running_stats is not None, in_place=True, **size, **precision(gz),
        )  # fmt: skip
    return gz, *unpack(partial, mlp)
