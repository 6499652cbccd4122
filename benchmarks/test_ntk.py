"""A perceptron's neural tangent kernel and 100 steps on it in every task, forward and backward, beside the same by its
layer formula in eager PyTorch and in JAX. ``python -m pytest benchmarks/test_ntk.py``; for medians of calls that take
turns, and for what more steps cost in memory, ``python -m benchmarks.test_ntk``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot, relu

import kernelmeta as km
from benchmarks import counts, floors, metadata, timing
from benchmarks.agreement import errors
from benchmarks.floors import Ceilings

WIDTHS, T, S, Q, STEPS = (640, 256, 256, 5), 64, 25, 75, 100
LR, DECAY = 1e-3, 1e-2


class Tasks(NamedTuple):
    support: Tensor
    query: Tensor
    targets: Tensor
    weights: list[Tensor]
    biases: list[Tensor]

    def to(self, dtype: torch.dtype) -> Tasks:
        return Tasks(*(t.to(dtype) if isinstance(t, Tensor) else [x.to(dtype) for x in t] for t in self))  # type: ignore[arg-type]

    def leaves(self) -> list[Tensor]:
        return [self.support, self.query, *self.weights, *self.biases]


def draw(T: int = T, steps: int = STEPS) -> Tasks:
    g = torch.Generator().manual_seed(0)
    weights = [torch.randn(n, m, generator=g) * (2 / m) ** 0.5 for m, n in pairwise(WIDTHS)]
    biases = [0.1 * torch.randn(n, generator=g) for n in WIDTHS[1:]]
    support, query = (torch.randn(T, n, WIDTHS[0], generator=g) / WIDTHS[0] ** 0.5 for n in (S, Q))
    targets = one_hot(torch.arange(S) % WIDTHS[-1]).float().expand(T, -1, -1).contiguous()
    return Tasks(support, query, targets, weights, biases)


def kernelmeta(tasks: Tasks, steps: int = STEPS) -> Tensor:
    return km.ops.linearised_descent(
        tasks.support, tasks.targets, tasks.query, tasks.weights, tasks.biases, steps=steps, lr=S * LR,
        weight_decay=DECAY,
    )  # fmt: skip


def op_and_steps(tasks: Tasks, steps: int = STEPS, *, full: bool = False) -> Tensor:
    """The kernel by `ntk_gram`, then the steps in PyTorch; by the trace over the outputs, as `eager_trace`."""
    kernel = km.ops.ntk_gram(tasks.support, tasks.query, tasks.weights, tasks.biases, full=full)
    fit = km.linear.descent(
        kernel.gram, tasks.targets, kernel.cross, steps=steps, lr=S * LR, weight_decay=DECAY,
        support_outputs=kernel.support_outputs, query_outputs=kernel.query_outputs,
    )  # fmt: skip
    return fit.outputs


def _layers(tasks: Tasks) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """A A^T + 1 and G of every layer, and the outputs, of support and query rows together."""
    x = torch.cat([tasks.support, tasks.query], 1)
    (w1, w2, w3), (b1, b2, b3) = tasks.weights, tasks.biases
    z1 = x @ w1.T + b1
    z2 = relu(z1) @ w2.T + b2
    G2 = w3 * (z2 > 0).unsqueeze(-2)
    G1 = (G2 @ w2) * (z1 > 0).unsqueeze(-2)
    inputs = [x, relu(z1), relu(z2)]
    return [a @ a[:, :S].mT + 1 for a in inputs], [G1, G2], inputs[2] @ w3.T + b3


def eager(tasks: Tasks, steps: int = STEPS) -> Tensor:
    """The layer formula as one would write it, outputs apart."""
    M, G, f = _layers(tasks)
    n, N = f.shape[1:]
    K = M[2][:, :, None, :, None] * torch.eye(N, dtype=f.dtype)[:, None]
    for m, g in zip(M, G, strict=False):
        K = K + m[:, :, None, :, None] * (g.flatten(1, 2) @ g[:, :S].flatten(1, 2).mT).view(-1, n, N, S, N)
    K = K.flatten(3).flatten(1, 2)
    gram, cross, start, y = K[:, : S * N], K[:, S * N :], f[:, :S].flatten(1), tasks.targets.flatten(1)
    p = torch.zeros_like(y)
    for _ in range(steps):
        p = (1 - S * LR * DECAY) * p - LR * (start + (gram @ p.unsqueeze(-1)).squeeze(-1) - y)
    return f[:, S:] + (cross @ p.unsqueeze(-1)).view(-1, Q, N)


def eager_trace(tasks: Tasks, steps: int = STEPS) -> Tensor:
    """The same with the trace over the outputs: another kernel, and a cheaper one."""
    M, G, f = _layers(tasks)
    K = WIDTHS[-1] * M[2]
    for m, g in zip(M, G, strict=False):
        K = K + m * (g.flatten(2) @ g[:, :S].flatten(2).mT)
    p = torch.zeros_like(tasks.targets)
    for _ in range(steps):
        p = (1 - S * LR * DECAY) * p - LR * (f[:, :S] + K[:, :S] @ p - tasks.targets)
    return f[:, S:] + K[:, S:] @ p


Form = Callable[[Tasks], Tensor]
Run = Callable[[], tuple[Tensor, list[Tensor]]]


def trained(form: Form, tasks: Tasks) -> Run:
    """Forward and backward, to rows and weights."""
    leaves = [t.detach().clone().requires_grad_() for t in tasks.leaves()]
    layers = len(WIDTHS) - 1
    own = Tasks(leaves[0], leaves[1], tasks.targets, leaves[2 : 2 + layers], leaves[2 + layers :])

    def run() -> tuple[Tensor, list[Tensor]]:
        z = form(own)
        return z.detach(), list(torch.autograd.grad(z.square().sum(), leaves))

    return run


def jax_trained(tasks: Tasks, *, full: bool) -> Run:
    """`eager` or `eager_trace` in jax.jit, the steps in a scan."""
    if importlib.util.find_spec("jax") is None:
        pytest.skip("jax is not installed (pip install jax)")
    import jax
    import jax.numpy as jnp
    import numpy as np

    y = jnp.asarray(tasks.targets.numpy())
    N = WIDTHS[-1]

    def outputs(leaves: Sequence[Any]) -> Any:
        support, query, w1, w2, w3, b1, b2, b3 = leaves
        x = jnp.concatenate([support, query], 1)
        z1 = x @ w1.T + b1
        z2 = jax.nn.relu(z1) @ w2.T + b2
        G2 = w3 * (z2 > 0)[:, :, None]
        G1 = (G2 @ w2) * (z1 > 0)[:, :, None]
        inputs = [x, jax.nn.relu(z1), jax.nn.relu(z2)]
        M = [jnp.einsum("tid,tjd->tij", a, a[:, :S]) + 1 for a in inputs]
        f = inputs[2] @ w3.T + b3
        if full:
            K = M[2][:, :, None, :, None] * jnp.eye(N)[:, None]
            for m, g in zip(M, (G1, G2), strict=False):
                K = K + m[:, :, None, :, None] * jnp.einsum("tich,tjeh->ticje", g, g[:, :S])
            move = lambda K, p: jnp.einsum("ticje,tje->tic", K, p)  # noqa: E731
        else:
            K = N * M[2]
            for m, g in zip(M, (G1, G2), strict=False):
                K = K + m * jnp.einsum("tich,tjch->tij", g, g[:, :S])
            move = lambda K, p: K @ p  # noqa: E731
        gram = K[:, :S]

        def step(p: Any, _: Any) -> tuple[Any, None]:
            return (1 - S * LR * DECAY) * p - LR * (f[:, :S] + move(gram, p) - y), None

        p, _ = jax.lax.scan(step, jnp.zeros_like(y), None, length=STEPS)
        return f[:, S:] + move(K[:, S:], p)

    def loss(leaves: Sequence[Any]) -> tuple[Any, Any]:
        z = outputs(leaves)
        return (z**2).sum(), z

    differentiate = jax.jit(jax.grad(loss, has_aux=True))
    given = tuple(jnp.asarray(t.numpy()) for t in tasks.leaves())

    def run() -> tuple[Tensor, list[Tensor]]:
        gradients, z = jax.block_until_ready(differentiate(given))
        return torch.from_numpy(np.array(z)), [torch.from_numpy(np.array(g)) for g in gradients]

    return run


# Contenders that compute the same, by kernel: of every output apart, or the trace.
FULL: dict[str, Callable[[Tasks], Run]] = {
    "kernelmeta": lambda tasks: trained(kernelmeta, tasks),
    "eager": lambda tasks: trained(eager, tasks),
    "jax": lambda tasks: jax_trained(tasks, full=True),
}
TRACE: dict[str, Callable[[Tasks], Run]] = {
    "ntk_gram, descent": lambda tasks: trained(op_and_steps, tasks),
    "eager, trace": lambda tasks: trained(eager_trace, tasks),
    "jax, trace": lambda tasks: jax_trained(tasks, full=False),
}


def checked(name: str, tasks: Tasks) -> Run:
    """The contender, after it has agreed with float64."""
    run = (FULL | TRACE)[name](tasks)
    want = trained(eager if name in FULL else eager_trace, tasks.to(torch.float64))()
    assert max(errors(run(), want)) <= 1e-4, name
    return run


@pytest.mark.parametrize("name", [*FULL, *TRACE])
def test_ntk(name: str, benchmark: Any, ceilings: Ceilings) -> None:
    run = checked(name, draw())
    benchmark.group = f"neural tangent kernel and {STEPS} steps, T={T} S={S} Q={Q} {WIDTHS}"
    floor = ceilings.floor(counts.linearised_descent(T, S, Q, WIDTHS, STEPS))
    benchmark.extra_info.update({"T": T, "S": S, "Q": Q, "peer": name, "floor_us": floor * 1e6})
    benchmark(run)


def _in_turn(run: Run) -> timing.Runner:
    return lambda _: run()


def main() -> None:
    torch.set_num_threads(2)
    facts = metadata.collect()
    print(", ".join(f"{name} {facts[name]}" for name in ("date", "commit", "processor", "load_average", "peers")))
    found = floors.measure()
    floor = found.floor(counts.linearised_descent(T, S, Q, WIDTHS, STEPS))
    print(f"2 threads: {found}; floor {floor * 1e3:.1f} ms")
    tasks = draw()
    runners = {name: checked(name, tasks) for name in (*FULL, *TRACE)}
    others = metadata.Others()
    timings = timing.interleave({name: _in_turn(run) for name, run in runners.items()}, seconds=6, rounds=9)
    busy = others.cpus()
    print(f"other processes kept {'?' if busy is None else f'{busy:.2f}'} CPUs busy")
    own = timings["kernelmeta"]
    for name, t in timings.items():
        middle, low, high = timing.ratio(t, own)
        at_best = f"{t.low * 1e3:.1f} ms, {t.low / own.low:.2f} x"
        print(f"{name:20} {t.median * 1e3:8.1f} ms {middle:6.2f} x ({low:.2f}-{high:.2f}); 10 % quantile {at_best}")
    for steps in (17, 100, 256, 10_000):
        peak = timing.peak_memory(_steps(tasks, steps))
        print(f"{steps:6} steps: {'?' if peak is None else f'{peak / 2**20:.1f}'} MB at the peak")


def _steps(tasks: Tasks, steps: int) -> Run:
    return trained(lambda own: kernelmeta(own, steps), tasks)


if __name__ == "__main__":
    main()
