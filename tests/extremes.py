"""Rows so long or so short that their squares are no numbers of their type: the sizes, and tasks with such rows."""

from __future__ import annotations

from typing import Any

import torch
from episodes import relative_error

import kernelmeta as km

# (dtype, size of the support rows, of the query rows)
SIZES = [
    (torch.float32, 1e19, 1e19), (torch.float32, 1e30, 1.0), (torch.float32, 1.0, 1e30), (torch.float32, 1e-19, 1e-19),
    (torch.float32, 1e-15, 1.0), (torch.float32, 1.0, 1e-21), (torch.float32, 1e-25, 1e-25),
    (torch.bfloat16, 1e30, 1e30), (torch.bfloat16, 1e-30, 1.0),
    (torch.float64, 1e200, 1e200), (torch.float64, 1.0, 1e-13), (torch.float64, 1e-13, 1e-13),
    (torch.float64, 1e-200, 1.0),
]  # fmt: skip


def results(f: Any, leaves: list[torch.Tensor], sizes: list[float]) -> list[torch.Tensor]:
    """Results of f, and gradients of a random linear function of them times the sizes of the leaves."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    out = f(*leaves)
    g = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(out.dtype)
    grads = torch.autograd.grad((out * g).sum(), leaves, allow_unused=True)
    scaled = [
        torch.zeros_like(x, dtype=torch.float64) if d is None else d.double() * size
        for x, d, size in zip(leaves, grads, sizes, strict=True)
    ]
    return [out.detach().double(), *scaled]


def check(f: Any, rows: list[torch.Tensor], dtype: torch.dtype, sizes: list[float], backend: str) -> None:
    """Finite right results, or NaN, from ``backend`` and from the reference alike."""
    given = [(x * size).to(dtype) for x, size in zip(rows, sizes, strict=True)]
    # The same in long numbers, whose squares are in range: what is below the floor stays below it.
    with km.use_backend("reference"):
        want = results(f, [x.double() for x in given], sizes)
    # (What is left of rows far below the floor is mostly rounding.)
    tolerance = {torch.float64: 1e-9, torch.float32: 0.1 if min(sizes) < 1e-18 else 1e-4}.get(dtype, 3e-2)
    for name in (backend, "reference"):
        with km.use_backend(name):
            got = results(f, given, sizes)
        for g, w in zip(got, want, strict=True):
            right = (g - w).abs() <= tolerance * w.abs().max() + 1e-12
            assert (right | g.isnan()).all(), (name, relative_error(g, w))
            assert not g.isnan().any() or max(sizes) > 1e37 or dtype is torch.float64, name
