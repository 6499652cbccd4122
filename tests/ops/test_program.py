"""torch.ops.kernelmeta.program against loops in D dimensions whose steps are gradients that autograd takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from episodes import assert_close, draw_labels, draw_mlp, draw_pair_mlp, running_stats
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize, one_hot

import kernelmeta as km
from kernelmeta.mlp_parameters import MLPParameters
from kernelmeta.phases import GUESSED, Part, Phase, parts_of

CPU = km.backends()["cpu"]
needs_kernel = pytest.mark.skipif(not CPU.available, reason=f"no CPU kernels: {CPU.reason}")


# ---- the unrolled loop, one task at a time


def loss_of(phase: Part, logits: Tensor, labels: Tensor, target: Tensor, mean: bool) -> Any:
    """A scalar whose gradient drives the step."""
    rows = logits.shape[0] if mean else 1
    if phase.oracle == "cross_entropy":
        return cross_entropy(logits, labels, reduction="sum") / rows
    if phase.oracle == "squared_error":
        return (logits - target * one_hot(labels, logits.shape[1])).square().sum() / 2 / rows
    if phase.oracle == "hinge":
        margins = (1 + logits - logits.gather(1, labels[:, None])).clamp_min(0)
        return (margins.sum() - len(labels)) / rows
    if phase.oracle == "entropy":
        return entropy(logits.softmax(1), phase.alpha).sum() / rows
    if phase.oracle == "marginal_entropy":
        return entropy(logits.softmax(1).mean(0), phase.alpha) * (1 if mean else logits.shape[0])
    raise AssertionError(phase.oracle)


def entropy(p: Tensor, alpha: float) -> Tensor:
    return -(p * p.log()).sum(-1) if alpha == 1 else (1 - p.pow(alpha).sum(-1)) / (alpha - 1)


def pair_inputs(logits: Tensor) -> Tensor:
    """[Q, N] -> [Q N, 7]: what the equivariant gradient looks at, one pair of a row and a class after the other."""
    Q, N = logits.shape
    p = logits.exp() / logits.exp().sum(1, keepdim=True)
    pairs = []
    for q in range(Q):
        for n in range(N):
            mass = N * sum(p[i, n] for i in range(Q)) / Q + 1e-9
            others = sum((logits[q, m].exp() for m in range(N) if m != n), torch.zeros(()).double())
            pairs.append(
                torch.stack([
                    p[q, n].log().clamp_min(-20),
                    p[q, n],
                    mass.log(),
                    (logits[q, n] - others.clamp_min(1e-30).log()).clamp(-20, 20),
                    -sum(p[q, m] * p[q, m].log() for m in range(N)),
                    logits[q, n] - sum(logits[i, n] for i in range(Q)) / Q,
                    p[q, n] / mass,
                ])
            )  # fmt: skip
    rows = torch.stack(pairs)
    return torch.stack([(x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt() for x in rows.unbind(1)], 1)


def unrolled(
    support: Tensor,
    labels: Tensor,
    query: Tensor,
    phases: list[Phase],
    rates: Tensor,
    theta: Tensor,
    bias: Tensor,
    scale: Tensor,
    target: Tensor,
    mlp: MLPParameters | None,
    stats: Tensor | None,
    *,
    classifier: str,
    reduction: str | None = None,
    first_order: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, theta and bias of one task; theta [N, D], and bias [N] if linear, else [1]. A Euclidean classifier as the
    linear one that it is.
    """
    counts = one_hot(labels, theta.shape[0]).sum(0)

    def classify(theta: Tensor, bias: Tensor, rows: Tensor) -> Tensor:
        if classifier == "euclidean":
            # scale |x - theta|^2 / -2, without the part that all classes have in common
            return scale * ((rows[:, None] - theta).square().sum(2) - rows.square().sum(1, keepdim=True)) / -2
        if classifier == "cosine":
            return scale * (bias + normalize(rows, dim=1, eps=1e-12) @ normalize(theta, dim=1, eps=1e-12).T)
        return rows @ theta.T + (bias if classifier == "linear" else 0)

    k = 0
    for phase in phases:
        anchor = theta
        for _ in range(phase.steps):
            if phase.oracle == "soft_assignment":
                shares = classify(theta, bias, query).softmax(1)
                centre = (counts[:, None] * anchor + shares.T @ normalize(query, dim=1)) / (counts + shares.sum(0))[
                    :, None
                ]
                theta = (1 - rates[k]) * theta + rates[k] * centre
                k += 1
                continue
            wanted = [theta, bias] if classifier == "linear" else [theta]
            steps = [torch.zeros_like(w) for w in wanted]
            for part in phase.parts:
                rows = support if part.rows == "support" else query
                logits = classify(theta, bias, rows)
                mean = part.means(reduction)
                of_guess = {}
                if part.oracle in ("synthetic_gradient", "equivariant_gradient"):
                    of_pairs = part.oracle == "equivariant_gradient"
                    inputs = pair_inputs(logits) if of_pairs else logits
                    guess = km.reference.synthetic_gradient_mlp(
                        inputs, mlp, norm_stats="task" if stats is None else "running", running_stats=stats
                    )
                    loss, of_guess["grad_outputs"] = logits, guess.view_as(logits) / (len(rows) if mean else 1)
                else:
                    loss = loss_of(part, logits, labels, target, mean)
                found = torch.autograd.grad(loss, wanted, create_graph=not first_order, retain_graph=True, **of_guess)
                steps = [step + part.weight * g for step, g in zip(steps, found, strict=True)]
            theta = theta - rates[k] * steps[0]
            if classifier == "linear":
                bias = bias - rates[k] * steps[1]
            k += 1
    if classifier == "euclidean":
        return classify(theta, bias, query), scale * theta, scale * theta.square().sum(1) / -2
    return classify(theta, bias, query), theta, bias


