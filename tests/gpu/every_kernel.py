"""Every CUDA kernel in every precision, once, on small tasks: ``python tests/gpu/every_kernel.py``.

Small enough for compute-sanitizer, which slows a program down a hundredfold. Checks that results are finite where the
reference's are; tests/gpu/test_*.py check the numbers. ``--kernels`` prints the names of the kernels that ran.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/gpu")]

import perceptrons  # noqa: E402
from distillation import draw_logits  # noqa: E402
from episodes import draw  # noqa: E402
from test_cuda import on_card  # noqa: E402
from test_cuda_learners import HEADS, PROGRAMS, RIDGES, Case, on_device, with_gradients  # noqa: E402

import kernelmeta as km  # noqa: E402

STORED = (torch.float32, torch.bfloat16, torch.float16)  # features, where the arithmetic is float32
# Ways and hidden units: the compiled cases, and any other.
SIB_SIZES = ((5, 40), (10, 80), (20, 160), (3, 7))


def sib(dtype: torch.dtype, stored: torch.dtype, N: int, H: int) -> None:
    """Forward and backward of every op with a synthetic gradient, features stored in a precision of their own."""
    episode = on_card(draw(T=2, S=N + 1, Q=2 * N + 1, N=N, D=36, H=H), dtype)
    support, query = (t.detach().to(stored).requires_grad_() for t in (episode.support, episode.query))
    e = episode._replace(support=support, query=query)
    logits, (theta, _) = km.ops.sib(*e.arguments(), steps=2, inner_lr=0.02, return_weights=True)
    means = km.ops.class_means(e.support, e.labels, N, e.weight)
    guess = km.ops.synthetic_gradient_mlp(logits.detach(), e.mlp)
    inner = km.ops.sib_inner_loop(means, e.query, e.scale, e.bias, e.mlp, steps=2, inner_lr=0.02)
    loss = sum(result.float().square().mean() for result in (logits, theta, guess, inner))
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, e.leaves()))


def learner(case: Case, dtype: torch.dtype, stored: torch.dtype) -> None:
    """Forward and backward of one case of a program, a linear head or ridge regression."""
    assert all(result.isfinite().all() for result in with_gradients(case, "cuda", dtype, stored))


def distillation(dtype: torch.dtype, stored: torch.dtype, distance: str) -> None:
    """Forward and backward of focal distillation; the old logits in the precision of the computation."""
    new, old, labels = (t.cuda() for t in draw_logits(11, 37))
    leaf = (new.to(stored)).requires_grad_()
    weight = torch.ones(37, device="cuda", dtype=dtype)
    loss = km.ops.focal_distillation(leaf, old.to(dtype), labels, distance=distance, class_weight=weight)
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, leaf))


def network(dtype: torch.dtype, stored: torch.dtype, full: bool) -> None:
    """Forward and backward of a perceptron's tangent kernel, and of training it linearised."""
    rows = perceptrons.draw((36, 20, 17, 5), S=6, Q=9)
    leaves = [t.cuda().to(stored if i < 2 else dtype).requires_grad_() for i, t in enumerate(rows.leaves())]
    support, query, *layers = leaves
    found = km.ops.ntk_gram(support, query, layers[:3], layers[3:], full=full)
    labels = (torch.arange(6, device="cuda") % 5).expand(2, 6)
    outputs = km.ops.linearised_descent(
        support, labels, query, layers[:3], layers[3:], steps=20, lr=0.1, oracle="cross_entropy"
    )
    loss = sum(result.float().square().mean() for result in (*found, outputs))
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, leaves))


def everything() -> list[Callable[[], None]]:
    calls: list[Callable[[], None]] = []
    kinds = [(torch.float64, torch.float64), *((torch.float32, stored) for stored in STORED)]
    cases = [on_device(case) for case in (*PROGRAMS.values(), HEADS["small"], HEADS["hinge"], *RIDGES.values())]
    for kind in kinds:
        calls += [lambda kind=kind, size=size: sib(*kind, *size) for size in SIB_SIZES]
        calls += [lambda kind=kind, case=case: learner(case, *kind) for case in cases]
        calls += [lambda kind=kind, d=d: distillation(*kind, d) for d in ("kl", "ldi_mean")]
        calls += [lambda kind=kind, full=full: network(*kind, full) for full in (False, True)]
    return calls


def main() -> None:
    with km.use_backend("cuda"):
        if "--kernels" in sys.argv[1:]:
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                for run in everything():
                    run()
                torch.cuda.synchronize()
            print(*sorted({event.key for event in profile.key_averages()}), sep="\n")
        else:
            for run in everything():
                run()
            torch.cuda.synchronize()


if __name__ == "__main__":
    main()
