"""What a meta-training run is: everything that its result depends on, apart from the machine."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from kernelmeta.data import EpisodeSampler, FeatureBank
from kernelmeta.data.episodes import parse_balance
from kernelmeta.reference.focal_distillation import DISTANCES
from kernelmeta.training.learners import LEARNERS, SETTINGS, Rows, parse_phases, with_defaults
from kernelmeta.training.settings import (
    MOST_EPISODES,
    MOST_STEPS,
    Settings,
    as_float,
    check_memory,
    check_numbers,
    check_types,
)

# Where a setting is None and the learner has no default of its own.
_DEFAULTS: dict[str, Any] = {"tasks_per_step": 1, "optimizer": "SGD", "lr": 1e-3}
_FILLED_IN: Any = None
# Where another run is updated: of `focal_distillation`.
_UPDATE: dict[str, Any] = {
    "update_distance": "kl", "update_weight": 1.0, "update_alpha": 1.0, "update_beta": 5.0, "update_tau": 100.0,
}  # fmt: skip
_LEAST = {
    "way": 2, "shot": 1, "query": 1, "steps": 0, "tasks_per_step": 1, "episodes": 1, "seed": 0, "hidden": 1,
    "channels": 1, "validate_every": 0, "average": 0,
}  # fmt: skip


@dataclass(frozen=True)
class TrainConfig(Settings):
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
    update_from: str | None = None
    update_distance: str | None = None
    update_weight: float | None = None
    update_alpha: float | None = None
    update_beta: float | None = None
    update_tau: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        filled = with_defaults(self.learner, {name: getattr(self, name) for name in (*SETTINGS, *_DEFAULTS)})
        for name, value in filled.items():
            # The dataclass is frozen for its users; its own defaults are not known before the learner is.
            object.__setattr__(self, name, _DEFAULTS.get(name) if value is None else value)
        for name, value in _UPDATE.items():
            if self.update_from is not None and getattr(self, name) is None:
                object.__setattr__(self, name, value)
            elif self.update_from is None and getattr(self, name) is not None:
                raise ValueError(f"{name}: there is no run to update; give update_from too")
        check_types(self)
        check_numbers(
            self, _LEAST,
            ("inner_lr", "lr", "momentum", "weight_decay", "scale", "update_weight", "update_alpha", "update_beta"),
        )  # fmt: skip
        if self.update_distance not in (None, *DISTANCES):
            raise ValueError(f"update_distance: expected one of {', '.join(DISTANCES)}, got {self.update_distance!r}")
        if self.update_tau is not None and not 0 < as_float(self.update_tau) < math.inf:
            raise ValueError(f"update_tau: expected a temperature above 0, got {self.update_tau}")
        for name, high in (("steps", MOST_STEPS), ("episodes", MOST_EPISODES)):
            value = getattr(self, name)
            if value is not None and value > high:
                raise ValueError(f"{name}: expected at most {high}, got {value}")
        parse_balance(self.query_balance)
        if self.phases is not None:
            parse_phases(self.phases)
        _optimizer_class(self.optimizer)

    @property
    def n_steps(self) -> int:
        """Outer steps: the episodes over the tasks per step, rounded up."""
        return -(-self.episodes // self.tasks_per_step)

    def make_learner(self, n_features: int, image_shape: tuple[int, ...] | None = None, *, copies: int = 1) -> Any:
        """The learner as it is before training; a function of the seed.

        Args:
            n_features, image_shape: of the bank.
            copies: how often its parameters will be held: once, or with gradients and an optimizer's state.

        Raises:
            ValueError: the learner cannot take such rows.
            MemoryError: so many copies would not fit into the machine's memory.
        """
        check_memory(
            f"{self.learner} with {n_features} features"
            + "".join(f", {name} {value}" for name in ("hidden", "channels") if (value := getattr(self, name))),
            copies * self.learner_bytes(n_features, image_shape),
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            head = LEARNERS[self.learner].make(self, Rows(n_features, image_shape))
        if self.norm_stats == "batch":
            head.tasks_together = self.tasks_per_step  # see `tasks_together`
        return head

    def learner_bytes(self, n_features: int, image_shape: tuple[int, ...] | None = None) -> int:
        """What the parameters and buffers of the learner take, at most ``2**63``. Raises ValueError."""
        if max(self.hidden or 0, self.channels or 0) >= 2**31:
            return 2**63
        with torch.device("meta"):
            try:
                head = LEARNERS[self.learner].make(self, Rows(n_features, image_shape))
            except RuntimeError:  # a tensor of more bytes than can be counted
                return 2**63
        tensors = (*head.parameters(), *head.buffers())
        return sum(t.numel() * t.element_size() for t in tensors)

    @property
    def distillation(self) -> dict[str, Any]:
        """Of `focal_distillation`, where another run is updated."""
        return {name.removeprefix("update_"): getattr(self, name) for name in _UPDATE}

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
