"""The command ``kernelmeta``: pretrain, extract, import, train, evaluate, predict, compare, info, and those of updates.

Every command ends with 0, or with 2 and one line on stderr that says what was wrong with its input, or with
130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import torch

from kernelmeta.backends import select
from kernelmeta.command_line import PRETRAIN_HELP, check_outputs, given_settings, reading, run_folder, say_of
from kernelmeta.data import EpisodeSampler, FeatureBank
from kernelmeta.data.counter import check_seed
from kernelmeta.data.files import read_json, write_json, write_text
from kernelmeta.data.importing import import_bank
from kernelmeta.data.words import printable, size_text
from kernelmeta.graceful import commands as graceful
from kernelmeta.reference.focal_distillation import DISTANCES
from kernelmeta.training import runs
from kernelmeta.training.answers import UNTRAINED
from kernelmeta.training.backbones import BACKBONES, load_backbone, make_backbone
from kernelmeta.training.candidates import read_candidates
from kernelmeta.training.checkpoint import CHECKPOINT, check_same, fingerprint
from kernelmeta.training.comparison import CONFIG, CONTESTANTS, PLOT, RESULTS, TABLE, CompareConfig, Comparison
from kernelmeta.training.comparison_table import cell_title, markdown
from kernelmeta.training.config import TrainConfig
from kernelmeta.training.distributed import Ranks, ranks
from kernelmeta.training.evaluation import evaluate, table, title
from kernelmeta.training.extraction import extract
from kernelmeta.training.learners import LEARNERS
from kernelmeta.training.loading import load_learner
from kernelmeta.training.plots import comparison_plot, steps_plot, training_plot
from kernelmeta.training.predecessor import flips_line, load_predecessor, paired_flips, percentages
from kernelmeta.training.prediction import Backbone, backbone_of, predict, read_rows
from kernelmeta.training.pretraining import FREE as PRETRAIN_FREE
from kernelmeta.training.pretraining import PretrainConfig, Pretrainer
from kernelmeta.training.report import write_report
from kernelmeta.training.sources import open_bank, open_images
from kernelmeta.training.trainer import FREE as TRAIN_FREE
from kernelmeta.training.trainer import Trainer
from kernelmeta.version import __version__

_BACKBONE = ", ".join(BACKBONES)
_DATA = (
    "glyphs (their pixels, or features if --weights are given), a bank, or a folder of images with --weights (maml:"
    " pixels, without)"
)
_HELP = {
    "data": _DATA,
    "backbone": f"the architecture of --weights, if the file does not say: {_BACKBONE}",
    "weights": "weights of the backbone, if the data are images: a checkpoint of pretrain, or a published one",
    "way": "classes in an episode",
    "shot": "support rows of each class",
    "query": "query rows for each class",
    "query_balance": "how the query rows are divided among the classes: even, or dirichlet:ALPHA",
    "learner": f"what to train: {', '.join(LEARNERS)}",
    "steps": "inner steps K",
    "inner_lr": "inner learning rate",
    "phases": "inner loop of combined: ORACLE:STEPS:RATE, one or more with commas",
    "classifier": "classifier of combined: cosine or linear",
    "start": "where combined starts: class_means, learned or zero",
    "hidden": "hidden units of the synthetic-gradient MLP (default: 8 a way), or of maml's network for features",
    "first_order": "treat the inner gradients as constants",
    "learn_rates": "learn a rate for every inner step",
    "channels": "channels of maml's Conv-4, if the data are pixels",
    "scale": "scale of a cosine classifier at the start",
    "norm_stats": "statistics that the MLP's BatchNorm uses: task, batch or running",
    "episodes": "episodes to train on",
    "tasks_per_step": "episodes in each step of the optimizer",
    "optimizer": "a name in torch.optim",
    "average": "evaluate a running mean of the weights over this many steps of the optimizer; 0: the last weights",
    "validate_every": "episodes between validations, by default a tenth of the run; 0: never",
    "update_from": "a run of train, whose learner the new one replaces and whose right answers it keeps",
    "update_distance": f"from the old logits: {', '.join(DISTANCES)} (default, with --update-from: kl)",
    "update_weight": "of the distance against the cross entropy (default, with --update-from: 1)",
    "update_alpha": "weight of every row in it (default, with --update-from: 1)",
    "update_beta": "what rows that the old learner gets right have more (default, with --update-from: 5)",
    "update_tau": "temperature of kl (default, with --update-from: 100)",
    "seed": "seed of everything random",
    **PRETRAIN_HELP,
    **graceful.HELP,
}
_MOST_WORKERS = 1024
# What `compare --quick` means.
_QUICK: dict[str, Any] = {
    "episodes": 4000,
    "trial_episodes": 1000,
    "finalists": 1,
    "validation_episodes": 200,
    "eval_episodes": 500,
    "most_candidates": 2,
}
# The published settings are for 600 images a class; the glyphs have 24, and on the validation classes longer
# training is worse.
_GLYPHS = {"epochs": 6, "warmup_epochs": 1, "milestone": 4}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.splitlines())} (see {self.prog} --help)\n")


def _settings(parser: argparse.ArgumentParser, config: type[Any], texts: Mapping[str, str | None]) -> None:
    """An option for every setting; only those given end up in the namespace.

    Args:
        texts: help where it is not that of `_HELP` with the default; None: no option, the setting is positional.
    """
    for field in fields(config):
        option, type_name = f"--{field.name.replace('_', '-')}", str(field.type).split(" ")[0]
        if field.name in texts:
            text = texts[field.name]
        else:
            default = _defaults(field.name) if field.default is None else f" (default: {field.default})"
            text = _HELP[field.name] + default
        if text is None:
            continue
        if type_name == "bool":
            parser.add_argument(option, action="store_true", default=argparse.SUPPRESS, help=text)
            continue
        kind = {"int": int, "float": float}.get(type_name, str)
        parser.add_argument(option, type=kind, default=argparse.SUPPRESS, metavar="X", help=text)
    parser.add_argument("--out", type=Path, metavar="DIR", help="run folder (default: a new one below runs/)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out, bit for bit")


def _defaults(setting: str) -> str:
    """What a setting without a default of its own is by default, for the learners that take it."""
    found: dict[str, list[str]] = {}
    for learner in LEARNERS:
        value = getattr(TrainConfig(learner=learner), setting, None)
        if value is not None and value is not False:
            found.setdefault(str(value), []).append(learner)
    if not found:
        return ""
    values = [f"{value} for {', '.join(names)}" for value, names in found.items()]
    same_for_all = len(found) == 1 and next(iter(found.values())) == list(LEARNERS)
    return f" (default: {next(iter(found)) if same_for_all else '; '.join(values)})"


def _machine(parser: argparse.ArgumentParser, skips: bool = True) -> None:
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--threads", type=int, help="threads of PyTorch (default: its own choice)")
    parser.add_argument("--workers", type=int, default=0, help="processes that decode images (default: 0)")
    if skips:
        parser.add_argument(
            "--skip-bad",
            action="store_true",
            help="skip images that cannot be read and rows that are not finite (default: stop with an error)",
        )
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="kernelmeta", description="Few-shot learning with fused inner loops.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"kernelmeta {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.set_defaults(run=run)
        return command

    command = add("pretrain", _pretrain, "Train a backbone as a classifier of its classes.")
    command.add_argument(
        "data", metavar="FOLDER|glyphs", help="a folder with train/, val/ and test/, glyphs, or a file of glyphs (.npz)"
    )
    _settings(command, PretrainConfig, {"data": None})
    _machine(command)

    command = add("extract", _extract, "Turn images into a feature bank.")
    command.add_argument("data", metavar="FOLDER|glyphs", help="a folder with train/, val/ and test/, or glyphs")
    command.add_argument("--backbone", help=f"{_BACKBONE}; a checkpoint of pretrain says it itself")
    command.add_argument("--weights", metavar="FILE", help=_HELP["weights"] + " (default: untrained)")
    command.add_argument("--style", help=_HELP["style"])
    command.add_argument("--seed", type=int, default=0, help="seed of untrained weights (default: 0)")
    command.add_argument("--out", type=Path, required=True, metavar="FILE", help="the bank to write")
    _machine(command)

    command = add("import", _import, "Turn features and labels from other programs into a feature bank.")
    command.add_argument("files", nargs="+", metavar="FILE", help=".npy, .npz, .pt, .safetensors, .csv, .tsv, .parquet")
    command.add_argument("--out", type=Path, required=True, metavar="BANK", help="the bank to write")
    command.add_argument("--label", metavar="NAME", help="the column or array of the labels (default: label, class, y)")
    command.add_argument(
        "--split", default="60/20/20", help="shares of the classes for train/val/test (default: 60/20/20)"
    )
    command.add_argument("--seed", type=int, default=0, help="seed of the split (default: 0)")
    command.add_argument("--quiet", action="store_true", help="no progress bar")
    command.epilog = "example: kernelmeta import X.npy y.npy --out bank.safetensors"

    command = add("train", _train, "Meta-train on episodes; evaluate on those of the test classes.")
    _settings(command, TrainConfig, {})
    command.add_argument(
        "--eval-episodes",
        type=int,
        default=2000,
        help="episodes of the evaluation at the end; 0: no evaluation (default: 2000)",
    )
    _machine(command)

    command = add("evaluate", _evaluate, "Accuracy of a trained learner beside prototypes and soft k-means.")
    command.add_argument("checkpoint", metavar="RUN_DIR|CHECKPOINT", help="what train made, or a published checkpoint")
    command.add_argument("--data", help=_DATA + " (default: as trained)")
    command.add_argument("--split", default="test", help="train, val or test (default: test)")
    command.add_argument("--episodes", type=int, default=2000, help="episodes to evaluate on (default: 2000)")
    for name in ("shot", "query"):
        command.add_argument(f"--{name}", type=int, help=_HELP[name] + " (default: as trained)")
    command.add_argument("--query-balance", help=_HELP["query_balance"] + " (default: as trained)")
    command.add_argument("--seed", type=int, default=0, help="seed of the episodes (default: 0)")
    command.add_argument("--json", type=Path, metavar="FILE", help="write the results to this file")
    command.add_argument("--plot", type=Path, metavar="FILE", help="draw the accuracy over the inner steps, as a PNG")
    command.add_argument("--backbone", help=_HELP["backbone"])
    command.add_argument("--weights", metavar="FILE", help=_HELP["weights"])
    _machine(command)

    command = add("predict", _predict, "Label rows or images from a few that are labelled.")
    rows = "CSV, Parquet, NumPy, a bank, or a folder"
    command.add_argument("what", metavar="RUN|METHOD", help=f"what train made, or one of {', '.join(UNTRAINED)}")
    command.add_argument("--support", required=True, metavar="ROWS", help=f"the labelled rows: {rows} of class folders")
    command.add_argument("--query", required=True, metavar="ROWS", help=f"the rows to label: {rows} of images")
    command.add_argument("--out", type=Path, required=True, metavar="FILE", help="the labels to write, CSV")
    command.add_argument("--report", type=Path, metavar="FILE", help="write a page about them too, HTML")
    command.add_argument("--label", metavar="NAME", help="the column or array of the labels (default: label, class, y)")
    command.epilog = "example: kernelmeta predict soft_kmeans --support labelled.csv --query rows.csv --out labels.csv"
    command.add_argument("--alone", action="store_true", help="judge each row alone, not all of them together")
    command.add_argument("--weights", metavar="FILE", help=_HELP["weights"] + " (default: those of the run)")
    command.add_argument("--backbone", help=_HELP["backbone"])
    _machine(command, skips=False)

    command = add("compare", _compare, "Train and evaluate learners on the same bank and the same test episodes.")
    _compare_settings(command)
    _machine(command)

    graceful.add_commands(add, _settings, _machine)

    add("info", _info, "What is built, what runs, versions.")
    return parser


def _compare_settings(command: argparse.ArgumentParser) -> None:
    """The options of ``compare``; only those given end up in the namespace."""
    default = CompareConfig()
    everybody = ", ".join(CONTESTANTS)

    def add(name: str, kind: Callable[[str], Any], text: str, shown: object) -> None:
        command.add_argument(
            f"--{name.replace('_', '-')}",
            type=kind,
            default=argparse.SUPPRESS,
            metavar="X",
            help=f"{text} (default: {shown})",
        )

    add("data", str, _DATA, default.data)
    command.add_argument("--weights", metavar="FILE", default=argparse.SUPPRESS, help=_HELP["weights"])
    command.add_argument("--backbone", default=argparse.SUPPRESS, help=_HELP["backbone"])
    add("learners", _learners, f"all, or some of {everybody}", ",".join(default.learners))
    add("way", int, _HELP["way"], default.way)
    add("query", int, _HELP["query"], default.query)
    add("shots", _numbers, "support rows of each class, one number or several with commas", "1,5")
    add("balances", _words, _HELP["query_balance"] + ", or several with commas", "even,dirichlet:2")
    add("episodes", int, "episodes that the best settings of a learner are trained on", default.episodes)
    add("trial_episodes", int, "episodes that all settings are trained on before", default.trial_episodes)
    add("finalists", int, "how many settings of a learner go on from there", default.finalists)
    add("validation_episodes", int, "episodes of the validation classes to choose on", default.validation_episodes)
    add("eval_episodes", int, "episodes of the test classes to evaluate on", default.eval_episodes)
    add("most_candidates", int, "at most this many settings of a learner to choose from", "all")
    add("seed", int, _HELP["seed"], default.seed)
    command.add_argument(
        "--candidates", type=Path, metavar="FILE", help="JSON: learner -> list of settings of 'train' to choose from"
    )
    command.add_argument("--quick", action="store_true", help="seconds instead of minutes: shorter, fewer candidates")
    command.add_argument("--out", type=Path, metavar="DIR", help="folder (default: a new one below runs/)")
    command.add_argument("--resume", action="store_true", help="go on with the comparison in --out")


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in _words(text))


def _learners(text: str) -> tuple[str, ...]:
    return CONTESTANTS if text == "all" else _words(text)


@contextlib.contextmanager
def _claimed(out: Path, processes: Ranks) -> Iterator[None]:
    """The run folder for the first process of this run, see `runs.claimed`; an error there is everybody's."""
    processes.barrier()  # all have chosen its name before it is made
    with contextlib.ExitStack() as stack:
        error: Exception | None = None
        if processes.first:
            try:
                stack.enter_context(runs.claimed(out))
            except (OSError, ValueError) as caught:
                error = caught
        if processes.any(error is not None):
            raise error or ValueError(f"out: {out} cannot be used")
        yield


