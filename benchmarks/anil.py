"""Second-order ANIL beside its peers: ``python -m benchmarks.anil``.

A linear head shared by all tasks takes K steps of gradient descent on the mean cross entropy of each task's support
rows; timed are these, the mean cross entropy of the query rows and its gradients in the head's two tensors, through all
steps. Every peer is checked against the task-by-task loop in float64 before it is timed.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import agreement, metadata, timing
from benchmarks.peers import OWN, PeerRunner, Result, Unavailable
from kernelmeta import nn

LR = 0.05


class AnilSize(NamedTuple):
    """One cell; Q is 15 N."""

    T: int = 1
    N: int = 5
    S: int = 5
    D: int = 640
    K: int = 5

    @property
    def Q(self) -> int:
        return 15 * self.N


CELLS = [AnilSize(T=T, S=S) for S in (5, 25) for T in (1, 64)]


class AnilProblem(NamedTuple):
    """Several copies of the inputs, to be used in turn; the head is [N, D], [N]."""

    size: AnilSize
    batches: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]]  # support, labels, query, answers
    weight: Tensor
    bias: Tensor

    def double(self) -> AnilProblem:
        wide = [(s.double(), labels, q.double(), answers) for s, labels, q, answers in self.batches]
        return AnilProblem(self.size, wide, self.weight.double(), self.bias.double())

    def head(self) -> list[Tensor]:
        return [t.detach().clone().requires_grad_() for t in (self.weight, self.bias)]


def draw(size: AnilSize, copies: int = 4) -> AnilProblem:
    """Features like a backbone's, of length 1."""
    T, N, S, D, _ = size
    generator = torch.Generator().manual_seed(0)

    def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        centres = torch.randn(T, N, D, generator=generator)
        labels, answers = ((torch.arange(n) % N).expand(T, n).contiguous() for n in (S, size.Q))
        rows = []
        for of in (labels, answers):
            means = centres.gather(1, of.unsqueeze(-1).expand(-1, -1, D))
            rows.append(F.normalize((means + torch.randn(means.shape, generator=generator)).relu(), dim=-1))
        return rows[0], labels, rows[1], answers

    weight = torch.randn(N, D, generator=generator) / D**0.5
    return AnilProblem(size, [batch() for _ in range(copies)], weight, torch.zeros(N))


def _runner(problem: AnilProblem, run: Callable[[Sequence[Tensor], list[Tensor]], Tensor]) -> PeerRunner:
    """``run(batch, head)`` leaves gradients in the head and returns the logits [T, Q, N]."""
    leaves = problem.head()

    def train(i: int) -> Result:
        for leaf in leaves:
            leaf.grad = None
        logits = run(problem.batches[i % len(problem.batches)], leaves)
        return logits.detach(), [leaf.grad for leaf in leaves]

    return train


def _query_loss(logits: Tensor, answers: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), answers.flatten())


def _module(problem: AnilProblem) -> nn.ANIL:
    size = problem.size
    module = nn.ANIL(size.N, size.D, size.K, LR).to(problem.weight.dtype)
    with torch.no_grad():
        module.weight.copy_(problem.weight)
        module.bias.copy_(problem.bias)
    return module


def _at_once(problem: AnilProblem) -> PeerRunner:
    module = _module(problem)

    def train(i: int) -> Result:
        module.weight.grad = module.bias.grad = None
        logits = module.gradients(*problem.batches[i % len(problem.batches)]).logits
        return logits, [module.weight.grad, module.bias.grad]

    return train


def _kernelmeta(problem: AnilProblem) -> PeerRunner:
    module = _module(problem)

    def train(i: int) -> Result:
        support, labels, query, answers = problem.batches[i % len(problem.batches)]
        module.weight.grad = module.bias.grad = None
        logits = module(support, labels, query)
        _query_loss(logits, answers).backward()
        return logits.detach(), [module.weight.grad, module.bias.grad]

    return train


