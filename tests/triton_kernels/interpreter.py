"""What the tests that run in Triton's interpreter share."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import pytest
import torch
from episodes import flat

import kernelmeta as km


def version(package: str) -> tuple[int, ...]:
    """Its major and minor version; (0, 0) where it is not installed."""
    try:
        return tuple(map(int, importlib.metadata.version(package).split(".")[:2]))
    except importlib.metadata.PackageNotFoundError:
        return (0, 0)


BROKEN = (
    "Triton before 3.7 cannot interpret beside NumPy 2.4 or later, which makes no number of an array of one element"
    if version("triton") < (3, 7) and version("numpy") >= (2, 4)
    else ""
)
INTERPRETED = bool(km.backends()["triton"].details.get("interpreted"))


def interpreted(test: Any) -> Any:
    """Mark of a test that needs the interpreter."""
    test = pytest.mark.skipif(not INTERPRETED, reason="runs in a Python with TRITON_INTERPRET=1")(test)
    return pytest.mark.skipif(bool(BROKEN), reason=BROKEN)(test)


def both(f: Any, leaves: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Results of f and gradients of a random linear function of them: from Triton, and from the reference."""
    found = []
    for backend in ("triton", "reference"):
        with km.use_backend(backend):
            results = flat(f())
            g = torch.Generator().manual_seed(3)
            loss = sum((r * torch.randn(r.shape, dtype=r.dtype, generator=g)).sum() for r in results)
            # Outside of the forced backend: the backward pass runs where the forward pass did.
        grads = torch.autograd.grad(loss, leaves, allow_unused=True)
        found.append(results + [torch.zeros_like(p) if d is None else d for d, p in zip(grads, leaves, strict=True)])
    return found[0], found[1]
