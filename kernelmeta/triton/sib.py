"""The whole episode in Triton: what lies before and after the inner loop, in the order of one call."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kernelmeta.ops._signature import mlp_of
from kernelmeta.ops._trace import padded
from kernelmeta.ops.sib_op import OP
from kernelmeta.triton import anew, class_means_kernels, mlp_kernels
from kernelmeta.triton.launch import launch, precision
from kernelmeta.triton.loop_kernels import loop_backward_kernel, loop_forward_kernel
from kernelmeta.triton.products import (
    combine,
    dots,
    inverse_norms,
    out_of_range,
    squared_norms,
    without_radial_part,
)
from kernelmeta.triton.trace import Trace, size_of


def _fields(Q: int, N: int, D: int, K: int, weights: bool) -> dict[str, tuple[int, ...]]:
    """What a task's forward pass leaves. Where the Gram matrix, that of the raw rows, has no room, it lives beside."""
    ld = padded(Q)
    return {
        "theta0": (N, D),
        "inverse": (Q,),
        "r2": (K + 1, N),
        "u": (K + 1, N, ld),
        "gram": (Q, ld) if K > 0 and 8 * K * N >= Q else (),
        "ag": (K, N, ld),
        "lost": (N,),
        "a": (K + 1, N) if weights else (),
        "p": (K + 1, N, ld) if weights else (),
    }


def _sizes(call: Any) -> tuple[int, int, int, int, int, int]:
    """T, Q, N, D, H, K."""
    T, Q = call.query.shape[:2] if call.query_index is None else call.query_index.shape
    H, N = call.weight1.shape
    return T, Q, N, call.query.shape[-1], H, call.steps


def _form_gram(trace: Trace, query: Tensor, index: Tensor | None, T: int, Q: int) -> Tensor:
    gram = trace["gram"] if "gram" in trace else trace.data.new_empty(T, Q, padded(Q))
    dots(query, query, gram[..., :Q], index, index)
    return gram


def _layout(trace: Trace, gram: Tensor | None, Q: int) -> tuple[Any, ...]:
    """size ... p_at of the kernels."""
    names = ("inverse", "r2", "u", "ag", "lost", "a", "p")
    return (trace.size, padded(Q), 0 if gram is None else gram.stride(0), *(trace.at[name] for name in names))


def trace(call: Any) -> int:
    """Elements that a forward pass leaves; none where it runs in plain PyTorch."""
    T, Q, N, D, H, K = _sizes(call)
    if T == 0 or not mlp_kernels.fits(Q, N, H, call.scale.dtype):
        return 0
    return T * size_of(_fields(Q, N, D, K, call.return_weights))


def forward(call: Any) -> tuple[Tensor, ...]:
    """The raw op ``sib``. What one program cannot hold (`mlp_kernels.fits`) runs in plain PyTorch, without trace."""
    T, Q, N, D, H, K = _sizes(call)
    scale, bias, weight, labels = call.scale, call.bias, call.weight, call.support_labels
    query_index, start_index, running_stats = call.query_index, call.start_index, call.running_stats
    return_weights, return_stats, mlp = call.return_weights, call.return_stats, mlp_of(call)
    if T == 0 or not mlp_kernels.fits(Q, N, H, scale.dtype):
        results: tuple[Tensor, ...] = OP.plain_forward(*call)
        return results
    query, start = call.query.contiguous(), call.start.contiguous()
    fields = _fields(Q, N, D, K, return_weights)
    trace_data = scale.new_zeros(T, size_of(fields))
    trace = Trace(trace_data, fields)
    if labels is None:
        trace["theta0"].copy_(start if start_index is None else start[start_index])
    else:
        trace["theta0"].copy_(class_means_kernels.forward(start, labels, weight, N, start_index))
    dots(trace["theta0"], query, trace["u"][:, 0, :, :Q], None, query_index)
    squared_norms(trace["theta0"].contiguous(), None, trace["r2"][:, 0])
    gram = None
    if K:
        gram = _form_gram(trace, query, query_index, T, Q)
        squares = gram[..., :Q].diagonal(dim1=1, dim2=2)
        extreme = out_of_range(squares) | (D == 1)  # which leaves no rounding in D dimensions
        trace["inverse"].copy_(squares.sqrt().clamp_min_(1e-12).reciprocal_())
    else:
        trace["inverse"].copy_(inverse_norms(query, query_index, scale.dtype))
    logits = scale.new_empty(T, Q, N)
    stats = scale.new_empty((T, K, 2, 2, H) if return_stats else 0)
    tiles = mlp_kernels.tiles(Q, N, H)
    work = mlp_kernels.workspace(scale, T, tiles)
    launch(
        loop_forward_kernel, T, trace_data, trace_data if gram is None else gram,
        work, mlp_kernels.pack((scale, bias, *mlp)),
        trace_data if running_stats is None else running_stats.contiguous(),
        logits, stats, Q, N, H, K, call.inner_lr, work.stride(0), *_layout(trace, gram, Q),
        FIXED=running_stats is not None, STATS=return_stats, WEIGHTS=return_weights, in_place=True,
        **tiles, **precision(logits),
    )  # fmt: skip
    weights = scale.new_empty(0)
    if return_weights:
        coefficients = trace["p"][:, K, :, :Q] * trace["inverse"].unsqueeze(1)
        weights = combine(coefficients, query, query_index).addcmul_(trace["theta0"], trace["a"][:, K].unsqueeze(-1))
    if K:
        trace["lost"][:] += extreme.any(-1, keepdim=True)
    lost = anew.lost(trace, trace["theta0"]) if K else None
    if lost is not None:
        own = _of_tasks(call, lost)._replace(save_trace=False)
        anew.put((logits, weights, stats), (lost, lost, lost), OP.plain_forward(*own)[:3])
    return (
        logits,
        weights,
        stats.mean(0) if return_stats else stats,
        trace_data.view(-1) if call.save_trace else scale.new_empty(0),
    )


