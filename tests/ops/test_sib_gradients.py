"""sib_gradients: the loss and all gradients of a training step, against autograd through the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from episodes import Episode, assert_close, draw, running_stats, shapes
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

import kernelmeta as km

CPU = km.backends()["cpu"]
needs_kernel = pytest.mark.skipif(not CPU.available, reason=f"no CPU kernels: {CPU.reason}")
OPTIONS: dict[str, Any] = {"steps": 2, "inner_lr": 0.05}


def answers(e: Episode, seed: int = 5) -> torch.Tensor:
    N = e.mlp.weight1.shape[1]
    return torch.randint(N, e.query.shape[:2], generator=torch.Generator().manual_seed(seed))


def run(e: Episode, labels: torch.Tensor | None = None, **options: Any) -> km.ops.SIBGradients:
    support, support_labels, query, *parameters = e
    labels = answers(e) if labels is None else labels
    return km.ops.sib_gradients(support, support_labels, query, labels, *parameters, **{**OPTIONS, **options})


def by_autograd(e: Episode, labels: torch.Tensor, **options: Any) -> list[torch.Tensor]:
    e = e.fresh()
    logits = km.reference.sib(*e.arguments(), **options)
    loss = cross_entropy(logits.flatten(0, 1), labels.flatten())
    grads = torch.autograd.grad(loss, e.leaves()[2:], materialize_grads=True)
    accuracy = (logits.argmax(-1) == labels).to(loss.dtype).mean()
    return [loss, accuracy, logits, *grads]


def flat(results: km.ops.SIBGradients) -> list[torch.Tensor]:
    return [results.loss, results.accuracy, results.logits, *results.gradients]


@settings(max_examples=40)
@given(shapes(), st.integers(0, 4), st.sampled_from(["sum", "mean"]), st.sampled_from(["task", "batch", "running"]))
@example({"T": 1, "S": 5, "Q": 75, "N": 5, "D": 640, "H": 40}, 3, "sum", "task")
@example({"T": 35, "S": 3, "Q": 5, "N": 2, "D": 9, "H": 4}, 1, "sum", "task")
@example({"T": 2, "S": 9, "Q": 300, "N": 5, "D": 33, "H": 12}, 3, "mean", "task")  # no Gram matrix
@example({"T": 2, "S": 20, "Q": 300, "N": 20, "D": 33, "H": 160}, 3, "sum", "task")  # too many activations to keep
def test_equals_autograd_through_the_reference(
    sizes: dict[str, int], steps: int, reduction: str, norm_stats: str
) -> None:
    e = draw(**sizes)
    options = {"steps": steps, "inner_lr": 0.05, "reduction": reduction, "norm_stats": norm_stats}
    options["running_stats"] = running_stats(sizes["H"])
    assert_close(flat(run(e, **options)), by_autograd(e, answers(e), **options), 1e-9)


@needs_kernel
def test_kernel_and_composition_agree_to_the_bit_where_they_should() -> None:
    """The fused kernel's logits and statistics are the op's own; a bank gives what its rows give."""
    e = draw(T=3, dtype=torch.float32)
    got = run(e, return_norm_stats=True)
    logits, stats = km.ops.sib(*e.arguments(), **OPTIONS, return_norm_stats=True)
    assert torch.equal(got.logits, logits)
    assert torch.equal(got.norm_stats, stats)
    bank = torch.cat([e.support.flatten(0, 1), e.query.flatten(0, 1)])
    numbers = torch.arange(len(bank)).split([e.support[..., 0].numel(), e.query[..., 0].numel()])
    index = dict(zip(("support_index", "query_index"), (n.view(3, -1) for n in numbers), strict=True))
    again = run(e._replace(support=bank, query=bank), answers(e), **index)
    assert all(torch.equal(a, b) for a, b in zip(flat(again), flat(got), strict=True))


@needs_kernel
def test_nothing_is_left_in_the_scratch_memory() -> None:
    """A task of NaN before, in the same thread's memory, changes no bit."""
    e = draw(T=1, Q=19, dtype=torch.float32)
    before = flat(run(e))
    poisoned = run(e.map(lambda t: torch.full_like(t, float("nan"))))
    assert poisoned.logits.isnan().all()
    assert poisoned.accuracy == 0
    assert all(torch.equal(a, b) for a, b in zip(flat(run(e)), before, strict=True))


