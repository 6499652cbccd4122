"""Every op under what PyTorch does to functions: autograd, torch.func, torch.compile, autocast, opcheck."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from episodes import assert_close, draw, draw_mlp
from torch import Tensor

import kernelmeta as km
from kernelmeta.mlp_parameters import MLPParameters
from kernelmeta.ops import (
    _perceptron,
    class_means_op,
    focal_distillation_op,
    linearised_descent_op,
    ntk_gram_op,
    program_op,
    ridge_op,
    sib_op,
    synthetic_gradient_mlp_op,
)
from kernelmeta.ops.program_op import PHASE_NUMBERS, encode
from kernelmeta.reference import transport

LABELS = torch.tensor([[0, 1, 2, 0, 1, 2, 1], [2, 1, 0, 0, 0, 0, 2]])
EPISODE = draw(T=2, S=7, Q=9, N=3, D=10, H=6)._replace(labels=LABELS)


class Case(NamedTuple):
    """An op as a function of tensors that get gradients, the raw op behind it, and example arguments."""

    function: Callable[..., Tensor]
    arguments: tuple[Tensor, ...]
    op: Any
    given: dict[str, Any]  # the raw op's arguments

    @property
    def raw(self) -> Callable[..., Any]:
        return self.op.raw  # type: ignore[no-any-return]

    @property
    def raw_arguments(self) -> tuple[Any, ...]:
        return raw_arguments(self.op, **self.given)


def sib(support: Tensor, query: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, *mlp: Tensor) -> Tensor:
    labels = LABELS[: support.shape[0]]
    return km.ops.sib(support, labels, query, weight, scale, bias, MLPParameters(*mlp), steps=2, inner_lr=0.05)


def sib_inner_loop(theta0: Tensor, query: Tensor, scale: Tensor, bias: Tensor, *mlp: Tensor) -> Tensor:
    z, (theta, _) = km.ops.sib_inner_loop(
        theta0, query, scale, bias, MLPParameters(*mlp), steps=2, inner_lr=0.05, return_weights=True
    )
    return z.square().sum((-1, -2)) + theta.square().sum((-1, -2))


def mlp(logits: Tensor, *parameters: Tensor) -> Tensor:
    return km.ops.synthetic_gradient_mlp(logits, MLPParameters(*parameters))


def class_means(support: Tensor, weight: Tensor) -> Tensor:
    return km.ops.class_means(support, LABELS[: support.shape[0]], 3, weight)


PHASES = [km.nn.Phase("cross_entropy", 2, 0.1), km.nn.Phase("synthetic_gradient", 1, 0.1)]
CODES = encode(PHASES, None)


UNLABELLED = [km.nn.Phase("entropy", 1, 0.1), km.nn.Phase("soft_assignment", 1, 0.5)]


def program(
    support: Tensor, query: Tensor, rates: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, *mlp: Tensor
) -> Tensor:
    z, (theta, _) = km.ops.program(
        support, LABELS[: support.shape[0]], query, PHASES, n_way=3, rates=rates, weight=weight, scale=scale, bias=bias,
        mlp=MLPParameters(*mlp), return_weights=True,
    )  # fmt: skip
    return z.square().sum((-1, -2)) + theta.square().sum((-1, -2))


def linear_program(support: Tensor, query: Tensor, rates: Tensor, start: Tensor, bias: Tensor) -> Tensor:
    return km.ops.program(
        support, LABELS[: support.shape[0]], query, PHASES[:1], n_way=3, rates=rates, classifier="linear", start=start,
        bias=bias,
    )  # fmt: skip


def given_program(query: Tensor, rates: Tensor, start: Tensor, scale: Tensor) -> Tensor:
    nothing = query[:, :0], torch.zeros(query.shape[0], 0, dtype=torch.int64)
    return km.ops.program(*nothing, query, UNLABELLED, n_way=3, rates=rates, start=start, scale=scale)


SHARING = [
    km.nn.Phase("assignment", 1, 0.5, marginals="given"), km.nn.Phase("proportions", 1, 0.5, marginals="given"),
    km.nn.Phase("soft_assignment", 1, 0.5, marginals="given", relax=0.8),
]  # fmt: skip


def sharing_program(query: Tensor, rates: Tensor, start: Tensor, scale: Tensor, shares: Tensor) -> Tensor:
    nothing = query[:, :0], torch.zeros(query.shape[0], 0, dtype=torch.int64)
    return km.ops.program(
        *nothing, query, SHARING, n_way=3, rates=rates, start=start, scale=scale, proportions=shares.softmax(-1)
    )


def ridge(support: Tensor, query: Tensor, regularization: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return km.ops.ridge(support, LABELS[: support.shape[0]], query, regularization, scale, bias, n_way=3)


OLD_LOGITS = torch.randn(4, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
CLASS_WEIGHT = torch.tensor([0.5, 1, 2, 1, 1.5], dtype=torch.float64)


def focal_distillation(new_logits: Tensor) -> Tensor:
    old, labels = OLD_LOGITS.to(new_logits.dtype), torch.tensor([0, 4, -100, 2])
    return km.ops.focal_distillation(
        new_logits, old, labels, tau=2.0, label_smoothing=0.1, class_weight=CLASS_WEIGHT, reduction="none"
    )


TARGETS = torch.rand(2, 7, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def linearised_descent(
    support: Tensor, query: Tensor, lr: Tensor, weight_decay: Tensor, row_weights: Tensor, *layers: Tensor
) -> Tensor:
    targets = TARGETS[: support.shape[0]].to(support.dtype)
    z, p = km.ops.linearised_descent(
        support, targets, query, layers[::2], layers[1::2], steps=3, lr=lr, weight_decay=weight_decay, slope=0.1,
        oracle="cross_entropy", row_weights=row_weights, return_coefficients=True,
    )  # fmt: skip
    return z.square().sum((-1, -2)) + p.square().sum((-1, -2))


def ntk_gram(support: Tensor, query: Tensor, *layers: Tensor) -> Tensor:
    found = km.ops.ntk_gram(support, query, layers[::2], layers[1::2], full=True, slope=0.1)
    kernels = sum(k.square().sum((-1, -2, -3, -4)) for k in found[:2])
    return kernels / 100 + sum(f.square().sum((-1, -2)) for f in found[2:])


def raw_arguments(op: Any, **given: Any) -> tuple[Any, ...]:
    """A raw op's arguments from those that are given by name; what is not given is None, or -1 where it is a size."""
    if "mlp" in given:
        given |= given.pop("mlp")._asdict()
    defaults = {"max_support": -1, "max_query": -1, "save_trace": True}
    names = op.forward_signature.names
    assert given.keys() <= set(names)
    return tuple(given.get(name, defaults.get(name)) for name in names)


