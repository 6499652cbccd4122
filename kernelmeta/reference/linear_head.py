"""Gradient descent on a linear head in D dimensions: the inner loop of MAML for the last layer (ANIL), as written.

Finn, Abbeel & Levine, ICML 2017, algorithm 2; Raghu et al., ICLR 2020 (ANIL).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot, relu

from kernelmeta.reference.precision import promoted, without_autocast
from kernelmeta.reference.task_rows import check_label_range, gathered
from kernelmeta.tasks import Classifier


def _loss(oracle: str, logits: Tensor, labels: Tensor) -> Tensor:
    """Of every row, [T, S]."""
    own = logits.gather(-1, labels.unsqueeze(-1))
    target = one_hot(labels, logits.shape[-1]).to(logits.dtype)
    if oracle == "cross_entropy":
        return (logits.logsumexp(-1, keepdim=True) - own).squeeze(-1)
    if oracle == "squared_error":
        return (logits - target).square().sum(-1) / 2
    return (relu(1 + logits - own) * (1 - target)).sum(-1)  # hinge


@without_autocast
def linear_head(
    support: Tensor,
    support_labels: Tensor,
    query: Tensor,
    weight: Tensor,
    bias: Tensor,
    rates: Tensor,
    *,
    oracle: str = "cross_entropy",
    first_order: bool = False,
    return_weights: bool = False,
    support_index: Tensor | None = None,
    query_index: Tensor | None = None,
) -> Any:
    """One step a rate on the labelled support rows. See :func:`kernelmeta.ops.linear_head`."""
    support, query = gathered(support, support_index, "support"), gathered(query, query_index, "query")
    support, query, weight, bias, rates = promoted(support, query, weight, bias, rates)
    check_label_range(support_labels, len(weight))
    meta_learning = torch.is_grad_enabled()
    theta = weight.expand(len(support), -1, -1)
    b = bias.expand(len(support), 1, -1)
    for rate in rates.unbind():
        with torch.enable_grad():
            if not meta_learning or not theta.requires_grad:
                theta, b = theta.detach().requires_grad_(), b.detach().requires_grad_()
            logits = support @ theta.transpose(-1, -2) + b
            losses = _loss(oracle, logits, support_labels)
            steps = torch.autograd.grad(
                losses.mean(-1).sum(), (theta, b), create_graph=meta_learning and not first_order, retain_graph=True
            )
        theta, b = theta - rate * steps[0], b - rate * steps[1]
    logits = query @ theta.transpose(-1, -2) + b
    return (logits, Classifier(theta, b.squeeze(1))) if return_weights else logits
