"""What the commands have in common: options, settings that were given, run folders, lines about the progress."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import torch

from kernelmeta.backends import select
from kernelmeta.data import FeatureBank
from kernelmeta.ranks import Ranks
from kernelmeta.training import runs
from kernelmeta.training.backbones import BACKBONES
from kernelmeta.training.config import TrainConfig
from kernelmeta.training.foreign_backbones import NAMES
from kernelmeta.training.learners import LEARNERS
from kernelmeta.training.loading import AT
from kernelmeta.training.settings import Size, as_size
from kernelmeta.training.sources import open_bank

# The parts of a command's help, in order, and the settings that stand there; others stand in the command's own part.
GROUPS = ("data", "episodes", "learner", "optimizer", "update", "search", "output", "run")
_GROUP_OF = {
    **dict.fromkeys(("data", "backbone", "weights", "style", "holdout", "transform", "center"), "data"),
    **dict.fromkeys(("way", "shot", "query", "query_balance", "episodes"), "episodes"),
    **dict.fromkeys(
        ("epochs", "warmup_epochs", "milestone", "batch_size", "final_epochs", "tasks_per_step", "optimizer", "lr",
         "schedule", "clip", "momentum", "weight_decay", "average"), "optimizer",
    ),
    **dict.fromkeys(("validate_every", "seed"), "run"),
}  # fmt: skip
_MOST_WORKERS = 1024
DATA_HELP = (
    "glyphs (their pixels, or features if --weights are given), a bank, or a folder of images with --weights (maml:"
    " pixels, without)"
)
# Settings that several commands have.
HELP = {
    "data": DATA_HELP,
    "backbone": f"the architecture of --weights, if the file does not say: {', '.join(BACKBONES)}; or {NAMES}",
    "weights": "weights of the backbone, if the data are images: a checkpoint of pretrain, or a published one",
    "way": "classes in an episode",
    "shot": "support rows of each class",
    "query": "query rows for each class",
    "query_balance": "how the query rows are divided among the classes: even, or dirichlet:ALPHA; several with commas:"
    " each episode has one of them",
    "transform": "of the features: none, or power:P",
    "center": "what is taken from the features: none, task (the mean of the task's rows) or train (that of the training"
    " classes)",
    "seed": "seed of everything random",
}
# Settings of a training of backbones, as the commands' help tells of them.
PRETRAIN_HELP = {
    "style": "size, normalisation and augmentation: miniimagenet (80 pixels) or cifar-fs (32); by size if not given",
    "epochs": "passes over the images",
    "warmup_epochs": "epochs in which the learning rate rises",
    "milestone": "epoch after which the learning rate is a tenth",
    "batch_size": "images in each step",
    "holdout": "share of each class's images (of the typeface families, of glyphs) that is kept to judge by",
    "lr": "learning rate of the optimizer",
    "momentum": "(Nesterov) momentum of SGD",
    "weight_decay": "weight decay of the optimizer",
}


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    commands: Mapping[str, argparse.ArgumentParser] = {}
    _words: Sequence[str] = ()

    def error(self, message: str) -> NoReturn:
        text = " ".join(message.splitlines()) + self._meant()
        self.exit(2, f"{self.prog}: error: {text} (see {self.prog} --help)\n")

    def _meant(self) -> str:
        """The option that was likely meant by the first that there is not."""
        options = [name for action in self._actions for name in action.option_strings]
        given = [word.partition("=")[0] for word in self._words if word.startswith("--") and word != "--"]
        for name in given:
            close = [] if name in options else difflib.get_close_matches(name, options, n=1, cutoff=0.75)
            if close:
                return f" (there is no {name}; did you mean {close[0]}?)"
        return ""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, but the command that was given names its own help where it does not know an option."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            command = self.commands.get(getattr(found, "command", None) or "", self)
            command.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        for word in args or ():
            if word.startswith("--") and word.endswith("=--"):  # which argparse would take for an empty list
                self.error(f"argument {word[:-3]}: expected a value, got --")
        self._words = args or ()
        return super().parse_known_args(args, namespace)


class _Help(argparse.RawDescriptionHelpFormatter):
    """Lines are broken between words alone."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_long_words=False, break_on_hyphens=False)


