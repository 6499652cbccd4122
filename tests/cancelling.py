"""Tasks whose steps cancel in the space of the rows (csrc/engine/cosine_step.h), and how results on them are judged:
against the form in D dimensions, step by step, and against what that form itself loses in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from episodes import Episode, draw, draw_mlp

import kernelmeta as km
from kernelmeta.phases import GUESSED

SHAPES = {  # ways, support rows, query rows, features
    "1-shot": (5, 5, 15, 64),
    "2-way": (2, 2, 15, 64),
    "few features": (5, 10, 20, 8),
    "one feature": (3, 3, 20, 1),
}
ROWS = ("random", "positive", "duplicate", "collinear")
RATES = (1e-6, 1e-3, 0.1, 0.5, 10.0)
TASKS = 7

Results = list[torch.Tensor]  # of every task: [T, ...]


def draw_tasks(shape: str, rows: str, seed: int = 0, tasks: int = TASKS) -> Episode:
    N, S, Q, D = SHAPES[shape]
    episode = draw(T=tasks, S=S, Q=Q, N=N, D=D, H=8, seed=seed)
    support, query = episode.support, episode.query
    if rows == "positive":
        support, query = support.relu() + 0.05, query.relu() + 0.05
    elif rows == "duplicate":
        query = query[:, torch.arange(Q) % (Q // 4)]
        support = support[:, torch.arange(S) % max(2, S // 4)]
    elif rows == "collinear":
        g = torch.Generator().manual_seed(seed)
        query = query[:, :1] * torch.randn(tasks, Q, 1, dtype=query.dtype, generator=g)
    scale = torch.full_like(episode.scale, 10)
    # Numbers that float32 holds.
    return episode._replace(support=support, query=query, scale=scale).map(lambda t: t.float().double())


def program(episode: Episode, phase: km.nn.Phase) -> torch.Tensor:
    support, labels, query, weight, scale, bias, mlp = episode
    N = mlp.weight1.shape[1]
    if phase.oracle == "equivariant_gradient":  # its seven inputs, each of which a few of those at hand make up
        spread = torch.arange(7 * N, dtype=mlp.weight1.dtype).view(7, N).cos()
        mlp = mlp._replace(weight1=mlp.weight1 @ spread.mT, weight3=mlp.weight3[:1], bias3=mlp.bias3[:1])
    return km.ops.program(
        support, labels, query, [phase], n_way=N, weight=weight, scale=scale, bias=bias,
        mlp=mlp if phase.oracle in GUESSED else None,
    )  # fmt: skip


def sib(episode: Episode, rate: float) -> torch.Tensor:
    return km.ops.sib(*episode.arguments(), steps=3, inner_lr=rate)


def run(f: Callable[[Episode], torch.Tensor], episode: Episode, dtype: torch.dtype, backend: str) -> Results:
    """Logits, and the gradients of a random linear function of them in features and parameters, of every task."""
    T = len(episode.support)

    found = []
    for t in range(T):  # one at a time: parameters have gradients of their own
        own = episode._replace(
            support=episode.support[t : t + 1], labels=episode.labels[t : t + 1], query=episode.query[t : t + 1]
        ).fresh(dtype)
        with km.use_backend(backend):
            logits = f(own)
        g = torch.randn(logits.shape, generator=torch.Generator().manual_seed(t), dtype=torch.float64).to(dtype)
        grads = torch.autograd.grad((logits * g).sum(), own.leaves(), allow_unused=True)
        found.append(
            [
                logits.detach(),
                *(torch.zeros_like(p) if d is None else d for d, p in zip(grads, own.leaves(), strict=True)),
            ]
        )
    return [torch.stack([task[i] for task in found]) for i in range(len(found[0]))]


def errors(got: Results, want: Results) -> torch.Tensor:
    """[T, results]: the largest error over the largest value (at least 1e-3); infinite where not finite."""

    def of(g: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        g, w = g.double().flatten(1), w.double().flatten(1)
        error = (g - w).abs().amax(1) / w.abs().amax(1).clamp_min(1e-3)
        return error.nan_to_num(nan=float("inf"))

    return torch.stack([of(g, w) for g, w in zip(got, want, strict=True)], 1)


def judge(
    f: Callable[[Episode], torch.Tensor],
    episode: Episode,
    backend: str,
    exact: float = 1e-9,
    few: float = 1e-6,
    want: Results | None = None,
) -> dict[str, Any]:
    """Complaints by precision; empty if there are none.

    Args:
        exact: what float64 may differ by.
        few: the error of logits that a few roundings in float32 make.
        want: what is right; the reference's results in float64 if not given.
    """
    want = want or run(f, episode, torch.float64, "reference")
    plain = errors(run(f, episode, torch.float32, "reference"), want)
    double = errors(run(f, episode, torch.float64, backend), want)
    single = errors(run(f, episode, torch.float32, backend), want)
    complaints: dict[str, Any] = {}
    # Where float32 loses everything, so does float64 of what it has more, whatever the form.
    ratio = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    most = (30 * plain.amax(1, keepdim=True) * ratio).clamp_min(exact)
    if (double > most)[torch.isfinite(plain)].any():
        complaints["float64"] = (double.amax(0), most.amax())
    if (torch.isfinite(plain) & ~torch.isfinite(single)).any():
        complaints["not finite in float32"] = single.amax(0)
    # The MLP's parameters have errors of their own, of its normalisation, whatever the steps.
    plain, single = plain[:, :-10], single[:, :-10]
    # Errors of a few roundings are alike, however they are counted; where most digits are lost, so much hangs on the
    # draw that the median of a few says little.
    floor = torch.tensor([few, *[1e-5] * (plain.shape[1] - 1)], dtype=plain.dtype)
    usual = plain.median(0).values.maximum(floor)
    most = torch.where(usual < 1e-4, 3, 30)
    if (single.median(0).values > most * usual).any():
        complaints["float32"] = (single.median(0).values, plain.median(0).values)
    return complaints


def bias_gradients(backend: str, dtype: torch.dtype) -> torch.Tensor:
    """Gradients of bias1, bias2 and shift1 of MLPs whose units are never switched off: normalisation makes them zero,
    of large terms. What is left is their error.
    """
    errors = torch.zeros(3)
    for seed in range(4):
        g = torch.Generator().manual_seed(seed)
        mlp = draw_mlp(5, 8, torch.float64, g)
        mlp = mlp._replace(bias1=mlp.bias1.abs() + 20, bias2=mlp.bias2.abs() + 20)
        for spread in (1e-1, 1e-2, 1e-3, 1e-4):  # of the activations, to whose variance 1e-5 is added
            logits, weights = (torch.randn(3, 20, 5, dtype=torch.float64, generator=g) for _ in range(2))
            leaves = [p.to(dtype).requires_grad_() for p in mlp]
            with km.use_backend(backend):
                out = km.ops.synthetic_gradient_mlp(spread * logits.to(dtype), type(mlp)(*leaves))
            of = type(mlp)(*torch.autograd.grad((out * weights.to(dtype)).sum(), leaves))
            errors += spread * torch.stack([p.abs().max().float() for p in (of.bias1, of.bias2, of.shift1)])
    return errors
