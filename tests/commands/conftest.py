"""A bank and a run of each module of tests."""

from __future__ import annotations

import pytest
from runs import TRAIN, make_bank

from kernelmeta.cli import main


@pytest.fixture(scope="module")
def bank_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("bank") / "bank.safetensors"
    make_bank().save(path)
    return str(path)


@pytest.fixture(scope="module")
def run(tmp_path_factory, bank_file):
    out = tmp_path_factory.mktemp("runs") / "run"
    assert main([*TRAIN, "--data", bank_file, "--eval-episodes", "50", "--seed", "5", "--out", str(out)]) == 0
    return out
