from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from distillation import draw_logits, expected, with_gradient
from episodes import assert_close
from hypothesis import given
from hypothesis import strategies as st

import kernelmeta as km
from kernelmeta.reference.focal_distillation import DISTANCES

distill = km.ops.focal_distillation


@pytest.fixture(params=["automatic", "reference"])
def backend(request: pytest.FixtureRequest) -> Any:
    with km.use_backend(None if request.param == "automatic" else request.param):
        yield request.param


@given(
    st.integers(1, 20), st.integers(1, 70), st.sampled_from(DISTANCES), st.sampled_from([1.0, 3.0, 100.0, 1000.0]),
    st.sampled_from([0.0, 0.1, 1.0]), st.booleans(), st.booleans(), st.sampled_from(["mean", "sum"]),
    st.sampled_from([1.0, 2.0, 2.5]), st.booleans(), st.integers(0, 100),
)  # fmt: skip
def test_equals_an_independent_form(
    R: int, C: int, distance: str, tau: float, smoothing: float, weighted: bool, ignoring: bool, reduction: str,
    power: float, label_loss: bool, seed: int,
) -> None:  # fmt: skip
    new, old, labels = draw_logits(R, C, seed=seed)
    if ignoring and R > 1:
        labels[R // 2] = -100
    options: dict[str, Any] = {
        "distance": distance, "tau": tau, "label_smoothing": smoothing, "reduction": reduction, "power": power,
        "label_loss": label_loss, "weight": 0.7, "alpha": 0.5, "beta": 2.0,
        "class_weight": torch.rand(C).double() + 0.5 if weighted else None,
    }  # fmt: skip
    want = with_gradient(expected, new, old, labels, **options)
    for name in (None, "reference"):
        with km.use_backend(name):
            assert_close(with_gradient(distill, new, old, labels, **options), want, 1e-9)
    assert_close(with_gradient(km.reference.focal_distillation, new, old, labels, **options), want, 1e-9)


@pytest.mark.parametrize("tau", [1.0, 3.0, 10.0, 100.0, 1000.0])
@pytest.mark.parametrize("near", [0.01, 1.0, 10.0])
def test_float32_keeps_its_digits(tau: float, near: float, backend: str) -> None:
    """KL and its gradient cancel at a large tau: written naively 4e-4 and 1e-5 are lost at 100."""
    new, old, labels = draw_logits(64, 1000, near=near)
    options: dict[str, Any] = {"tau": tau, "label_loss": False}
    new, old = new.float(), old.float()
    got = with_gradient(distill, new, old, labels, **options)
    want = with_gradient(km.reference.focal_distillation, new.double(), old.double(), labels, **options)
    assert relative_to_largest(got[0], want[0]) <= 1e-6
    assert relative_to_largest(got[1], want[1]) <= 1e-6


@pytest.mark.parametrize("tau", [1.0, 3.0, 10.0, 100.0, 1000.0])
def test_float32_keeps_its_digits_where_the_old_model_is_sure(tau: float, backend: str) -> None:
    """One class has nearly all of p, and moves by nearly E_p[v]: their difference is a thousandth of either."""
    options: dict[str, Any] = {"tau": tau, "label_loss": False}
    for old, new in (([12.0, 0.0], [10.0, 0.5]), ([9.0, 0.0, 1.0], [12.0, 1.0, -2.0]), ([7.0, 0.0], [7.5, 0.25])):
        new_logits, old_logits = (tau * torch.tensor([row]) for row in (new, old))
        got = with_gradient(distill, new_logits, old_logits, torch.tensor([0]), **options)
        want = with_gradient(
            km.reference.focal_distillation, new_logits.double(), old_logits.double(), torch.tensor([0]), **options
        )
        assert relative_to_largest(got[1], want[1]) <= 1e-6


@pytest.mark.parametrize("classes", [5, 16, 33])
@pytest.mark.parametrize("spread", [0.3, 0.3464, 0.3466, 0.4, 86.0, 88.0])
@pytest.mark.parametrize("reach", [1e-3, 0.12, 0.13, 0.49, 0.51, 1.2])
def test_where_a_shorter_series_begins(spread: float, reach: float, classes: int, backend: str) -> None:
    """Rows whose old logits are spread no wider than ln(2) / 2, over tau, and whose new ones are as near to them as an
    eighth take fewer terms of the exponential's series: no digit may go where that begins.
    """
    tau = 8.0
    g = torch.Generator().manual_seed(0)
    old = torch.rand(8, classes, generator=g)
    old = (old - old.amin(-1, keepdim=True)) / (old.amax(-1, keepdim=True) - old.amin(-1, keepdim=True)) * spread * tau
    new = old + (torch.randint(2, old.shape, generator=g) * 2 - 1) * reach * tau
    labels = torch.randint(classes, (8,), generator=g)
    for label_loss in (False, True):
        options: dict[str, Any] = {"tau": tau, "label_loss": label_loss, "label_smoothing": 0.1}
        want = with_gradient(km.reference.focal_distillation, new.double(), old.double(), labels, **options)
        for dtype, bound in ((torch.float32, 1e-6), (torch.float64, 1e-13)):
            got = with_gradient(distill, new.to(dtype), old.to(dtype), labels, **options)
            assert max(relative_to_largest(a, b) for a, b in zip(got, want, strict=True)) <= bound


def relative_to_largest(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.detach().double() - want.detach()).abs().max() / want.detach().abs().max())


