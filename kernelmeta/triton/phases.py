"""Phases of a program on a batch of tasks: one launch a phase, the state of every step in the trace."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernelmeta.triton import mlp_kernels
from kernelmeta.triton.launch import cover, interpreted, launch, precision
from kernelmeta.triton.oracle_kernels import EQUIVARIANT_GRADIENT, SYNTHETIC_GRADIENT
from kernelmeta.triton.pair_kernels import PAIR_TILE
from kernelmeta.triton.phase_kernels import phase_backward_kernel, phase_forward_kernel
from kernelmeta.triton.products import dots
from kernelmeta.triton.trace import Trace

_LARGEST_TILE = 256 * 16  # elements of the state: what the registers of one program hold
_LARGEST_PAIR_TILE = 512 * 16  # of an activation of all pairs


class Phase(NamedTuple):
    oracle: int
    query: bool
    mean: bool
    steps: int


class Live(NamedTuple):
    """The live rows of every task (see `phase_kernels`), the largest task's numbers."""

    S: int  # 0 where no phase uses the support rows
    Q: int
    query_at: int
    ld: int  # room for all of them
    counts: Tensor | None  # [T, 3] int64: live support rows, query rows and ways of each task; None: all alike

    @property
    def support(self) -> slice:
        return slice(0, self.S)

    @property
    def query(self) -> slice:
        return slice(self.query_at, self.query_at + self.Q)


class Learned(NamedTuple):
    """What the phases read besides the state."""

    numbers: Tensor  # [3]: scale, bias, target
    rates: Tensor  # [K]
    labels: Tensor  # [T, rows], -1 where there is no row
    mlp: Sequence[Tensor] | None
    running_stats: Tensor | None


class Gradients(NamedTuple):
    """Of the state, on its way back, and what it leaves: see `phase_backward_kernel`."""

    u: Tensor  # [T, N, ld]
    r2: Tensor  # [T, N]
    p: Tensor | None  # [T, N, ld], where the coefficients have gradients
    a: Tensor  # [T, N]
    mlp: Tensor  # [T, P]
    numbers: Tensor  # [T, 3]
    rates: Tensor  # [T, K]
    gs: Tensor | None  # [T, K, N, ld]
    gag: Tensor | None


def tiles(ld: int, N: int, H: int, pairs: int = 0) -> dict[str, int]:
    """Tile sizes and warps; H is 0 where there is no MLP, ``pairs`` where it does not look at pairs (PP is 1)."""
    LP, NP, HP, PP = cover(ld, 1 << 30), cover(N, 1 << 30), cover(H, 1 << 30), cover(pairs, 1 << 30) if pairs else 1
    largest = max(PP, LP) * max(HP, NP) if H else 2 * LP * NP
    num_warps = 4 if largest <= 1024 else 8 if largest <= 4096 else 16
    return {"LP": LP, "NP": NP, "HP": HP, "PP": PP, "num_warps": num_warps}


def fits(ld: int, N: int, H: int, dtype: torch.dtype, pairs: int = 0) -> bool:
    """Whether one program can own a task: else the op runs in plain PyTorch. float64 only in the interpreter."""
    if H and not pairs:
        return mlp_kernels.fits(ld, N, H, dtype)
    t = tiles(ld, N, H, pairs)
    known = dtype is torch.float32 or (dtype is torch.float64 and interpreted())
    if pairs and max(t["PP"], t["HP"]) * max(t["HP"], 16) > _LARGEST_PAIR_TILE:
        return False
    return known and t["LP"] <= 256 and t["LP"] * t["NP"] <= _LARGEST_TILE


