"""The report behind ``kernelmeta info``: what was built, what runs, versions, threads."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import torch

from kernelmeta.backends import backends, build_report
from kernelmeta.version import __version__

ENVIRONMENT = ("KERNELMETA_BACKEND", "KERNELMETA_ISA", "OMP_NUM_THREADS", "TRITON_INTERPRET")


def _build_info() -> dict[str, Any]:
    try:
        from kernelmeta._C import build_info
    except ImportError as error:
        return {"unknown": f"the module that describes the build is not there ({error})"}
    return build_info()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def collect() -> dict[str, Any]:
    """Everything that `text` shows, as a dict that `json.dumps` takes."""
    return {
        "version": __version__,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{name: _version(name) for name in ("triton", "numpy", "safetensors")},
        },
        "machine": {
            "system": platform.platform(),
            "processor": platform.machine(),
            "cpus": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "cuda_devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
        "install": build_report(),
        "build": _build_info() if build_report().get("cpu") else {},
        "backends": {name: backend._asdict() for name, backend in backends().items()},
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
    }


def text() -> str:
    """The report, for reading: one fact a line."""
    facts = collect()
    lines = [f"kernelmeta {facts['version']}"]

    def section(title: str, rows: dict[str, Any]) -> None:
        if rows:
            lines.extend(["", title])
            width = max(map(len, rows))
            lines.extend(f"  {name:<{width}}  {_plain(value)}" for name, value in rows.items())

    section(
        "backends",
        {
            name: "runs" + (f" ({_plain(row['details'])})" if row["details"] else "")
            if row["available"]
            else f"does not run: {row['reason']}"
            for name, row in facts["backends"].items()
        },
    )
    section("native build", {name: value for name, value in facts["build"].items() if name != "version"})
    section("versions", facts["versions"])
    section("machine", facts["machine"])
    section("environment", facts["environment"])
    return "\n".join(lines)


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {item}" for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return str(value)
