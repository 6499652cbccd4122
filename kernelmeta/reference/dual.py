"""The inner loop in the dual form: the bridge from the paper (sib.py) to the kernels (csrc/engine/inner_loop.h).

The query rows do not change while theta moves, so theta stays in the span of theta0 and the rows. With Xhat the
normalised rows, A = Xhat Xhat^T their Gram matrix and C = Xhat theta0^T, the state is U [Q, N], the cosines of rows
with classes, and r2 [N], the squared norms of the classes' theta. A step with G = MLP(s (U + b)) and e = lr * s is

    AG = A G,   dot = sum_q(U G),   quad = sum_q(G AG),   c = e dot / r2
    r2' = r2 + e^2 (quad - dot^2) / r2        the step is orthogonal to theta: r2 never shrinks
    U'  = (1 + c) (r / r') U - e / (r r') AG

and theta = a theta0 + Xhat^T P with

    P' = (1 + c) P - (e / r) G,   a' = (1 + c) a,   starting from P = 0, a = 1.

Plain tensor arithmetic: it runs under torch.func and torch.compile as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from kernelmeta.reference.precision import promoted, without_autocast
from kernelmeta.reference.synthetic_gradient_mlp import MLPParameters, mlp_with_norm_stats, stack_norm_stats
from kernelmeta.tasks import Classifier

_SQUARED_FLOOR = 1e-24  # of |theta|^2, as F.normalize


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
    rows = normalize(query, dim=-1, eps=1e-12)  # Xhat
    gram = rows @ rows.transpose(-1, -2)  # A
    r2 = theta0.square().sum(-1).clamp_min(_SQUARED_FLOOR).unsqueeze(-2)  # [T, 1, N]
    U = rows @ theta0.transpose(-1, -2) / r2.sqrt()
    P, a, used = torch.zeros_like(U), torch.ones_like(r2), []
    for _ in range(steps):
        G, stats = mlp_with_norm_stats(scale * (U + bias), mlp, norm_stats=norm_stats, running_stats=running_stats)
        AG = gram @ G
        dot = (U * G).sum(-2, keepdim=True)
        quad = (G * AG).sum(-2, keepdim=True)
        c = e * dot / r2
        grown = r2 + e.square() * (quad - dot.square()) / r2
        r, grown_r = r2.sqrt(), grown.sqrt()
        P = (1 + c) * P - e / r * G
        a = (1 + c) * a
        U = (1 + c) * (r / grown_r) * U - e / (r * grown_r) * AG
        r2 = grown
        used.append(stats)
    logits = scale * (U + bias)
    result: list[Any] = [logits]
    if return_weights:
        result.append(Classifier.cosine(a.transpose(-1, -2) * theta0 + P.transpose(-1, -2) @ rows))
    if return_norm_stats:
        result.append(stack_norm_stats(used, mlp))
    return tuple(result) if len(result) > 1 else logits