def _nothing_to_do(out: Path, unit: str, done: int, asked: int) -> None:
    print(f"{out}: trained for {done} {unit} already; --{unit} {asked} changes nothing")


def _pretrain(args: argparse.Namespace) -> None:
    given = given_settings(args, PretrainConfig)
    out = run_folder(args, f"pretrain-{given.get('backbone', 'conv4')}")
    with runs.claimed(out):
        settings, checkpoint = runs.prepare(out, "pretrain", given, args.resume, PRETRAIN_FREE)
        config = PretrainConfig.from_dict({**(_GLYPHS if settings["data"] == "glyphs" else {}), **settings})
        images = open_images(config.data, config.style)
        images.check(skip_bad=args.skip_bad, workers=args.workers, progress=not args.quiet)
        trainer = Pretrainer(config, images, device=args.device, workers=args.workers)
        if checkpoint:
            trainer.restore(checkpoint)
            if config.epochs < checkpoint.state["config"]["epochs"] and config.epochs <= trainer.epoch:
                return _nothing_to_do(out, "epochs", trainer.epoch, config.epochs)
        for note in images.notes:
            say_of(args)(note)
        runs.write_config(out, "pretrain", config.to_dict())
        with runs.scalars(out, trainer.epoch) as report:
            finished = trainer.run(out, report=report, progress=not args.quiet)
        if not finished:
            print(f"stopped after {trainer.epoch} epochs; to go on: --out {out} --resume", file=sys.stderr)
            raise KeyboardInterrupt
        training_plot(out / "training.png", "epochs", *zip(*trainer.history, strict=True))
        write_json(
            out / runs.RESULTS,
            {"epochs": trainer.epoch, **dict(zip(("loss", "accuracy"), trainer.history[-1][1:], strict=True))},
        )
    print(f"{out / CHECKPOINT}: accuracy {trainer.history[-1][2]:.1f} % on its own classes")