class Command(Parser):
    """The parser of one command, its options in the parts of `GROUPS`.

    Args:
        example: a line to copy, without the ``kernelmeta`` at its beginning.
    """

    def __init__(self, *, example: str, **options: Any) -> None:
        super().__init__(
            epilog=f"example:\n  kernelmeta {example}",
            formatter_class=_Help,
            allow_abbrev=False,
            **options,
        )
        self.example = example
        self._parts = {title: self.add_argument_group(title) for title in GROUPS}

    def option(self, part: str, *names: str, **options: Any) -> None:
        """Like `add_argument`, in a part of the help, with a placeholder in capitals, or the choices."""
        if "action" not in options and "choices" not in options:
            options.setdefault("metavar", _placeholder(names[-1], options.get("type")))
        self._parts[part].add_argument(*names, **options)

    def format_usage(self) -> str:
        """One line: forty options are told below it."""
        self.usage = self._usage()
        return super().format_usage()

    def format_help(self) -> str:
        self.usage = self._usage()
        return super().format_help()

    def _usage(self) -> str:
        needed = [f"{a.option_strings[0]} {a.metavar}" for a in self._actions if a.option_strings and a.required]
        given = [str(a.metavar or a.dest) for a in self._actions if not a.option_strings]
        return " ".join(("%(prog)s", *given, *needed, "[OPTION ...]"))


def _placeholder(name: str, kind: Any) -> str:
    """What stands for the value of an option in the help."""
    if name == "--weights":
        return "FILE"
    if name == "--backbone":
        return "NAME"
    # The last word of an option says what it takes: --query-balance BALANCE.
    return {int: "N", size: "N", float: "NUMBER"}.get(kind, name.rpartition("-")[2].upper())


# Makes a command of a name, a function, a description and an example.
Add = Callable[[str, Callable[[argparse.Namespace], None], str, str], Command]


def settings_options(
    command: Command,
    config: type[Any],
    texts: Mapping[str, str],
    instead: Mapping[str, str | None] | None = None,
    part: str = "learner",
) -> None:
    """An option for every setting; only those given end up in the namespace.

    Args:
        texts: help of the settings that are not in `HELP`; the default is added.
        instead: help of some as it is; None: no option, the setting is positional.
        part: of the help, where a setting has no usual one.
    """
    texts, instead = {**HELP, **texts}, instead or {}
    for field in fields(config):
        option, type_name = f"--{field.name.replace('_', '-')}", str(field.type).split(" ")[0]
        if field.name in instead:
            text = instead[field.name]
        else:
            default = _defaults(field.name) if field.default is None else f" (default: {field.default})"
            text = texts[field.name] + default
        if text is None:
            continue
        where = "update" if field.name.startswith("update_") else _GROUP_OF.get(field.name, part)
        if type_name == "bool":
            command.option(where, option, action="store_true", default=argparse.SUPPRESS, help=text)
            continue
        kind = {"int": int, "float": float, "Size": size}.get(type_name, str)
        command.option(where, option, type=kind, default=argparse.SUPPRESS, help=text)
    command.option("run", "--out", type=Path, metavar="DIR", help="run folder (default: a new one below runs/)")
    command.option("run", "--resume", action="store_true", help="go on with the run in --out, bit for bit")


def size(text: str) -> Size:
    """A number or LEAST:MOST, as argparse takes types."""
    try:
        return as_size("", text, least=0)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix(": ")) from None


def feature_options(command: Command) -> None:
    """The settings of the features of a method that needs no training."""
    for name in ("transform", "center"):
        text = HELP[name].replace(" or train (that of the training classes)", "").replace("none, task", "none or task")
        command.option("data", f"--{name}", help=f"{text}; of a method without training (default: the method's own)")


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


def at_option(command: Command) -> None:
    """The option that says which weights of a run count."""
    command.option(
        "learner",
        "--at",
        choices=AT,
        help="weights that were best on the validation classes, or the last (default: best, if there are any)",
    )


