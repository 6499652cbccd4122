"""What the tests that run in Triton's interpreter share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from episodes import flat

import kernelmeta as km

INTERPRETED = bool(km.backends()["triton"].details.get("interpreted"))
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in a Python with TRITON_INTERPRET=1")


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
