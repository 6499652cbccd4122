"""Programs on Gram matrices: a linear classifier on features that are known by their products alone.

Z = f_0 + K p of the support rows, f_0 + cross p of the query rows, and a step of rate lr is p' = p - lr (G + decay p),
with G [S, N] what the oracle gives for Z. With K = X X^T + 1 that is a linear classifier on X with its bias, from zero;
with a network's tangent kernel and its outputs f_0 it is the network, linearised at its weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernelmeta.phases import Phase
from kernelmeta.reference.ntk import TangentKernel
from kernelmeta.reference.precision import without_autocast
from kernelmeta.reference.program import oracle_gradient


def _flat(kernel: Tensor) -> Tensor:
    """[T, rows, S], or [T, rows N, S N] of one whose outputs are apart."""
    return kernel if kernel.dim() == 3 else kernel.flatten(3).flatten(1, 2)


def _times(kernel: Tensor, p: Tensor) -> Tensor:
    """What the outputs of a kernel's rows move by: [T, rows, N]."""
    if kernel.shape[-1] == p.shape[1]:
        return kernel @ p
    return (kernel @ p.flatten(1).unsqueeze(-1)).unflatten(1, (-1, p.shape[-1])).squeeze(-1)


@without_autocast
def gram_program(
    kernel: TangentKernel,
    targets: Tensor,
    phases: Sequence[Phase],
    rates: Tensor,
    *,
    target_scale: Tensor | float = 1.0,
    reduction: str | None = None,
    weight_decay: Tensor | float = 0.0,
) -> Tensor:
    """The logits of the query rows after all phases; the backward pass makes the steps of a phase anew from
    checkpoints, ``sqrt(steps)`` of them.

    Args:
        kernel: ``gram`` [T, S, S] and ``cross`` [T, Q, S], or [T, S, N, S, N] and [T, Q, N, S, N]; outputs at the
            start, ``support_outputs`` [T, S, N] and ``query_outputs`` [T, Q, N].
        targets: [T, S, N], one-hot.
        phases: on support rows, with oracles that are losses.
        rates: [K], of each step of all phases.
        target_scale: what "squared_error" wants a row's own class to get.
        reduction: as in :func:`kernelmeta.ops.program`.
        weight_decay: what a step takes of p, over its rate.
    """
    gram, cross = _flat(kernel.gram), _flat(kernel.cross)
    scale, decay = (
        torch.as_tensor(v, dtype=targets.dtype, device=targets.device) for v in (target_scale, weight_decay)
    )
    pulls = torch.zeros_like(targets)
    first = 0
    for phase in phases:

        def some(
            p: Tensor, gram: Tensor, start: Tensor, scale: Tensor, decay: Tensor, lrs: Tensor, phase: Phase = phase
        ) -> Tensor:
            for lr in lrs.unbind():
                logits = start + _times(gram, p)
                moved = (1 - lr * decay) * p
                for part in phase.parts:
                    G = oracle_gradient(part.oracle, logits, targets, mean=part.means(reduction), target_scale=scale)
                    moved = moved - lr * part.weight * G
                p = moved
            return p

        own = rates[first : first + phase.steps]
        first += phase.steps
        for lrs in own.split(max(1, math.isqrt(phase.steps))):
            given: tuple[Any, ...] = (pulls, gram, kernel.support_outputs, scale, decay, lrs)
            transformed = torch._C._are_functorch_transforms_active()  # (checkpoints do not know them)
            if torch.is_grad_enabled() and not transformed and any(t.requires_grad for t in given):
                pulls = checkpoint(some, *given, use_reentrant=False, preserve_rng_state=False)
            else:
                pulls = some(*given)
    return kernel.query_outputs + _times(cross, pulls)
