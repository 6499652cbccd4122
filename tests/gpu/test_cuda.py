"""The CUDA kernels on a card, against float64 on the CPU. Skipped where there is none."""

from __future__ import annotations

from typing import Any

import perceptrons
import pytest
import torch
from distillation import draw_logits, with_gradient
from episodes import Episode, assert_close, draw, running_stats
from torch import Tensor

import kernelmeta as km

REASON = km.backends()["cuda"].reason
pytestmark = pytest.mark.skipif(bool(REASON), reason=f"needs a GPU: {REASON}")

SHAPES: list[dict[str, int]] = [
    {"T": 1, "S": 5, "Q": 75, "N": 5, "D": 640, "H": 40},
    {"T": 3, "S": 9, "Q": 11, "N": 3, "D": 33, "H": 7},
    {"T": 2, "S": 20, "Q": 120, "N": 20, "D": 65, "H": 30},
    {"T": 2, "S": 4, "Q": 300, "N": 2, "D": 9, "H": 5},
    {"T": 200, "S": 3, "Q": 9, "N": 2, "D": 17, "H": 6},
    {"T": 2, "S": 64, "Q": 64, "N": 64, "D": 40, "H": 64},
    {"T": 0, "S": 4, "Q": 7, "N": 2, "D": 9, "H": 5},
]


def on_card(episode: Episode, dtype: torch.dtype) -> Episode:
    moved = episode.map(lambda t: t.detach().to("cuda", dtype).requires_grad_())
    return moved._replace(labels=episode.labels.cuda())


def results(episode: Episode, **options: Any) -> list[Tensor]:
    """Logits, theta_K, and the gradients of a fixed linear function of both; on the CPU."""
    logits, (theta, _) = km.ops.sib(*episode.arguments(), return_weights=True, **options)
    g = torch.Generator().manual_seed(3)
    loss = sum((r * torch.randn(r.shape, dtype=torch.float64, generator=g).to(r)).sum() for r in (logits, theta))
    return [r.detach().cpu() for r in (logits, theta, *torch.autograd.grad(loss, episode.leaves()))]


@pytest.mark.parametrize("norm_stats", ["task", "running"])
@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_sib_in_float64(sizes: dict[str, int], steps: int, norm_stats: str) -> None:
    episode = draw(**sizes)
    options: dict[str, Any] = {"steps": steps, "inner_lr": 0.02, "norm_stats": norm_stats}
    stats = running_stats(sizes["H"])
    want = results(episode.fresh(), running_stats=stats, **options)
    with km.use_backend("cuda"):
        got = results(on_card(episode, torch.float64), running_stats=stats.cuda(), **options)
    assert_close(got, want, 1e-9)


# Ways and hidden units with compiled cases of their own, and others.
COMPILED = [(5, 40), (10, 80), (20, 160), (7, 33)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2), (torch.float16, 5e-3)])
@pytest.mark.parametrize(("N", "H"), COMPILED)
def test_sib_in_other_precisions(N: int, H: int, dtype: torch.dtype, tolerance: float) -> None:
    """Results, and gradients in the Euclidean norm: a ReLU's input within rounding of zero moves single elements."""
    episode = draw(T=4, S=N, Q=75, N=N, D=640, H=H)
    options: dict[str, Any] = {"steps": 3, "inner_lr": 1e-3}
    stored = episode._replace(support=episode.support.to(dtype).double(), query=episode.query.to(dtype).double())
    want = results(stored.fresh(), **options)
    moved = on_card(episode, torch.float32)
    support, query = (t.detach().to(dtype).requires_grad_() for t in (moved.support, moved.query))
    with km.use_backend("cuda"):
        got = results(moved._replace(support=support, query=query), **options)
    assert_close(got[:2], want[:2], tolerance)
    least = 1e-4 * max(float(w.norm()) for w in want[2:])
    errors = [
        float((g.double() - w).norm()) / max(float(w.norm()), least) for g, w in zip(got[2:], want[2:], strict=True)
    ]
    assert max(errors) <= 2e-2, [f"{e:.1e}" for e in errors]


def test_small_ops() -> None:
    e = draw(T=3, S=9, Q=20, N=4, D=37, H=10)
    logits = torch.randn(3, 20, 4, dtype=torch.float64)
    want = [km.ops.class_means(e.support, e.labels, 4, e.weight), km.ops.synthetic_gradient_mlp(logits, e.mlp)]
    c = on_card(e, torch.float64)
    with km.use_backend("cuda"):
        got = [
            km.ops.class_means(c.support, c.labels, 4, c.weight),
            km.ops.synthetic_gradient_mlp(logits.cuda(), c.mlp),
        ]
    assert_close([r.cpu() for r in got], want, 1e-11)


