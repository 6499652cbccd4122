"""What a meta-training run is: everything that its result depends on, apart from the machine."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from kernelmeta.data import EpisodeSampler, FeatureBank
from kernelmeta.data.episodes import parse_balance
from kernelmeta.training.learners import LEARNERS, SETTINGS, Rows, parse_phases, with_defaults

# Where a setting is None and the learner has no default of its own.
_DEFAULTS: dict[str, Any] = {"tasks_per_step": 1, "optimizer": "SGD", "lr": 1e-3}
_FILLED_IN: Any = None
_LEAST = {
    "way": 2, "shot": 1, "query": 1, "steps": 0, "tasks_per_step": 1, "episodes": 1, "seed": 0, "hidden": 1,
    "channels": 1, "validate_every": 0, "average": 0,
}  # fmt: skip


@dataclass(frozen=True)
class TrainConfig:
    """Settings of `kernelmeta train`; the defaults are the published ones (of SIB: one task a step).

    Where the default is None, it is the learner's own (see `LEARNERS`), and filled in; it stays None where the learner
    takes no such setting.

    Raises:
        ValueError: a setting out of its range, named, or one that the learner does not take.
    """

    data: str = "glyphs"
    backbone: str | None = None
    weights: str | None = None
    way: int = 5
    shot: int = 1
    query: int = 15
    query_balance: str = "even"
    learner: str = "sib"
    steps: int | None = None
    inner_lr: float | None = None
    phases: str | None = None
    classifier: str | None = None
    start: str | None = None
    scale: float | None = None
    hidden: int | None = None
    norm_stats: str | None = None
    first_order: bool | None = None
    learn_rates: bool | None = None
    channels: int | None = None
    episodes: int = 50_000
    tasks_per_step: int = _FILLED_IN
    optimizer: str = _FILLED_IN
    lr: float = _FILLED_IN
    momentum: float = 0.9
    weight_decay: float = 5e-4
    average: int = 0
    validate_every: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        filled = with_defaults(self.learner, {name: getattr(self, name) for name in (*SETTINGS, *_DEFAULTS)})
        for name, value in filled.items():
            # The dataclass is frozen for its users; its own defaults are not known before the learner is.
            object.__setattr__(self, name, _DEFAULTS.get(name) if value is None else value)
        for name, low in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"{name}: expected at least {low}, got {value}")
        for name in ("inner_lr", "lr", "momentum", "weight_decay", "scale"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise ValueError(f"{name}: expected a number of at least 0, got {value}")
        parse_balance(self.query_balance)
        if self.phases is not None:
            parse_phases(self.phases)
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

    def make_learner(self, n_features: int, image_shape: tuple[int, ...] | None = None) -> Any:
        """The learner as it is before training; a function of the seed.

        Args:
            n_features, image_shape: of the bank.

        Raises:
            ValueError: the learner cannot take such rows.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return LEARNERS[self.learner].make(self, Rows(n_features, image_shape))

    def make_sampler(self, bank: FeatureBank, split: str) -> EpisodeSampler:
        """The episodes of a split. Raises ValueError if the bank has not enough for them."""
        return EpisodeSampler(
            bank,
            split,
            way=self.way,
            shot=self.shot,
            query=self.query,
            balance=self.query_balance,
            seed=self.seed,
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
