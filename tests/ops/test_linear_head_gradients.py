"""linear_head_gradients: the loss and all gradients of a training step, against autograd through the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from episodes import assert_close, draw_labels
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy

import kernelmeta as km


def draw(T: int, S: int, Q: int, N: int, D: int, K: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, generator=g)

    return {
        "support": normal(T, S, D), "support_labels": draw_labels(T, S, N, g), "query": normal(T, Q, D),
        "query_labels": torch.randint(N, (T, Q), generator=g), "weight": normal(N, D), "bias": normal(N),
        "rates": torch.rand(K, dtype=dtype, generator=g) * 0.1,
    }  # fmt: skip


def flat(results: km.ops.HeadGradients) -> list[Tensor]:
    return [results.loss, results.accuracy, results.logits, *results.gradients]


def by_autograd(e: dict[str, Tensor], **options: Any) -> list[Tensor]:
    leaves = [e[name].clone().requires_grad_() for name in ("weight", "bias", "rates")]
    logits, _ = km.reference.linear_head(
        e["support"], e["support_labels"], e["query"], *leaves, return_weights=True, **options
    )
    loss = cross_entropy(logits.flatten(0, 1), e["query_labels"].flatten())
    accuracy = (logits.argmax(-1) == e["query_labels"]).to(loss.dtype).mean()
    return [loss, accuracy, logits, *torch.autograd.grad(loss, leaves, materialize_grads=True)]


@settings(max_examples=40)
@given(
    st.integers(1, 4), st.integers(2, 6), st.integers(0, 12), st.integers(1, 30), st.integers(1, 50),
    st.integers(0, 4), st.sampled_from(["cross_entropy", "squared_error", "hinge"]), st.booleans(),
)  # fmt: skip
@example(35, 2, 1, 5, 9, 1, "cross_entropy", False)
@example(1, 5, 20, 75, 640, 5, "cross_entropy", False)
def test_equals_autograd_through_the_reference(
    T: int, N: int, more: int, Q: int, D: int, K: int, oracle: str, first_order: bool
) -> None:
    e = draw(T, N + more, Q, N, D, K)
    options: dict[str, Any] = {"oracle": oracle, "first_order": first_order}
    assert_close(flat(km.ops.linear_head_gradients(**e, **options)), by_autograd(e, **options), 1e-9)


@pytest.mark.parametrize("learn_rates", [False, True])
def test_the_module_sets_what_backward_would(learn_rates: bool) -> None:
    e = draw(3, 10, 12, 5, 16, 1)
    rows = [e[name] for name in ("support", "support_labels", "query")]
    module, twin = (km.nn.ANIL(5, 16, 4, 0.05, learn_rates=learn_rates).double() for _ in range(2))
    twin.load_state_dict(module.state_dict())
    module.steps = twin.steps = 3  # fewer than there are rates
    loss = cross_entropy(twin(*rows).flatten(0, 1), e["query_labels"].flatten())
    loss.backward()
    results = module.gradients(*rows, e["query_labels"])
    pairs = [(p.grad, q.grad) for p, q in zip(module.parameters(), twin.parameters(), strict=True)]
    assert len(pairs) == 2 + learn_rates
    assert_close([results.loss, *(p for p, _ in pairs)], [loss, *(q for _, q in pairs)], 1e-12)


def test_scratch_memory_banks_and_narrow_features() -> None:
    e = draw(2, 6, 9, 3, 21, 2, torch.float32)
    before = flat(km.ops.linear_head_gradients(**e))
    km.ops.linear_head_gradients(**{k: v * float("nan") if v.is_floating_point() else v for k, v in e.items()})
    assert all(torch.equal(a, b) for a, b in zip(flat(km.ops.linear_head_gradients(**e)), before, strict=True))
    bank = torch.cat([e["support"].flatten(0, 1), e["query"].flatten(0, 1)])
    index = {"support_index": torch.arange(12).view(2, 6), "query_index": torch.arange(12, 30).view(2, 9)}
    again = flat(km.ops.linear_head_gradients(**{**e, "support": bank, "query": bank}, **index))
    assert all(torch.equal(a, b) for a, b in zip(again, before, strict=True))
    narrow = {**e, "support": e["support"].half(), "query": e["query"].half()}
    wide = {**e, "support": narrow["support"].float(), "query": narrow["query"].float()}
    assert_close(flat(km.ops.linear_head_gradients(**narrow)), flat(km.ops.linear_head_gradients(**wide)), 1e-6)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query_labels": torch.full((2, 9), 3)}, ValueError, "query_labels: .*label 3; labels must be in 0..2"),
        ({"query_labels": torch.zeros(2, 9)}, TypeError, "query_labels: expected int64"),
        ({"query_labels": torch.zeros(2, 8, dtype=torch.int64)}, ValueError, "query_labels: expected shape"),
        ({"query": None}, TypeError, "query: expected a tensor"),
        ({"support_labels": None}, TypeError, "support_labels: expected a tensor"),
        ({"weight": torch.zeros(3, 20)}, ValueError, "weight: expected shape"),
        ({"oracle": "entropy"}, ValueError, "oracle: expected one of"),
        ({"support_index": torch.zeros(2, 6, dtype=torch.int64)}, ValueError, "given together"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        km.ops.linear_head_gradients(**{**draw(2, 6, 9, 3, 21, 2, torch.float32), **change})
