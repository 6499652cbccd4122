"""The inner loop with the gradient of every step written out, in plain tensor arithmetic: it runs under torch.func and
torch.compile as it is, where sib.py asks autograd.

With Xhat the normalised query rows, h = theta / |theta|, G = MLP(s (Xhat h + b)) and e = lr * s, a step is

    v = Xhat^T G,   w = v - <h, v> h,   theta' = theta - e / |theta| w

(w = v where |theta| is at its floor, and h proportional to theta).

The kernels take the same steps in the space of the rows (csrc/engine/cosine_step.h), where theta is never formed,
unless that loses digits; what is written here loses none but those that theta itself loses.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kernelmeta.mlp_parameters import MLPParameters
from kernelmeta.reference.norms import FLOOR, unit, unit_and_length
from kernelmeta.reference.precision import promoted, without_autocast
from kernelmeta.reference.synthetic_gradient_mlp import mlp_with_norm_stats, stack_norm_stats
from kernelmeta.tasks import Classifier


@without_autocast
def sib_inner_loop(
    theta0: Tensor,
    query: Tensor,
    scale: Tensor,
    bias: Tensor,
    mlp: MLPParameters,
    *,
    steps: int,
    inner_lr: float,
    reduction: str = "sum",
    norm_stats: str = "task",
    running_stats: Tensor | None = None,
    return_weights: bool = False,
    return_norm_stats: bool = False,
) -> Any:
    """K synthetic-gradient steps on unlabelled query rows. See :func:`kernelmeta.ops.sib_inner_loop`."""
    theta0, query, scale, bias, *parameters = promoted(theta0, query, scale, bias, *mlp)
    mlp = MLPParameters(*parameters)
    e = scale * (inner_lr if reduction == "sum" else inner_lr / query.shape[-2])
    rows, theta, used = unit(query), theta0, []  # Xhat
    for _ in range(steps):
        h, r = unit_and_length(theta)
        logits = scale * (rows @ h.transpose(-1, -2) + bias)
        G, stats = mlp_with_norm_stats(logits, mlp, norm_stats=norm_stats, running_stats=running_stats)
        v = G.transpose(-1, -2) @ rows
        w = v - h * (h * v).sum(-1, keepdim=True) * (r > FLOOR)
        theta = theta - e / r * w
        used.append(stats)
    logits = scale * (rows @ unit(theta).transpose(-1, -2) + bias)
    result: list[Any] = [logits]
    if return_weights:
        result.append(Classifier.cosine(theta))
    if return_norm_stats:
        result.append(stack_norm_stats(used, mlp))
    return tuple(result) if len(result) > 1 else logits
