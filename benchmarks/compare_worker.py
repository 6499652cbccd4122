"""One revision's side of compare.py: needs nothing but PyTorch and that revision's kernelmeta.

Reads lines "cell calls" and answers each with the seconds of every call, as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

import kernelmeta as km
from kernelmeta import nn

# Name -> T, N, S, Q, D, K; all float32, forward, cross entropy and backward unless "forward".
CELLS = {
    "sib T=1": (1, 5, 5, 75, 640, 3),
    "sib T=64": (64, 5, 5, 75, 640, 3),
    "sib T=64 forward": (64, 5, 5, 75, 640, 3),
    "sib T=8 N=20": (8, 20, 20, 300, 640, 3),
    "sib T=8 K=10": (8, 5, 5, 75, 640, 10),
}


def prepare(cell: str) -> Callable[[], None]:
    """A call of the cell; inputs are the same in every revision, and rotated."""
    T, N, S, Q, D, K = CELLS[cell]
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    head = nn.SIB(N, D, K)
    copies = [(torch.randn(T, S, D, generator=generator), torch.randn(T, Q, D, generator=generator)) for _ in range(4)]
    labels, answers = (torch.arange(S) % N).repeat(T, 1), (torch.arange(Q) % N).repeat(T)
    turn = 0

    def call() -> None:
        nonlocal turn
        support, query = copies[turn % len(copies)]
        turn += 1
        if cell.endswith("forward"):
            with torch.no_grad():
                head(support, labels, query)
            return
        head.zero_grad(set_to_none=True)
        F.cross_entropy(head(support, labels, query).flatten(0, 1), answers).backward()

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
