"""``kernelmeta compare``: learners on the same bank and the same episodes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kernelmeta.command_line import DATA_HELP, HELP, Add, Command, bank_of, given_settings, machine_options, run_folder
from kernelmeta.data.files import read_json, write_json, write_text
from kernelmeta.training import runs
from kernelmeta.training.candidates import read_candidates
from kernelmeta.training.checkpoint import check_same, fingerprint
from kernelmeta.training.comparison import CONFIG, CONTESTANTS, PLOT, RESULTS, TABLE, CompareConfig, Comparison
from kernelmeta.training.comparison_table import cell_title, markdown
from kernelmeta.training.plots import comparison_plot

# What `compare --quick` means.
_QUICK: dict[str, Any] = {
    "episodes": 4000,
    "trial_episodes": 1000,
    "finalists": 1,
    "validation_episodes": 200,
    "eval_episodes": 500,
    "most_candidates": 2,
}


def add_commands(add: Add) -> None:
    """Adds this command to the parser."""
    command = add(
        "compare",
        _compare,
        "Train and evaluate learners on the same bank and the same test episodes.",
        "compare --data bank.safetensors --learners prototypes,ridge,sib --out runs/compare",
    )
    _compare_settings(command)
    machine_options(command)


def _compare_settings(command: Command) -> None:
    """The options of ``compare``; only those given end up in the namespace."""
    default = CompareConfig()
    everybody = ", ".join(CONTESTANTS)

    def add(part: str, name: str, kind: Callable[[str], Any], text: str, shown: object) -> None:
        command.option(
            part,
            f"--{name.replace('_', '-')}",
            type=kind,
            default=argparse.SUPPRESS,
            help=f"{text} (default: {shown})",
        )

    add("data", "data", str, DATA_HELP, default.data)
    command.option("data", "--weights", metavar="FILE", default=argparse.SUPPRESS, help=HELP["weights"])
    command.option("data", "--backbone", default=argparse.SUPPRESS, help=HELP["backbone"])
    add("learner", "learners", _learners, f"all, or some with commas: {everybody}", ", ".join(default.learners))
    add("episodes", "way", int, HELP["way"], default.way)
    add("episodes", "query", int, HELP["query"], default.query)
    add(
        "episodes",
        "shots",
        _numbers,
        "support rows of each class, one number or several with commas",
        "1,5",
    )
    add(
        "episodes",
        "balances",
        _words,
        "how the query rows are divided among the classes: even, or dirichlet:ALPHA, one or several with commas;"
        " known:BALANCE tells the methods that can use them the"
        " classes' shares",
        "even,dirichlet:2",
    )
    add("episodes", "episodes", int, "episodes that the best settings of a learner are trained on", default.episodes)
    add("episodes", "trial_episodes", int, "episodes that all settings are trained on before", default.trial_episodes)
    add("learner", "finalists", int, "how many settings of a learner go on from there", default.finalists)
    add(
        "episodes",
        "validation_episodes",
        int,
        "episodes of the validation classes to choose on",
        default.validation_episodes,
    )
    add("episodes", "eval_episodes", int, "episodes of the test classes to evaluate on", default.eval_episodes)
    add("learner", "most_candidates", int, "at most this many settings of a learner to choose from", "all")
    add("run", "seed", int, HELP["seed"], default.seed)
    command.option(
        "learner",
        "--candidates",
        type=Path,
        metavar="FILE",
        help="JSON: learner -> list of settings (of 'train', or of the method) to choose from",
    )
    command.option("run", "--quick", action="store_true", help="seconds instead of minutes: shorter, fewer candidates")
    command.option("run", "--out", type=Path, metavar="DIR", help="folder (default: a new one below runs/)")
    command.option("run", "--resume", action="store_true", help="go on with the comparison in --out")


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in _words(text))


def _learners(text: str) -> tuple[str, ...]:
    return CONTESTANTS if text == "all" else _words(text)


def _compare(args: argparse.Namespace) -> None:
    asked = given_settings(args, CompareConfig)
    given = {**(_QUICK if args.quick else {}), **asked}
    if "episodes" in asked and "trial_episodes" not in asked:
        usual = given.pop("trial_episodes", CompareConfig.trial_episodes)
        if not args.resume:  # where the whole training is short, so are the trials
            given["trial_episodes"] = min(usual, asked["episodes"])
    if args.candidates is not None:
        given["candidates"] = read_candidates(args.candidates)
    out = run_folder(args, "compare", CONFIG)
    with runs.claimed(out):
        saved = _saved_comparison(out, given, args.resume)
        settings = {"candidates": None, **saved, **given}
        candidates = settings.pop("candidates")
        config = CompareConfig.from_dict(settings)
        bank = bank_of(args, config.data, config.weights, config.backbone, "sib")
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
