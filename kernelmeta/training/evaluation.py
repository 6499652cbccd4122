"""Accuracy of several learners on the same episodes, with intervals and paired differences."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from kernelmeta import nn
from kernelmeta.backends import select
from kernelmeta.data.episodes import EpisodeSampler
from kernelmeta.training.learners import LEARNERS, inner_steps

Learner = Callable[[Tensor, Tensor, Tensor], Tensor]
TASKS_PER_CALL = 64


@torch.no_grad()
def episode_accuracies(
    learners: Mapping[str, Learner],
    features: Tensor,
    sampler: EpisodeSampler,
    episodes: int,
    *,
    first: int = 0,
    progress: bool = False,
) -> dict[str, Tensor]:
    """Share of right answers, [E] float64 on the CPU, for every learner on the same episodes.

    Args:
        learners: name -> f(support [T, S, D], labels [T, S], query [T, Q, D]) -> logits [T, Q, N].
        features: [n, D], those of the sampler's bank.
        first, episodes: the episodes are numbers first .. first+episodes-1 of the sampler.

    A row with NaN among its logits counts as wrong.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in learners}
    bar = tqdm(total=episodes, desc="evaluate", unit="episode", disable=not progress)
    for start in range(first, first + episodes, TASKS_PER_CALL):
        n = min(TASKS_PER_CALL, first + episodes - start)
        support_index, labels, query_index, answers = (t.to(features.device) for t in sampler.draw(start, n))
        support, query = features[support_index], features[query_index]
        for name, learner in learners.items():
            logits = learner(support, labels, query)
            right = (logits.argmax(-1) == answers) & ~logits.isnan().any(-1)
            found[name].append(right.double().mean(1).cpu())
        bar.update(n)
    bar.close()
    return {name: torch.cat(parts) for name, parts in found.items()}


def interval(values: Tensor) -> tuple[float, float]:
    """Mean and half of the 95 % interval of the mean, 1.96 s / sqrt(E), in percent."""
    return 100 * float(values.mean()), 196 * float(values.std()) / math.sqrt(len(values))


def evaluate(
    head: Any,
    features: Tensor,
    sampler: EpisodeSampler,
    episodes: int,
    *,
    learner: str = "sib",
    progress: bool = False,
) -> dict[str, Any]:
    """A trained learner beside prototypes and soft k-means, and its accuracy after every number of steps up
    to K, where that is quick to tell.

    Args:
        head: the trained learner.
        features: [n, D], those of the sampler's bank.
        learner: its name in `LEARNERS`.
        progress: show a bar.

    Returns:
        In percent: ``accuracy, ci95``; ``baselines: {prototypes, soft_kmeans: {accuracy, ci95, difference,
        difference_ci95}}`` (learner minus baseline, paired by episode); ``accuracy_over_steps``, a list of
        ``{steps, accuracy, ci95}``; also ``learner, episodes, way, shot, query,
        steps, seconds, backend``. ``steps`` is 0 for a learner without any.

    Raises:
        ValueError: fewer than two episodes: there is no interval.
    """
    if episodes < 2:
        raise ValueError(f"episodes: expected at least 2, got {episodes}")
    began = time.perf_counter()
    D = features.shape[1]
    learners: dict[str, Learner] = {
        "prototypes": nn.Prototypes(sampler.way, D).to(features.device),
        "soft_kmeans": nn.SoftKMeans(sampler.way, D),
    }
    last = inner_steps(head)
    counts = range(last + 1) if LEARNERS[learner].over_steps else (last,)
    for steps in counts:
        learners[f"steps {steps}"] = head if steps == last else _after(head, steps)
    values = episode_accuracies(learners, features, sampler, episodes, progress=progress)

    own = values[f"steps {last}"]
    accuracy, ci95 = interval(own)
    baselines = {}
    for name in ("prototypes", "soft_kmeans"):
        (level, level_ci95), (difference, difference_ci95) = (
            interval(values[name]),
            interval(own - values[name]),
        )
        baselines[name] = {
            "accuracy": level,
            "ci95": level_ci95,
            "difference": difference,
            "difference_ci95": difference_ci95,
        }
    curve = [(steps, *interval(values[f"steps {steps}"])) for steps in counts]
    return {
        "learner": learner,
        "episodes": episodes,
        "way": sampler.way,
        "shot": sampler.shot,
        "query": sampler.query,
        "steps": last,
        "accuracy": accuracy,
        "ci95": ci95,
        "baselines": baselines,
        "accuracy_over_steps": [dict(zip(("steps", "accuracy", "ci95"), row, strict=True)) for row in curve],
        "seconds": time.perf_counter() - began,
        "backend": select(features.device.type),
    }


def _after(head: Any, steps: int) -> Learner:
    def run(support: Tensor, labels: Tensor, query: Tensor) -> Tensor:
        trained, head.steps = head.steps, steps
        try:
            logits: Tensor = head(support, labels, query)
            return logits
        finally:
            head.steps = trained

    return run


def title(results: dict[str, Any]) -> str:
    """The learner, as a table or a plot calls it."""
    steps = f", K = {results['steps']}" if results["steps"] else ""
    return LEARNERS[results["learner"]].title + steps


def table(results: dict[str, Any]) -> str:
    """Three lines to read: the learner and its two baselines."""
    own = title(results)
    width = max(14, len(own) + 2)
    rows = []
    for name, text in (("prototypes", "prototypes"), ("soft_kmeans", "soft k-means")):
        row = results["baselines"][name]
        rows.append(
            f"{text:<{width}}{row['accuracy']:7.2f} ± {row['ci95']:.2f} %"
            f"   {own.partition(',')[0]} is {row['difference']:+.2f} ± {row['difference_ci95']:.2f} points ahead"
        )
    return "\n".join([*rows, f"{own:<{width}}{results['accuracy']:7.2f} ± {results['ci95']:.2f} %"])
