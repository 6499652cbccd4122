"""Programs on Gram matrices against programs on features, and against steps on the weights of a linearised network."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from episodes import assert_close, draw
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp

import kernelmeta as km
from kernelmeta.nn import Phase

EPISODE = draw()  # 3 ways, 13 features, float64
T, S = EPISODE.labels.shape
LINEAR: dict[str, Any] = {"classifier": "linear", "start": "zero"}


def products(a: Tensor, b: Tensor) -> Tensor:
    return a @ b.mT + 1


@pytest.mark.parametrize("oracle", ["cross_entropy", "squared_error", "hinge"])
@pytest.mark.parametrize("reduction", [None, "sum"])
def test_equals_the_program_on_features(oracle: str, reduction: str | None) -> None:
    phases = [Phase(oracle, 7, 0.05), Phase("squared_error", 2, 0.01), Phase("hinge", 0, 1.0)]
    support, query = (rows.detach().clone().requires_grad_() for rows in (EPISODE.support, EPISODE.query))
    rates = torch.linspace(0.02, 0.05, 9, dtype=torch.float64).requires_grad_()
    scale = torch.tensor([3.0], dtype=torch.float64).requires_grad_()
    options: dict[str, Any] = {
        "n_way": 3, "rates": rates, "target_scale": scale, "reduction": reduction, **LINEAR,
    }  # fmt: skip
    results = []
    for gram in (None, (products(support, support), products(query, support))):
        rows = (support, query) if gram is None else (None, None)
        logits = km.ops.program(rows[0], EPISODE.labels, rows[1], phases, gram=gram, **options)
        wanted = torch.sin(torch.arange(logits.numel(), dtype=torch.float64)).view_as(logits)
        grads = torch.autograd.grad((logits * wanted).sum(), (support, query, rates, scale))
        results.append([logits, *grads])
    assert_close(results[1], results[0], 1e-10)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("oracle", ["cross_entropy", "squared_error"])
def test_equals_the_op_that_trains_linearised_networks(oracle: str, full: bool) -> None:
    """And so with plain steps on the weights, which is what that op is tested against."""
    torch.manual_seed(0)
    sizes = (13, 6, 3) if full else (13, 3)  # (with one layer the outputs' kernels are alike and apart)
    weights = [torch.randn(b, a, dtype=torch.float64) / a for a, b in pairwise(sizes)]
    biases = [torch.randn(len(w), dtype=torch.float64) for w in weights]
    leaves = [*weights, EPISODE.support.detach().clone(), EPISODE.query.detach().clone()]
    for leaf in leaves:
        leaf.requires_grad_()
    *weights, support, query = leaves
    kernel = km.ops.ntk_gram(support, query, weights, biases, full=full)
    if not full:  # the trace over three equal kernels
        kernel = kernel._replace(gram=kernel.gram / 3, cross=kernel.cross / 3)
    lr = 0.1
    decay = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    leaves.append(decay)
    got = km.ops.program(
        None, EPISODE.labels, None, [Phase(oracle, 17, lr)], n_way=3, gram=kernel, weight_decay=decay, **LINEAR
    )
    want = km.ops.linearised_descent(
        support, EPISODE.labels, query, weights, biases, steps=17, lr=lr, oracle=oracle, weight_decay=decay
    )  # fmt: skip
    results = [
        [logits, *torch.autograd.grad(logits.square().sum(), leaves, retain_graph=True)] for logits in (got, want)
    ]
    assert_close(results[0], results[1], 1e-10)


def test_equals_steps_on_the_weights_of_any_linearised_module() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(13, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, q, labels = EPISODE.support.detach()[:1], EPISODE.query.detach()[:1], EPISODE.labels[:1]
    kernel = km.ops.TangentKernel(
        km.linear.ntk_gram(module, x, full=True), km.linear.ntk_gram(module, q, x, full=True), module(x), module(q)
    )
    got = km.ops.program(
        None, labels, None, [Phase("cross_entropy", 30, 0.3)], n_way=3, gram=kernel, **LINEAR
    )  # fmt: skip
    origin = {name: p.detach() for name, p in module.named_parameters()}
    moved = {name: torch.zeros_like(p) for name, p in origin.items()}
    y = nn.functional.one_hot(labels[0], 3).double()

    def outputs(rows: Tensor) -> Any:
        return lambda at: functional_call(module, at, rows)

    for _ in range(30):
        start, along = jvp(outputs(x[0]), (origin,), (moved,))
        back = vjp(outputs(x[0]), origin)[1](((start + along).softmax(-1) - y) / S)[0]
        moved = {name: p - 0.3 * back[name] for name, p in moved.items()}
    start, along = jvp(outputs(q[0]), (origin,), (moved,))
    assert_close([got[0]], [start + along], 1e-10)


def test_types_and_torch_func() -> None:
    gram, cross = (products(a, EPISODE.support).detach() for a in (EPISODE.support, EPISODE.query))

    def logits(gram: Tensor, cross: Tensor) -> Tensor:
        phases = [Phase("cross_entropy", 5, 0.05)]
        return km.ops.program(None, EPISODE.labels, None, phases, n_way=3, gram=(gram, cross), **LINEAR)

    want = logits(gram, cross)
    half = logits(gram.bfloat16(), cross.bfloat16())
    assert half.dtype is torch.bfloat16 and torch.allclose(half.double(), want, atol=0.1, rtol=0.1)
    gram.requires_grad_()
    (by_autograd,) = torch.autograd.grad(logits(gram, cross).square().sum(), gram)
    by_func = torch.func.grad(lambda K: logits(K, cross).square().sum())(gram.detach())
    assert_close([by_func], [by_autograd], 1e-12)


def test_compiled_vmapped_and_without_tasks() -> None:
    gram, cross = (products(a, EPISODE.support).detach() for a in (EPISODE.support, EPISODE.query))

    def logits(gram: Tensor, cross: Tensor, labels: Tensor = EPISODE.labels) -> Tensor:
        phases = [Phase("cross_entropy", 5, 0.05)]
        return km.ops.program(None, labels, None, phases, n_way=3, gram=(gram, cross), **LINEAR)

    want, leaf = logits(gram, cross), gram.clone().requires_grad_()
    got = torch.compile(logits, backend="aot_eager", fullgraph=True)(leaf, cross)
    grads = [torch.autograd.grad(z.square().sum(), leaf)[0] for z in (got, logits(leaf, cross))]
    assert_close([got, grads[0]], [want, grads[1]], 1e-12)
    same = torch.stack([want[:1], want[:1]])
    alike = torch.vmap(lambda K, C: logits(K, C, EPISODE.labels[:1]))(
        gram[:1].expand(2, 1, -1, -1), cross[:1].expand(2, 1, -1, -1)
    )
    assert_close([alike], [same], 1e-12)
    with torch.inference_mode():
        assert torch.equal(logits(gram, cross), want)
    assert logits(gram[:0], cross[:0], EPISODE.labels[:0]).shape == (0, *want.shape[1:])


def test_what_does_not_go_with_gram_is_named() -> None:
    gram = (products(EPISODE.support, EPISODE.support), products(EPISODE.query, EPISODE.support))
    loss = [Phase("cross_entropy", 1, 0.1)]
    options: dict[str, Any] = {"n_way": 3, "gram": gram, **LINEAR}
    ones = torch.ones(1, dtype=torch.float64)
    cases: list[tuple[dict[str, Any], list[Phase], str]] = [
        ({}, [Phase("entropy", 1, 0.1)], "losses of support rows .* got entropy of query rows"),
        ({}, [Phase("synthetic_gradient", 1, 0.1)], "got synthetic_gradient"),
        ({"classifier": "cosine"}, loss, "expected classifier='linear' and start='zero'"),
        ({"start": "class_means"}, loss, "expected classifier='linear' and start='zero'"),
        ({"bias": torch.zeros(3)}, loss, "bias: expected none beside gram"),
        ({"first_order": True}, loss, "first_order: expected none beside gram"),
        ({"return_weights": True}, loss, "return_weights: expected none beside gram"),
        ({"gram": (gram[0][:, 1:], gram[1])}, loss, r"gram: expected shape \[T, S, S\]"),
        ({"gram": (gram[0], gram[1][..., 1:])}, loss, r"cross: expected shape \[T, Q, S\]"),
        ({"rates": ones.expand(2)}, loss, "rates: expected shape"),
        ({"n_way": 2}, loss, "label"),
        ({"weight_decay": -1.0}, loss, "weight_decay: expected a number of at least 0, got -1"),
        ({"weight_decay": ones.expand(2)}, loss, "weight_decay: expected"),
    ]
    for changed, phases, message in cases:
        with pytest.raises(ValueError, match=message):
            km.ops.program(None, EPISODE.labels, None, phases, **(options | changed))
    with pytest.raises(ValueError, match="support: expected none beside gram"):
        km.ops.program(EPISODE.support, EPISODE.labels, None, loss, **options)
    with pytest.raises(ValueError, match="weight_decay: expected 0, its default, unless gram is given"):
        km.ops.program(EPISODE.support, EPISODE.labels, EPISODE.query, loss, n_way=3, weight_decay=0.1)
    with pytest.raises(TypeError, match="gram: expected a TangentKernel"):
        km.ops.program(None, EPISODE.labels, None, loss, **(options | {"gram": gram[0]}))
    with pytest.raises(TypeError, match="gram instead of both"):
        km.ops.program(None, EPISODE.labels, None, loss, **(options | {"gram": None}))
