"""What PyTorch's counter of floating-point operations is told of the ops, once somebody imports it.

Importing `torch.utils.flop_counter` takes twice as long as importing this whole package.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_COUNTER = "torch.utils.flop_counter"
_waiting: list[tuple[Any, Callable[..., int]]] = []


def count_flops(op: Any, formula: Callable[..., int]) -> None:
    """Register ``formula(*args, out_val) -> flops`` for an op packet, now or when the counter is imported."""
    _waiting.append((op, formula))
    if _COUNTER in sys.modules:
        _register()


def _register() -> None:
    register = sys.modules[_COUNTER].register_flop_formula
    while _waiting:
        op, formula = _waiting.pop()
        register(op, get_raw=True)(formula)


class _AfterImport(MetaPathFinder):
    """Finds the counter where it is, and registers the formulas after it has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                _register()

            spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


if _COUNTER not in sys.modules:
    sys.meta_path.insert(0, _AfterImport())
