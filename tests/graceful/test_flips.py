from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from distillation import draw_logits
from hypothesis import given
from hypothesis import strategies as st

import kernelmeta as km


def one_hot(answers: Any) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(answers), 3).float()


def test_rates_by_hand() -> None:
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 2, 2])
    old = one_hot([0, 0, 0, 1, 1, 1, 1, 0, 2, 2])  # two errors of ten
    new = one_hot([0, 0, 1, 0, 1, 1, 0, 2, 0, 2])  # four; three of them are negative flips, one row flips back
    found = km.graceful.flips(new, old, labels)
    assert found.error_old == pytest.approx(0.2) and found.error_new == pytest.approx(0.4)
    assert found.negative == pytest.approx(0.3) and found.positive == pytest.approx(0.1)
    assert found.relative_negative == pytest.approx(0.3 / (0.8 * 0.4))
    assert found.negative_impact == pytest.approx(0.75)
    assert found.gain == pytest.approx(found.positive - found.negative) and found.rows == 10


def test_rows_that_are_left_out() -> None:
    new, old, labels = draw_logits(40, 4)
    some = labels.clone()
    some[::3] = -100
    kept = some != -100
    assert km.graceful.flips(new, old, some)[:7] == pytest.approx(
        km.graceful.flips(new[kept], old[kept], labels[kept])[:7]
    )


def test_an_interval_is_that_of_a_paired_mean() -> None:
    new, old, labels = draw_logits(500, 4)
    found = km.graceful.flips(new, old, labels)
    difference = (new.argmax(-1) == labels).double() - (old.argmax(-1) == labels).double()
    assert found.gain == pytest.approx(float(difference.mean()))
    assert found.ci95.gain == pytest.approx(1.96 * float(difference.std()) / math.sqrt(500))


def test_episodes_are_what_is_sampled() -> None:
    """The rows of an episode stand and fall together: intervals over episodes are wider than over their rows."""
    new, old, labels = draw_logits(50, 4)
    rows = [t.repeat_interleave(15, 0) for t in (new, old, labels)]
    episodes = km.graceful.flips(*(t.view(50, 15, *t.shape[1:]) for t in rows))
    alone = km.graceful.flips(new, old, labels)
    assert episodes[:7] == pytest.approx(alone[:7]) and episodes.ci95 == pytest.approx(alone.ci95)
    assert km.graceful.flips(*rows).ci95.negative < episodes.ci95.negative / 3


def test_intervals_of_rates_of_rates_hold_what_they_promise() -> None:
    """Of 400 draws of a population about 95 % of the intervals hold its rate."""
    g = torch.Generator().manual_seed(0)
    share = {"negative": 0.06, "positive": 0.1, "both wrong": 0.14}
    true = {"relative_negative": 0.06 / (0.76 * 0.2), "negative_impact": 0.3, "gain": 0.04}
    inside = dict.fromkeys(true, 0)
    labels = torch.zeros(600, dtype=torch.int64)
    for _ in range(400):
        u = torch.rand(600, generator=g)
        old_wrong, new_wrong = (u >= 0.06) & (u < 0.3), (u < 0.06) | ((u >= 0.16) & (u < 0.3))
        found = km.graceful.flips(one_hot(new_wrong.long().tolist()), one_hot(old_wrong.long().tolist()), labels)
        for name, value in true.items():
            inside[name] += abs(getattr(found, name) - value) <= getattr(found.ci95, name)
    assert sum(share.values()) == pytest.approx(0.3)
    for name, n in inside.items():
        assert 0.92 <= n / 400 <= 0.98, name


def test_the_op_counts_alike() -> None:
    new, old, labels = draw_logits(300, 5)
    new[7, 2] = math.nan
    labels[::5] = -100
    found = km.graceful.flips(new, old, labels)
    _, counts = km.graceful.focal_distillation(new, old, labels, return_flips=True)
    assert int(counts.rows) == found.rows
    assert float(counts.negative / counts.rows) == pytest.approx(found.negative)
    assert float(counts.positive / counts.rows) == pytest.approx(found.positive)
    assert 1 - float(counts.new_right / counts.rows) == pytest.approx(found.error_new)


def test_nothing_to_divide_by() -> None:
    perfect, labels = one_hot([0, 1, 2]), torch.tensor([0, 1, 2])
    found = km.graceful.flips(perfect, perfect, labels)
    assert found.negative == 0 and math.isnan(found.relative_negative) and math.isnan(found.negative_impact)
    assert math.isnan(km.graceful.flips(perfect[:1], perfect[:1], labels[:1]).ci95.negative)


@given(st.integers(1, 8), st.integers(1, 6), st.integers(1, 5), st.integers(0, 50))
def test_shapes(T: int, Q: int, N: int, seed: int) -> None:
    new, old, labels = draw_logits(T * Q, N, seed=seed)
    rows = km.graceful.flips(new, old, labels)
    episodes = km.graceful.flips(new.view(T, Q, N), old.view(T, Q, N), labels.view(T, Q))
    assert rows[:2] == pytest.approx(episodes[:2]) and 0 <= rows.negative <= rows.error_new <= 1


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((torch.zeros(3, 2), torch.zeros(3, 4), torch.zeros(3)), ValueError, "old_logits: expected .* same classes"),
        ((torch.zeros(3, 2), torch.zeros(2, 2), torch.zeros(3)), ValueError, "old_logits: expected .* same rows"),
        ((torch.zeros(2), torch.zeros(2), torch.zeros(1)), ValueError, "new_logits: expected"),
        ((torch.zeros(3, 2), torch.zeros(3, 2), torch.zeros(3)), TypeError, "labels: expected int64"),
        ((torch.zeros(3, 2), torch.zeros(3, 2), torch.zeros(2).long()), ValueError, "labels: expected shape"),
        ((torch.zeros(3, 2), torch.zeros(3, 2), torch.full((3,), 2)), ValueError, "label 2; labels must be"),
        ((torch.zeros(3, 2), torch.zeros(3, 2), torch.full((3,), -100)), ValueError, "a row that counts"),
        ((torch.zeros(3, 2).long(), torch.zeros(3, 2), torch.zeros(3).long()), TypeError, "new_logits: expected float"),
    ],
)
def test_wrong_inputs(args: tuple[torch.Tensor, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        km.graceful.flips(*args)


def test_torchmetrics_over_batches() -> None:
    pytest.importorskip("torchmetrics", reason="torchmetrics is not installed (pip install 'kernelmeta[metrics]')")
    from kernelmeta.graceful.metrics import FlipRates

    new, old, labels = draw_logits(90, 4)
    labels[::4] = -100
    metric = FlipRates()
    for part in zip(new.split(25), old.split(25), labels.split(25), strict=True):
        metric.update(*part)
    found = metric.compute()
    want = km.graceful.flips(new, old, labels)
    assert {name: float(value) for name, value in found.items()} == pytest.approx(
        {name: getattr(want, name) for name in found}
    )
    metric.reset()
    assert metric.compute()["negative"].isnan()
    with pytest.raises(ValueError, match="old_logits: expected shape"):
        metric.update(new, old[:, :2], labels)


def test_without_torchmetrics_there_is_a_clear_word() -> None:
    """And nothing else of the package asks for it."""
    code = (
        "import sys; sys.modules['torchmetrics'] = None\n"
        "import kernelmeta as km; km.graceful.flips\n"
        "try:\n    import kernelmeta.graceful.metrics\nexcept ImportError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "pip install 'kernelmeta[metrics]'" in done.stdout
