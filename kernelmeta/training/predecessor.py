"""The learner that a run updates: its logits on the run's own episodes, and what flips against it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernelmeta.data import EpisodeSampler, FeatureBank
from kernelmeta.data.files import read_json
from kernelmeta.graceful.flips import Flips, flip_rates
from kernelmeta.training.checkpoint import fingerprint
from kernelmeta.training.config import TrainConfig
from kernelmeta.training.evaluation import TASKS_PER_CALL
from kernelmeta.training.learners import tasks_together
from kernelmeta.training.loading import checksum, for_ways, load_learner
from kernelmeta.training.runs import CONFIG, found
from kernelmeta.training.settings import bounds


@dataclass(frozen=True)
class Predecessor:
    """The old learner, and the features that it takes of the rows that the new one is trained on.

    Args:
        learner: as it was trained; it stays as it is.
        features: [n, D], rows in the order of the new learner's bank.
        fingerprint: tells whether it is the one that a run began with.
    """

    learner: Any
    features: Tensor
    fingerprint: dict[str, Any]

    @torch.no_grad()
    def logits(self, support_index: Tensor, support_labels: Tensor, query_index: Tensor) -> Tensor:
        """[T, Q, N] of the same episodes."""
        logits: Tensor = self.learner.from_bank(self.features, support_index, support_labels, query_index)
        return logits


def load_predecessor(
    path: str | os.PathLike[str],
    config: TrainConfig,
    bank: FeatureBank,
    open_bank: Callable[[dict[str, Any]], FeatureBank],
    *,
    device: str = "cpu",
) -> Predecessor:
    """The learner of a run, to be updated by another one.

    Args:
        path: its run folder or checkpoint.
        config, bank: of the run that updates it.
        open_bank: settings of a run -> its bank, for where the old learner was trained on another one: on the features
            of another backbone, say. The rows must be the same: as many, of the same classes, in the same order.
        device: where its features lie.

    Raises:
        OSError, ValueError: it is missing, is no run, or does not fit: other ways, classes or rows.
    """
    try:
        learner, trained = load_learner(path)
    except (OSError, ValueError) as error:
        reason = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.strerror else error
        raise ValueError(f"update_from: {reason}") from None
    fewest, most = bounds(trained["way"])
    if not fewest <= int(config.way) <= most:
        raise ValueError(f"update_from: {path} was trained on {trained['way']} ways, this run is on {config.way}")
    if getattr(learner, "needs_proportions", False):
        raise ValueError(
            f"update_from: {path} must be told the classes' shares of the query rows; it cannot be updated"
        )
    learner = for_ways(learner, int(config.way))
    together = tasks_together(learner)
    if together not in (None, config.tasks_per_step):
        raise ValueError(
            f"update_from: {path} couples the {together} tasks of a step (norm_stats batch); this run has "
            f"{config.tasks_per_step} tasks a step"
        )
    own = _own_bank(path, trained, config, bank, open_bank)
    if own.n_features != learner.n_features:
        raise ValueError(f"update_from: {path} takes {learner.n_features} features, its bank has {own.n_features}")
    return Predecessor(
        learner.to(device), own.features.to(device), {"checkpoint": checksum(path), "bank": fingerprint(own)}
    )


def _own_bank(
    path: str | os.PathLike[str],
    trained: dict[str, Any],
    config: TrainConfig,
    bank: FeatureBank,
    open_bank: Callable[[dict[str, Any]], FeatureBank],
) -> FeatureBank:
    """The old learner's bank, whose rows are those of the new one's."""
    where = ("data", "weights", "backbone")
    if trained.get("data") is None or all(trained.get(name) == getattr(config, name) for name in where):
        return bank
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    written_to = read_json(folder / CONFIG).get("out") if (folder / CONFIG).exists() else None
    for name in ("data", "weights"):
        if trained.get(name) is not None:
            trained = {**trained, name: found(trained[name], written_to, folder)}
    try:
        own = open_bank(trained)
    except (OSError, ValueError) as error:
        raise ValueError(f"update_from: the data of {path}: {error}") from None
    if own.class_names != bank.class_names or not torch.equal(own.class_split, bank.class_split):
        raise ValueError(
            f"update_from: the classes of {trained['data']}, on which {path} was trained, are not those of "
            f"{config.data} ({len(own.class_names)} and {len(bank.class_names)}; names, order and split must match)"
        )
    if not torch.equal(own.labels, bank.labels):
        raise ValueError(
            f"update_from: the rows of {trained['data']}, on which {path} was trained, are not those of {config.data} "
            f"({len(own.labels)} and {len(bank.labels)}; the labels must match row by row)"
        )
    return own


@torch.no_grad()
def paired_flips(
    learner: Any, features: Tensor, predecessor: Predecessor, sampler: EpisodeSampler, episodes: int
) -> Flips:
    """Flip rates on the first episodes of a sampler, with intervals over episodes.

    A row with NaN or infinite logits counts as wrong, as in `evaluate`. Learners that couple the tasks of a call get as
    many as in training.
    """
    size = tasks_together(learner) or tasks_together(predecessor.learner) or TASKS_PER_CALL
    right: list[list[Tensor]] = [[], []]
    for start in range(0, episodes, size):
        n = min(size, episodes - start)
        exact = tasks_together(learner) or tasks_together(predecessor.learner)
        drawn = [t.to(features.device) for t in sampler.draw(start, exact or n)]
        support_index, support_labels, query_index, answers = drawn
        both = (
            learner.from_bank(features, support_index, support_labels, query_index),
            predecessor.logits(support_index, support_labels, query_index),
        )
        for logits, kept in zip(both, right, strict=True):
            kept.append(((logits.argmax(-1) == answers) & logits.isfinite().all(-1))[:n].cpu())
    new, old = (torch.cat(kept) for kept in right)
    return flip_rates(new, old, torch.ones_like(new))


def percentages(flips: Flips) -> dict[str, Any]:
    """As results.json has them, in percent; ``relative_negative`` is percent of what chance alone would flip."""
    rates = {name: getattr(flips, name) for name in flips.ci95._fields}
    half = {f"{name}_ci95": value for name, value in flips.ci95._asdict().items()}
    return {name: None if value != value else 100 * value for name, value in (rates | half).items()}


def flips_line(flips: Flips, path: str) -> str:
    """One line to read."""
    rates, half = flips, flips.ci95
    relative = "" if rates.relative_negative != rates.relative_negative else f", relative {rates.relative_negative:.2f}"
    return (
        f"against {path}: negative flips {100 * rates.negative:.2f} ± {100 * half.negative:.2f} %{relative}; positive "
        f"{100 * rates.positive:.2f} ± {100 * half.positive:.2f} %; error {100 * rates.error_old:.2f} -> "
        f"{100 * rates.error_new:.2f} %"
    )
