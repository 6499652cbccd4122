"""Program, ANIL and RidgeHead as modules: what they learn, how they are called, what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from episodes import assert_close, draw
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

import kernelmeta as km
from kernelmeta.nn import Phase

EPISODE = draw()
ARGUMENTS = (EPISODE.support, EPISODE.labels, EPISODE.query)


def gradients(head: torch.nn.Module, logits: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*head.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(logits.square().sum(), parameters), strict=True))


def test_sib_is_a_program() -> None:
    sib = km.nn.SIB(3, 13, steps=2, inner_lr=0.1).double()
    program = km.nn.Program(3, 13, [Phase("synthetic_gradient", 2, 0.1)]).double()
    program.load_state_dict(sib.state_dict())
    got, want = program(*ARGUMENTS, return_weights=True), sib(*ARGUMENTS, return_weights=True)
    assert_close([got[0], got[1].weight], [want[0], want[1].weight], 1e-11)
    ours, theirs = gradients(program, got[0]), gradients(sib, want[0])
    assert ours.keys() == theirs.keys()
    assert_close(ours.values(), theirs.values(), 1e-10)


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("learn_rates", [False, True])
def test_anil_step_by_step(first_order: bool, learn_rates: bool) -> None:
    head = km.nn.ANIL(3, 13, 3, 0.2, first_order, learn_rates).double()
    if learn_rates:
        with torch.no_grad():
            head.rates[0].copy_(torch.tensor([0.1, 0.3, 0.2]))
    rates: Any = head.rates[0] if learn_rates else [0.2] * 3
    tasks = []
    for x, y, q in zip(*ARGUMENTS, strict=True):
        weight, bias = head.weight, head.bias
        for rate in rates:
            loss = cross_entropy(x @ weight.T + bias, y)
            steps = torch.autograd.grad(loss, [weight, bias], create_graph=not first_order)
            weight, bias = weight - rate * steps[0], bias - rate * steps[1]
        tasks.append(q @ weight.T + bias)
    got, want = head(*ARGUMENTS), torch.stack(tasks)
    assert_close([got], [want], 1e-12)
    ours = gradients(head, got)
    assert list(ours) == ["weight", "bias", *(["rates.0"] if learn_rates else [])]
    assert_close(ours.values(), gradients(head, want).values(), 1e-11)


def test_ridge_head_is_ridge_regression() -> None:
    head = km.nn.RidgeHead(3, 13, regularization=0.3, scale=2.0).double()
    x, y = EPISODE.support, one_hot(EPISODE.labels, 3).double()
    system = x.mT @ x + head.log_regularization.exp() * torch.eye(13).double()
    want = 2.0 * EPISODE.query @ torch.linalg.solve(system, x.mT @ y)
    got = head(*ARGUMENTS)
    assert_close([got], [want], 1e-11)
    assert_close(
        list(gradients(head, got).values())[:1], torch.autograd.grad(want.square().sum(), head.log_regularization), 1e-9
    )


def test_parameters_are_what_the_phases_need() -> None:
    def names(*phases: Phase, **options: Any) -> set[str]:
        return {name.split(".")[0] for name, _ in km.nn.Program(3, 13, phases, **options).named_parameters()}

    assert names(Phase("cross_entropy", 1, 0.1)) == {"weight", "scale", "bias"}
    assert names(Phase("cross_entropy", 1, 0.1), classifier="linear", start="zero") == {"bias"}
    assert names(Phase("squared_error", 1, 0.1)) == {"weight", "scale", "bias", "target_scale"}
    assert names(Phase("synthetic_gradient", 1, 0.1)) == {"weight", "scale", "bias", "mlp"}
    assert names(Phase("entropy", 1, 0.1, learn_rates=True)) == {"weight", "scale", "bias", "rates"}
    assert km.nn.Program(3, 13, []).weight.shape == (13,)
    assert km.nn.Program(3, 13, [], start="learned").weight.shape == (3, 13)


def test_rates_of_some_phases_are_learned() -> None:
    phases = [Phase("cross_entropy", 2, 0.1), Phase("entropy", 1, 0.3, learn_rates=True), Phase("hinge", 1, 0.2)]
    head = km.nn.Program(3, 13, phases).double()
    rates = head.step_rates()
    assert rates is not None and rates.tolist() == pytest.approx([0.1, 0.1, 0.3, 0.2], abs=1e-7)
    fixed = km.nn.Program(3, 13, [Phase(p.oracle, p.steps, p.lr) for p in phases]).double()
    assert_close([head(*ARGUMENTS)], [fixed(*ARGUMENTS)], 1e-6)
    assert gradients(head, head(*ARGUMENTS))["rates.0"].abs().min() > 0


HEADS: dict[str, Any] = {
    "anil": lambda: km.nn.ANIL(3, 13, 2, 0.1),
    "ridge": lambda: km.nn.RidgeHead(3),
    "program": lambda: km.nn.Program(3, 13, [Phase("cross_entropy", 2, 0.1), Phase("synthetic_gradient", 1, 0.1)]),
}


@pytest.mark.parametrize("name", HEADS)
def test_rows_of_a_bank(name: str) -> None:
    head = HEADS[name]().double()
    bank = torch.randn(40, 13).double()
    support, query = torch.randint(40, (2, 7)), torch.randint(40, (2, 11))
    want = head(bank[support], EPISODE.labels, bank[query])
    assert torch.equal(head.from_bank(bank, support, EPISODE.labels, query), want)
    ragged = km.Ragged(torch.arange(3) * 7, torch.arange(3) * 11)
    flat = head.from_bank(bank, support.flatten(), EPISODE.labels.flatten(), query.flatten(), ragged=ragged)
    # ANIL has an op of its own for tasks of equal size.
    assert_close([flat], [want.flatten(0, 1)], 1e-12)
    rows = (bank[support.flatten()], EPISODE.labels.flatten(), bank[query.flatten()])
    assert torch.equal(head(*rows, ragged=ragged), flat)


@pytest.mark.parametrize("name", HEADS)
def test_compiles_and_trains(name: str) -> None:
    head = HEADS[name]()
    support, query = EPISODE.support.float(), EPISODE.query.float()
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    got, want = compiled(support, EPISODE.labels, query), head(support, EPISODE.labels, query)
    assert_close([got], [want], 1e-6)
    assert_close(gradients(head, got).values(), gradients(head, want).values(), 1e-4)


BAD: list[tuple[Any, str]] = [
    (lambda: Phase("hinges", 1, 0.1), "oracle: expected one of cross_entropy"),
    (lambda: Phase("entropy", -1, 0.1), "steps: expected 0 or more, got -1"),
    (lambda: Phase("entropy", 1.5, 0.1), "steps: expected an int"),  # type: ignore[arg-type]
    (lambda: Phase("entropy", 1, "0.1"), "lr: expected a float"),  # type: ignore[arg-type]
    (lambda: Phase("entropy", 1, float("nan")), "lr: expected a finite number"),
    (lambda: Phase("entropy", 1, 0.1, rows="all"), "rows: expected support, query or None"),
    (lambda: Phase("cross_entropy", 1, 0.1, rows="query"), "cross_entropy needs labels, and the query rows have none"),
    (lambda: Phase("squared_error", 1, 0.1, rows="query"), "squared_error needs labels, and the query rows have none"),
    (lambda: Phase("hinge", 1, 0.1, rows="query"), "hinge needs labels, and the query rows have none"),
    (lambda: Phase("entropy", 2, [0.1, 0.1]), "lr: expected a float, got list"),  # type: ignore[arg-type]
    (lambda: Phase("soft_assignment", 1, 0.1, rows="support"), "soft_assignment is for query rows"),
    (lambda: km.nn.Program(3, 13, ["entropy"]), "phases: expected kernelmeta.nn.Phase"),  # type: ignore[list-item]
    (lambda: km.nn.Program(3, 13, [], classifier="products"), "classifier: expected one of cosine, linear"),
    (lambda: km.nn.Program(3, 13, [], start="random"), "start: expected one of class_means, learned, zero, given"),
    (lambda: km.nn.Program(3, 13, [], start="zero"), "start: 'zero' has no direction for a cosine"),
    (lambda: km.nn.Program(3, 13, [Phase("soft_assignment", 1, 1.0)], classifier="linear"), "needs a cosine"),
    (lambda: km.nn.Program(3, 13, [], norm_stats="batch"), "norm_stats: expected one of task, running"),
    (lambda: km.nn.Program(3, 13, [], reduction="median"), "reduction: expected one of mean, sum"),
    (lambda: km.nn.Program(3, 13, [], scale=0.0), "scale: expected a positive number, got 0.0"),
    (lambda: km.nn.Program(0, 13, []), "n_way and n_features: expected at least 1"),
    (lambda: km.nn.RidgeHead(3, regularization=0.0), "regularization: expected a positive number"),
]  # fmt: skip


@pytest.mark.parametrize(("build", "message"), BAD)
def test_bad_programs_are_refused_where_they_are_built(build: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        build()


def test_a_phase_without_rows_is_refused() -> None:
    head = km.nn.ANIL(3, 13)
    with pytest.raises(ValueError, match="0 support rows"):
        head(torch.zeros(2, 0, 13), torch.zeros(2, 0, dtype=torch.int64), torch.zeros(2, 5, 13))
    with pytest.raises(
        ValueError, match=r"query: expected at least one row|expected at least one row each, got 7 and 0"
    ):
        head(EPISODE.support.float(), EPISODE.labels, torch.zeros(2, 0, 13))


def test_more_ways_than_rows_are_refused() -> None:
    head = km.nn.ANIL(8, 13)
    with pytest.raises(ValueError, match="task 0 has 8 ways and 7 support rows"):
        head(EPISODE.support.float(), EPISODE.labels, EPISODE.query.float())


def test_a_phase_without_steps_does_nothing() -> None:
    head = km.nn.Program(3, 13, [Phase("synthetic_gradient", 0, 0.1)]).double()
    prototypes = km.nn.Program(3, 13, []).double()
    episode = (EPISODE.support, EPISODE.labels, EPISODE.query)
    assert torch.equal(head(*episode), prototypes(*episode))


def test_rates_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rates: expected shape \[K\], one for each step of all phases, = \[2\]"):
        km.ops.program(
            *ARGUMENTS, [Phase("cross_entropy", 2, 0.1)], n_way=3, rates=torch.ones(3).double(),
            scale=torch.ones(1).double(),
        )  # fmt: skip


# ---- a start from outside


def test_a_program_starts_from_what_it_is_given() -> None:
    program = km.nn.Program(3, 13, [Phase("soft_assignment", 2, 1.0)], start="given").double()
    assert {name for name, _ in program.named_parameters()} == {"scale", "bias"}
    query, start = torch.randn(2, 9, 13).double(), torch.randn(3, 13).double().requires_grad_()
    z = program(None, None, query, start=start)
    each = torch.stack([start, start])
    nothing = query[:, :0], torch.zeros(2, 0, dtype=torch.int64)
    assert torch.equal(z, program(*nothing, query, start=each))
    assert torch.equal(z, km.ops.program(*nothing, query, program.phases, n_way=3, start=each, scale=program.scale))
    (gradient,) = torch.autograd.grad(z.square().sum(), start)
    assert gradient.abs().min() > 0
    ragged = km.Ragged(torch.tensor([0, 0, 0]), torch.tensor([0, 9, 18]))
    rows = program(None, None, query.flatten(0, 1), ragged=ragged, start=start)
    assert torch.equal(rows, z.flatten(0, 1))


def test_where_a_given_start_is_missing_or_too_much() -> None:
    query, start = torch.randn(2, 9, 13), torch.randn(3, 13)
    with pytest.raises(ValueError, match=r"start: .* expected a tensor \[T, N, D\] or \[N, D\], got None"):
        km.nn.Program(3, 13, [], start="given")(None, None, query)
    with pytest.raises(ValueError, match="start: expected None, since the program starts from 'class_means'"):
        km.nn.Program(3, 13, [])(query, torch.zeros(2, 9, dtype=torch.int64), query, start=start)
    with pytest.raises(TypeError, match="support: expected a tensor, got NoneType"):
        km.nn.Program(3, 13, [])(None, None, query)