def _extract(args: argparse.Namespace) -> None:
    images = open_images(args.data, args.style)
    if args.weights is not None:
        backbone, name = load_backbone(args.weights, args.backbone, images.channels, images.size)
        source = f"{images.source}, {name}, weights of {printable(args.weights)}"
    else:
        check_seed(args.seed)
        torch.manual_seed(args.seed)
        name = args.backbone or "conv4"
        backbone = make_backbone(name, images.channels, images.size)
        source = f"{images.source}, {name}, untrained, seed {args.seed}"
    bank = extract(images, backbone, source, device=args.device, **reading(args))
    bank.save(args.out)
    _tell_bank(args.out, bank)


def _import(args: argparse.Namespace) -> None:
    check_outputs({"--out": args.out}, args.files)
    bank = import_bank(
        args.files, args.out, label=args.label, split=args.split, seed=args.seed, progress=not args.quiet,
        say=say_of(args),
    )  # fmt: skip
    _tell_bank(args.out, bank)


def _tell_bank(path: Path, bank: FeatureBank) -> None:
    splits = ", ".join(f"{len(bank.classes(split))} {split}" for split in ("train", "val", "test"))
    print(f"{path}: {len(bank.labels)} x {bank.n_features} features; classes: {splits}")


def _bank(args: argparse.Namespace, data: str, weights: str | None, backbone: str | None, learner: str) -> FeatureBank:
    whole_network = LEARNERS[learner].whole_network
    return open_bank(
        data, weights=weights, backbone=backbone, pixels=whole_network, device=args.device, **reading(args)
    )


