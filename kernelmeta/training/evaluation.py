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
from kernelmeta.training.calibration import CalibrationError
from kernelmeta.training.learners import LEARNERS, TITLES, inner_steps, tasks_together
from kernelmeta.training.loading import at_text
from kernelmeta.training.proportions import query_shares

Learner = Callable[..., Tensor]
TASKS_PER_CALL = 64
# The most numbers of steps after which the accuracy is told.
_MOST_COUNTS = 50


class Accuracies(dict[str, Tensor]):
    """Share of right answers, [E] float64 on the CPU, by learner.

    Attributes:
        rows: query rows of the episodes, together.
        not_finite: learner -> how many of them had NaN or infinite logits. Such a row counts as wrong.
    """

    rows: int
    not_finite: dict[str, int]

    def warning(self, titles: Mapping[str, str] | None = None) -> str:
        """What to tell a reader about logits that are not finite; empty if all are."""
        bad = [f"{(titles or {}).get(name, name)} {n}" for name, n in self.not_finite.items() if n]
        if not bad:
            return ""
        return f"of {self.rows} query rows, some have NaN or infinite logits and count as wrong: {', '.join(bad)}"


@torch.no_grad()
def episode_accuracies(
    learners: Mapping[str, Learner],
    features: Tensor,
    sampler: EpisodeSampler,
    episodes: int,
    *,
    first: int = 0,
    progress: bool = False,
    each: Callable[[str, Tensor, Tensor], None] | None = None,
    proportions: bool = False,
) -> Accuracies:
    """Share of right answers for every learner on the same episodes.

    A learner whose BatchNorm takes its statistics over the tasks of a call is called with as many as in training, see
    `tasks_together`; the last call too, of which what is beyond the episodes asked for is left out.

    Args:
        learners: name -> f(support [T, S, D], labels [T, S], query [T, Q, D]) -> logits [T, Q, N].
        features: [n, D], those of the sampler's bank.
        first, episodes: the episodes are numbers first .. first+episodes-1 of the sampler.
        each: takes a learner's name, its logits [T, Q, N] and the answers [T, Q], some episodes at a time.
        proportions: tell those learners that take them (``takes_proportions``) the classes' shares of the query rows;
            those that need them (``needs_proportions``) are told in any case.

    A row with NaN or infinite logits counts as wrong.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in learners}
    bad = dict.fromkeys(learners, 0)
    together = {name: tasks_together(learner) for name, learner in learners.items()}
    sizes = sorted({n or 0 for n in together.values()})
    with tqdm(total=episodes * len(sizes), desc="evaluate", unit="episode", disable=not progress) as bar:
        for size in sizes:
            some = {name: learner for name, learner in learners.items() if (together[name] or 0) == size}
            for start in range(first, first + episodes, size or TASKS_PER_CALL):
                n = min(size or TASKS_PER_CALL, first + episodes - start)
                drawn = sampler.draw(start, size or n)
                support_index, labels, query_index, answers = (t.to(features.device) for t in drawn)
                support, query = features[support_index], features[query_index]
                for name, learner in some.items():
                    told = {}
                    takes = proportions and getattr(learner, "takes_proportions", False)
                    if takes or getattr(learner, "needs_proportions", False):
                        told["proportions"] = query_shares(answers, sampler.way)
                    logits = learner(support, labels, query, **told)[:n]
                    finite = logits.isfinite().all(-1)
                    right = (logits.argmax(-1) == answers[:n]) & finite
                    found[name].append(right.double().mean(1).cpu())
                    bad[name] += int((~finite).sum())
                    if each is not None:
                        each(name, logits, answers[:n])
                bar.update(n)
    values = Accuracies({name: torch.cat(parts) for name, parts in found.items()})
    values.rows, values.not_finite = episodes * sampler.way * sampler.query, bad
    return values


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
    temperature: float = 1.0,
    progress: bool = False,
) -> dict[str, Any]:
    """A trained learner beside prototypes and soft k-means, and its accuracy after every number of steps up
    to K, where that is quick to tell.

    Args:
        head: the trained learner.
        features: [n, D], those of the sampler's bank.
        learner: its name in `LEARNERS`.
        temperature: of its probabilities, as its validation episodes have it.
        progress: show a bar.

    Returns:
        In percent: ``accuracy, ci95``; ``baselines: {prototypes, soft_kmeans: {accuracy, ci95, difference,
        difference_ci95}}`` (learner minus baseline, paired by episode); ``accuracy_over_steps``, a list of
        ``{steps, accuracy, ci95}``; also ``learner, episodes, way, shot, query, steps, seconds, backend``. ``steps`` is
        0 for a learner without any; ``proportions_known`` says whether the learner was told the classes' shares of the
        query rows, which the baselines never are. ``tasks_per_call`` is how many tasks shared a call, which matters for
        ``norm_stats="batch"`` alone; ``calibration`` is ``{temperature, error, error_calibrated}``, the expected
        calibration error without the temperature and with it, in percent; ``not_finite`` says of the learner and its
        baselines how many of the ``query_rows`` had NaN or infinite logits.

    Raises:
        ValueError: fewer than two episodes: there is no interval.
    """
    if episodes < 2:
        raise ValueError(f"episodes: expected at least 2, got {episodes}")
    began = time.perf_counter()
    D = features.shape[1]
    # On the same features as the learner.
    of_features: dict[str, Any] = {name: getattr(head, name, "none") for name in ("transform", "center")}
    untrained: dict[str, nn.Prototypes | nn.SoftKMeans] = {
        "prototypes": nn.Prototypes(sampler.way, D, **of_features),
        "soft_kmeans": nn.SoftKMeans(sampler.way, D, **of_features),
    }
    for baseline in untrained.values():
        baseline.train_mean = getattr(head, "train_mean", None)
    learners: dict[str, Learner] = {name: baseline.to(features.device) for name, baseline in untrained.items()}
    last = inner_steps(head)
    counts = _counts(last) if LEARNERS[learner].over_steps else [last]
    for steps in counts:
        learners[f"steps {steps}"] = head if steps == last else _After(head, steps)
    errors = [CalibrationError(), CalibrationError(temperature)]

    def add(name: str, logits: Tensor, answers: Tensor) -> None:
        if name == f"steps {last}":
            for error in errors:
                error.add(logits, answers)

    values = episode_accuracies(learners, features, sampler, episodes, progress=progress, each=add)

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
    not_finite = {"own": values.not_finite[f"steps {last}"]}
    not_finite |= {name: values.not_finite[name] for name in baselines}
    curve = [(steps, *interval(values[f"steps {steps}"])) for steps in counts]
    return {
        "learner": learner,
        **of_features,
        "episodes": episodes,
        "way": sampler.way,
        "shot": sampler.shot,
        "query": sampler.query,
        "steps": last,
        "proportions_known": getattr(head, "needs_proportions", False),
        "accuracy": accuracy,
        "ci95": ci95,
        "baselines": baselines,
        "accuracy_over_steps": [dict(zip(("steps", "accuracy", "ci95"), row, strict=True)) for row in curve],
        "calibration": {
            "temperature": temperature,
            "error": errors[0].percent,
            "error_calibrated": errors[1].percent,
        },
        "tasks_per_call": tasks_together(head) or TASKS_PER_CALL,
        "query_rows": values.rows,
        "not_finite": not_finite,
        "seconds": time.perf_counter() - began,
        "backend": select(features.device.type),
    }


def _counts(last: int) -> list[int]:
    """0 to ``last``; some of these, evenly spread, where they are many."""
    n = min(last, _MOST_COUNTS)
    return sorted({round(i * last / max(1, n)) for i in range(n + 1)})


class _After:
    """A learner after fewer steps."""

    def __init__(self, head: Any, steps: int) -> None:
        self.head, self.steps, self.tasks_together = head, steps, tasks_together(head)

    def __call__(self, support: Tensor, labels: Tensor, query: Tensor) -> Tensor:
        trained, self.head.steps = self.head.steps, self.steps
        try:
            logits: Tensor = self.head(support, labels, query)
            return logits
        finally:
            self.head.steps = trained


def title(results: dict[str, Any]) -> str:
    """The learner, as a table or a plot calls it."""
    steps = f", K = {results['steps']}" if results["steps"] else ""
    return TITLES[results["learner"]] + steps


def ahead(difference: float, ci95: float) -> str:
    """ "0.77 ± 0.30 points ahead", or behind."""
    shown = f"{abs(difference):.2f}"
    if shown == "0.00":
        return f"level (± {ci95:.2f} points)"
    return f"{shown} ± {ci95:.2f} points {'ahead' if difference > 0 else 'behind'}"


def table(results: dict[str, Any]) -> str:
    """Lines to read: the learner and its two baselines; what was not finite."""
    own = title(results)
    width = max(14, len(own) + 2)
    features = [f"{name} {results[name]}" for name in ("transform", "center") if results.get(name, "none") != "none"]
    lines = [f"features of all: {', '.join(features)}"] if features else []
    for name, row in results["baselines"].items():
        lines.append(
            f"{TITLES[name]:<{width}}{row['accuracy']:7.2f} ± {row['ci95']:.2f} %"
            f"   {own.partition(',')[0]} is {ahead(row['difference'], row['difference_ci95'])}"
        )
    lines.append(f"{own:<{width}}{results['accuracy']:7.2f} ± {results['ci95']:.2f} %")
    if results.get("proportions_known"):
        lines.append(f"{own.partition(',')[0]} is told the classes' shares of the query rows, the others not")
    if "at" in results:
        lines.append(f"{own.partition(',')[0]}'s weights: {at_text(results)}")
    calibration = results["calibration"]
    lines.append(
        f"calibration error {calibration['error']:.1f} %"
        + (
            f"; {calibration['error_calibrated']:.1f} % with temperature {calibration['temperature']:.2f}"
            if calibration["temperature"] != 1
            else ""
        )
    )
    counted = Accuracies()
    counted.rows, counted.not_finite = results["query_rows"], results["not_finite"]
    warning = counted.warning({**TITLES, "own": own})
    return "\n".join([*lines, warning] if warning else lines)
