"""Learners that transform and centre their features do to transformed rows what plain ones do."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import kernelmeta as km

N, D = 4, 12
Make = Callable[..., Any]
LEARNERS: dict[str, Make] = {
    "prototypes": km.nn.Prototypes,
    "soft_kmeans": km.nn.SoftKMeans,
    "ridge": km.nn.RidgeHead,
    "sib": km.nn.SIB,
    "equivariant": km.nn.EquivariantSIB,
    "anil": km.nn.ANIL,
    "lqf": km.nn.LQF,
    "program": lambda *sizes, **features: km.nn.Program(
        *sizes, [km.nn.Phase("soft_assignment", 2, 1.0), km.nn.Phase("cross_entropy", 2, 0.1)], **features
    ),
}
FEATURES = [("power:0.5", "none"), ("none", "task"), ("power:0.3", "train"), ("power:0.5", "task")]
every_learner = pytest.mark.parametrize("make", LEARNERS.values(), ids=LEARNERS)
every_feature = pytest.mark.parametrize(("transform", "center"), FEATURES)


def tasks(T: int = 3, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(N).repeat(2).expand(T, -1).contiguous()
    support, query = (torch.randn(T, n, D, dtype=torch.float64, generator=g).to(dtype) for n in (2 * N, 7))
    return support, labels, query


def pair(make: Make, transform: str, center: str, dtype: torch.dtype = torch.float64) -> tuple[Any, Any, km.Transform]:
    """A learner that transforms, a plain one with the same parameters, and the transform."""
    torch.manual_seed(1)
    plain = make(N, D).to(dtype)
    own = make(N, D, transform=transform, center=center).to(dtype)
    own.load_state_dict(plain.state_dict(), strict=False)
    training = torch.randn(30, D, dtype=dtype)
    own.center_on(training)
    return own, plain, km.Transform.of_training(training, transform, center)


def gradients(logits: Tensor, head: torch.nn.Module, *rows: Tensor) -> list[Tensor]:
    parameters = [p for p in head.parameters() if p.requires_grad]
    of = torch.arange(logits.numel(), dtype=logits.dtype).view_as(logits).cos()
    found = torch.autograd.grad((logits * of).sum(), [*rows, *parameters], allow_unused=True)
    return [torch.zeros(1, dtype=logits.dtype) if g is None else g for g in found]


@every_feature
@every_learner
def test_logits_and_gradients_are_those_of_transformed_rows(make: Make, transform: str, center: str) -> None:
    own, plain, of_rows = pair(make, transform, center)
    support, labels, query = tasks()
    support.requires_grad_()
    query.requires_grad_()
    rows = of_rows(support, query)
    found, expected = own(support, labels, query), plain(rows[0], labels, rows[1])
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)
    for a, b in zip(gradients(found, own, support, query), gradients(expected, plain, support, query), strict=True):
        torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-8)


@every_feature
@every_learner
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_features_of_a_narrower_type_are_transformed_in_float32(
    make: Make, transform: str, center: str, stored: torch.dtype
) -> None:
    own, _, _ = pair(make, transform, center, torch.float32)
    support, labels, query = tasks(dtype=stored)
    found, want = own(support, labels, query), own(support.float(), labels, query.float())
    assert found.dtype is torch.float32
    torch.testing.assert_close(found, want, atol=1e-5 * want.abs().max().item(), rtol=0)


@every_feature
@every_learner
def test_rows_of_a_bank_and_tasks_of_unequal_size(make: Make, transform: str, center: str) -> None:
    own, _, _ = pair(make, transform, center)
    support, labels, query = tasks()
    bank = torch.cat([support.flatten(0, 1), query.flatten(0, 1)])
    of_support = torch.arange(3 * 2 * N).view(3, -1)
    of_query = 3 * 2 * N + torch.arange(3 * 7).view(3, -1)
    together = own(support, labels, query)
    torch.testing.assert_close(own.from_bank(bank, of_support, labels, of_query), together, atol=1e-10, rtol=1e-10)
    if not own.takes_ragged:
        return
    # The first task without its last two support rows, the second without its last three query rows.
    sizes, queries = (2 * N - 2, 2 * N), (7, 4)
    ragged = km.Ragged(torch.tensor([0, sizes[0], sum(sizes)]), torch.tensor([0, 7, 11]))
    rows = [torch.cat([values[t, : n[t]] for t in (0, 1)]) for values, n in ((support, sizes), (query, queries))]
    known = torch.cat([labels[t, : sizes[t]] for t in (0, 1)])
    found = own(rows[0], known, rows[1], ragged=ragged)
    alone = [
        own(support[t, None, : sizes[t]], labels[t, None, : sizes[t]], query[t, None, : queries[t]]) for t in (0, 1)
    ]
    torch.testing.assert_close(found, torch.cat([z[0] for z in alone]), atol=1e-10, rtol=1e-10)


@every_feature
@pytest.mark.parametrize("name", ["sib", "anil"])
def test_a_step_at_once_is_that_of_autograd(name: str, transform: str, center: str) -> None:
    own, _, _ = pair(LEARNERS[name], transform, center)
    by_autograd = copy.deepcopy(own)
    support, labels, query = tasks()
    answers = torch.arange(7).remainder(N).expand(3, -1).contiguous()
    torch.nn.functional.cross_entropy(by_autograd(support, labels, query).flatten(0, 1), answers.flatten()).backward()
    own.gradients(support, labels, query, answers, loss_scale=1)
    for a, b in zip(own.parameters(), by_autograd.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-10, rtol=1e-8)


@every_feature
@every_learner
def test_saved_and_adapted_as_they_are(make: Make, transform: str, center: str, tmp_path: Any) -> None:
    own, _, _ = pair(make, transform, center, torch.float32)
    support, labels, query = tasks(dtype=torch.float32)
    own.save_pretrained(tmp_path)
    loaded = type(own).from_pretrained(tmp_path)
    expected = own.eval()(support, labels, query)
    assert torch.equal(loaded(support, labels, query), expected)
    assert loaded.transductive == own.transductive and (center != "task" or own.transductive)
    if isinstance(own, km.nn.LQF):  # which has no weight a class
        return
    classifier = own.adapt(support, labels, query).module(1)
    torch.testing.assert_close(classifier(query[1]), expected[1], atol=1e-4, rtol=1e-4)


def test_exported_with_what_it_does_to_rows(tmp_path: Any) -> None:
    own, _, _ = pair(km.nn.EquivariantSIB, "power:0.5", "task", torch.float32)
    support, labels, query = tasks(dtype=torch.float32)
    own.adapt(support, labels, query).export(tmp_path / "task.pt2", task=2)
    program = torch.export.load(tmp_path / "task.pt2").module()
    torch.testing.assert_close(program(query[2]), own(support, labels, query)[2], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", [name for name in LEARNERS if name != "lqf"])  # which solves all tasks in one call
def test_a_task_is_the_same_whatever_else_is_in_its_batch(name: str) -> None:
    own, _, _ = pair(LEARNERS[name], "power:0.5", "task", torch.float32)
    support, labels, query = tasks(dtype=torch.float32)
    together = own(support, labels, query)
    for t in range(3):
        assert torch.equal(own(support[t, None], labels[t, None], query[t, None])[0], together[t])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_any_type_of_feature(dtype: torch.dtype) -> None:
    own, _, _ = pair(km.nn.EquivariantSIB, "power:0.5", "task", torch.float32)
    support, labels, query = tasks(dtype=dtype)
    found = own(support, labels, query)
    wide = own(support.double(), labels, query.double())
    torch.testing.assert_close(found.double(), wide, atol=1e-3, rtol=1e-3)


@every_feature
def test_compiled(transform: str, center: str) -> None:
    own, _, _ = pair(km.nn.SoftKMeans, transform, center, torch.float32)
    rows = tasks(dtype=torch.float32)
    compiled = torch.compile(own, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*rows), own(*rows), atol=1e-5, rtol=1e-5)


def test_the_mean_of_training_rows_must_be_given() -> None:
    head = km.nn.Prototypes(N, D, center="train")
    support, labels, query = tasks(dtype=torch.float32)
    with pytest.raises(ValueError, match="center: the mean of the training rows is not known yet"):
        head(support, labels, query)
    with pytest.raises(ValueError, match="rows: expected"):
        head.center_on(torch.randn(3, D + 1))
    head.center_on(torch.randn(3, D))
    assert head(support, labels, query).isfinite().all()
    with pytest.raises(ValueError, match="center: 'train' needs n_features"):
        km.nn.SoftKMeans(N, center="train")
    with pytest.raises(ValueError, match="transform: expected"):
        km.nn.SIB(N, D, transform="sqrt")
    with pytest.raises(ValueError, match="center: expected one of"):
        km.nn.ANIL(N, D, center="all")


def test_rows_that_do_not_fit_are_named() -> None:
    head = km.nn.EquivariantSIB(N, D, center="task")
    support, labels, query = tasks(dtype=torch.float32)
    with pytest.raises(ValueError, match="query"):
        head(support, labels, query[0])
    with pytest.raises(ValueError, match="support: index 99"):
        head.from_bank(query[0], torch.full((1, 2 * N), 99), labels[:1], torch.zeros(1, 3, dtype=torch.int64))


@pytest.mark.parametrize("name", ["prototypes", "soft_kmeans", "ridge", "equivariant"])
def test_the_same_parameters_for_another_number_of_classes(name: str) -> None:
    own, _, _ = pair(LEARNERS[name], "power:0.5", "task", torch.float32)
    fewer = own.for_ways(2)
    assert fewer.n_way == 2 and own.n_way == N and own.for_ways(N) is own
    support, labels, query = (values[:1] for values in tasks(dtype=torch.float32))
    of_two = labels[0] < 2
    rows = (support[:, of_two], labels[:, of_two], query)
    assert fewer(*rows).shape == (1, 7, 2)
    for p in own.parameters():  # which both have
        p.data.mul_(1.5)
    torch.manual_seed(1)
    anew = LEARNERS[name](2, D, transform="power:0.5", center="task")
    anew.load_state_dict(own.state_dict())
    assert torch.equal(fewer(*rows), anew(*rows))


@pytest.mark.parametrize("name", ["sib", "anil", "lqf"])
def test_parameters_of_a_fixed_number_of_classes(name: str) -> None:
    head = LEARNERS[name](N, D)
    assert not head.takes_any_ways
    with pytest.raises(ValueError, match=f"n_way: {type(head).__name__} has parameters for {N} classes, not for 3"):
        head.for_ways(3)
