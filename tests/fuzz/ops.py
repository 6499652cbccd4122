"""Ops of drawn shapes, rates and phases against loops in D dimensions, one task at a time, in float64.

The loops know nothing of the package but what its documentation says.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import batch_norm, cross_entropy, linear, normalize, relu

import kernelmeta as km


def mlp(z: Tensor, m: Any) -> Tensor:
    h = batch_norm(relu(linear(z, m[0], m[1])), None, None, m[2], m[3], training=True)
    h = batch_norm(relu(linear(h, m[4], m[5])), None, None, m[6], m[7], training=True)
    return linear(h, m[8], m[9])


def losses(name: str, z: Tensor, y: Tensor | None) -> Tensor:
    """Of every row."""
    if name == "entropy":
        return -(z.softmax(-1) * z.log_softmax(-1)).sum(-1)
    assert y is not None
    if name == "cross_entropy":
        return cross_entropy(z, y, reduction="none")
    target = torch.nn.functional.one_hot(y, z.shape[-1]).to(z)
    if name == "squared_error":
        return (z - target).square().sum(-1) / 2
    own = z.gather(-1, y[:, None])
    return (relu(1 + z - own) * (1 - target)).sum(-1)


def loop(x: Tensor, y: Tensor, q: Tensor, phases: Any, cosine: bool, theta: Tensor, own: dict[str, Any]) -> Tensor:
    """One task: [S, D], [S], [Q, D] -> logits [Q, N]."""
    b = own["shift"]

    def classify(rows: Tensor, theta: Tensor, b: Tensor) -> Tensor:
        if cosine:
            return own["scale"] * (own["bias"] + normalize(rows, dim=-1) @ normalize(theta, dim=-1).T)
        return rows @ theta.T + b

    for phase in phases:
        rows = x if phase.rows == "support" else q
        for _ in range(phase.steps):
            with torch.enable_grad():
                z = classify(rows, theta, b)
                moved = [theta] if cosine else [theta, b]
                if phase.oracle == "synthetic_gradient":
                    found = torch.autograd.grad(z, moved, mlp(z, own["mlp"]), create_graph=True)
                else:
                    loss = losses(phase.oracle, z, y if phase.rows == "support" else None).mean()
                    found = torch.autograd.grad(loss, moved, create_graph=True)
            theta = theta - phase.lr * found[0]
            if not cosine:
                b = b - phase.lr * found[1]
    return classify(q, theta, b)


def check(random: np.random.Generator, folder: Path) -> None:
    torch.manual_seed(int(random.integers(2**31)))
    N, T = int(random.integers(2, 6)), int(random.integers(1, 4))
    S, Q, D, H = N + int(random.integers(0, 8)), int(random.integers(2, 30)), int(random.integers(1, 40)), 5
    cosine = bool(random.integers(2))
    names = ["cross_entropy", "squared_error", "hinge", "entropy", "synthetic_gradient"]
    rate = float(10 ** random.uniform(-6, 0))
    phases = [
        km.nn.Phase(names[int(random.integers(len(names)))], int(random.integers(0, 3)), rate)
        for _ in range(int(random.integers(0, 3)))
    ]
    x, q = torch.randn(T, S, D).double(), torch.randn(T, Q, D).double()
    if random.integers(4) == 0:  # rows that repeat each other
        q = q[:, torch.randint(Q, (Q,))]
    if random.integers(4) == 0:
        x = x[:, torch.randint(S, (S,))]
    y = torch.stack([torch.cat([torch.arange(N), torch.randint(N, (S - N,))])[torch.randperm(S)] for _ in range(T)])
    sizes = ((H, N), (H,), (H,), (H,), (H, H), (H,), (H,), (H,), (N, H), (N,))
    parameters = km.MLPParameters(*(torch.randn(size).double() for size in sizes))
    scale, bias, start = torch.rand(1).double() * 9 + 1, torch.randn(1).double(), torch.randn(N, D).double()
    shift = torch.randn(N).double()
    leaves = [t.requires_grad_() for t in (x, q, start, *((scale, bias) if cosine else (shift,)))]
    own = {"scale": scale, "bias": bias, "shift": shift, "mlp": parameters}
    want = torch.stack([loop(x[t], y[t], q[t], phases, cosine, start * 1, own) for t in range(T)])
    got = km.ops.program(
        x, y, q, phases, n_way=N, classifier="cosine" if cosine else "linear", start=start,
        scale=scale if cosine else None, bias=bias if cosine else shift, mlp=parameters,
    )  # fmt: skip
    case = f"{cosine=} {T=} {S=} {Q=} {N=} {D=} {phases}"
    if not bool(want.isfinite().all()):
        return
    size = want.abs().max().clamp_min(1)
    assert float((got - want).detach().abs().max() / size.detach()) < 1e-8, f"logits differ: {case}"
    weights = torch.randn_like(want)
    pairs = zip(
        torch.autograd.grad((got * weights).sum(), leaves, allow_unused=True),
        torch.autograd.grad((want * weights).sum(), leaves, allow_unused=True),
        strict=True,
    )
    for mine, theirs in pairs:
        if theirs is not None and mine is not None and bool(theirs.isfinite().all()):
            assert float((mine - theirs).abs().max() / theirs.abs().max().clamp_min(1)) < 1e-6, f"gradients: {case}"
