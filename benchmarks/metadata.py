"""What a number needs beside it: where, when and with what it was measured."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import kernelmeta
from kernelmeta import info
from kernelmeta.backends import backends

ROOT = Path(__file__).resolve().parent.parent


def processor() -> str:
    """The CPU's own name where Linux tells it."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def commit(root: Path = ROOT) -> str:
    """The revision that is checked out, with "+changes" if files differ from it; "unknown" outside a clone."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True).stdout

    try:
        return git("rev-parse", "HEAD").strip() + ("+changes" if git("status", "--porcelain", "-uno").strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def caches() -> dict[str, str]:
    """The first core's caches and their sizes, as Linux tells them: ``{"L1 Data": "32K", ...}``."""
    found = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((folder / name).read_text().strip() for name in ("level", "type", "size"))
        found[f"L{level} {kind}"] = size
    return found


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of a command that times kernels, which must be there; ``--installed`` is one of them.

    Raises:
        SystemExit: there are no CPU kernels, so that the plain PyTorch reference would be timed in their place.
    """
    parser.add_argument(
        "--installed", action="store_true", help="time the kernelmeta that is installed, not that of this source tree"
    )
    options = parser.parse_args(arguments)
    kernels = backends()["cpu"]
    if not kernels.available:
        parser.error(
            f"{Path(kernelmeta.__file__).parent} has no CPU kernels ({kernels.reason}), and plain PyTorch "
            "is not what this command times: run `make install`, or time what is installed with --installed"
        )
    return options


def collect() -> dict[str, Any]:
    """Ready for json.dump."""
    load = os.getloadavg() if hasattr(os, "getloadavg") else (float("nan"),) * 3
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "processor": processor(),
        "caches": caches(),
        "kernelmeta": str(Path(kernelmeta.__file__).parent),
        "load_average": [round(x, 2) for x in load],
        "threads": torch.get_num_threads(),
        "peers": {name: _version(name) for name in ("jax", "jaxlib")},
        **info.collect(),
    }


class Others:
    """How busy other processes keep the machine, from the making of this object on. Linux only."""

    def __init__(self) -> None:
        self._start = self._read()

    @staticmethod
    def _read() -> tuple[float, float, float] | None:
        try:
            words = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
        except OSError:
            return None
        user, nice, system, _, _, irq, soft, steal = map(int, words[:8])
        busy = (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")
        own = os.times()
        return time.monotonic(), busy, own.user + own.system + own.children_user + own.children_system

    def cpus(self) -> float | None:
        """CPUs' worth of work by others, on average; None where the system does not say."""
        end = self._read()
        if self._start is None or end is None:
            return None
        seconds, busy, own = (b - a for a, b in zip(self._start, end, strict=True))
        return max(0.0, busy - own) / max(seconds, 1e-9)


def machine_name() -> str:
    """The processor's name as a part of a file name."""
    words = re.sub(r"\((R|TM)\)|\b(CPU|Processor|with|@.*)\b", "", processor())
    return re.sub(r"[^A-Za-z0-9]+", "-", words).strip("-").lower()