def _train(args: argparse.Namespace) -> None:
    given = given_settings(args, TrainConfig)
    if args.eval_episodes < 0 or args.eval_episodes == 1:
        raise ValueError(f"--eval-episodes: expected 0 or at least 2, got {args.eval_episodes}")
    with ranks(args.device) as processes:
        out = run_folder(args, f"{given.get('learner', 'sib')}-{given.get('way', 5)}way-{given.get('shot', 1)}shot")
        with _claimed(out, processes):
            _train_in(out, args, given, processes)


def _train_in(out: Path, args: argparse.Namespace, given: dict[str, Any], processes: Ranks) -> None:
    settings, checkpoint = runs.prepare(out, "train", given, args.resume, TRAIN_FREE)
    config = TrainConfig.from_dict(settings)
    bank = _bank(args, config.data, config.weights, config.backbone, config.learner)
    predecessor = None
    if config.update_from is not None:
        predecessor = load_predecessor(
            config.update_from, config, bank, device=args.device,
            open_bank=lambda old: _bank(args, old["data"], old["weights"], old["backbone"], old["learner"]),
        )  # fmt: skip
    trainer = Trainer(config, bank, device=args.device, ranks=processes, predecessor=predecessor)
    test = None
    if args.eval_episodes and len(bank.classes("test")):
        test = trainer.make_sampler(bank, "test")
    if checkpoint:
        trainer.restore(checkpoint)
        if config.episodes < checkpoint.state["config"]["episodes"] and config.n_steps <= trainer.step:
            return _nothing_to_do(out, "episodes", trainer.seen, config.episodes)
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