class Problem:
    """Everything that a program may read, drawn at random; all of it learned."""

    def __init__(
        self, phases: list[Phase], classifier: str, start: str, *, T: int = 2, S: int = 7, Q: int = 9, N: int = 3,
        D: int = 12, H: int = 6, seed: int = 0,
    ) -> None:  # fmt: skip
        g = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64, generator=g)

        self.phases, self.classifier, self.start, self.N = phases, classifier, start, N
        K = sum(p.steps for p in phases)
        size = 1.0 if classifier == "cosine" else D**-0.5
        self.support, self.query, self.labels = size * normal(T, S, D), size * normal(T, Q, D), draw_labels(T, S, N, g)
        most = 0.6 if classifier in ("linear", "dot") else 0.3
        self.rates = torch.rand(K, dtype=torch.float64, generator=g) * most + 0.05
        if classifier == "euclidean":  # (|theta|^2 feeds itself at larger ones)
            self.rates *= 0.2
        self.theta0, self.weight = (
            normal(N, D) * (size if classifier == "euclidean" else 1),
            torch.rand(D, dtype=torch.float64, generator=g) + 0.5,
        )
        self.scale, self.target = torch.tensor([3.3]).double(), torch.tensor([1.7]).double()
        self.bias = normal(1) if classifier == "cosine" else normal(N)
        if start == "given":
            self.theta0 = normal(T, N, D) * (size if classifier == "euclidean" else 1)
        of_pairs = any(p.oracle == "equivariant_gradient" for p in parts_of(phases))
        self.mlp = draw_pair_mlp(H, torch.float64, g) if of_pairs else draw_mlp(N, H, torch.float64, g)

    def leaves(self) -> list[Tensor]:
        own = [self.support, self.query, self.rates, self.theta0, self.weight, self.scale, self.target, self.bias]
        return [*own, *self.mlp]

    def fresh(self) -> Problem:
        for name in ("support", "query", "rates", "theta0", "weight", "scale", "target", "bias"):
            setattr(self, name, getattr(self, name).detach().clone().requires_grad_())
        self.mlp = MLPParameters(*(p.detach().clone().requires_grad_() for p in self.mlp))
        return self

    def options(self) -> dict[str, Any]:
        start = self.theta0 if self.start in ("learned", "given") else self.start
        return {
            "n_way": self.N, "rates": self.rates, "classifier": self.classifier, "start": start,
            "weight": self.weight, "scale": self.scale,
            "bias": self.bias if self.classifier in ("cosine", "linear") else None, "target_scale": self.target,
            "mlp": self.mlp,
        }  # fmt: skip

    def run(self, program: Any, **options: Any) -> list[Tensor]:
        z, weights = program(
            self.support, self.labels, self.query, self.phases, return_weights=True, **self.options(), **options
        )
        return [z, weights.weight] if self.classifier in ("cosine", "dot") else [z, *weights]

    def unrolled(self, stats: Tensor | None = None, **options: Any) -> list[Tensor]:
        tasks = []
        for t, (x, y, q) in enumerate(zip(self.support, self.labels, self.query, strict=True)):
            theta = self.theta0[t] if self.start == "given" else self.theta0
            if self.start == "class_means":
                theta = torch.stack([normalize(x[y == n], dim=1).mean(0) for n in range(self.N)]) * self.weight
            elif self.start == "zero":
                theta = torch.zeros_like(theta, requires_grad=True)
            tasks.append(
                unrolled(
                    x,
                    y,
                    q,
                    self.phases,
                    self.rates,
                    theta,
                    self.bias,
                    self.scale,
                    self.target,
                    self.mlp,
                    stats,
                    classifier=self.classifier,
                    **options,
                )
            )
        results = [torch.stack(r) for r in zip(*tasks, strict=True)]
        return results[:2] if self.classifier in ("cosine", "dot") else results


