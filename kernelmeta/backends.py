"""Which implementation runs: the compiled CPU kernels, CUDA, Triton, or the reference in plain PyTorch.

CPU tensors go to the C++ kernels, else to the reference; CUDA tensors to the CUDA kernels, else to Triton,
else to the reference. ``KERNELMETA_BACKEND`` or `use_backend` force one, and forcing one that cannot run is
an error: which backend runs is never a guess.

Importing this module loads the library of ops. If that fails, the reason is kept for `backends` and for the
one warning that the first op gives.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import warnings
from contextvars import ContextVar, Token
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch

NATIVE = Path(__file__).parent / "_native"

# In order of preference, for each type of device. The Triton kernels are right on an H100, and mostly faster there than
# plain PyTorch, but their first call compiles for a minute, and a smaller card may lack the shared memory: only who
# asks for them gets them.
PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "reference")}
NAMES = ("cpu", "cuda", "triton", "reference")


class Backend(NamedTuple):
    """What is known about one backend of this installation."""

    available: bool
    reason: str  # why it cannot run; empty where it can
    details: dict[str, Any]  # e.g. the instruction set in use, the architectures compiled for


def build_report() -> dict[str, Any]:
    """What the installation wrote about the native build (see setup.py); empty if there was none."""
    try:
        report: dict[str, Any] = json.loads((NATIVE / "build.json").read_text())
    except (OSError, ValueError):
        return {}
    return report


def _no_build() -> str:
    """Why there is none: the sources may stand before the package that was installed from them."""
    for folder in sys.path:
        other = Path(folder) / "kernelmeta" / NATIVE.name
        if other.resolve() != NATIVE.resolve() and (other / "build.json").is_file():
            return f"{NATIVE.parent} are the sources; the package is in {folder}, and found from any other folder"
    return f"no native build in {NATIVE.parent}: install the package (pip install .)"


def _load_cpu() -> Backend:
    report = build_report()
    if not report:
        return Backend(False, _no_build(), {})
    if not report["cpu"]:
        return Backend(False, report["reason"], {})
    suffix = ".dylib" if sys.platform == "darwin" else ".so"
    library = NATIVE / f"libkernelmeta_cpu{suffix}"
    try:
        torch.ops.load_library(str(library))
        isa = torch.ops.kernelmeta.cpu_isa()
    except (OSError, RuntimeError, ValueError, AttributeError) as error:
        text = str(error).split("\nException raised from")[0].strip()
        reason = f"{library.name} (built for PyTorch {report['torch']}) does not run: {text}"
        return Backend(False, reason, {})
    return Backend(True, "", {"instruction_set": isa, "library": library.name})


def _load_cuda() -> Backend:
    """The library of CUDA ops is loaded only where there is a GPU: it needs CUDA's part of PyTorch."""
    report = build_report()
    if not report.get("cuda"):
        reason = report.get("cuda_reason") or _no_build()
        return Backend(False, reason, {})
    built = {"architectures": report["cuda_architectures"]}
    if torch.version.cuda is None:
        return Backend(False, f"this PyTorch ({torch.__version__}) was built without CUDA", built)
    if not torch.cuda.is_available():
        return Backend(False, "PyTorch finds no GPU", built)
    library = NATIVE / "libkernelmeta_cuda.so"
    try:
        torch.ops.load_library(str(library))
    except (OSError, RuntimeError) as error:
        reason = f"{library.name} (built for PyTorch {report['torch']}) does not run: {str(error).strip()}"
        return Backend(False, reason, built)
    return Backend(True, "", {**built, "library": library.name})


def _find_triton() -> Backend:
    """Triton itself is imported by the first op that runs on it."""
    if importlib.util.find_spec("triton") is None:
        return Backend(False, "Triton is not installed (pip install triton)", {})
    if os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y"):
        return Backend(True, "", {"interpreted": True})
    if not torch.cuda.is_available():
        return Backend(False, "PyTorch finds no GPU (TRITON_INTERPRET=1 interprets the kernels on CPU tensors)", {})
    return Backend(True, "", {"interpreted": False})


_BACKENDS = {
    "cpu": _load_cpu(),
    "cuda": _load_cuda(),
    "triton": _find_triton(),
    "reference": Backend(True, "", {"torch": torch.__version__}),
}

_runnable = {
    device: frozenset(name for name in names if _BACKENDS[name].available) for device, names in PREFERENCE.items()
}
if _BACKENDS["triton"].available:
    _runnable["cpu" if _BACKENDS["triton"].details["interpreted"] else "cuda"] |= {"triton"}

