"""Class means: a [N, S] matrix of coefficients times the support rows of a task."""

from __future__ import annotations

import torch
from torch import Tensor

from kernelmeta.triton.products import combine, inverse_norms, without_radial_part


def _coefficients(
    support: Tensor, index: Tensor | None, labels: Tensor, n_way: int, dtype: torch.dtype, ragged: bool
) -> tuple[Tensor, Tensor]:
    """[T, N, S]; 1 / |row|, [T, S].

    NaN where a class has no row and all over a task with a label outside 0..n_way-1: raising would wait for the device.
    Of ragged tasks such classes are zero and such rows left out.
    """
    inverse = inverse_norms(support, index, dtype)
    member = labels.unsqueeze(1) == torch.arange(n_way, device=labels.device).unsqueeze(-1)
    count = member.sum(-1, keepdim=True).to(dtype)
    count = count.clamp_min(1) if ragged else count.masked_fill(~member.any(1).all(-1).view(-1, 1, 1), float("nan"))
    return member * inverse.unsqueeze(1) / count, inverse


def forward(
    support: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    n_way: int,
    index: Tensor | None = None,
    ragged: bool = False,
) -> Tensor:
    """theta0 [T, N, D]. ``index`` [T, S]: the support is a bank [n, D]. ``ragged``: see `_coefficients`."""
    dtype = torch.float64 if support.dtype is torch.float64 else torch.float32
    support = support.contiguous()
    coefficients, _ = _coefficients(support, index, labels, n_way, dtype, ragged)
    means = combine(coefficients, support, index)
    return means if weight is None else means.mul_(weight)


def backward(
    grad: Tensor,
    support: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    n_way: int,
    need_support: bool,
    index: Tensor | None = None,
    ragged: bool = False,
) -> tuple[Tensor, Tensor]:
    """Gradients of the (gathered) support rows, [T, S, D], and of the weight, [D]; empty where not wanted."""
    support = support.contiguous()
    coefficients, inverse = _coefficients(support, index, labels, n_way, grad.dtype, ragged)
    none = grad.new_empty(0)
    gsupport, gweight = none, none.clone()
    if weight is not None:
        gweight = (grad * combine(coefficients, support, index)).sum((0, 1))
    if need_support:
        towards = (grad if weight is None else grad * weight).contiguous()
        rows = support if index is None else support[index]
        gsupport = without_radial_part(combine(coefficients.transpose(1, 2), towards), rows, inverse)
    return gsupport, gweight