def _common(
    trace: Trace, live: Live, N: int, phase: Phase, learned: Learned
) -> tuple[list[Any], dict[str, Any], dict[str, Any]]:
    """(Tensors that both kernels read, tile sizes, flags)."""
    of_pairs = phase.oracle == EQUIVARIANT_GRADIENT.value
    mlp = learned.mlp if of_pairs or phase.oracle == SYNTHETIC_GRADIENT.value else None
    pairs = N * (live.Q if phase.query else live.S) if of_pairs else 0
    size = tiles(live.ld, N, 0 if mlp is None else mlp[0].shape[0], pairs)
    LP, NP, HP, PP = size["LP"], size["NP"], size["HP"], size["PP"]
    elements = LP * NP if mlp is None else 5 * LP * HP + 3 * LP * NP
    if of_pairs:
        elements = 5 * PP * HP + (3 * PAIR_TILE.value + 1) * PP + LP * NP
    work = trace.data.new_empty(trace.data.shape[0], elements)
    packed = learned.numbers if mlp is None else mlp_kernels.pack(mlp)
    stats = learned.running_stats
    tensors = [
        trace.data, learned.numbers, learned.rates, learned.labels,
        learned.labels if live.counts is None else live.counts,
        packed, packed if stats is None else stats.contiguous(), work,
    ]  # fmt: skip
    flags = {
        "ORACLE": phase.oracle, "QUERY": phase.query, "MEAN": phase.mean, "COSINE": "lost" in trace,
        "EUCLIDEAN": "r2" in trace and "lost" not in trace,
        "RAGGED": live.counts is not None, "FIXED": stats is not None,
        **precision(trace.data),
    }  # fmt: skip
    return tensors, size, flags


def _layout(trace: Trace, live: Live, phase: Phase) -> tuple[int, ...]:
    """size ... p_at of the kernels."""
    gram = trace.at["gram_query" if phase.query else "gram_support"]
    names = ("r2", "u", "ag", "anchor", "lost", "a", "p")
    return (trace.size, live.ld, gram, *(trace.at.get(name, 0) for name in names))


def forward(trace: Trace, live: Live, N: int, phases: Sequence[Phase], learned: Learned) -> None:
    """From the state at the start of the trace on: fills the trace."""
    start = 0
    errors = trace.data.new_ones(trace.data.shape[0], 2, N)
    for phase in phases:
        tensors, size, flags = _common(trace, live, N, phase, learned)
        H = 0 if learned.mlp is None else learned.mlp[0].shape[0]
        launch(
            phase_forward_kernel, trace.data.shape[0], *tensors, errors,
            learned.labels.shape[1], live.S, live.Q, N, H, live.query_at, start, phase.steps, trace["u"].shape[1],
            tensors[-1].stride(0), *_layout(trace, live, phase), COEFFICIENTS="p" in trace, in_place=True,
            **size, **flags,
        )  # fmt: skip
        start += phase.steps


def backward(
    trace: Trace, live: Live, N: int, phases: Sequence[Phase], learned: Learned, grad: Gradients, first_order: bool
) -> None:
    """Gradients of the state at the end -> of the state at the start, in the same place, and of what is learned."""
    start = sum(phase.steps for phase in phases)
    rows = grad.gs is not None
    for phase in reversed(phases):
        start -= phase.steps
        tensors, size, flags = _common(trace, live, N, phase, learned)
        H = 0 if learned.mlp is None else learned.mlp[0].shape[0]
        launch(
            phase_backward_kernel, trace.data.shape[0], *tensors,
            grad.u, grad.r2, grad.u if grad.p is None else grad.p, grad.a, grad.mlp, grad.numbers, grad.rates,
            grad.gs if rows else grad.u, grad.gag if rows else grad.u,
            learned.labels.shape[1], live.S, live.Q, N, H, grad.mlp.shape[1], grad.rates.shape[1], live.query_at,
            start, phase.steps, tensors[-1].stride(0), *_layout(trace, live, phase),
            COEFFICIENTS=grad.p is not None, FIRST_ORDER=first_order, ROWS=rows, in_place=True, **size, **flags,
        )  # fmt: skip


def gram_gradient(grad: Gradients, first_order: bool) -> Tensor:
    """Of the products of live rows with each other, [T, ld, ld]: times the rows it is their gradient.

    A step moved every live row's result by A G. For a constant G only the row that moved has a gradient.
    """
    assert grad.gs is not None and grad.gag is not None
    T, K, N, ld = grad.gs.shape
    gs, gag = (g.view(T, K * N, ld).transpose(1, 2) for g in (grad.gs, grad.gag))
    found = grad.u.new_empty(T, ld, ld)
    dots(gag, gs, found)
    return found if first_order else found + found.transpose(1, 2)
