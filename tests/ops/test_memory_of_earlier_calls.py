"""What earlier calls and tasks left in the threads' memory has no part in a result, not to the last bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from episodes import draw
from torch import Tensor

import kernelmeta as km

ORACLES = ["cross_entropy", "squared_error", "hinge", "entropy", "soft_assignment", "synthetic_gradient"]
Rows = tuple[Tensor, Tensor, Tensor]


def rows(S: int, Q: int, D: int, dtype: torch.dtype) -> Rows:
    random = torch.Generator().manual_seed(S)
    support, query = (torch.randn(2, n, D, generator=random).to(dtype) for n in (S, Q))
    return support.requires_grad_(), torch.arange(S).remainder(3).repeat(2, 1), query.requires_grad_()


def parameters(D: int, dtype: torch.dtype) -> list[Tensor]:
    """weight, scale, bias and the ten of the MLP, for 3 ways."""
    episode = draw(T=1, S=3, Q=2, N=3, D=D).map(lambda t: t.to(dtype)).fresh()
    return list(episode.leaves()[2:])


def sib(support: Tensor, labels: Tensor, query: Tensor, own: Sequence[Tensor]) -> Tensor:
    weight, scale, bias, *mlp = own
    return km.ops.sib(
        support, labels, query, weight, scale, bias, km.MLPParameters(*mlp), steps=2, inner_lr=0.01
    )  # fmt: skip


def program(oracle: str, of_rows: str, classifier: str) -> Callable[..., Tensor]:
    def run(support: Tensor, labels: Tensor, query: Tensor, own: Sequence[Tensor]) -> Tensor:
        _, scale, bias, *mlp = own
        options = {"scale": scale, "bias": bias} if classifier == "cosine" else {}
        return km.ops.program(
            support, labels, query, [km.nn.Phase(oracle, 2, 0.01, rows=of_rows)], n_way=3, classifier=classifier,
            mlp=km.MLPParameters(*mlp), **options,
        )  # fmt: skip

    return run


def ridge(support: Tensor, labels: Tensor, query: Tensor, own: Sequence[Tensor]) -> Tensor:
    _, scale, bias, *_ = own
    return km.ops.ridge(support, labels, query, scale, scale, bias, n_way=3)


def linear_head(support: Tensor, labels: Tensor, query: Tensor, own: Sequence[Tensor]) -> Tensor:
    start = torch.ones(3, support.shape[-1], dtype=support.dtype)
    return km.ops.linear_head(support, labels, query, start, start[:, 0] * 0, torch.full((2,), 0.1, dtype=start.dtype))


def class_means(support: Tensor, labels: Tensor, query: Tensor, own: Sequence[Tensor]) -> Tensor:
    return km.ops.class_means(support, labels, 3, own[0])


def ntk_gram(support: Tensor, labels: Tensor, query: Tensor, own: Sequence[Tensor]) -> Tensor:
    random, D = torch.Generator().manual_seed(1), support.shape[-1]
    weights = [torch.randn(size, generator=random).to(support.dtype) for size in ((9, D), (3, 9))]
    return km.ops.ntk_gram(support, query, weights).cross


CASES: dict[str, Callable[..., Tensor]] = {
    "sib": sib,
    "ridge": ridge,
    "linear_head": linear_head,
    "class_means": class_means,
    "ntk_gram": ntk_gram,
}
for oracle in ORACLES:
    of_labels = oracle in ("cross_entropy", "squared_error", "hinge")
    for classifier in ("cosine",) if oracle == "soft_assignment" else ("cosine", "linear"):
        CASES[f"{classifier} {oracle}"] = program(oracle, "support" if of_labels else "query", classifier)


def results(f: Callable[..., Tensor], given: Rows, own: Sequence[Tensor]) -> list[Tensor]:
    out = f(*given, own)
    leaves = [given[0], given[2], *own]
    found = torch.autograd.grad(out.square().sum(), leaves, allow_unused=True)
    return [out.detach(), *(g for g in found if g is not None)]


def spoil(dtype: torch.dtype) -> None:
    """A call that fills more memory with NaN than those under test use. (What is linear is never done anew.)"""
    support, labels, query = rows(60, 90, 40, dtype)
    phases = [km.nn.Phase("entropy", 8, 0.1), km.nn.Phase("cross_entropy", 8, 0.1)]
    out = km.ops.program(support * torch.nan, labels, query * torch.nan, phases, n_way=3, classifier="linear")
    out.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_earlier_calls_do_not_count(name: str, dtype: torch.dtype) -> None:
    f, own = CASES[name], parameters(9, dtype)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)  # so that the same memory serves all calls
        before = results(f, rows(7, 11, 9, dtype), own)
        spoil(dtype)
        after = results(f, rows(7, 11, 9, dtype), own)
    finally:
        torch.set_num_threads(threads)
    assert all(bool(t.isfinite().all()) for t in before)
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_a_task_before_does_not_count(name: str, dtype: torch.dtype) -> None:
    """One that is NaN throughout."""
    f, own = CASES[name], parameters(9, dtype)
    threads = torch.get_num_threads()
    found = []
    try:
        torch.set_num_threads(1)
        for spoilt in (False, True):
            support, labels, query = (t.detach().clone() for t in rows(7, 11, 9, dtype))
            if spoilt:
                support[0], query[0] = torch.nan, torch.nan
            leaves = [support.requires_grad_(), query.requires_grad_()]
            out = f(leaves[0], labels, leaves[1], own)
            gradients = torch.autograd.grad(out.square().sum(), leaves, allow_unused=True)
            found.append([out.detach(), *(g for g in gradients if g is not None)])
    finally:
        torch.set_num_threads(threads)
    for one, other in zip(*found, strict=True):
        assert bool(other[0].isnan().any())
        assert torch.equal(one[1], other[1])
