"""Steps along the sum of several oracles, and classifiers by distances: what `test_program` does not look at."""

from __future__ import annotations

from typing import Any

import published_methods as published
import pytest
import torch
from episodes import assert_close, relative_error
from hypothesis import given
from hypothesis import strategies as st
from ops.test_program import COSINE, LINEAR, PROGRAMS, Problem, with_gradients
from torch import Tensor
from torch.nn.functional import normalize

import kernelmeta as km
from kernelmeta import transductive
from kernelmeta.phases import Part, Phase, parts_of

BACKENDS = pytest.mark.parametrize("backend", ["cpu", "reference"])
TIM = "cross_entropy + entropy - marginal_entropy"


def on(backend: str) -> Any:
    return km.use_backend(backend if km.backends()["cpu"].available else "reference")


def episodes(T: int = 4, S: int = 10, Q: int = 30, N: int = 5, D: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised rows around class centres; every class has support rows."""
    g = torch.Generator().manual_seed(4)
    centres = torch.randn(T, N, D, generator=g, dtype=torch.float64)
    labels, answers = torch.arange(S).remainder(N).expand(T, -1), torch.randint(N, (T, Q), generator=g)

    def rows(of: Tensor) -> Tensor:
        own = centres.gather(1, of[..., None].expand(-1, -1, D))
        return normalize(own + torch.randn(own.shape, generator=g, dtype=torch.float64), dim=-1)

    return rows(labels), labels, rows(answers)


# ---- TIM and alpha-TIM as programs


@BACKENDS
@pytest.mark.parametrize("classifier", ["euclidean", "cosine"])
@pytest.mark.parametrize("alpha", [None, 2.0, 7.0])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, 1.5, 0.25), (1.0, 0.0, 2.0)])
def test_gradient_descent_of_tim(
    weights: tuple[float, float, float], alpha: float | None, classifier: str, backend: str
) -> None:
    support, labels, query = episodes()
    of_labels, of_marginal, of_rows = weights
    oracle = f"{of_labels}*cross_entropy - {of_marginal}*marginal_entropy + {of_rows}*entropy"
    start = torch.stack([published.means(x, y, 5) for x, y in zip(support, labels, strict=True)])
    with on(backend):
        got = km.ops.program(
            support, labels, query, [Phase(oracle, 100, 1e-2, alpha=alpha or 1.0)], n_way=5, classifier=classifier,
            start=start, scale=torch.tensor([15.0]).double(),
        )  # fmt: skip
    want = torch.stack(
        [
            published.tim(
                x, y, q, 5, steps=100, rate=1e-2, temperature=15.0, weights=weights, alpha=alpha,
                classifier=classifier, descent=torch.optim.SGD,
            )
            for x, y, q in zip(support, labels, query, strict=True)
        ]
    )  # fmt: skip
    # (theirs have |x|^2 besides, which is the same for all classes)
    assert_close([got.log_softmax(-1)], [want.log_softmax(-1)], 1e-9)
    started = km.ops.program(
        support, labels, query, [], n_way=5, classifier=classifier, start=start, scale=torch.tensor([15.0]).double()
    )
    assert (got.softmax(-1) - started.softmax(-1)).abs().max() > 0.01


@BACKENDS
def test_the_first_step_of_the_learner(backend: str) -> None:
    """Adam's first step is the gradient, every number of it over its size."""
    support, labels, query = episodes()
    start = torch.stack([published.means(x, y, 5) for x, y in zip(support, labels, strict=True)])
    scale, rate = torch.tensor([15.0]).double(), 0.05
    with on(backend):
        _, moved = km.ops.program(
            support, labels, query, [Phase(TIM, 1, 1.0)], n_way=5, classifier="euclidean", start=start, scale=scale,
            return_weights=True,
        )  # fmt: skip
    gradient = start - moved.weight / scale
    w = start - rate * gradient / (gradient.abs() + 1e-8)
    logits = scale * (query @ w.mT - w.square().sum(-1).unsqueeze(1) / 2)
    learner = transductive.tim(support, labels, query, n_way=5, steps=1, rate=rate, temperature=15.0)
    assert_close([learner.log_softmax(-1)], [logits.log_softmax(-1)], 1e-9)


@BACKENDS
def test_a_module_runs_it(backend: str) -> None:
    support, labels, query = (t.float() if t.is_floating_point() else t for t in episodes())
    head = km.nn.Program(5, 16, [Phase(TIM, 30, 0.02)], classifier="euclidean", scale=15.0)
    assert head.bias is None and head.takes_any_ways and head.cosine_terms is None and head.transductive
    with on(backend):
        logits, linear = head(support, labels, query, return_weights=True)
        means = km.ops.class_means(support, labels, 5)
        direct = km.ops.program(
            support, labels, query, head.phases, n_way=5, classifier="euclidean", start=means,
            scale=torch.tensor([15.0]),
        )  # fmt: skip
        logits.square().sum().backward()
    assert_close([logits, query @ linear.weight.mT + linear.bias.unsqueeze(1)], [direct, direct], 1e-4)
    assert head.scale is not None and head.scale.grad is not None and head.scale.grad.abs() > 0


# ---- sums


@BACKENDS
@pytest.mark.parametrize("classifier", PROGRAMS)
def test_a_sum_of_equals_is_one_of_them(classifier: str, backend: str) -> None:
    def run(oracle: str, factor: float) -> list[Tensor]:
        problem = Problem([Phase(oracle, 3, 0.1)], classifier, "learned")
        problem.rates = problem.rates * factor
        problem.fresh()
        found = with_gradients(problem, problem.run(km.ops.program))
        found[4 if classifier in ("cosine", "dot") else 5] *= factor  # of the rates
        return found

    with on(backend):
        want = run("entropy", 1.0)
        for oracle, factor in (
            ("1*entropy", 1.0), ("0.25*entropy + 0.5*entropy + 0.25*entropy", 1.0), ("2*entropy", 0.5),
            ("3*entropy - 2*entropy", 1.0), ("entropy + 0*cross_entropy + 0*squared_error", 1.0), ("-entropy", -1.0),
        ):  # fmt: skip
            assert_close(run(oracle, factor), want, 1e-9)


@BACKENDS
def test_weights_of_zero_leave_the_start(backend: str) -> None:
    problem = Problem([Phase("0*cross_entropy - 0*entropy", 3, 0.1)], "euclidean", "learned").fresh()
    with on(backend):
        got = with_gradients(problem, problem.run(km.ops.program))
        problem.phases, rates = [], problem.rates
        problem.rates = rates[:0]
        want = with_gradients(problem, problem.run(km.ops.program))
    (of_rates,) = (3 + i for i, t in enumerate(problem.leaves()) if t is problem.rates)
    assert got[of_rates].shape == (3,) and got[of_rates].abs().max() == 0
    assert_close(got[:of_rates] + got[of_rates + 1 :], want[:of_rates] + want[of_rates + 1 :], 1e-12)


JOINT = [name for name in COSINE if "joint" in name or "alpha" in name or "marginal" in name]


@pytest.mark.parametrize(
    ("classifier", "name"), [(c, name) for c, of in PROGRAMS.items() for name in JOINT if name in of]
)
@pytest.mark.parametrize("of", ["support", "query"])
def test_nan_stays_in_its_task(classifier: str, name: str, of: str) -> None:
    with on("cpu"):
        problem = Problem(PROGRAMS[classifier][name], classifier, "given", T=3)
        problem.fresh()
        want = problem.run(km.ops.program)
        wanted = torch.autograd.grad(want[0][[0, 2]].square().sum(), [problem.support, problem.query, problem.theta0])
        with torch.no_grad():
            getattr(problem, of)[1, 2, 3] = torch.nan
        got = problem.run(km.ops.program)
        assert all(torch.equal(a[[0, 2]], b[[0, 2]]) for a, b in zip(got, want, strict=True))
        reads_it = of == "query" or any(part.rows == of for part in parts_of(problem.phases))
        assert got[0][1].isnan().any() == reads_it
        found = torch.autograd.grad(got[0][[0, 2]].square().sum(), [problem.support, problem.query, problem.theta0])
        assert all(torch.equal(a[[0, 2]], b[[0, 2]]) for a, b in zip(found, wanted, strict=True))


WITHOUT_SUPPORT = [Phase("entropy - marginal_entropy", 3, 0.1), Phase("2*entropy", 1, 0.1, alpha=2.0)]


@BACKENDS
@pytest.mark.parametrize("classifier", PROGRAMS)
def test_no_support_row(classifier: str, backend: str) -> None:
    problem = Problem(WITHOUT_SUPPORT, classifier, "given", S=5)
    problem.support, problem.labels = problem.support[:, :0], problem.labels[:, :0]
    problem.fresh()
    want = with_gradients(problem, problem.unrolled())
    with on(backend):
        assert_close(with_gradients(problem, problem.run(km.ops.program)), want, 1e-9)
        problem.phases = [Phase(TIM, 1, 0.1)]
        problem.rates = problem.rates[:1]
        with pytest.raises(ValueError, match="support: tasks have no row, and phases of support rows need one"):
            problem.run(km.ops.program)


@BACKENDS
@pytest.mark.parametrize("classifier", ["linear", "euclidean"])
@pytest.mark.parametrize("D", [1, 12])
def test_one_feature_and_rows_alike(classifier: str, D: int, backend: str) -> None:
    problem = Problem(LINEAR["joint"], classifier, "given", D=D, Q=6)
    problem.support[:, 1:4], problem.query[:, :5] = problem.support[:, :1], problem.query[:, 5:]
    problem.fresh()
    want = with_gradients(problem, problem.unrolled())
    with on(backend):
        assert_close(with_gradients(problem, problem.run(km.ops.program)), want, 1e-9)


@BACKENDS
@pytest.mark.parametrize("D", [1, 2, 12])
def test_cosine_steps_that_cancel(D: int, backend: str) -> None:
    """Rows nearly parallel to each other: such tasks are done anew in D dimensions."""
    problem = Problem(COSINE["joint"], "cosine", "given", D=D, Q=6)
    problem.theta0 = 1e-3 * problem.theta0 + torch.ones(D)
    problem.support, problem.query = 1e-3 * problem.support + 1, 1e-3 * problem.query + 1
    problem.fresh()
    want = with_gradients(problem, problem.unrolled())
    with on(backend):
        assert_close(with_gradients(problem, problem.run(km.ops.program)), want, 1e-9)


@BACKENDS
@pytest.mark.parametrize("oracle", ["entropy", "marginal_entropy"])
@pytest.mark.parametrize("alpha", [0.99, 1.01])
def test_alpha_near_one_keeps_the_digits_of_float32(alpha: float, oracle: str, backend: str) -> None:
    """(p^alpha - p) / (alpha - 1), taken as it is written, loses a hundred roundings, where alpha = 1 loses none."""

    def run(alpha: float, dtype: torch.dtype, backend: str) -> list[Tensor]:
        support, labels, query = episodes()
        leaves = [t.to(dtype).requires_grad_() for t in (support, query)]
        with on(backend):
            logits = km.ops.program(
                leaves[0], labels, leaves[1], [Phase(oracle, 5, 0.5, alpha=alpha)], n_way=5, classifier="linear"
            )
            return [logits.detach(), *torch.autograd.grad(logits.square().sum(), leaves)]

    near, at_one = (
        [relative_error(g, w) for g, w in zip(run(a, torch.float32, backend), want, strict=True)]
        for a in (alpha, 1.0)
        for want in [run(a, torch.float64, "reference")]
    )
    assert all(a <= 4 * b for a, b in zip(near, at_one, strict=True)), (near, at_one)


@given(
    st.sampled_from([0.5, 1.01, 1.5, 2.0, 4.0]), st.floats(-60, 60), st.sampled_from(["entropy", "marginal_entropy"])
)
def test_sure_predictions_have_finite_gradients(alpha: float, size: float, oracle: str) -> None:
    start = size * torch.tensor([[[1.0, 0.5], [-0.3, 1.0], [0.1, -1.0]]])
    query = torch.tensor([[[2.0, 1.0], [-1.0, 3.0], [0.5, -2.0], [1.0, 1.0]]])
    got = []
    for backend in ("cpu", "reference"):
        with on(backend):
            leaves = [start.clone().requires_grad_(), query.clone().requires_grad_()]
            z = km.ops.program(
                leaves[1][:, :0], torch.zeros(1, 0, dtype=torch.int64), leaves[1], [Phase(oracle, 2, 0.1, alpha=alpha)],
                n_way=3, classifier="linear", start=leaves[0],
            )  # fmt: skip
            got.append([z, *torch.autograd.grad(z.square().sum(), leaves)])
    assert all(t.isfinite().all() for t in got[0])
    assert_close(got[0], got[1], 1e-3)


@pytest.mark.parametrize("rate", [1e-2, 0.1, 1.0, 30.0])
def test_diverging_steps_last_as_long_as_plain_ones(rate: float) -> None:
    """|theta|^2 grows by its square with every step: logits are finite for as many as in float32 in D dimensions."""
    support, labels, query = (t.float() if t.is_floating_point() else t for t in episodes())
    for scale in (1.0, 15.0):
        lasted = []
        for backend in ("cpu", "reference"):
            with on(backend):
                runs = [
                    km.ops.program(
                        support, labels, query, [Phase("squared_error", steps, rate)], n_way=5, classifier="euclidean",
                        start=torch.full((5, 16), 3.0), scale=torch.tensor([scale]),
                    )
                    for steps in range(60)
                ]  # fmt: skip
            lasted.append(torch.stack([z.isfinite().flatten(1).all(1) for z in runs]).sum(0))
        assert (lasted[1] < 60).any() or rate < 1, "nothing diverges"
        assert (lasted[0] >= lasted[1]).all(), (rate, scale, lasted)


# ---- what is written in a phase


def test_terms() -> None:
    phase = Phase(" 2*cross_entropy -entropy@support+ 1.5e-3*assignment", 4, 0.1, marginals="given", relax=0.5)
    assert phase.parts == (
        Part("cross_entropy", "support", 2.0),
        Part("entropy", "support", -1.0),
        Part("assignment", "query", 1.5e-3, "given", 0.5),
    )
    assert phase.rows == "query" and phase.is_sum
    alone = Phase("entropy", 1, 0.1, rows="support", alpha=2.0)
    assert alone.parts == (Part("entropy", "support", alpha=2.0),) and not alone.is_sum
    assert Phase("-0.5*hinge", 1, 0.1).parts == (Part("hinge", "support", -0.5),)


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"oracle": "entropy +"}, ValueError, "oracle: expected one of"),
    ({"oracle": ""}, ValueError, "oracle: expected one of"),
    ({"oracle": "entropy cross_entropy"}, ValueError, "oracle: expected one of"),
    ({"oracle": "2 entropy"}, ValueError, "oracle: expected one of"),
    ({"oracle": "entropy*2"}, ValueError, "oracle: expected one of"),
    ({"oracle": "entropy@all"}, ValueError, "oracle: expected one of"),
    ({"oracle": "entropy + dice"}, ValueError, "oracle: expected one of .*got 'dice'"),
    ({"oracle": "1e999*entropy"}, ValueError, "oracle: expected finite weights"),
    ({"oracle": 3}, TypeError, "oracle: expected a str, got int"),
    ({"oracle": "entropy + soft_assignment"}, ValueError, "soft_assignment is no gradient"),
    ({"oracle": "2*soft_assignment"}, ValueError, "soft_assignment is no gradient"),
    ({"oracle": "cross_entropy@query + entropy"}, ValueError, "cross_entropy needs labels"),
    ({"oracle": "proportions@support + entropy"}, ValueError, "proportions is for query rows"),
    ({"oracle": TIM, "rows": "support"}, ValueError, "rows: expected None for a sum"),
    ({"oracle": TIM, "marginals": "given"}, ValueError, "marginals: .* takes none, got 'given'"),
    ({"oracle": "entropy + assignment", "marginals": "none"}, ValueError, "takes uniform, given, got 'none'"),
    ({"oracle": "entropy + proportions", "relax": 0.5}, ValueError, "relax: there is no constraint"),
    ({"oracle": "entropy", "alpha": 0.0}, ValueError, "alpha: expected a finite number above 0"),
    ({"oracle": "entropy", "alpha": 1.001}, ValueError, "alpha: expected a finite number above 0, and 1 or not within"),
    ({"oracle": "entropy", "alpha": float("inf")}, ValueError, "alpha: expected a finite number"),
    ({"oracle": "entropy", "alpha": "2"}, TypeError, "alpha: expected a float, got str"),
    ({"oracle": "hinge", "alpha": 2.0}, ValueError, "alpha: hinge has no entropy"),
]


@pytest.mark.parametrize(("settings", "error", "message"), BAD)
def test_phases_that_cannot_be(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Phase(**{"steps": 1, "lr": 0.1, **settings})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": torch.zeros(1).double()}, "bias: expected None for a Euclidean classifier"),
        ({"scale": None}, "scale: a euclidean classifier needs one"),
        ({"first_order": True}, "first_order: expected False for a euclidean classifier"),
    ],
)
def test_what_a_classifier_by_distances_does_not_take(change: dict[str, Any], message: str) -> None:
    problem = Problem([Phase("entropy", 1, 0.1)], "euclidean", "learned")
    with pytest.raises(ValueError, match=message):
        km.ops.program(
            problem.support, problem.labels, problem.query, problem.phases, **{**problem.options(), **change}
        )
    with pytest.raises(ValueError, match="soft_assignment needs a cosine classifier"):
        km.nn.Program(3, 12, [Phase("soft_assignment", 1, 1.0)], classifier="euclidean")
