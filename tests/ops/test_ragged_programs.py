"""torch.ops.kernelmeta.program on tasks of unequal size: what each task gives by itself."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from episodes import assert_close, draw_labels
from hypothesis import given
from hypothesis import strategies as st
from ops.test_program import CASES, COSINE, CPU, LINEAR, PROGRAMS, Problem, needs_kernel
from torch import Tensor

import kernelmeta as km
from kernelmeta.phases import Phase


class Batch(NamedTuple):
    """Tasks of unequal size as one call takes them, and one by one."""

    support: Tensor
    labels: Tensor
    query: Tensor
    ragged: km.Ragged
    tasks: list[tuple[slice, slice, int]]


def draw_ragged(sizes: list[tuple[int, int, int]], D: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Batch:
    """Tasks of (ways, support rows, query rows)."""
    g = torch.Generator().manual_seed(seed)
    S, Q = [s for _, s, _ in sizes], [q for _, _, q in sizes]
    offsets = [torch.tensor([0, *torch.tensor(rows, dtype=torch.int64).cumsum(0).tolist()]) for rows in (S, Q)]
    labels = [draw_labels(1, s, n, g)[0] for n, s, _ in sizes]
    return Batch(
        torch.randn(sum(S), D, generator=g, dtype=dtype) * 0.5,
        torch.cat(labels) if labels else torch.zeros(0, dtype=torch.int64),
        torch.randn(sum(Q), D, generator=g, dtype=dtype) * 0.5,
        km.Ragged(*offsets, torch.tensor([n for n, _, _ in sizes], dtype=torch.int64)),
        [
            (slice(*offsets[0][t : t + 2].tolist()), slice(*offsets[1][t : t + 2].tolist()), n)
            for t, (n, _, _) in enumerate(sizes)
        ],
    )


SIZES = [(3, 7, 9), (5, 5, 1), (2, 11, 20), (4, 30, 3), (5, 26, 17)]


def narrowed(options: dict[str, Any], t: int, ways: int) -> dict[str, Any]:
    """What is learned for all tasks, for one with fewer ways; and what is given for this task."""
    mlp = options["mlp"]
    start = options["start"]
    if mlp.weight3.shape[0] > 1:  # not that of the equivariant gradient
        mlp = mlp._replace(weight1=mlp.weight1[:, :ways], weight3=mlp.weight3[:ways], bias3=mlp.bias3[:ways])
    return options | {
        "n_way": ways,
        "start": start if isinstance(start, str) else start[:ways] if start.dim() == 2 else start[t, None, :ways],
        "bias": options["bias"][:ways] if options["classifier"] == "linear" else options["bias"],
        "mlp": mlp,
    }


RAGGED_PROGRAMS = (
    "both", "four phases", "hinge", "labels, then equivariant", "joint", "joint guesses", "joint, then assignment",
)  # fmt: skip


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize(
    ("classifier", "name", "start"),
    [c for c in CASES if c[1] in RAGGED_PROGRAMS],
)
def test_a_ragged_batch_equals_its_tasks_one_by_one(
    classifier: str, name: str, start: str, bounded: bool, backend: str
) -> None:
    problem = Problem(PROGRAMS[classifier][name], classifier, start, T=len(SIZES), N=5, D=14).fresh()
    batch = draw_ragged(SIZES, 14)
    if bounded:
        batch = batch._replace(ragged=batch.ragged._replace(max_support=31, max_query=20))
    problem.support, problem.query = batch.support.requires_grad_(), batch.query.requires_grad_()
    options = problem.options()
    with km.use_backend(backend if CPU.available else "reference"):
        z, weights = km.ops.program(
            batch.support, batch.labels, batch.query, problem.phases, return_weights=True, **options,
            ragged=batch.ragged,
        )  # fmt: skip
        theta = weights.weight
        loss = z.where(z.isfinite(), 0).square().sum() + theta.square().sum()
        got = torch.autograd.grad(loss, problem.leaves(), allow_unused=True)
        total: Any = 0
        for t, (s, q, ways) in enumerate(batch.tasks):
            one, one_weights = km.ops.program(
                batch.support[None, s], batch.labels[None, s], batch.query[None, q], problem.phases,
                return_weights=True, **narrowed(options, t, ways),
            )  # fmt: skip
            one_theta = one_weights.weight
            assert_close([z[q, :ways], theta[t, :ways]], [one[0], one_theta[0]], 1e-12)
            assert (z[q, ways:] == -torch.inf).all() and (theta[t, ways:] == 0).all()
            if classifier != "cosine":
                assert_close([weights.bias[t, :ways]], [one_weights.bias[0]], 1e-12)
            total = total + one.square().sum() + one_theta.square().sum()
        want = torch.autograd.grad(total, problem.leaves(), allow_unused=True)
    for a, b in zip(got, want, strict=True):
        if b is not None:
            assert_close([a], [b], 1e-12)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_ragged_tasks_with_and_without_labelled_rows(backend: str) -> None:
    phases = [Phase("entropy", 1, 0.1), Phase("soft_assignment", 2, 1.0)]
    problem = Problem(phases, "cosine", "given", T=3, N=4, D=6).fresh()
    sizes = [(0, 5), (3, 2), (0, 20)]
    support, query = torch.randn(3, 6).double(), torch.randn(27, 6).double()
    labels, ways = torch.tensor([1, 1, 0]), [4, 2, 3]
    ragged = km.Ragged(torch.tensor([0, 0, 3, 3]), torch.tensor([0, 5, 7, 27]), torch.tensor(ways))
    options = problem.options()
    with km.use_backend(backend if CPU.available else "reference"):
        z = km.ops.program(support, labels, query, phases, ragged=ragged, **options)
        (got,) = torch.autograd.grad(z.where(z.isfinite(), 0).square().sum(), problem.theta0)
        total: Any = 0
        for t, (s, q) in enumerate(zip(support.split([s for s, _ in sizes]), query.split([5, 2, 20]), strict=True)):
            own = labels[: len(s)][None]
            one = km.ops.program(s[None], own, q[None], phases, **narrowed(options, t, ways[t]))
            assert_close([z[sum([5, 2, 20][:t]) :][: len(q), : ways[t]]], [one[0]], 1e-12)
            total = total + one.square().sum()
        assert_close([got], list(torch.autograd.grad(total, problem.theta0)), 1e-12)


@needs_kernel
@pytest.mark.parametrize("name", ["both", "labels, then equivariant"])
@given(sizes=st.lists(st.tuples(st.integers(1, 6), st.integers(0, 30), st.integers(1, 40)), max_size=6))
def test_ragged_shapes(name: str, sizes: list[tuple[int, int, int]]) -> None:
    sizes = [(n, n + more, q) for n, more, q in sizes]
    problem = Problem(COSINE[name], "cosine", "class_means", N=6, D=9)
    batch = draw_ragged(sizes, 9)
    z = km.ops.program(
        batch.support, batch.labels, batch.query, problem.phases, **problem.options(), ragged=batch.ragged
    )
    want = km.reference.program(
        batch.support, batch.labels, batch.query, problem.phases, **problem.options(), ragged=batch.ragged
    )
    assert z.shape == want.shape == (sum(q for _, _, q in sizes), 6)
    assert torch.equal(z == -torch.inf, want == -torch.inf)
    assert_close([z.where(z.isfinite(), 0)], [want.where(want.isfinite(), 0)], 1e-8)


def test_a_ragged_batch_of_equal_tasks_is_an_even_one() -> None:
    problem = Problem(COSINE["both"], "cosine", "class_means", T=3)
    options = problem.options()
    even = km.ops.program(problem.support, problem.labels, problem.query, problem.phases, **options)
    ragged = km.ops.program(
        problem.support.flatten(0, 1), problem.labels.flatten(), problem.query.flatten(0, 1), problem.phases,
        ragged=km.Ragged(torch.arange(4) * 7, torch.arange(4) * 9), **options,
    )  # fmt: skip
    assert torch.equal(even.flatten(0, 1), ragged)


def test_ragged_rows_of_a_bank() -> None:
    problem = Problem(LINEAR["cross_entropy"], "linear", "learned", N=5, D=14)
    batch = draw_ragged(SIZES, 14)
    bank = torch.randn(40, 14).double()
    index = [torch.randint(40, (rows.shape[0],)) for rows in (batch.support, batch.query)]
    options = problem.options() | {"ragged": batch.ragged}
    want = km.ops.program(bank[index[0]], batch.labels, bank[index[1]], problem.phases, **options)
    got = km.ops.program(
        bank, batch.labels, bank, problem.phases, support_index=index[0], query_index=index[1], **options
    )
    assert torch.equal(got, want)


BAD_RAGGED: list[tuple[dict[str, Any], str]] = [
    ({"n_ways": torch.tensor([3, 6, 2, 4, 5])}, "task 1 has 6 ways; expected 1..5"),
    ({"n_ways": torch.tensor([3, 0, 2, 4, 5])}, "task 1 has 0 ways"),
    ({"n_ways": torch.tensor([5, 5, 2, 4])}, r"n_ways: expected shape \[T\]"),
    ({"n_ways": None, "support_offsets": torch.tensor([0, 4, 12, 23, 53, 79])}, "task 0 has 5 ways and 4 support rows"),
    ({"support_offsets": torch.tensor([0, 7, 12, 23, 53, 78])}, "support_offsets: expected numbers that rise"),
    ({"query_offsets": torch.tensor([0, 10, 9, 30, 33, 50])}, "query_offsets: expected numbers that rise"),
    ({"query_offsets": torch.tensor([0, 10, 10, 30, 33, 50])}, "query: task 1 has no row; every task needs one"),
    ({"query_offsets": torch.tensor([0, 9, 10, 30, 33])}, r"expected T \+ 1 numbers in both"),
    ({"query_offsets": None}, "query_offsets: expected a tensor, got NoneType"),
    ({"query_offsets": torch.tensor([0.0, 9, 10, 30, 33, 50])}, "query_offsets: expected int64"),
    ({"max_support": 30, "max_query": 19}, "max_query: task 2 has 20 rows, more than 19"),
    ({"max_support": 7, "max_query": 20}, "max_support: task 2 has 11 rows, more than 7"),
    ({"max_support": 30}, "max_support and max_query must be given together"),
    ({"max_support": 30, "max_query": 0}, "max_query: expected at least 1, got 0"),
    ({"max_support": 30.0, "max_query": 20}, "max_support: expected an int, got float"),
]


@needs_kernel
@pytest.mark.parametrize(("change", "message"), BAD_RAGGED)
def test_bad_ragged_arguments(change: dict[str, Any], message: str) -> None:
    problem = Problem(LINEAR["cross_entropy"], "linear", "learned", N=5, D=14)
    batch = draw_ragged(SIZES, 14)
    with pytest.raises((ValueError, TypeError), match=message):
        km.ops.program(
            batch.support,
            batch.labels,
            batch.query,
            problem.phases,
            **problem.options(),
            ragged=batch.ragged._replace(**change),
        )
