"""The transductive methods, many tasks at once, against their papers' formulas one task at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import published_methods as published
import pytest
import torch
from episodes import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize, one_hot

import kernelmeta as km
from kernelmeta import transductive
from kernelmeta.transductive import transport
from kernelmeta.transforms import Transform

METHODS = {
    "pt_map": transductive.pt_map,
    "sinkhorn_kmeans": transductive.sinkhorn_kmeans,
    "tim": transductive.tim,
    "alpha_tim": transductive.alpha_tim,
    "laplacian_shot": transductive.laplacian_shot,
    "bd_cspn": transductive.bd_cspn,
    "logistic_regression": transductive.logistic_regression,
}
# As few steps as show what there is to see.
SHORT: dict[str, dict[str, Any]] = {
    "pt_map": {"steps": 2}, "sinkhorn_kmeans": {"steps": 2}, "tim": {"steps": 10}, "alpha_tim": {"steps": 10},
}  # fmt: skip
TOLD = ("pt_map", "sinkhorn_kmeans", "tim")


def episodes(
    T: int, N: int, shot: int, Q: int, D: int = 16, seed: int = 0, uneven: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gaussian classes of length 1: support [T, N shot, D], labels, query [T, Q, D], their labels."""
    g = torch.Generator().manual_seed(seed)
    centers = torch.randn(T, N, D, generator=g, dtype=torch.float64) + 0.5
    labels = torch.arange(N).repeat_interleave(shot).expand(T, -1)
    shares = torch.rand(T, N, generator=g) ** (2 if uneven else 0) + 1e-3
    answers = (
        torch.multinomial(shares, Q, replacement=True, generator=g) if uneven else (torch.arange(Q) % N).expand(T, -1)
    )
    rows = [
        torch.gather(centers, 1, own[..., None].expand(-1, -1, D))
        + 0.8 * torch.randn(*own.shape, D, generator=g, dtype=torch.float64)
        for own in (labels, answers)
    ]
    return normalize(rows[0], dim=-1), labels, normalize(rows[1], dim=-1), answers


def shares_of(answers: Tensor, N: int) -> Tensor:
    return one_hot(answers, N).double().mean(1)


# 100 episodes each, in settings that differ.
CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("pt_map", {"steps": 5}, {"steps": 5}),
    ("sinkhorn_kmeans", {"steps": 4, "scale": 5.0}, {"steps": 4, "scale": 5.0}),
    ("tim", {"steps": 50, "rate": 3e-3}, {"steps": 50, "rate": 3e-3}),
    (
        "tim",
        {"steps": 40, "rate": 1e-2, "support_weight": 0.3, "marginal_weight": 10.0, "conditional_weight": 0.1},
        {"steps": 40, "rate": 1e-2, "weights": (0.3, 10.0, 0.1)},
    ),
    (
        "tim",
        {"steps": 40, "rate": 1e-2, "classifier": "cosine", "temperature": 10.0},
        {"steps": 40, "rate": 1e-2, "classifier": "cosine", "temperature": 10.0},
    ),
    ("alpha_tim", {"steps": 40, "rate": 3e-3, "alpha": 2.0}, {"steps": 40, "rate": 3e-3, "alpha": 2.0}),
    ("alpha_tim", {"steps": 10, "rate": 1e-2, "alpha": 7.0}, {"steps": 10, "rate": 1e-2, "alpha": 7.0}),
    ("laplacian_shot", {}, {}),
    ("laplacian_shot", {"rectify": False, "neighbours": 5, "strength": 2.0},
     {"rectify": False, "neighbours": 5, "strength": 2.0}),
    ("bd_cspn", {}, {}),
    ("bd_cspn", {"scale": 1.0}, {"scale": 1.0}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "own", "theirs"), CASES)
def test_100_episodes_as_published(name: str, own: dict[str, Any], theirs: dict[str, Any]) -> None:
    alone: Callable[..., Tensor] = getattr(published, name.removeprefix("alpha_"))
    for seed, (T, shot, uneven) in enumerate([(50, 1, False), (50, 5, True)]):
        support, labels, query, _ = episodes(T, 5, shot, 30, seed=seed, uneven=uneven)
        found = METHODS[name](support, labels, query, n_way=5, **own)
        expected = torch.stack([alone(*task, 5, **theirs) for task in zip(support, labels, query, strict=True)])
        # Scores that are logarithms, or logits up to a number for each row.
        assert_close([found.log_softmax(-1)], [expected.log_softmax(-1)], 1e-6)


