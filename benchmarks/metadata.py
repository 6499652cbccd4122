"""What a number needs beside it: where, when and with what it was measured."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from kernelmeta import info

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


def collect() -> dict[str, Any]:
    """Ready for json.dump."""
    load = os.getloadavg() if hasattr(os, "getloadavg") else (float("nan"),) * 3
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "processor": processor(),
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