def with_gradients(problem: Problem, results: list[Tensor]) -> list[Tensor]:
    """Results and all gradients of a random linear function of them."""
    g = torch.Generator().manual_seed(3)
    loss = sum((r * torch.randn(r.shape, dtype=r.dtype, generator=g)).sum() for r in results)
    grads = torch.autograd.grad(loss, problem.leaves(), allow_unused=True)
    return results + [torch.zeros_like(p) if d is None else d for d, p in zip(grads, problem.leaves(), strict=True)]


COSINE = {
    "cross_entropy": [Phase("cross_entropy", 3, 0.1)],
    "squared_error": [Phase("squared_error", 2, 0.1)],
    "hinge": [Phase("hinge", 2, 0.1)],
    "entropy": [Phase("entropy", 3, 0.1)],
    "entropy of the support rows": [Phase("entropy", 2, 0.1, rows="support")],
    "soft_assignment": [Phase("soft_assignment", 3, 1.0)],
    "synthetic_gradient": [Phase("synthetic_gradient", 2, 0.1)],
    "synthetic_gradient of the support rows": [Phase("synthetic_gradient", 2, 0.1, rows="support")],
    "equivariant_gradient": [Phase("equivariant_gradient", 2, 0.1)],
    "equivariant_gradient of the support rows": [Phase("equivariant_gradient", 2, 0.1, rows="support")],
    "labels, then equivariant": [Phase("cross_entropy", 2, 0.1), Phase("equivariant_gradient", 2, 0.1)],
    "both": [Phase("cross_entropy", 2, 0.1), Phase("synthetic_gradient", 2, 0.1)],
    "assignment, then synthetic": [Phase("soft_assignment", 2, 1.0), Phase("synthetic_gradient", 2, 0.1)],
    "four phases": [
        Phase("hinge", 1, 0.1), Phase("soft_assignment", 2, 1.0), Phase("cross_entropy", 0, 0.1),
        Phase("entropy", 1, 0.1), Phase("soft_assignment", 1, 0.5),
    ],
    "marginal_entropy": [Phase("marginal_entropy", 2, -0.1)],
    "marginal_entropy of the support rows": [Phase("marginal_entropy", 2, -0.1, rows="support", alpha=3.0)],
    "entropy with alpha": [Phase("entropy", 3, 0.1, alpha=2.0), Phase("entropy", 1, 0.1, rows="support", alpha=0.7)],
    "joint": [Phase("cross_entropy + 0.7*entropy - 1.3*marginal_entropy", 3, 0.1)],
    "joint, of one kind of rows": [
        Phase("0.5*cross_entropy + 2*squared_error + entropy@support", 2, 0.1),
        Phase("entropy - marginal_entropy", 2, 0.1),
    ],
    "joint guesses": [Phase("hinge + 0.1*synthetic_gradient - 0.2*synthetic_gradient@support", 2, 0.1)],
    "joint equivariant guesses": [
        Phase("0.1*equivariant_gradient - 0*entropy", 2, 0.1), Phase("cross_entropy", 1, 0.1),
    ],
    "joint with alpha": [
        Phase("cross_entropy", 1, 0.1), Phase("cross_entropy + entropy - marginal_entropy", 2, 0.1, alpha=2.0),
        Phase("entropy", 1, 0.1),
    ],
    "joint, then assignment": [
        Phase("cross_entropy + 0.5*entropy", 2, 0.1), Phase("soft_assignment", 1, 1.0), Phase("3*entropy", 1, 0.1),
    ],
    "nothing": [],
}  # fmt: skip
LINEAR = {name: p for name, p in COSINE.items() if all(phase.oracle != "soft_assignment" for phase in p)}
PROGRAMS = {"cosine": COSINE, "linear": LINEAR, "euclidean": LINEAR, "dot": LINEAR}
CASES = [
    *((c, name, start) for c, of in PROGRAMS.items() for name in of for start in ("class_means", "learned", "given")),
    # All rows alike have no variance that BatchNorm could divide by: not for guessed gradients at the start.
    *(
        (c, name, "zero")
        for c in ("linear", "euclidean", "dot")
        for name, p in LINEAR.items()
        if not {part.oracle for part in parts_of(p[:1])} & set(GUESSED)
    ),
]


