"""Soft k-means over many query rows beside a dozen lines of PyTorch: ``python -m benchmarks.many_rows``.

The two take turns; a row of the table is the median of their ratios.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import metadata
from kernelmeta.nn import SoftKMeans

STEPS, SCALE = 10, 10.0
# Query rows, ways, features.
SIZES = [(Q, 5, 64) for Q in (75, 300, 500, 700, 1000, 1500, 2000, 4000, 16000, 100000)]
SIZES += [(1500, 100, 64), (3000, 300, 64), (5000, 1000, 64), (75, 5, 640), (300, 5, 640), (1000, 5, 640)]
SIZES += [(4000, 5, 640)]


def soft_kmeans(support: Tensor, labels: Tensor, query: Tensor, n_way: int) -> Tensor:
    """As somebody would write it (Ren et al. 2018, with cosines)."""
    rows, members = F.normalize(query, dim=-1), F.one_hot(labels, n_way).to(query.dtype).transpose(-1, -2)
    sums, counts = members @ F.normalize(support, dim=-1), members.sum(-1, keepdim=True)
    theta = sums / counts
    for _ in range(STEPS):
        p = (SCALE * (rows @ F.normalize(theta, dim=-1).transpose(-1, -2))).softmax(-1)
        theta = (sums + p.transpose(-1, -2) @ rows) / (counts + p.sum(-2).unsqueeze(-1))
    return SCALE * (rows @ F.normalize(theta, dim=-1).transpose(-1, -2))


def seconds(call: Callable[[], object], calls: int) -> float:
    call()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def measure(Q: int, N: int, D: int, backward: bool, rounds: int) -> tuple[float, float, float]:
    """Median seconds of a call, ours and theirs, and the median ratio."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(N, D, generator=generator)
    of_query = torch.randint(N, (Q,), generator=generator)
    support = (centres + 0.7 * torch.randn(N, D, generator=generator))[None].requires_grad_(backward)
    query = (centres[of_query] + 0.7 * torch.randn(Q, D, generator=generator))[None].requires_grad_(backward)
    labels, ours = torch.arange(N)[None], SoftKMeans(N, D, STEPS, SCALE)

    def run(logits: Callable[[], Tensor]) -> Tensor:
        z = logits()
        if backward:
            torch.autograd.grad(z.square().mean(), (support, query))
        return z.detach()

    def mine() -> Tensor:
        return run(lambda: ours(support, labels, query))

    def theirs() -> Tensor:
        return run(lambda: soft_kmeans(support, labels, query, N))

    torch.testing.assert_close(mine(), theirs(), rtol=1e-4, atol=1e-4)
    calls = max(1, min(50, int(0.05 / seconds(mine, 1))))
    pairs = [(seconds(mine, calls), seconds(theirs, calls)) for _ in range(rounds)]
    a, b = (statistics.median(side) for side in zip(*pairs, strict=True))
    return a, b, statistics.median(x / y for x, y in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.many_rows", description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    options = metadata.parse(parser)
    torch.set_num_threads(options.threads)
    print(f"{'query rows':>10}{'ways':>6}{'features':>10}{'':>10}{'kernelmeta, ms':>16}{'PyTorch, ms':>13}{'ratio':>7}")
    for backward in (False, True):
        for Q, N, D in SIZES:
            a, b, ratio = measure(Q, N, D, backward, options.rounds)
            what = "backward" if backward else "forward"
            print(f"{Q:>10}{N:>6}{D:>10}{what:>10}{a * 1e3:>16.3f}{b * 1e3:>13.3f}{ratio:>7.2f}", flush=True)


if __name__ == "__main__":
    main()
