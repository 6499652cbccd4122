"""Every learner in every mode that PyTorch has, first call in the mode, then ordinary ones: none leaves a trace."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from episodes import assert_close, draw
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import kernelmeta as km
from kernelmeta.nn import Phase

EPISODE = draw(dtype=torch.float32)
SUPPORT, LABELS, QUERY = EPISODE.support, EPISODE.labels, EPISODE.query
LEARNERS: dict[str, Callable[[], Any]] = {
    "sib": lambda: km.nn.SIB(3, 13),
    "equivariant": lambda: km.nn.EquivariantSIB(3, 13),
    "anil": lambda: km.nn.ANIL(3, 13),
    "anil with learned rates": lambda: km.nn.ANIL(3, 13, learn_rates=True),
    "ridge": lambda: km.nn.RidgeHead(3),
    "lqf": lambda: km.nn.LQF(3, 13, 8),
    "prototypes": lambda: km.nn.Prototypes(3, 13),
    "soft k-means": lambda: km.nn.SoftKMeans(3),
    "program": lambda: km.nn.Program(3, 13, [Phase("cross_entropy", 2, 0.1), Phase("synthetic_gradient", 1, 0.1)]),
}


def inference_mode(head: Any) -> None:
    with torch.inference_mode():
        head(SUPPORT, LABELS, QUERY)


def no_grad(head: Any) -> None:
    with torch.no_grad():
        head(SUPPORT, LABELS, QUERY)


def func_grad(head: Any) -> None:
    torch.func.grad(lambda q: head(SUPPORT, LABELS, q).square().sum())(QUERY)


def func_vmap(head: Any) -> None:
    torch.func.vmap(lambda q: head(SUPPORT, LABELS, q))(torch.stack([QUERY, 2 * QUERY]))


def func_jvp(head: Any) -> None:
    torch.func.jvp(lambda q: head(SUPPORT, LABELS, q), (QUERY,), (QUERY,))


def fake(head: Any) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        head(SUPPORT, LABELS, QUERY)


def traced(head: Any) -> None:
    make_fx(lambda q: head(SUPPORT, LABELS, q), tracing_mode="fake", _allow_non_fake_inputs=True)(QUERY)


def exported(head: Any) -> None:
    torch.export.export(head.eval(), (SUPPORT, LABELS, QUERY))
    head.train()


def compiled(head: Any) -> None:
    torch.compile(head, fullgraph=True, backend="aot_eager")(SUPPORT, LABELS, QUERY)


def autocast(head: Any) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        head(SUPPORT, LABELS, QUERY)


def deterministic(head: Any) -> None:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        head(SUPPORT, LABELS, QUERY)
    finally:
        torch.use_deterministic_algorithms(before)


def default_dtype(head: Any) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        assert head(SUPPORT, LABELS, QUERY).dtype is torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def flops(head: Any) -> None:
    with FlopCounterMode(display=False) as counter:
        head(SUPPORT, LABELS, QUERY)
    assert counter.get_total_flops() > 0


MODES = [
    inference_mode, no_grad, func_grad, func_vmap, func_jvp, fake, traced, exported, compiled, autocast, deterministic,
    default_dtype, flops,
]  # fmt: skip


def step(head: Any) -> list[Tensor]:
    """Logits, and gradients of all parameters, of an ordinary training step."""
    query = QUERY.clone().requires_grad_()
    logits = head(SUPPORT, LABELS, query)
    leaves = [query, *head.parameters()]
    return [logits.detach(), *torch.autograd.grad(logits.square().sum(), leaves)]


@pytest.mark.parametrize("mode", MODES, ids=lambda m: m.__name__)
@pytest.mark.parametrize("name", LEARNERS)
def test_a_first_call_in_a_mode_leaves_nothing_behind(name: str, mode: Callable[[Any], None]) -> None:
    torch.manual_seed(0)
    head = LEARNERS[name]()
    untouched = copy.deepcopy(head)
    mode(head)
    assert_close(step(head), step(untouched), 1e-6)
    assert_close(step(copy.deepcopy(head)), step(untouched), 1e-6)
    assert_close(step(pickle.loads(pickle.dumps(head))), step(untouched), 1e-6)
    torch.save(head, io.BytesIO())
    again = LEARNERS[name]()
    again.load_state_dict(head.state_dict())
    assert all(type(v) is Tensor or type(v) is torch.nn.Parameter for v in head.state_dict().values())


@pytest.mark.parametrize("name", LEARNERS)
def test_meta_device(name: str) -> None:
    head = LEARNERS[name]().to("meta")
    query = QUERY.to("meta").requires_grad_()
    logits = head(SUPPORT.to("meta"), LABELS.to("meta"), query)
    assert logits.shape == (2, 11, 3) and logits.device.type == "meta"
    logits.sum().backward()
    assert query.grad is not None and query.grad.shape == query.shape


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_moves_running_statistics_once(reentrant: bool) -> None:
    torch.manual_seed(0)
    plain = km.nn.SIB(3, 13)
    head = copy.deepcopy(plain)
    query = QUERY.clone().requires_grad_()
    want = plain(SUPPORT, LABELS, query)
    want.square().sum().backward()
    got = checkpoint(head, SUPPORT, LABELS, query, use_reentrant=reentrant)
    got.square().sum().backward()
    assert torch.equal(got, want)
    assert torch.equal(head.mlp.running_stats, plain.mlp.running_stats)
    assert_close([p.grad for p in head.parameters()], [p.grad for p in plain.parameters()], 1e-6)


@pytest.mark.parametrize("name", LEARNERS)
def test_forward_mode_derivatives(name: str) -> None:
    """Against a difference quotient, with and without parameters that require gradients."""
    torch.manual_seed(0)
    head = LEARNERS[name]().double().eval()
    support, query = SUPPORT.double(), QUERY.double()
    towards = torch.randn_like(query)

    def call(q: Tensor) -> Tensor:
        logits: Tensor = head(support, LABELS, q)
        return logits

    want = (call(query + 1e-6 * towards) - call(query - 1e-6 * towards)).detach() / 2e-6
    for frozen in (False, True):
        head.requires_grad_(not frozen)
        for quiet in (contextlib.nullcontext(), torch.no_grad()):
            with quiet, torch.autograd.forward_ad.dual_level():
                dual = call(torch.autograd.forward_ad.make_dual(query, towards))
                tangent = torch.autograd.forward_ad.unpack_dual(dual).tangent
                assert tangent is not None
                assert_close([tangent], [want], 1e-5)
        assert_close([torch.func.jvp(call, (query,), (towards,))[1]], [want], 1e-5)


@pytest.mark.parametrize("name", ["sib", "ridge", "anil"])
def test_second_derivatives_by_torch_func(name: str) -> None:
    head = LEARNERS[name]().double().eval()
    support, query = SUPPORT[:1].double(), QUERY[:1, :2, :].double()

    def loss(q: Tensor) -> Tensor:
        total: Tensor = head(support, LABELS[:1], q).square().sum()
        return total

    hessian = torch.func.hessian(loss)(query).flatten(0, 2).flatten(1)
    assert hessian.shape == (26, 26)
    assert_close([hessian], [hessian.T], 1e-8)
    quotient = (torch.func.grad(loss)(query + 1e-5) - torch.func.grad(loss)(query - 1e-5)).flatten() / 2e-5
    assert_close([hessian.sum(1)], [quotient], 1e-4)


def test_more_classes_of_learners_compile_than_pytorch_compiles_a_function() -> None:
    for i in range(9):
        head = type(f"Learner{i}", (km.nn.RidgeHead,), {})(3)
        torch.compile(head, fullgraph=True, backend="eager")(SUPPORT, LABELS, QUERY)
