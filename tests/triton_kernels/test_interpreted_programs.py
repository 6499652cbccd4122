"""Programs, the linear head and ridge regression as Triton kernels, interpreted, against the reference.

`test_interpreted` starts the Python in which they run.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from episodes import assert_close, draw_labels, running_stats
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ops.test_program import COSINE, PROGRAMS, Problem
from ops.test_ragged_programs import draw_ragged
from ops.test_transforms import raw_arguments
from torch import Tensor
from triton_kernels.interpreter import both, interpreted

import kernelmeta as km
from kernelmeta.ops import linear_head_op, program_op, ridge_op
from kernelmeta.phases import Phase

pytest.importorskip("triton", reason="Triton is not installed")

TOLERANCE = 1e-9


def drawn(*shapes: tuple[int, ...], seed: int = 0, size: float = 0.5) -> list[Tensor]:
    """Leaves."""
    g = torch.Generator().manual_seed(seed)
    return [(size * torch.randn(shape, dtype=torch.float64, generator=g)).requires_grad_() for shape in shapes]


def split_infinities(logits: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Results that can be summed, and where the logits were minus infinity."""
    beyond = logits == -torch.inf
    return logits.masked_fill(beyond, 0), *others, beyond.double()


# ---- linear head


@interpreted
@settings(max_examples=6)
@given(
    st.tuples(*(st.integers(1, most) for most in (3, 20, 20, 6, 70)), st.integers(0, 3)),
    st.sampled_from(["cross_entropy", "squared_error", "hinge"]),
    st.booleans(),
)
@example((2, 7, 5, 3, 9, 2), "squared_error", False)
@example((1, 40, 5, 17, 9, 2), "hinge", False)
@example((1, 7, 5, 3, 9, 2), "cross_entropy", True)
@example((1, 257, 3, 2, 4, 1), "cross_entropy", False)  # too large: plain PyTorch
@example((0, 7, 5, 3, 9, 2), "cross_entropy", False)
def test_linear_head(sizes: tuple[int, ...], oracle: str, first_order: bool) -> None:
    T, S, Q, N, D, K = sizes
    leaves = drawn((T, S, D), (T, Q, D), (N, D), (N,), (K,))
    labels = torch.randint(N, (T, S), generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"oracle": oracle, "first_order": first_order, "return_weights": True}
    got, want = both(lambda: km.ops.linear_head(leaves[0], labels, *leaves[1:], **options), leaves)
    assert_close(got, want, TOLERANCE)


@interpreted
def test_linear_head_on_rows_of_a_bank() -> None:
    bank, *leaves = drawn((30, 9), (4, 9), (4,), (2,))
    bank = bank.detach()
    index = [torch.randint(30, (2, rows)) for rows in (7, 5)]
    labels = torch.randint(4, (2, 7))
    got, want = both(
        lambda: km.ops.linear_head(bank, labels, bank, *leaves, support_index=index[0], query_index=index[1]), leaves
    )
    assert_close(got, want, TOLERANCE)


# ---- programs

CASES = [
    ("cosine", "cross_entropy", "class_means", None),
    ("cosine", "squared_error", "learned", "sum"),
    ("cosine", "hinge", "class_means", None),
    ("cosine", "entropy", "learned", None),
    ("cosine", "entropy of the support rows", "class_means", "sum"),
    ("cosine", "synthetic_gradient of the support rows", "learned", None),
    ("cosine", "assignment, then synthetic", "class_means", "mean"),
    ("cosine", "four phases", "learned", None),
    ("cosine", "equivariant_gradient", "class_means", None),
    ("cosine", "equivariant_gradient of the support rows", "learned", "mean"),
    ("cosine", "nothing", "class_means", None),
    ("cosine", "four phases", "given", None),
    ("linear", "entropy", "given", None),
    ("linear", "cross_entropy", "zero", None),
    ("linear", "squared_error", "class_means", None),
    ("linear", "hinge", "learned", "sum"),
    ("linear", "entropy", "class_means", None),
    ("linear", "both", "learned", "mean"),
    ("linear", "labels, then equivariant", "learned", "mean"),
    ("euclidean", "cross_entropy", "class_means", None),
    ("euclidean", "squared_error", "zero", "sum"),
    ("euclidean", "entropy", "given", None),
    ("euclidean", "both", "learned", "mean"),
    ("euclidean", "labels, then equivariant", "class_means", None),
    ("euclidean", "nothing", "learned", None),
    ("dot", "both", "given", None),
]


