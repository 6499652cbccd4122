"""Meta-training: it learns, its gradients are right, and a run that was cut goes on bit for bit."""

from __future__ import annotations

import signal
import threading
import time
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from runs import make_bank, start

from kernelmeta.training import TrainConfig, Trainer
from kernelmeta.training.checkpoint import Checkpoint
from kernelmeta.training.loading import load_learner
from kernelmeta.training.trainer import CHECKPOINT

SMALL = TrainConfig(way=3, shot=1, query=4, episodes=600, inner_lr=1e-2, seed=3, data="a test")


def test_training_lowers_the_loss_and_its_history_is_kept(bank, tmp_path):
    trainer = Trainer(replace(SMALL, episodes=2048, lr=5e-3), bank)
    reports = []
    assert trainer.run(tmp_path, report=lambda *values: reports.append(values))
    episodes, loss, accuracy = zip(*trainer.history, strict=True)
    assert episodes[-1] == trainer.seen == 2048
    assert sum(loss[-4:]) < sum(loss[:4])
    assert all(100 / 3 < value <= 100 for value in accuracy)
    assert len(trainer.validations) == 10
    assert {name for name, _, _ in reports} == {"loss", "accuracy", "validation accuracy"}
    assert not torch.equal(trainer.head.weight, torch.ones_like(trainer.head.weight))


