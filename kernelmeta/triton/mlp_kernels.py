"""The synthetic-gradient MLP on the rows of one task, and its adjoint; one task a program.

The ten parameters lie packed in one array, in the order of ``MLPParameters``. Activations are tiles
[QP, HP], rows and units padded to powers of two: padded rows are kept at zero.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernelmeta.triton.launch import cover, interpreted, launch, precision

_LARGEST_TILE = 128 * 64  # elements of an activation, and of weight2: what the registers of one program hold


@triton.jit
def _load_matrix(at, rows, columns, R, S, C: tl.constexpr):
    """The [R, S] row-major matrix at ``at`` as [rows, columns], zeros around it (either may run along dim 0)."""
    inside = (rows < R) & (columns < S)
    return tl.load(at + rows * S + columns, mask=inside, other=0.0).to(C)


@triton.jit
def _normalise(a, valid, Q, fixed, h, H, FIXED: tl.constexpr, C: tl.constexpr):
    """ReLU (NaN stays NaN), then (x - mean) / std per unit, of these rows or as given: [2, H] at ``fixed``."""
    kept = tl.where(valid & ~(a <= 0), a, 0.0)
    if FIXED:
        mean = tl.load(fixed + h, mask=h < H, other=0.0).to(C)
        variance = tl.load(fixed + H + h, mask=h < H, other=1.0).to(C)
    else:
        mean = tl.sum(kept, 0) / Q
        centred = tl.where(valid, kept - mean[None, :], 0.0)
        variance = tl.sum(centred * centred, 0) / Q
    istd = 1.0 / tl.sqrt(variance + 1e-5)
    n = tl.where(valid, (kept - mean[None, :]) * istd[None, :], 0.0)
    return n, istd, mean, variance


@triton.jit
def mlp_forward(z, p, fixed, q, n, h, Q, N, H, FIXED: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr):
    """z [QP, NP] -> g [QP, NP], then what `mlp_backward` and the statistics need."""
    valid = (q < Q)[:, None]
    inside = h < H
    second = p + H * N + 3 * H
    third = second + H * H + 3 * H
    k = h
    w1 = _load_matrix(p, h[None, :], n[:, None], H, N, C)
    b1 = tl.load(p + H * N + h, mask=inside, other=0.0)
    a1 = tl.dot(z, w1, input_precision=PRECISION, out_dtype=C) + b1[None, :]
    n1, istd1, mean1, variance1 = _normalise(a1, valid, Q, fixed, h, H, FIXED, C)
    gain1 = tl.load(p + H * N + H + h, mask=inside, other=0.0)
    shift1 = tl.load(p + H * N + 2 * H + h, mask=inside, other=0.0)
    x1 = tl.where(valid, n1 * gain1[None, :] + shift1[None, :], 0.0)
    w2 = _load_matrix(second, h[None, :], k[:, None], H, H, C)
    b2 = tl.load(second + H * H + h, mask=inside, other=0.0)
    a2 = tl.dot(x1, w2, input_precision=PRECISION, out_dtype=C) + b2[None, :]
    n2, istd2, mean2, variance2 = _normalise(a2, valid, Q, fixed + 2 * H, h, H, FIXED, C)
    gain2 = tl.load(second + H * H + H + h, mask=inside, other=0.0)
    shift2 = tl.load(second + H * H + 2 * H + h, mask=inside, other=0.0)
    x2 = tl.where(valid, n2 * gain2[None, :] + shift2[None, :], 0.0)
    w3 = _load_matrix(third, n[None, :], h[:, None], N, H, C)
    b3 = tl.load(third + N * H + n, mask=n < N, other=0.0)
    g = tl.dot(x2, w3, input_precision=PRECISION, out_dtype=C) + b3[None, :]
    g = tl.where(valid, g, 0.0)
    return g, a1, n1, istd1, a2, n2, istd2, mean1, variance1, mean2, variance2


@triton.jit
def _through_norm(g, a, n, istd, valid, Q, FIXED: tl.constexpr):
    if not FIXED:
        g = g - (tl.sum(g, 0) / Q)[None, :] - n * (tl.sum(g * n, 0) / Q)[None, :]
    return tl.where(valid & (a > 0), g * istd[None, :], 0.0)


@triton.jit
def mlp_backward(
    z, gg, p, gp, a1, n1, istd1, a2, n2, istd2, q, n, h, Q, N, H,
    FIXED: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """gg [QP, NP] -> gz [QP, NP]; adds to this task's own gradients of the parameters, packed alike, at ``gp``."""
    valid = (q < Q)[:, None]
    inside = h < H
    second, gsecond = p + H * N + 3 * H, gp + H * N + 3 * H
    third, gthird = second + H * H + 3 * H, gsecond + H * H + 3 * H
    k = h

    gain2 = tl.load(second + H * H + H + h, mask=inside, other=0.0)
    shift2 = tl.load(second + H * H + 2 * H + h, mask=inside, other=0.0)
    x2 = tl.where(valid, n2 * gain2[None, :] + shift2[None, :], 0.0)
    w3 = _load_matrix(third, n[:, None], h[None, :], N, H, C)
    _add_matrix(gthird, n, h, N, H, tl.dot(tl.trans(gg), x2, input_precision=PRECISION, out_dtype=C))
    _add_vector(gthird + N * H, n, N, tl.sum(gg, 0))
    g = tl.dot(gg, w3, input_precision=PRECISION, out_dtype=C)
    _add_vector(gsecond + H * H + H, h, H, tl.sum(g * n2, 0))
    _add_vector(gsecond + H * H + 2 * H, h, H, tl.sum(g, 0))
    g = _through_norm(g * gain2[None, :], a2, n2, istd2, valid, Q, FIXED)

    gain1 = tl.load(p + H * N + H + h, mask=inside, other=0.0)
    shift1 = tl.load(p + H * N + 2 * H + h, mask=inside, other=0.0)
    x1 = tl.where(valid, n1 * gain1[None, :] + shift1[None, :], 0.0)
    w2 = _load_matrix(second, h[:, None], k[None, :], H, H, C)
    _add_matrix(gsecond, h, k, H, H, tl.dot(tl.trans(g), x1, input_precision=PRECISION, out_dtype=C))
    _add_vector(gsecond + H * H, h, H, tl.sum(g, 0))
    g = tl.dot(g, w2, input_precision=PRECISION, out_dtype=C)
    _add_vector(gp + H * N + H, h, H, tl.sum(g * n1, 0))
    _add_vector(gp + H * N + 2 * H, h, H, tl.sum(g, 0))
    g = _through_norm(g * gain1[None, :], a1, n1, istd1, valid, Q, FIXED)

    w1 = _load_matrix(p, h[:, None], n[None, :], H, N, C)
    _add_matrix(gp, h, n, H, N, tl.dot(tl.trans(g), z, input_precision=PRECISION, out_dtype=C))
    _add_vector(gp + H * N, h, H, tl.sum(g, 0))
    return tl.dot(g, w1, input_precision=PRECISION, out_dtype=C)


