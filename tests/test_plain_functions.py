"""What is public and plain PyTorch, in modes and on rows that no kernel's test draws for it: under autocast it computes
in the precision of its arguments, as the kernels do; a first call in a mode leaves nothing behind; a task that is not
finite spoils no other one."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from functools import partial
from types import FunctionType
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


def network(*first: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(made() for made in first), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3))


def lqf() -> nn.Module:
    torch.manual_seed(0)
    return km.nn.LQF(3, 8)


# Certified steps, and what they take besides; they refuse what is not finite by name.
CERTAIN: dict[str, dict[str, float]] = {"certificate": {}, "adaptive_step": {}, "local_rate": {"lr": 1e-3}}

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
        linear.ntk_gram, network(partial(nn.Conv1d, 1, 1, 1), nn.Flatten), drawn(T, 5, 1, 8)
    ),
    **{
        name: lambda T, name=name, own=own: partial(
            getattr(linear, name), drawn(T, 8, 4), drawn(T, 8, 2), drawn(T, 4, 16), drawn(T, 16, 2), **own
        )
        for name, own in CERTAIN.items()
    },
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
# Public functions that have no call above: ops with kernels and what checks sweep elsewhere (tests/nn/test_modes.py,
# tests/ops), and those that train or look at a network, one at a time.
ELSEWHERE = {
    "class_means", "focal_distillation", "linear_head", "linear_head_gradients", "linearised_descent", "program",
    "ridge", "sib", "sib_gradients", "sib_inner_loop", "synthetic_gradient_mlp", "smoothed_proportions",
    "power_transform", "lqf", "solutions",
    "backfill", "compatibility", "cross_scores", "flips", "frozen_classifier", "influence_loss", "match_classes",
    "retrieval_scores",
}  # fmt: skip


def test_every_public_function_is_here_or_named() -> None:
    public = {
        name
        for module in (linear, transductive, graceful, km.ops)
        for name in module.__all__
        if isinstance(getattr(module, name), FunctionType)
    }
    assert public == {name for name in CALLS if name in public} | ELSEWHERE


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


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def default_double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


MODES = {
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "deterministic": deterministic,
    "default_dtype": default_double,
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CALLS)
def test_a_mode_changes_nothing_and_leaves_nothing_behind(name: str, mode: str) -> None:
    call = CALLS[name](2)
    with MODES[mode]():
        inside = tensors(call())
    after = tensors(call())
    want = tensors(CALLS[name](2)())
    for found in (inside, after):
        assert all(torch.equal(a, b) and a.dtype is b.dtype for a, b in zip(found, want, strict=True))
    assert not any(t.is_inference() for t in after)


def with_(call: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The call with its first tensor of seven tasks changed."""
    args, keywords = list(call.args), dict(call.keywords)
    for values, keys in ((args, range(len(args))), (keywords, list(keywords))):
        for key in keys:
            if isinstance(values[key], Tensor) and len(values[key]) == 7:
                values[key] = change(values[key].clone())
                return partial(call.func, *args, **keywords)
    raise AssertionError("no tensor of seven tasks")


def spoilt(rows: Tensor, value: float) -> Tensor:
    rows[2].view(-1)[0] = value
    return rows


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", sorted(set(CALLS) - {"nearest"} - set(CERTAIN)))
def test_a_task_that_is_not_finite_spoils_no_other(name: str, value: float) -> None:
    call = CALLS[name](7)
    want, got = tensors(call()), tensors(with_(call, partial(spoilt, value=value))())
    confined = False
    for a, b in zip(got, want, strict=True):
        axis = a.shape.index(7)
        a, b = a.movedim(axis, 0), b.movedim(axis, 0)
        others = torch.arange(7) != 2
        torch.testing.assert_close(a[others], b[others], rtol=1e-5, atol=1e-6)
        confined |= not a[2].isfinite().all()
    assert confined  # and it is seen there