@pytest.mark.parametrize("tasks", [1, 4])
def test_a_step_is_that_of_the_cross_entropy(bank, tasks):
    config = replace(SMALL, tasks_per_step=tasks, validate_every=0)
    trainer = Trainer(config, bank)
    head = config.make_learner(bank.n_features)
    optimizer = torch.optim.SGD(head.parameters(), 1e-3, 0.9, weight_decay=5e-4, nesterov=True)
    losses = []
    for step in range(3):
        support_index, support_labels, query_index, answers = trainer.sampler.draw(step * tasks, tasks)
        logits = head(bank.features[support_index], support_labels, bank.features[query_index])
        loss = F.cross_entropy(logits.flatten(0, 1), answers.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    loss, _ = trainer._run_block(3)
    assert loss == pytest.approx(sum(losses) / 3, rel=1e-5)
    for name, parameter in trainer.head.named_parameters():
        torch.testing.assert_close(parameter, head.get_parameter(name), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "change", [{}, {"optimizer": "Adam"}, {"tasks_per_step": 8}, {"momentum": 0.0}, {"average": 96}]
)
def test_a_run_cut_at_any_checkpoint_goes_on_bit_for_bit(bank, tmp_path, monkeypatch, change):
    config = replace(SMALL, episodes=600 * change.get("tasks_per_step", 1), **change)
    Trainer(config, bank).run(tmp_path / "whole")
    monkeypatch.setattr("kernelmeta.training.trainer.CHECKPOINT_SECONDS", 0.0)
    saves = []

    def save_and_stop(self, path):
        original(self, path)
        saves.append(path)
        if len(saves) < 3:
            raise KeyboardInterrupt

    original = Checkpoint.save
    monkeypatch.setattr(Checkpoint, "save", save_and_stop)
    for _ in range(2):
        trainer = Trainer(config, bank)
        if saves:
            trainer.restore(Checkpoint.load(tmp_path / "cut" / CHECKPOINT, "train"))
        with pytest.raises(KeyboardInterrupt):
            trainer.run(tmp_path / "cut")
        assert 0 < trainer.step < config.n_steps
    trainer = Trainer(config, bank)
    trainer.restore(Checkpoint.load(tmp_path / "cut" / CHECKPOINT, "train"))
    assert trainer.run(tmp_path / "cut")
    assert (tmp_path / "cut" / CHECKPOINT).read_bytes() == (tmp_path / "whole" / CHECKPOINT).read_bytes()


def test_the_average_is_that_of_the_weights_of_the_last_steps(bank, tmp_path):
    config = replace(SMALL, episodes=256, average=64, lr=1e-2, validate_every=0)
    trainer = Trainer(config, bank)
    weights = []
    step = trainer.optimizer.step

    def recorded():
        step()
        weights.append(trainer.head.weight.detach().clone())

    trainer.optimizer.step = recorded
    trainer.run(tmp_path)
    mean = weights[31]
    for late in weights[63::32]:
        mean = (mean + late) / 2
    torch.testing.assert_close(trainer.learner.weight.detach(), mean)
    assert not torch.allclose(mean, weights[-1], rtol=1e-6)
    torch.testing.assert_close(load_learner(tmp_path)[0].weight, trainer.learner.weight)
    short = Trainer(replace(config, episodes=5), bank)
    short.run(tmp_path / "short")
    assert torch.equal(short.learner.weight, short.head.weight)


def test_interrupted_leaves_a_checkpoint_and_the_usual_handler(bank, tmp_path):
    trainer = Trainer(replace(SMALL, episodes=10**7), bank)
    before = signal.getsignal(signal.SIGINT)
    threading.Timer(0.3, signal.raise_signal, (signal.SIGINT,)).start()
    assert not trainer.run(tmp_path)
    assert signal.getsignal(signal.SIGINT) is before
    assert Checkpoint.load(tmp_path / CHECKPOINT, "train").state["step"] == trainer.step > 0


def test_a_checkpoint_of_something_else_is_refused(bank, tmp_path):
    trainer = Trainer(SMALL, bank)
    trainer.run(tmp_path)
    checkpoint = Checkpoint.load(tmp_path / CHECKPOINT, "train")
    with pytest.raises(ValueError, match="data: not the bank that the run began with"):
        Trainer(SMALL, make_bank(samples=21)).restore(checkpoint)
    with pytest.raises(ValueError, match=r"does not fit the run.*weight1"):
        Trainer(replace(SMALL, hidden=5), bank).restore(checkpoint)
    with pytest.raises(ValueError, match="expected a checkpoint of 'kernelmeta pretrain', got one of 'train'"):
        Checkpoint.load(tmp_path / CHECKPOINT, "pretrain")


def test_nan_in_one_class_leaves_training_running(bank, tmp_path):
    broken = make_bank()
    broken.features[broken.labels == 23] = float("nan")  # a test class
    assert Trainer(SMALL, broken).run(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"way": 13}, "way: 13 classes asked for, the train split has 12"),
        ({"query": 20}, "class 'class 0' of the train split has 20 samples; 21 are needed"),
        ({"lr": float("nan")}, "lr: expected a number of at least 0"),
        ({"steps": -1}, "steps: expected at least 0"),
        ({"optimizer": "SGDD"}, "optimizer: expected the name of one of torch.optim"),
        ({"optimizer": "LBFGS"}, "optimizer: LBFGS needs a closure"),
        ({"learner": "x"}, "learner: expected one of prototypes, .*, sib.*, got 'x'"),
        ({"learner": "prototypes"}, "steps: the learner 'prototypes' takes no such setting, got 3"),
        ({"channels": 8}, "channels: the learner 'sib' takes no such setting, got 8"),
        ({"query_balance": "dirichlet"}, "query_balance"),
        ({"norm_stats": "none"}, "norm_stats: expected one of"),
        (
            {"learner": "combined", "steps": None, "inner_lr": None, "phases": "cross_entropy:5"},
            "phases: expected ORACLE:STEPS:RATE",
        ),
        ({"learner": "combined", "steps": None, "inner_lr": None, "phases": "hope:5:1"}, "oracle: expected one of"),
        ({"hidden": 0}, "hidden: expected at least 1"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(bank, change, message):
    with pytest.raises(ValueError, match=message):
        Trainer(TrainConfig(**{**SMALL.to_dict(), **change}), bank)


def arguments(bank_file, out, *more):
    small = ("--way", 3, "--query", 4, "--inner-lr", 0.01, "--seed", 3, "--eval-episodes", 0, "--quiet")
    return ("train", "--data", bank_file, "--out", out, *small, *more)


def test_a_killed_run_resumes_bit_for_bit(bank_file, tmp_path):
    episodes = ("--episodes", 8000)
    run = start(*arguments(bank_file, tmp_path / "cut", *episodes))
    deadline = time.monotonic() + 60
    while not (tmp_path / "cut" / CHECKPOINT).exists() and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    run.kill()
    run.communicate()
    step = Checkpoint.load(tmp_path / "cut" / CHECKPOINT, "train").state["step"]
    assert 0 < step < 8000, "the run was to be killed in the middle"
    for out, more in (("cut", ("--resume",)), ("whole", ())):
        run = start(*arguments(bank_file, tmp_path / out, *episodes, *more))
        _, errors = run.communicate(timeout=120)
        assert run.returncode == 0, errors
    assert (tmp_path / "cut" / CHECKPOINT).read_bytes() == (tmp_path / "whole" / CHECKPOINT).read_bytes()


def test_two_processes_give_what_one_gives(bank_file, tmp_path):
    # More or larger steps would carry rounding over the edges of ReLU, and on from there.
    more = ("--tasks-per-step", 4, "--episodes", 80, "--lr", 1e-4)
    launcher = ("torch.distributed.run", "--nproc-per-node=2", "--standalone")
    runs = [
        start(*arguments(bank_file, tmp_path / "two", *more), launcher=launcher),
        start(*arguments(bank_file, tmp_path / "one", *more)),
    ]
    for run in runs:
        _, errors = run.communicate(timeout=120)
        assert run.returncode == 0, errors
    one, two = (Checkpoint.load(tmp_path / name / CHECKPOINT, "train") for name in ("one", "two"))
    assert one.state["step"] == two.state["step"] == 20
    for name, tensor in one.tensors["model"].items():
        torch.testing.assert_close(two.tensors["model"][name], tensor, rtol=1e-4, atol=1e-6)
    assert not torch.equal(one.tensors["model"]["weight"], torch.ones(24))
    for a, b in zip(one.state["history"], two.state["history"], strict=True):
        assert a == pytest.approx(b, rel=1e-4)