def _finish(args: argparse.Namespace, out: Path, trainer: Trainer, test: EpisodeSampler | None, finished: bool) -> None:
    if not finished:
        print(f"stopped after {trainer.seen} episodes; to go on: --out {out} --resume", file=sys.stderr)
        return
    at, loss, accuracy = zip(*trainer.history, strict=True)
    validation = [(seen, value) for seen, value, _ in trainer.validations]
    training_plot(out / "training.png", "episodes", at, loss, accuracy, validation)
    if test is None:
        print(f"{out}: not evaluated" + ("" if args.eval_episodes == 0 else "; the bank has no test classes"))
        return
    results = evaluate(
        trainer.learner.eval(),
        trainer.features,
        test,
        args.eval_episodes,
        learner=trainer.config.learner,
        progress=not args.quiet,
    )
    results |= {"query_balance": trainer.config.query_balance, "seed": trainer.config.seed, "split": "test"}
    results |= {"data": trainer.config.data, "trained_episodes": trainer.seen}
    flipped = None
    if trainer.predecessor is not None:
        flipped = paired_flips(trainer.learner, trainer.features, trainer.predecessor, test, args.eval_episodes)
        results |= {"update_from": trainer.config.update_from, "flips": percentages(flipped)}
    write_json(out / runs.RESULTS, results)
    steps_plot(out / "accuracy_over_steps.png", results, title(results))
    print(table(results))
    if flipped is not None:
        print(flips_line(flipped, str(trainer.config.update_from)))
    print(f"{out / runs.RESULTS}")


