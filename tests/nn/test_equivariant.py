"""The equivariant gradient, as op and as learner: numbering, numbers of classes, what is broken, what is degenerate."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from episodes import assert_close, draw, draw_labels, draw_pair_mlp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import kernelmeta as km
from kernelmeta.nn import Phase

AVAILABLE = [name for name in ("cpu", "reference") if km.backends()[name].available]
PHASES = [Phase("equivariant_gradient", 3, 0.05)]
ONE = torch.ones(1).double()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def adapt(support: Tensor, labels: Tensor, query: Tensor, n_way: int, **options: Any) -> Tensor:
    mlp = options.pop("mlp", None) or draw_pair_mlp(6, support.dtype, generator(1))
    scale = torch.full((1,), 9.0, dtype=support.dtype)
    return km.ops.program(support, labels, query, PHASES, n_way=n_way, scale=scale, mlp=mlp, **options)


@pytest.mark.parametrize("backend", AVAILABLE)
@settings(max_examples=20)
@given(N=st.integers(1, 9), Q=st.integers(1, 30), D=st.integers(2, 20), seed=st.integers(0, 99))
def test_renumbering_the_classes_renumbers_the_results(backend: str, N: int, Q: int, D: int, seed: int) -> None:
    g = generator(seed)
    support, query = (torch.randn(2, rows, D, dtype=torch.float64, generator=g) for rows in (2 * N, Q))
    labels, order = draw_labels(2, 2 * N, N, g), torch.randperm(N, generator=g)
    of_query = torch.randn(2, Q, N, dtype=torch.float64, generator=g)
    found = []
    with km.use_backend(backend):
        for numbering in (torch.arange(N), order):
            leaves = [t.clone().requires_grad_() for t in (support, query)]
            z = adapt(leaves[0], numbering[labels], leaves[1], N)[..., numbering]
            found.append([z, *torch.autograd.grad((z * of_query).sum(), leaves)])
    assert_close(found[0], found[1], 1e-10)


def test_a_module_guesses_the_same_whatever_the_numbering() -> None:
    module = km.nn.EquivariantGradientMLP().double()
    logits, order = torch.randn(3, 11, 6, generator=generator()).double(), torch.randperm(6, generator=generator())
    assert_close([module(logits)[..., order]], [module(logits[..., order])], 1e-13)
    assert module(logits[0]).shape == (11, 6)
    assert module(torch.zeros(0, 4, 3).double()).shape == (0, 4, 3)


def test_one_set_of_parameters_serves_any_number_of_classes() -> None:
    state = km.nn.EquivariantSIB(5, 13).double().state_dict()
    for N in (2, 3, 9):
        episode = draw(N=N, S=2 * N)
        head = km.nn.EquivariantSIB(N, 13).double()
        head.load_state_dict(state)
        assert head(episode.support, episode.labels, episode.query).shape == (2, 11, N)


def test_ragged_tasks_are_their_own_tasks() -> None:
    head = km.nn.EquivariantSIB(9, 13).double()
    with torch.no_grad():
        head.mlp.weight3.mul_(30)  # steps that are seen
    tasks = [(3, 5, 7), (9, 12, 20), (2, 2, 1)]
    episodes = [draw(T=1, N=n, S=s, Q=q) for n, s, q in tasks]
    support, query = (torch.cat([getattr(e, name)[0] for e in episodes]) for name in ("support", "query"))
    offsets = [torch.tensor([0, *[t[i] for t in tasks]]).cumsum(0) for i in (1, 2)]
    labels = torch.cat([e.labels[0] for e in episodes])
    together = head(support, labels, query, ragged=km.Ragged(*offsets, torch.tensor([t[0] for t in tasks])))
    for e, (n, _, _), own in zip(episodes, tasks, together.split([t[2] for t in tasks]), strict=True):
        one = km.nn.EquivariantSIB(n, 13).double()
        one.load_state_dict(head.state_dict())
        assert_close([own[:, :n]], [one(e.support, e.labels, e.query)[0]], 1e-12)
        assert (own[:, n:] == -math.inf).all()


@pytest.mark.parametrize("backend", AVAILABLE)
def test_nan_stays_in_its_task(backend: str) -> None:
    episode = draw(T=3)
    bad = episode.query.clone()
    bad[1, 4, 2] = math.nan
    support = episode.support.clone().requires_grad_()
    with km.use_backend(backend):
        want = adapt(episode.support, episode.labels, episode.query, 3)
        found = adapt(support, episode.labels, bad, 3)
        (of_support,) = torch.autograd.grad(found[[0, 2]].square().sum(), support)
    assert_close([found[[0, 2]]], [want[[0, 2]]], 0)
    assert found[1].isnan().any() and of_support[[0, 2]].isfinite().all()


@pytest.mark.parametrize("backend", AVAILABLE)
def test_no_tasks(backend: str) -> None:
    head = km.nn.EquivariantSIB(3, 13)
    with km.use_backend(backend):
        z = head(torch.zeros(0, 6, 13), torch.zeros(0, 6, dtype=torch.int64), torch.zeros(0, 4, 13))
        z.sum().backward()
    assert z.shape == (0, 4, 3)
    assert all(p.grad is None or (p.grad == 0).all() for p in head.parameters())


@pytest.mark.skipif("cpu" not in AVAILABLE, reason="no CPU kernels")
@pytest.mark.parametrize("rows", ["one feature", "collinear", "repeated", "one row"])
def test_degenerate_rows(rows: str) -> None:
    g = generator(2)
    D, Q = (1 if rows == "one feature" else 8), (1 if rows == "one row" else 14)
    support, query = (torch.randn(2, n, D, dtype=torch.float64, generator=g) for n in (3, Q))
    if rows == "collinear":
        query = query[:, :1] * torch.randn(2, Q, 1, dtype=torch.float64, generator=g)
    elif rows == "repeated":
        query = query[:, torch.arange(Q) % 3]
    labels = torch.arange(3).repeat(2, 1)
    found = []
    for backend in AVAILABLE:
        leaves = [t.clone().requires_grad_() for t in (support, query)]
        with km.use_backend(backend):
            z = adapt(leaves[0], labels, leaves[1], 3)
            found.append([z, *torch.autograd.grad(z.sin().sum(), leaves)])
    assert_close(found[0], found[1], 1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_so_sharp_that_a_class_has_no_row(dtype: torch.dtype) -> None:
    """Probabilities of zero, in float32: finite, and the kernels' results are the reference's."""
    g = generator(3)
    episode = draw(T=2, N=4, S=4, dtype=torch.float64)
    mlp = draw_pair_mlp(6, torch.float64, g)
    found = []
    for backend in AVAILABLE:
        with km.use_backend(backend):
            leaves = [t.to(dtype).requires_grad_() for t in (episode.support, episode.query)]
            z = km.ops.program(
                leaves[0], episode.labels, leaves[1], [Phase("equivariant_gradient", 1, 1e-3)], n_way=4,
                scale=torch.full((1,), 400.0, dtype=dtype), mlp=km.MLPParameters(*(p.to(dtype) for p in mlp)),
            )  # fmt: skip
            found.append([z, *torch.autograd.grad(z.sum(), leaves)])
    assert all(t.isfinite().all() for f in found for t in f)
    if len(found) == 2 and dtype is torch.float64:
        assert_close(found[0], found[1], 1e-8)


def test_the_inputs_are_bounded_by_what_they_say() -> None:
    from kernelmeta.reference.equivariant_gradient import pair_inputs

    sharp = 1e4 * torch.randn(5, 40, 6, generator=generator()).double()
    inputs = pair_inputs(sharp)
    assert inputs.isfinite().all()
    assert inputs[..., 0].min() == -20 and inputs[..., 3].abs().max() == 20
    # Of even logits: nothing is known.
    even = pair_inputs(torch.zeros(4, 5).double())
    want = torch.tensor([math.log(1 / 5), 1 / 5, 0, math.log(1 / 4), math.log(5), 0, 1 / 5], dtype=torch.float64)
    assert_close([even], [want.expand(4, 5, 7)], 1e-8)


def test_steps_may_be_lowered() -> None:
    episode = draw()
    head = km.nn.EquivariantSIB(3, 13, steps=3).double()
    other = km.nn.EquivariantSIB(3, 13, steps=1).double()
    other.load_state_dict(head.state_dict())
    head.steps = 1
    assert_close([head(*episode[:3])], [other(*episode[:3])], 0)


@pytest.mark.parametrize("norm", [1e-10, 1e19])
def test_rows_of_extreme_norm_are_the_same_rows(norm: float) -> None:
    torch.manual_seed(0)
    head, labels = km.nn.EquivariantSIB(3, 13), torch.arange(3).expand(2, 3)
    support, query = torch.randn(2, 3, 13), torch.randn(2, 9, 13)
    assert_close([head(support * norm, labels, query * norm)], [head(support, labels, query)], 1e-4)


def test_compiled_or_mapped_it_is_the_same() -> None:
    torch.manual_seed(0)
    head, labels = km.nn.EquivariantSIB(3, 13).double(), torch.arange(3).expand(2, 3)
    support, query = torch.randn(2, 3, 13).double(), torch.randn(2, 9, 13).double()
    want = head(support, labels, query)
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    mapped = torch.func.vmap(lambda s, q: head(s[None], labels[:1], q[None])[0])
    assert_close([compiled(support, labels, query), mapped(support, query)], [want, want], 1e-12)


BAD: list[tuple[Any, str]] = [
    (lambda: km.nn.EquivariantGradientMLP(0), "hidden: expected at least 1, got 0"),
    (lambda: km.nn.EquivariantSIB(3, 13, norm_stats="batch"), "norm_stats: expected one of task, running"),
    (lambda: km.nn.EquivariantSIB(3, 13, steps=-1), "steps: expected 0 or more, got -1"),
    (
        lambda: km.nn.Program(3, 13, [Phase("synthetic_gradient", 1, 0.1), Phase("equivariant_gradient", 1, 0.1)]),
        "got both: a program has one MLP",
    ),
    (lambda: adapt(*draw()[:3], 3, mlp=draw().mlp), r"mlp.weight3: expected shape \[1, 8\]"),
    (lambda: km.ops.program(*draw()[:3], PHASES, n_way=3, scale=ONE), "mlp: phases of equivariant_gradient need one"),
]  # fmt: skip


@pytest.mark.parametrize(("build", "message"), BAD)
def test_what_does_not_fit_is_refused(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
