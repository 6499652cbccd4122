"""How much a task's forward pass leaves for its backward pass, where tracing has to know it before anything runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensor


def padded(n: Any) -> Any:
    """Arrays begin at multiples of 16 elements, and rows of features, of queries, of units are padded to them."""
    return (n + 15) // 16 * 16


def elements(*shapes: tuple[Any, ...]) -> Any:
    """Of arrays of these shapes, one after the other."""
    return sum(padded(math.prod(shape)) for shape in shapes)


def traced_size(like: torch.Tensor, sizes: tuple[Any, ...], count: Callable[[], Any] | None) -> Any:
    """The size of a trace as a fake kernel says it.

    Args:
        like: a result of the fake kernel.
        sizes: what the size depends on.
        count: gives it, from `sizes`; None where it depends on more than that (offsets of tasks of unequal size).
    """
    if not isinstance(like, FakeTensor):
        return 0  # on the meta device nothing is kept
    if count is not None and all(isinstance(size, int) for size in sizes):
        return count()
    try:
        # One graph for all sizes. (Whether a Gram matrix is formed depends on them.)
        return torch.library.get_ctx().new_dynamic_size()
    except DynamicOutputShapeException:
        if count is not None:
            return count()
        if like.fake_mode.shape_env is None:
            return 0
        raise