def check_program(problem: Problem, **options: Any) -> None:
    got, want = both(lambda: tuple(problem.run(km.ops.program, **options)), problem.leaves())
    assert_close(got, want, TOLERANCE)


@interpreted
@pytest.mark.parametrize(("classifier", "name", "start", "reduction"), CASES)
def test_program(classifier: str, name: str, start: str, reduction: str | None) -> None:
    check_program(Problem(PROGRAMS[classifier][name], classifier, start, T=1).fresh(), reduction=reduction)


@interpreted
@pytest.mark.parametrize("rows", [0, 3])
def test_a_given_start_with_few_labelled_rows(rows: int) -> None:
    problem = Problem([Phase("entropy", 1, 0.1), Phase("soft_assignment", 2, 1.0)], "cosine", "given")
    problem.support, problem.labels = problem.support[:, :rows], problem.labels[:, :rows].clamp(max=1)
    check_program(problem.fresh())


@interpreted
@settings(max_examples=6)
@given(st.data())
def test_shapes_of_a_program(data: Any) -> None:
    classifier = data.draw(st.sampled_from(sorted(PROGRAMS)))
    name = data.draw(st.sampled_from(sorted(PROGRAMS[classifier])))
    N = data.draw(st.integers(2, 6))
    problem = Problem(
        PROGRAMS[classifier][name], classifier, data.draw(st.sampled_from(["class_means", "learned"])),
        T=data.draw(st.integers(1, 2)), S=data.draw(st.integers(N, 4 * N)), Q=data.draw(st.integers(2, 40)), N=N,
        D=data.draw(st.integers(2, 70)), H=data.draw(st.integers(1, 24)), seed=data.draw(st.integers(0, 99)),
    )  # fmt: skip
    check_program(problem.fresh())


@interpreted
@pytest.mark.parametrize(
    ("sizes", "name"),
    [
        ({"T": 2, "S": 20, "Q": 75, "N": 5, "H": 40}, "both"),
        ({"T": 1, "S": 20, "Q": 150, "N": 17}, "soft_assignment"),  # two columns of tiles, 256 rows
        ({"T": 1, "S": 20, "Q": 300}, "entropy"),  # too large: plain PyTorch
        ({"T": 1, "S": 20, "Q": 75, "N": 5, "H": 16}, "equivariant_gradient"),
        ({"T": 1, "S": 20, "Q": 180}, "equivariant_gradient"),  # too many pairs: plain PyTorch
        ({"T": 0}, "both"),
    ],
)
def test_sizes_of_a_program(sizes: dict[str, int], name: str) -> None:
    phases = [Phase(p.oracle, 1, 0.1, p.rows) for p in COSINE[name]]
    check_program(Problem(phases, "cosine", "class_means", **sizes).fresh())


@interpreted
@pytest.mark.parametrize("name", ["both", "labels, then equivariant"])
def test_stored_statistics_and_no_gradient_of_the_weights(name: str) -> None:
    problem = Problem(COSINE[name], "cosine", "class_means", T=1).fresh()
    stats = running_stats(6)
    got, want = both(lambda: problem.run(km.ops.program, running_stats=stats)[0], problem.leaves())
    assert_close(got, want, TOLERANCE)


@interpreted
def test_first_order_program() -> None:
    phases = [Phase("cross_entropy", 2, 0.1), Phase("synthetic_gradient", 1, 0.1)]
    check_program(Problem(phases, "linear", "learned").fresh(), first_order=True)


SIZES = [(3, 7, 9), (4, 4, 1), (2, 18, 20)]


