"""Build backend: setuptools, plus the build requirements that depend on the machine.

``[build-system] requires`` can only name fixed packages. PyTorch must not be among them: an isolated
build would then download gigabytes although the target interpreter has a PyTorch already, whose headers
serve as well. So PyTorch is asked for only where the target interpreter has none.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (the hooks that stay as they are)

BUILD_CHOICES = ("auto", "cpu", "cuda", "none")

_PROBE = """
import importlib.metadata, importlib.util, json
spec = importlib.util.find_spec("torch")
print(json.dumps([importlib.metadata.version("torch"), spec.origin] if spec and spec.origin else None))
"""


class TorchInstallation(NamedTuple):
    """Where a PyTorch lies, found without importing it."""

    version: str
    directory: Path  # holds include/ and lib/


def build_choice() -> str:
    """Value of ``KERNELMETA_BUILD``. Raises ``SystemExit`` if it is not one of `BUILD_CHOICES`."""
    choice = os.environ.get("KERNELMETA_BUILD") or "auto"
    if choice not in BUILD_CHOICES:
        raise SystemExit(f"KERNELMETA_BUILD is {choice!r}; accepted are {', '.join(BUILD_CHOICES)}")
    return choice


def find_torch() -> TorchInstallation | None:
    """PyTorch of this environment, else of the interpreter that an isolated build is made for.

    pip isolates a build by path variables alone: the same executable, told to ignore them (``-E``), sees
    the packages that the result will run with.
    """
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        return TorchInstallation(importlib.metadata.version("torch"), Path(spec.origin).parent)
    command = [sys.executable, "-E", "-c", _PROBE]
    probe = subprocess.run(command, capture_output=True, text=True, cwd=os.path.sep)
    found = json.loads(probe.stdout) if probe.returncode == 0 else None
    return TorchInstallation(found[0], Path(found[1]).parent) if found else None


def fingerprint(root: Path) -> str:
    """Of the sources under `root` that the kernels are compiled from: kernels with another one are out of date."""
    digest = hashlib.sha256()
    files = [path for path in (root / "csrc").rglob("*") if path.is_file() and "tests" not in path.parts[-2:]]
    for path in sorted([*files, root / "CMakeLists.txt"]):
        digest.update(f"{path.relative_to(root).as_posix()} {path.stat().st_size}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _native_requirements() -> list[str]:
    if build_choice() == "none":
        return []
    return ["cmake>=3.21", "ninja", "pybind11>=2.12"] + ([] if find_torch() else ["torch>=2.10"])


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """PEP 517 hook."""
    return [*build_meta.get_requires_for_build_wheel(config_settings), *_native_requirements()]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    """PEP 660 hook."""
    return [*build_meta.get_requires_for_build_editable(config_settings), *_native_requirements()]
