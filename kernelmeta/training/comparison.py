"""All learners on the same bank and the same test episodes: what `kernelmeta compare` runs.

A *cell* is a number of shots and a balance of the query rows. In every cell, every learner is trained with each of its
candidate settings on the training classes for a while; the best of them on the validation classes are trained to the
end, and looked at once on the way; of all these, the best on the validation classes is chosen. What counts is its
accuracy on the episodes of the test classes, which are the same for all learners.

Methods without anything to train (`kernelmeta.training.peers`) are chosen among their candidates in the same way. Where
a balance begins with "known:", those methods that can use them are told the classes' shares of the query rows.
"""

from __future__ import annotations

import itertools
import json
import math
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernelmeta import nn
from kernelmeta.backends import select
from kernelmeta.data import EpisodeSampler, FeatureBank
from kernelmeta.data.bank import SPLITS
from kernelmeta.data.episodes import parse_balances
from kernelmeta.data.files import parse_json, read_json, write_json
from kernelmeta.data.tensor_files import read_tensors, write_tensors
from kernelmeta.training import learners
from kernelmeta.training.candidates import CANDIDATES
from kernelmeta.training.checkpoint import CHECKPOINT, Checkpoint, fingerprint
from kernelmeta.training.config import TrainConfig
from kernelmeta.training.evaluation import Learner, episode_accuracies, interval
from kernelmeta.training.finite import NotFiniteError
from kernelmeta.training.learners import LEARNERS, SOFT_KMEANS, Rows
from kernelmeta.training.loading import checksum, for_ways, load_learner
from kernelmeta.training.peers import PEERS, TRANSFORM, Peer, Transformed
from kernelmeta.training.settings import MOST_STEPS, Settings, as_float, check_numbers, check_types
from kernelmeta.training.trainer import FREE, Trainer
from kernelmeta.transforms import Transform

CONFIG, RESULTS, TABLE, PLOT = "compare.json", "comparison.json", "comparison.md", "comparison.png"
CONTESTANTS = ("prototypes", SOFT_KMEANS, *PEERS, *(name for name in LEARNERS if name != "prototypes"))
TITLES = {**learners.TITLES, **{name: kind.title for name, kind in PEERS.items()}}
# What there is nothing to train in.
UNTRAINED = (SOFT_KMEANS, *PEERS)
# What take minutes, or a package that is not always there.
_ON_REQUEST = ("maml", "logistic_regression")
KNOWN = "known:"

Say = Callable[[str], None]
Candidate = Mapping[str, Any]


@dataclass(frozen=True)
class CompareConfig(Settings):
    """Settings of a comparison.

    Args:
        data, weights, backbone: the bank, as of `kernelmeta train`.
        learners: names of `CONTESTANTS`.
        way, query: N, and query rows a class.
        shots, balances: the cells are all pairs of these; a balance is that of an `EpisodeSampler`, after "known:"
            where the classes' shares of the query rows are told.
        episodes: on which the best candidates of a learner are trained.
        trial_episodes: on which every candidate is trained before.
        finalists: how many those are.
        validation_episodes: on which they are compared.
        eval_episodes: of the test classes.
        most_candidates: of a learner, the first so many; all if None.
        seed: of everything random.

    Raises:
        ValueError: a setting out of its range, named.
    """

    data: str = "glyphs"
    weights: str | None = None
    backbone: str | None = None
    learners: tuple[str, ...] = tuple(name for name in CONTESTANTS if name not in _ON_REQUEST)
    way: int = 5
    query: int = 15
    shots: tuple[int, ...] = (1, 5)
    balances: tuple[str, ...] = ("even", "dirichlet:2")
    episodes: int = 100_000
    trial_episodes: int = 30_000
    finalists: int = 3
    validation_episodes: int = 2_000
    eval_episodes: int = 4_000
    most_candidates: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("learners", "shots", "balances"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name}: expected some, each once, got {', '.join(map(str, values)) or 'none'}")
        for learner in self.learners:
            if learner not in CONTESTANTS:
                raise ValueError(f"learners: expected some of {', '.join(CONTESTANTS)}, got {learner!r}")
        for balance in self.balances:
            parse_balances(balance.removeprefix(KNOWN))
        least = {"way": 2, "query": 1, "episodes": 1, "trial_episodes": 1, "finalists": 1, "seed": 0}
        least |= {"validation_episodes": 2, "eval_episodes": 2, "most_candidates": 1}
        check_numbers(self, least, ())
        if min(self.shots) < 1:
            raise ValueError(f"shots: expected at least 1, got {min(self.shots)}")
        if self.trial_episodes > self.episodes:
            raise ValueError(
                f"trial_episodes: expected at most the {self.episodes} episodes of the whole training,"
                f" got {self.trial_episodes}"
            )