def _of_tasks(call: Any, tasks: Tensor) -> Any:
    """The call for some of the tasks alone."""
    own = {"support_labels": None if call.support_labels is None else call.support_labels[tasks]}
    for rows, index in (("query", "query_index"), ("start", "start_index")):
        name = rows if getattr(call, index) is None else index
        own[name] = getattr(call, name)[tasks]
    return call._replace(**own)


def backward(call: Any) -> tuple[Tensor, ...]:
    """The raw op ``sib_backward``."""
    T, Q, N, D, H, K = _sizes(call)
    scale, bias, weight, labels = call.scale, call.bias, call.weight, call.support_labels
    query_index, start_index, running_stats = call.query_index, call.start_index, call.running_stats
    grad_logits, grad_weights, mlp = call.grad_logits, call.grad_weights, mlp_of(call)
    need_query, need_start = call.need_query, call.need_start
    if T == 0 or not mlp_kernels.fits(Q, N, H, scale.dtype):
        results: tuple[Tensor, ...] = OP.plain_backward(*call)
        return results
    query, start = call.query.contiguous(), call.start.contiguous()
    trace_data = call.trace.contiguous().view(T, -1)
    fields = _fields(Q, N, D, K, call.return_weights)
    trace = Trace(trace_data, fields)
    gram = None
    if K:
        gram = trace["gram"] if "gram" in trace else _form_gram(trace, query, query_index, T, Q)
    new_empty = scale.new_empty
    gp = ga = trace_data  # never read
    if grad_weights is not None:
        grad_weights = grad_weights.contiguous()
        gp = new_empty(T, N, Q)
        dots(grad_weights, query, gp, None, query_index)
        gp *= trace["inverse"].unsqueeze(1)
        ga = (grad_weights * trace["theta0"]).sum(-1)
    parameters = (scale, bias, *mlp)
    packed = mlp_kernels.pack(parameters)
    partial = packed.new_zeros(T, packed.numel())
    gc, gn0 = new_empty(T, N, Q), new_empty(T, N)
    gs, gag = (new_empty((T, K * N, Q) if need_query else 0) for _ in range(2))
    tiles = mlp_kernels.tiles(Q, N, H)
    work = mlp_kernels.workspace(scale, T, tiles)
    launch(
        loop_backward_kernel, T, trace_data, trace_data if gram is None else gram, work, packed,
        trace_data if running_stats is None else running_stats.contiguous(), grad_logits.contiguous(), gp, ga,
        partial, gc, gn0, gs, gag, Q, N, H, K, packed.numel(), call.inner_lr, work.stride(0),
        *_layout(trace, gram, Q),
        FIXED=running_stats is not None, WEIGHTS=grad_weights is not None, ROWS=need_query,
        in_place=True, **tiles, **precision(packed),
    )  # fmt: skip

    lost = anew.lost(trace, trace["theta0"]) if K else None
    if lost is not None:
        for found in (partial, gc, gn0, gs, gag):
            if found.numel():
                found[lost] = 0
        trace = Trace(trace_data.clone(), fields)
        trace.data[lost] = 1  # and nothing that is not finite
    gtheta0 = combine(gc, query, query_index).addcmul_(trace["theta0"], gn0.unsqueeze(-1), value=2)
    if grad_weights is not None:
        gtheta0.addcmul_(grad_weights, trace["a"][:, K].unsqueeze(-1))
    if lost is not None:
        gtheta0[lost] = 0
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
        gquery = combine(gc.transpose(1, 2), trace["theta0"].contiguous())
        if K:
            gram_gradient = new_empty(T, Q, Q)
            dots(gs.transpose(1, 2), gag.transpose(1, 2), gram_gradient)
            gram_gradient = gram_gradient + gram_gradient.transpose(1, 2)
            gram_gradient *= trace["inverse"].unsqueeze(1) * trace["inverse"].unsqueeze(2)
            gquery += combine(gram_gradient, rows.contiguous())
        if grad_weights is not None:
            coefficients = trace["p"][:, K, :, :Q] * trace["inverse"].unsqueeze(1)
            gquery += combine(coefficients.transpose(1, 2), grad_weights)
        gquery = without_radial_part(gquery, rows, trace["inverse"])
    of_parameters = [gweight, *mlp_kernels.unpack(partial, parameters)]
    if lost is not None:
        of_weights = None if grad_weights is None else grad_weights[lost]
        own = _of_tasks(call, lost)._replace(grad_logits=grad_logits[lost], grad_weights=of_weights)
        of_lost = OP.plain_backward(*own)
        anew.put((gstart, gquery), (lost, lost), of_lost[:2])
        of_parameters = anew.add(of_parameters, of_lost[2:])
    return gstart, gquery, *of_parameters
