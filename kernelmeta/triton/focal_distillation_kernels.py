"""Focal distillation: a program owns some rows of logits, each whole. What stands beside the classes is minus infinity
in both logits, which is no class (csrc/engine/focal_distillation.h says the same with a warp a row).
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernelmeta.ops.focal_distillation_op import ROW_TRACE
from kernelmeta.reference.focal_distillation import DISTANCES, LARGEST_SHIFT
from kernelmeta.triton.launch import launch, precision

_WIDEST = 8192  # classes of a row that one program holds
_TILE = 2048  # elements of a tile, where rows are narrower
_KL, _LDI = tl.constexpr(DISTANCES.index("kl")), tl.constexpr(DISTANCES.index("ldi"))
_FARTHEST = tl.constexpr(LARGEST_SHIFT)
_ROW = tl.constexpr(ROW_TRACE)


@triton.jit
def _excess(u):
    """e^u - 1 - u"""
    total = tl.zeros_like(u) + 1
    for k in tl.static_range(16):
        total = total * u / (18 - k) + 1
    return tl.where(u * u <= 1, u * u * 0.5 * total, tl.exp(u) - 1 - u)


@triton.jit
def _log1p(x):
    """To the last digits, since 1 + x is divided out of what it was rounded to."""
    y = 1 + x
    return tl.where(y == 1, x, tl.where(x < 1e30, tl.log(y) * (x / (y - 1)), tl.log(y)))


@triton.jit
def _logits(at, r, n, stride, R, N, C: tl.constexpr):
    inside = (r < R)[:, None] & (n < N)[None, :]
    return tl.load(at + r[:, None].to(tl.int64) * stride + n[None, :], mask=inside, other=-float("inf")).to(C)


@triton.jit
def _right(z, own, n, y):
    """Nothing is larger, nothing equal stands before, nothing is NaN."""
    beaten = (z > own[:, None]) | ((z == own[:, None]) & (n[None, :] < y[:, None])) | (z != z) | (own != own)[:, None]
    return tl.max(beaten.to(tl.int32), 1) == 0


@triton.jit
def _apart(z, old):
    return tl.where(z == old, 0.0, z - old)


@triton.jit
def _power(x, power, POWER: tl.constexpr):
    """x^power of x >= 0."""
    if POWER == 1:
        return x
    if POWER == 2:
        return x * x
    return tl.where(x == 0, x, tl.exp(power * tl.log(tl.where(x == 0, 1.0, x))))


@triton.jit
def forward_kernel(
    now, old, labels, class_weight, distances, label_losses, codes, trace, R, N, now_stride, old_stride, ignored,
    alpha, beta, tau, margin, power, smoothing,
    DISTANCE: tl.constexpr, POWER: tl.constexpr, LABELLED: tl.constexpr, WEIGHTED: tl.constexpr, SAVES: tl.constexpr,
    BR: tl.constexpr, BN: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    r, n = tl.program_id(0) * BR + tl.arange(0, BR), tl.arange(0, BN)
    z, z_old = _logits(now, r, n, now_stride, R, N, C), _logits(old, r, n, old_stride, R, N, C)
    y = tl.load(labels + r, mask=r < R, other=0)
    counted = y != ignored
    bad = counted & ((y < 0) | (y >= N))
    of_label, inside = n[None, :] == y[:, None], (n < N)[None, :]
    own, own_old = tl.sum(tl.where(of_label, z, 0.0), 1), tl.sum(tl.where(of_label, z_old, 0.0), 1)
    most, most_old = tl.max(z, 1), tl.max(z_old, 1)
    old_right = _right(z_old, own_old, n, y)
    focus = tl.where(old_right, alpha + beta, alpha).to(C)
    code = 4 + old_right.to(tl.int32) + 2 * _right(z, own, n, y).to(tl.int32)
    tl.store(codes + r, tl.where(counted & ~bad, code, 0).to(tl.uint8), mask=r < R)
    at = trace + r.to(tl.int64) * _ROW
    if LABELLED:
        e = tl.exp(z - most[:, None])
        others = tl.sum(tl.where(of_label, 0.0, e), 1)
        total = others + tl.sum(tl.where(of_label, e, 0.0), 1)
        log_sum = tl.where(own == most, _log1p(others), tl.log(total))
        each = (most[:, None] - z) + log_sum[:, None]
        weight = own * 0 + 1
        if WEIGHTED:
            weight = tl.load(class_weight + y, mask=(r < R) & counted & ~bad, other=0.0)
            each *= tl.load(class_weight + n, mask=n < N, other=0.0)[None, :]
        loss = (1 - smoothing) * weight * ((most - own) + log_sum)
        if smoothing > 0:
            loss += smoothing * tl.sum(tl.where(inside, each, 0.0), 1) / N
        loss = tl.where(bad, float("nan"), tl.where(counted, loss, 0.0))
        tl.store(label_losses + r, loss.to(C), mask=r < R)
        if SAVES:
            tl.store(at + 1, most, mask=r < R)
            tl.store(at + 2, 1 / total, mask=r < R)
            tl.store(at + 3, others, mask=r < R)
    if DISTANCE == _KL:
        p = tl.exp((z_old - most_old[:, None]) / tau)
        total_old = tl.sum(p, 1)
        p = p / total_old[:, None]
        pivot = tl.max(tl.where(z_old == most_old[:, None], z - z_old, -float("inf")), 1)
        pivot = tl.where(pivot == -float("inf"), 0.0, pivot)
        v = ((z - z_old) - pivot[:, None]) / tau
        present = (p != 0) | (z != z)
        centre = tl.sum(tl.where(present, p * v, 0.0), 1)
        u = v - centre[:, None]
        far = ~(u <= _FARTHEST)
        of_far = ((z - most_old[:, None]) - pivot[:, None]) / tau - (centre + tl.log(total_old))[:, None]
        log_q = tl.where(far, of_far, 0.0)
        largest = tl.max(log_q, 1)
        largest = tl.where(largest > 0, largest, 0.0)
        terms = tl.where(present, p * tl.where(far, -(1 + u), _excess(u)), 0.0) * tl.exp(-largest)[:, None]
        terms += tl.where(far, tl.exp(log_q - largest[:, None]), 0.0)
        shifted = tl.sum(terms, 1)
        found = tl.where(largest > 0, tl.log(shifted + tl.exp(-largest)) + largest, _log1p(shifted))
        found = tl.where(centre == -float("inf"), float("inf"), found)
        distance = tau * tau * found
        if SAVES:
            tl.store(at + 4, most_old, mask=r < R)
            tl.store(at + 5, 1 / total_old, mask=r < R)
            tl.store(at + 6, pivot, mask=r < R)
            tl.store(at + 7, centre, mask=r < R)
            tl.store(at + 8, found, mask=r < R)
            tl.store(at + 9, 1 / tl.sum(tl.exp((z - most[:, None]) / tau), 1), mask=r < R)
            tl.store(at + 1, most, mask=r < R)
    else:
        d = _apart(z, z_old)
        if DISTANCE < _LDI:
            distance = tl.sum(d * d * 0.5, 1)
        else:
            over = tl.abs(d) - margin
            distance = tl.sum(tl.where(inside, _power(tl.where(over <= 0, 0.0, over), power, POWER), 0.0), 1)
        if DISTANCE % 2 == 0:
            distance = distance / N
    distance = tl.where(bad, float("nan"), tl.where(counted, focus * distance, 0.0))
    tl.store(distances + r, distance.to(C), mask=r < R)
    if SAVES:
        tl.store(at, focus, mask=r < R)


@triton.jit
def backward_kernel(
    now, old, labels, class_weight, trace, grad_distances, grad_label_losses, grad_now, R, N, now_stride, old_stride,
    ignored, tau, margin, power, smoothing,
    DISTANCE: tl.constexpr, POWER: tl.constexpr, LABELLED: tl.constexpr, WEIGHTED: tl.constexpr,
    BR: tl.constexpr, BN: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    r, n = tl.program_id(0) * BR + tl.arange(0, BR), tl.arange(0, BN)
    z, z_old = _logits(now, r, n, now_stride, R, N, C), _logits(old, r, n, old_stride, R, N, C)
    y = tl.load(labels + r, mask=r < R, other=0)
    counted = y != ignored
    bad = counted & ((y < 0) | (y >= N))
    of_label = n[None, :] == y[:, None]
    at = trace + r.to(tl.int64) * _ROW
    focus = tl.load(at, mask=r < R, other=0.0)
    along = tl.load(grad_distances + r, mask=r < R, other=0.0) * focus
    if DISTANCE == _KL:
        most_old, inverse = tl.load(at + 4, mask=r < R, other=0.0), tl.load(at + 5, mask=r < R, other=0.0)
        pivot, centre = tl.load(at + 6, mask=r < R, other=0.0), tl.load(at + 7, mask=r < R, other=0.0)
        divergence, new_inverse = tl.load(at + 8, mask=r < R, other=0.0), tl.load(at + 9, mask=r < R, other=0.0)
        most = tl.load(at + 1, mask=r < R, other=0.0)
        p = tl.exp((z_old - most_old[:, None]) / tau) * inverse[:, None]
        shifted = ((z - z_old) - pivot[:, None]) / tau - (centre + divergence)[:, None]
        apart = tl.exp((z - most[:, None]) / tau) * new_inverse[:, None] - p
        near = shifted * shifted + (centre * centre)[:, None] <= 1
        g = tl.where(near, p * (shifted + _excess(tl.where(near, shifted, 0.0))), apart) * (along * tau)[:, None]
    else:
        d = _apart(z, z_old)
        if DISTANCE < _LDI:
            g = d
        else:
            over = tl.abs(d) - margin
            if POWER == 1:
                slope = tl.where(over == over, 1.0, over)
            elif POWER == 2:
                slope = 2 * over
            else:
                slope = power * _power(tl.where(over <= 0, 0.0, over), power - 1, 0)
            g = tl.where(over <= 0, 0.0, tl.where(d < 0, -slope, slope))
        if DISTANCE % 2 == 0:
            g = g / N
        g = g * along[:, None]
    if LABELLED:
        most, inverse = tl.load(at + 1, mask=r < R, other=0.0), tl.load(at + 2, mask=r < R, other=0.0)
        others = tl.load(at + 3, mask=r < R, other=0.0)
        of_row = tl.load(grad_label_losses + r, mask=r < R, other=0.0)
        smooth = of_row * smoothing / N
        weight, all_weights, each = of_row * 0 + 1, of_row * 0 + N, tl.zeros([BN], C) + 1
        if WEIGHTED:
            weight = tl.load(class_weight + y, mask=(r < R) & counted & ~bad, other=0.0)
            each = tl.load(class_weight + n, mask=n < N, other=0.0)
            all_weights = of_row * 0 + tl.sum(each, 0)
        q = tl.exp(z - most[:, None]) * inverse[:, None]
        own = (of_row * (1 - smoothing) * weight)[:, None]
        g += tl.where(of_label, -own * (others * inverse)[:, None], own * q)
        if smoothing > 0:
            g += smooth[:, None] * (all_weights[:, None] * q - each[None, :])
    g = tl.where(bad[:, None], float("nan"), tl.where(counted[:, None], g, 0.0))
    inside = (r < R)[:, None] & (n < N)[None, :]
    tl.store(grad_now + r[:, None].to(tl.int64) * N + n[None, :], g.to(C), mask=inside)


def fits(logits: Tensor) -> bool:
    """Whether a program holds a row, and there is one."""
    return logits.shape[0] > 0 and logits.shape[1] <= _WIDEST


def tiles(N: int) -> dict[str, int]:
    width = max(16, triton.next_power_of_2(N))
    return {"BR": max(1, _TILE // width), "BN": width}


def _options(call: Any, dtype: torch.dtype) -> dict[str, Any]:
    power = int(call.power) if call.power in (1.0, 2.0) else 0
    given = {"DISTANCE": call.distance, "POWER": power, "WEIGHTED": call.class_weight is not None}
    return given | tiles(call.new_logits.shape[1]) | {"C": precision(call.new_logits.new_empty(0, dtype=dtype))["C"]}


def _rows(logits: Tensor) -> Tensor:
    return logits if logits.stride(1) == 1 else logits.contiguous()


def forward(call: Any, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Distances, label losses, codes and the trace, the second and the last empty where not wanted."""
    now, old = _rows(call.new_logits), _rows(call.old_logits)
    R, N = now.shape
    distances = now.new_empty(R, dtype=dtype)
    label_losses = now.new_empty(R if call.label_loss else 0, dtype=dtype)
    codes = now.new_empty(R, dtype=torch.uint8)
    trace = now.new_zeros(R * ROW_TRACE if call.save_trace else 0, dtype=dtype)
    options = _options(call, dtype)
    launch(
        forward_kernel, triton.cdiv(R, options["BR"]), now, old, call.labels.contiguous(),
        call.labels if call.class_weight is None else call.class_weight, distances, label_losses, codes, trace, R, N,
        now.stride(0), old.stride(0), call.ignore_index, call.alpha, call.beta, call.tau, call.margin, call.power,
        call.label_smoothing, LABELLED=call.label_loss, SAVES=call.save_trace, num_warps=4, **options,
    )  # fmt: skip
    return distances, label_losses, codes, trace


def backward(call: Any) -> Tensor:
    """The gradient of the new logits."""
    now, old = _rows(call.new_logits), _rows(call.old_logits)
    R, N = now.shape
    along, of_labels = call.grad_distances.contiguous(), call.grad_label_losses
    grad_now = along.new_empty(R, N)
    options = _options(call, along.dtype)
    launch(
        backward_kernel, triton.cdiv(R, options["BR"]), now, old, call.labels.contiguous(),
        call.labels if call.class_weight is None else call.class_weight, call.trace.contiguous(), along,
        along if of_labels is None else of_labels.contiguous(), grad_now, R, N, now.stride(0), old.stride(0),
        call.ignore_index, call.tau, call.margin, call.power, call.label_smoothing,
        LABELLED=call.label_loss and of_labels is not None, num_warps=4, **options,
    )  # fmt: skip
    return grad_now
