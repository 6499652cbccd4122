"""Linear probes: classifiers on the features of a frozen backbone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def with_ones(features: Tensor) -> Tensor:
    """A column of ones beside the features [n, D]."""
    return torch.cat([features, features.new_ones(len(features), 1)], 1)


def ridge_head(features: Tensor, targets: Tensor, ridge: float) -> nn.Linear:
    """The least-squares classifier on features.

    Args:
        features: [n, D].
        targets: [n, classes].
        ridge: in units of the mean eigenvalue of the rows' Gram matrix.
    """
    x = with_ones(features.double())
    gram = x @ x.mT
    strength = ridge * gram.diagonal().mean()
    weight = x.mT @ torch.linalg.solve(gram + strength * torch.eye(len(x), dtype=x.dtype), targets.double())
    head = nn.Linear(features.shape[1], targets.shape[1])
    with torch.no_grad():
        head.weight.copy_(weight[:-1].mT)
        head.bias.copy_(weight[-1])
    return head


def logistic_head(features: Tensor, labels: Tensor, classes: int, decay: float) -> nn.Linear:
    """The classifier by cross entropy with weight decay, to convergence.

    Args:
        features: [n, D].
        labels: [n].
        classes: how many there are.
        decay: half the factor of the squared weights.
    """
    head = nn.Linear(features.shape[1], classes)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(head(features), labels) + decay * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return head
