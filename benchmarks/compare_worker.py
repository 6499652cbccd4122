"""One revision's side of compare.py: needs nothing but PyTorch and that revision's kernelmeta.

Reads lines "cell calls" and answers each with the seconds of every call, as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

import kernelmeta as km
from kernelmeta import nn


class Size(NamedTuple):
    """Tasks, ways, support rows, query rows, features."""

    T: int = 1
    N: int = 5
    S: int = 5
    Q: int = 75
    D: int = 640


# What adapts a classifier, for n_way and n_features; called alike in every revision.
LEARNERS: dict[str, Callable[[int, int], torch.nn.Module]] = {
    "sib": lambda N, D: nn.SIB(N, D, 3),
    "sib K=10": lambda N, D: nn.SIB(N, D, 10),
    "anil": lambda N, D: nn.ANIL(N, D),
    "ridge": lambda N, D: nn.RidgeHead(N, D),
    "prototypes": lambda N, D: nn.Prototypes(N, D),
    "soft k-means": lambda N, D: nn.SoftKMeans(N, D),
    "squared error": lambda N, D: nn.Program(
        N, D, [nn.Phase("squared_error", 5, 0.01)], classifier="linear", start="zero"
    ),
    "two phases": lambda N, D: nn.Program(
        N, D, [nn.Phase("cross_entropy", 3, 0.1), nn.Phase("synthetic_gradient", 3, 1e-3)]
    ),
}
# Name -> learner, size, whether it ends with the logits; all float32, else forward, cross entropy and backward.
CELLS: dict[str, tuple[str, Size, bool]] = {
    "sib T=1": ("sib", Size(), False),
    "sib T=64": ("sib", Size(64), False),
    "sib T=64 forward": ("sib", Size(64), True),
    "sib T=8 N=20": ("sib", Size(8, 20, 20, 300), False),
    "sib T=8 K=10": ("sib K=10", Size(8), False),
    **{f"{name} T={T}": (name, Size(T), False) for name in list(LEARNERS)[2:] for T in (1, 64)},
}


def prepare(cell: str) -> Callable[[], None]:
    """A call of the cell; inputs are the same in every revision, and rotated."""
    learner, (T, N, S, Q, D), forward = CELLS[cell]
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    head = LEARNERS[learner](N, D)
    copies = [(torch.randn(T, S, D, generator=generator), torch.randn(T, Q, D, generator=generator)) for _ in range(4)]
    labels, answers = (torch.arange(S) % N).repeat(T, 1), (torch.arange(Q) % N).repeat(T)
    turn = 0

    def call() -> None:
        nonlocal turn
        support, query = copies[turn % len(copies)]
        turn += 1
        if forward:
            with torch.no_grad():
                head(support, labels, query)
            return
        head.zero_grad(set_to_none=True)
        loss = F.cross_entropy(head(support, labels, query).flatten(0, 1), answers)
        if loss.requires_grad:  # soft k-means has nothing to learn
            loss.backward()

    return call


def main() -> None:
    torch.set_num_threads(int(sys.argv[1]))
    ready: dict[str, Callable[[], None]] = {}
    print(json.dumps(str(km.__file__)), flush=True)
    for line in sys.stdin:
        cell, _, calls = line.strip().rpartition(" ")
        if cell not in ready:
            ready[cell] = prepare(cell)
        call = ready[cell]
        call()  # this process slept while the other ran
        times = []
        for _ in range(int(calls)):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        print(json.dumps(times), flush=True)


if __name__ == "__main__":
    main()
