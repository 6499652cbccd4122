"""Ridge regression in Triton (the formulas: csrc/engine/ridge.h). A singular system gives its task NaN."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernelmeta.ops._trace import padded
from kernelmeta.ops.ridge_op import OP
from kernelmeta.triton.launch import cover, interpreted, launch, precision
from kernelmeta.triton.products import combine, dots
from kernelmeta.triton.ridge_kernels import factorise_kernel, solve_kernel
from kernelmeta.triton.tasks import Tasks
from kernelmeta.triton.trace import Trace, size_of

_MOST_ROWS = 128  # of a task: its matrix is one tile in registers


def _fits(S: int, N: int, dtype: torch.dtype) -> bool:
    known = dtype is torch.float32 or (dtype is torch.float64 and interpreted())
    return known and S <= _MOST_ROWS and N <= _MOST_ROWS


def _fields(S: int, Q: int, N: int) -> dict[str, tuple[int, ...]]:
    """What a task's forward pass leaves; the factor is the transpose of ``u`` in csrc/engine/ridge.h."""
    return {
        "factor": (S, padded(S)),
        "pivots": (padded(S),),
        "alpha": (N, padded(S)),
        "cross": (S, padded(Q)),
        "fit": (N, padded(Q)),
    }


def tiles(S: int, N: int) -> dict[str, dict[str, int]]:
    """Tile sizes and warps of the two kernels."""
    SP, NP = cover(S, 1 << 30), cover(N, 1 << 30)
    return {
        "factorise": {"SP": SP, "num_warps": 4 if SP <= 32 else 8 if SP <= 64 else 16},
        "solve": {"SP": SP, "NP": NP, "num_warps": 4 if SP * NP <= 2048 else 8},
    }


def _solve(tasks: Tasks, trace: Trace, x: Tensor) -> None:
    """x [T, N, padded(S)] <- the solution for these right-hand sides."""
    factor, pivots = trace["factor"], trace["pivots"]
    launch(
        solve_kernel, tasks.T, factor, pivots, tasks.labels if tasks.counts is None else tasks.counts, x,
        tasks.S, tasks.n_way, factor.stride(1), factor.stride(0), pivots.stride(0), x.stride(0), x.stride(1),
        RAGGED=tasks.counts is not None, in_place=True, C=precision(x)["C"], **tiles(tasks.S, tasks.n_way)["solve"],
    )  # fmt: skip


def trace(call: Any) -> int:
    """Elements that a forward pass leaves; none where it runs in plain PyTorch."""
    (T, S), Q = call.support_labels.shape, (call.query if call.query_index is None else call.query_index).shape[1]
    return T * size_of(_fields(S, Q, call.n_way)) if T and _fits(S, call.n_way, call.scale.dtype) else 0


def forward(call: Any) -> tuple[Tensor, ...]:
    """The raw op ``ridge``. What one program cannot hold runs in plain PyTorch, without trace."""
    regularization, scale, bias, n_way = call.regularization, call.scale, call.bias, call.n_way
    tasks = Tasks(call)
    S, Q = tasks.S, tasks.Q
    fields = _fields(S, Q, n_way)
    if tasks.T == 0 or not _fits(tasks.S, tasks.n_way, scale.dtype):
        results: tuple[Tensor, ...] = OP.plain_forward(*call)
        return results
    data = scale.new_zeros(tasks.T, size_of(fields))
    trace = Trace(data, fields)
    support, query = tasks.rows(False), tasks.rows(True)
    factor, pivots, alpha = trace["factor"], trace["pivots"], trace["alpha"]
    dots(support[0], support[0], factor[..., :S], support[1], support[1])
    factor.diagonal(dim1=1, dim2=2).add_(regularization)
    dots(support[0], query[0], trace["cross"][..., :Q], support[1], query[1])
    launch(
        factorise_kernel, tasks.T, factor, pivots, tasks.labels if tasks.counts is None else tasks.counts,
        S, factor.stride(1), factor.stride(0), pivots.stride(0), torch.finfo(scale.dtype).eps,
        RAGGED=tasks.counts is not None, in_place=True, C=precision(scale)["C"], **tiles(S, n_way)["factorise"],
    )  # fmt: skip
    ways = torch.arange(n_way, device=scale.device)
    right = (tasks.labels.unsqueeze(1) == ways.unsqueeze(-1)).to(scale.dtype)
    alpha[..., :S] = right.masked_fill_(tasks.broken.view(-1, 1, 1), float("nan"))
    _solve(tasks, trace, alpha)
    fit = trace["fit"][..., :Q]
    dots(alpha[..., :S], trace["cross"][..., :Q].transpose(1, 2), fit)
    logits = (scale * fit + bias).transpose(1, 2)
    coefficients = alpha[..., :S].transpose(1, 2).clone(memory_format=torch.contiguous_format)
    if tasks.own_ways is not None:
        logits = logits.masked_fill(~tasks.own_ways.unsqueeze(1), -float("inf"))
        coefficients = coefficients.masked_fill(~tasks.own_ways.unsqueeze(1), 0)
    return (
        tasks.flatten(logits, True),
        tasks.flatten(coefficients, False),
        data.view(-1) if call.save_trace else scale.new_empty(0),
    )


def backward(call: Any) -> tuple[Tensor, ...]:
    """The raw op ``ridge_backward``."""
    regularization, scale, bias = call.regularization, call.scale, call.bias
    of_support, need_query, need_support = call.grad_coefficients, call.need_query, call.need_support
    tasks = Tasks(call)
    if tasks.T == 0 or not _fits(tasks.S, tasks.n_way, scale.dtype):
        results: tuple[Tensor, ...] = OP.plain_backward(*call)
        return results
    S, Q, N = tasks.S, tasks.Q, tasks.n_way
    trace = Trace(call.trace.contiguous().view(tasks.T, -1), _fields(S, Q, N))
    support, query = tasks.rows(False), tasks.rows(True)
    alpha, cross = trace["alpha"][..., :S], trace["cross"][..., :Q]
    gz = tasks.spread(call.grad_logits, True).transpose(1, 2)
    if tasks.own_ways is not None:
        gz = gz.masked_fill(~tasks.own_ways.unsqueeze(-1), 0)
    gfit = scale * gz
    solution = scale.new_zeros(tasks.T, N, padded(S))  # gradient of alpha, then the adjoint's solution
    v = solution[..., :S]
    dots(gfit, cross, v)
    if of_support is not None:
        of_alpha = tasks.spread(of_support, False).transpose(1, 2)
        if tasks.own_ways is not None:
            of_alpha = of_alpha.masked_fill(~tasks.own_ways.unsqueeze(-1), 0)
        v += of_alpha
    _solve(tasks, trace, solution)
    none = scale.new_empty(0)
    gquery, gsupport = none, none.clone()
    # The gradient of X X^T is -v alpha^T, that of the cross products alpha gfit^T; N is small: through [N, D].
    if need_query or need_support:
        weights = combine(alpha, *support)
        if need_query:
            gquery = tasks.flatten(combine(gfit.transpose(1, 2), weights), True)
        if need_support:
            gweights = combine(gfit, *query).sub_(combine(v, *support))
            rows = combine(alpha.transpose(1, 2), gweights).sub_(combine(v.transpose(1, 2), weights))
            gsupport = tasks.flatten(rows, False)
    return (
        gsupport,
        gquery,
        -(v * alpha).sum().view(regularization.shape),
        (gz * trace["fit"][..., :Q]).sum().view(scale.shape),
        gz.sum().view(bias.shape),
    )