@interpreted
@pytest.mark.parametrize(
    ("classifier", "name", "start"),
    [
        ("cosine", "four phases", "class_means"),
        ("cosine", "both", "learned"),
        ("linear", "both", "zero"),
        ("cosine", "labels, then equivariant", "class_means"),
        ("euclidean", "both", "class_means"),
        ("dot", "both", "learned"),
    ],
)
@pytest.mark.parametrize("bounds", [{}, {"max_support": 20, "max_query": 20}])
def test_ragged_program(classifier: str, name: str, start: str, bounds: dict[str, int]) -> None:
    problem = Problem(PROGRAMS[classifier][name], classifier, start, N=4, D=14).fresh()
    batch = draw_ragged(SIZES, 14)
    batch = batch._replace(ragged=batch.ragged._replace(**bounds))
    problem.support, problem.query = batch.support.requires_grad_(), batch.query.requires_grad_()

    def run() -> tuple[Tensor, ...]:
        z, weights = km.ops.program(
            batch.support, batch.labels, batch.query, problem.phases, return_weights=True, **problem.options(),
            ragged=batch.ragged,
        )  # fmt: skip
        return split_infinities(z, *weights[: 1 if classifier == "cosine" else 2])

    got, want = both(run, problem.leaves())
    assert_close(got, want, TOLERANCE)


@interpreted
@pytest.mark.parametrize("sizes", [[], SIZES])
def test_ragged_rows_of_a_bank(sizes: list[tuple[int, int, int]]) -> None:
    problem = Problem([Phase("entropy", 1, 0.1)], "cosine", "learned", N=4, D=14)
    batch = draw_ragged(sizes, 14)
    bank = torch.randn(40, 14).double()
    index = {
        f"{n}_index": torch.randint(40, (len(r),)) for n, r in (("support", batch.support), ("query", batch.query))
    }
    options = problem.options() | {"ragged": batch.ragged} | index
    with km.use_backend("triton"):
        got = km.ops.program(bank, batch.labels, bank, problem.phases, **options)
    want = km.reference.program(bank, batch.labels, bank, problem.phases, **options)
    assert torch.equal(got == -torch.inf, want == -torch.inf)
    assert_close([got.where(got.isfinite(), 0)], [want.where(want.isfinite(), 0)], TOLERANCE)


@interpreted
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_ways": torch.tensor([3, 5, 2])}, "task 1 has 5 ways; expected 1..4"),
        ({"support_offsets": torch.tensor([0, 7, 9, 29])}, "task 1 has 4 ways and 2 support rows"),
        ({"query_offsets": torch.tensor([0, 9, 9, 30])}, "needs a query row"),
        ({"query_offsets": torch.tensor([0, 10, 9, 30])}, "query_offsets: expected numbers that rise"),
    ],
)
def test_bad_offsets(change: dict[str, Tensor], message: str) -> None:
    problem = Problem([], "cosine", "learned", N=4, D=14)
    batch = draw_ragged(SIZES, 14)
    ragged = batch.ragged._replace(**change)
    with km.use_backend("triton"), pytest.raises(ValueError, match=message):
        km.ops.program(batch.support, batch.labels, batch.query, [], **problem.options(), ragged=ragged)


@interpreted
@pytest.mark.parametrize("ridge", [False, True])
@pytest.mark.parametrize(
    ("change", "broken"),
    [
        ({"max_support": 17}, [2]),
        ({"max_query": 19}, [2]),
        ({"n_ways": torch.tensor([3, 5, 2])}, [1]),
        ({"support_offsets": torch.tensor([0, 7, 9, 29])}, [1, 2]),  # fewer rows than ways; foreign labels
        ({"query_offsets": torch.tensor([0, 9, 9, 30])}, [1]),
        ({"query_offsets": torch.tensor([0, 10, 9, 30])}, [0, 1, 2]),
        ({"support_offsets": torch.tensor([0, 7, 11, 28])}, [0, 1, 2]),
        ({"support_offsets": torch.tensor([0, 7, 1 << 40, 29])}, [0, 1, 2]),
    ],
)
def test_what_is_wrong_where_sizes_are_given_gives_nan(change: dict[str, Any], broken: list[int], ridge: bool) -> None:
    batch = draw_ragged(SIZES, 14)
    ragged = batch.ragged._replace(**({"max_support": 20, "max_query": 21} | change))
    offsets = ragged.query_offsets.tolist()
    one = torch.ones(1, dtype=torch.float64, requires_grad=True)
    rows = (batch.support, batch.labels, batch.query)
    with km.use_backend("triton"):
        if ridge:
            z = km.ops.ridge(*rows, one, one, one, n_way=4, ragged=ragged)
        else:
            start = torch.randn(4, 14).double()
            phases = [Phase("cross_entropy", 1, 0.1)]
            z = km.ops.program(*rows, phases, n_way=4, start=start, scale=one, ragged=ragged)
    (gradient,) = torch.autograd.grad(z.where(z != -torch.inf, 0).sum(), one)
    assert gradient.isnan().all()
    for t in range(3):
        own = z[offsets[t] : offsets[t + 1]]
        if t in broken:
            assert own[:, 0].isnan().all() and not own.isfinite().any()
        else:
            assert not own.isnan().any()