@triton.jit
def _add_matrix(at, rows, columns, R, S, value):
    inside = (rows < R)[:, None] & (columns < S)[None, :]
    at = at + rows[:, None] * S + columns[None, :]
    tl.store(at, tl.load(at, mask=inside, other=0.0) + value, mask=inside)


@triton.jit
def _add_vector(at, i, R, value):
    tl.store(at + i, tl.load(at + i, mask=i < R, other=0.0) + value, mask=i < R)


@triton.jit
def mlp_forward_kernel(
    logits, p, fixed, out, Q, N, H,
    QP: tl.constexpr, NP: tl.constexpr, HP: tl.constexpr, FIXED: tl.constexpr,
    C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * Q * N
    q, n, h = tl.arange(0, QP), tl.arange(0, NP), tl.arange(0, HP)
    at, inside = start + q[:, None] * N + n[None, :], (q < Q)[:, None] & (n < N)[None, :]
    z = tl.load(logits + at, mask=inside, other=0.0)
    result = mlp_forward(z, p, fixed, q, n, h, Q, N, H, FIXED, C, PRECISION)
    tl.store(out + at, result[0], mask=inside)


@triton.jit
def mlp_backward_kernel(
    logits, grad, p, fixed, gz_out, gp, Q, N, H, P,
    QP: tl.constexpr, NP: tl.constexpr, HP: tl.constexpr, FIXED: tl.constexpr,
    C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    q, n, h = tl.arange(0, QP), tl.arange(0, NP), tl.arange(0, HP)
    at, inside = t * Q * N + q[:, None] * N + n[None, :], (q < Q)[:, None] & (n < N)[None, :]
    z = tl.load(logits + at, mask=inside, other=0.0)
    gg = tl.load(grad + at, mask=inside, other=0.0)
    _, a1, n1, istd1, a2, n2, istd2, _, _, _, _ = mlp_forward(z, p, fixed, q, n, h, Q, N, H, FIXED, C, PRECISION)
    gz = mlp_backward(
        z, gg, p, gp + t * P, a1, n1, istd1, a2, n2, istd2, q, n, h, Q, N, H, FIXED, C, PRECISION
    )  # fmt: skip
    tl.store(gz_out + at, gz, mask=inside)


def tiles(Q: int, N: int, H: int) -> dict[str, int]:
    """Tile sizes and warps of the kernels that own a whole task."""
    QP, NP, HP = cover(Q, 1 << 30), cover(N, 1 << 30), cover(H, 1 << 30)
    return {"QP": QP, "NP": NP, "HP": HP, "num_warps": 4 if QP * HP <= 32 * 64 else 8}


def fits(Q: int, N: int, H: int, dtype: torch.dtype) -> bool:
    """Whether one program can own a task: else the op runs in plain PyTorch. float64 only in the interpreter."""
    t = tiles(Q, N, H)
    largest = max(t["QP"] * t["HP"], t["HP"] * t["HP"], t["QP"] * t["NP"], t["HP"] * t["NP"])
    known = dtype is torch.float32 or (dtype is torch.float64 and interpreted())
    return known and largest <= _LARGEST_TILE and t["QP"] <= 128


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
        launch(
            mlp_forward_kernel, T, logits, packed, fixed, out, Q, N, H, FIXED=running_stats is not None,
            **tiles(Q, N, H), **precision(out),
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
        launch(
            mlp_backward_kernel, T, logits, grad, packed, fixed, gz, partial, Q, N, H, packed.numel(),
            FIXED=running_stats is not None, **tiles(Q, N, H), **precision(gz),
        )  # fmt: skip
    return gz, *unpack(partial, mlp)
