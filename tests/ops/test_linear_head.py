"""ANIL's inner loop against an unrolled loop in D dimensions, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from episodes import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

import kernelmeta as km
from kernelmeta.ops.linear_head_op import OP

ORACLES = ("cross_entropy", "squared_error", "hinge")


def draw(T: int, S: int, Q: int, N: int, D: int, K: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """support, labels, query, weight, bias, rates."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int, size: float = 1.0) -> Tensor:
        return (size * torch.randn(*shape, dtype=torch.float64, generator=g)).to(dtype)

    rates = (torch.rand(K, dtype=torch.float64, generator=g) * 0.3).to(dtype)
    labels = torch.randint(N, (T, S), generator=g)
    return [normal(T, S, D, size=0.5), labels, normal(T, Q, D), normal(N, D, size=0.3), normal(N), rates]


@st.composite
def sizes(draw: Any) -> tuple[int, ...]:
    T, S, Q = draw(st.integers(1, 4)), draw(st.integers(1, 40)), draw(st.integers(1, 40))
    return T, S, Q, draw(st.integers(1, 7)), draw(st.integers(1, 70)), draw(st.integers(0, 4))


def with_gradients(f: Any, arguments: list[Tensor], **options: Any) -> list[Tensor]:
    """Logits and heads, and the gradients of a random linear function of them."""
    arguments = [a.detach().clone().requires_grad_(a.is_floating_point()) for a in arguments]
    logits, head = f(*arguments, return_weights=True, **options)
    results = [logits, *head]
    g = torch.Generator().manual_seed(1)
    loss = sum((r * torch.randn(r.shape, dtype=r.dtype, generator=g)).sum() for r in results)
    leaves = [a for a in arguments if a.is_floating_point()]
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [*results, *(torch.zeros_like(a) if d is None else d for a, d in zip(leaves, found, strict=True))]


@settings(max_examples=40)
@given(sizes(), st.sampled_from(ORACLES), st.booleans())
def test_against_the_reference(sizes: tuple[int, ...], oracle: str, first_order: bool) -> None:
    arguments = draw(*sizes)
    options = {"oracle": oracle, "first_order": first_order}
    got = with_gradients(km.ops.linear_head, arguments, **options)
    assert_close(got, with_gradients(km.reference.linear_head, arguments, **options), 1e-10)


def unrolled(module: km.nn.ANIL, support: Tensor, labels: Tensor, query: Tensor) -> Tensor:
    """MAML's inner loop as one writes it for one task, with nothing of this package."""
    logits, rates = [], module.step_rates()
    for x, y, q in zip(support, labels, query, strict=True):
        weight, bias = module.weight, module.bias
        for k in range(module.steps):
            rate = module.phases[0].lr if rates is None else rates[k]
            steps = torch.autograd.grad(
                cross_entropy(linear(x, weight, bias), y), (weight, bias), create_graph=not module.first_order
            )
            weight, bias = weight - rate * steps[0], bias - rate * steps[1]
        logits.append(linear(q, weight, bias))
    return torch.stack(logits)


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("learn_rates", [False, True])
def test_module_against_an_unrolled_loop(first_order: bool, learn_rates: bool) -> None:
    module = km.nn.ANIL(5, 64, 5, 0.2, first_order, learn_rates=learn_rates).double()
    support, labels, query = draw(3, 25, 30, 5, 64, 0)[:3]
    answers = torch.arange(30).remainder(5).expand(3, 30)
    found = []
    for call in (module, lambda *a: unrolled(module, *a)):
        module.zero_grad()
        logits = call(support, labels, query)
        cross_entropy(logits.flatten(0, 1), answers.flatten()).backward()
        found.append([logits.detach(), *(p.grad for p in module.parameters())])
    assert_close(*found, 1e-9)


def test_second_order_is_not_first_order() -> None:
    """One step from W: the second-order gradient is (I - rate H) times the first-order one, H the Hessian."""
    support, labels, query, weight, bias, _ = draw(1, 6, 9, 3, 4, 0)
    rate = torch.tensor([0.3], dtype=torch.float64)

    def gradient(first_order: bool) -> Tensor:
        w, b = weight.clone().requires_grad_(), bias.clone().requires_grad_()
        z = km.ops.linear_head(support, labels, query, w, b, rate, first_order=first_order)
        grads = torch.autograd.grad(z.square().sum(), (w, b))
        return torch.cat([g.flatten() for g in grads])

    def loss(head: Tensor) -> Tensor:
        return cross_entropy(linear(support[0], head[:12].view(3, 4), head[12:]), labels[0])

    hessian = torch.autograd.functional.hessian(loss, torch.cat([weight.flatten(), bias]))
    first, second = gradient(True), gradient(False)
    assert_close([second], [first - rate * hessian @ first], 1e-12)
    assert float((second - first).norm() / first.norm()) > 1e-2


