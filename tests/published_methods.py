"""The transductive methods as their papers state them: one task at a time, loops and autograd, nothing shared with the
package. Tasks: support [S, D], labels [S], query [Q, D], ways.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def means(support: Tensor, labels: Tensor, N: int) -> Tensor:
    return torch.stack([support[labels == n].mean(0) for n in range(N)])


def sinkhorn(kernel: Tensor, columns: Tensor) -> Tensor:
    """Rows that sum to 1 and columns to these, by scaling the kernel itself (Cuturi 2013)."""
    plan = kernel / kernel.sum()
    before = torch.zeros(len(plan), dtype=plan.dtype)
    for _ in range(1000):
        if not (before - plan.sum(1)).abs().max() > 1e-6:
            break
        before = plan.sum(1)
        plan = plan / before[:, None]
        plan = plan * torch.where(columns > 0, columns / plan.sum(0), 0.0)[None, :]
    return plan


def pt_map(support, labels, query, N, steps=20, rate=0.2, sharpness=10.0, proportions=None) -> Tensor:
    columns = len(query) * (torch.full((N,), 1 / N, dtype=query.dtype) if proportions is None else proportions)
    centers = means(support, labels, N)

    def assign() -> Tensor:
        squared = (query[:, None] - centers[None]).square().sum(2)
        return sinkhorn((-sharpness * squared).exp(), columns)

    for _ in range(steps):
        plan = assign()
        for n in range(N):
            own = support[labels == n]
            estimate = (own.sum(0) + plan[:, n] @ query) / (len(own) + plan[:, n].sum())
            centers[n] += rate * (estimate - centers[n])
    return assign().log()


def sinkhorn_kmeans(support, labels, query, N, steps=10, scale=10.0, proportions=None) -> Tensor:
    columns = len(query) * (torch.full((N,), 1 / N, dtype=query.dtype) if proportions is None else proportions)
    support, query = support / support.norm(dim=1, keepdim=True), query / query.norm(dim=1, keepdim=True)
    theta = means(support, labels, N)

    def assign() -> Tensor:
        return sinkhorn((scale * query @ (theta / theta.norm(dim=1, keepdim=True)).T).exp(), columns)

    for _ in range(steps):
        plan = assign()
        theta = torch.stack(
            [
                (support[labels == n].sum(0) + plan[:, n] @ query) / ((labels == n).sum() + plan[:, n].sum())
                for n in range(N)
            ]
        )
    return assign().log()


def tim(
    support, labels, query, N, steps=1000, rate=1e-4, temperature=15.0, weights=(1.0, 1.0, 1.0), alpha=None,
    classifier="euclidean", proportions=None, descent=torch.optim.Adam,
) -> Tensor:  # fmt: skip
    """Boudiaf et al. 2020; with an alpha, Veilleux et al. 2021. ``weights``: of the cross-entropy, of the marginal
    entropy, of the conditional entropy.
    """
    w = means(support, labels, N).requires_grad_()
    optimizer = descent([w], lr=rate)

    def logits(x: Tensor) -> Tensor:
        if classifier == "cosine":
            return temperature * torch.nn.functional.cosine_similarity(x[:, None], w[None], dim=2)
        return -temperature / 2 * (x[:, None] - w[None]).square().sum(2)

    def entropy(p: Tensor) -> Tensor:
        return -(p * p.log()).sum(-1) if alpha is None else (1 - (p**alpha).sum(-1)) / (alpha - 1)

    for _ in range(steps):
        p = logits(query).softmax(1)
        marginal = entropy(p.mean(0)) if proportions is None else (proportions * p.mean(0).log()).sum()
        loss = weights[0] * torch.nn.functional.cross_entropy(logits(support), labels)
        loss = loss - weights[1] * marginal + weights[2] * entropy(p).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return logits(query).detach()


def rectified(support, labels, query, N, scale) -> Tensor:
    """Liu et al. 2020."""
    first = means(support, labels, N)
    shifted = query + support.mean(0) - query.mean(0)
    cosine = torch.nn.functional.cosine_similarity
    guessed = cosine(shifted[:, None], first[None], dim=2).argmax(1)
    found = []
    for n in range(N):
        members = torch.cat([support[labels == n], shifted[guessed == n]])
        weights = (scale * cosine(members, first[n][None], dim=1)).exp()
        found.append((weights / weights.sum()) @ members)
    return torch.stack(found)


def bd_cspn(support, labels, query, N, scale=10.0) -> Tensor:
    centers = rectified(support, labels, query, N, scale)
    return scale * torch.nn.functional.cosine_similarity(query[:, None], centers[None], dim=2)


def laplacian_shot(support, labels, query, N, steps=20, neighbours=2, strength=0.7, rectify=True, scale=10.0) -> Tensor:
    """Ziko et al. 2020."""
    centers = rectified(support, labels, query, N, scale) if rectify else means(support, labels, N)
    a = torch.cdist(query, centers, compute_mode="donot_use_mm_for_euclid_dist").square()
    Q = len(query)
    W = torch.zeros(Q, Q, dtype=query.dtype)
    for q in range(Q):
        by_distance = (query - query[q]).norm(dim=1).argsort().tolist()
        by_distance.remove(q)
        for other in by_distance[:neighbours]:
            W[q, other] = 1
    Y, before = (-a).softmax(1), math.inf
    for step in range(steps):
        Y = (strength * W @ Y - a).softmax(1)
        bound = float((Y * Y.clamp_min(1e-20).log() + a * Y - strength * (W @ Y) * Y).sum())
        if step > 1 and abs(bound - before) <= 1e-6 * abs(before):
            break
        before = bound
    return Y.log()