@pytest.mark.parametrize("name", TOLD)
def test_known_proportions_as_published(name: str) -> None:
    support, labels, query, answers = episodes(20, 4, 2, 25, seed=3, uneven=True)
    shares = shares_of(answers, 4)
    assert (shares == 0).any(), "no class without a row among these: draw others"
    found = METHODS[name](support, labels, query, n_way=4, proportions=shares, **SHORT.get(name, {}))
    for t, task in enumerate(zip(support, labels, query, strict=True)):
        expected = getattr(published, name)(*task, 4, proportions=shares[t], **SHORT.get(name, {}))
        # A class of proportion 0 gets nothing: minus infinity.
        assert_close([found[t].softmax(-1)], [expected.softmax(-1)], 1e-6)


def test_known_proportions_help() -> None:
    support, labels, query, answers = episodes(60, 5, 1, 60, D=8, seed=1, uneven=True)
    for name in TOLD:
        options = {"steps": 100, "rate": 1e-2} if name == "tim" else {}
        guess, told = (
            METHODS[name](support, labels, query, n_way=5, proportions=p, **options).argmax(-1)
            for p in (None, shares_of(answers, 5))
        )
        assert (told == answers).double().mean() > (guess == answers).double().mean() + 0.02


@pytest.mark.parametrize("name", METHODS)
@given(data=st.data())
@settings(max_examples=12, deadline=None)
def test_any_shapes(name: str, data: st.DataObject) -> None:
    T, N = data.draw(st.integers(0, 3), "T"), data.draw(st.integers(2, 6), "N")
    shot, Q, D = (
        data.draw(st.integers(1, 3), "shot"),
        data.draw(st.integers(1, 9), "Q"),
        data.draw(st.integers(1, 7), "D"),
    )
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]), "dtype")
    support, labels, query, _ = episodes(T, N, shot, Q, D, seed=data.draw(st.integers(0, 99)))
    # Support rows in any order.
    order = torch.randperm(N * shot, generator=torch.Generator().manual_seed(T))
    support, labels = support[:, order].to(dtype), labels[:, order]
    found = METHODS[name](support, labels, query.to(dtype), n_way=N, **SHORT.get(name, {}))
    assert found.shape == (T, Q, N) and found.dtype == dtype
    assert found.isfinite().all()
    # Each task by itself says the same.
    for t in range(T):
        alone = METHODS[name](
            support[t, None], labels[t, None], query[t, None].to(dtype), n_way=N, **SHORT.get(name, {})
        )
        assert_close([found[t]], [alone[0]], 1e-3 if dtype == torch.float32 else 1e-9)


@pytest.mark.parametrize("name", METHODS)
def test_a_class_by_another_number(name: str) -> None:
    support, labels, query, _ = episodes(3, 4, 2, 12)
    order = torch.tensor([2, 0, 3, 1])
    found = METHODS[name](support, labels, query, n_way=4, **SHORT.get(name, {}))
    renamed = METHODS[name](support, order[labels], query, n_way=4, **SHORT.get(name, {}))
    # (L-BFGS stops where it stands)
    assert_close([renamed[..., order]], [found], 1e-2 if name == "logistic_regression" else 1e-7)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("of", ["support", "query"])
@pytest.mark.parametrize("name", METHODS)
def test_nan_stays_in_its_task(name: str, of: str, value: float) -> None:
    support, labels, query, _ = episodes(3, 3, 2, 8)
    clean = METHODS[name](support, labels, query, n_way=3, **SHORT.get(name, {}))
    {"support": support, "query": query}[of][1, 0, 0] = value
    found = METHODS[name](support, labels, query, n_way=3, **SHORT.get(name, {}))
    assert_close([found[[0, 2]]], [clean[[0, 2]]], 1e-12)
    assert not found[1].isfinite().all()


