"""The paper's form and that with written-out steps, against the published numbers and each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from episodes import assert_close, draw, flat, relative_error, running_stats, shapes
from golden import load, part
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

import kernelmeta as km
from kernelmeta.mlp_parameters import MLPParameters
from kernelmeta.reference import class_means, explicit, sib_inner_loop

FORMS = pytest.mark.parametrize("form", [sib_inner_loop, explicit.sib_inner_loop], ids=["paper", "explicit"])
MLP_NAMES = [
    f"dni.{name}"
    for layer in ("layer1", "layer2")
    for name in (f"{layer}.0.weight", f"{layer}.0.bias", f"{layer}.2.weight", f"{layer}.2.bias")
] + ["dni.layer3.weight", "dni.layer3.bias"]
NORMS = [f"dni.layer{i}.2.running_{kind}" for i in (1, 2) for kind in ("mean", "var")]


def whole(form: Any, episode: Any, **options: Any) -> Any:
    support, labels, query, weight, scale, bias, mlp = episode
    theta0 = class_means(support, labels, mlp.bias3.shape[0], weight)
    return form(theta0, query, scale, bias, mlp, **options)


@FORMS
@pytest.mark.parametrize(
    ("name", "norm_stats"),
    [
        ("sib_5way1shot_paper", "task"),
        ("sib_5way5shot_strong", "task"),
        ("sib_5way5shot_strong", "batch"),
        ("sib_3way_batch_of_3", "batch"),
        ("sib_eval_running_stats", "running"),
    ],
)
def test_published_numbers(form: Any, name: str, norm_stats: str) -> None:
    golden = load(name)
    state = part(golden, "state.")
    names = ["wnLayerFavg.weight", "scale_cls", "bias", *MLP_NAMES]
    leaves = [golden[key].double().requires_grad_() for key in ("support", "query")]
    leaves += [state[key].requires_grad_() for key in names]
    support, query, weight, scale, bias, *mlp = leaves
    theta0 = class_means(support, golden["support_labels"], int(golden["n_way"]), weight)
    tracked = norm_stats != "running"
    logits, (theta, _), *stats = form(
        theta0, query, scale, bias, MLPParameters(*mlp),
        steps=int(golden["steps"]), inner_lr=float(golden["inner_lr"]), norm_stats=norm_stats,
        running_stats=torch.stack([state[key] for key in NORMS]).view(2, 2, -1),
        return_weights=True, return_norm_stats=tracked,
    )  # fmt: skip
    loss = cross_entropy(logits.flatten(0, 1), golden["query_labels"].flatten())
    got = [logits, theta, loss, *torch.autograd.grad(loss, leaves)]
    want = [golden[key] for key in ("logits", "weights", "loss", "grad_support", "grad_query")]
    want += [golden[f"grad.{key}"] for key in names]
    for found, published in zip((g.detach() for g in got), want, strict=True):
        assert float((found - published).abs().max() / published.abs().max()) <= 1e-9

    running = [state[key] for key in NORMS]
    for step in stats[0] if tracked else []:
        running = [0.9 * r + 0.1 * s for r, s in zip(running, step.flatten(0, 1), strict=True)]
    assert_close(running, [golden[f"after.{key}"] for key in NORMS], 1e-12)


@given(
    shapes(),
    st.integers(0, 4),
    st.sampled_from([1e-3, 0.05, 1.0]),
    st.sampled_from(["task", "batch", "running"]),
    st.sampled_from(["sum", "mean"]),
)
def test_written_out_steps_are_the_paper_s(
    sizes: dict[str, int], steps: int, lr: float, norm_stats: str, reduction: str
) -> None:
    episode = draw(**sizes).fresh()
    results = []
    for form in (sib_inner_loop, explicit.sib_inner_loop):
        logits, (theta, _), *stats = whole(
            form, episode, steps=steps, inner_lr=lr, norm_stats=norm_stats, reduction=reduction,
            running_stats=running_stats(sizes["H"]), return_weights=True, return_norm_stats=norm_stats != "running",
        )  # fmt: skip
        grads = torch.autograd.grad(logits.square().sum() + theta.sin().sum(), episode.leaves(), allow_unused=True)
        zeros = [torch.zeros_like(p) if g is None else g for g, p in zip(grads, episode.leaves(), strict=True)]
        results.append([logits, theta, *stats, *zeros])
    assert_close(*results, 1e-9)


@FORMS
def test_tasks_are_independent(form: Any) -> None:
    episode = draw(T=4)
    options: dict[str, Any] = {"steps": 3, "inner_lr": 0.5, "return_weights": True, "return_norm_stats": True}
    together = whole(form, episode, **options)
    alone = [
        whole(form, episode._replace(support=s[None], labels=y[None], query=q[None]), **options)
        for s, y, q in zip(episode.support, episode.labels, episode.query, strict=True)
    ]
    assert_close([together[0]], [torch.cat([a[0] for a in alone])], 1e-12)
    assert_close([together[1].weight], [torch.cat([a[1].weight for a in alone])], 1e-12)
    assert_close([together[2]], [torch.stack([a[2] for a in alone]).mean(0)], 1e-12)


@FORMS
def test_nan_stays_in_its_task(form: Any) -> None:
    def run(poison: bool) -> list[Tensor]:
        episode = draw(T=3).fresh()
        support, query = episode.support.detach().clone(), episode.query.detach().clone()
        if poison:
            support[1], query[1] = float("nan"), float("nan")
        support.requires_grad_()
        query.requires_grad_()
        logits, (theta, _) = whole(
            form, episode._replace(support=support, query=query), steps=2, inner_lr=0.5, return_weights=True
        )
        grads = torch.autograd.grad(logits.sum() + theta.sum(), (support, query))
        return [logits, theta, *grads]

    for clean, poisoned in zip(run(False), run(True), strict=True):
        assert poisoned[1].isnan().all()
        assert torch.equal(clean[[0, 2]], poisoned[[0, 2]])


@FORMS
def test_one_task_is_a_batch(form: Any) -> None:
    episode = draw(T=1)
    a, b = (
        whole(form, episode, steps=3, inner_lr=0.5, norm_stats=mode, return_norm_stats=True)
        for mode in ("task", "batch")
    )
    assert_close(a, b, 1e-12)


@FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_row_and_a_classifier_of_zeros(form: Any, dtype: torch.dtype) -> None:
    episode = draw(T=2, Q=1, dtype=dtype)
    theta0 = torch.randn(2, 3, 13, dtype=dtype)
    theta0[0, 1] = 0
    logits, (theta, _), stats = form(
        theta0, episode.query, episode.scale, episode.bias, episode.mlp, steps=1, inner_lr=0.1,
        return_weights=True, return_norm_stats=True,
    )  # fmt: skip
    assert logits.isfinite().all() and theta.isfinite().all()
    assert stats[:, :, 1].abs().max() == 0
    # A step from zero leads straight along the row.
    along = normalize(theta[0, 1], dim=-1) @ normalize(episode.query[0, 0], dim=-1)
    assert float(along.abs()) == pytest.approx(1, abs=1e-5)


@FORMS
def test_reduction_mean_divides_the_step(form: Any) -> None:
    episode = draw(Q=11)
    mean = whole(form, episode, steps=2, inner_lr=1.1, reduction="mean")
    assert_close([mean], [whole(form, episode, steps=2, inner_lr=0.1)], 1e-12)


@FORMS
def test_where_no_gradient_is_wanted(form: Any) -> None:
    options: dict[str, Any] = {"steps": 2, "inner_lr": 0.5, "return_weights": True}
    want = flat(whole(form, draw(), **options))
    assert not any(r.requires_grad for r in want)
    with torch.no_grad():
        assert_close(flat(whole(form, draw().fresh(), **options)), want, 1e-13)
    with torch.inference_mode():
        assert_close(flat(whole(form, draw(), **options)), want, 1e-12)


@FORMS
def test_frozen_features_and_start(form: Any) -> None:
    """theta0 needs no gradient of its own for the MLP to get one."""
    episode = draw()
    theta0 = torch.randn(2, 3, 13, dtype=torch.float64)
    grads = []
    for start in (theta0, theta0.clone().requires_grad_()):
        bias3 = episode.mlp.bias3.clone().requires_grad_()
        mlp = episode.mlp._replace(bias3=bias3)
        logits = form(start, episode.query, episode.scale, episode.bias, mlp, steps=2, inner_lr=0.5)
        grads.append(torch.autograd.grad(logits.square().sum(), bias3)[0])
    assert_close(grads[:1], grads[1:], 1e-13)


@FORMS
def test_second_derivatives_exist(form: Any) -> None:
    episode = draw(T=1, S=3, Q=4, N=2, D=3, H=3)

    def loss(scale: Tensor, weight: Tensor) -> Tensor:
        scaled = episode._replace(scale=scale, weight=weight)
        return whole(form, scaled, steps=2, inner_lr=0.1).square().sum()

    scale, weight = (t.clone().requires_grad_() for t in (episode.scale, episode.weight))
    assert torch.autograd.gradgradcheck(loss, (scale, weight))


@FORMS
def test_statistics_of_running_statistics_are_refused(form: Any) -> None:
    with pytest.raises(ValueError, match="no statistics of its own"):
        whole(
            form, draw(), steps=1, inner_lr=0.1, norm_stats="running", running_stats=running_stats(8),
            return_norm_stats=True,
        )  # fmt: skip


@FORMS
def test_precision_is_what_the_arguments_promote_to(form: Any) -> None:
    episode = draw()
    low = episode.map(Tensor.float)
    mixed = low._replace(mlp=episode.mlp)
    assert whole(form, mixed, steps=2, inner_lr=0.1).dtype is torch.float64
    want = whole(form, low, steps=2, inner_lr=0.1)
    assert want.dtype is torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(whole(form, low, steps=2, inner_lr=0.1), want)


def test_features_from_a_bank() -> None:
    episode = draw(T=2)
    bank = torch.randn(30, 13, dtype=torch.float64)
    support, query = torch.randint(30, (2, 7)), torch.randint(30, (2, 9))
    rest = episode.arguments()[3:]
    got = km.reference.sib(
        bank, episode.labels, bank, *rest, steps=2, inner_lr=0.1, support_index=support, query_index=query
    )
    want = km.reference.sib(bank[support], episode.labels, bank[query], *rest, steps=2, inner_lr=0.1)
    assert relative_error(got, want) == 0
