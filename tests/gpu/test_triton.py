"""The Triton kernels on a card, against float64 on the CPU. Skipped where there is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distillation import draw_logits, with_gradient
from episodes import assert_close, draw
from gpu.test_cuda_learners import HEADS, PROGRAMS, RIDGES, Case, on_device, with_gradients

import kernelmeta as km

REASON = km.backends()["triton"].reason or ("" if torch.cuda.is_available() else "PyTorch finds no GPU")
pytestmark = pytest.mark.skipif(bool(REASON), reason=f"needs a GPU and Triton: {REASON}")


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("N", "H"), [(5, 40), (3, 7), (10, 80)])
def test_sib(N: int, H: int, stored: torch.dtype) -> None:
    episode = draw(T=3, S=N, Q=75, N=N, D=640, H=H)
    rounded = episode._replace(support=episode.support.to(stored).double(), query=episode.query.to(stored).double())
    options: dict[str, Any] = {"steps": 3, "inner_lr": 1e-3, "return_weights": True}

    def found(e: Any) -> list[torch.Tensor]:
        logits, (theta, _) = km.ops.sib(*e.arguments(), **options)
        g = torch.Generator().manual_seed(3)
        loss = sum((r * torch.randn(r.shape, dtype=torch.float64, generator=g).to(r)).sum() for r in (logits, theta))
        return [r.detach().cpu() for r in (logits, theta, *torch.autograd.grad(loss, e.leaves()))]

    want = found(rounded.fresh())
    moved = episode.map(lambda t: t.detach().to("cuda", torch.float32).requires_grad_())
    support, query = (t.detach().to(stored).requires_grad_() for t in (moved.support, moved.query))
    with km.use_backend("triton"):
        got = found(moved._replace(labels=episode.labels.cuda(), support=support, query=query))
    assert_close(got[:2], want[:2], 1e-4 if stored == torch.float32 else 1e-3)
    for mine, theirs in zip(got[2:], want[2:], strict=True):
        assert float((mine.double() - theirs).norm()) <= 2e-2 * float(theirs.norm()) + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_focal_distillation(dtype: torch.dtype) -> None:
    for R, C, tau in ((1, 1, 2.0), (40, 5, 1.0), (33, 1000, 100.0), (3, 70_000, 100.0)):
        new, old, labels = draw_logits(R, C, near=3.0)
        new, old = new.to(dtype), old.to(dtype)
        want = with_gradient(km.reference.focal_distillation, new.double(), old.double(), labels, tau=tau)
        with km.use_backend("triton"):
            got = with_gradient(km.ops.focal_distillation, new.cuda(), old.cuda(), labels.cuda(), tau=tau)
        assert_close([g.cpu() for g in got], want, 2e-6 if dtype is torch.float32 else 8e-3)


def test_small_ops() -> None:
    e = draw(T=3, S=9, Q=20, N=4, D=37, H=10)
    logits = torch.randn(3, 20, 4, dtype=torch.float64)
    want = [km.ops.class_means(e.support, e.labels, 4, e.weight), km.ops.synthetic_gradient_mlp(logits, e.mlp)]
    c = e.map(lambda t: t.to("cuda", torch.float32))._replace(labels=e.labels.cuda())
    with km.use_backend("triton"):
        got = [
            km.ops.class_means(c.support, c.labels, 4, c.weight),
            km.ops.synthetic_gradient_mlp(logits.cuda().float(), c.mlp),
        ]
    assert_close([r.cpu() for r in got], want, 1e-4)


CASES = {
    **{f"program, {name}": on_device(case) for name, case in PROGRAMS.items()},
    **{f"linear head, {name}": case for name, case in HEADS.items() if name != "no tasks"},
    **{f"ridge, {name}": case for name, case in RIDGES.items()},
}


@pytest.mark.parametrize("name", CASES)
def test_the_other_learners(name: str) -> None:
    case: Case = CASES[name]
    want = with_gradients(case, "cpu", torch.float64)
    with km.use_backend("triton"):
        got = with_gradients(case, "cuda", torch.float32)
    assert_close(got, want, 1e-2)


@pytest.mark.parametrize("name", ["program, synthetic gradient", "linear head, published", "ridge, small"])
def test_the_same_bits_again(name: str) -> None:
    with km.use_backend("triton"):
        first, second = (with_gradients(CASES[name], "cuda", torch.float32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
