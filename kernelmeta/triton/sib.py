"""The whole episode in Triton: what lies before and after the inner loop, in the order of one call."""

from __future__ import annotations

from typing import Any

import triton
from torch import Tensor

from kernelmeta.ops.sib_op import _fallback, _fallback_backward, _sizes, trace_size
from kernelmeta.triton import class_means_kernels, mlp_kernels
from kernelmeta.triton.launch import launch, plain, precision
from kernelmeta.triton.loop_kernels import loop_backward_kernel, loop_forward_kernel
from kernelmeta.triton.products import combine, dots, inverse_norms, squared_norms, without_radial_part


class _Trace:
    """Views of the trace [T, size]; the layout is ``Trace`` in csrc/engine/inner_loop.h, the Gram matrix that of the
    raw rows. Where the trace has no room for it, it lives beside.
    """

    def __init__(self, data: Tensor, Q: int, N: int, D: int, K: int, weights: bool) -> None:
        T = data.shape[0]
        ld = _padded(Q)
        self.data, self.size, self.ld, self.gram = data, data.shape[1], ld, None
        self.at: dict[str, int] = {}
        at = 0
        for name, shape in {
            "theta0": (N, D),
            "inverse": (Q,),
            "r2": (K + 1, N),
            "u": (K + 1, N, ld),
            **({"gram": (Q, ld)} if _has_gram(N, Q, K) else {}),
            "ag": (K, N, ld),
            **({"a": (K + 1, N), "p": (K + 1, N, ld)} if weights else {}),
        }.items():
            strides = [1]
            for length in shape[:0:-1]:
                strides.insert(0, strides[0] * length)
            view = data.as_strided((T, *shape), (self.size, *strides), data.storage_offset() + at)
            setattr(self, name, view)
            self.at[name] = at
            at += _padded(strides[0] * shape[0])

    theta0: Tensor
    inverse: Tensor
    r2: Tensor
    u: Tensor
    a: Tensor
    p: Tensor
    gram: Tensor | None

    def form_gram(self, query: Tensor, index: Tensor | None, T: int, Q: int) -> Tensor:
        if self.gram is None:
            self.gram = self.data.new_empty(T, Q, self.ld)
        dots(query, query, self.gram[..., :Q], index, index)
        return self.gram[..., :Q]

    def arguments(self) -> tuple[Any, ...]:
        """size ... p_at of the kernels."""
        stride = 0 if self.gram is None else self.gram.stride(0)
        names = ("inverse", "r2", "u", "ag", "a", "p")
        return (self.size, self.ld, stride, *(self.at.get(name, 0) for name in names))


def _padded(n: int) -> int:
    return triton.cdiv(n, 16) * 16


def _has_gram(N: int, Q: int, K: int) -> bool:
    return K > 0 and 8 * K * N >= Q


def forward(*args: Any) -> tuple[Tensor, ...]:
    """The raw op ``sib``. What one program cannot hold (`mlp_kernels.fits`) runs in plain PyTorch, without trace."""
    query, query_index, start, start_index, labels, weight, scale, bias, *mlp = args[:18]
    running_stats, K, lr, return_weights, return_stats, save_trace = args[18:]
    T, _, Q, N, D, H, _ = _sizes(args)
    if T == 0 or not mlp_kernels.fits(Q, N, H, scale.dtype):
        logits, weights, stats, no_trace = _fallback(*args)
        if save_trace:
            no_trace = scale.new_zeros(T, trace_size(N, Q, D, K, return_weights))
        return logits.contiguous(), weights.contiguous(), stats, no_trace
    query, start = query.contiguous(), start.contiguous()
    trace_data = scale.new_zeros(T, trace_size(N, Q, D, K, return_weights))
    trace = _Trace(trace_data, Q, N, D, K, return_weights)
    if labels is None:
        trace.theta0.copy_(start if start_index is None else start[start_index])
    else:
        trace.theta0.copy_(class_means_kernels.forward(start, labels, weight, N, start_index))
    dots(trace.theta0, query, trace.u[:, 0, :, :Q], None, query_index)
    squared_norms(trace.theta0.contiguous(), None, trace.r2[:, 0])
    if K:
        squares = trace.form_gram(query, query_index, T, Q).diagonal(dim1=1, dim2=2)
        trace.inverse.copy_(squares.sqrt().clamp_min_(1e-12).reciprocal_())
    else:
        trace.inverse.copy_(inverse_norms(query, query_index, scale.dtype))
    logits = scale.new_empty(T, Q, N)
    stats = scale.new_empty((T, K, 2, 2, H) if return_stats else 0)
    tiles = mlp_kernels.tiles(Q, N, H)
    work = mlp_kernels.workspace(scale, T, tiles)
    launch(
        loop_forward_kernel, T, trace_data, trace_data if trace.gram is None else trace.gram,
        work, mlp_kernels.pack((scale, bias, *mlp)),
        trace_data if running_stats is None else running_stats.contiguous(),
        logits, stats, Q, N, H, K, lr, work.stride(0), *trace.arguments(),
        FIXED=running_stats is not None, STATS=return_stats, WEIGHTS=return_weights, in_place=True,
        **tiles, **precision(logits),
    )  # fmt: skip
    weights = scale.new_empty(0)
    if return_weights:
        coefficients = trace.p[:, K, :, :Q] * trace.inverse.unsqueeze(1)
        weights = combine(coefficients, query, query_index).addcmul_(trace.theta0, trace.a[:, K].unsqueeze(-1))
    return (
        logits,
        weights,
        stats.mean(0) if return_stats else stats,
        trace_data if save_trace else scale.new_empty(0),
    )