@pytest.mark.parametrize(("classifier", "name", "start"), CASES)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_equals_the_unrolled_loop(classifier: str, name: str, start: str, backend: str) -> None:
    problem = Problem(PROGRAMS[classifier][name], classifier, start).fresh()
    want = with_gradients(problem, problem.unrolled())
    with km.use_backend(backend if CPU.available else "reference"):
        assert_close(with_gradients(problem, problem.run(km.ops.program)), want, 1e-9)


@needs_kernel
@settings(max_examples=60)
@given(st.data())
def test_shapes(data: Any) -> None:
    classifier = data.draw(st.sampled_from(sorted(PROGRAMS)))
    name = data.draw(st.sampled_from(sorted(PROGRAMS[classifier])))
    N = data.draw(st.integers(2, 7))
    problem = Problem(
        PROGRAMS[classifier][name], classifier, data.draw(st.sampled_from(["class_means", "learned", "given"])),
        T=data.draw(st.integers(1, 4)), S=data.draw(st.integers(N, 4 * N)), Q=data.draw(st.integers(2, 40)), N=N,
        D=data.draw(st.integers(2, 70)), H=data.draw(st.integers(1, 24)), seed=data.draw(st.integers(0, 99)),
    ).fresh()  # fmt: skip
    reduction = data.draw(st.sampled_from([None, "mean"]))
    want = with_gradients(problem, problem.unrolled(reduction=reduction))
    got = with_gradients(problem, problem.run(km.ops.program, reduction=reduction))
    assert_close(got, want, 1e-8)


@pytest.mark.parametrize("name", ["both", "labels, then equivariant"])
def test_stored_statistics(name: str) -> None:
    stats = running_stats(6)
    problem = Problem(COSINE[name], "cosine", "class_means").fresh()
    want = with_gradients(problem, problem.unrolled(stats))
    assert_close(with_gradients(problem, problem.run(km.ops.program, running_stats=stats)), want, 1e-10)


# ---- first order


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_first_order_takes_steps_for_constants(backend: str) -> None:
    problem = Problem([Phase("cross_entropy", 3, 0.1)], "linear", "learned").fresh()
    want = with_gradients(problem, problem.unrolled(first_order=True))
    with km.use_backend(backend if CPU.available else "reference"):
        got = with_gradients(problem, problem.run(km.ops.program, first_order=True))
        exact = with_gradients(problem, problem.run(km.ops.program))
    assert_close(got, want, 1e-10)
    assert_close(got[:3], exact[:3], 1e-14)  # the same results ...
    difference = (got[6] - exact[6]).abs().max() / exact[6].abs().max()
    assert difference > 1e-2  # ... and another gradient of the start


def test_first_order_differs_by_the_loss_s_curvature() -> None:
    """After one step W' = W - lr g(W): the gradients differ by lr H v, H the Hessian of the inner loss."""
    problem = Problem([Phase("cross_entropy", 1, 0.1)], "linear", "learned", T=1).fresh()
    with torch.no_grad():
        problem.rates.fill_(0.1)

    def outer(z: Tensor) -> Tensor:
        return z.square().sum()

    gradients = []
    for first_order in (False, True):
        options = {**problem.options(), "first_order": first_order}
        z = km.ops.program(problem.support, problem.labels, problem.query, problem.phases, **options)
        gradients.append(
            torch.cat([g.flatten() for g in torch.autograd.grad(outer(z), [problem.theta0, problem.bias])])
        )

    def inner(parameters: Tensor) -> Tensor:
        theta, bias = parameters[: problem.theta0.numel()].view_as(problem.theta0), parameters[problem.theta0.numel() :]
        return cross_entropy(problem.support[0] @ theta.T + bias, problem.labels[0])

    at = torch.cat([problem.theta0.flatten(), problem.bias]).detach()
    hessian = torch.autograd.functional.hessian(inner, at)
    assert_close([gradients[1] - gradients[0]], [0.1 * hessian @ gradients[1]], 1e-11)


# ---- starts given from outside

