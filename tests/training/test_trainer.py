"""Meta-training: it learns, its gradients are right, and a run that was cut goes on bit for bit."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from runs import make_bank, start

from kernelmeta.training import TrainConfig, Trainer
from kernelmeta.training.checkpoint import CHECKPOINT, Checkpoint
from kernelmeta.training.finite import NotFiniteError
from kernelmeta.training.loading import load_learner

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


def test_the_weights_that_count_are_the_best_on_the_validation_classes(bank, tmp_path, monkeypatch):
    """Of the values below, the 70 that came later: an equal one is trained longer."""
    values, weights = iter([50.0, 70.0, 70.0, 60.0]), []

    def validate(self):
        weights.append({name: t.clone() for name, t in self.learner.state_dict().items()})
        return next(values), 1.0

    monkeypatch.setattr(Trainer, "_validate", validate)
    monkeypatch.setattr("kernelmeta.training.trainer.BLOCK_STEPS", 32)
    trainer = Trainer(replace(SMALL, episodes=500, tasks_per_step=4, lr=0.1, validate_every=128), bank)
    trainer.run(tmp_path)
    assert [seen for seen, *_ in trainer.validations] == [128, 256, 384, 500]
    learner, of_run = trainer.learner_at("best")
    assert of_run == {"at": "best", "at_episodes": 384, "trained_episodes": 500, "temperature": 1.0}
    loaded, settings = load_learner(tmp_path)
    assert {name: settings[name] for name in of_run} == of_run
    last, of_last = trainer.learner_at("last")
    assert of_last == {"at": "last", "at_episodes": 500, "trained_episodes": 500, "temperature": 1.0}
    for found, want in (
        (learner, weights[2]), (loaded, weights[2]), (load_learner(tmp_path, "best")[0], weights[2]),
        (last, weights[3]), (load_learner(tmp_path, "last")[0], weights[3]),
    ):  # fmt: skip
        assert all(torch.equal(t, want[name]) for name, t in found.state_dict().items())
    assert not torch.equal(weights[2]["weight"], weights[3]["weight"])
    again = Trainer(trainer.config, bank)
    again.restore(Checkpoint.load(tmp_path / CHECKPOINT, "train"))
    assert torch.equal(again.learner_at("best")[0].weight, weights[2]["weight"])


def test_without_a_look_at_validation_classes_the_last_weights_count(bank, tmp_path):
    trainer = Trainer(replace(SMALL, episodes=100, validate_every=0), bank)
    trainer.run(tmp_path)
    assert trainer.learner_at("best")[1]["at"] == "last"
    assert load_learner(tmp_path)[1]["at"] == "last"
    with pytest.raises(ValueError, match="has no best weights: its training looked at no validation classes"):
        load_learner(tmp_path, "best")
    with pytest.raises(ValueError, match="at: expected best or last, got 'first'"):
        load_learner(tmp_path, "first")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_interrupted_leaves_a_checkpoint_and_the_usual_handler(bank, tmp_path, name):
    trainer = Trainer(replace(SMALL, episodes=10**7), bank)
    number = getattr(signal, name)
    before = signal.getsignal(number)
    threading.Timer(0.3, signal.raise_signal, (number,)).start()
    assert not trainer.run(tmp_path)
    assert signal.getsignal(number) is before
    assert Checkpoint.load(tmp_path / CHECKPOINT, "train").state["step"] == trainer.step > 0


def test_a_checkpoint_of_something_else_is_refused(bank, tmp_path):
    trainer = Trainer(SMALL, bank)
    trainer.run(tmp_path)
    checkpoint = Checkpoint.load(tmp_path / CHECKPOINT, "train")
    with pytest.raises(ValueError, match="data: not the bank that the run began with"):
        Trainer(SMALL, make_bank(samples=21)).restore(checkpoint)
    for change, message in (
        ({"hidden": 5}, "hidden: the checkpoint was trained with None, not 5"),
        ({"seed": 4}, "seed: the checkpoint was trained with 3, not 4"),
        ({"lr": 2e-3}, "lr: the checkpoint was trained with 0.001, not 0.002"),
    ):
        with pytest.raises(ValueError, match=message):
            Trainer(replace(SMALL, **change), bank).restore(checkpoint)
    for name, value in (("step", -1), ("step", 2.5), ("step", True), ("history", [[1, 2]]), ("validations", 3)):
        broken = replace(checkpoint, state={**checkpoint.state, name: value})
        with pytest.raises(ValueError, match=f"does not fit the run \\({name}: expected"):
            Trainer(SMALL, bank).restore(broken)
    checkpoint.tensors["optimizer"]["0.momentum_buffer"][0] = float("inf")
    with pytest.raises(ValueError, match="holds NaN or infinite numbers"):
        Trainer(SMALL, bank).restore(checkpoint)
    with pytest.raises(ValueError, match="expected a checkpoint of 'kernelmeta pretrain', got one of 'train'"):
        Checkpoint.load(tmp_path / CHECKPOINT, "pretrain")


def test_longer_training_and_data_elsewhere_are_no_other_run(bank, tmp_path):
    trainer = Trainer(SMALL, bank)
    trainer.run(tmp_path)
    resumed = Trainer(replace(SMALL, episodes=700, data="elsewhere"), bank)
    resumed.restore(Checkpoint.load(tmp_path / CHECKPOINT, "train"))
    assert resumed.step == trainer.step
    other = make_bank()
    other.features[-1, -1] += 1  # one number of all makes another bank
    with pytest.raises(ValueError, match="data: not the bank that the run began with"):
        Trainer(SMALL, other).restore(Checkpoint.load(tmp_path / CHECKPOINT, "train"))


MANY_WAYS = [
    {},
    {"tasks_per_step": 4},
    {"learner": "maml", "steps": 2, "hidden": 8, "norm_stats": None},
    {"learner": "anil"},
    {"learner": "prototypes"},
    {"learner": "ridge"},
    {"learner": "combined"},
]


@pytest.mark.parametrize("change", MANY_WAYS, ids=lambda change: change.get("learner", f"sib {len(change)}"))
def test_training_stops_at_what_is_not_finite_and_keeps_the_checkpoint(bank, tmp_path, monkeypatch, change):
    monkeypatch.setattr("kernelmeta.training.trainer.CHECKPOINT_SECONDS", 0.0)
    settings = {"way": 3, "shot": 1, "query": 4, "episodes": 4000, "data": "a test", "validate_every": 0}
    config = TrainConfig(**{**settings, **change})
    broken = make_bank()
    trainer = Trainer(config, broken)
    trainer._run_block(trainer.block_steps)
    trainer.checkpoint().save(tmp_path / CHECKPOINT)
    good = (tmp_path / CHECKPOINT).read_bytes()
    broken.features[broken.labels == 3] = float("nan")
    episodes = trainer.sampler.draw(trainer.seen, 400)
    touched = (broken.labels[episodes.support_index] == 3).any(1) | (broken.labels[episodes.query_index] == 3).any(1)
    T = config.tasks_per_step
    first = (trainer.seen + int(touched.nonzero()[0])) // T * T
    named = f"episode {first}" if T == 1 else f"episodes {first} to {first + T - 1}"
    with pytest.raises(NotFiniteError, match=rf"the loss of {named} \(step {first // T}\)"):
        trainer.run(tmp_path)
    assert (tmp_path / CHECKPOINT).read_bytes() == good


def test_a_rate_that_is_too_large_stops_training(bank, tmp_path):
    with pytest.raises(NotFiniteError, match=r"training stopped: .*lr 1e\+30"):
        Trainer(replace(SMALL, lr=1e30), bank).run(tmp_path)
    assert not (tmp_path / CHECKPOINT).exists()


def test_what_is_not_finite_is_noticed_in_every_tensor_of_a_checkpoint(bank, tmp_path):
    config = replace(SMALL, average=64, optimizer="Adam")
    trainer = Trainer(config, bank)
    trainer._run_block(3)
    names = [name for name, tensor in trainer._tensors().items() if tensor.is_floating_point()]
    assert {name.partition(".")[0] for name in names} == {"model", "optimizer", "average"}
    for name in names:
        tensor = trainer._tensors()[name]
        before = tensor.clone()
        tensor.view(-1)[-1] = float("inf")
        with pytest.raises(NotFiniteError, match=f"{name} is NaN or infinite after episodes 0 to 2"):
            trainer._check_finite(torch.zeros(3))
        tensor.copy_(before)
    trainer._check_finite(torch.zeros(3))


def test_validation_with_rows_that_are_not_finite_is_told(bank, tmp_path, capsys):
    broken = make_bank()
    broken.features[broken.labels == 15] = float("nan")  # a validation class
    trainer = Trainer(replace(SMALL, episodes=128), broken)
    assert trainer.run(tmp_path)
    assert "validation after 128 episodes: of 4800 query rows, some have NaN" in capsys.readouterr().err


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
    wait_for(run, tmp_path / "cut" / CHECKPOINT)
    run.kill()
    run.communicate()
    step = Checkpoint.load(tmp_path / "cut" / CHECKPOINT, "train").state["step"]
    assert 0 < step < 8000, "the run was to be killed in the middle"
    for out, more in (("cut", ("--resume",)), ("whole", ())):
        run = start(*arguments(bank_file, tmp_path / out, *episodes, *more))
        _, errors = run.communicate(timeout=120)
        assert run.returncode == 0, errors
    assert (tmp_path / "cut" / CHECKPOINT).read_bytes() == (tmp_path / "whole" / CHECKPOINT).read_bytes()


def test_under_nohup_a_run_goes_on(bank_file, tmp_path):
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does; the process inherits it
    try:
        run = start(*arguments(bank_file, tmp_path / "run", "--episodes", 20000))
    finally:
        signal.signal(signal.SIGHUP, previous)
    wait_for(run, tmp_path / "run" / CHECKPOINT)
    run.send_signal(signal.SIGHUP)
    _, errors = run.communicate(timeout=120)
    assert run.returncode == 0, errors


@pytest.mark.parametrize("more", [(), ("--quiet",)])
def test_a_terminal_that_goes_away_leaves_a_checkpoint(bank_file, tmp_path, more):
    out = tmp_path / "run"
    args = [arg for arg in arguments(bank_file, out, "--episodes", 10**8) if arg != "--quiet"]
    child, terminal = pty.fork()
    if child == 0:
        os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        os.execv(sys.executable, [sys.executable, "-m", "kernelmeta", *map(str, args), *more])
    deadline = time.monotonic() + 60
    while not (out / CHECKPOINT).exists() and time.monotonic() < deadline:
        read_what_is_there(terminal)
    first = Checkpoint.load(out / CHECKPOINT, "train").state["step"]
    for _ in range(10):
        read_what_is_there(terminal)
    os.close(terminal)  # all writing to it fails from here on, and SIGHUP is sent
    _, status = os.waitpid(child, 0)
    assert os.WIFEXITED(status), status
    assert Checkpoint.load(out / CHECKPOINT, "train").state["step"] > first


def read_what_is_there(terminal: int) -> None:
    if select.select([terminal], [], [], 0.05)[0]:
        os.read(terminal, 1 << 16)


def wait_for(run, path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists() and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)


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


def test_making_a_learner_imports_nothing_that_takes_long():
    code = (
        "import sys; import kernelmeta.cli; from kernelmeta.training.config import TrainConfig\n"
        "for learner in ('sib', 'ridge', 'combined'): TrainConfig(learner=learner).make_learner(64)\n"
        "assert not {'sympy', 'torch._dynamo'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