# ---- ridge regression


def ridge_problem(T: int, S: int, Q: int, N: int, D: int) -> tuple[list[Tensor], Tensor]:
    leaves = drawn((T, S, D), (T, Q, D))
    values = [torch.tensor([v], dtype=torch.float64, requires_grad=True) for v in (0.7, 3.1, -0.4)]
    return [*leaves, *values], draw_labels(T, S, N, torch.Generator().manual_seed(0))


@interpreted
@settings(max_examples=5)
@given(st.integers(1, 5), st.tuples(*(st.integers(0, most) for most in (1, 20, 20, 60))))
@example(17, (0, 24, 5, 9))
@example(2, (-1, 4, 5, 9))
@example(2, (0, 130, 2, 5))  # too large: plain PyTorch
def test_ridge(N: int, sizes: tuple[int, ...]) -> None:
    T, more, Q, D = sizes
    leaves, labels = ridge_problem(T + 1, N + more, Q + 1, N, D + 1)
    got, want = both(lambda: km.ops.ridge(leaves[0], labels, *leaves[1:], n_way=N, return_coefficients=True), leaves)
    assert_close(got, want, 1e-8)


@interpreted
@pytest.mark.parametrize("bounds", [{}, {"max_support": 20, "max_query": 20}])
def test_ragged_ridge(bounds: dict[str, int]) -> None:
    batch = draw_ragged(SIZES, 14)
    batch = batch._replace(ragged=batch.ragged._replace(**bounds))
    leaves, _ = ridge_problem(1, 4, 1, 2, 14)
    leaves[:2] = batch.support.requires_grad_(), batch.query.requires_grad_()

    def run() -> tuple[Tensor, ...]:
        return split_infinities(
            *km.ops.ridge(leaves[0], batch.labels, *leaves[1:], n_way=4, return_coefficients=True, ragged=batch.ragged)
        )

    got, want = both(run, leaves)
    assert_close(got, want, TOLERANCE)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("others", [[2], [1, 2, 3]])  # a pivot of zero, and one that is nothing but rounding
def test_a_singular_system_gives_its_task_nan(others: list[int], dtype: torch.dtype) -> None:
    leaves, labels = ridge_problem(3, 7, 5, 3, 12)
    support = leaves[0].detach().clone()
    support[1, 4] = support[1, others].mean(0)
    values = [v.detach().to(dtype).requires_grad_() for v in (support, leaves[1], torch.zeros(1), *leaves[3:])]
    with km.use_backend("triton"):
        z = km.ops.ridge(values[0], labels, *values[1:], n_way=3)
    assert z[1].isnan().all() and z[[0, 2]].isfinite().all()
    (g,) = torch.autograd.grad(z.sum(), values[0])
    assert g[1].isnan().any() and g[[0, 2]].isfinite().all()


