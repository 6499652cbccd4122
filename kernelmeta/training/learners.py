"""The learners that can be trained: what each is called, which settings it takes, how it is built.

To add one: an entry in `LEARNERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

from kernelmeta import nn as km_nn
from kernelmeta.training.settings import MOST_STEPS, bounds

# Settings of a run that only some learners take.
SETTINGS = (
    "steps",
    "inner_lr",
    "phases",
    "classifier",
    "start",
    "scale",
    "hidden",
    "norm_stats",
    "reduction",
    "first_order",
    "learn_rates",
    "channels",
    "transform",
    "center",
)


class Rows(NamedTuple):
    """What the rows of a bank are."""

    n_features: int
    image_shape: tuple[int, ...] | None = None


@dataclass(frozen=True)
class LearnerKind:
    """One kind of learner.

    Args:
        title: as tables print it.
        build: makes the module, untrained: takes the rows, ``way`` and the settings in ``defaults``.
        defaults: the `SETTINGS` that it takes, and what they are if not given.
        training: defaults of settings that all learners have (the optimizer's, say) where they differ.
        over_steps: after training, K may be lowered (``module.steps``) to see the accuracy after fewer steps.
        whole_network: each task takes long, on several threads, instead of microseconds on one.
    """

    title: str
    build: Callable[..., Any]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    over_steps: bool = False
    whole_network: bool = False

    def make(self, config: Any, rows: Rows) -> Any:
        """The module for a configuration, an object with ``way`` and those settings as attributes; for as many classes
        as an episode has at most.
        """
        return self.build(rows, bounds(config.way)[1], **{name: getattr(config, name) for name in self.defaults})


def _prototypes(rows: Rows, way: int, **features: str) -> nn.Module:
    return km_nn.Prototypes(way, rows.n_features, **features)


def _anil(rows: Rows, way: int, **settings: Any) -> nn.Module:
    return km_nn.ANIL(way, rows.n_features, **settings)


def _ridge(rows: Rows, way: int, **features: Any) -> nn.Module:
    return km_nn.RidgeHead(way, rows.n_features, **features)


def parse_phases(text: str, learn_rates: bool = False) -> list[km_nn.Phase]:
    """ "cross_entropy:5:0.1,assignment:3:0.01:given" -> phases: oracle, steps, rate, marginals where they are not the
    oracle's own. Raises ValueError.
    """
    phases = []
    for part in text.split(","):
        words = part.strip().split(":")
        try:
            oracle, steps, lr, marginals = words[0], int(words[1]), float(words[2]), [*words[3:], None][0]
            if len(words) > 4:
                raise ValueError
        except (IndexError, ValueError):
            raise ValueError(
                f"phases: expected ORACLE:STEPS:RATE, MARGINALS behind it or not, or several with commas, got {text!r}"
            ) from None
        phases.append(km_nn.Phase(oracle, steps, lr, learn_rates=learn_rates, marginals=marginals))
    if sum(phase.steps for phase in phases) > MOST_STEPS:
        raise ValueError(f"phases: expected at most {MOST_STEPS} steps, got {text!r}")
    return phases


def _program(rows: Rows, way: int, phases: str, learn_rates: bool, **settings: Any) -> nn.Module:
    return km_nn.Program(way, rows.n_features, parse_phases(phases, learn_rates), **settings)


def _lqf(rows: Rows, way: int, **settings: Any) -> nn.Module:
    return km_nn.LQF(way, rows.n_features, **settings)


def _sib(rows: Rows, way: int, **settings: Any) -> nn.Module:
    return km_nn.SIB(way, rows.n_features, **settings)


def _equivariant(rows: Rows, way: int, **settings: Any) -> nn.Module:
    return km_nn.EquivariantSIB(way, rows.n_features, **settings)


def _maml(rows: Rows, way: int, steps: int, inner_lr: float, channels: int, hidden: int, **orders: Any) -> nn.Module:
    network = _network(rows, way, channels, hidden)
    # Eight tasks of 80 images at a time take about 100 MB a layer.
    return km_nn.MAML(network, way, steps, inner_lr, chunk_size=8, n_features=rows.n_features, **orders)


def _network(rows: Rows, way: int, channels: int, hidden: int) -> nn.Module:
    """Conv-4 and a linear layer for images; one hidden layer for features."""
    if rows.image_shape is None:
        return nn.Sequential(
            nn.LayerNorm(rows.n_features, elementwise_affine=False),
            nn.Linear(rows.n_features, hidden),
            nn.ReLU(),
            nn.Linear(hidden, way),
        )
    in_channels, height, width = rows.image_shape
    if min(height, width) < 16:
        raise ValueError(f"learner: maml needs images of at least 16 x 16 pixels, got {height} x {width}")
    backbone = km_nn.Conv4(channels, in_channels)
    head = nn.Linear(backbone.n_features(height, width), way)
    return nn.Sequential(nn.Unflatten(1, rows.image_shape), backbone, head)


_ADAM = {"optimizer": "Adam", "tasks_per_step": 4}
_FEATURES = {"transform": "none", "center": "none"}
LEARNERS: dict[str, LearnerKind] = {
    "prototypes": LearnerKind("prototypes", _prototypes, _FEATURES),
    "anil": LearnerKind(
        "ANIL",
        _anil,
        {"steps": 20, "inner_lr": 0.5, "first_order": False, "learn_rates": False, **_FEATURES},
        _ADAM,
    ),
    "maml": LearnerKind(
        "MAML",
        _maml,
        {
            "steps": 5,
            "inner_lr": 0.1,
            "first_order": False,
            "learn_rates": False,
            "channels": 32,
            "hidden": 64,
        },
        _ADAM,
        whole_network=True,
    ),
    "ridge": LearnerKind("ridge", _ridge, _FEATURES, _ADAM),
    "lqf": LearnerKind("LQF", _lqf, {"hidden": 64, **_FEATURES}, _ADAM),
    "sib": LearnerKind(
        "SIB",
        _sib,
        {"steps": 3, "inner_lr": 1e-3, "hidden": None, "norm_stats": "task", **_FEATURES},
        over_steps=True,
    ),
    "equivariant": LearnerKind(
        "equivariant SIB",
        _equivariant,
        {"steps": 3, "inner_lr": 1e-2, "hidden": 16, "norm_stats": "task", **_FEATURES},
        {"optimizer": "Adam", "lr": 1e-3, "tasks_per_step": 16},
        over_steps=True,
    ),
    "combined": LearnerKind(
        "combined",
        _program,
        {
            "phases": "cross_entropy:20:0.1,synthetic_gradient:3:0.001",
            "classifier": "cosine",
            "start": "class_means",
            "scale": 10.0,
            "learn_rates": False,
            "hidden": None,
            "norm_stats": "task",
            "reduction": None,
            **_FEATURES,
        },
    ),
}


# What tables and plots call them; soft k-means is a baseline, there is nothing to train in it.
SOFT_KMEANS = "soft_kmeans"
TITLES = {SOFT_KMEANS: "soft k-means", **{name: kind.title for name, kind in LEARNERS.items()}}


def tasks_together(learner: Any) -> int | None:
    """How many tasks a call must have for a learner to do what it was trained to do; None where any number will do.

    ``norm_stats="batch"`` couples the tasks of a call: with other numbers of them the logits of a task are others.
    """
    together: int | None = getattr(learner, "tasks_together", None)
    return together


def inner_steps(head: Any) -> int:
    """K of a learner, of all its phases together; 0 where it has none."""
    if hasattr(head, "phases"):
        return sum(phase.steps for phase in head.phases)
    return int(getattr(head, "steps", 0))


def with_defaults(learner: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with the learner's defaults in the place of None.

    Raises:
        ValueError: there is no such learner, or a setting that it does not take is not None.
    """
    if learner not in LEARNERS:
        raise ValueError(f"learner: expected one of {', '.join(LEARNERS)}, got {learner!r}")
    kind = LEARNERS[learner]
    filled = dict(settings)
    for name, default in {**kind.defaults, **kind.training}.items():
        if filled[name] is None:
            filled[name] = default
    for name in SETTINGS:
        if name not in kind.defaults and filled[name] is not None:
            raise ValueError(f"{name}: the learner {learner!r} takes no such setting, got {filled[name]}")
    return filled
