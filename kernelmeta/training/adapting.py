"""A classifier for each of many tasks, from files to files: ``kernelmeta adapt``.

A piece of tasks is read, answered and written at a time. Its file has a name that says which tasks it holds, and comes
into being whole: what is there after a kill is done, and what is not is done again, by whichever process.
"""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kernelmeta.backends import select
from kernelmeta.data import FeatureBank
from kernelmeta.data.task_tables import Piece, TaskFiles, Tasks, write_answers
from kernelmeta.tasks import Ragged
from kernelmeta.training.answers import make_learner, method_or_weights, mixed_backbones
from kernelmeta.training.checkpoint import CHECKPOINT
from kernelmeta.training.learners import tasks_together
from kernelmeta.training.loading import load_learner

# What a call takes: elements of the rows of its tasks, and logits.
ELEMENTS = 1 << 23
_Ints = np.ndarray[Any, np.dtype[np.int64]]
_Bools = np.ndarray[Any, np.dtype[np.bool_]]


class Learners:
    """The learner of a run or method, for any number of ways that it can take.

    Args:
        what: one of `METHODS` that needs no training, or a run folder, its checkpoint or a published one.
        n_features: D of the bank.
        at: which weights of a run.
        device: where it runs.
        transform, center: of the features, for a method that needs no training.

    Raises:
        OSError, ValueError: it cannot be read, or does not fit; it couples the tasks of a call.
    """

    def __init__(
        self,
        what: str,
        n_features: int,
        at: str | None = None,
        device: str = "cpu",
        *,
        transform: str | None = None,
        center: str | None = None,
    ) -> None:
        self._given = method_or_weights(what)
        self._n_features, self._at, self._device = n_features, at, device
        self._features = {"transform": transform, "center": center}
        self._made: dict[int, Any] = {}
        self.temperature = 1.0
        """Of the run: by which logits are divided for probabilities."""
        self.features_of = "" if self._given[1] is None else load_learner(self._given[1])[1].get("features_of", "")
        """Of the run: the backbone whose features it was trained on, as a bank names it; empty if nobody knows."""

    def for_ways(self, n_way: int) -> Any:
        """The learner for so many classes, or for as many at most. Raises ValueError."""
        if n_way not in self._made:
            chosen = make_learner(*self._given, n_way, self._n_features, self._at, **self._features)
            if tasks_together(chosen.learner):
                raise ValueError("norm_stats: with 'batch' tasks are coupled, and their answers depend on each other")
            self._made[n_way] = chosen.learner.to(self._device)
            self.temperature = chosen.temperature
        return self._made[n_way]


@dataclass(frozen=True)
class Job:
    """Everything that the answers to some tasks depend on, to be carried to another process.

    Args:
        tasks, bank: the files.
        what, at: see `Learners`.
        out: the folder of the answers.
        per_piece: tasks a file of answers.
        device: where learners run.
        transform, center: of the features, see `Learners`.
        skip_bad: a task that cannot be answered gets no labels, but a problem; else it is an error.
    """

    tasks: str
    bank: str
    what: str
    out: str
    per_piece: int
    at: str | None = None
    device: str = "cpu"
    transform: str | None = None
    center: str | None = None
    skip_bad: bool = False