class Comparison:
    """Runs the cells of a configuration, and goes on where an earlier run of the same stopped.

    Args:
        config: the settings.
        bank: where the episodes come from.
        out: folder for checkpoints and results; what is there of the same configuration is not done again.
        candidates: learner -> settings to choose from, in the place of `CANDIDATES`.
        device: where the features lie and the steps run.
        say: takes a line at a time about what was done.
        progress: show a bar for every training.

    Raises:
        ValueError: the bank does not suit the configuration; a candidate cannot be.
    """

    def __init__(
        self,
        config: CompareConfig,
        bank: FeatureBank,
        out: Path,
        *,
        candidates: Mapping[str, Sequence[Candidate]] | None = None,
        device: str = "cpu",
        say: Say = lambda line: None,
        progress: bool = False,
    ) -> None:
        self.config, self.bank, self.out, self.device = config, bank, out, device
        self.say, self.progress = say, progress
        self.features = bank.features.to(device)
        self._chosen: dict[tuple[str, int, str, bool], dict[str, Any]] = {}
        self._transforms: dict[tuple[Any, ...], Transform] = {}
        self._needing: set[str] = set()  # learners of which some candidate needs proportions
        self.candidates: dict[str, list[Candidate]] = {}
        for learner in config.learners:
            own = (candidates or {}).get(learner, CANDIDATES.get(learner, ({},)))
            self.candidates[learner] = list(own)[: config.most_candidates]
            if not self.candidates[learner]:
                raise ValueError(f"candidates: none for the learner {learner!r}")
        # Before anything runs: every sampler and every learner is made once.
        for shot, balance in self.cells():
            for split in ("train", "val", "test"):
                self._sampler(split, shot, balance)
            for learner, candidate in self._all_candidates():
                self._check(learner, shot, balance, candidate)

    def cells(self) -> list[tuple[int, str]]:
        """(shots, balance of the query rows)."""
        return list(itertools.product(self.config.shots, self.config.balances))

    def _all_candidates(self) -> Iterator[tuple[str, Candidate]]:
        for learner, some in self.candidates.items():
            for candidate in some:
                yield learner, candidate

    def _sampler(self, split: str, shot: int, balance: str) -> EpisodeSampler:
        c = self.config
        balance = balance.removeprefix(KNOWN)
        return EpisodeSampler(self.bank, split, way=c.way, shot=shot, query=c.query, balance=balance, seed=c.seed)

    def _check(self, learner: str, shot: int, balance: str, candidate: Candidate) -> None:
        try:
            head: Any = None
            if "run" in candidate:
                head = self._of_run(learner, candidate)
            elif learner in UNTRAINED:
                self._untrained(learner, candidate)
            else:
                config = self._train_config(learner, shot, balance, candidate, self.config.episodes)
                config.make_sampler(self.bank, "train")
                with torch.device("meta"):
                    head = LEARNERS[learner].make(config, Rows(self.bank.n_features, self.bank.image_shape))
                config.check_learner(head)
            if getattr(head, "needs_proportions", False):
                if not balance.startswith(KNOWN):
                    raise ValueError(f"it must be told the classes' shares of the query rows: only {KNOWN}{balance}")
                self._needing.add(learner)
        except (OSError, TypeError, ValueError) as error:
            raise ValueError(f"candidates: {learner} {describe(candidate)}: {error}") from None

    def _of_run(self, learner: str, candidate: Candidate) -> Any:
        """What a run of `kernelmeta train` left, for this number of ways. Raises OSError, ValueError."""
        if set(candidate) != {"run"}:
            raise ValueError("run: a learner that is trained already takes no other settings")
        head, settings = load_learner(candidate["run"])
        if settings["learner"] != learner:
            raise ValueError(f"run: a learner of the kind {settings['learner']!r}")
        if head.n_features != self.bank.n_features:
            raise ValueError(f"run: it takes {head.n_features} features, the bank has {self.bank.n_features}")
        return for_ways(head, self.config.way).to(self.device).eval()

    def _untrained(self, learner: str, candidate: Candidate) -> Learner:
        own = {name: value for name, value in candidate.items() if name not in TRANSFORM}
        head = self._soft_kmeans(own) if learner == SOFT_KMEANS else Peer(learner, self.config.way, own)
        if len(own) == len(candidate):
            return head
        wanted = tuple(candidate.get(name, "none") for name in TRANSFORM)
        if wanted not in self._transforms:
            training = self.features[(self.bank.class_split[self.bank.labels] == SPLITS["train"]).to(self.device)]
            self._transforms[wanted] = Transform.of_training(training, *wanted)
        return Transformed(head, self._transforms[wanted])

    def _soft_kmeans(self, candidate: Candidate) -> Learner:
        steps, scale = candidate.get("steps", 0), candidate.get("scale", 1.0)
        if isinstance(steps, bool) or not isinstance(steps, int) or steps > MOST_STEPS:
            raise ValueError(f"steps: expected 0 to {MOST_STEPS}, got {str(steps)[:40]}")
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(as_float(scale)):
            raise ValueError(f"scale: expected a finite number, got {str(scale)[:40]}")
        return nn.SoftKMeans(self.config.way, self.bank.n_features, **candidate)

    def _train_config(self, learner: str, shot: int, balance: str, candidate: Candidate, episodes: int) -> TrainConfig:
        c = self.config
        settings = {
            "data": c.data, "weights": c.weights, "backbone": c.backbone, "way": c.way, "shot": shot, "query": c.query,
            "query_balance": balance.removeprefix(KNOWN), "learner": learner, "seed": c.seed, "validate_every": 0,
            "episodes": episodes, **{name: value for name, value in candidate.items() if name != "untrained"},
        }  # fmt: skip
        fixed = sorted({"data", "weights", "backbone", "way", "learner", "episodes"} & set(candidate))
        if fixed:
            raise ValueError(f"{fixed[0]}: the same for all")
        unknown = sorted(set(settings) - set(TrainConfig.__dataclass_fields__))
        if unknown:
            raise ValueError(f"{unknown[0]}: no such setting")
        return TrainConfig(**settings)

    def run(self) -> dict[str, Any]:
        """Trains and evaluates what is not done yet.

        Returns:
            What `comparison.json` holds: settings, ``assume_even`` and ``take_proportions`` (names of learners), and
            for every cell ``{shot, query_balance, proportions_known, learners, pairs}``:
            ``learners[name]`` is ``{accuracy, ci95, chosen, validation_accuracy, tried, not_finite}``, the last one how
            many query rows of the test had NaN or infinite logits (they count as wrong);
            ``pairs[a][b]`` is ``{difference, difference_ci95}``, a minus b, paired by episode. In percent.

        Raises:
            KeyboardInterrupt: stopped; run again to go on.
            NotFiniteError: the training of a candidate, named, led to NaN or infinite numbers.
        """
        began = time.perf_counter()
        cells = [self._cell(shot, balance) for shot, balance in self.cells()]
        peers = {name: PEERS[name] for name in self.config.learners if name in PEERS}
        return {
            **self.config.to_dict(),
            "titles": {name: TITLES[name] for name in self.config.learners},
            "assume_even": [name for name, kind in peers.items() if kind.assumes_even],
            "take_proportions": self._told(),
            "features": fingerprint(self.bank),
            "source": self.bank.source,
            "cells": cells,
            "seconds": time.perf_counter() - began,
            "backend": select(self.features.device.type),
        }

    def _told(self) -> list[str]:
        """Who is told the classes' shares of the query rows, where they are known."""
        takes = {name for name, kind in PEERS.items() if kind.takes_proportions} | self._needing
        return [name for name in self.config.learners if name in takes]

    def _cell(self, shot: int, balance: str) -> dict[str, Any]:
        known, plain = balance.startswith(KNOWN), balance.removeprefix(KNOWN)
        folder = self.out / f"{shot}-shot-{plain.replace(':', '-')}"
        self.say(f"{shot} shot{'s' if shot > 1 else ''}, {plain} queries{', proportions known' if known else ''}")
        told = set(self._told()) if known else set()
        # Trained and chosen as where the proportions are not known, but for those who are told.
        chosen = {name: self._choose(folder, name, shot, plain, name in told) for name in self.config.learners}
        modules = {learner: entry.pop("module") for learner, entry in chosen.items()}
        file = folder / "accuracies.safetensors"
        values, not_finite = self._known(file, {name: entry for name, entry in chosen.items() if name not in told})
        if known:
            file = folder / "accuracies-known.safetensors"
            of_told = self._known(file, chosen)
            values, not_finite = values | of_told[0], not_finite | of_told[1]
        missing = {learner: module for learner, module in modules.items() if learner not in values}
        if missing:
            found = episode_accuracies(
                missing, self.features, self._sampler("test", shot, plain), self.config.eval_episodes,
                progress=self.progress, proportions=known,
            )  # fmt: skip
            values, not_finite = values | found, not_finite | found.not_finite
            keys = {learner: json.dumps(entry["chosen"], sort_keys=True) for learner, entry in chosen.items()}
            write_tensors(file, values, {"chosen": json.dumps(keys), "not_finite": json.dumps(not_finite)})
        values = {learner: values[learner] for learner in self.config.learners}
        summary = summarise(values)
        for learner, entry in chosen.items():
            row = summary["learners"][learner]
            row |= entry
            row["not_finite"] = not_finite[learner]
            self.say(f"  {TITLES[learner]:<14}{row['accuracy']:7.2f} ± {row['ci95']:.2f} %")
        return {"shot": shot, "query_balance": plain, "proportions_known": known, **summary}

    def _known(self, file: Path, chosen: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Test accuracies that an earlier run left, of learners that are still the same; rows that were not finite."""
        if not file.exists():
            return {}, {}
        values, metadata = read_tensors(file)
        keys, counts = (parse_json(metadata.get(name, "{}")) for name in ("chosen", "not_finite"))
        same = [
            learner
            for learner, entry in chosen.items()
            if learner in values and keys.get(learner) == json.dumps(entry["chosen"], sort_keys=True)
        ]
        return {learner: values[learner].clone() for learner in same}, {name: int(counts.get(name, 0)) for name in same}

    def _choose(self, folder: Path, learner: str, shot: int, balance: str, told: bool) -> dict[str, Any]:
        """The learner with its best candidate, trained to the end, and the record of how it was chosen."""
        key = (learner, shot, balance, told)
        if key not in self._chosen:
            self._chosen[key] = self._chosen_anew(folder, *key)
        return dict(self._chosen[key])

    def _chosen_anew(self, folder: Path, learner: str, shot: int, balance: str, told: bool) -> dict[str, Any]:
        def attempt(candidate: Candidate, episodes: int) -> tuple[dict[str, Any], Learner]:
            return self._attempt(folder, learner, shot, balance, candidate, episodes, told)

        def accuracy(found: tuple[dict[str, Any], Learner]) -> float:
            return float(found[0]["validation_accuracy"])

        attempts = [attempt(candidate, self.config.trial_episodes) for candidate in self.candidates[learner]]
        finalists = sorted(attempts, key=accuracy, reverse=True)[: self.config.finalists]
        trial, end = self.config.trial_episodes, self.config.episodes
        later = sorted({round(math.sqrt(trial * end)), end} - {trial})
        attempts += [attempt(r["settings"], n) for r, _ in finalists if r["episodes"] for n in later]
        # Longer training may be worse on the validation classes.
        record, module = max(attempts, key=accuracy)
        chosen = dict(record["settings"])
        if record["episodes"]:
            chosen["episodes"] = record["episodes"]
        return {
            "chosen": chosen,
            "validation_accuracy": record["validation_accuracy"],
            "tried": [tried for tried, _ in attempts],
            "module": module,
        }

    def _attempt(
        self, folder: Path, learner: str, shot: int, balance: str, candidate: Candidate, episodes: int, told: bool
    ) -> tuple[dict[str, Any], Learner]:
        """One candidate trained on so many episodes: its accuracy on the validation classes, and itself."""
        if "run" in candidate:
            found = {**candidate, "checksum": checksum(candidate["run"])}
            return self._validated(None, learner, shot, balance, found, 0, self._of_run(learner, candidate))
        if learner in UNTRAINED:
            head = self._untrained(learner, candidate)
            return self._validated(None, learner, shot, balance, candidate, 0, head, told)
        if candidate.get("untrained"):
            episodes = 0
        config = self._train_config(learner, shot, balance, candidate, max(1, episodes))
        out = folder / learner / f"{_key({n: v for n, v in config.to_dict().items() if n not in FREE}):08x}"
        trainer = Trainer(config, self.bank, device=self.device)
        if episodes:
            finished = out / f"{episodes}-episodes"
            self._train(trainer, out, finished, episodes)
            out = finished
        head = trainer.learner.eval()
        return self._validated(out, learner, shot, balance, candidate, episodes, head)

    def _train(self, trainer: Trainer, out: Path, finished: Path, episodes: int) -> None:
        """Trains to so many episodes, from the furthest checkpoint that is not beyond."""
        steps = trainer.config.n_steps
        saved = [finished / CHECKPOINT, *(path / CHECKPOINT for path in out.glob("*-episodes"))]
        states = [Checkpoint.load(path, "train") for path in saved if path.exists()]
        if trainer.config.schedule != "constant":  # to another end, every step is another
            states = [state for state in states if state.state["config"]["episodes"] == trainer.config.episodes]
        states = [state for state in states if state.state["step"] <= steps]
        if states:
            trainer.restore(max(states, key=lambda state: state.state["step"]))
        if trainer.step < steps or not (finished / CHECKPOINT).exists():
            write_json(finished / "config.json", {"command": "train", **trainer.config.to_dict()})
            try:
                if not trainer.run(finished, progress=self.progress, keep_bar=False):
                    raise KeyboardInterrupt
            except NotFiniteError as error:
                raise NotFiniteError(f"{finished}: {error}") from None

    def _validated(
        self,
        out: Path | None,
        learner: str,
        shot: int,
        balance: str,
        candidate: Candidate,
        episodes: int,
        head: Learner,
        told: bool = False,
    ) -> tuple[dict[str, Any], Learner]:
        file = None if out is None else out / "validation.json"
        E = self.config.validation_episodes
        if file is not None and file.exists():
            record = read_json(file)
            if record.get("validation_episodes") == E:
                return record, head
        sampler = self._sampler("val", shot, balance)
        values = episode_accuracies({learner: head}, self.features, sampler, E, proportions=told)
        accuracy, ci95 = interval(values[learner])
        record = {
            "settings": dict(candidate), "episodes": episodes, "validation_episodes": E,
            "validation_accuracy": accuracy, "validation_ci95": ci95, "not_finite": values.not_finite[learner],
        }  # fmt: skip
        trained = f"{episodes} episodes" if episodes else "not trained"
        self.say(
            f"  {TITLES[learner]:<14}{accuracy:7.2f} ± {ci95:.2f} % on the validation classes:"
            f" {describe(candidate)}, {trained}"
        )
        if values.not_finite[learner]:
            self.say(f"  {values.warning(TITLES)}")
        if file is not None:
            write_json(file, record)
        return record, head


def summarise(values: Mapping[str, Tensor]) -> dict[str, Any]:
    """Accuracies [E] of learners on the same episodes -> ``learners`` and ``pairs`` as `Comparison.run` has them."""
    learners = {name: dict(zip(("accuracy", "ci95"), interval(own), strict=True)) for name, own in values.items()}
    pairs = {
        a: {
            b: dict(zip(("difference", "difference_ci95"), interval(values[a] - values[b]), strict=True))
            for b in values
            if b != a
        }
        for a in values
    }
    return {"learners": learners, "pairs": pairs}


def describe(candidate: Candidate) -> str:
    """Settings, to read."""
    words = [name if value is True else f"{name} {value}" for name, value in candidate.items()]
    return ", ".join(words) or "as by default"


def _key(settings: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(settings, sort_keys=True).encode())
