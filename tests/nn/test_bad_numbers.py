"""Labels and indices that point nowhere, and labels of narrow types: every learner, every backend, says the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import kernelmeta as km
from kernelmeta.nn import Phase

N, D, ROWS = 3, 6, 20
LEARNERS: dict[str, Callable[[], Any]] = {
    "sib": lambda: km.nn.SIB(N, D),
    "equivariant": lambda: km.nn.EquivariantSIB(N, D),
    "anil": lambda: km.nn.ANIL(N, D),
    "ridge": lambda: km.nn.RidgeHead(N),
    "lqf": lambda: km.nn.LQF(N, D, 8),
    "prototypes": lambda: km.nn.Prototypes(N, D),
    "soft k-means": lambda: km.nn.SoftKMeans(N),
    "program": lambda: km.nn.Program(N, D, [Phase("cross_entropy", 2, 0.1)]),
    "maml": lambda: km.nn.MAML(nn.Linear(D, N), N),
}
BANK = torch.randn(ROWS, D, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(N).repeat(2, 2)
SUPPORT, QUERY = torch.arange(2 * 2 * N).view(2, -1), torch.arange(10).view(2, -1)


def changed(tensor: torch.Tensor, value: int) -> torch.Tensor:
    tensor = tensor.clone()
    tensor[1, 2] = value
    return tensor


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", LEARNERS)
def test_numbers_that_point_nowhere(name: str, backend: str) -> None:
    if not km.backends()[backend].available:
        pytest.skip(f"{backend}: {km.backends()[backend].reason}")
    head = LEARNERS[name]()
    with km.use_backend(backend):
        head.from_bank(BANK, SUPPORT, LABELS, QUERY)
        for bad in (-1, ROWS, 2**40):
            with pytest.raises(ValueError, match=f"support.*{bad}"):
                head.from_bank(BANK, changed(SUPPORT, bad), LABELS, QUERY)
            with pytest.raises(ValueError, match=f"query.*{bad}"):
                head.from_bank(BANK, SUPPORT, LABELS, changed(QUERY, bad))
        for bad in (-1, N, 2**40):
            with pytest.raises(ValueError, match=f"support_labels: task 1 has label {bad}"):
                head.from_bank(BANK, SUPPORT, changed(LABELS, bad), QUERY)
            with pytest.raises(ValueError, match=f"support_labels: task 1 has label {bad}"):
                head(BANK[SUPPORT], changed(LABELS, bad), BANK[QUERY])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", LEARNERS)
def test_labels_of_narrow_types(name: str, backend: str) -> None:
    if not km.backends()[backend].available:
        pytest.skip(f"{backend}: {km.backends()[backend].reason}")
    head = LEARNERS[name]().eval()
    with km.use_backend(backend):
        want = head(BANK[SUPPORT], LABELS, BANK[QUERY])
        for dtype in (torch.int32, torch.int16, torch.int8, torch.uint8):
            assert torch.equal(head(BANK[SUPPORT], LABELS.to(dtype), BANK[QUERY]), want)
        with pytest.raises(TypeError, match="support_labels: expected int64, got float32"):
            head(BANK[SUPPORT], LABELS.float(), BANK[QUERY])