def _evaluate(args: argparse.Namespace) -> None:
    if args.episodes < 2:
        raise ValueError(f"episodes: expected at least 2, got {args.episodes}")
    head, trained = load_learner(args.checkpoint)
    data = args.data or trained.get("data")
    if data is None:
        raise ValueError(f"--data: {args.checkpoint} does not say what it was trained on; give a bank")
    same = args.data is None and args.weights is None
    bank = _bank(
        args,
        data,
        trained.get("weights") if same else args.weights,
        trained.get("backbone") if same else args.backbone,
        trained["learner"],
    )
    if bank.n_features != head.n_features:
        raise ValueError(f"--data: the learner takes {head.n_features} features, {data} has {bank.n_features}")
    balance = args.query_balance or trained.get("query_balance", "even")
    sampler = EpisodeSampler(
        bank,
        args.split,
        way=trained["way"],
        shot=trained.get("shot", 1) if args.shot is None else args.shot,
        query=trained.get("query", 15) if args.query is None else args.query,
        balance=balance,
        seed=args.seed,
    )
    results = evaluate(
        head.to(args.device),
        bank.features.to(args.device),
        sampler,
        args.episodes,
        learner=trained["learner"],
        progress=not args.quiet,
    )
    results |= {"query_balance": balance, "seed": args.seed, "split": args.split, "data": data}
    if args.json is not None:
        write_json(args.json, results)
    if args.plot is not None:
        steps_plot(args.plot, results, title(results))
    print(table(results))


def _predict(args: argparse.Namespace) -> None:
    weights, name = (args.weights, args.backbone) if args.weights is not None else backbone_of(args.what)
    backbone = Backbone(weights, name, args.device, args.workers, not args.quiet)
    check_outputs({"--out": args.out, "--report": args.report}, [args.support, args.query])
    support = read_rows(args.support, label=args.label, backbone=backbone, say=say_of(args))
    query = read_rows(
        args.query, label=args.label, labelled=False, backbone=backbone, columns=support.columns, say=say_of(args)
    )
    answers = predict(args.what, support, query, transductive=not args.alone, device=args.device)
    answers.write_csv(args.out)
    if args.report is not None:
        write_report(args.report, answers)
    if answers.doubt is not None:
        say_of(args)(f"warning: {answers.doubt.replace('transductive=False', '--alone')}")
    right = "" if answers.accuracy is None else f"; {answers.accuracy:.1f} % of those that were labelled are right"
    print(f"{args.out}: {len(query.ids)} labels by {answers.method}{right}")


