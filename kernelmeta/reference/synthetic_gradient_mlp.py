"""The synthetic-gradient MLP (Hu et al. 2020, section 4): logits in, a guess of d loss / d logits out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from kernelmeta.mlp_parameters import MLPParameters
from kernelmeta.reference.precision import promoted, without_autocast

NORM_EPS = 1e-5


@without_autocast
def synthetic_gradient_mlp(
    logits: Tensor,
    mlp: MLPParameters,
    *,
    norm_stats: str = "task",
    running_stats: Tensor | None = None,
) -> Tensor:
    """Guess the gradient of the loss with respect to the logits. See :func:`kernelmeta.ops.synthetic_gradient_mlp`."""
    logits, *parameters = promoted(logits, *mlp)
    mlp = MLPParameters(*parameters)
    return mlp_with_norm_stats(logits, mlp, norm_stats=norm_stats, running_stats=running_stats)[0]


def mlp_with_norm_stats(
    logits: Tensor, mlp: MLPParameters, *, norm_stats: str = "task", running_stats: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The guessed gradients, and [2, 2, H]: per layer the mean and the unbiased variance that BatchNorm saw.

    "task" statistics are averaged over the tasks; there are none for "running".
    """
    used = []

    def normalise(h: Tensor, layer: int, gain: Tensor, shift: Tensor) -> Tensor:
        if norm_stats == "running":
            assert running_stats is not None
            mean, variance = running_stats[layer].to(h.dtype)
        else:
            # The rows of each task, or of all tasks together.
            dims = -2 if norm_stats == "task" else tuple(range(h.dim() - 1))
            mean = h.mean(dims, keepdim=True)
            variance = (h - mean).square().mean(dims, keepdim=True)
            rows = h[..., 0].numel() if norm_stats == "batch" else h.shape[-2]
            unbiased = variance * (rows / max(rows - 1, 1))
            used.append(torch.stack([s.detach().reshape(-1, h.shape[-1]).mean(0) for s in (mean, unbiased)]))
        return (h - mean) / (variance + NORM_EPS).sqrt() * gain + shift

    h = normalise(linear(logits, mlp.weight1, mlp.bias1).relu(), 0, mlp.gain1, mlp.shift1)
    h = normalise(linear(h, mlp.weight2, mlp.bias2).relu(), 1, mlp.gain2, mlp.shift2)
    return linear(h, mlp.weight3, mlp.bias3), torch.stack(used) if used else None


def stack_norm_stats(used: Sequence[Tensor | None], mlp: MLPParameters) -> Tensor:
    """[K, 2, 2, H], the statistics of every step."""
    stats = [s for s in used if s is not None]
    if len(stats) < len(used):
        raise ValueError("norm_stats='running' has no statistics of its own to return")
    return torch.stack(stats) if stats else mlp.bias1.new_empty(0, 2, 2, mlp.bias1.shape[0])
