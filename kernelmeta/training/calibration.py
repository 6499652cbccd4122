"""Whether a learner's probabilities are what they say: a temperature, and the expected calibration error."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

BINS = 15
LEAST, MOST = 0.05, 20.0  # temperatures
_ELEMENTS = 1 << 22  # logits that a temperature is fitted to, at most
_Floats = np.ndarray[Any, np.dtype[np.float64]]


class Calibration:
    """Takes logits and answers of validation episodes, and tells the temperature that suits them best.

    Guo et al., "On Calibration of Modern Neural Networks" (ICML 2017): logits are divided by one number, which changes
    no answer. It is the one with the least cross entropy; rows whose logits are not finite are left out.
    """

    def __init__(self) -> None:
        self._logits: list[_Floats] = []
        self._answers: list[np.ndarray[Any, Any]] = []
        self._left = _ELEMENTS

    def add(self, logits: Tensor, answers: Tensor) -> None:
        """Logits [T, Q, N] and answers [T, Q]."""
        if self._left <= 0:
            return
        found = logits.detach().flatten(0, 1).double().cpu().numpy()
        finite = np.isfinite(found).all(1)
        self._logits.append(found[finite])
        self._answers.append(answers.flatten().cpu().numpy()[finite])
        self._left -= found.size

    def temperature(self) -> float:
        """Between `LEAST` and `MOST`; 1 where there is nothing to go by."""
        widest = max((own.shape[1] for own in self._logits), default=1)  # tasks of other numbers of classes
        logits = np.concatenate([np.zeros((0, widest)), *(_widened(own, widest) for own in self._logits)])
        if not len(logits):
            return 1.0
        logits = logits - logits.max(1, keepdims=True)
        right = logits[np.arange(len(logits)), np.concatenate(self._answers)].mean()
        low, high = np.log(1 / MOST), np.log(1 / LEAST)
        # The derivative of the cross entropy by the inverse temperature rises: where it is 0, halving finds.
        for _ in range(40):
            middle = (low + high) / 2
            weights = np.exp(np.exp(middle) * logits)
            slope = ((weights * logits).sum(1) / weights.sum(1)).mean() - right
            low, high = (low, middle) if slope > 0 else (middle, high)
        return float(np.exp(-(low + high) / 2))


def _widened(logits: _Floats, n: int) -> _Floats:
    """With classes that have no probability beyond its own, [rows, n]."""
    return np.pad(logits, ((0, 0), (0, n - logits.shape[1])), constant_values=-1e30)


class CalibrationError:
    """The expected calibration error: how far, on average, a probability is from how often such answers are right.

    Args:
        temperature: by which logits are divided.
    """

    def __init__(self, temperature: float = 1.0) -> None:
        self.temperature = temperature
        self._bins = np.zeros((3, BINS))  # rows, the sum of their probabilities, right answers

    def add(self, logits: Tensor, answers: Tensor) -> None:
        """Logits [T, Q, N] and answers [T, Q]; rows whose logits are not finite are left out."""
        finite = logits.isfinite().all(-1)
        kept = logits[finite].double() / self.temperature
        probability, best = kept.softmax(-1).max(-1)
        right = (best == answers[finite]).cpu().numpy()
        values = probability.cpu().numpy()
        place = np.minimum((values * BINS).astype(int), BINS - 1)
        for row, weights in zip(self._bins, (None, values, right), strict=True):
            row += np.bincount(place, weights, BINS)

    @property
    def percent(self) -> float:
        """In percent; 0 where there are no rows."""
        rows, probabilities, right = self._bins
        return 100 * float(np.abs(probabilities - right).sum() / max(1.0, rows.sum()))
