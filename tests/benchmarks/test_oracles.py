"""What stands beside the oracles' kernels in a benchmark computes the same."""

from __future__ import annotations

import importlib.util

import pytest
import torch

pytest.importorskip("benchmarks", reason="the benchmarks are not part of the installed package")

from benchmarks import oracles

PEERS = {"eager": oracles.eager, "jax.jit": oracles.jax_jit}


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("oracle", oracles.ORACLES)
def test_peers_agree_with_the_program_in_float64(oracle: str, name: str) -> None:
    if name == "jax.jit" and importlib.util.find_spec("jax") is None:
        pytest.skip("jax is not installed (pip install jax)")
    inputs = oracles.draw(3, 16, torch.float64)
    found, want = PEERS[name](inputs, oracle)(), oracles.program(inputs, oracle)()
    # Of transport they know what Sinkhorn's iterations leave of it.
    assert oracles.error(found, want) <= (1e-4 if oracle == "assignment" else 1e-9)


def test_a_step_less_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = oracles.draw(3, 16, torch.float64)
    want = oracles.program(inputs, "proportions")()
    monkeypatch.setattr(oracles, "STEPS", oracles.STEPS - 1)
    assert oracles.error(oracles.eager(inputs, "proportions")(), want) > 1e-3
