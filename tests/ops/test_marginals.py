"""Programs that know the shares of the query rows that the classes have, against loops that autograd differentiates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from episodes import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

import kernelmeta as km
from kernelmeta.phases import Phase
from kernelmeta.reference.transport import Bags, transport

CPU = km.backends()["cpu"]
needs_kernel = pytest.mark.skipif(not CPU.available, reason=f"no CPU kernels: {CPU.reason}")
BACKENDS = ["cpu", "reference"] if CPU.available else ["reference"]


def sinkhorn(z: Tensor, p: Tensor, relax: float) -> Tensor:
    """T of one bag [n, N] by thousands of steps of Sinkhorn's algorithm, each of which autograd goes through."""
    inside = p > 0
    log_p = p[inside].log()
    z = z[:, inside].log_softmax(1)
    g = torch.zeros_like(log_p)
    for _ in range(4000):
        before = g
        g = relax * (g + log_p - (z + g).softmax(1).mean(0).log())
        if (g - before).abs().max() < 1e-15:
            break
    T = torch.zeros(len(z), len(p), dtype=z.dtype)
    return T.index_copy(1, inside.nonzero()[:, 0], (z + g).softmax(1))


class Problem:
    """Drawn at random, all of it with gradients; ``bags``: how many rows each has."""

    def __init__(
        self, phases: list[Phase], cosine: bool = True, *, T: int = 2, S: int = 4, Q: int = 9, N: int = 3, D: int = 6,
        bags: list[int] | None = None, zero: bool = False, seed: int = 0,
    ) -> None:  # fmt: skip
        g = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64, generator=g)

        self.phases, self.cosine, self.N = phases, cosine, N
        self.support, self.query, self.theta0 = normal(T, S, D), normal(T, Q, D), normal(T, N, D)
        self.labels = torch.randint(N, (T, S), generator=g)
        self.scale = torch.tensor([4.0]).double()
        self.rates = torch.rand(sum(p.steps for p in phases), dtype=torch.float64, generator=g) * 0.5 + 0.2
        self.sizes = [Q] if bags is None else bags
        self.weights = torch.rand(T, len(self.sizes), N, dtype=torch.float64, generator=g) + 0.3
        if zero:
            self.weights[..., 0] = 0
        self.given = any(p.marginals == "given" for p in phases)
        for t in self.leaves():
            t.requires_grad_()

    def leaves(self) -> list[Tensor]:
        return [self.query, self.theta0, self.scale, self.rates, self.weights]

    def shares(self) -> Tensor:
        return self.weights / self.weights.sum(-1, keepdim=True)

    def run(self, **options: Any) -> list[Tensor]:
        shares = self.shares()
        if len(self.sizes) > 1:
            options["bag_offsets"] = torch.tensor([0, *self.sizes]).cumsum(0)
        elif self.given:
            shares = shares[:, 0]
        z, weights = km.ops.program(
            self.support, self.labels, self.query, self.phases, n_way=self.N, rates=self.rates, start=self.theta0,
            classifier="cosine" if self.cosine else "linear", scale=self.scale if self.cosine else None,
            proportions=shares if self.given else None, return_weights=True, **options,
        )  # fmt: skip
        return [z, weights.weight]

    def unrolled(self) -> list[Tensor]:
        results = []
        for t in range(len(self.query)):
            query = self.query[t]
            theta, bias, k = self.theta0[t], torch.zeros(self.N, requires_grad=True).double(), 0
            counts = torch.bincount(self.labels[t], minlength=self.N)[:, None]

            def classify(theta: Tensor, bias: Tensor, query: Tensor = query) -> Tensor:
                if self.cosine:
                    return self.scale * normalize(query, dim=1) @ normalize(theta, dim=1).T
                return query @ theta.T + bias

            for phase in self.phases:
                anchor = theta
                for _ in range(phase.steps):
                    logits, loss, plan = classify(theta, bias), torch.zeros(()).double(), []
                    at_bag = zip(logits.split(self.sizes), self.shares()[t], strict=True)
                    for z, p in at_bag:
                        if phase.marginals == "uniform":
                            p = torch.full_like(p, 1 / self.N)
                        if phase.oracle == "proportions":
                            loss = loss - len(z) / len(query) * (p * z.softmax(1).mean(0).log()).sum()
                            continue
                        T = sinkhorn(z, p, phase.relax)
                        plan.append(T if phase.marginals != "none" else z.softmax(1))
                    if phase.oracle == "soft_assignment":
                        T = torch.cat(plan)
                        mass = counts + T.sum(0)[:, None]
                        own = torch.where(mass == 0, 1, counts)
                        mean = (own * anchor + T.T @ normalize(query, dim=1)) / (own + T.sum(0)[:, None])
                        theta = torch.lerp(theta, mean, self.rates[k])
                    else:
                        if phase.oracle == "assignment":
                            guess = (logits.softmax(1) - torch.cat(plan)) / len(query)
                            steps = torch.autograd.grad(logits, [theta, bias] if not self.cosine else [theta], guess,
                                                        create_graph=True)  # fmt: skip
                        else:
                            wanted = [theta] if self.cosine else [theta, bias]
                            steps = torch.autograd.grad(loss, wanted, create_graph=True)
                        theta = theta - self.rates[k] * steps[0]
                        if not self.cosine:
                            bias = bias - self.rates[k] * steps[1]
                    k += 1
            results.append((classify(theta, bias), theta))
        return [torch.stack(r) for r in zip(*results, strict=True)]

    def with_gradients(self, results: list[Tensor]) -> list[Tensor]:
        g = torch.Generator().manual_seed(3)
        loss = sum((r * torch.randn(r.shape, dtype=r.dtype, generator=g)).sum() for r in results)
        grads = torch.autograd.grad(loss, self.leaves(), allow_unused=True)
        pairs = zip(grads, self.leaves(), strict=True)
        return results + [torch.zeros_like(leaf) if d is None else d for d, leaf in pairs]


