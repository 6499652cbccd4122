"""What is public and plain PyTorch computes under autocast in the precision of its arguments, as the kernels do."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kernelmeta as km
from kernelmeta import graceful, linear, transductive

Call = Callable[[int], Callable[[], Any]]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def kernels(T: int) -> dict[str, Tensor]:
    """A kernel of six support rows and four query rows."""
    rows = drawn(T, 10, 40) / 6
    K = rows @ rows.mT
    return {"gram": K[:, :6, :6], "targets": drawn(T, 6, 3, seed=1), "cross": K[:, 6:, :6]}


def own_kernel(T: int) -> Tensor:
    return drawn(T, 4, 40) @ drawn(T, 4, 40).mT / 36


def episode(T: int) -> tuple[Tensor, Tensor, Tensor]:
    return drawn(T, 6, 8).abs(), torch.arange(3).repeat(2).expand(T, -1), drawn(T, 9, 8, seed=1).abs()


def network(*first: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*first, nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3))


def lqf() -> nn.Module:
    torch.manual_seed(0)
    return km.nn.LQF(3, 8)


# name -> what gives, for so many tasks, a call with all its arguments.
CALLS: dict[str, Call] = {
    "descent": lambda T: partial(linear.descent, **kernels(T), steps=20, lr=0.3),
    "descent_path": lambda T: partial(linear.descent_path, **kernels(T), steps=[1, 5, 20], lr=0.3),
    "kernel_ridge": lambda T: partial(linear.kernel_ridge, **kernels(T), regularization=0.1),
    "ridge_path": lambda T: partial(linear.ridge_path, **kernels(T), regularizations=[0.1, 1.0]),
    "posterior": lambda T: partial(linear.posterior, **kernels(T), query_gram=own_kernel(T), noise=0.1),
    "linear_gram": lambda T: partial(linear.linear_gram, drawn(T, 5, 8)),
    "cosine_gram": lambda T: partial(linear.cosine_gram, drawn(T, 5, 8)),
    "rbf_gram": lambda T: partial(linear.rbf_gram, drawn(T, 5, 8)),
    "relu_ntk": lambda T: partial(linear.relu_ntk, drawn(T, 5, 8), depth=2),
    "ntk_gram": lambda T: partial(linear.ntk_gram, network(), drawn(T, 5, 8)),
    "ntk_gram of any module": lambda T: partial(
        linear.ntk_gram, network(nn.Conv1d(1, 1, 1), nn.Flatten()), drawn(T, 5, 1, 8)
    ),
    "certificate": lambda T: partial(
        linear.certificate, drawn(T, 8, 4), drawn(T, 8, 2), drawn(T, 4, 16), drawn(T, 16, 2)
    ),
    "mean_map": lambda T: partial(
        km.ops.mean_map, drawn(T, 9, 8), drawn(T, 3, 3, seed=2).softmax(-1), torch.tensor([0, 4, 4, 9])
    ),
    "transport": lambda T: partial(transductive.transport, drawn(T, 9, 3).log_softmax(-1), torch.full((T, 3), 3.0)),
    **{
        name: lambda T, name=name: partial(getattr(transductive, name), *episode(T), n_way=3)
        for name in transductive.__all__
        if name not in ("transport", "power_transform")
    },
    "nearest": lambda T: partial(graceful.nearest, drawn(9, 64), drawn(50, 64, seed=1)),
    "LQF": lambda T: partial(lqf(), *episode(T)),
}  # fmt: skip
MODULES = {"ntk_gram", "ntk_gram of any module"}


def tensors(found: Any) -> list[Tensor]:
    if isinstance(found, Tensor):
        return [found]
    return [t for part in found for t in tensors(part)] if isinstance(found, (tuple, list)) else []


@pytest.mark.parametrize("name", CALLS)
def test_autocast_changes_nothing(name: str) -> None:
    call = CALLS[name](2)
    want = tensors(call())
    with torch.autocast("cpu", torch.bfloat16):
        got = tensors(call())
    assert want and all(torch.equal(a, b) and a.dtype is b.dtype for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("name", sorted(set(CALLS) - MODULES - {"nearest"}))
def test_no_task(name: str) -> None:
    """The last batch of an epoch may be an empty one."""
    of_seven, of_none = (tensors(CALLS[name](T)()) for T in (7, 0))
    assert [t.shape for t in of_none] == [tuple(0 if n == 7 else n for n in t.shape) for t in of_seven]
