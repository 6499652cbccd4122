"""The bank of every training test, in memory and as a file."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import make_bank

from kernelmeta.data import FeatureBank


@pytest.fixture(scope="session")
def bank() -> FeatureBank:
    return make_bank()


@pytest.fixture(scope="session")
def bank_file(tmp_path_factory, bank) -> Path:
    path = tmp_path_factory.mktemp("bank") / "bank.safetensors"
    bank.save(path)
    return path