def _loop(problem: AnilProblem) -> PeerRunner:
    """One task after the other, how learn2learn's examples are written."""
    size = problem.size

    def run(batch: Sequence[Tensor], head: list[Tensor]) -> Tensor:
        found = []
        for support, labels, query, answers in zip(*batch, strict=True):
            weight, bias = head
            for _ in range(size.K):
                loss = F.cross_entropy(F.linear(support, weight, bias), labels)
                steps = torch.autograd.grad(loss, (weight, bias), create_graph=True)
                weight, bias = weight - LR * steps[0], bias - LR * steps[1]
            logits = F.linear(query, weight, bias)
            (F.cross_entropy(logits, answers) / size.T).backward()
            found.append(logits.detach())
        return torch.stack(found)

    return _runner(problem, run)


def _higher(problem: AnilProblem) -> PeerRunner:
    try:
        import higher
    except ImportError:
        raise Unavailable("higher is not installed (pip install higher)") from None
    size = problem.size
    module = torch.nn.Linear(size.D, size.N).to(problem.weight.dtype)
    with torch.no_grad():
        module.weight.copy_(problem.weight)
        module.bias.copy_(problem.bias)
    optimizer = torch.optim.SGD(module.parameters(), lr=LR)

    def train(i: int) -> Result:
        module.weight.grad = module.bias.grad = None
        found = []
        for support, labels, query, answers in zip(*problem.batches[i % len(problem.batches)], strict=True):
            with higher.innerloop_ctx(module, optimizer, copy_initial_weights=False) as (inner, steps):
                for _ in range(size.K):
                    steps.step(F.cross_entropy(inner(support), labels))
                logits = inner(query)
                (F.cross_entropy(logits, answers) / size.T).backward()
            found.append(logits.detach())
        return torch.stack(found), [module.weight.grad, module.bias.grad]

    return train


def _batched(problem: AnilProblem) -> PeerRunner:
    """All tasks at once: a copy of the head for each, one autograd.grad a step."""
    size = problem.size

    def run(batch: Sequence[Tensor], head: list[Tensor]) -> Tensor:
        support, labels, query, answers = batch
        weight = head[0].expand(size.T, -1, -1)
        bias = head[1].expand(size.T, 1, -1)
        for _ in range(size.K):
            logits = torch.baddbmm(bias, support, weight.transpose(1, 2))
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / size.S
            steps = torch.autograd.grad(loss, (weight, bias), create_graph=True)
            weight, bias = weight - LR * steps[0], bias - LR * steps[1]
        logits = torch.baddbmm(bias, query, weight.transpose(1, 2))
        _query_loss(logits, answers).backward()
        return logits

    return _runner(problem, run)


def _functional(problem: AnilProblem, compiled: bool) -> PeerRunner:
    """torch.func: grad of the inner loss, vmap over tasks, grad around it."""

    def adapt(head: tuple[Tensor, Tensor], support: Tensor, labels: Tensor, query: Tensor) -> Tensor:
        def loss(head: tuple[Tensor, Tensor]) -> Tensor:
            return F.cross_entropy(F.linear(support, *head), labels)

        for _ in range(problem.size.K):
            steps = torch.func.grad(loss)(head)
            head = (head[0] - LR * steps[0], head[1] - LR * steps[1])
        return F.linear(query, *head)

    heads = torch.func.vmap(adapt, in_dims=(None, 0, 0, 0))

    def meta_loss(head: tuple[Tensor, Tensor], *batch: Tensor) -> tuple[Tensor, Tensor]:
        logits = heads(head, *batch[:3])
        return _query_loss(logits, batch[3]), logits

    differentiate = torch.func.grad(meta_loss, has_aux=True)
    if compiled:
        torch.compiler.reset()
        differentiate = torch.compile(differentiate, dynamic=False)
    head = (problem.weight, problem.bias)

    def train(i: int) -> Result:
        gradients, logits = differentiate(head, *problem.batches[i % len(problem.batches)])
        return logits, list(gradients)

    return train