@pytest.mark.parametrize("name", METHODS)
def test_tasks_of_unequal_size(name: str) -> None:
    tasks = [episodes(1, *sizes, seed=i) for i, sizes in enumerate([(4, 1, 7), (2, 3, 1), (3, 2, 5)])]
    offsets = [torch.tensor([0, *(task[i].shape[1] for task in tasks)]).cumsum(0) for i in (0, 2)]
    ways = torch.tensor([4, 2, 3])
    ragged = km.Ragged(offsets[0], offsets[1], ways)
    flat = [torch.cat([task[i][0] for task in tasks]) for i in range(3)]
    options = dict(SHORT.get(name, {}))
    if name in TOLD:
        options["proportions"] = torch.stack(
            [torch.cat([shares_of(t[3], n)[0], torch.zeros(4 - n)]) for t, n in zip(tasks, ways.tolist(), strict=True)]
        )
    found = METHODS[name](*flat, n_way=4, ragged=ragged, **options)
    for t, (task, n) in enumerate(zip(tasks, ways.tolist(), strict=True)):
        own = dict(options)
        if name in TOLD:
            own["proportions"] = options["proportions"][t, None, :n]
        alone = METHODS[name](*task[:3], n_way=n, **own)
        rows = slice(*offsets[1][t : t + 2].tolist())
        assert torch.equal(found[rows, :n], alone[0])
        assert (found[rows, n:] == -math.inf).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": torch.zeros(2, 5, 9)}, ValueError, "query"),
        ({"support_labels": torch.zeros(2, 6, dtype=torch.int64)}, ValueError, "task 0 has no row of class 1"),
        ({"support_labels": torch.full((2, 6), 7)}, ValueError, "label 7"),
        ({"support": torch.zeros(2, 6, 16, dtype=torch.int64)}, TypeError, "support: expected float32"),
        ({"n_way": 0}, ValueError, "n_way: expected an int of at least 1"),
    ],
)
@pytest.mark.parametrize("name", METHODS)
def test_what_does_not_fit_is_named(name: str, change: dict[str, Any], error: type[Exception], message: str) -> None:
    support, labels, query, _ = episodes(2, 3, 2, 5)
    call = {"support": support, "support_labels": labels, "query": query, "n_way": 3} | change
    with pytest.raises(error, match=message):
        METHODS[name](**call)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("pt_map", {"steps": -1}, "steps: expected a finite number of at least 0, got -1"),
        ("pt_map", {"steps": 2.5}, "steps: expected an int, got 2.5"),
        ("pt_map", {"rate": math.nan}, "rate: expected a finite number"),
        ("pt_map", {"proportions": torch.full((2, 3), 0.5)}, "proportions: task 0 has .*sum to 1"),
        ("pt_map", {"proportions": torch.tensor([[1.0, 0, 0], [1.5, -0.5, 0]])}, "proportions: task 1 has"),
        ("tim", {"proportions": torch.full((2, 2), 0.5)}, r"proportions: expected shape \[T, N\] = \[2, 3\]"),
        ("tim", {"classifier": "linear"}, "classifier: expected one of euclidean, cosine"),
        ("tim", {"temperature": "a"}, "temperature: expected a number, got 'a'"),
        ("alpha_tim", {"alpha": 1}, "alpha: expected more than 1"),
        ("laplacian_shot", {"rectify": 1}, "rectify: expected True or False, got 1"),
        ("logistic_regression", {"C": 0}, "C: expected more than 0"),
    ],
)
def test_options_that_cannot_be(name: str, options: dict[str, Any], message: str) -> None:
    support, labels, query, _ = episodes(2, 3, 2, 5)
    with pytest.raises((ValueError, TypeError), match=message):
        METHODS[name](support, labels, query, n_way=3, **options)


def test_scikit_learn_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sklearn.linear_model", None)
    support, labels, query, _ = episodes(1, 3, 2, 5)
    with pytest.raises(ImportError, match=r"pip install 'kernelmeta\[sklearn\]'"):
        transductive.logistic_regression(support, labels, query, n_way=3)


def test_logistic_regression_is_at_its_optimum() -> None:
    support, labels, query, _ = episodes(2, 3, 4, 6)
    scores = transductive.logistic_regression(support, labels, support, n_way=3, C=2.0)
    # At the optimum the intercepts' gradient is 0, and the weights are C sum (y - p) x.
    residual = one_hot(labels, 3) - scores.exp()
    assert residual.sum(1).abs().max() < 1e-3
    weights = 2.0 * residual.mT @ support
    centred = scores - scores.mean(-1, keepdim=True)
    again = support @ weights.mT
    again = again - again.mean(-1, keepdim=True)
    offset = (centred - again).mean(1, keepdim=True)
    assert (centred - again - offset).abs().max() < 1e-2


# ---- transport


