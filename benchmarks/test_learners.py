"""The learners beside SIB, a meta-training step's forward and backward each, beside the same in eager PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kernelmeta as km
from benchmarks import agreement, anil, counts
from benchmarks.floors import Ceilings
from benchmarks.peers import PeerRunner, Result
from benchmarks.problem import Problem, Size, draw
from kernelmeta.nn import Phase, Program, Prototypes, RidgeHead, SoftKMeans


class Learner(NamedTuple):
    """A learner, and what it computes for each task."""

    make: Callable[[int, int], nn.Module]  # ways, features
    support_steps: int = 0
    query_steps: int = 0
    mlp_steps: int = 0


LEARNERS = {
    "prototypes": Learner(Prototypes),
    "soft k-means": Learner(lambda N, D: SoftKMeans(N, D, steps=10), query_steps=10),
    "ridge": Learner(RidgeHead, support_steps=1),
    "squared error, linear": Learner(
        lambda N, D: Program(N, D, [Phase("squared_error", 5, 0.01)], classifier="linear", start="zero"),
        support_steps=5,
    ),
    "cross entropy, then synthetic gradient": Learner(
        lambda N, D: Program(N, D, [Phase("cross_entropy", 3, 0.1), Phase("synthetic_gradient", 3, 1e-3)]),
        support_steps=3,
        query_steps=3,
        mlp_steps=3,
    ),
}
# The backend that each peer runs on; the reference is batched PyTorch.
BACKENDS = {"kernelmeta": None, "eager": "reference"}
SLOW = ("compile",)  # (to compile)


def _runner(problem: Problem, learner: Learner, backend: str | None, dtype: torch.dtype) -> PeerRunner:
    size = problem.size
    torch.manual_seed(0)
    module = learner.make(size.N, size.D).to(dtype)
    leaves = list(module.parameters())
    batches = [i._replace(support=i.support.to(dtype), query=i.query.to(dtype)) for i in problem.inputs]

    def run(i: int) -> Result:
        batch = batches[i % len(batches)]
        for leaf in leaves:
            leaf.grad = None
        with km.use_backend(backend):
            logits = module(batch.support, batch.labels, batch.query)
            if leaves:
                F.cross_entropy(logits.flatten(0, -2), batch.answers.flatten()).backward()
        return logits.detach(), [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]

    return run


@pytest.mark.parametrize("peer", BACKENDS)
@pytest.mark.parametrize("name", LEARNERS)
@pytest.mark.parametrize("size", [Size(T=1), Size(T=64), Size(T=64, S=25)], ids=str)
def test_learners(size: Size, name: str, peer: str, benchmark: Any, ceilings: Ceilings) -> None:
    learner, problem = LEARNERS[name], draw(size)
    runner = _runner(problem, learner, BACKENDS[peer], torch.float32)
    found = agreement.errors(runner(0), _runner(problem, learner, "reference", torch.float64)(0))
    assert all(error <= allowed for error, allowed in zip(found, agreement.TOLERANCES["float32"], strict=True))
    floor = ceilings.floor(counts.learner(size, *learner[1:]))
    benchmark.group = f"{name} {size}"
    benchmark.extra_info.update({**size._asdict(), "learner": name, "peer": peer, "floor_us": floor * 1e6})
    turn = iter(range(1 << 60))
    benchmark(lambda: runner(next(turn)))


@pytest.mark.parametrize("peer", [name for name in anil.PEERS if name not in SLOW])
@pytest.mark.parametrize("size", anil.CELLS, ids=str)
def test_anil(size: anil.AnilSize, peer: str, benchmark: Any, ceilings: Ceilings) -> None:
    runners, notes = anil.checked(anil.draw(size), [peer], 1e-4)
    if not runners:
        pytest.skip(notes[0])
    floor = ceilings.floor(counts.learner(Size(size.T, size.N, size.S, size.D), size.K))
    benchmark.group = f"ANIL {size}"
    benchmark.extra_info.update({**size._asdict(), "peer": peer, "floor_us": floor * 1e6})
    turn = iter(range(1 << 60))
    benchmark(lambda: runners[peer](next(turn)))