class Adapter:
    """Answers pieces of tasks. Raises what `TaskFiles`, `FeatureBank.load` and `Learners` raise."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.files = TaskFiles(job.tasks, job.per_piece, job.skip_bad)
        # Rows are looked at when they are used: the bank may be larger than memory.
        self.bank = FeatureBank.load(job.bank, non_finite="keep")
        self._features = self.bank.features.to(job.device)
        self._learners = Learners(
            job.what, self.bank.n_features, job.at, job.device, transform=job.transform, center=job.center
        )

    @property
    def mixed(self) -> str | None:
        """That the bank and the weights are of different backbones; None where they are not, or nobody knows."""
        return mixed_backbones({self.job.what: self._learners.features_of, self.job.bank: self.bank.backbone})

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Tells whether files, method and sizes are those that a run began with."""
        what = Path(self.job.what)
        weights = what / CHECKPOINT if what.is_dir() else what
        file = self.bank.file
        return {
            "tasks": self.files.fingerprint,
            "bank": [len(self.bank.labels), self.bank.n_features, file and file.size, file and file.checksum],
            "method": zlib.crc32(weights.read_bytes()) if weights.is_file() else self.job.what,
            "at": self.job.at,
            "transform": self.job.transform,
            "center": self.job.center,
            "tasks_per_file": self.job.per_piece,
        }

    def missing(self) -> list[Piece]:
        """The pieces that nobody has answered yet."""
        done = set(os.listdir(self.job.out)) if os.path.isdir(self.job.out) else set()
        return [piece for piece in self.files.pieces() if piece.name not in done]

    def run(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        """Answers some pieces, and yields each when its file is there.

        Raises:
            OSError: a file cannot be read or written.
            ValueError: a task, named, that cannot be answered, unless such are skipped.
        """
        for piece, tasks in self.files.read(list(pieces)):
            self.bank.check_file()
            write_answers(Path(self.job.out) / piece.name, tasks, *self.answer(tasks))
            yield piece

    @torch.no_grad()
    def answer(self, tasks: Tasks) -> tuple[_Ints, np.ndarray[Any, Any], dict[int, str]]:
        """The class of each query row, 0..n_ways[t]-1, its probability, and the problems of tasks that are skipped.

        Raises:
            ValueError: a task, named, with rows that the bank has not, a number of classes that the learner does not
                take, or without a finite answer; unless such are skipped.
        """
        problems = dict(tasks.problems)

        def problem(task: int, text: str) -> None:
            if not self.job.skip_bad:
                raise ValueError(f"task {tasks.ids[task]}: {text}")
            problems.setdefault(task, text)

        n = len(self.bank.labels)
        for name, rows, offsets in (
            ("support_rows", tasks.support_rows, tasks.support_offsets),
            ("query_rows", tasks.query_rows, tasks.query_offsets),
        ):
            for row in np.flatnonzero((rows < 0) | (rows >= n)).tolist():
                problem(_task_of(offsets, row), f"{name}: expected 0..{n - 1}, got {rows[row]}")
        best = np.zeros(len(tasks.query_rows), np.int64)
        probability = np.ones(len(tasks.query_rows), np.float32)  # of a task with one class alone
        usable, ways = ~np.isin(np.arange(len(tasks)), list(problems)), np.diff(tasks.class_offsets)
        for pack in _packs(tasks, self.bank.n_features, self._together(tasks, usable), usable):
            learner = None
            while learner is None and len(pack):  # (of tasks of several sizes some may be too large for it)
                most = int(ways[pack].max())
                try:
                    learner = self._learners.for_ways(most)
                except ValueError as error:
                    for task in pack[ways[pack] == most].tolist():
                        problem(task, str(error))
                    pack = pack[ways[pack] < most]
            if learner is None:
                continue
            query = _rows_of(tasks.query_offsets, pack)
            logits = self._logits(learner, tasks, pack, query)
            top = torch.softmax(logits.float() / self._learners.temperature, -1).max(-1)
            # With tasks of fewer ways than others, what lies beyond is -inf.
            values = top.values.cpu().numpy()
            for row in query[~np.isfinite(values)].tolist():
                problem(_task_of(tasks.query_offsets, row), "no finite answer; are its rows finite, and not too large?")
            best[query], probability[query] = top.indices.cpu().numpy(), values
        return best, probability, problems

    def _together(self, tasks: Tasks, usable: _Bools) -> _Together:
        for most in np.unique(np.diff(tasks.class_offsets)[usable])[::-1].tolist():
            if most > 1:
                with contextlib.suppress(ValueError):  # (which is told of the tasks of so many ways)
                    return self._how(self._learners.for_ways(most))
        return _Together(ragged=False, padded=False)

    def _how(self, learner: Any) -> _Together:
        # Plain PyTorch does tasks of unequal size one after the other.
        plain = select(self._features.device.type) == "reference"
        ragged = bool(getattr(learner, "takes_ragged", False)) and not plain
        return _Together(ragged, padded=not ragged and not learner.transductive)

    def _logits(self, learner: Any, tasks: Tasks, pack: _Ints, query: _Ints) -> Tensor:
        """[all query rows of the pack, N]"""
        support = _rows_of(tasks.support_offsets, pack)
        how = self._how(learner)
        own = None if how.ragged else _padded(tasks.query_offsets, pack)
        index = [tasks.support_rows[support], tasks.labels[support]]
        index.append(tasks.query_rows[query if own is None else own.places])
        device = self._features.device
        support_index, labels, query_index = (torch.from_numpy(values).to(device) for values in index)
        if own is not None:
            T = len(pack)
            even = (support_index.view(T, -1), labels.view(T, -1), query_index)
            found: Tensor = learner.from_bank(self._features, *even)
            return found[torch.from_numpy(own.counted).to(device)]
        offsets = [
            torch.from_numpy(np.concatenate([[0], np.cumsum(np.diff(of)[pack])])).to(device)
            for of in (tasks.support_offsets, tasks.query_offsets)
        ]
        n_ways = torch.from_numpy(np.diff(tasks.class_offsets)[pack]).to(device)
        found = learner.from_bank(
            self._features, support_index, labels, query_index, ragged=Ragged(offsets[0], offsets[1], n_ways)
        )
        return found


class _Sizes(NamedTuple):
    ways: int
    support: int
    query: int


class _Together(NamedTuple):
    """Which tasks share a call.

    Args:
        ragged: those of about the same size; else, only those of the same size.
        padded: these may have other numbers of query rows: each row is judged alone, so that more change nothing.
    """

    ragged: bool
    padded: bool


def _packs(tasks: Tasks, n_features: int, together: _Together, usable: _Bools) -> Iterator[_Ints]:
    """Numbers of the usable tasks that share a call; those with one class alone, or without query rows, are left
    out.
    """
    sizes = np.stack([np.diff(tasks.class_offsets), np.diff(tasks.support_offsets), np.diff(tasks.query_offsets)])
    order = np.lexsort(sizes[::-1])
    order = order[usable[order] & (sizes[0, order] > 1) & (sizes[2, order] > 0)]
    first, elements, logits = 0, 0, 0
    for i, task in enumerate(order):
        now = _Sizes(*sizes[:, task].tolist())
        before = _Sizes(*sizes[:, order[i - 1]].tolist()) if i else now
        own = _costs(now, n_features)
        if together.padded:  # (sorted: this one's query rows are the most)
            elements, logits = ((i + 1 - first) * cost for cost in own)
        else:
            elements, logits = elements + own[0], logits + own[1]
        full = elements > ELEMENTS or logits > ELEMENTS
        alike = now[:2] == before[:2] if together.padded else now == before
        if i > first and (full or not (alike or together.ragged) or now.ways > 2 * before.ways):
            yield order[first:i]
            first, (elements, logits) = i, own
    if first < len(order):
        yield order[first:]


def _costs(sizes: _Sizes, n_features: int) -> tuple[int, int]:
    """Elements of the rows of a task, and of its logits."""
    return (sizes.support + sizes.query) * n_features, sizes.query * sizes.ways


class _Padded(NamedTuple):
    """The places of the rows of some tasks, [T, most], and which count; the others are a task's last row again."""

    places: _Ints
    counted: _Bools


def _padded(offsets: _Ints, pack: _Ints) -> _Padded:
    counts = np.diff(offsets)[pack, None]
    position = np.arange(counts.max())
    return _Padded(offsets[:-1][pack, None] + np.minimum(position, counts - 1), position < counts)


def _task_of(offsets: _Ints, row: int) -> int:
    """Whose a row is."""
    return int(np.searchsorted(offsets, row, "right")) - 1


def _rows_of(offsets: _Ints, pack: _Ints) -> _Ints:
    """The places of the rows of some tasks, one task after the other."""
    counts = np.diff(offsets)[pack]
    ends = np.cumsum(counts)
    places: _Ints = np.arange(ends[-1] if len(ends) else 0) + np.repeat(offsets[:-1][pack] - (ends - counts), counts)
    return places
