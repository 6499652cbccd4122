"""A whole step of meta-training from a bank: draw, read, forward, backward, SGD; beside the published loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from benchmarks import forms
from benchmarks.problem import Size, draw
from benchmarks.test_episodes import bank
from kernelmeta.data import EpisodeSampler
from kernelmeta.training.config import TrainConfig
from kernelmeta.training.trainer import Trainer

STEPS = 16  # a call


def _kernelmeta(tasks: int) -> Callable[[], Any]:
    # The trainer draws its episodes in blocks; a call is one of STEPS steps.
    trainer = Trainer(TrainConfig(tasks_per_step=tasks, validate_every=0), bank(samples=60, D=640))
    return lambda: trainer._run_block(STEPS)


def _published(tasks: int) -> Callable[[], Any]:
    rows = bank(samples=60, D=640)
    sampler = EpisodeSampler(rows, "train")
    leaves = draw(Size(), copies=1).parameters.fresh().leaves()
    optimizer = torch.optim.SGD(leaves, lr=1e-3, momentum=0.9, weight_decay=5e-4)
    head = forms.published(3, 1e-3)
    first = iter(range(0, 1 << 60, tasks))

    def steps() -> None:
        for _ in range(STEPS):
            support, labels, query, answers = sampler.draw(next(first), tasks)
            optimizer.zero_grad()
            logits = head(rows.features[support], labels, rows.features[query], *leaves)
            F.cross_entropy(logits.flatten(0, 1), answers.flatten()).backward()
            optimizer.step()

    return steps


@pytest.mark.parametrize("tasks", [1, 16])
@pytest.mark.parametrize("loop", [_kernelmeta, _published])
def test_training_steps(tasks: int, loop: Callable[[int], Callable[[], Any]], benchmark: Any) -> None:
    benchmark.group = f"{STEPS} training steps of {tasks} tasks, D=640"
    benchmark(loop(tasks))