def machine_options(command: Command, skips: bool = True) -> None:
    """The options of where and how to compute."""
    command.option(
        "run", "--device", default="cpu", metavar="{cpu,cuda}", help="or one of several cards, cuda:1 (default: cpu)"
    )
    command.option("run", "--threads", type=int, help="threads of PyTorch (default: its own choice)")
    command.option("run", "--workers", type=int, default=0, help="processes that decode images (default: 0)")
    if skips:
        command.option(
            "data",
            "--skip-bad",
            action="store_true",
            help="skip images that cannot be read and rows that are not finite (default: stop with an error)",
        )
    command.option("run", "--quiet", action="store_true", help="no progress bars")


def check_machine(args: argparse.Namespace) -> None:
    """Raises ValueError where the options of `machine_options` cannot be; sets the threads."""
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


def given_settings(args: argparse.Namespace, config: type[Any]) -> dict[str, Any]:
    """The settings of a dataclass that the user gave."""
    found = {field.name: getattr(args, field.name) for field in fields(config) if hasattr(args, field.name)}
    return runs.absolute(found)


def reading(args: argparse.Namespace) -> dict[str, Any]:
    """How images and banks are read."""
    return {"workers": args.workers, "progress": not args.quiet, "skip_bad": args.skip_bad, "say": say_of(args)}


def check_outputs(outputs: Mapping[str, Path | None], inputs: Sequence[str]) -> None:
    """Raise a ValueError where an output would take the place of an input, or of another output, or is a folder."""
    taken = {os.path.realpath(name): name for name in inputs if os.path.isfile(name)}
    for option, path in outputs.items():
        if path is not None and path.is_dir():
            raise ValueError(f"{option}: {path} is a folder; expected the name of a file")
        if path is None or (path.exists() and not path.is_file()):  # a device or a pipe takes many
            continue
        real = os.path.realpath(path)
        if real in taken:
            raise ValueError(f"{option}: {path} would take the place of {taken[real]}")
        taken[real] = f"what {option} writes"


def say_of(args: argparse.Namespace) -> Callable[[str], None]:
    """A function that shows a line on stderr, with the command's name."""

    def say(line: str) -> None:
        print(f"kernelmeta {args.command}: {' '.join(line.splitlines())}", file=sys.stderr, flush=True)

    return say


def run_folder(args: argparse.Namespace, name: str, config: str = runs.CONFIG) -> Path:
    """``--out``, or a new folder below runs/. Raises ValueError where a run is to be gone on with and none is named, or
    none is there, which keeps its settings in a file ``config``.
    """
    if args.out is not None:
        if args.resume:
            runs.check_begun(args.out, config)
        return Path(args.out)
    if args.resume:
        raise ValueError("--resume: give --out DIR, the run to go on with")
    folders = [Path("runs") / name, *(Path("runs") / f"{name}-{i}" for i in range(2, 10_000))]
    return next(folder for folder in folders if not folder.exists())


def bank_of(
    args: argparse.Namespace, data: str, weights: str | None, backbone: str | None, learner: str
) -> FeatureBank:
    """The bank that the data are, as the learner takes them."""
    whole_network = LEARNERS[learner].whole_network
    return open_bank(
        data, weights=weights, backbone=backbone, pixels=whole_network, device=args.device, **reading(args)
    )


def nothing_to_do(out: Path, unit: str, done: int, asked: int) -> None:
    """Says that a run has already gone further than was asked for."""
    print(f"{out}: trained for {done} {unit} already; --{unit} {asked} changes nothing")


def tell_bank(path: Path, bank: FeatureBank) -> None:
    """Says what a bank that was written holds."""
    splits = ", ".join(f"{len(bank.classes(split))} {split}" for split in ("train", "val", "test"))
    print(f"{path}: {len(bank.labels)} x {bank.n_features} features; classes: {splits}")


@contextlib.contextmanager
def claimed_by_first(out: Path, processes: Ranks) -> Iterator[None]:
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
