"""What the tests that run in Triton's interpreter share."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
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


def _look_up_builtins_once() -> None:
    """Triton's interpreter replaces the language's builtins at every call of a function, and looks through all members
    of its modules for them each time: a quarter of what these tests would take.
    """
    interpreter = importlib.import_module("triton.runtime.interpreter")
    is_builtin = interpreter.tl.core.is_builtin
    names: dict[Any, list[str]] = {}

    def patch_builtin(package: Any, builder: Any, *scope: Any) -> None:
        if package not in names:
            names[package] = [name for name, member in inspect.getmembers(package) if is_builtin(member)]
        for name in names[package]:
            member = getattr(package, name)
            if is_builtin(member):
                interpreter._patch_attr(package, name, member, builder, *scope)

    if hasattr(interpreter, "_patch_builtin") and hasattr(interpreter, "_patch_attr"):
        interpreter._patch_builtin = patch_builtin


if INTERPRETED:
    _look_up_builtins_once()


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
