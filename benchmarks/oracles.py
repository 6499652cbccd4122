"""Oracles that no other package has, beside the same written by hand: ``python -m benchmarks.oracles``.

A program of K steps on a cosine classifier, forward and backward into all its parameters: steps by the equivariant
gradient, towards known shares of the classes (`proportions`), and by transport to them (`assignment`). Beside it, for
all tasks at once, in D dimensions: eager PyTorch, whose inner steps are taken by autograd, and ``jax.jit`` of the same
under ``vmap``. Transport is what one would write: so many iterations of Sinkhorn, and autograd through them.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from benchmarks import metadata, timing
from kernelmeta import ops
from kernelmeta.mlp_parameters import MLPParameters
from kernelmeta.nn import EquivariantGradientMLP, Phase
from kernelmeta.reference.equivariant_gradient import equivariant_gradient_mlp

N, S, Q, STEPS = 5, 5, 75, 3
SINKHORN = 30  # iterations
ORACLES = {"equivariant_gradient": 0.01, "proportions": 0.1, "assignment": 0.1}  # name -> rate


class Inputs(NamedTuple):
    """Of T tasks, and what is learned."""

    support: Tensor  # [T, S, D]
    labels: Tensor
    query: Tensor  # [T, Q, D]
    answers: Tensor
    shares: Tensor  # [T, N]
    leaves: list[Tensor]  # weight [D], scale [1], bias [1], the MLP's


def draw(T: int, D: int, dtype: torch.dtype) -> Inputs:
    g = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    centres = torch.randn(T, N, D, generator=g)
    labels = torch.arange(S).remainder(N).expand(T, S).contiguous()
    answers = torch.randint(N, (T, Q), generator=g)

    def rows(of: Tensor) -> Tensor:
        own = centres.gather(1, of.unsqueeze(-1).expand(-1, -1, D))
        return (own + 1.5 * torch.randn(*of.shape, D, generator=g)).to(dtype)

    shares = torch.rand(T, N, generator=g).to(dtype) + 0.5
    mlp = EquivariantGradientMLP(16).to(dtype)
    leaves = [torch.ones(D, dtype=dtype), torch.full((1,), 10.0, dtype=dtype), torch.zeros(1, dtype=dtype)]
    leaves = [leaf.detach().clone().requires_grad_() for leaf in (*leaves, *mlp.tensors())]
    return Inputs(rows(labels), labels, rows(answers), answers, shares / shares.sum(-1, keepdim=True), leaves)


Call = Callable[[], tuple[Tensor, list[Tensor]]]  # logits and gradients


def _with_gradients(inputs: Inputs, logits: Tensor) -> tuple[Tensor, list[Tensor]]:
    loss = cross_entropy(logits.flatten(0, 1), inputs.answers.flatten())
    found = torch.autograd.grad(loss, inputs.leaves, allow_unused=True, materialize_grads=True)
    return logits.detach(), list(found)


def program(inputs: Inputs, oracle: str) -> Call:
    guesses = oracle == "equivariant_gradient"
    phase = Phase(oracle, STEPS, ORACLES[oracle], marginals="none" if guesses else "given")
    weight, scale, bias, *mlp = inputs.leaves

    def call() -> tuple[Tensor, list[Tensor]]:
        logits = ops.program(
            inputs.support, inputs.labels, inputs.query, [phase], n_way=N, weight=weight, scale=scale, bias=bias,
            mlp=MLPParameters(*mlp) if guesses else None,
            proportions=None if guesses else inputs.shares,
        )  # fmt: skip
        return _with_gradients(inputs, logits)

    return call


def eager(inputs: Inputs, oracle: str) -> Call:
    weight, scale, bias, *mlp = inputs.leaves
    rate, log_shares = ORACLES[oracle], inputs.shares.log()

    def guess(z: Tensor) -> Tensor:
        if oracle == "equivariant_gradient":
            return equivariant_gradient_mlp(z, MLPParameters(*mlp))
        p = z.softmax(-1)
        if oracle == "proportions":
            u = -(inputs.shares / p.mean(1)).unsqueeze(1)
            return p * (u - (p * u).sum(-1, keepdim=True)) / Q
        g = torch.zeros_like(log_shares)
        for _ in range(SINKHORN):
            g = g + log_shares - (z + g.unsqueeze(1)).softmax(-1).mean(1).log()
        return (p - (z + g.unsqueeze(1)).softmax(-1)) / Q

    def call() -> tuple[Tensor, list[Tensor]]:
        theta = ops.class_means(inputs.support, inputs.labels, N, weight)
        rows = normalize(inputs.query, dim=-1)

        def classify(theta: Tensor) -> Tensor:
            return scale * (bias + rows @ normalize(theta, dim=-1).mT)

        for _ in range(STEPS):
            z = classify(theta)
            (step,) = torch.autograd.grad(z, theta, guess(z), create_graph=True)
            theta = theta - rate * step
        return _with_gradients(inputs, classify(theta))

    return call


def jax_jit(inputs: Inputs, oracle: str) -> Call:
    import jax
    import jax.numpy as jnp
    from jax.nn import log_softmax, relu, softmax

    jax.config.update("jax_enable_x64", inputs.query.dtype == torch.float64)
    rate = ORACLES[oracle]

    def unit(x: Any) -> Any:
        return x / jnp.maximum(jnp.sqrt(jnp.sum(x * x, -1, keepdims=True)), 1e-12)

    def normalise(h: Any) -> Any:
        return (h - h.mean(0)) * jax.lax.rsqrt(h.var(0) + 1e-5)

    def of_pairs(z: Any, p: Any) -> Any:
        log_p = log_softmax(z)
        q = jnp.exp(log_p)
        mass = N * q.mean(0) + 1e-9
        others = q @ (1 - jnp.eye(N, dtype=z.dtype))
        odds = log_p - jnp.log(jnp.maximum(others, 1e-30))
        inputs = (
            jnp.maximum(log_p, -20), q, jnp.log(mass), jnp.clip(odds, -20, 20), -(q * log_p).sum(-1, keepdims=True),
            z - z.mean(0), q / mass,
        )  # fmt: skip
        pairs = normalise(jnp.stack([jnp.broadcast_to(i, z.shape) for i in inputs], -1).reshape(-1, len(inputs)))
        h = normalise(relu(pairs @ p[0].T + p[1])) * p[2] + p[3]
        h = normalise(relu(h @ p[4].T + p[5])) * p[6] + p[7]
        return (h @ p[8].T + p[9]).reshape(z.shape)

    def guess(z: Any, mlp: Any, shares: Any) -> Any:
        if oracle == "equivariant_gradient":
            return of_pairs(z, mlp)
        p = softmax(z)
        if oracle == "proportions":
            u = -shares / p.mean(0)
            return p * (u - (p * u).sum(-1, keepdims=True)) / Q
        g = jnp.zeros_like(shares)
        for _ in range(SINKHORN):
            g = g + jnp.log(shares) - jnp.log(softmax(z + g).mean(0))
        return (p - softmax(z + g)) / Q

    def head(parameters: Any, support: Any, labels: Any, query: Any, shares: Any) -> Any:
        weight, scale, bias, *mlp = parameters
        members = jax.nn.one_hot(labels, N, dtype=weight.dtype)
        theta = members.T @ unit(support) / members.sum(0)[:, None] * weight
        rows = unit(query)

        def classify(theta: Any) -> Any:
            return scale * (bias + rows @ unit(theta).T)

        for _ in range(STEPS):
            z, pull_back = jax.vjp(classify, theta)
            (step,) = pull_back(guess(z, mlp, shares))
            theta = theta - rate * step
        return classify(theta)

    def loss(parameters: Any, data: Any, answers: Any) -> Any:
        logits = jax.vmap(head, in_axes=(None, 0, 0, 0, 0))(parameters, *data)
        return -jnp.take_along_axis(log_softmax(logits), answers[..., None], -1).mean(), logits

    def array(t: Tensor) -> Any:
        return jnp.asarray(t.detach().numpy().copy())

    data = tuple(map(array, (inputs.support, inputs.labels, inputs.query, inputs.shares)))
    answers, parameters = array(inputs.answers), [array(leaf) for leaf in inputs.leaves]
    differentiate = jax.jit(jax.grad(loss, has_aux=True))

    def call() -> tuple[Tensor, list[Tensor]]:
        gradients, logits = jax.block_until_ready(differentiate(parameters, data, answers))
        return torch.from_dlpack(logits), [torch.from_dlpack(g) for g in gradients]

    return call


def contenders() -> dict[str, Callable[[Inputs, str], Call]]:
    """What is here; without jax the two others."""
    found: dict[str, Callable[[Inputs, str], Call]] = {"program": program, "eager": eager}
    if importlib.util.find_spec("jax"):
        found["jax.jit"] = jax_jit
    return found


def error(found: tuple[Tensor, list[Tensor]], want: tuple[Tensor, list[Tensor]]) -> float:
    """The largest of logits and of each gradient, in the 2-norm, relative."""
    pairs = zip((found[0], *found[1]), (want[0], *want[1]), strict=True)
    return max(float((a - b).double().norm() / b.double().norm().clamp_min(1e-6)) for a, b in pairs)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.oracles", description=__doc__)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--seconds", type=float, default=1.0, help="for each thing timed")
    parser.add_argument("--features", type=int, default=640)
    options = metadata.parse(parser, arguments)
    torch.set_num_threads(options.threads)
    peers = contenders()
    print(f"{options.threads} threads; float32; {N} ways, {S} support and {Q} query rows, D = {options.features},")
    print(f"{STEPS} steps; forward and backward into the parameters; medians; ratios to the program\n")
    print("| oracle | tasks | " + " | ".join(f"{name}, us" for name in peers) + " | ratios |")
    print("| --- | ---: |" + " ---: |" * (len(peers) + 1))
    for oracle in ORACLES:
        for T in (1, 64):
            inputs = draw(T, options.features, torch.float32)
            calls = {name: make(inputs, oracle) for name, make in peers.items()}
            found = timing.interleave({name: _runner(call) for name, call in calls.items()}, seconds=options.seconds)
            ours = found["program"].median
            times = " | ".join(f"{t.median * 1e6:.0f}" for t in found.values())
            ratios = ", ".join(f"{t.median / ours:.1f}" for name, t in found.items() if name != "program")
            print(f"| {oracle} | {T} | {times} | {ratios} |", flush=True)
    return 0


def _runner(call: Call) -> timing.Runner:
    def run(_: int) -> None:
        call()

    return run


if __name__ == "__main__":
    sys.exit(main())
