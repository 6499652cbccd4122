"""Oracles: the losses whose gradient with respect to the logits moves a classifier.

Each as the loss of one row, and as its gradient G; the loss of a task is the mean over its rows. To add one: an entry
here, and for the kernels a struct in ``csrc/engine/oracles.h`` (G, and its derivative).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import one_hot, relu


class Oracle(NamedTuple):
    """Functions of logits [..., R, N] and, where ``labelled``, of labels [..., R]."""

    labelled: bool
    loss: Callable[..., Tensor]  # [..., R]
    gradient: Callable[..., Tensor]  # [..., R, N]


def _target(logits: Tensor, labels: Tensor) -> Tensor:
    return one_hot(labels, logits.shape[-1]).to(logits.dtype)


def _margins(logits: Tensor, labels: Tensor) -> Tensor:
    """1 + z[n] - z[label]; 0 for the label itself."""
    return (1 + logits - logits.gather(-1, labels.unsqueeze(-1))) * (1 - _target(logits, labels))


def _hinge_gradient(logits: Tensor, labels: Tensor) -> Tensor:
    margins = _margins(logits.detach(), labels)
    violated = (margins > 0).to(logits.dtype) + 0 * margins  # NaN stays NaN
    return violated - violated.sum(-1, keepdim=True) * _target(logits, labels)


def _entropy_gradient(logits: Tensor) -> Tensor:
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    return -p * (log_p - (p * log_p).sum(-1, keepdim=True))


ORACLES = {
    # -log softmax(z)[label]
    "cross_entropy": Oracle(
        True,
        lambda z, y: -z.log_softmax(-1).gather(-1, y.unsqueeze(-1)).squeeze(-1),
        lambda z, y: z.softmax(-1) - _target(z, y),
    ),
    # |z - one_hot(label)|^2 / 2
    "squared_error": Oracle(
        True,
        lambda z, y: (z - _target(z, y)).square().sum(-1) / 2,
        lambda z, y: z - _target(z, y),
    ),
    # the sum over the other classes of max(0, 1 + z[n] - z[label]) (Weston & Watkins, ESANN 1999)
    "hinge": Oracle(True, lambda z, y: relu(_margins(z, y)).sum(-1), _hinge_gradient),
    # -sum p log p of p = softmax(z) (Grandvalet & Bengio, NeurIPS 2004)
    "entropy": Oracle(False, lambda z: -(z.softmax(-1) * z.log_softmax(-1)).sum(-1), _entropy_gradient),
    # -log sum exp(z): every row pulls at the classes that it may be of, as in soft k-means
    "soft_assignment": Oracle(False, lambda z: -z.logsumexp(-1), lambda z: -z.softmax(-1)),
}
