"""Normalisation layers whose second derivative is right under vmap.

PyTorch's batching rules for the backward passes of batch, instance and layer normalisation *with a weight* take the
mean and the deviation for constants (seen with PyTorch 2.13): ``vmap(grad)`` then has the right value and, without a
word, a wrong derivative. Normalisation without a weight is right, so weight and bias are applied apart from it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class ExactNorms(TorchFunctionMode):
    """Within it, torch.nn.functional's normalisations apply weight and bias by operations of their own."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        replacement = _REPLACEMENTS.get(function, function)
        return replacement(*args, **(kwargs or {}))


def _per_channel(rows: Tensor, values: Tensor) -> Tensor:
    """[C], to broadcast over rows [n, C, ...]."""
    return values.view(-1, *([1] * (rows.dim() - 2)))


def _scaled(rows: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is not None:
        rows = rows * _per_channel(rows, weight)
    return rows if bias is None else rows + _per_channel(rows, bias)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not training and running_mean is not None and running_var is not None:
        normalised = (input - _per_channel(input, running_mean)) * _per_channel(input, torch.rsqrt(running_var + eps))
    else:
        normalised = F.batch_norm(input, running_mean, running_var, None, None, training, momentum, eps)
    return _scaled(normalised, weight, bias)


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    normalised = F.instance_norm(input, running_mean, running_var, None, None, use_input_stats, momentum, eps)
    return _scaled(normalised, weight, bias)


def _layer_norm(
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    normalised = F.layer_norm(input, normalized_shape, None, None, eps)
    if weight is not None:
        normalised = normalised * weight
    return normalised if bias is None else normalised + bias


def _group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    return _scaled(F.group_norm(input, num_groups, None, None, eps), weight, bias)


_REPLACEMENTS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.batch_norm: _batch_norm,
    F.instance_norm: _instance_norm,
    F.layer_norm: _layer_norm,
    F.group_norm: _group_norm,
}