def _compare(args: argparse.Namespace) -> None:
    given = {**(_QUICK if args.quick else {}), **given_settings(args, CompareConfig)}
    if args.candidates is not None:
        given["candidates"] = read_candidates(args.candidates)
    out = run_folder(args, "compare")
    with runs.claimed(out):
        saved = _saved_comparison(out, given, args.resume)
        settings = {"candidates": None, **saved, **given}
        candidates = settings.pop("candidates")
        config = CompareConfig.from_dict(settings)
        bank = _bank(args, config.data, config.weights, config.backbone, "sib")
        bank_is = fingerprint(bank)
        if saved.get("features", bank_is) != bank_is:
            raise ValueError(f"data: not the bank that the comparison began with ({saved['features']})")
        comparison = Comparison(
            config,
            bank,
            out,
            candidates=candidates,
            device=args.device,
            say=lambda line: None if args.quiet else print(line, file=sys.stderr, flush=True),
            progress=not args.quiet,
        )
        written = {"command": "compare", **config.to_dict(), "candidates": candidates, "features": bank_is}
        write_json(out / CONFIG, written | {"out": str(out.absolute())})
        try:
            results = comparison.run()
        except KeyboardInterrupt:
            print(f"stopped; to go on: --out {out} --resume", file=sys.stderr)
            raise
        write_json(out / RESULTS, results)
        write_text(out / TABLE, markdown(results))
        comparison_plot(out / PLOT, results, [cell_title(cell) for cell in results["cells"]])
    print(markdown(results), end="")
    print(f"{out / RESULTS}")


def _saved_comparison(out: Path, given: dict[str, Any], resume: bool) -> dict[str, Any]:
    """The settings of the comparison in ``out``, none if it is new. Raises ValueError if it is another one, or was not
    to be gone on with.
    """
    if not (out / CONFIG).exists():
        return {}
    if not resume:
        raise ValueError(f"out: {out} already holds a comparison; give --resume to go on, or another folder")
    saved = read_json(out / CONFIG)
    as_json = {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}
    check_same(saved, as_json, runs.WHERE, f"the comparison in {out} has {{0!r}}, got {{1!r}}")
    for name in ("data", "weights"):
        if saved.get(name) is not None:
            saved[name] = runs.found(saved[name], saved.get("out"), out)
    return saved


def _info(args: argparse.Namespace) -> None:
    from kernelmeta.info import text

    print(text())


def _check_machine(args: argparse.Namespace) -> None:
    if not hasattr(args, "device"):
        return
    if args.device != "cpu" and not (args.device.split(":")[0] == "cuda" and torch.cuda.is_available()):
        raise ValueError(f"--device: expected cpu or an available cuda device, got {args.device!r}")
    if not 0 <= args.workers <= _MOST_WORKERS:
        raise ValueError(f"--workers: expected 0 to {_MOST_WORKERS}, got {args.workers}")
    if args.threads is not None:
        if not 1 <= args.threads <= _MOST_WORKERS:
            raise ValueError(f"--threads: expected at least 1 and at most {_MOST_WORKERS}, got {args.threads}")
        torch.set_num_threads(args.threads)
    try:
        select(args.device.split(":")[0])
    except RuntimeError as error:  # the backend that was asked for cannot run
        raise ValueError(str(error)) from None


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    # An error in a process that decodes images arrives with that process's traceback before it.
    return lines[-1].partition("Error: ")[2] or lines[-1] if "Traceback" in str(error) else " ".join(lines)


def _out_of_memory(error: RuntimeError) -> str | None:
    """What an allocation that failed within PyTorch asked for, to read; None if that is not what happened."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError):
        size = re.search(r"Tried to allocate ([\d.]+ \w+)", text)
        return f"out of memory on the device: {size.group(1) if size else 'more'} were asked for"
    asked = re.search(r"can't allocate memory: you tried to allocate (\d+) bytes", text)
    if asked:
        return f"out of memory: {size_text(int(asked.group(1)))} were asked for at once"
    if "bad_alloc" in text or "Storage size calculation overflowed" in text:
        return f"out of memory ({' '.join(text.split())[:120]})"
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    args = _parser().parse_args(argv)
    # A name that is not UTF-8, or a terminal that takes no ±, are no reason to lose what was computed.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        _check_machine(args)
        args.run(args)
    except (ValueError, TypeError, OSError, OverflowError, RecursionError, MemoryError, ImportError) as error:
        return _failed(args, _one_line(error))
    except RuntimeError as error:
        text = _out_of_memory(error)
        if text is None:
            raise
        return _failed(args, text)
    except KeyboardInterrupt:
        return 130
    return 0


def _failed(args: argparse.Namespace, text: str) -> int:
    with contextlib.suppress(OSError):  # the terminal may be gone
        print(f"kernelmeta {args.command}: error: {' '.join(text.splitlines())}", file=sys.stderr)
    return 2