def test_the_stable_reference_is_right_where_the_naive_form_still_is() -> None:
    """The float64 that float32 is held against, against the textbook's form where that has digits to spare."""
    new, old, labels = draw_logits(8, 1000)
    for tau in (1.0, 100.0):
        options: dict[str, Any] = {"tau": tau, "label_loss": False}
        assert_close(
            with_gradient(km.reference.focal_distillation, new, old, labels, **options),
            with_gradient(expected, new, old, labels, **options), 1e-10,
        )  # fmt: skip


def test_the_focal_weight_is_a_rows_own() -> None:
    """[N, 1] weights times [N] distances would weigh every row by the mean weight: 2.158 in the place of 2.470."""
    new = torch.tensor([[2.0, 0.0, 1.0], [0.5, 1.5, 0.0], [0.0, 0.2, 0.1]]).double()
    old = torch.tensor([[1.0, 0.0, 0.0], [2.0, 0.0, 1.0], [0.0, 2.0, 1.0]]).double()
    labels = torch.tensor([0, 1, 1])
    options: dict[str, Any] = {"tau": 1.0, "label_loss": False}
    each = F.kl_div(new.log_softmax(-1), old.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    focus = torch.tensor([6.0, 1.0, 6.0]).double()
    right, wrong = (focus * each).mean(), (focus.unsqueeze(1) * each).mean()
    assert abs(right - wrong) > 0.05
    assert float(distill(new, old, labels, **options)) == pytest.approx(float(right), rel=1e-12)


def test_the_square_of_tau_is_there() -> None:
    """As tau grows, tau^2 KL tends to half the variance of the difference over the classes; without it, to 0."""
    new, old, labels = draw_logits(5, 11)
    d = new - old
    half_variance = (d - d.mean(-1, keepdim=True)).square().mean(-1) / 2
    got = distill(new, old, labels, tau=1e5, alpha=1, beta=0, label_loss=False, reduction="none")
    assert_close([got], [half_variance], 1e-3)


def test_the_old_ones_being_right_decides() -> None:
    new, old = torch.tensor([[0.0, 3.0], [3.0, 0.0]]), torch.tensor([[3.0, 0.0], [0.0, 3.0]])
    labels = torch.tensor([0, 0])  # only the old one is right on the first row, only the new one on the second
    first, second = distill(new, old, labels, distance="squared", label_loss=False, reduction="none").tolist()
    assert first == pytest.approx(6 * 9) and second == pytest.approx(9)


def test_equal_logits_count_the_first(backend: str) -> None:
    old = torch.tensor([[1.0, 1.0, 0.0]] * 3)
    new = torch.tensor([[0.0, 2.0, 2.0]] * 3)
    _, counts = distill(new, old, torch.tensor([0, 1, 2]), return_flips=True)
    assert [int(c) for c in counts] == [1, 1, 1, 1, 3]


def test_flips_are_counted(backend: str) -> None:
    new, old, labels = draw_logits(200, 5, near=3.0)
    labels[::7] = -100
    _, counts = distill(new.float(), old.float(), labels, return_flips=True)
    seen = labels != -100
    was, now = (old.argmax(-1) == labels) & seen, (new.argmax(-1) == labels) & seen
    want = [(was & ~now).sum(), (now & ~was).sum(), was.sum(), now.sum(), seen.sum()]
    assert [int(c) for c in counts] == [int(w) for w in want]
    assert isinstance(counts, km.FlipCounts)


def test_cross_entropy_alone() -> None:
    new, old, labels = draw_logits(30, 9)
    labels[3] = 77
    options: dict[str, Any] = {"label_smoothing": 0.2, "ignore_index": 77}
    got = with_gradient(distill, new, old, labels, weight=0, **options)
    assert_close(got, with_gradient(lambda z: F.cross_entropy(z, labels, **options), new), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_episodes_of_every_precision(dtype: torch.dtype, backend: str) -> None:
    new, old, labels = draw_logits(3 * 7, 5)
    new, old = new.to(dtype), old.to(dtype)
    got = with_gradient(distill, new.view(3, 7, 5), old.view(3, 7, 5), labels.view(3, 7))
    assert got[0].dtype is dtype and got[1].dtype is dtype and got[1].shape == (3, 7, 5)
    want = with_gradient(expected, new.double(), old.double(), labels)
    # (the numbers are those of the narrow type; only the results are rounded to it)
    assert_close(
        [got[0], got[1].view(21, 5)], want, max(2 * torch.finfo(dtype).eps, 1e-9) + 1e-6 * (dtype is torch.float32)
    )


def test_old_logits_of_another_precision(backend: str) -> None:
    new, old, labels = draw_logits(11, 6)
    for of_new, of_old, result in (
        (torch.bfloat16, torch.float32, torch.float32), (torch.float32, torch.bfloat16, torch.float32),
        (torch.float32, torch.float64, torch.float64), (torch.float64, torch.float16, torch.float64),
    ):  # fmt: skip
        z, z_old = new.to(of_new), old.to(of_old)
        got = with_gradient(distill, z, z_old, labels, tau=3.0)
        assert got[0].dtype is result and got[1].dtype is of_new
        want = with_gradient(expected, z.double(), z_old.double(), labels, tau=3.0)
        assert_close(got[:1], want[:1], 1e-6)
        assert_close(got[1:], want[1:], 1e-6 if of_new is not torch.bfloat16 else 8e-3)


@pytest.mark.parametrize("distance", DISTANCES)
def test_strided_logits_and_gradients(distance: str) -> None:
    new, old, labels = draw_logits(12, 18)
    want = with_gradient(expected, new, old, labels, distance=distance, tau=5.0)
    wide = torch.full((12, 40), math.nan).double()
    wide[:, 1:37:2] = new
    transposed = old.t().contiguous().t()
    got = with_gradient(
        distill, wide[:, 1:37:2], transposed, labels.repeat_interleave(2)[::2], distance=distance, tau=5.0
    )
    assert_close(got, want, 1e-9)
    each = with_gradient(lambda z: distill(z, old, labels, distance=distance, reduction="none").expand(3, 12)[1], new)
    assert_close(each[1:], with_gradient(expected, new, old, labels, distance=distance, reduction="sum")[1:], 1e-9)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_class_that_both_rule_out_takes_no_part(distance: str, dtype: torch.dtype, backend: str) -> None:
    """Classes beyond a task's own ways are minus infinity."""
    new, old, labels = (t.to(dtype) if t.is_floating_point() else t for t in draw_logits(9, 4))
    beyond = torch.full((9, 3), -math.inf, dtype=dtype)
    options: dict[str, Any] = {"tau": 2.0, "distance": distance}
    share = 4 / 7 if distance.endswith("mean") else 1.0
    want = with_gradient(distill, new, old, labels, **options | {"weight": share})
    got = with_gradient(distill, torch.cat([new, beyond], 1), torch.cat([old, beyond], 1), labels, **options)
    assert_close([got[0], got[1][:, :4]], want, 1e-6 if dtype is torch.float32 else 1e-12)
    assert got[1][:, 4:].abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_class_that_one_rules_out(dtype: torch.dtype, backend: str) -> None:
    z, minus = torch.tensor([[0.5, 1.0, 0.2]], dtype=dtype), torch.tensor([[0.5, -math.inf, 0.2]], dtype=dtype)
    y = torch.tensor([0])
    options: dict[str, Any] = {"tau": 2.0, "label_loss": False, "beta": 0.0}
    p = (minus / 2).softmax(-1)
    kept = [0, 2]
    loss = 4 * (p[0, kept] * (p.log() - (z / 2).log_softmax(-1))[0, kept]).sum()
    got = with_gradient(distill, z, minus, y, **options)
    assert_close(got, [loss, 2 * ((z / 2).softmax(-1) - p)], 1e-6)
    loss, gradient = with_gradient(distill, minus, z, y, **options)
    assert loss == math.inf  # as KL is
    assert_close([gradient], [2 * (p - (z / 2).softmax(-1))], 1e-6)


@pytest.mark.parametrize("tau", [1.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_huge_logits(tau: float, dtype: torch.dtype, backend: str) -> None:
    """Differences whose exponential is no number, and probabilities that are none."""
    for size in (30.0, 300.0, 3e4):
        new, old, labels = draw_logits(20, 13, spread=size, near=size)
        options: dict[str, Any] = {"tau": tau}
        want = with_gradient(expected, new, old, labels, **options)
        got = with_gradient(distill, new.to(dtype), old.to(dtype), labels, **options)
        assert_close(got, want, 3e-6 if dtype is torch.float32 else 1e-9)


def test_a_probability_too_small_for_a_number() -> None:
    """The old one is sure of one class, the new one as sure of another."""
    old, new = torch.tensor([[0.0, -200.0, -1.0]]), torch.tensor([[0.0, 100.0, -1.0]])
    options: dict[str, Any] = {"tau": 1.0, "label_loss": False, "beta": 0.0}
    got = with_gradient(distill, new, old, torch.tensor([0]), **options)
    want = with_gradient(expected, new.double(), old.double(), torch.tensor([0]), **options)
    assert_close(got, want, 1e-6)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("where", ["new", "old"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_stays_in_its_row(distance: str, where: str, value: float, backend: str) -> None:
    new, old, labels = draw_logits(5, 20)
    labels[2] = 1
    (new if where == "new" else old)[2, 3] = value
    for label_loss in (True, False):
        options: dict[str, Any] = {"distance": distance, "tau": 2.0, "label_loss": label_loss}
        loss, gradient = with_gradient(distill, new.float(), old.float(), labels, reduction="none", **options)
        assert not loss[2].isfinite()
        clean = [i for i in range(5) if i != 2]
        assert loss[clean].isfinite().all() and gradient[clean].isfinite().all()
        if math.isnan(value):
            assert gradient[2].isnan().any()
            _, counts = distill(new.float(), old.float(), labels, return_flips=True, **options)
            assert int(counts.rows) == 5
    labels[2] = -100  # a row that is left out is not looked at
    loss, gradient = with_gradient(distill, new.float(), old.float(), labels, distance=distance)
    assert loss.isfinite() and gradient.isfinite().all() and gradient[2].abs().max() == 0


def test_no_rows(backend: str) -> None:
    empty = torch.zeros(0, 5)
    loss, gradient = with_gradient(distill, empty, empty, torch.zeros(0, dtype=torch.int64))
    assert loss.isnan() and gradient.shape == (0, 5)  # as F.cross_entropy has it
    assert with_gradient(distill, empty, empty, torch.zeros(0, dtype=torch.int64), reduction="sum")[0] == 0
    z = torch.zeros(2, 5)
    assert distill(z, z, torch.full((2,), -100)).isnan()


@pytest.mark.parametrize("tau", [1e-3, 0.1, 1e4, 1e6])
@pytest.mark.parametrize("near", [0.01, 1.0])
def test_temperatures_beyond_those_of_use(tau: float, near: float, backend: str) -> None:
    new, old, labels = draw_logits(32, 50, near=near)
    options: dict[str, Any] = {"tau": tau, "label_loss": False}
    want = with_gradient(km.reference.focal_distillation, new, old, labels, **options)
    if tau < 1:  # where the difference of logarithms has its digits
        assert_close(want, with_gradient(expected, new, old, labels, **options), 1e-9)
    assert_close(with_gradient(distill, new, old, labels, **options), want, 1e-12)
    got = with_gradient(distill, new.float(), old.float(), labels, **options)
    kernels = backend == "automatic" and km.backends()["cpu"].available
    for value, exact in zip(got, want, strict=True):
        assert relative_to_largest(value, exact) <= (1e-6 if kernels or tau > 1 else 1e-4)  # exp of large differences


@pytest.mark.parametrize(
    "options",
    [
        {"weight": 0.0}, {"alpha": 0.0, "beta": 0.0}, {"class_weight": torch.tensor([0.0, 1, 1, 1]).double()},
        {"class_weight": torch.tensor([0.0, 1, 1, 1]).double(), "label_smoothing": 0.2},
        {"class_weight": torch.zeros(4).double(), "reduction": "sum"},
    ],
)  # fmt: skip
def test_weights_of_zero(options: dict[str, Any], backend: str) -> None:
    new, old, labels = draw_logits(12, 4)
    labels[3] = 0
    assert_close(
        with_gradient(distill, new, old, labels, **options), with_gradient(expected, new, old, labels, **options), 1e-9
    )


def test_a_mean_over_no_weight_is_none(backend: str) -> None:
    new, old, labels = draw_logits(6, 4)
    assert distill(new, old, labels, class_weight=torch.zeros(4).double()).isnan()  # as F.cross_entropy has it


def test_all_rows_are_left_out(backend: str) -> None:
    new, old, _ = draw_logits(6, 4)
    for index in (-100, 2):
        labels = torch.full((6,), index)
        for reduction in ("sum", "none"):
            loss, gradient = with_gradient(distill, new, old, labels, reduction=reduction, ignore_index=index)
            assert not loss.any() and not gradient.any()
        _, counts = distill(new, old, labels, ignore_index=index, return_flips=True)
        assert not any(int(count) for count in counts)


def test_a_class_may_be_the_one_that_is_left_out(backend: str) -> None:
    new, old, _ = draw_logits(6, 4)
    labels = torch.tensor([2, 0, 1, 2, 3, 2])
    for smoothing in (0.0, 0.3):
        options: dict[str, Any] = {"ignore_index": 2, "label_smoothing": smoothing}
        assert_close(
            with_gradient(distill, new, old, labels, **options),
            with_gradient(expected, new, old, labels, **options),
            1e-9,
        )


def test_one_class(backend: str) -> None:
    new, old, _ = draw_logits(6, 1)
    loss, gradient = with_gradient(distill, new, old, torch.zeros(6, dtype=torch.int64))
    assert loss == 0 and not gradient.any()


def test_nothing_wider_than_the_logits_is_kept() -> None:
    """What autograd holds between forward and backward: the logits themselves, and a few numbers a row."""
    new, old, labels = (t.float() if t.is_floating_point() else t for t in draw_logits(64, 1000))
    kept: list[torch.Tensor] = []
    leaf = new.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        distill(leaf, old, labels)
    extra = [t for t in kept if t.data_ptr() not in (new.data_ptr(), old.data_ptr())]
    assert sum(t.numel() for t in extra) <= 20 * 64


def test_the_same_bits_again() -> None:
    new, old, labels = (t.float() if t.is_floating_point() else t for t in draw_logits(700, 50))
    first, second = (with_gradient(distill, new, old, labels) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    alone = distill(new, old, labels, reduction="none")
    assert torch.equal(alone[100:200], distill(new[100:200], old[100:200], labels[100:200], reduction="none"))


GOOD = torch.zeros(4, 3)
Y = torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"old": torch.zeros(4, 5)}, ValueError, r"old_logits: expected \[4, 3\] .* same classes, got \[4, 5\]"),
        ({"old": torch.zeros(5, 3)}, ValueError, "old_logits: expected .* the same rows"),
        ({"new": torch.zeros(4, 0), "old": torch.zeros(4, 0)}, ValueError, "new_logits: expected .* a class at least"),
        ({"old": torch.zeros(4, 3).requires_grad_()}, ValueError, r"old_logits: requires a gradient.*no_grad"),
        ({"old": torch.zeros(4, 3).long()}, TypeError, "old_logits: expected float32"),
        ({"labels": Y[:3]}, ValueError, "labels: expected shape"),
        ({"labels": Y.float()}, TypeError, "labels: expected int64"),
        ({"labels": Y + 3}, ValueError, r"labels: row 0 has label 3; labels must be in 0\.\.2, or ignore_index"),
        ({"labels": Y - 1}, ValueError, "labels: row 0 has label -1"),
        ({"tau": 0.0}, ValueError, "tau: expected a temperature above 0"),
        ({"tau": -1.0}, ValueError, "tau: expected a finite number"),
        ({"tau": math.inf}, ValueError, "tau: expected a finite number"),
        ({"tau": "1"}, TypeError, "tau: expected a number, got str"),
        ({"alpha": -1.0}, ValueError, "alpha: expected a finite number of at least 0"),
        ({"beta": math.nan}, ValueError, "beta: expected a finite number"),
        ({"weight": -0.1}, ValueError, "weight: expected a finite number"),
        ({"margin": -0.1}, ValueError, "margin: expected a finite number"),
        ({"power": 0.5}, ValueError, "power: expected a finite number of at least 1"),
        ({"distance": "l1"}, ValueError, "distance: expected one of kl, .*, ldi_mean, got 'l1'"),
        ({"reduction": "avg"}, ValueError, "reduction: expected one of mean, sum, none"),
        ({"label_smoothing": 1.5}, ValueError, r"label_smoothing: expected 0\.\.1"),
        ({"ignore_index": 0.5}, TypeError, "ignore_index: expected an int"),
        ({"class_weight": torch.ones(4)}, ValueError, r"class_weight: expected shape \[C\] = \[3\]"),
    ],
)  # fmt: skip
def test_wrong_inputs(change: dict[str, Any], error: type[Exception], message: str, backend: str) -> None:
    given = {"new": GOOD, "old": GOOD, "labels": Y} | change
    with pytest.raises(error, match=message):
        distill(given.pop("new"), given.pop("old"), given.pop("labels"), **given)


def test_narrow_labels() -> None:
    new, old, labels = draw_logits(6, 4)
    assert torch.equal(distill(new, old, labels.to(torch.uint8)), distill(new, old, labels))


def test_the_raw_op_checks_too() -> None:
    raw = torch.ops.kernelmeta.focal_distillation
    options = (0, 1.0, 5.0, 1.0, 0.5, 2.0, True, 0.0, -100, False)
    if not km.backends()["cpu"].available:
        pytest.skip("no kernels")
    for args, message in (
        ((GOOD, torch.zeros(4, 5), Y, None), "old_logits"),
        ((GOOD, GOOD, Y[:2], None), "labels"),
        ((GOOD, GOOD.double(), Y, None), "both float64"),
        ((GOOD, GOOD, Y, torch.ones(2)), "class_weight"),
        ((GOOD, GOOD, Y + 9, None), "label 9"),
    ):
        with pytest.raises(ValueError, match=message):
            raw(*args, *options)
    with pytest.raises(ValueError, match="distance"):
        raw(GOOD, GOOD, Y, None, 9, *options[1:])