@interpreted
@pytest.mark.parametrize("ridge", [False, True])
def test_gradients_beyond_a_task_s_own_ways_are_dropped(ridge: bool) -> None:
    batch = draw_ragged(SIZES, 14)
    problem = Problem([Phase("entropy", 1, 0.1)], "cosine", "learned", N=4, D=14).fresh()
    one = torch.ones(1, dtype=torch.float64)
    found = []
    for backend in ("triton", "reference"):
        with km.use_backend(backend):
            if ridge:
                leaves = [problem.scale, problem.target]
                z = km.ops.ridge(batch.support, batch.labels, batch.query, one, *leaves, n_way=4, ragged=batch.ragged)
            else:
                leaves = [problem.scale, problem.theta0, problem.rates]
                z = km.ops.program(
                    batch.support, batch.labels, batch.query, problem.phases, **problem.options(), ragged=batch.ragged
                )
        found.append(torch.autograd.grad(z, leaves, torch.ones_like(z)))
    assert_close(*found, TOLERANCE)


# ---- all of them


def runs(dtype: torch.dtype) -> list[tuple[Any, int]]:
    """Ops as functions of features and labels, and the tolerance that single precision needs."""
    problem = Problem([Phase("cross_entropy", 2, 0.1), Phase("entropy", 1, 0.1)], "cosine", "learned")
    options = {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in problem.options().items() if k != "mlp"}
    weight, bias, rates = (t.detach().to(dtype) for t in drawn((3, 12), (3,), (2,)))
    one = torch.ones(1, dtype=dtype)
    return [
        lambda x, y, q: km.ops.linear_head(x, y, q, weight, bias, rates),
        lambda x, y, q: km.ops.program(x, y, q, problem.phases, **options),
        lambda x, y, q: km.ops.ridge(x, y, q, one, one, one, n_way=3),
    ]


@interpreted
@pytest.mark.parametrize("op", range(3))
def test_bad_labels_give_nan_where_they_are(op: int) -> None:
    support, query = (t.detach() for t in drawn((3, 4, 12), (3, 5, 12)))
    labels = torch.tensor([[0, 1, 2, 1], [0, 3, 2, 1], [-1, 0, 1, 2]])
    with km.use_backend("triton"):
        z = runs(torch.float64)[op](support, labels, query)
    assert z[0].isfinite().all() and z[1:].isnan().all()


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_precisions(dtype: torch.dtype) -> None:
    support, query = (t.detach().to(dtype) for t in drawn((2, 7, 12), (2, 5, 12)))
    labels = draw_labels(2, 7, 3, torch.Generator().manual_seed(0))
    for single, double in zip(runs(torch.float32), runs(torch.float64), strict=True):
        with km.use_backend("triton"):
            got = single(support, labels, query)
        with km.use_backend("reference"):
            want = double(support.double(), labels, query.double())
        assert got.dtype is torch.float32
        assert_close([got], [want], 1e-5)


@interpreted
def test_opcheck_and_compile() -> None:
    support, query, weight, bias, rates = drawn((2, 4, 9), (2, 5, 9), (3, 9), (3,), (2,))
    labels = torch.tensor([[0, 1, 2, 1], [2, 1, 0, 0]])
    one = torch.ones(1, dtype=torch.float64, requires_grad=True)
    even = {"support": support, "query": query, "support_labels": labels}
    head = {"weight": weight, "bias": bias, "rates": rates, "oracle": 0, "first_order": False, "return_weights": True}
    ridge = {"regularization": one, "scale": one, "bias": one, "n_way": 3}
    program = {
        "scale": one, "rates": rates, "n_way": 3, "first_order": False, "coefficients": True,
        "phases": program_op.encode([km.nn.Phase("cross_entropy", 1, 0.1), km.nn.Phase("entropy", 1, 0.1)], None),
    }  # fmt: skip
    for op, own in (
        (linear_head_op.OP, head),
        (ridge_op.OP, ridge),
        (program_op.OP, {**program, "classifier": 0, "start": 0, "bias": one}),
        (program_op.OP, {**program, "classifier": 1, "start": 1, "bias": bias, "theta0": weight}),
    ):
        torch.library.opcheck(op.on("triton").raw, raw_arguments(op, **even, **own))

    def call(support: Tensor) -> Tensor:
        return km.ops.linear_head(support, labels, query, weight, bias, rates).square().sum()

    with km.use_backend("triton"):
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(support)
        want = call(support)
    assert torch.equal(compiled, want)
    assert_close(torch.autograd.grad(compiled, support), torch.autograd.grad(want, support), 1e-12)
