"""Gradient descent on a linear head in Triton: a program of one phase on the support rows, whose head is then applied.

The head after the steps is W + P^T X, b + sum P, with X the support rows (`phase_kernels`; csrc/engine/linear_head.h
holds -P).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernelmeta.ops._trace import padded
from kernelmeta.ops.linear_head_op import OP
from kernelmeta.triton import phases
from kernelmeta.triton.phases import Gradients, Learned, Live, Phase
from kernelmeta.triton.products import combine, dots
from kernelmeta.triton.tasks import foreign
from kernelmeta.triton.trace import Trace, size_of


def _fields(S: int, N: int, K: int) -> dict[str, tuple[int, ...]]:
    ld = padded(S)
    return {"gram_support": (S, ld), "u": (K, N, ld), "p": (K + 1, N, ld)}


def _sizes(call: Any) -> tuple[int, int, int, int, int, int]:
    """T, S, Q, N, D, K."""
    T, S = call.support_labels.shape
    Q = (call.query if call.query_index is None else call.query_index).shape[1]
    return T, S, Q, *call.weight.shape, call.rates.shape[0]


def _program(call: Any) -> tuple[Live, list[Phase], Learned]:
    labels, rates = call.support_labels, call.rates
    S, K = labels.shape[1], rates.shape[0]
    ones = rates.new_ones(1)
    learned = Learned(torch.cat([ones, ones.new_zeros(1), ones]), rates.contiguous(), labels.contiguous(), None, None)
    return Live(S, 0, padded(S), padded(S), None), [Phase(call.oracle, False, True, K)] if K else [], learned


def trace(call: Any) -> int:
    """Elements that a forward pass leaves; none where it runs in plain PyTorch."""
    T, S, _, N, _, K = _sizes(call)
    return T * size_of(_fields(S, N, K)) if T and phases.fits(padded(S), N, 0, call.weight.dtype) else 0


def forward(call: Any) -> tuple[Tensor, ...]:
    """The raw op ``linear_head``. What one program cannot hold runs in plain PyTorch, without trace."""
    T, S, Q, N, D, K = _sizes(call)
    support_index, query_index, weight, bias = call.support_index, call.query_index, call.weight, call.bias
    if T == 0 or not phases.fits(padded(S), N, 0, weight.dtype):
        results: tuple[Tensor, ...] = OP.plain_forward(*call)
        return results
    data = weight.new_zeros(T, size_of(_fields(S, N, K)))
    support, query = call.support.contiguous(), call.query.contiguous()
    trace = Trace(data, _fields(S, N, K))
    shift = bias.masked_fill(foreign(call.support_labels, N).unsqueeze(-1), float("nan"))  # [T, N]
    live, program, learned = _program(call)
    if K:
        gram = trace["gram_support"][..., :S]
        dots(support, support, gram, support_index, support_index)
        gram += 1
        z = trace["u"][:, 0, :, :S]
        dots(weight.expand(T, N, D), support, z, None, support_index)
        z += shift.unsqueeze(-1)
        phases.forward(trace, live, N, program, learned)
    p = trace["p"][:, K, :, :S]
    shift = shift + p.sum(-1)
    theta = combine(p, support, support_index).add_(weight)
    logits = weight.new_empty(T, Q, N)
    dots(query, theta, logits, query_index)
    logits += shift.unsqueeze(1)
    heads = torch.cat([theta, shift.unsqueeze(-1)], -1) if call.return_weights else weight.new_empty(0)
    return logits, heads, data.view(-1) if call.save_trace else weight.new_empty(0)


def backward(call: Any) -> tuple[Tensor, ...]:
    """The raw op ``linear_head_backward``."""
    T, S, _, N, D, K = _sizes(call)
    support_index, query_index, weight, grad_heads = call.support_index, call.query_index, call.weight, call.grad_heads
    first_order, need_support, need_query = call.first_order, call.need_support, call.need_query
    if T == 0 or not phases.fits(padded(S), N, 0, weight.dtype):
        results: tuple[Tensor, ...] = OP.plain_backward(*call)
        return results
    support, query, grad_logits = call.support.contiguous(), call.query.contiguous(), call.grad_logits.contiguous()
    trace = Trace(call.trace.contiguous().view(T, -1), _fields(S, N, K))
    live, program, learned = _program(call)
    new_empty, ld = weight.new_empty, live.ld
    gtheta = combine(grad_logits.transpose(1, 2), query, query_index)
    gshift = grad_logits.sum(1)
    if grad_heads is not None:
        gtheta += grad_heads[..., :D]
        gshift += grad_heads[..., D]
    of_steps = need_support and not first_order and K > 0
    gs, gag = (weight.new_zeros(T, K, N, ld) if of_steps else None for _ in range(2))
    grad = Gradients(
        u=weight.new_zeros(T, N, ld), r2=new_empty(0), p=weight.new_zeros(T, N, ld), a=new_empty(0),
        mlp=new_empty(T, 0), numbers=weight.new_zeros(T, 3), rates=weight.new_zeros(T, K), gs=gs, gag=gag,
    )  # fmt: skip
    assert grad.p is not None
    gp = grad.p[..., :S]
    dots(gtheta, support, gp, None, support_index)
    gp += gshift.unsqueeze(-1)
    phases.backward(trace, live, N, program, learned, grad, first_order)

    none = new_empty(0)
    gz = grad.u[..., :S]
    gsupport = none
    if need_support:
        gsupport = weight.new_zeros(T, S, D)
        if not first_order:
            gsupport += combine(trace["p"][:, K, :, :S].transpose(1, 2), gtheta)
            gsupport += gz.transpose(1, 2) @ weight
        if of_steps:
            rows = support if support_index is None else support[support_index]
            gsupport += combine(phases.gram_gradient(grad, first_order)[:, :S, :S], rows)
    gquery = none.clone()
    if need_query:
        theta = combine(trace["p"][:, K, :, :S], support, support_index).add_(weight)
        gquery = combine(grad_logits, theta)
    gtheta += combine(gz, support, support_index)
    return gsupport, gquery, gtheta.sum(0), (gshift + gz.sum(-1)).sum(0), grad.rates.sum(0)
