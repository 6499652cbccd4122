"""The Triton kernels, interpreted on CPU tensors, against the reference.

Triton reads TRITON_INTERPRET when it is imported, so the cases below run in a Python of their own;
``TRITON_INTERPRET=1 pytest tests/triton_kernels`` runs them in this one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from episodes import assert_close, draw, flat, relative_error, running_stats, shapes
from hypothesis import example, given, settings
from hypothesis import strategies as st
from triton_kernels.interpreter import BROKEN, INTERPRETED, both, interpreted

import kernelmeta as km
from kernelmeta.ops import sib_op

pytest.importorskip("triton", reason="Triton is not installed")


@pytest.mark.skipif(INTERPRETED, reason="this is that Python")
@pytest.mark.skipif(bool(BROKEN), reason=BROKEN)
def test_interpreted() -> None:
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), str(root / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    environment.pop("KERNELMETA_BACKEND", None)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command += sorted(map(str, Path(__file__).parent.glob("test_interpreted*.py")))
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@interpreted
@settings(max_examples=6)
@given(shapes(), st.integers(0, 3), st.sampled_from([1e-3, 0.5]), st.sampled_from(["task", "running"]), st.booleans())
@example({"T": 1, "S": 5, "Q": 75, "N": 5, "D": 64, "H": 40}, 3, 1e-3, "task", False)
@example({"T": 2, "S": 17, "Q": 33, "N": 17, "D": 65, "H": 3}, 1, 0.05, "task", True)
@example({"T": 2, "S": 4, "Q": 40, "N": 2, "D": 9, "H": 5}, 2, 0.05, "task", True)  # no Gram matrix in the trace
@example({"T": 2, "S": 4, "Q": 150, "N": 2, "D": 9, "H": 5}, 2, 0.05, "task", True)  # too large: plain PyTorch
@example({"T": 0, "S": 4, "Q": 7, "N": 2, "D": 9, "H": 5}, 2, 0.05, "task", True)
def test_sib(sizes: dict[str, int], steps: int, lr: float, norm_stats: str, theta: bool) -> None:
    episode = draw(**sizes).fresh()
    options: dict[str, Any] = {"steps": steps, "inner_lr": lr, "norm_stats": norm_stats, "return_weights": theta}
    options["running_stats"] = running_stats(sizes["H"])
    got, want = both(lambda: km.ops.sib(*episode.arguments(), **options), episode.leaves())
    # The learning rate is a float32 on its way into the kernel; the arithmetic is float64.
    assert_close(got, want, 1e-6)


@interpreted
@settings(max_examples=6)
@given(shapes(), st.sampled_from(["task", "running"]))
def test_synthetic_gradient_mlp(sizes: dict[str, int], norm_stats: str) -> None:
    episode = draw(**sizes)
    logits = torch.randn(sizes["T"], sizes["Q"], sizes["N"], dtype=torch.float64)
    leaves = [t.clone().requires_grad_() for t in (logits, *episode.mlp)]
    mlp = km.MLPParameters(*leaves[1:])
    stats = running_stats(sizes["H"])
    got, want = both(
        lambda: km.ops.synthetic_gradient_mlp(leaves[0], mlp, norm_stats=norm_stats, running_stats=stats), leaves
    )
    assert_close(got, want, 1e-9)


@interpreted
@settings(max_examples=6)
@given(shapes(), st.booleans())
def test_class_means(sizes: dict[str, int], weighted: bool) -> None:
    e = draw(**sizes).fresh()
    leaves = [e.support, e.weight] if weighted else [e.support]
    weight = e.weight if weighted else None
    got, want = both(lambda: km.ops.class_means(e.support, e.labels, sizes["N"], weight), leaves)
    assert_close(got, want, 1e-12)


@interpreted
def test_bad_labels_give_nan() -> None:
    e = draw(T=3, N=2, S=4)
    labels = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0], [0, 1, 2, 1]])
    with km.use_backend("triton"):
        means = km.ops.class_means(e.support, labels, 2)
    assert means[0].isfinite().all() and means[1, 1].isnan().all() and means[2].isnan().all()


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_features_in_other_precisions(dtype: torch.dtype) -> None:
    episode = draw().fresh(torch.float32)
    episode = episode._replace(support=episode.support.to(dtype), query=episode.query.to(dtype))
    options: dict[str, Any] = {"steps": 2, "inner_lr": 1e-3, "return_weights": True}
    with km.use_backend("triton"):
        got = km.ops.sib(*episode.arguments(), **options)
    want = km.reference.sib(*episode.map(lambda t: t.double()).arguments(), **options)
    assert got[0].dtype is torch.float32
    assert_close(flat(got), flat(want), 2e-5)


@interpreted
def test_float32_gradients() -> None:
    episode = draw()
    options: dict[str, Any] = {"steps": 2, "inner_lr": 1e-3}
    single, double = episode.fresh(torch.float32), episode.fresh()
    with km.use_backend("triton"):
        logits = km.ops.sib(*single.arguments(), **options)
    got = torch.autograd.grad(logits.square().sum(), single.leaves())
    want = torch.autograd.grad(km.reference.sib(*double.arguments(), **options).square().sum(), double.leaves())
    for g, w in zip(got, want, strict=True):
        assert relative_error(g, w) < 1e-3


@interpreted
def test_rows_of_a_bank() -> None:
    e = draw(T=3)
    bank = torch.randn(50, 13, dtype=torch.float64)
    support_index, query_index = torch.randint(50, (3, 7)), torch.randint(50, (3, 11))
    parameters = [t.clone().requires_grad_() for t in (e.weight, e.scale, e.bias, *e.mlp)]
    got, want = both(
        lambda: km.ops.sib(
            bank, e.labels, bank, *parameters[:3], km.MLPParameters(*parameters[3:]), steps=2,
            inner_lr=0.05, support_index=support_index, query_index=query_index,
        ),
        parameters,
    )  # fmt: skip
    assert_close(got, want, 1e-6)


@interpreted
def test_returned_statistics() -> None:
    e = draw()
    options: dict[str, Any] = {"steps": 3, "inner_lr": 0.1, "return_norm_stats": True}
    with km.use_backend("triton"):
        got = km.ops.sib(*e.arguments(), **options)
    assert_close(got, km.reference.sib(*e.arguments(), **options), 1e-6)


@interpreted
def test_transforms_and_refusal() -> None:
    e = draw()
    leaves = [t.clone() for t in (e.scale, e.bias)]

    def loss(scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        arguments = (*e.arguments()[:4], scale, bias, e.mlp)
        return km.ops.sib(*arguments, steps=2, inner_lr=0.05).square().sum()

    with km.use_backend("triton"):
        got = torch.func.grad(loss, (0, 1))(*leaves)
        scale = e.scale.clone().requires_grad_()
        (first,) = torch.autograd.grad(loss(scale, e.bias), scale, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            first.sum().backward()
    with km.use_backend("reference"):
        assert_close(got, torch.func.grad(loss, (0, 1))(*leaves), 1e-6)


@interpreted
def test_same_bits_again() -> None:
    e = draw(T=3).fresh(torch.float32)
    with km.use_backend("triton"):
        runs = [km.ops.sib(*e.arguments(), steps=2, inner_lr=0.05) for _ in range(2)]
    first, second = (torch.autograd.grad(r.square().sum(), e.leaves()) for r in runs)
    assert torch.equal(*runs) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@interpreted
def test_opcheck_and_compile() -> None:
    e = draw(T=2)
    learned = [t.detach().clone().requires_grad_() for t in (e.weight, e.scale, e.bias, *e.mlp)]
    raw = torch.ops.kernelmeta
    torch.library.opcheck(raw.triton_class_means.default, (e.support, e.labels, learned[0], learned[-1].numel()))
    arguments = sib_op.OP.forward_signature.pack(
        start=e.support, start_index=None, query=e.query, query_index=None, support_labels=e.labels,
        weight=learned[0], scale=learned[1], bias=learned[2], mlp=learned[3:], running_stats=None, steps=2,
        inner_lr=0.05, return_weights=True, return_stats=False, save_trace=True,
    )  # fmt: skip
    torch.library.opcheck(raw.triton_sib.default, arguments)
    logits = torch.randn(2, 5, learned[-1].numel(), dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(raw.triton_synthetic_gradient_mlp.default, (logits, *learned[3:], None))

    def call(scale: torch.Tensor) -> torch.Tensor:
        return km.ops.sib(*e.arguments()[:4], scale, e.bias, e.mlp, steps=2, inner_lr=0.05)

    with km.use_backend("triton"):
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(learned[1])
        assert torch.equal(compiled, call(learned[1]))
        got = torch.autograd.grad(compiled.square().sum(), learned[1])
    want = torch.autograd.grad(call(learned[1]).square().sum(), learned[1])
    assert_close(list(got), list(want), 1e-6)