PROGRAMS = {
    "proportions": [Phase("proportions", 3, 0.5, marginals="given")],
    "proportions, uniform": [Phase("proportions", 2, 0.5)],
    "assignment": [Phase("assignment", 3, 0.5, marginals="given")],
    "assignment, uniform": [Phase("assignment", 2, 0.5)],
    "assignment, relaxed": [Phase("assignment", 2, 0.5, marginals="given", relax=0.7)],
    "soft assignment": [Phase("soft_assignment", 3, 1.0, marginals="given")],
    "soft assignment, uniform": [Phase("soft_assignment", 2, 1.0, marginals="uniform")],
    "soft assignment, relaxed": [Phase("soft_assignment", 2, 1.0, marginals="given", relax=0.8)],
    "one after the other": [
        Phase("soft_assignment", 1, 1.0), Phase("assignment", 1, 0.5, marginals="given"), Phase("proportions", 1, 0.5),
        Phase("soft_assignment", 1, 1.0, marginals="given", relax=0.9),
    ],
}  # fmt: skip
LINEAR = [name for name in PROGRAMS if name.startswith(("proportions", "assignment"))]
CASES = [*((True, name) for name in PROGRAMS), *((False, name) for name in LINEAR)]


@pytest.mark.parametrize("bags", [None, [4, 5], [1, 0, 6, 2]])
@pytest.mark.parametrize(("cosine", "name"), CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_unrolled_loop(cosine: bool, name: str, bags: list[int] | None, backend: str) -> None:
    problem = Problem(PROGRAMS[name], cosine, bags=bags)
    if bags is not None and 0 in bags:
        bags = [n for n in bags if n]
    with km.use_backend(backend):
        got = problem.with_gradients(problem.run())
    if bags is not None and 0 in problem.sizes:
        problem.sizes = bags
        problem.weights = problem.weights.detach()[:, [0, 2, 3]].requires_grad_()
        got[-1] = got[-1][:, [0, 2, 3]]
    assert_close(got, problem.with_gradients(problem.unrolled()), 1e-7 if "assign" in name else 1e-9)


@pytest.mark.parametrize("name", ["proportions", "assignment", "soft assignment", "soft assignment, relaxed"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_class_of_no_share_is_left_out(name: str, backend: str) -> None:
    problem = Problem(PROGRAMS[name], zero=True, S=0)
    with km.use_backend(backend):
        got = problem.with_gradients(problem.run())
    want = problem.with_gradients(problem.unrolled())
    got[-1], want[-1] = got[-1][..., 1:], want[-1][..., 1:]
    assert_close(got, want, 1e-7 if "assign" in name else 1e-9)
    assert got[-1].isfinite().all()


@pytest.mark.parametrize("relax", [1.0, 0.8])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_share_of_one_takes_all_rows(relax: float, backend: str) -> None:
    problem = Problem([Phase("soft_assignment", 1, 1.0, marginals="given", relax=relax)], S=0)
    shares = torch.tensor([[0, 1, 0], [1, 0, 0]]).double()
    with km.use_backend(backend), torch.no_grad():
        problem.weights = shares[:, None]
        problem.rates = torch.ones(1).double()
        _, theta = problem.run()
    mean = normalize(problem.query, dim=-1).mean(1)
    for t, n in enumerate((1, 0)):
        assert_close([theta[t, n]], [mean[t]], 1e-12)
        others = [m for m in range(3) if m != n]
        assert_close([theta[t, others]], [problem.theta0[t, others]], 1e-14)


@needs_kernel
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_shapes(data: Any) -> None:
    name = data.draw(st.sampled_from(sorted(PROGRAMS)))
    sizes = data.draw(st.lists(st.integers(0, 30), min_size=1, max_size=4).filter(any))
    problem = Problem(
        PROGRAMS[name], T=data.draw(st.integers(1, 3)), S=data.draw(st.integers(0, 5)), Q=sum(sizes),
        N=data.draw(st.integers(1, 20)), D=data.draw(st.integers(2, 40)), bags=sizes,
        seed=data.draw(st.integers(0, 99)),
    )  # fmt: skip
    got = problem.with_gradients(problem.run())
    with km.use_backend("reference"):
        want = problem.with_gradients(problem.run())
    assert_close(got, want, 1e-7)


@pytest.mark.parametrize("sharpness", [1.0, 30.0, 200.0])
@pytest.mark.parametrize("relax", [1.0, 0.8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sharp_logits_meet_the_shares(sharpness: float, relax: float, dtype: torch.dtype) -> None:
    """An undamped step of Newton's method meets a matrix of zeros here."""
    g = torch.Generator().manual_seed(1)
    logits = (torch.randn(40, 12, 5, generator=g) * sharpness).to(dtype)
    shares = torch.rand(40, 1, 5, generator=g).to(dtype) + 0.1
    shares /= shares.sum(-1, keepdim=True)
    bags = Bags(logits, None)
    plan = transport(logits, shares, bags, relax)
    assert plan.isfinite().all()
    assert_close([plan.sum(-1)], [torch.ones(40, 12)], 1e-6)
    if relax == 1:
        assert (plan.mean(1) - shares[:, 0]).abs().max() <= (1e-5 if dtype is torch.float32 else 1e-10)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_hundreds_of_ways(dtype: torch.dtype) -> None:
    """A step of Newton's method solves for 199 unknowns; few enough rows that the kernel takes them."""
    g = torch.Generator().manual_seed(0)
    start = torch.randn(2, 200, 400, generator=g).to(dtype).requires_grad_()
    query = torch.randn(2, 90, 400, generator=g).to(dtype).requires_grad_()
    shares = (torch.rand(2, 200, generator=g) + 0.3).to(dtype)
    found = []
    for backend in BACKENDS:
        with km.use_backend(backend):
            z = km.ops.program(
                query[:, :0], torch.empty(2, 0, dtype=torch.int64), query, PROGRAMS["assignment"], n_way=200,
                start=start, scale=torch.tensor([10.0], dtype=dtype), proportions=shares / shares.sum(-1, keepdim=True),
            )  # fmt: skip
        found.append([z, *torch.autograd.grad(z.square().sum(), [query, start])])
    assert_close(found[0], found[1], 1e-7 if dtype is torch.float64 else 1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", sorted(PROGRAMS))
def test_no_task_with_bags(name: str, backend: str) -> None:
    problem = Problem(PROGRAMS[name], T=0, bags=[4, 0, 5])
    with km.use_backend(backend):
        results = problem.with_gradients(problem.run())
    assert [r.shape for r in results[:2]] == [(0, 9, 3), (0, 3, 6)]
    assert all(torch.equal(r, torch.zeros_like(r)) for r in results)


@needs_kernel
@pytest.mark.parametrize("scale", [1.0, 100.0, 400.0])
@pytest.mark.parametrize("relax", [1.0, 0.8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sharp_logits_in_the_kernel(scale: float, relax: float, dtype: torch.dtype) -> None:
    problem = Problem([Phase("soft_assignment", 1, 1.0, marginals="given", relax=relax)], T=30, Q=13, N=5)
    for name in ("support", "query", "theta0", "rates", "weights"):
        setattr(problem, name, getattr(problem, name).detach().to(dtype))
    problem.scale = torch.tensor([scale], dtype=dtype)
    found = []
    for backend in BACKENDS:
        with km.use_backend(backend):
            found.append(problem.run())
    assert all(r.isfinite().all() for r in found[0])
    if scale < 200:  # beyond, a row may go to either of two classes
        assert_close(found[0], found[1], 1e-7 if dtype is torch.float64 else 1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shares_that_are_trusted_all_but_entirely(dtype: torch.dtype, backend: str) -> None:
    """What is left of the penalty, (exp(-tau g) - 1) / tau, is a difference of nearly equal numbers."""
    rows = torch.Generator().manual_seed(0)
    query = torch.randn(64, 75, 16, generator=rows).to(dtype)
    start, shares = torch.randn(64, 5, 16, generator=rows).to(dtype), torch.rand(64, 5, generator=rows).to(dtype)
    met = []
    for relax in (1.0, 1 - 1e-9, 0.999999, 0.9999, 0.999):
        phases = [Phase("soft_assignment", 3, 1.0, marginals="given", relax=relax)]
        with km.use_backend(backend):
            met.append(
                km.ops.program(
                    query[:, :0], torch.empty(64, 0, dtype=torch.int64), query, phases, n_way=5, start=start,
                    scale=torch.full((1,), 10.0).to(dtype), proportions=shares / shares.sum(-1, keepdim=True),
                )
            )  # fmt: skip
        assert met[-1].isfinite().all(), relax
    for at, bound in ((1, 1e-3), (2, 1e-2), (3, 0.1)):  # by continuity
        assert (met[at] - met[0]).abs().median() < bound


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_is_confined_to_its_task_and_named(backend: str) -> None:
    problem = Problem([Phase("assignment", 2, 0.5, marginals="given")], T=3)
    with torch.no_grad():
        clean = problem.run()[0]
        problem.query[1, 2] = float("nan")
    with km.use_backend(backend), pytest.warns(UserWarning, match="NaN in task 1"):
        z = problem.run()[0]
    assert z[1].isnan().any()
    assert_close([z[[0, 2]]], [clean[[0, 2]]], 1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_shares_of_a_narrower_type_are_met(dtype: torch.dtype) -> None:
    problem = Problem(PROGRAMS["assignment"], N=7)
    problem.weights = problem.weights.detach()
    shares = problem.shares()[:, 0].to(dtype)
    z = km.ops.program(
        problem.support[:, :0], problem.labels[:, :0], problem.query, problem.phases, n_way=7, start=problem.theta0,
        scale=problem.scale, proportions=shares,
    )  # fmt: skip
    assert z.isfinite().all() and z.dtype is torch.float64


@needs_kernel
@pytest.mark.parametrize("name", sorted(PROGRAMS))
def test_what_another_call_left_in_memory_is_not_read(name: str) -> None:
    problem, broken = Problem(PROGRAMS[name]), Problem(PROGRAMS[name], Q=60, N=9)
    with torch.no_grad():
        broken.query.fill_(float("nan"))
    with pytest.warns(UserWarning, match="NaN in task 0, 1"):
        left = broken.run()
    got = problem.run()
    broken.with_gradients(left)
    assert all(r.isfinite().all() for r in problem.with_gradients(got))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", sorted(PROGRAMS))
def test_a_ragged_batch_equals_its_tasks_one_by_one(name: str, backend: str) -> None:
    phases, D = PROGRAMS[name], 6
    sizes = [(3, 7), (5, 20), (2, 1)]  # ways, query rows
    g = torch.Generator().manual_seed(2)
    query = torch.randn(28, D, generator=g).double()
    start = torch.randn(3, 5, D, generator=g).double().requires_grad_()
    weights = (torch.rand(3, 5, generator=g) + 0.3).double()
    own = torch.arange(5) < torch.tensor([[n] for n, _ in sizes])
    weights = (weights * own).requires_grad_()
    shares = weights / weights.sum(-1, keepdim=True)
    given_shares = shares if any(p.marginals == "given" for p in phases) else None
    offsets = torch.tensor([0, 7, 27, 28])
    ragged = km.Ragged(torch.zeros(4, dtype=torch.int64), offsets, torch.tensor([n for n, _ in sizes]))
    options: dict[str, Any] = {"scale": torch.tensor([4.0]).double()}
    with km.use_backend(backend):
        z = km.ops.program(
            query[:0], torch.zeros(0, dtype=torch.int64), query, phases, n_way=5, start=start, ragged=ragged,
            proportions=given_shares, **options,
        )  # fmt: skip
        leaves = [start, *([weights] if given_shares is not None else [])]
        got = torch.autograd.grad(z.where(z.isfinite(), 0).square().sum(), leaves, retain_graph=True)
        total: Any = 0
        for t, (rows, (n, _)) in enumerate(zip(query.split([q for _, q in sizes]), sizes, strict=True)):
            one = km.ops.program(
                rows[None, :0], torch.zeros(1, 0, dtype=torch.int64), rows[None], phases, n_way=n,
                start=start[t, None, :n], proportions=None if given_shares is None else shares[t, None, :n], **options,
            )  # fmt: skip
            assert_close([z[offsets[t] : offsets[t + 1], :n]], [one[0]], 1e-11)
            total = total + one.square().sum()
        assert_close(list(got), list(torch.autograd.grad(total, leaves)), 1e-9)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"proportions": torch.tensor([[0.5, 0.4, 0.0], [0.2, 0.3, 0.5]])}, "task 0: expected numbers from 0 that sum"),
    ({"proportions": torch.tensor([[0.5, 0.4, 0.1], [1.2, 0.3, -0.5]])}, "task 1: expected numbers from 0 that sum"),
    ({"proportions": torch.full((2, 3), float("nan"))}, "task 0: expected numbers from 0"),
    ({"proportions": torch.ones(3) / 3}, r"proportions: expected shape \[T, N\] = \[2, 3\], got \[3\]"),
    ({"proportions": None}, "proportions: phases with marginals='given' need them"),
    ({"phases": [Phase("entropy", 1, 0.1)]}, "proportions: there is no phase with marginals='given'"),
    ({"bag_offsets": torch.tensor([0, 4, 9])}, r"proportions: expected shape \[T, B, N\] = \[2, 2, 3\]"),
    ({"bag_offsets": torch.tensor([0.0, 9.0])}, "bag_offsets: expected int64"),
    ({"bag_offsets": torch.zeros(3, 2, dtype=torch.int64)}, r"bag_offsets: expected shape \[T, B \+ 1\] with T=2"),
    ({"proportions": None, "phases": [Phase("entropy", 1, 0.1)], "bag_offsets": torch.tensor([0, 9])},
     "bag_offsets: there is no phase with marginals"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    options: dict[str, Any] = {"phases": PROGRAMS["assignment"], "proportions": torch.full((2, 3), 1 / 3)} | change
    phases = options.pop("phases")
    query, nothing = torch.randn(2, 9, 6), torch.zeros(2, 0, dtype=torch.int64)
    with pytest.raises((ValueError, TypeError), match=message):
        km.ops.program(query[:, :0], nothing, query, phases, n_way=3, start=torch.ones(2, 3, 6),
                       scale=torch.ones(1), **options)  # fmt: skip


@needs_kernel
@pytest.mark.parametrize("offsets", [[0, 5, 8], [0, 10, 9], [1, 5, 9]])
def test_bags_that_are_not_all_query_rows(offsets: list[int]) -> None:
    query, nothing = torch.randn(2, 9, 6), torch.zeros(2, 0, dtype=torch.int64)
    with pytest.raises(ValueError, match="bag_offsets: task 0: expected numbers that rise from 0 to its 9 query rows"):
        km.ops.program(query[:, :0], nothing, query, [Phase("assignment", 1, 0.1)], n_way=3,
                       start=torch.ones(2, 3, 6), scale=torch.ones(1), bag_offsets=torch.tensor(offsets))  # fmt: skip


BAD_PHASES: list[tuple[Any, str]] = [
    (lambda: Phase("assignment", 1, 0.1, marginals="none"), "marginals: assignment takes uniform, given"),
    (lambda: Phase("entropy", 1, 0.1, marginals="uniform"), "marginals: entropy takes none"),
    (lambda: Phase("assignment", 1, 0.1, relax=0.0), "relax: expected more than 0 and at most 1"),
    (lambda: Phase("assignment", 1, 0.1, relax="1"), "relax: expected a float"),  # type: ignore[arg-type]
    (lambda: Phase("proportions", 1, 0.1, relax=0.5), "relax: there is no constraint of proportions"),
    (lambda: Phase("soft_assignment", 1, 0.1, relax=0.5), "relax: there is no constraint of soft_assignment"),
    (lambda: Phase("assignment", 1, 0.1, rows="support"), "rows: assignment is for query rows"),
]


@pytest.mark.parametrize(("make", "message"), BAD_PHASES)
def test_bad_phases(make: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        make()