def cases() -> dict[str, Case]:
    support, _, query, weight, scale, bias, parameters = EPISODE
    theta0 = torch.randn(2, 3, 10, dtype=torch.float64)
    logits = torch.randn(2, 9, 3, dtype=torch.float64)
    start, shift = torch.randn(3, 10, dtype=torch.float64) * 0.3, torch.randn(3, dtype=torch.float64)
    rates = torch.tensor([0.1, 0.2, 0.05], dtype=torch.float64)
    regularization = torch.tensor([0.7], dtype=torch.float64)
    rows = {"query": query, "support_labels": LABELS}
    steps = {"scale": scale, "bias": bias, "mlp": parameters, "steps": 2, "inner_lr": 0.05}
    even = {"support": support, **rows, "n_way": 3}
    g = torch.Generator().manual_seed(5)
    layers = [torch.randn(shape, generator=g, dtype=torch.float64) / 3 for shape in ((6, 10), (6,), (3, 6), (3,))]
    packed = _perceptron.pack(layers[::2], layers[1::2])._asdict() | {"slope": 0.1}
    row_weights = torch.rand(2, 7, generator=g, dtype=torch.float64)
    return {
        "sib": Case(
            sib, tuple(EPISODE.leaves()), sib_op.OP,
            {"start": support, **rows, "weight": weight, **steps, "return_weights": True, "return_stats": True},
        ),
        "sib_inner_loop": Case(
            sib_inner_loop, (theta0, query, scale, bias, *parameters), sib_op.OP,
            {"start": theta0, "query": query, **steps, "return_weights": False, "return_stats": False},
        ),
        "synthetic_gradient_mlp": Case(
            mlp, (logits, *parameters), synthetic_gradient_mlp_op.OP, {"logits": logits, "mlp": parameters}
        ),
        "program": Case(
            program, (support, query, rates, weight, scale, bias, *parameters), program_op.OP,
            {
                **even, "weight": weight, "scale": scale, "bias": bias, "rates": rates, "mlp": parameters,
                "phases": CODES, "classifier": 0, "start": 0, "first_order": False, "coefficients": True,
            },
        ),
        "linear_program": Case(
            linear_program, (support, query, rates[:2], start, shift), program_op.OP,
            {
                **even, "theta0": start, "bias": shift, "rates": rates[:2], "phases": CODES[:PHASE_NUMBERS],
                "classifier": 1, "start": 1, "first_order": False, "coefficients": False,
            },
        ),
        "given_program": Case(
            given_program, (query, rates[:2], theta0, scale), program_op.OP,
            {
                "support": query[:, :0], "query": query, "support_labels": LABELS[:, :0], "n_way": 3, "theta0": theta0,
                "scale": scale, "rates": rates[:2], "phases": encode(UNLABELLED, None), "classifier": 0, "start": 3,
                "first_order": False, "coefficients": False,
            },
        ),
        "sharing_program": Case(
            sharing_program, (query, rates, theta0, scale, theta0[..., 0]), program_op.OP,
            {
                "support": query[:, :0], "query": query, "support_labels": LABELS[:, :0], "n_way": 3, "theta0": theta0,
                "scale": scale, "rates": rates, "phases": encode(SHARING, None), "classifier": 0, "start": 3,
                "first_order": False, "coefficients": False, "proportions": theta0[:, None, :, 0].softmax(-1),
            },
        ),
        "ridge": Case(
            ridge, (support, query, regularization, scale, bias), ridge_op.OP,
            {**even, "regularization": regularization, "scale": scale, "bias": bias},
        ),
        "linearised_descent": Case(
            linearised_descent, (support, query, rates[:1], rates[2:], row_weights, *layers), linearised_descent_op.OP,
            {
                "support": support, "query": query, "targets": TARGETS, "row_weights": row_weights, **packed,
                "lr": rates[:1], "weight_decay": rates[2:], "steps": 3, "cross_entropy": True,
            },
        ),
        "ntk_gram": Case(
            ntk_gram, (support, query, *layers), ntk_gram_op.OP,
            {"support": support, "query": query, **packed, "full": True},
        ),
        "class_means": Case(
            class_means, (support, weight), class_means_op.OP,
            {"support": support, "support_labels": LABELS, "weight": weight, "n_way": 3},
        ),
        "focal_distillation": Case(
            focal_distillation, (OLD_LOGITS.flip(0) * 1.2,), focal_distillation_op.OP,
            {
                "new_logits": OLD_LOGITS.flip(0) * 1.2, "old_logits": OLD_LOGITS,
                "labels": torch.tensor([0, 4, -100, 2]), "class_weight": CLASS_WEIGHT, "distance": 0, "alpha": 1.0,
                "beta": 5.0, "tau": 2.0, "margin": 0.5, "power": 2.0, "label_loss": True, "label_smoothing": 0.1,
                "ignore_index": -100,
            },
        ),
    }  # fmt: skip