# Device type -> what runs there if nothing is forced. _settle adds what is missing, and warns.
_automatic: dict[str, str] = {"cpu": "cpu"} if _BACKENDS["cpu"].available else {}

_forced: ContextVar[str | None] = ContextVar("kernelmeta_backend", default=os.environ.get("KERNELMETA_BACKEND") or None)


class _Mirror:
    """The choice made last, by any thread, where torch.compile can see and guard it.

    Compiled code cannot read a context variable, and must be compiled anew when the choice changes.
    """

    forced: str | None = _forced.get()


_mirror = _Mirror()


def is_traced() -> bool:
    """Inside torch.compile or a torch.func transform: what runs must be plain PyTorch or one of our ops."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def holds_numbers(tensor: torch.Tensor) -> bool:
    """Whether the values of a tensor can be looked at: not while it is traced, nor where it is fake or on "meta"."""
    if is_traced() or torch.jit.is_tracing() or tensor.is_meta:
        return False
    mode_of, kinds = torch._C._get_dispatch_mode, torch._C._TorchDispatchModeKey
    return mode_of(kinds.FAKE) is None and mode_of(kinds.PROXY) is None


def backends() -> dict[str, Backend]:
    """Name -> `Backend` (available, reason, details) for "cpu", "cuda", "triton" and "reference"."""
    return dict(_BACKENDS)


def _check(name: str) -> None:
    if name not in NAMES:
        raise ValueError(f"backend is {name!r}; accepted are {', '.join(NAMES)}")
    if not _BACKENDS[name].available:
        raise RuntimeError(f"backend {name!r} cannot run: {_BACKENDS[name].reason}")


class use_backend:
    """Force a backend: until the end of a ``with`` block, or, called plainly, until the next call.

    Holds for the calling thread (or asyncio task). Code that torch.compile has compiled follows the choice
    made last by any thread.

    Args:
        name: "cpu", "cuda", "triton", "reference", or None for the automatic choice.

    Raises:
        ValueError: there is no backend of that name.
        RuntimeError: that backend cannot run here; the message says why.
    """

    def __init__(self, name: str | None) -> None:
        if name is not None:
            _check(name)
        self._token: Token[str | None] | None = None
        self._mirrored = _mirror.forced
        _mirror.forced = name
        if not torch.compiler.is_compiling():
            self._token = _forced.set(name)

    def __enter__(self) -> use_backend:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _mirror.forced = self._mirrored
        if self._token is not None:
            _forced.reset(self._token)


def select(device_type: str) -> str:
    """Name of the backend that runs on tensors of this type of device ("cpu", "cuda", ...).

    Raises:
        RuntimeError: the forced backend cannot run here, or does not take such tensors.
        ValueError: KERNELMETA_BACKEND names no backend.
    """
    if device_type == "meta":
        return "meta"  # no backend's own: the ops' fake kernels, which say shapes alone
    if torch.compiler.is_compiling():
        forced = _mirror.forced
        if forced is None:
            return _settle(device_type)
    else:
        forced = _forced.get()
        if forced is None:
            return _automatic.get(device_type) or _settle(device_type)
    if forced == "reference" or forced in _runnable.get(device_type, ()):
        return forced
    _check(forced)  # KERNELMETA_BACKEND is not looked at before an op needs it
    raise RuntimeError(f"backend {forced!r} is forced and does not take {device_type} tensors")


def _settle(device_type: str) -> str:
    """The automatic choice; at first use of a device type without its best backend, say what is slower."""
    if device_type in _automatic:
        return _automatic[device_type]
    if device_type == "cpu" and os.environ.get("KERNELMETA_ISA") and build_report().get("cpu"):
        raise RuntimeError(f"backend 'cpu' cannot run: {_BACKENDS['cpu'].reason}")
    candidates = PREFERENCE.get(device_type, ("reference",))
    chosen = next(name for name in candidates if _BACKENDS[name].available)
    _automatic[device_type] = chosen
    if chosen == "reference":
        why = _BACKENDS[candidates[0]].reason or "there are no kernels for this device"
        warnings.warn(
            f"kernelmeta runs its plain PyTorch reference on {device_type} tensors, several times slower than"
            f" the fused kernels: {why}",
            RuntimeWarning,
            stacklevel=3,
        )
    return chosen


# torch.compile runs it while tracing instead of looking inside: its answer is the same ever after.
_settle._dynamo_marked_constant = True  # type: ignore[attr-defined]