@pytest.mark.parametrize("distance", ["kl", "squared", "ldi_mean"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-11), (torch.float32, 1e-6), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)],
)
def test_focal_distillation(distance: str, dtype: torch.dtype, tolerance: float) -> None:
    for R, C, tau in ((1, 1, 2.0), (40, 5, 1.0), (33, 1000, 100.0), (3, 70_000, 100.0)):
        new, old, labels = draw_logits(R, C, near=3.0 if C < 60_000 else 0.25)  # the loss has to fit float16
        new, old = new.to(dtype), old.to(dtype)
        options: dict[str, Any] = {"distance": distance, "tau": tau, "label_smoothing": 0.1}
        want = with_gradient(km.reference.focal_distillation, new.double(), old.double(), labels, **options)
        with km.use_backend("cuda"):
            got = with_gradient(km.ops.focal_distillation, new.cuda(), old.cuda(), labels.cuda(), **options)
        assert_close([g.cpu() for g in got], want, tolerance)
    labels[0] = C  # no error, which would wait for the device
    with km.use_backend("cuda"):
        each = km.ops.focal_distillation(new.cuda(), old.cuda(), labels.cuda(), reduction="none", **options)
    assert [bool(x) for x in each.isnan().cpu()] == [True, False, False]


@pytest.mark.parametrize("full", [False, True])
def test_tangent_kernels_and_descent_on_them(full: bool) -> None:
    rows = perceptrons.draw((70, 40, 33, 5), T=3, S=9, Q=30)
    labels = (torch.arange(9) % 5).expand(3, 9)

    def run(device: str, backend: str) -> list[Tensor]:
        leaves = [t.detach().to(device).requires_grad_() for t in rows.leaves()]
        support, query, *layers = leaves
        with km.use_backend(backend):
            kernel = km.ops.ntk_gram(support, query, layers[:3], layers[3:], full=full, slope=0.1)
            outputs = km.ops.linearised_descent(
                support, labels.to(device), query, layers[:3], layers[3:], steps=40, lr=0.1, oracle="cross_entropy"
            )
        loss = sum(r.square().mean() for r in (*kernel, outputs))
        return [t.cpu() for t in (*kernel, outputs, *torch.autograd.grad(loss, leaves))]

    assert_close(run("cuda", "cuda"), run("cpu", "reference"), 1e-10)


def test_the_same_bits_again_and_other_tasks_untouched_by_nan() -> None:
    episode = draw(T=40, S=5, Q=30, N=5, D=64, H=40)
    options: dict[str, Any] = {"steps": 3, "inner_lr": 0.02}
    first, second = (results(on_card(episode, torch.float32), **options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    episode.query[7] = float("nan")
    broken = results(on_card(episode, torch.float32), **options)
    others = torch.arange(40) != 7
    for k in (0, 1, 2, 3):  # logits, theta, gradients of support and query
        assert torch.equal(broken[k][others], first[k][others])
    assert broken[0][7].isnan().all()


def test_bad_labels_and_indices_give_nan_to_their_task() -> None:
    e = on_card(draw(T=3, S=4, Q=9, N=2, D=16, H=6), torch.float32)
    labels = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0], [0, 1, 5, 1]], device="cuda")
    logits = km.ops.sib(*e._replace(labels=labels).arguments(), steps=2, inner_lr=0.02)
    assert logits[0].isfinite().all()
    assert logits[1:].isnan().all()


def test_graph_capture_and_replay() -> None:
    episode = on_card(draw(T=2, S=5, Q=75, N=5, D=640, H=40), torch.float32)
    options: dict[str, Any] = {"steps": 3, "inner_lr": 1e-3}

    def step() -> list[Tensor]:
        logits = km.ops.sib(*episode.arguments(), **options)
        return [logits, *torch.autograd.grad(logits.square().sum(), episode.leaves())]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        episode.query.normal_()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


def test_two_streams_at_once() -> None:
    episodes = [on_card(draw(T=64, S=5, Q=75, N=5, D=64, H=40, seed=i), torch.float32) for i in range(2)]
    options: dict[str, Any] = {"steps": 3, "inner_lr": 1e-3}
    want = [km.ops.sib(*e.arguments(), **options) for e in episodes]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in episodes]
    got: list[list[Tensor]] = [[], []]
    for _ in range(10):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                got[i].append(km.ops.sib(*episodes[i].arguments(), **options))
    torch.cuda.synchronize()
    assert all(torch.equal(g, want[i]) for i in range(2) for g in got[i])


def test_a_bank_of_more_than_2_to_the_31_elements() -> None:
    D, n = 640, 2**31 // 640 + 1000
    if torch.cuda.mem_get_info()[0] < 3 * n * D:
        pytest.skip(f"needs {3 * n * D >> 30} GiB of free device memory")
    bank = torch.zeros(n, D, dtype=torch.bfloat16, device="cuda")
    bank[-500:].normal_()
    e = on_card(draw(T=2, S=5, Q=75, N=5, D=D, H=40), torch.float32)
    support, query = torch.randint(n - 500, n, (2, 5), device="cuda"), torch.randint(n - 500, n, (2, 75), device="cuda")
    options: dict[str, Any] = {"steps": 3, "inner_lr": 1e-3}
    rest = (e.weight, e.scale, e.bias, e.mlp)
    got = km.ops.sib(bank, e.labels, bank, *rest, support_index=support, query_index=query, **options)
    assert torch.equal(got, km.ops.sib(bank[support], e.labels, bank[query], *rest, **options))
    assert got.isfinite().all()