WITHOUT_LABELS = [  # (classifier, phases)
    ("cosine", [Phase("entropy", 2, 0.1), Phase("soft_assignment", 2, 0.5)]),
    ("cosine", [Phase("synthetic_gradient", 2, 0.1)]),
    ("cosine", [Phase("equivariant_gradient", 2, 0.1)]),
    ("linear", [Phase("entropy", 3, 0.1)]),
    ("linear", []),
    ("euclidean", [Phase("entropy", 3, 0.1)]),
]


@pytest.mark.parametrize(("classifier", "phases"), WITHOUT_LABELS)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_given_start_needs_no_labelled_row(classifier: str, phases: list[Phase], backend: str) -> None:
    problem = Problem(phases, classifier, "given", S=5)
    problem.support, problem.labels = problem.support[:, :0], problem.labels[:, :0]
    problem.fresh()
    want = with_gradients(problem, problem.unrolled())
    with km.use_backend(backend if CPU.available else "reference"):
        assert_close(with_gradients(problem, problem.run(km.ops.program)), want, 1e-9)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_given_start_needs_no_row_of_every_class(backend: str) -> None:
    problem = Problem([Phase("cross_entropy", 2, 0.1), Phase("soft_assignment", 2, 1.0)], "cosine", "given")
    problem.labels = problem.labels.clamp(max=1)
    problem.fresh()
    want = with_gradients(problem, problem.unrolled())
    with km.use_backend(backend if CPU.available else "reference"):
        assert_close(with_gradients(problem, problem.run(km.ops.program)), want, 1e-9)
        problem.labels = problem.labels + 2
        with pytest.raises(ValueError, match=r"has label 3; labels must be in 0\.\.2"):
            problem.run(km.ops.program)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_class_that_no_row_belongs_to_stays_where_it_is(backend: str) -> None:
    rows = torch.tensor([[[1.0, 0.1, 0.0], [1.0, -0.1, 0.0], [0.0, 1.0, 0.0]]]).double()
    start = torch.tensor([[[1.0, 0, 0], [0, 1, 0], [-0.5, -0.5, 0.1]]]).double()
    nothing = rows[:, :0], torch.zeros(1, 0, dtype=torch.int64)
    with km.use_backend(backend if CPU.available else "reference"):
        _, weights = km.ops.program(
            *nothing, rows, [Phase("soft_assignment", 3, 1.0)], n_way=3, start=start.requires_grad_(),
            scale=torch.tensor([2000.0]).double(), return_weights=True,
        )  # fmt: skip
        assert_close([weights.weight[0, 2]], [start[0, 2]], 1e-14)
        (gradient,) = torch.autograd.grad(weights.weight.square().sum(), start)
    assert gradient.isfinite().all() and gradient[0, 2].abs().max() > 0.1


BAD_STARTS: list[tuple[dict[str, Any], list[Phase], str]] = [
    ({"start": torch.ones(3, 3, 12).double()}, [], r"start: expected shape \[T, N, D\] = \[2, 3, 12\]"),
    ({"start": torch.ones(12).double()}, [], r"start: expected shape \[N, D\] or \[T, N, D\]"),
    ({"start": "given"}, [], "start: expected the tensor itself of a given start"),
    ({}, [Phase("cross_entropy", 1, 0.1)], "support: tasks have no row, and phases of support rows need one"),
    ({"start": torch.ones(3, 12).double()}, [], "3 ways and 0 support rows|no row of class 0"),
]


@pytest.mark.parametrize(("change", "phases", "message"), BAD_STARTS)
def test_bad_given_starts(change: dict[str, Any], phases: list[Phase], message: str) -> None:
    problem = Problem(phases, "cosine", "given")
    with pytest.raises(ValueError, match=message):
        km.ops.program(
            problem.support[:, :0], problem.labels[:, :0], problem.query, phases, **problem.options() | change
        )


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_dot_products_have_no_bias(backend: str) -> None:
    head = km.nn.Program(3, 12, [Phase("cross_entropy", 3, 0.1), Phase("entropy", 2, 0.05)], classifier="dot")
    assert head.bias is None and head.scale is None
    problem = Problem(list(head.phases), "dot", "class_means")
    support, query = problem.support.float(), problem.query.float()
    with km.use_backend(backend if CPU.available else "reference"):
        logits, made = head(support, problem.labels, query, return_weights=True)
    assert not made.bias.any()
    assert_close([logits], [query @ made.weight.mT], 1e-5)
    with pytest.raises(ValueError, match="bias: expected None for a dot product"):
        km.ops.program(
            support, problem.labels, query, problem.phases, n_way=3, classifier="dot", bias=torch.zeros(3)
        )  # fmt: skip
