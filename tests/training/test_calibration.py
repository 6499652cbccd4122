"""Probabilities that are what they say: the temperature that was drawn is found, and the error falls."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from runs import make_bank

import kernelmeta as km
from kernelmeta.cli import main
from kernelmeta.training.calibration import LEAST, MOST, Calibration, CalibrationError


def draw(temperature: float, n: int = 20_000, N: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and answers that are as probable as the logits over the temperature say."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(1, n, N, generator=generator)
    answers = torch.multinomial((logits[0] / temperature).softmax(-1), 1, generator=generator)
    return logits, answers.view(1, n)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_the_temperature_of_the_answers_is_found(temperature):
    logits, answers = draw(temperature)
    found = Calibration()
    for part, own in zip(logits.split(7000, 1), answers.split(7000, 1), strict=True):
        found.add(part, own)
    assert found.temperature() == pytest.approx(temperature, rel=0.05)
    errors = [CalibrationError(), CalibrationError(found.temperature())]
    for error in errors:
        error.add(logits, answers)
    assert errors[1].percent < 1.5
    assert errors[0].percent > 5 or temperature == 1


def test_the_error_is_that_of_a_direct_sum():
    logits, answers = draw(2.0, n=500)
    error = CalibrationError(1.5)
    error.add(logits, answers)
    probability, best = (logits[0] / 1.5).softmax(-1).max(-1)
    right = (best == answers[0]).double()
    want = 0.0
    for low in np.arange(15) / 15:
        inside = (probability >= low) & (probability < low + 1 / 15)
        if inside.any():
            want += float(inside.double().mean()) * abs(float(probability[inside].mean() - right[inside].mean()))
    assert error.percent == pytest.approx(100 * want, rel=1e-4)


def test_rows_that_are_not_finite_and_none_at_all_do_no_harm():
    found, error = Calibration(), CalibrationError()
    assert (found.temperature(), error.percent) == (1.0, 0.0)
    logits, answers = draw(1.0, n=4)
    logits[0, 0, 0], logits[0, 1, 1] = float("nan"), float("inf")
    found.add(logits, answers)
    error.add(logits, answers)
    assert LEAST <= found.temperature() <= MOST
    assert error.percent >= 0


def test_a_run_keeps_its_temperature_and_answers_use_it(tmp_path):
    """With logits ten times too large the temperature is high; it changes probabilities, and no answer."""
    bank = make_bank(D=16)
    bank.save(tmp_path / "bank.safetensors")
    out, json_file = tmp_path / "run", tmp_path / "r.json"
    args = [
        "train",
        "--data",
        str(tmp_path / "bank.safetensors"),
        "--way",
        "3",
        "--query",
        "4",
        "--learner",
        "combined",
    ]
    args += ["--phases", "cross_entropy:2:0.1", "--scale", "100", "--lr", "1e-6", "--episodes", "64", "--quiet"]
    assert main([*args, "--eval-episodes", "200", "--out", str(out)]) == 0
    results = json.loads((out / "results.json").read_text())
    calibration = results["calibration"]
    assert calibration["temperature"] > 2
    assert calibration["error_calibrated"] < calibration["error"] - 3
    assert main(["evaluate", str(out), "--episodes", "200", "--quiet", "--json", str(json_file)]) == 0
    assert json.loads(json_file.read_text())["calibration"] == calibration
    X, y = bank.features[:60].numpy(), bank.labels[:60].numpy()
    calibrated, plain = km.FewShotClassifier(weights=out), km.FewShotClassifier(weights=out, temperature=1)
    found, sure = (c.fit(X[::5], y[::5]).predict_proba(X) for c in (calibrated, plain))
    assert calibrated.temperature_ == calibration["temperature"]
    assert (found.argmax(1) == sure.argmax(1)).all()
    again = found**calibrated.temperature_
    np.testing.assert_allclose(again / again.sum(1, keepdims=True), sure, rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match="temperature: expected a number above 0, got -1"):
        km.FewShotClassifier(temperature=-1).fit(X, y)