@pytest.fixture(params=list(cases()))
def case(request: pytest.FixtureRequest) -> Case:
    torch.manual_seed(0)
    return cases()[request.param]


def is_floating(argument: Any) -> bool:
    return isinstance(argument, Tensor) and argument.is_floating_point()


def leaves(tensors: Any) -> tuple[Any, ...]:
    return tuple(t.detach().clone().requires_grad_() if is_floating(t) else t for t in tensors)


def test_gradcheck(case: Case) -> None:
    assert torch.autograd.gradcheck(case.function, leaves(case.arguments))


def test_gradcheck_of_the_reference(case: Case) -> None:
    with km.use_backend("reference"):
        assert torch.autograd.gradcheck(case.function, leaves(case.arguments))


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_opcheck(case: Case, layout: str) -> None:
    arguments = list(leaves(case.raw_arguments))
    if layout == "transposed":
        arguments[0] = arguments[0].detach().mT.contiguous().mT.requires_grad_()
    torch.library.opcheck(case.raw, tuple(arguments))


def scalar(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *a: function(*a).square().sum()


def eager_gradient(case: Case) -> tuple[Tensor, ...]:
    arguments = leaves(case.arguments)
    return torch.autograd.grad(scalar(case.function)(*arguments), arguments)


def test_raw_op_has_the_same_gradient() -> None:
    case = cases()["sib"]
    arguments = leaves(case.raw_arguments)
    call = case.op.forward_signature.call(*arguments)
    inputs = [getattr(call, name) for name in ("start", "query", "weight", "scale", "bias", *MLPParameters._fields)]
    got = torch.autograd.grad(case.raw(*arguments)[0].square().sum(), inputs)
    assert_close(got, eager_gradient(cases()["sib"]), 1e-12)


def test_compile(case: Case) -> None:
    compiled = torch.compile(case.function, fullgraph=True, backend="aot_eager")
    arguments = leaves(case.arguments)
    result = compiled(*arguments)
    assert_close([result], [case.function(*arguments)], 1e-13)
    assert_close(torch.autograd.grad(result.square().sum(), arguments), eager_gradient(case), 1e-12)


@pytest.mark.skipif(" " in torch.__file__, reason="PyTorch's own compiler does not quote its path, which has a space")
def test_compile_with_the_default_compiler() -> None:
    case = cases()["sib"]
    compiled = torch.compile(scalar(case.function), fullgraph=True)
    arguments = leaves(case.arguments)
    assert_close(torch.autograd.grad(compiled(*arguments), arguments), eager_gradient(case), 1e-11)


def test_compile_for_any_number_of_tasks() -> None:
    function = torch.compile(
        lambda x: km.ops.synthetic_gradient_mlp(x, EPISODE.mlp), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for T, Q in ((2, 5), (3, 7), (4, 16)):
        x = torch.randn(T, Q, 3, dtype=torch.float64)
        assert_close([function(x)], [km.ops.synthetic_gradient_mlp(x, EPISODE.mlp)], 1e-13)


@pytest.fixture
def compiled_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.func's wrapper is one piece of code for all cases, of which torch.compile keeps eight at most.

    Half as many of Newton's steps are enough for these cases; each is traced.
    """
    torch._dynamo.reset()
    monkeypatch.setattr(transport, "_TRACED_STEPS", 6)


@pytest.mark.usefixtures("compiled_anew")
@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_func_grad(case: Case, how: str) -> None:
    gradient = torch.func.grad(scalar(case.function), argnums=tuple(range(len(case.arguments))))
    if how == "compiled":
        gradient = torch.compile(gradient, fullgraph=True, backend="aot_eager")
    assert_close(gradient(*case.arguments), eager_gradient(case), 1e-9)


def batched(case: Case) -> Tensor:
    return torch.stack([case.arguments[0] * factor for factor in (1.0, 0.7, -1.3)])


@pytest.mark.parametrize("in_dim", [0, 2])
def test_vmap(case: Case, in_dim: int) -> None:
    def function(x: Tensor) -> Tensor:
        return case.function(x, *case.arguments[1:])

    xs = batched(case)
    got = torch.func.vmap(function, in_dims=in_dim)(xs.movedim(0, in_dim))
    assert_close([got], [torch.stack([function(x) for x in xs])], 1e-13)


@pytest.mark.usefixtures("compiled_anew")
@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_vmap_of_grad(case: Case, how: str) -> None:
    """Gradients for a parameter, one for each entry of the batch."""
    last = len(case.arguments) - 1

    def gradient(x: Tensor) -> Tensor:
        return torch.func.grad(scalar(case.function), argnums=last)(x, *case.arguments[1:])

    function = torch.func.vmap(gradient)
    if how == "compiled":
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
    xs = batched(case)
    assert_close([function(xs)], [torch.stack([gradient(x) for x in xs])], 1e-9)


def test_jacrev() -> None:
    logits = torch.randn(4, 3, dtype=torch.float64)
    parameters = draw_mlp(3, 5, torch.float64, torch.Generator().manual_seed(0))
    got = torch.func.jacrev(lambda z: km.ops.synthetic_gradient_mlp(z, parameters))(logits)
    want = torch.func.jacrev(lambda z: km.reference.synthetic_gradient_mlp(z, parameters))(logits)
    assert_close([got], [want], 1e-11)


@pytest.mark.parametrize("call", ["function", "raw"])
def test_a_second_derivative_is_an_error(case: Case, call: str) -> None:
    """Even of a ``.sum()``, whose gradient does not require one."""
    arguments = leaves(case.arguments if call == "function" else case.raw_arguments)
    result = (case.function if call == "function" else case.raw)(*arguments)
    result = result[0] if isinstance(result, tuple) else result
    inputs = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
    found = torch.autograd.grad(result.sum(), inputs, create_graph=True, allow_unused=True)
    grads = [g for g in found if g is not None]  # (an op may take constants: old logits, weights of classes)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        torch.autograd.grad(sum(g.sum() for g in grads), inputs, allow_unused=True)


def test_a_second_derivative_through_func_is_an_error(case: Case) -> None:
    function = torch.func.grad(
        lambda x: torch.func.grad(lambda y: case.function(y, *case.arguments[1:]).sum())(x).sum()
    )
    with pytest.raises(RuntimeError, match="has no second derivative"):
        function(case.arguments[0])


def test_the_reference_has_a_second_derivative() -> None:
    case = cases()["sib"]
    arguments = leaves(case.arguments)
    with km.use_backend("reference"):
        grads = torch.autograd.grad(case.function(*arguments).square().sum(), arguments, create_graph=True)
        second = torch.autograd.grad(sum(g.sum() for g in grads), arguments)
    assert all(torch.isfinite(g).all() for g in second)
    assert max(float(g.abs().max()) for g in second) > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_float32(case: Case, dtype: torch.dtype) -> None:
    low = [a.to(dtype) if i == 0 else a.float() for i, a in enumerate(case.arguments)]
    arguments = leaves(low)
    with torch.autocast("cpu", dtype):
        result = case.function(*arguments)
    assert result.dtype is torch.float32
    grads = torch.autograd.grad(result.sum(), arguments)
    assert [g.dtype for g in grads] == [a.dtype for a in low]
    with torch.autocast("cpu", dtype):
        assert case.function(*(a.to(dtype) for a in case.arguments)).dtype is torch.float32
        raw = case.raw(*(a.to(dtype) if is_floating(a) else a for a in case.raw_arguments))
    assert (raw[0] if isinstance(raw, tuple) else raw).dtype is torch.float32


def test_modified_inputs_are_noticed() -> None:
    arguments = leaves(cases()["sib"].arguments)
    query = arguments[1] * 1
    result = sib(arguments[0], query, *arguments[2:])
    query.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()


def test_an_op_declared_in_python_alone_has_gradients() -> None:
    """What steps 1 and 2 of adding an op make of it, with one differentiable argument too."""
    code = """
import torch
from kernelmeta.ops._differentiable import DifferentiableOp
OP = DifferentiableOp(
    "lengths", "Tensor rows", results=("lengths",), differentiable=("rows",), rows={"rows": None},
    fake=lambda call: (call.rows.new_empty(call.rows.shape[:-1]),),
    plain=lambda call: (call.rows.square().sum(-1).sqrt(),), work=lambda call: call.rows.numel(),
)
x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
assert torch.autograd.gradcheck(lambda x: OP(OP.arguments(rows=x)), x)
torch.library.opcheck(torch.ops.kernelmeta.lengths.default, (x,))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
