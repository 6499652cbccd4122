"""What Python declares and what C++ reads from the dispatcher's stack are the same, by name and by type."""

from __future__ import annotations

from typing import Any

import perceptrons
import pytest
import torch
from episodes import draw, shapes
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import kernelmeta as km
from kernelmeta.ops import (
    _perceptron,
    focal_distillation_op,
    linear_head_op,
    linearised_descent_op,
    ntk_gram_op,
    program_op,
    ridge_op,
    sib_op,
)
from kernelmeta.ops._differentiable import DifferentiableOp
from kernelmeta.ops._ragged import fields

pytestmark = pytest.mark.skipif(not km.backends()["cpu"].available, reason=km.backends()["cpu"].reason)


def _native(device: str) -> dict[str, str]:
    lines = torch.ops.kernelmeta.schemas(device).splitlines()
    return {line.partition("(")[0]: line for line in lines}


def _declared(name: str) -> str:
    return str(getattr(torch.ops.kernelmeta, name).default._schema).removeprefix("kernelmeta::")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_op_is_read_as_it_is_declared(device: str) -> None:
    native = _native(device)
    assert {name: _declared(name) for name in native} == native


def test_every_op_has_a_kernel() -> None:
    ours = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("kernelmeta::")]
    names = {name.removeprefix("kernelmeta::") for name in ours}
    kernels = {name for name in names if not name.startswith(("triton_", "schemas", "cpu_isa"))}
    assert kernels == set(_native("cpu"))
    training = {"sib_gradients", "linear_head_gradients", "noop"}
    assert set(_native("cuda")) == kernels - training


def check_trace(op: DifferentiableOp, **given: Any) -> None:
    """What tracing takes the trace's size to be is what the kernel allocates."""
    args = op.forward_signature.pack(**given, save_trace=True)
    mode = FakeTensorMode()
    with mode:
        fakes = tuple(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args)
        traced = op.raw(*fakes)[-1].shape
    assert op.raw(*args)[-1].shape == traced


@settings(max_examples=40)
@given(shapes(), st.integers(0, 4), st.booleans())
@example({"T": 2, "S": 4, "Q": 100, "N": 2, "D": 9, "H": 4}, 3, True)  # no Gram matrix
def test_trace_of_sib(sizes: dict[str, int], steps: int, return_weights: bool) -> None:
    e = draw(**sizes)
    check_trace(
        sib_op.OP, start=e.support, start_index=None, query=e.query, query_index=None, support_labels=e.labels,
        weight=e.weight, scale=e.scale, bias=e.bias, mlp=e.mlp, running_stats=None, steps=steps, inner_lr=0.1,
        return_weights=return_weights, return_stats=False,
    )  # fmt: skip


@settings(max_examples=40)
@given(shapes(), st.integers(0, 4))
def test_trace_of_linear_head_and_ridge(sizes: dict[str, int], steps: int) -> None:
    e, one = draw(**sizes), torch.ones(1).double()
    N, D = sizes["N"], sizes["D"]
    even = {"support": e.support, "support_index": None, "query": e.query, "query_index": None}
    check_trace(
        linear_head_op.OP, **even, support_labels=e.labels, weight=torch.ones(N, D).double(),
        bias=torch.ones(N).double(), rates=torch.ones(steps).double(), oracle=0, first_order=False,
        return_weights=False,
    )  # fmt: skip
    check_trace(
        ridge_op.OP, **even, support_labels=e.labels, **fields(None), regularization=one, scale=one, bias=one, n_way=N
    )


@given(st.integers(0, 9), st.integers(1, 9), st.integers(0, 4), st.booleans())
def test_trace_of_focal_distillation(rows: int, classes: int, distance: int, label_loss: bool) -> None:
    logits = torch.randn(rows, classes)
    check_trace(
        focal_distillation_op.OP, new_logits=logits, old_logits=logits, labels=torch.zeros(rows, dtype=torch.int64),
        class_weight=None, distance=distance, alpha=1.0, beta=5.0, tau=2.0, margin=0.5, power=2.0,
        label_loss=label_loss, label_smoothing=0.0, ignore_index=-100,
    )  # fmt: skip


@settings(max_examples=40)
@given(perceptrons.sizes(), st.sampled_from([0, 3, 40]), st.booleans())
def test_trace_of_linearised_descent_and_ntk_gram(sizes: dict[str, Any], steps: int, full: bool) -> None:
    rows = perceptrons.draw(**sizes)
    T, S, N, one = sizes["T"], sizes["S"], sizes["widths"][-1], torch.ones(1).double()
    network = _perceptron.pack(rows.weights, rows.biases)._asdict() | {"slope": 0.0}
    even = {"support": rows.support, "support_index": None, "query": rows.query, "query_index": None} | network
    check_trace(ntk_gram_op.OP, **even, full=full)
    check_trace(
        linearised_descent_op.OP, **even, targets=torch.ones(T, S, N).double(), row_weights=torch.ones(T, S).double(),
        lr=one, weight_decay=one, steps=steps, cross_entropy=False,
    )  # fmt: skip


ORACLES = ("cross_entropy", "entropy", "soft_assignment", "synthetic_gradient", "proportions", "assignment")


@settings(max_examples=60)
@given(
    shapes(), st.lists(st.tuples(st.sampled_from(ORACLES), st.integers(1, 2)), max_size=3), st.integers(0, 2),
    st.integers(0, 3), st.booleans(),
)  # fmt: skip
def test_trace_of_program(
    sizes: dict[str, int], phases: list[tuple[str, int]], classifier: int, start: int, coefficients: bool
) -> None:
    e, one, N = draw(**sizes), torch.ones(1).double(), sizes["N"]
    cosine = classifier == 0
    steps = [km.nn.Phase(oracle, k, 0.1) for oracle, k in phases if cosine or oracle != "soft_assignment"]
    check_trace(
        program_op.OP, support=e.support, support_index=None, query=e.query, query_index=None, support_labels=e.labels,
        **fields(None), theta0=torch.ones(*[sizes["T"]] * (start == 3), N, sizes["D"]).double() if start % 2 else None,
        weight=None, scale=None if classifier == 1 else one, bias=None, target_scale=None,
        rates=torch.ones(sum(p.steps for p in steps)).double(), mlp=e.mlp, running_stats=None, proportions=None,
        bag_offsets=None, n_way=N,
        phases=program_op.encode(steps, None), classifier=classifier, start=0 if cosine and start == 2 else start,
        first_order=False, coefficients=coefficients,
    )  # fmt: skip