@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 12), st.integers(1, 6)), seed=st.integers(0, 99),
    sharp=st.sampled_from([0.1, 10.0, 3000.0]),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_the_plan_has_its_marginals(sizes: tuple[int, int, int], seed: int, sharp: float) -> None:
    T, Q, N = sizes
    g = torch.Generator().manual_seed(seed)
    logits = sharp * torch.rand(T, Q, N, generator=g, dtype=torch.float64)
    shares = torch.rand(T, N, generator=g, dtype=torch.float64) * (torch.rand(T, N, generator=g) < 0.7)
    shares[:, 0] += 1e-3
    shares = shares / shares.sum(-1, keepdim=True)
    plan = transport(logits, shares).exp()
    assert_close([plan.sum(1)], [Q * shares], 1e-9)
    assert (plan[(shares == 0)[:, None, :].expand_as(plan)] == 0).all()
    if sharp < 1:  # sharp plans take more steps than there are
        assert (plan.sum(-1) - 1).abs().max() < 1e-4
    assert_close([transport(logits, torch.full_like(shares, 1 / N))], [transport(logits)], 1e-9)


def test_tasks_stop_by_themselves() -> None:
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 12, 3, generator=g, dtype=torch.float64) * torch.tensor([0.1, 3.0, 1.0, 8.0])[:, None, None]
    together = transport(logits)
    for t in range(4):
        assert torch.equal(transport(logits[t, None])[0], together[t])
    logits[2, 3, 1] = math.nan
    assert torch.equal(transport(logits)[[0, 1, 3]], together[[0, 1, 3]])


def test_sharp_logits_do_not_underflow() -> None:
    logits = torch.tensor([[[0.0, -5000.0], [0.0, -4000.0], [0.0, -3000.0], [0.0, -9000.0]]])
    plan = transport(logits).exp()
    assert plan.isfinite().all()
    assert_close([plan.sum(1)], [torch.full((1, 2), 2.0)], 1e-3)


# ---- transforms


def test_a_transform_by_hand() -> None:
    support, _, query, _ = episodes(2, 3, 2, 5)
    rooted = [x.sign() * (x.abs() + 1e-6).sqrt() for x in (support, query)]
    found = Transform("power:0.5", "task")(support, query)
    for rows, got in zip(rooted, found, strict=True):
        unit = rows / rows.norm(dim=-1, keepdim=True)
        centred = unit - unit.mean(1, keepdim=True)
        assert_close([got], [centred / centred.norm(dim=-1, keepdim=True)], 1e-12)
    training = torch.randn(40, 16, dtype=torch.float64)
    found = Transform.of_training(training, "power:0.5", "train")(support, query)
    mean = (training.sign() * (training.abs() + 1e-6).sqrt()).mean(0)
    for rows, got in zip(rooted, found, strict=True):
        assert_close([got], [(rows - mean) / (rows - mean).norm(dim=-1, keepdim=True)], 1e-12)
    for rows, got in zip((support, query), Transform()(3 * support, 3 * query), strict=True):
        assert_close([got], [rows], 1e-12)


def test_a_transform_of_tasks_of_unequal_size() -> None:
    support, query = torch.randn(7, 4), torch.randn(5, 4)
    ragged = km.Ragged(torch.tensor([0, 3, 7]), torch.tensor([0, 1, 5]))
    for center in ("none", "task"):
        transform = Transform("power:0.3", center)
        found = transform(support, query, ragged)
        for s, q in ((slice(0, 3), slice(0, 1)), (slice(3, 7), slice(1, 5))):
            alone = transform(support[None, s], query[None, q])
            assert_close([found[0][s], found[1][q]], [alone[0][0], alone[1][0]], 1e-6)


def test_one_query_row_is_its_own_mean() -> None:
    found = Transform(center="task")(torch.randn(2, 3, 4), torch.randn(2, 1, 4))
    assert (found[1] == 0).all() and found[0].isfinite().all()
    empty = Transform("power:0.5", "task")(torch.zeros(0, 3, 4), torch.zeros(0, 2, 4))
    assert empty[0].shape == (0, 3, 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("power:2",), "transform: expected 'none' or 'power:P' with 0 < P <= 1, got 'power:2'"),
        (("sqrt",), "transform: expected"),
        ((0.5,), "transform: expected"),
        (("none", "all"), "center: expected one of none, task, train, got 'all'"),
        (("none", "train"), "center: 'train' needs the mean"),
    ],
)
def test_transforms_that_cannot_be(settings: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Transform(*settings)
