"""torch.ops.kernelmeta.linearised_descent against training the linearised network in the space of its parameters."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from episodes import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from perceptrons import UNUSUAL, Rows, draw, network, sizes, unusual
from torch import Tensor
from torch.func import functional_call, jvp, vmap
from torch.nn.functional import cross_entropy

import kernelmeta as km

CPU = km.backends()["cpu"]
needs_kernel = pytest.mark.skipif(not CPU.available, reason=f"no CPU kernels: {CPU.reason}")
BACKENDS = ["cpu", "reference"] if CPU.available else ["reference"]
ORACLES = ("squared_error", "cross_entropy")


def draw_targets(rows: Rows, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.rand(*rows.support.shape[:2], len(rows.weights[-1]), generator=g, dtype=torch.float64)


def trained(rows: Rows, targets: Tensor, *, steps: int, lr: float, weight_decay: float, oracle: str) -> Tensor:
    """By autograd, on ``f(x; w0) + df/dw (w - w0)``."""
    module = network(rows, 0.1)
    origin = {name: p.detach() for name, p in module.named_parameters()}
    outputs = []

    def outputs_of(x: Tensor) -> Callable[[dict[str, Tensor]], Tensor]:
        return lambda p: functional_call(module, p, (x,))

    for support, query, y in zip(rows.support, rows.query, targets, strict=True):
        moved = {name: torch.zeros_like(p) for name, p in origin.items()}

        def linearised(moved: dict[str, Tensor], x: Tensor) -> Tensor:
            value, along = jvp(outputs_of(x), (origin,), (moved,))
            return value + along

        def loss(moved: dict[str, Tensor], x: Tensor = support, y: Tensor = y) -> Tensor:
            f = linearised(moved, x)
            return cross_entropy(f, y) if oracle == "cross_entropy" else (f - y).square().sum() / 2 / len(x)

        for _ in range(steps):
            gradient = torch.func.grad(loss)(moved)
            moved = {n: m - lr * (gradient[n] + weight_decay * m) for n, m in moved.items()}
        outputs.append(linearised(moved, query))
    return torch.stack(outputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("oracle", ORACLES)
def test_against_training_in_the_space_of_the_parameters(backend: str, oracle: str) -> None:
    rows = draw()
    targets = draw_targets(rows)
    given: dict[str, Any] = {"steps": 30, "lr": 0.2, "weight_decay": 0.05, "oracle": oracle}
    with km.use_backend(backend):
        got = km.ops.linearised_descent(
            rows.support, targets, rows.query, rows.weights, rows.biases, slope=0.1, **given
        )
    assert_close([got], [trained(rows, targets, **given)], 1e-10)


def with_gradients(rows: Rows, **options: Any) -> list[Tensor]:
    """Outputs, coefficients, and the gradients of everything that gets one."""
    targets = draw_targets(rows).requires_grad_()
    g = torch.Generator().manual_seed(3)
    weights = (torch.rand(targets.shape[:2], generator=g, dtype=torch.float64) / targets.shape[1]).requires_grad_()
    lr, decay = (torch.tensor([v], dtype=torch.float64, requires_grad=True) for v in (0.3, 0.1))
    results = km.ops.linearised_descent(
        rows.support, targets, rows.query, rows.weights, rows.biases, lr=lr, weight_decay=decay, row_weights=weights,
        return_coefficients=True, **options,
    )  # fmt: skip
    loss = sum((r * torch.randn(r.shape, dtype=r.dtype, generator=g)).sum() for r in results)
    leaves = [*rows.leaves(), targets, weights, lr, decay]
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [*results, *(torch.zeros_like(x) if f is None else f for x, f in zip(leaves, found, strict=True))]


@needs_kernel
@settings(max_examples=60)
@given(sizes(), st.sampled_from([0, 1, 5, 16, 17, 40]), st.sampled_from(ORACLES), st.sampled_from([0.0, 0.3]))
def test_shapes(given: dict[str, Any], steps: int, oracle: str, slope: float) -> None:
    rows = draw(**given).fresh()
    options: dict[str, Any] = {"steps": steps, "oracle": oracle, "slope": slope}
    got = with_gradients(rows, **options)
    with km.use_backend("reference"):
        want = with_gradients(rows, **options)
    # (where the steps diverge, so do the two)
    if max(float(w.detach().abs().max()) for w in want) < 1e3:
        assert_close(got, want, 1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("oracle", ORACLES)
@pytest.mark.parametrize("name", UNUSUAL)
def test_rows_out_of_the_ordinary(backend: str, oracle: str, name: str) -> None:
    rows = unusual(name)
    targets = draw_targets(rows)
    size = float(rows.support.detach().square().mean().clamp_min(1))
    options: dict[str, Any] = {"steps": 3, "lr": 0.05 / size, "weight_decay": 0.1, "oracle": oracle}
    with km.use_backend(backend):
        found = km.ops.linearised_descent(
            rows.support, targets, rows.query, rows.weights, rows.biases, slope=0.1, **options
        )
        gradients = torch.autograd.grad(found.sum() / found.detach().abs().amax(), rows.leaves())
    assert all(g.isfinite().all() for g in gradients)
    assert_close([found], [trained(rows, targets, **options)], 1e-10)


def test_a_rate_that_is_too_large_is_seen() -> None:
    rows = draw()
    z = km.ops.linearised_descent(
        rows.support, draw_targets(rows), rows.query, rows.weights, rows.biases, steps=2000, lr=100.0
    )
    assert not z.isfinite().any()


@needs_kernel
@pytest.mark.parametrize("oracle", ORACLES)
def test_many_steps_need_several_levels_of_checkpoints(oracle: str) -> None:
    rows = draw((5, 8, 3), T=1, S=4, Q=3).fresh()
    got = with_gradients(rows, steps=600, oracle=oracle)
    with km.use_backend("reference"):
        want = with_gradients(rows, steps=600, oracle=oracle)
    assert_close(got, want, 1e-9)


@needs_kernel
def test_float32() -> None:
    rows = draw((64, 32, 32, 5), S=25, Q=20)
    rows = Rows(rows.support.float(), rows.query.float(), [w.float() for w in rows.weights], None)
    labels = (torch.arange(25) % 5).expand(2, 25)
    got = km.ops.linearised_descent(rows.support, labels, rows.query, rows.weights, steps=50, lr=0.1)
    wide = rows.fresh(torch.float64)
    want = km.ops.linearised_descent(wide.support, labels, wide.query, wide.weights, steps=50, lr=0.1)
    assert_close([got.double()], [want.detach()], 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_labels_are_made_one_hot(backend: str) -> None:
    rows = draw()
    labels = torch.arange(14).view(2, 7) % 4
    given: dict[str, Any] = {"weights": rows.weights, "biases": rows.biases, "steps": 4, "lr": 0.1}
    with km.use_backend(backend):
        got = km.ops.linearised_descent(rows.support, labels, rows.query, **given)
        want = km.ops.linearised_descent(
            rows.support, torch.nn.functional.one_hot(labels).double(), rows.query, **given
        )
        assert_close([got], [want], 1e-15)
        with pytest.raises(ValueError, match="task 1 has label 4"):
            km.ops.linearised_descent(
                rows.support, labels + (torch.arange(2) == 1).long()[:, None], rows.query, **given
            )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("given_weights", [False, True])
def test_a_ragged_batch_equals_its_tasks_one_by_one(backend: str, given_weights: bool) -> None:
    S, Q = [3, 7, 1, 5], [9, 1, 4, 2]
    offsets = [torch.tensor([0, *n]).cumsum(0) for n in (S, Q)]
    rows = draw(T=1, S=sum(S), Q=sum(Q))
    support, query, targets = rows.support[0], rows.query[0], draw_targets(rows)[0]
    weights = torch.rand(sum(S)).double() if given_weights else None
    leaves = [t.requires_grad_() for t in (support, query, targets)]
    common: dict[str, Any] = {
        "weights": rows.weights, "biases": rows.biases, "steps": 20, "lr": 0.2, "oracle": "cross_entropy",
        "return_coefficients": True,
    }  # fmt: skip
    with km.use_backend(backend):
        got = km.ops.linearised_descent(
            support, targets, query, row_weights=weights, ragged=km.Ragged(*offsets), **common
        )
        each = [
            km.ops.linearised_descent(
                support[None, s], targets[None, s], query[None, q],
                row_weights=None if weights is None else weights[None, s], **common,
            )
            for s, q in zip(*([slice(*p) for p in pairwise(o)] for o in offsets), strict=True)
        ]  # fmt: skip
        want = [torch.cat([r[0] for r in results]) for results in zip(*each, strict=True)]
        bounded = km.ops.linearised_descent(
            support, targets, query, row_weights=weights, ragged=km.Ragged(*offsets, None, 8, 9), **common
        )
        gradients = [
            torch.autograd.grad(sum(r.square().sum() for r in results), leaves) for results in (got, want, bounded)
        ]
    for results, own in ((got, gradients[0]), (bounded, gradients[2])):
        assert_close([*results, *own], [*want, *gradients[1]], 1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_a_bank(backend: str) -> None:
    rows = draw().fresh()
    g = torch.Generator().manual_seed(0)
    s, q = (torch.randint(14, (3, n), generator=g) for n in (5, 6))
    bank, labels = rows.support.flatten(0, 1), torch.randint(4, (3, 5), generator=g)
    common: dict[str, Any] = {"weights": rows.weights, "biases": rows.biases, "steps": 5, "lr": 0.1}
    with km.use_backend(backend):
        got = km.ops.linearised_descent(bank, labels, bank, support_index=s, query_index=q, **common)
        want = km.ops.linearised_descent(bank[s], labels, bank[q], **common)
        gradients = [torch.autograd.grad(z.square().sum(), bank)[0] for z in (got, want)]
    assert_close([got, gradients[0]], [want, gradients[1]], 1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_task(backend: str) -> None:
    rows = draw().fresh()
    with km.use_backend(backend):
        z = km.ops.linearised_descent(
            rows.support[:0], draw_targets(rows)[:0], rows.query[:0], rows.weights, rows.biases, steps=3, lr=0.1
        )
        z.sum().backward()
    assert z.shape == (0, 9, 4)
    assert all(w.grad is not None and not w.grad.any() for w in rows.weights)


@needs_kernel
def test_the_trace_does_not_grow_with_the_steps() -> None:
    rows = draw()
    one = torch.ones(1).double()
    from kernelmeta.ops import _perceptron, linearised_descent_op

    parameters, widths, biased = _perceptron.pack(rows.weights, rows.biases)

    def trace(steps: int) -> int:
        args = linearised_descent_op.OP.forward_signature.pack(
            support=rows.support, support_index=None, query=rows.query, query_index=None, targets=draw_targets(rows),
            row_weights=torch.ones(2, 7).double(), parameters=parameters, lr=one * 0.01, weight_decay=one,
            widths=widths, biased=biased, slope=0.0, steps=steps, cross_entropy=False, save_trace=True,
        )  # fmt: skip
        return int(linearised_descent_op.OP.raw(*args)[-1].numel())

    assert trace(1) == trace(5000)


@needs_kernel
def test_inference_mode() -> None:
    rows = draw()
    args = (rows.support, draw_targets(rows), rows.query, rows.weights, rows.biases)
    with torch.inference_mode():
        found = km.ops.linearised_descent(*args, steps=3, lr=0.1)
    assert_close([found], [km.ops.linearised_descent(*args, steps=3, lr=0.1)], 1e-15)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_not_a_number_comes_out_as_such(poison: float) -> None:
    rows = draw()
    targets = draw_targets(rows)
    want = km.ops.linearised_descent(rows.support, targets, rows.query, rows.weights, rows.biases, steps=3, lr=0.1)
    rows.support[1, 2, 3] = poison
    z = km.ops.linearised_descent(rows.support, targets, rows.query, rows.weights, rows.biases, steps=3, lr=0.1)
    assert torch.isnan(z[1]).all() and torch.equal(z[0], want[0])


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"support_targets": torch.ones(2, 7, 3).double()}, ValueError, "support_targets: expected shape"),
        ({"support_targets": torch.ones(2, 7).double()}, ValueError, "support_targets: expected a tensor"),
        ({"support_targets": torch.ones(2, 7, dtype=torch.bool)}, TypeError, "labels of int64, got bool"),
        ({"oracle": "hinge"}, ValueError, "oracle: expected one of squared_error, cross_entropy"),
        ({"steps": -1}, ValueError, "steps: expected 0 or more"),
        ({"steps": 2**20 + 1}, ValueError, "steps: expected at most 1048576"),
        ({"lr": torch.ones(2)}, ValueError, "lr: expected one value"),
        ({"row_weights": torch.ones(2, 6).double()}, ValueError, "row_weights: expected shape"),
        ({"query": torch.ones(2, 0, 11).double()}, ValueError, "query: expected at least one row"),
        ({"support": torch.ones(2, 0, 11).double(), "support_targets": torch.ones(2, 0, 4)}, ValueError, "one row"),
        ({"slope": float("nan")}, ValueError, "slope: expected a number"),
    ],
)
def test_what_does_not_fit_is_named(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    rows = draw()
    given = {"support_targets": draw_targets(rows), "steps": 3, "lr": 0.1} | rows._asdict() | changed
    with pytest.raises(error, match=message):
        km.ops.linearised_descent(**given)


def test_vmap_of_the_trained_function_is_not_lost() -> None:
    """Under torch.func the plain form runs."""
    rows = draw()
    targets = draw_targets(rows)

    def outputs(x: Tensor) -> Tensor:
        return km.ops.linearised_descent(x, targets, rows.query, rows.weights, rows.biases, steps=3, lr=0.1)

    many = torch.stack([rows.support, rows.support * 0.5])
    assert_close([vmap(outputs)(many)], [torch.stack([outputs(x) for x in many])], 1e-12)