def backward(grad_logits: Tensor, grad_weights: Tensor | None, trace_data: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """The raw op ``sib_backward``."""
    query, query_index, start, start_index, labels, weight, scale, bias, *mlp = args[:18]
    running_stats, K, lr, return_weights, need_query, need_start = args[18:]
    T, _, Q, N, D, H, _ = _sizes(args)
    if T == 0 or not mlp_kernels.fits(Q, N, H, scale.dtype):
        return plain(_fallback_backward, grad_logits, grad_weights, trace_data, *args)
    query, start = query.contiguous(), start.contiguous()
    trace_data = trace_data.contiguous()
    trace = _Trace(trace_data, Q, N, D, K, return_weights)
    if K and trace.gram is None:
        trace.form_gram(query, query_index, T, Q)
    new_empty = scale.new_empty
    gp = ga = trace_data  # never read
    if grad_weights is not None:
        grad_weights = grad_weights.contiguous()
        gp = new_empty(T, N, Q)
        dots(grad_weights, query, gp, None, query_index)
        gp *= trace.inverse.unsqueeze(1)
        ga = (grad_weights * trace.theta0).sum(-1)
    parameters = (scale, bias, *mlp)
    packed = mlp_kernels.pack(parameters)
    partial = packed.new_zeros(T, packed.numel())
    gc, gn0 = new_empty(T, N, Q), new_empty(T, N)
    gs, gag = (new_empty((T, K * N, Q) if need_query else 0) for _ in range(2))
    tiles = mlp_kernels.tiles(Q, N, H)
    work = mlp_kernels.workspace(scale, T, tiles)
    launch(
        loop_backward_kernel, T, trace_data, trace_data if trace.gram is None else trace.gram, work, packed,
        trace_data if running_stats is None else running_stats.contiguous(), grad_logits.contiguous(), gp, ga,
        partial, gc, gn0, gs, gag, Q, N, H, K, packed.numel(), lr, work.stride(0),
        *trace.arguments(),
        FIXED=running_stats is not None, WEIGHTS=grad_weights is not None, ROWS=need_query,
        in_place=True, **tiles, **precision(packed),
    )  # fmt: skip

    gtheta0 = combine(gc, query, query_index).addcmul_(trace.theta0, gn0.unsqueeze(-1), value=2)
    if grad_weights is not None:
        gtheta0.addcmul_(grad_weights, trace.a[:, K].unsqueeze(-1))
    gstart, gweight = new_empty(0), new_empty(0 if weight is None else D)
    if labels is not None:
        gstart, gw = class_means_kernels.backward(gtheta0, start, labels, weight, N, need_start, start_index)
        gweight = gw if weight is not None else gweight
    elif need_start:
        gstart = gtheta0
        gweight.zero_()
    else:
        gweight.zero_()

    gquery = new_empty(0)
    if need_query:
        rows = query if query_index is None else query[query_index]
        gquery = combine(gc.transpose(1, 2), trace.theta0.contiguous())
        if K:
            gram_gradient = new_empty(T, Q, Q)
            dots(gs.transpose(1, 2), gag.transpose(1, 2), gram_gradient)
            gram_gradient = gram_gradient + gram_gradient.transpose(1, 2)
            gram_gradient *= trace.inverse.unsqueeze(1) * trace.inverse.unsqueeze(2)
            gquery += combine(gram_gradient, rows.contiguous())
        if grad_weights is not None:
            coefficients = trace.p[:, K, :, :Q] * trace.inverse.unsqueeze(1)
            gquery += combine(coefficients.transpose(1, 2), grad_weights)
        gquery = without_radial_part(gquery, rows, trace.inverse)
    return gquery, gstart, gweight, *mlp_kernels.unpack(partial, parameters)