def test_tasks_one_by_one_and_rows_of_a_bank() -> None:
    support, labels, query, *head = draw(4, 9, 11, 3, 17, 3)
    together = km.ops.linear_head(support, labels, query, *head)
    alone = [km.ops.linear_head(*(t[i : i + 1] for t in (support, labels, query)), *head) for i in range(4)]
    assert_close([together], [torch.cat(alone)], 1e-12)
    bank = torch.cat([support.flatten(0, 1), query.flatten(0, 1)])
    index = torch.arange(len(bank))
    options = {"support_index": index[:36].view(4, 9), "query_index": index[36:].view(4, 11)}
    assert torch.equal(km.ops.linear_head(bank, labels, bank, *head, **options), together)
    assert_close([km.reference.linear_head(bank, labels, bank, *head, **options)], [together], 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_precisions(dtype: torch.dtype) -> None:
    support, labels, query, *head = draw(2, 9, 11, 3, 17, 3)
    support, query = support.to(dtype), query.to(dtype)
    got = km.ops.linear_head(support, labels, query, *(t.float() for t in head))
    want = km.reference.linear_head(support.double(), labels, query.double(), *head)
    assert got.dtype is torch.float32
    assert_close([got], [want], 2e-5)


def test_transforms() -> None:
    support, labels, query, weight, bias, rates = draw(2, 5, 6, 3, 7, 2)
    learned = [t.clone().requires_grad_() for t in (support, query, weight, bias, rates)]
    arguments = OP.forward_signature.pack(
        support=learned[0], support_index=None, query=learned[1], query_index=None, support_labels=labels,
        weight=learned[2], bias=learned[3], rates=learned[4], oracle=0, first_order=False, return_weights=True,
        save_trace=True,
    )  # fmt: skip
    torch.library.opcheck(OP.raw, arguments)

    def call(s: Tensor, q: Tensor, w: Tensor, b: Tensor, r: Tensor) -> Tensor:
        return km.ops.linear_head(s, labels, q, w, b, r)

    assert torch.autograd.gradcheck(call, learned)
    eager = torch.autograd.grad(call(*learned).square().sum(), learned)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(*learned)
    assert_close(torch.autograd.grad(compiled.square().sum(), learned), eager, 1e-12)
    plain = [t.detach() for t in learned]
    assert_close(torch.func.grad(lambda *a: call(*a).square().sum(), tuple(range(5)))(*plain), eager, 1e-12)
    rates_batch = torch.stack([plain[4], 2 * plain[4]])
    each = torch.func.vmap(lambda r: call(*plain[:4], r))(rates_batch)
    assert_close(list(each), [call(*plain[:4], r) for r in rates_batch], 1e-12)
    (first,) = torch.autograd.grad(call(*learned).square().sum(), learned[2], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        first.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.full((2, 5), 3)}, "task 0 has label 3"),
        ({"labels": torch.zeros(2, 4, dtype=torch.int64)}, "support_labels"),
        ({"bias": torch.zeros(2, dtype=torch.float64)}, "bias"),
        ({"rates": torch.zeros((), dtype=torch.float64)}, "rates"),
        ({"query": torch.zeros(2, 6, 8, dtype=torch.float64)}, "support"),
        ({"oracle": "entropy"}, "oracle"),
    ],
)
def test_errors(change: dict[str, Any], message: str) -> None:
    names = ("support", "labels", "query", "weight", "bias", "rates")
    given = dict(zip(names, draw(2, 5, 6, 3, 7, 2), strict=True))
    options = {"oracle": change.pop("oracle")} if "oracle" in change else {}
    with pytest.raises(ValueError, match=message):
        km.ops.linear_head(*(given | change).values(), **options)


def test_no_tasks_and_nan_stays_in_its_task() -> None:
    support, labels, query, *head = draw(2, 5, 6, 3, 7, 2)
    assert km.ops.linear_head(support[:0], labels[:0], query[:0], *head).shape == (0, 6, 3)
    clean = km.ops.linear_head(support, labels, query, *head)
    support[0, 0, 0] = float("nan")
    dirty = km.ops.linear_head(support, labels, query, *head)
    assert dirty[0].isnan().all() and torch.equal(dirty[1], clean[1])