def _jax(problem: AnilProblem) -> PeerRunner:
    try:
        import jax
        import jax.numpy as jnp
    except ImportError:
        raise Unavailable("jax is not installed (pip install jax)") from None
    jax.config.update("jax_enable_x64", problem.weight.dtype is torch.float64)

    def cross_entropy(logits: Any, answers: Any) -> Any:
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), answers[..., None], -1).mean()

    def adapt(head: Any, support: Any, labels: Any, query: Any) -> Any:
        def loss(head: Any) -> Any:
            return cross_entropy(support @ head[0].T + head[1], labels)

        for _ in range(problem.size.K):
            steps = jax.grad(loss)(head)
            head = (head[0] - LR * steps[0], head[1] - LR * steps[1])
        return query @ head[0].T + head[1]

    heads = jax.vmap(adapt, in_axes=(None, 0, 0, 0))

    def meta_loss(head: Any, *batch: Any) -> Any:
        logits = heads(head, *batch[:3])
        return cross_entropy(logits, batch[3]), logits

    differentiate = jax.jit(jax.grad(meta_loss, has_aux=True))
    head = tuple(jnp.asarray(t.numpy()) for t in (problem.weight, problem.bias))
    batches = [tuple(jnp.asarray(t.numpy()) for t in batch) for batch in problem.batches]

    def train(i: int) -> Result:
        gradients, logits = jax.block_until_ready(differentiate(head, *batches[i % len(batches)]))
        return logits, list(gradients)

    return train


PEERS: dict[str, tuple[str, Callable[[AnilProblem], PeerRunner]]] = {
    "kernelmeta": ("kernelmeta, km.nn.ANIL", _kernelmeta),
    "at_once": ("kernelmeta, km.nn.ANIL.gradients", _at_once),
    "loop": ("eager, task by task", _loop),
    "higher": ("higher, task by task", _higher),
    "batched": ("eager, all tasks at once", _batched),
    "vmap": ("torch.func: grad(vmap(grad))", lambda problem: _functional(problem, False)),
    "compile": ("torch.compile of it", lambda problem: _functional(problem, True)),
    "jax": ("jax.jit(grad(vmap(grad)))", _jax),
}


def checked(problem: AnilProblem, names: Sequence[str], tolerance: float) -> tuple[dict[str, PeerRunner], list[str]]:
    """The peers that agree with the loop in float64, and what was left out, and why.

    Raises:
        Disagreement: kernelmeta does not agree, either way of calling it.
    """
    want = _loop(problem.double())(0)
    runners, notes = {}, []
    for name in names:
        try:
            runner = PEERS[name][1](problem)
            worst = max(agreement.errors(runner(0), want))
        except Unavailable as reason:
            notes.append(f"{name} left out: {reason}")
            continue
        if worst <= tolerance:
            runners[name] = runner
        elif name in OWN:
            raise agreement.Disagreement(f"{problem.size}: off by {worst:.1e} (allowed {tolerance:.0e})")
        else:
            notes.append(f"{name} left out: off by {worst:.1e} (allowed {tolerance:.0e})")
    return runners, notes


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.anil", description=__doc__)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--seconds", type=float, default=2.0, help="for each peer of each cell")
    parser.add_argument("--peers", nargs="+", choices=tuple(PEERS), default=list(PEERS))
    options = metadata.parse(parser, arguments)
    torch.set_num_threads(options.threads)
    names = ["kernelmeta", *(name for name in options.peers if name != "kernelmeta")]
    print(f"{options.threads} threads; float32; forward, cross entropy and backward")
    print("| T | N | S | Q | D | K | what | ms: median (10-90 %) | time / kernelmeta: median (range over rounds) |")
    print("|" + " ---: |" * 6 + " --- |" + " ---: |" * 2)
    for size in CELLS:
        runners, notes = checked(draw(size), names, 1e-4)
        found = timing.interleave(runners, seconds=options.seconds)
        for name in sorted(found, key=lambda n: found[n].median):
            t = found[name]
            median, least, most = timing.ratio(t, found["kernelmeta"])
            numbers = [size.T, size.N, size.S, size.Q, size.D, size.K, PEERS[name][0]]
            numbers.append(f"{t.median * 1e3:.3f} ({t.low * 1e3:.3f}-{t.high * 1e3:.3f})")
            print("|", *(f"{x} |" for x in numbers), f"{median:.1f} ({least:.1f}-{most:.1f}) |")
        print("".join(f"{note}\n" for note in notes), end="", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
