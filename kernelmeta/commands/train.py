"""``kernelmeta train``: meta-training, and the evaluation after it."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import Any

from kernelmeta.command_line import (
    HELP,
    PRETRAIN_HELP,
    Add,
    at_option,
    bank_of,
    claimed_by_first,
    given_settings,
    machine_options,
    nothing_to_do,
    run_folder,
    settings_options,
)  # fmt: skip
from kernelmeta.data import EpisodeSampler
from kernelmeta.data.files import write_json
from kernelmeta.ranks import Ranks, ranks
from kernelmeta.reference.focal_distillation import DISTANCES
from kernelmeta.training import runs
from kernelmeta.training.config import TrainConfig
from kernelmeta.training.evaluation import evaluate, table, title
from kernelmeta.training.learners import LEARNERS
from kernelmeta.training.loading import for_ways
from kernelmeta.training.plots import steps_plot, training_plot
from kernelmeta.training.predecessor import flips_line, load_predecessor, paired_flips, percentages
from kernelmeta.training.trainer import FREE, Trainer

_HELP = {
    "learner": f"what to train: {', '.join(LEARNERS)}",
    "steps": "inner steps K",
    "inner_lr": "inner learning rate",
    "phases": "inner loop of combined: ORACLE:STEPS:RATE, one or more with commas; ORACLE:STEPS:RATE:given is"
    " told the classes' shares of the query rows",
    "classifier": "classifier of combined: cosine, linear, euclidean or dot",
    "start": "where combined starts: class_means, learned or zero",
    "hidden": "hidden units of the MLP that guesses gradients (default: 8 a way, equivariant: 16), or of maml's network"
    " for features",
    "first_order": "treat the inner gradients as constants",
    "learn_rates": "learn a rate for every inner step",
    "channels": "channels of maml's Conv-4, if the data are pixels",
    "scale": "scale of a cosine or Euclidean classifier at the start",
    "norm_stats": "statistics that the MLP's BatchNorm uses: task, batch or running",
    "reduction": "what the steps of combined follow: the mean or the sum over rows (default: the mean of losses, and"
    " the sum of guessed gradients)",
    "episodes": "episodes to train on",
    "tasks_per_step": "episodes in each step of the optimizer",
    "schedule": "of the learning rate: constant, or one_cycle, which rises for a tenth of the run and falls to 0",
    "clip": "largest norm of the gradient of all parameters, to which a larger one is cut (default: any)",
    "optimizer": "a name in torch.optim",
    "average": "evaluate a running mean of the weights over this many steps of the optimizer; 0: the last weights",
    "validate_every": "episodes between validations, by default a tenth of the run; 0: never",
    "update_from": "a run of train, whose learner the new one replaces and whose right answers it keeps",
    "update_distance": f"from the old logits: {', '.join(DISTANCES)} (default, with --update-from: kl)",
    "update_weight": "of the distance against the cross entropy (default, with --update-from: 1)",
    "update_alpha": "weight of every row in it (default, with --update-from: 1)",
    "update_beta": "what rows that the old learner gets right have more (default, with --update-from: 5)",
    "update_tau": "temperature of kl (default, with --update-from: 100)",
    **{name: f"{HELP[name]}, or LEAST:MOST: {what}" for name, what in (
        ("way", "drawn for every episode"), ("shot", "drawn for every episode"), ("query", "drawn for every class"),
    )},
    **PRETRAIN_HELP,
}  # fmt: skip


def add_commands(add: Add) -> None:
    """Adds this command to the parser."""
    command = add(
        "train",
        _train,
        "Meta-train on episodes; evaluate on those of the test classes.",
        "train --data bank.safetensors --learner sib --way 5 --shot 1 --out runs/one",
    )
    settings_options(command, TrainConfig, _HELP)
    command.option(
        "episodes",
        "--eval-episodes",
        type=int,
        default=2000,
        help="episodes of the evaluation at the end; 0: no evaluation (default: 2000)",
    )
    at_option(command)
    machine_options(command)


def _train(args: argparse.Namespace) -> None:
    given = given_settings(args, TrainConfig)
    if args.eval_episodes < 0 or args.eval_episodes == 1:
        raise ValueError(f"--eval-episodes: expected 0 or at least 2, got {args.eval_episodes}")
    with ranks(args.device) as processes:
        way, shot = (str(given.get(name, default)).replace(":", "-") for name, default in (("way", 5), ("shot", 1)))
        out = run_folder(args, f"{given.get('learner', 'sib')}-{way}way-{shot}shot")
        with claimed_by_first(out, processes):
            _train_in(out, args, given, processes)


def _train_in(out: Path, args: argparse.Namespace, given: dict[str, Any], processes: Ranks) -> None:
    settings, checkpoint = runs.prepare(out, "train", given, args.resume, FREE)
    config = TrainConfig.from_dict(settings)
    bank = bank_of(args, config.data, config.weights, config.backbone, config.learner)
    predecessor = None
    if config.update_from is not None:
        predecessor = load_predecessor(
            config.update_from, config, bank, device=args.device,
            open_bank=lambda old: bank_of(args, old["data"], old["weights"], old["backbone"], old["learner"]),
        )  # fmt: skip
    trainer = Trainer(config, bank, device=args.device, ranks=processes, predecessor=predecessor)
    test: dict[str, EpisodeSampler] = {}
    if args.eval_episodes and len(bank.classes("test")):
        test = config.cells(bank, "test")
    if checkpoint:
        trainer.restore(checkpoint)
        if config.episodes < checkpoint.state["config"]["episodes"] and config.n_steps <= trainer.step:
            return nothing_to_do(out, "episodes", trainer.seen, config.episodes)
    processes.barrier()  # everybody has looked at the folder before anybody writes to it
    if processes.first:
        runs.write_config(out, "train", config.to_dict())
    report_to = runs.scalars(out, trainer.seen) if processes.first else contextlib.nullcontext(None)
    with report_to as report:
        finished = trainer.run(out, report=report, progress=not args.quiet)
    if processes.first:
        _finish(args, out, trainer, test, finished)
    if not finished:
        raise KeyboardInterrupt


def _finish(
    args: argparse.Namespace, out: Path, trainer: Trainer, test: dict[str, EpisodeSampler], finished: bool
) -> None:
    if not finished:
        print(f"stopped after {trainer.seen} episodes; to go on: --out {out} --resume", file=sys.stderr)
        return
    at, loss, accuracy = zip(*trainer.history, strict=True)
    validation = [(seen, value) for seen, value, _ in trainer.validations]
    training_plot(out / "training.png", "episodes", at, loss, accuracy, validation)
    if not test:
        print(f"{out}: not evaluated" + ("" if args.eval_episodes == 0 else "; the bank has no test classes"))
        return
    learner, of_run = trainer.learner_at(args.at or "best")
    temperature = of_run.pop("temperature")
    cells = {}
    for name, sampler in test.items():
        cells[name] = evaluate(
            for_ways(learner, sampler.way), trainer.features, sampler, args.eval_episodes,
            learner=trainer.config.learner, temperature=temperature, progress=not args.quiet,
        )  # fmt: skip
        cells[name] |= {"query_balance": name.partition(", ")[2].removesuffix(" queries"), **of_run}
        cells[name] |= {"seed": trainer.config.seed, "split": "test", "data": trainer.config.data}
        if len(test) > 1:
            print(f"{name}:\n{table(cells[name])}\n")
    results = dict(next(iter(cells.values())))
    if len(test) > 1:
        results["cells"] = cells
    flipped = None
    if trainer.predecessor is not None:
        sampler = next(iter(test.values()))
        flipped = paired_flips(learner, trainer.features, trainer.predecessor, sampler, args.eval_episodes)
        results |= {"update_from": trainer.config.update_from, "flips": percentages(flipped)}
    write_json(out / runs.RESULTS, results)
    steps_plot(out / "accuracy_over_steps.png", results, title(results))
    if len(test) == 1:
        print(table(results))
    if flipped is not None:
        print(flips_line(flipped, str(trainer.config.update_from)))
    print(f"{out / runs.RESULTS}")
