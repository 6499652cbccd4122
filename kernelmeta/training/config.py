"""What a meta-training run is: everything that its result depends on, apart from the machine."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from kernelmeta import nn
from kernelmeta.data.episodes import parse_balance

LEARNERS = ("sib",)


@dataclass(frozen=True)
class TrainConfig:
    """Settings of `kernelmeta train`; the defaults are the published ones (one task a step).

    Raises:
        ValueError: a setting out of its range, named.
    """

    data: str = "glyphs"
    backbone: str | None = None
    weights: str | None = None
    way: int = 5
    shot: int = 1
    query: int = 15
    query_balance: str = "even"
    learner: str = "sib"
    steps: int = 3
    inner_lr: float = 1e-3
    hidden: int | None = None
    norm_stats: str = "task"
    episodes: int = 50_000
    tasks_per_step: int = 1
    optimizer: str = "SGD"
    lr: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 5e-4
    validate_every: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"way": 2, "shot": 1, "query": 1, "steps": 0, "tasks_per_step": 1, "episodes": 1, "seed": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name}: expected at least {low}, got {getattr(self, name)}")
        for name in ("inner_lr", "lr", "momentum", "weight_decay"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: expected a number of at least 0, got {getattr(self, name)}")
        for name in ("hidden", "validate_every"):
            value = getattr(self, name)
            if value is not None and value < (1 if name == "hidden" else 0):
                raise ValueError(f"{name}: expected at least {1 if name == 'hidden' else 0}, got {value}")
        if self.learner not in LEARNERS:
            raise ValueError(f"learner: expected one of {', '.join(LEARNERS)}, got {self.learner!r}")
        parse_balance(self.query_balance)
        _optimizer_class(self.optimizer)

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> TrainConfig:
        """From what `to_dict` gave; other keys are left aside. Raises ValueError."""
        names = {field.name for field in fields(cls)}
        try:
            return cls(**{name: value for name, value in settings.items() if name in names})
        except TypeError as error:
            raise ValueError(f"config: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """The settings, as JSON takes them."""
        return asdict(self)

    @property
    def n_steps(self) -> int:
        """Outer steps: the episodes over the tasks per step, rounded up."""
        return -(-self.episodes // self.tasks_per_step)

    def make_learner(self, n_features: int) -> nn.SIB:
        """The learner as it is before training; a function of the seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return nn.SIB(
                n_way=self.way,
                n_features=n_features,
                steps=self.steps,
                inner_lr=self.inner_lr,
                hidden=self.hidden,
                norm_stats=self.norm_stats,
            )

    def make_optimizer(self, parameters: Iterable[Tensor]) -> Optimizer:
        """Any optimizer of torch.optim; SGD is Nesterov's. Fused where there is such a kernel."""
        kind = _optimizer_class(self.optimizer)
        accepted = inspect.signature(kind).parameters
        wanted: dict[str, Any] = {"lr": self.lr, "weight_decay": self.weight_decay, "fused": True}
        if kind is torch.optim.SGD:
            wanted |= {"momentum": self.momentum, "nesterov": self.momentum > 0}
        optimizer: Optimizer = kind(
            list(parameters), **{name: value for name, value in wanted.items() if name in accepted}
        )
        return optimizer


def _optimizer_class(name: str) -> Any:
    kind = getattr(torch.optim, name, None)
    if not (isinstance(kind, type) and issubclass(kind, Optimizer) and kind is not Optimizer):
        raise ValueError(f"optimizer: expected the name of one of torch.optim, such as SGD or Adam, got {name!r}")
    if kind is torch.optim.LBFGS:
        raise ValueError("optimizer: LBFGS needs a closure, which the trainer does not give")
    return kind
