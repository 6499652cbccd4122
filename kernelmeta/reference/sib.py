"""SIB in D dimensions, step by step as the paper writes it (Hu et al. 2020, algorithm 1): the specification.

The published code does the same: the inner gradient is obtained by differentiating the classifier's output, with the
synthetic gradient in the place of the loss's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernelmeta.mlp_parameters import MLPParameters
from kernelmeta.reference import explicit
from kernelmeta.reference.class_means import class_means
from kernelmeta.reference.norms import unit
from kernelmeta.reference.precision import promoted, without_autocast
from kernelmeta.reference.synthetic_gradient_mlp import mlp_with_norm_stats, stack_norm_stats
from kernelmeta.reference.task_rows import gathered
from kernelmeta.tasks import Classifier


@without_autocast
def cosine_classifier(theta: Tensor, rows: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """``Z = s (b + cos(x, theta))``: [T, N, D], [T, Q, D] -> [T, Q, N]."""
    cosines = unit(rows) @ unit(theta).transpose(-1, -2)
    return scale * (bias + cosines)


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
    if torch.is_inference_mode_enabled():  # where nothing can be differentiated: the same without autograd
        return explicit.sib_inner_loop(**locals())
    theta0, query, scale, bias, *parameters = promoted(theta0, query, scale, bias, *mlp)
    mlp = MLPParameters(*parameters)
    given = (theta0, query, scale, bias, *mlp)
    meta_learning = torch.is_grad_enabled() and any(t.requires_grad for t in given)
    lr = inner_lr if reduction == "sum" else inner_lr / query.shape[-2]
    theta, used = theta0, []
    for _ in range(steps):
        with torch.enable_grad():
            if not theta.requires_grad:
                theta = theta.detach().requires_grad_()
            logits = cosine_classifier(theta, query, scale, bias)
            guess, stats = mlp_with_norm_stats(logits, mlp, norm_stats=norm_stats, running_stats=running_stats)
            # d logits / d theta, transposed, times the guess of d loss / d logits
            (step,) = torch.autograd.grad(logits, theta, guess, create_graph=meta_learning)
        theta = theta - lr * step if meta_learning else theta.detach() - lr * step
        used.append(stats)
    logits = cosine_classifier(theta, query, scale, bias)
    result: list[Any] = [logits]
    if return_weights:
        result.append(Classifier.cosine(theta))
    if return_norm_stats:
        result.append(stack_norm_stats(used, mlp))
    return tuple(result) if len(result) > 1 else logits


def sib(
    support: Tensor,
    support_labels: Tensor,
    query: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    mlp: MLPParameters,
    *,
    support_index: Tensor | None = None,
    query_index: Tensor | None = None,
    **options: Any,
) -> Any:
    """The whole episode: class means, then the inner loop. See :func:`kernelmeta.ops.sib`."""
    support, query = gathered(support, support_index, "support"), gathered(query, query_index, "query")
    theta0 = class_means(support, support_labels, mlp.weight1.shape[1], weight)
    return sib_inner_loop(theta0, query, scale, bias, mlp, **options)
