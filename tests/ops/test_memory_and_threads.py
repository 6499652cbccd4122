"""What earlier calls and tasks left in the threads' memory has no part in a result, not to the last bit; nor has how
many threads there are."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from every_op import CASES, Rows, parameters, rows
from torch import Tensor

import kernelmeta as km


def results(f: Callable[..., Tensor], given: Rows, own: Sequence[Tensor]) -> list[Tensor]:
    out = f(*given, own)
    leaves = [given[0], given[2], *own]
    found = torch.autograd.grad(out.square().sum(), leaves, allow_unused=True)
    return [out.detach(), *(g for g in found if g is not None)]


def spoil(dtype: torch.dtype) -> None:
    """A call that fills more memory with NaN than those under test use. (What is linear is never done anew.)"""
    support, labels, query = rows(2, 60, 90, 40, dtype)
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
        before = results(f, rows(2, 7, 11, 9, dtype), own)
        spoil(dtype)
        after = results(f, rows(2, 7, 11, 9, dtype), own)
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
            support, labels, query = (t.detach().clone() for t in rows(2, 7, 11, 9, dtype))
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_allocated_memory_is_never_read(name: str, dtype: torch.dtype) -> None:
    """Every tensor is full of NaN when it is allocated."""
    f, own, given = CASES[name], parameters(9, dtype), rows(2, 7, 11, 9, dtype)
    want = results(f, given, own)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        got = results(f, given, own)
    finally:
        torch.use_deterministic_algorithms(before)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_same_bits_for_any_number_of_threads(name: str, dtype: torch.dtype) -> None:
    """Many more than there are cores, too, and than there are tasks."""
    f, own, given = CASES[name], parameters(9, dtype), rows(37, 7, 11, 9, dtype)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8, 64):
            torch.set_num_threads(threads)
            found.append(results(f, given, own))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))
