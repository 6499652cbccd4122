"""What inner steps cost, and what unequal tasks cost: ``python -m benchmarks.programs``.

1. Time per inner step, forward and backward: (time of 110 steps - time of 10) / 100, for 64, 640 and 6400 features.
   In the space of the rows a step does not see D. (The Gram matrix, which does, is in both.)
2. A ragged batch against the same tasks in even batches: 16 tasks of different sizes in one call, and, for each of
   their sizes, an even batch of 16 such tasks, a sixteenth of whose time counts.
3. Joint steps: TIM by gradient descent as a program, forward, beside the same as somebody would write it in PyTorch.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from benchmarks import metadata, timing
from kernelmeta.nn import Phase, Program
from kernelmeta.ops import class_means
from kernelmeta.tasks import Ragged

Head = Callable[[int, int, int], nn.Module]  # ways, features, steps
HEADS: dict[str, Head] = {
    "synthetic gradient": lambda N, D, K: Program(N, D, [Phase("synthetic_gradient", K, 1e-3)], hidden=40),
    "cross entropy, linear": lambda N, D, K: Program(
        N, D, [Phase("cross_entropy", K, 0.01)], classifier="linear", start="learned"
    ),
    "cross entropy, then soft assignment": lambda N, D, K: Program(
        N, D, [Phase("cross_entropy", K, 0.1), Phase("soft_assignment", 1, 1.0)]
    ),
}
T = 16


def runner(
    head: nn.Module, support: Tensor, labels: Tensor, query: Tensor, ragged: Ragged | None = None
) -> timing.Runner:
    """Forward, and backward into the head's parameters."""
    leaves = [p for p in head.parameters() if p.requires_grad]

    def run(_: int) -> None:
        torch.autograd.grad(head(support, labels, query, ragged=ragged).square().mean(), leaves, allow_unused=True)

    return run


def even(head: nn.Module, N: int, S: int, Q: int, D: int) -> timing.Runner:
    labels = (torch.arange(S) % N).expand(T, S).contiguous()
    return runner(head, torch.randn(T, S, D), labels, torch.randn(T, Q, D))


def offsets(counts: Sequence[int]) -> Tensor:
    return torch.tensor([0, *counts]).cumsum(0)


def step_costs(seconds: float) -> None:
    print("| program | features | ms with 10 steps | ms with 110 | us a step and task |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name in ("synthetic gradient", "cross entropy, linear"):
        for D in (64, 640, 6400):
            heads = {K: HEADS[name](5, D, K) for K in (10, 110)}
            found = timing.interleave({str(K): even(h, 5, 25, 75, D) for K, h in heads.items()}, seconds=seconds)
            few, many = (found[str(K)].median for K in heads)
            print(f"| {name} | {D} | {few * 1e3:.2f} | {many * 1e3:.2f} | {(many - few) / 100 / T * 1e6:.2f} |")


def ragged_costs(seconds: float) -> None:
    print("\n| program | ragged, ms | the same in even batches, ms | ratio |")
    print("| --- | ---: | ---: | ---: |")
    g = torch.Generator().manual_seed(0)
    ways = torch.randint(5, 21, (T,), generator=g).tolist()
    shots, queries = (torch.randint(1, n, (T,), generator=g).tolist() for n in (6, 16))
    S, Q = ([n * k for n, k in zip(ways, each, strict=True)] for each in (shots, queries))
    D = 640
    for name, build in HEADS.items():
        labels = torch.cat([torch.arange(s) % n for s, n in zip(S, ways, strict=True)])
        runners = {
            f"even {t}": even(build(ways[t], D, 5), ways[t], S[t], Q[t], D) for t in range(T)
        } | {
            "ragged": runner(
                build(max(ways), D, 5), torch.randn(sum(S), D), labels, torch.randn(sum(Q), D),
                ragged=Ragged(offsets(S), offsets(Q), torch.tensor(ways)),
            )
        }  # fmt: skip
        found = timing.interleave(runners, seconds=seconds)
        ragged = found.pop("ragged").median
        apart = sum(f.median for f in found.values()) / T
        print(f"| {name} | {ragged * 1e3:.2f} | {apart * 1e3:.2f} | {ragged / apart:.2f} |")


def eager_tim(support: Tensor, labels: Tensor, query: Tensor, start: Tensor, steps: int, lr: float) -> Tensor:
    """Boudiaf et al. 2020 by gradient descent, all tasks at once: logits."""
    w = start.clone().requires_grad_()

    def logits(rows: Tensor) -> Tensor:
        return 15 * (rows @ w.mT - w.square().sum(-1).unsqueeze(1) / 2)

    for _ in range(steps):
        p = logits(query).softmax(-1)
        loss = cross_entropy(logits(support).flatten(0, 1), labels.flatten(), reduction="sum") / support.shape[1]
        mean = p.mean(1)
        loss = loss + (mean * mean.log()).sum() - (p * p.log()).sum() / query.shape[1]
        (gradient,) = torch.autograd.grad(loss, w)
        w = (w - lr * gradient).detach().requires_grad_()
    return logits(query).detach()


def joint_costs(seconds: float) -> None:
    N, S, Q, D, steps = 5, 25, 75, 640, 100
    oracle = "cross_entropy + entropy - marginal_entropy"
    head = Program(N, D, [Phase(oracle, steps, 1e-3)], classifier="euclidean", scale=15.0)
    support, query = (normalize(torch.randn(T, rows, D), dim=-1) for rows in (S, Q))
    labels = (torch.arange(S) % N).expand(T, S).contiguous()
    start = class_means(support, labels, N)

    @torch.no_grad()
    def as_program(_: int) -> None:
        head(support, labels, query)

    def eager(_: int) -> None:
        eager_tim(support, labels, query, start, steps, 1e-3)

    found = timing.interleave({"program": as_program, "eager": eager}, seconds=seconds)
    ours, theirs = found["program"].median, found["eager"].median
    print(f"\n| TIM, {steps} steps | program, ms | eager PyTorch, ms | ratio |")
    print("| --- | ---: | ---: | ---: |")
    print(f"| {T} tasks, D = {D} | {ours * 1e3:.2f} | {theirs * 1e3:.2f} | {theirs / ours:.1f} |")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.programs", description=__doc__)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--seconds", type=float, default=1.0, help="for each thing timed")
    options = metadata.parse(parser, arguments)
    torch.set_num_threads(options.threads)
    print(f"{options.threads} threads; float32; {T} tasks a call; forward and backward into the parameters\n")
    step_costs(options.seconds)
    ragged_costs(options.seconds)
    joint_costs(options.seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
