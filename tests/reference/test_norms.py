"""Lengths and normalised rows of every size, by the quick way, the one for any row, and as they are traced."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from kernelmeta.reference import norms
from kernelmeta.reference.norms import FLOOR, unit, unit_and_length

# What rows of length about 1 are multiplied by, to where squares leave the range of their type, and beyond.
SCALES = {
    torch.float32: [1.0, 1e-9, 1e9, 1e-11, 1e-18, 1e18, 1e-30, 1e36],
    torch.float64: [1.0, 1e-9, 1e9, 1e-11, 1e-70, 1e150, 1e-300, 1e300],
}


@pytest.fixture(params=["few", "many"], autouse=True)
def many(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norms, "MANY", 1 if request.param == "many" else 2**40)


def in_longer_numbers(rows: Tensor) -> tuple[Tensor, Tensor]:
    """By powers of two, which lose nothing, so that squares stay in range."""
    exponent = rows.abs().amax(-1, keepdim=True).frexp().exponent
    over = torch.ldexp(rows, -exponent).double()
    length = torch.ldexp(over.norm(dim=-1, keepdim=True), exponent)
    return rows.double() / length.clamp_min(FLOOR), length.clamp_min(FLOOR)


@pytest.mark.parametrize("among", [False, True], ids=["alone", "beside a zero row"])
@pytest.mark.parametrize(("dtype", "scale"), [(dtype, scale) for dtype, scales in SCALES.items() for scale in scales])
def test_rows_of_every_size(dtype: torch.dtype, scale: float, among: bool) -> None:
    rows = scale * torch.randn(5, 4, 7, generator=torch.Generator().manual_seed(0), dtype=dtype)
    if among:
        rows[2, 1] = 0
    want = in_longer_numbers(rows)
    leaf = rows.requires_grad_()
    h, length = unit_and_length(leaf)
    eps = torch.finfo(dtype).eps
    assert_close(h, want[0].to(dtype), rtol=8 * eps, atol=8 * eps)
    assert_close(length, want[1].to(dtype), rtol=8 * eps, atol=0)
    # The derivative of h along a fixed pull is (pull - h <h, pull>) / length, where the length is above its floor.
    pull = torch.randn(rows.shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    (got,) = torch.autograd.grad((h * pull).sum(), leaf)
    unit64, length64, pull64 = *want, pull.double()
    along = (unit64 * pull64).sum(-1, keepdim=True) * (length64 > FLOOR)
    slope = (pull64 - unit64 * along) / length64
    assert torch.isfinite(got).all()
    assert_close(got.double() * length64, slope * length64, rtol=0, atol=64 * eps)


@pytest.mark.parametrize("size", [0.3, 1e-13, 1e200])
def test_first_and_second_derivatives(size: float) -> None:
    rows = torch.randn(3, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64).requires_grad_()

    def scaled(rows: Tensor) -> tuple[Tensor, Tensor]:
        h, length = unit_and_length(size * rows)
        return h, length / size

    assert torch.autograd.gradcheck(scaled, rows, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(scaled, rows)


@pytest.mark.parametrize("way", ["compile", "jit", "vmap"])
def test_what_is_traced_holds_for_other_rows(way: str) -> None:
    """No choice that the rows of the first call led to is kept."""
    first = torch.randn(3, 5, generator=torch.Generator().manual_seed(3))
    traced: Any = {
        "compile": lambda: torch.compile(unit, backend="eager", fullgraph=True),
        "jit": lambda: torch.jit.trace(unit, first),
        "vmap": lambda: torch.func.vmap(unit),
    }[way]()
    for scale in (1.0, 0.0, 1e-30, 1e30):
        assert_close(traced(scale * first), unit(scale * first), rtol=1e-6, atol=1e-6)


def test_a_row_does_not_depend_on_those_beside_it() -> None:
    rows = torch.randn(4, 9, generator=torch.Generator().manual_seed(4))
    rows[2] *= 1e-30
    rows[3] = float("nan")
    together = unit_and_length(rows)
    for i in range(3):
        alone = unit_and_length(rows[i : i + 1])
        assert all(torch.equal(one[0], all_of[i]) for one, all_of in zip(alone, together, strict=True))
    assert unit_and_length(rows[:0])[0].shape == (0, 9)
