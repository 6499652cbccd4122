"""``gradients`` beside other people's code: what it does not do is an error, what it does is what autograd gives."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from episodes import assert_close, draw
from torch.nn.functional import cross_entropy

import kernelmeta as km

EPISODE = draw(dtype=torch.float32)
ANSWERS = torch.arange(11).remainder(3).expand(2, 11).contiguous()
BATCH = (EPISODE.support, EPISODE.labels, EPISODE.query, ANSWERS)
LEARNERS: dict[str, Callable[[], Any]] = {"sib": lambda: km.nn.SIB(3, 13), "anil": lambda: km.nn.ANIL(3, 13)}

each_learner = pytest.mark.parametrize("name", LEARNERS)


def by_autograd(head: Any, times: float = 1.0) -> list[torch.Tensor]:
    loss = cross_entropy(head(*BATCH[:3]).flatten(0, 1), ANSWERS.flatten())
    return [times * g for g in torch.autograd.grad(loss, list(head.parameters()))]


def found(head: Any) -> list[torch.Tensor]:
    return [p.grad for p in head.parameters()]


@each_learner
def test_is_what_autograd_gives(name: str) -> None:
    head = LEARNERS[name]()
    want = by_autograd(copy.deepcopy(head))
    head.gradients(*BATCH)
    assert_close(found(head), want, 1e-4)


@each_learner
def test_accumulates_where_it_is_told_to(name: str) -> None:
    head = LEARNERS[name]()
    want = by_autograd(copy.deepcopy(head), 2.0)
    head.gradients(*BATCH)
    with pytest.raises(ValueError, match="has a gradient already"):
        head.gradients(*BATCH)
    head.gradients(*BATCH, accumulate=True)
    assert_close(found(head), want, 1e-4)


@each_learner
def test_loss_scale_is_what_a_grad_scaler_divides_by(name: str) -> None:
    head = LEARNERS[name]()
    want = by_autograd(copy.deepcopy(head))
    optimizer = torch.optim.SGD(head.parameters(), 1e-2)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(1))
    head.gradients(*BATCH, loss_scale=scaler.get_scale())
    scaler.unscale_(optimizer)
    assert_close(found(head), want, 1e-4)


@each_learner
def test_a_grad_scaler_that_nobody_mentions(name: str) -> None:
    scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(ValueError, match=r"loss_scale: a torch\.amp\.GradScaler is in use"):
        LEARNERS[name]().gradients(*BATCH)
    LEARNERS[name]().gradients(*BATCH, loss_scale=1)  # it is somebody else's
    del scaler
    LEARNERS[name]().gradients(*BATCH)
    idle = torch.amp.GradScaler("cpu", enabled=False)
    LEARNERS[name]().gradients(*BATCH)
    assert not idle.is_enabled()


@each_learner
@pytest.mark.parametrize("of_query", [False, True])
def test_features_that_require_a_gradient(name: str, of_query: bool) -> None:
    support, labels, query, answers = BATCH
    rows = [t.clone().requires_grad_(wanted) for t, wanted in ((support, not of_query), (query, of_query))]
    with pytest.raises(ValueError, match="query: requires a gradient" if of_query else "support: requires a gradient"):
        LEARNERS[name]().gradients(rows[0], labels, rows[1], answers)
    with torch.no_grad():
        LEARNERS[name]().gradients(rows[0], labels, rows[1], answers)


@each_learner
@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks(name: str, kind: str) -> None:
    head = LEARNERS[name]()
    getattr(head.weight, kind)(lambda *_: None)
    with pytest.raises(ValueError, match=r"weight has hooks, which gradients\(\) does not call"):
        head.gradients(*BATCH)


@each_learner
def test_frozen_parameters_get_none(name: str) -> None:
    head = LEARNERS[name]()
    head.bias.requires_grad_(False)
    head.gradients(*BATCH)
    assert head.bias.grad is None and head.weight.grad is not None


TWO_PROCESSES = """
import sys
import torch, torch.distributed as dist
import kernelmeta as km

rank, port = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{port}", rank=rank, world_size=2)
torch.manual_seed(0)
head = km.nn.SIB(3, 13)
x = torch.randn(2, 2, 7, 13)[rank]
q = torch.randn(2, 2, 11, 13)[rank]
y, a = torch.arange(7).remainder(3).expand(2, 7), torch.arange(11).remainder(3).expand(2, 11)
try:
    head.gradients(x, y, q, a)
except ValueError as error:
    assert "process_group" in str(error), error
else:
    raise AssertionError("no word about the other process")
own = head.gradients(x, y, q, a, process_group="local").gradients
for p in head.parameters():
    p.grad = None
head.gradients(x, y, q, a, process_group=dist.group.WORLD)
want = [g.clone() for g in own]
for g in want:
    dist.all_reduce(g)
for p, g in zip(head.parameters(), want):
    torch.testing.assert_close(p.grad, g / 2)
print("equal")
"""


def test_several_processes(tmp_path: Any) -> None:
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES)
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    for process in processes:
        out, error = process.communicate(timeout=120)
        assert process.returncode == 0 and out.strip() == "equal", error
