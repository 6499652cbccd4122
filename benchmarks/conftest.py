"""Options and fixtures of the benchmarks. They run through pytest-benchmark, with PyTorch's threads set here."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from benchmarks import floors, metadata


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kernelmeta")
    group.addoption("--grid", choices=("small", "full"), default="small", help="cells of the grid (full: hours)")
    group.addoption("--peers", default="", help="comma-separated; default: all, slow ones at headline cells only")
    group.addoption("--bench-threads", type=int, default=min(2, os.cpu_count() or 1), help="PyTorch's threads")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(config.getoption("--bench-threads"))


@pytest.fixture(scope="session")
def ceilings() -> floors.Ceilings:
    """This machine's ceilings, measured once in this run and printed."""
    found = floors.measure()
    print(f"\n{torch.get_num_threads()} threads: {found}")
    return found


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["kernelmeta"] = metadata.collect()