def test_features_narrower_than_the_parameters() -> None:
    e = draw(dtype=torch.float32)
    narrow = e._replace(support=e.support.bfloat16(), query=e.query.bfloat16())
    want = run(e._replace(support=narrow.support.float(), query=narrow.query.float()))
    assert_close(flat(run(narrow)), flat(want), 1e-6)
    assert run(e.map(lambda t: t.bfloat16())).logits.dtype is torch.bfloat16


@pytest.mark.parametrize("labels", ["sorted", "strided"])
def test_the_module_sets_what_backward_would(labels: str) -> None:
    e = draw(T=2, S=10, Q=12, N=5, D=16)
    wanted = answers(e._replace(mlp=draw(N=5).mlp))
    if labels == "strided":
        wanted = wanted.t().contiguous().t()
    module = km.nn.SIB(5, 16, steps=2, hidden=8).double()
    module.scale.requires_grad_(False)
    twin = km.nn.SIB(5, 16, steps=2, hidden=8).double()
    twin.load_state_dict(module.state_dict())
    loss = cross_entropy(twin(e.support, e.labels, e.query).flatten(0, 1), wanted.flatten())
    loss.backward()
    results = module.gradients(e.support, e.labels, e.query, wanted)
    assert module.scale.grad is None
    own = dict(module.named_parameters())
    named = {name: p for name, p in twin.named_parameters() if name != "scale"}
    assert_close([results.loss, *(own[n].grad for n in named)], [loss, *(p.grad for p in named.values())], 1e-12)
    assert_close([module.mlp.running_stats], [twin.mlp.running_stats], 1e-12)


@pytest.mark.parametrize(
    ("labels", "change", "error", "message"),
    [
        (torch.full((2, 11), 3), {}, ValueError, "query_labels: .*label 3; labels must be in 0..2"),
        (torch.full((2, 11), -1), {}, ValueError, "query_labels: .*label -1"),
        (torch.zeros(2, 10, dtype=torch.int64), {}, ValueError, "query_labels: expected shape"),
        (torch.zeros(2, 11), {}, TypeError, "query_labels: expected int64"),
        (None, {"query": None}, TypeError, "query: expected a tensor"),
        (None, {"labels": None}, TypeError, "support_labels: expected a tensor"),
        (None, {"weight": None}, TypeError, "weight: expected a tensor"),
        (None, {"query": torch.zeros(2, 11, 12)}, ValueError, "support: expected 12 features"),
        (None, {"scale": torch.ones(2)}, ValueError, "scale: expected one value"),
        (None, {"mlp": (torch.ones(8, 3),) * 3}, TypeError, "mlp: expected the ten tensors"),
        (None, {"bias": torch.ones(1, device="meta")}, ValueError, "bias is on meta"),
    ],
)
def test_errors(labels: Any, change: dict[str, Any], error: type[Exception], message: str) -> None:
    e = draw(dtype=torch.float32)
    labels = answers(e) if labels is None else labels
    with pytest.raises(error, match=message):
        run(e._replace(**change), labels)


@needs_kernel
def test_opcheck() -> None:
    e = draw(dtype=torch.float32)
    given = {
        "start": e.support, "start_index": None, "query": e.query, "query_index": None, "support_labels": e.labels,
        "query_labels": answers(e), "weight": e.weight, "scale": e.scale, "bias": e.bias, **e.mlp._asdict(),
        "running_stats": None, "steps": 2, "inner_lr": 0.1, "return_stats": True,
    }  # fmt: skip
    raw = torch.ops.kernelmeta.sib_gradients.default
    torch.library.opcheck(raw, (), given, test_utils=("test_schema", "test_faketensor"))
