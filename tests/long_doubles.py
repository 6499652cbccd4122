"""A cosine classifier's steps towards a small marginal entropy in long doubles, and their gradients by complex steps:
the judge where two forms in float64 differ because each of them rounds.

Complex steps: Im f(x + i h) / h is the derivative, without a difference that could cancel (Squire and Trapp, SIAM
Review 1998).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from cancelling import Results
from episodes import Episode

HAS_MORE_DIGITS = np.finfo(np.longdouble).eps < np.finfo(np.float64).eps / 100
TINY = np.longdouble(10) ** -60
AT_ONCE = 64  # directions

Array = np.ndarray[Any, Any]


def _unit(x: Array) -> Array:
    return x / np.sqrt((x * x).sum(-1, keepdims=True))


def _logits(
    support: Array,
    query: Array,
    weight: Array,
    scale: Array,
    bias: Array,
    labels: Array,
    N: int,
    steps: int,
    rate: float,
) -> Array:
    """[B, Q, N] of B variations of one task: support [B, S, D], query [B, Q, D], weight [B, D], scale and bias [B]."""
    support, query, scale, bias = _unit(support), _unit(query), scale[:, None, None], bias[:, None, None]
    theta = np.stack([support[:, labels == n].mean(1) for n in range(N)], 1) * weight[:, None]
    for _ in range(steps):
        z = scale * (query @ _unit(theta).swapaxes(1, 2) + bias)
        e = np.exp(z - z.real.max(-1, keepdims=True))
        p = e / e.sum(-1, keepdims=True)
        pull = -np.log(p.mean(1, keepdims=True))
        g = p * (pull - (p * pull).sum(-1, keepdims=True)) / query.shape[1]
        step, norm = g.swapaxes(1, 2) @ query, np.sqrt((theta * theta).sum(-1, keepdims=True))
        along = theta / norm
        theta = theta - rate * scale * (step - along * (along * step).sum(-1, keepdims=True)) / norm
    return scale * (query @ _unit(theta).swapaxes(1, 2) + bias)


def marginal_entropy_steps(episode: Episode, steps: int, rate: float) -> Results:
    """What `cancelling.run` returns for such a phase: logits, and gradients of the same linear function of them."""
    N, found = episode.mlp.weight1.shape[1], []
    for t in range(len(episode.support)):
        leaves = (episode.support[t], episode.query[t], episode.weight, episode.scale[0], episode.bias[0])
        values = [leaf.detach().numpy().astype(np.longdouble) for leaf in leaves]
        sizes = [v.size for v in values]
        point = np.concatenate([v.ravel() for v in values]).astype(np.clongdouble)

        def logits(points: Array, t: int = t, values: list[Array] = values, sizes: list[int] = sizes) -> Array:
            parts = np.split(points, np.cumsum(sizes)[:-1], axis=1)
            shaped = [p.reshape(len(points), *v.shape) for p, v in zip(parts, values, strict=True)]
            return _logits(*shaped, labels=episode.labels[t].numpy(), N=N, steps=steps, rate=rate)

        z = logits(point[None])[0].real
        g = torch.randn((1, *z.shape), generator=torch.Generator().manual_seed(t), dtype=torch.float64)[0].numpy()
        slopes = []
        for first in range(0, len(point), AT_ONCE):
            count = min(AT_ONCE, len(point) - first)
            moved = np.repeat(point[None], count, 0)
            moved[np.arange(count), first + np.arange(count)] += 1j * TINY
            slopes.append((logits(moved) * g).sum((1, 2)).imag / TINY)
        gradients = np.split(np.concatenate(slopes), np.cumsum(sizes)[:-1])
        found.append([z, *gradients, *(np.zeros(1) for _ in episode.mlp)])
    return [torch.from_numpy(np.stack([task[i] for task in found]).astype(np.float64)) for i in range(len(found[0]))]
