"""Focal distillation in Triton, interpreted; run by test_interpreted.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from distillation import draw_logits, expected, with_gradient
from episodes import assert_close
from hypothesis import example, given, settings
from hypothesis import strategies as st
from triton_kernels.interpreter import interpreted

import kernelmeta as km
from kernelmeta.ops import focal_distillation_op
from kernelmeta.reference.focal_distillation import DISTANCES

pytest.importorskip("triton", reason="Triton is not installed")


def distill(*args: Any, **options: Any) -> torch.Tensor:
    with km.use_backend("triton"):
        return km.ops.focal_distillation(*args, **options)


@interpreted
@settings(max_examples=25)
@given(
    st.integers(1, 40), st.integers(1, 70), st.sampled_from(DISTANCES), st.sampled_from([1.0, 100.0]),
    st.sampled_from([0.0, 0.25]), st.booleans(), st.sampled_from([1.0, 2.0, 2.5]), st.booleans(),
    st.sampled_from([1.0, 30.0]), st.integers(0, 100),
)  # fmt: skip
@example(150, 5, "kl", 100.0, 0.25, True, 2.0, True, 1.0, 0)
@example(3, 9000, "kl", 100.0, 0.25, True, 2.0, True, 1.0, 0)  # too wide: plain PyTorch
@example(3, 3000, "kl", 1.0, 0.0, False, 2.0, True, 30.0, 0)
def test_equals_an_independent_form(
    R: int, C: int, distance: str, tau: float, smoothing: float, weighted: bool, power: float, label_loss: bool,
    size: float, seed: int,
) -> None:  # fmt: skip
    new, old, labels = draw_logits(R, C, near=size, seed=seed)
    if R > 2:
        labels[1] = -100
    options: dict[str, Any] = {
        "distance": distance, "tau": tau, "label_smoothing": smoothing, "power": power, "label_loss": label_loss,
        "class_weight": torch.rand(C).double() + 0.5 if weighted else None,
    }  # fmt: skip
    want = with_gradient(expected, new, old, labels, **options)
    assert_close(with_gradient(distill, new, old, labels, **options), want, 1e-9)


@interpreted
@pytest.mark.parametrize("tau", [1.0, 100.0, 1000.0])
def test_float32_keeps_its_digits(tau: float) -> None:
    new, old, labels = draw_logits(16, 500)
    options: dict[str, Any] = {"tau": tau, "label_loss": False}
    got = with_gradient(distill, new.float(), old.float(), labels, **options)
    want = with_gradient(km.reference.focal_distillation, new, old, labels, **options)
    for g, w in zip(got, want, strict=True):
        assert float((g.double() - w).abs().max() / w.abs().max()) <= 1e-6


@interpreted
@pytest.mark.parametrize("distance", DISTANCES)
def test_infinite_logits_nan_and_bad_labels(distance: str) -> None:
    new, old, labels = draw_logits(6, 7)
    new[0, 3] = old[0, 3] = -math.inf
    labels[0] = labels[1] = labels[2] = 0
    options: dict[str, Any] = {"distance": distance, "tau": 2.0, "reduction": "none"}
    got = with_gradient(distill, new, old, labels, **options)
    with km.use_backend("reference"):
        want = with_gradient(km.ops.focal_distillation, new, old, labels, **options)
    assert_close(got, want, 1e-9)
    new[1, 4], old[2, 4] = math.nan, math.nan
    labels[5] = 7
    loss, gradient = with_gradient(distill, new, old, labels, **options)
    assert [bool(x) for x in loss.isnan()] == [False, True, True, False, False, True]
    assert gradient[[0, 3, 4]].isfinite().all() and gradient[[1, 2, 5]].isnan().any(-1).all()


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_precisions_layouts_flips(dtype: torch.dtype) -> None:
    new, old, labels = draw_logits(21, 5)
    new, old = new.to(dtype), old.to(dtype)
    wide = torch.zeros(21, 9, dtype=dtype)
    wide[:, 2:7] = new
    got = with_gradient(distill, wide[:, 2:7], old.float(), labels)
    assert_close(got, with_gradient(expected, new, old, labels), max(1e-6, 2 * torch.finfo(dtype).eps))
    with km.use_backend("triton"):
        _, counts = km.ops.focal_distillation(new, old, labels, return_flips=True)
    _, want = km.reference.focal_distillation(new, old, labels, return_flips=True)
    assert [int(c) for c in counts] == [int(c) for c in want]


@interpreted
def test_opcheck_and_compile() -> None:
    new, old, labels = draw_logits(6, 5)
    arguments = focal_distillation_op.OP.forward_signature.pack(
        new_logits=new.requires_grad_(), old_logits=old, labels=labels, class_weight=None, distance=0, alpha=1.0,
        beta=5.0, tau=3.0, margin=0.5, power=2.0, label_loss=True, label_smoothing=0.1, ignore_index=-100,
        save_trace=True,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.kernelmeta.triton_focal_distillation.default, arguments)
    compiled = torch.compile(distill, fullgraph=True, backend="aot_eager")
    assert_close([compiled(new, old, labels)], [distill(new, old, labels)], 1e-13)
