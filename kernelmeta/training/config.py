"""What a meta-training run is: everything that its result depends on, apart from the machine."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from kernelmeta.data import EpisodeSampler, FeatureBank, RaggedEpisodeSampler
from kernelmeta.data.episodes import parse_balances
from kernelmeta.reference.focal_distillation import DISTANCES
from kernelmeta.training.learners import LEARNERS, SETTINGS, Rows, parse_phases, with_defaults
from kernelmeta.training.settings import (
    MOST_EPISODES,
    MOST_STEPS,
    Settings,
    Size,
    as_float,
    as_size,
    bounds,
    check_memory,
    check_numbers,
    check_types,
)
from kernelmeta.transforms import check_center, parse_power

# Where a setting is None and the learner has no default of its own.
_DEFAULTS: dict[str, Any] = {"tasks_per_step": 1, "optimizer": "SGD", "lr": 1e-3}
_FILLED_IN: Any = None
SCHEDULES = ("constant", "one_cycle")
# Of the training, in which the rate of one_cycle rises, and how far below its most it begins.
_RISE, _BELOW = 0.1, 25.0
# Settings that are one number for all episodes, or drawn for each, and the least that they can be.
SIZES = {"way": 2, "shot": 1, "query": 1}
# Where another run is updated: of `focal_distillation`.
_UPDATE: dict[str, Any] = {
    "update_distance": "kl", "update_weight": 1.0, "update_alpha": 1.0, "update_beta": 5.0, "update_tau": 100.0,
}  # fmt: skip
_LEAST = {
    "steps": 0, "tasks_per_step": 1, "episodes": 1, "seed": 0, "hidden": 1,
    "channels": 1, "validate_every": 0, "average": 0,
}  # fmt: skip

# Units, channels, features: learners with no more of each fit into any machine. (PyTorch takes most of a second to get
# ready for tensors without memory, by which larger ones are counted.)
_SMALL = 4096


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
    way: Size = 5
    shot: Size = 1
    query: Size = 15
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
    reduction: str | None = None
    first_order: bool | None = None
    learn_rates: bool | None = None
    channels: int | None = None
    transform: str | None = None
    center: str | None = None
    episodes: int = 50_000
    tasks_per_step: int = _FILLED_IN
    optimizer: str = _FILLED_IN
    lr: float = _FILLED_IN
    schedule: str = "constant"
    clip: float | None = None
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
        for name, least in SIZES.items():
            object.__setattr__(self, name, as_size(name, getattr(self, name), least))
        if self.uneven and self.update_from is not None:
            raise ValueError("update_from: expected episodes of one size; way, shot and query must be one number each")
        check_types(self)
        check_numbers(
            self, _LEAST,
            ("inner_lr", "lr", "clip", "momentum", "weight_decay", "scale", "update_weight", "update_alpha",
             "update_beta"),
        )  # fmt: skip
        if self.update_distance not in (None, *DISTANCES):
            raise ValueError(f"update_distance: expected one of {', '.join(DISTANCES)}, got {self.update_distance!r}")
        if self.update_tau is not None and not 0 < as_float(self.update_tau) < math.inf:
            raise ValueError(f"update_tau: expected a temperature above 0, got {self.update_tau}")
        for name, high in (("steps", MOST_STEPS), ("episodes", MOST_EPISODES)):
            value = getattr(self, name)
            if value is not None and value > high:
                raise ValueError(f"{name}: expected at most {high}, got {value}")
        parse_balances(self.query_balance)
        parse_power(self.transform or "none")
        check_center(self.center or "none")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule: expected one of {', '.join(SCHEDULES)}, got {self.schedule!r}")
        if self.clip is not None and self.clip <= 0:
            raise ValueError(f"clip: expected a number above 0, got {self.clip}")
        if self.phases is not None:
            parse_phases(self.phases)
        _optimizer_class(self.optimizer)

    @property
    def uneven(self) -> bool:
        """Whether episodes differ in size: some of `SIZES` are ranges."""
        return any(isinstance(getattr(self, name), str) for name in SIZES)

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
        ways = bounds(self.way)[1]
        if max(self.hidden or 8 * ways, self.channels or 0, n_features) > _SMALL:
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

    def make_sampler(self, bank: FeatureBank, split: str) -> EpisodeSampler | RaggedEpisodeSampler:
        """The episodes to train on, of a split. Raises ValueError if the bank has not enough for them."""
        if self.uneven:
            return RaggedEpisodeSampler(
                bank, split, ways=bounds(self.way), shots=bounds(self.shot), queries=bounds(self.query),
                balance=self.query_balance, same_shots=True, seed=self.seed,
            )  # fmt: skip
        return self._cell(bank, split, int(self.way), int(self.shot), self.query_balance)

    def cells(self, bank: FeatureBank, split: str) -> dict[str, EpisodeSampler]:
        """The episodes to judge by, of a split: name -> those of one size and balance.

        Where episodes are drawn between two sizes, these are the least and the most ways (as many classes as the split
        has, at most) and one between them, the least and the most shots, and the most query rows; and where there are
        several balances, each of them. One cell else.

        Raises:
            ValueError: the bank has not enough for them.
        """
        (fewest, most), shots = bounds(self.way), sorted(set(bounds(self.shot)))
        ways = [fewest]
        if most > fewest:
            most = max(fewest, min(most, len(bank.classes(split))))
            ways = sorted({fewest, round(math.sqrt(fewest * most)), most})
        balances = [word.strip() for word in self.query_balance.split(",")]
        return {
            f"{way}-way {shot}-shot, {balance} queries": self._cell(bank, split, way, shot, balance)
            for way, shot, balance in itertools.product(ways, shots, balances)
        }

    def _cell(self, bank: FeatureBank, split: str, way: int, shot: int, balance: str) -> EpisodeSampler:
        query = bounds(self.query)[1]
        return EpisodeSampler(bank, split, way=way, shot=shot, query=query, balance=balance, seed=self.seed)

    def check_learner(self, learner: Any) -> None:
        """Raise a ValueError where a learner cannot take episodes of these sizes."""
        if isinstance(self.way, str) and not getattr(learner, "takes_any_ways", False):
            raise ValueError(
                f"way: the parameters of this {self.learner} are those of a fixed number of classes, not of"
                f" {self.way}; equivariant, prototypes, ridge, and combined without synthetic gradients take any"
            )
        if self.uneven and not getattr(learner, "takes_ragged", False):
            size = next(name for name in SIZES if isinstance(getattr(self, name), str))
            raise ValueError(
                f"{size}: {self.learner} takes episodes of one size only, not {getattr(self, size)}; equivariant,"
                " prototypes, ridge, anil and combined take any"
            )

    def rate(self, step: int) -> float:
        """The learning rate of a step of the optimizer.

        "one_cycle" rises along a cosine from a 25th for a tenth of the training, and then falls to 0 (Smith and Topin
        2019).
        """
        if self.schedule == "constant":
            return self.lr
        rise = max(1, round(_RISE * self.n_steps))
        if step < rise:
            low, place = self.lr / _BELOW, 1 - step / rise
        else:
            low, place = 0.0, (step - rise) / max(1, self.n_steps - rise)
        return low + (self.lr - low) * (1 + math.cos(math.pi * place)) / 2

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
