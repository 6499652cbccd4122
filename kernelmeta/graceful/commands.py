"""The commands ``update``, ``compare-models`` and ``search``."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import torch

from kernelmeta.command_line import (
    PRETRAIN_HELP,
    Add,
    given_settings,
    machine_options,
    run_folder,
    say_of,
    settings_options,
)  # fmt: skip
from kernelmeta.data.files import read_json, write_json, write_text
from kernelmeta.data.images import LabelledImages
from kernelmeta.graceful import plots
from kernelmeta.graceful.judging import Flipped, judge_update, rows_to_judge_by, sides, worst_flips
from kernelmeta.graceful.search import Search, SearchConfig
from kernelmeta.graceful.tables import search_table, update_table
from kernelmeta.graceful.updating import FREE, METHODS, OldModel, UpdateConfig, Updater, load_run
from kernelmeta.training import runs
from kernelmeta.training.checkpoint import CHECKPOINT, check_same
from kernelmeta.training.sources import open_images

RESULTS, TABLE, FLIPS, BACKFILL = "results.json", "results.md", "flips.png", "backfill.png"
FLIP_ROWS, SHOWN = "flipped.json", 32
SEARCH, SEARCH_TABLE, SEARCH_PLOT = "search.json", "search.md", "search.png"
_DATA = "a folder with train/, val/ and test/, glyphs, or a file of glyphs (.npz)"
# Options of `update` and `search`.
_HELP = {
    **PRETRAIN_HELP,
    "old": "the run that is to be succeeded",
    "method": "; ".join(f"{name}: {text}" for name, text in METHODS.items()),
    "weight": "weight of the loss that looks at the old model",
    "alpha": "for focal and ldi: the weight of every image",
    "beta": "for focal and ldi: the weight that images have beyond that if the old model has them right",
    "tau": "for focal: the temperature",
    "margin": "for ldi: how much logits may differ without a penalty",
    "gallery": "run of the large model",
    "budget": "the most multiplications, as a share of the large model's",
    "judged": "architectures that each search judges",
    "reward": "self: M(q,q), cross: M(q,g), or their product: what the network that is kept was chosen by",
    "final_epochs": "passes over the images in training the chosen networks anew",
}


def add_commands(add: Add) -> None:
    """Adds these commands to the parser."""
    command = add(
        "update",
        _update,
        "Train a successor of a pretrained backbone, and judge it beside the old one.",
        "update runs/backbone --method bct --out runs/new",
    )
    command.add_argument("old", metavar="OLD", help="run folder of 'kernelmeta pretrain' or 'kernelmeta update'")
    as_old = {name: f"{text} (default: as OLD)" for name, text in _AS_OLD.items()}
    settings_options(command, UpdateConfig, _HELP, {"old": None, **as_old}, "update")
    machine_options(command)

    command = add(
        "compare-models",
        _compare_models,
        "Who flipped, and does the new model search the old gallery?",
        "compare-models runs/backbone runs/new",
    )
    command.add_argument("old", metavar="OLD", help="run folder of the old model")
    command.add_argument("new", metavar="NEW", help="run folder of its successor")
    command.option(
        "update", "--free", metavar="RUN", help="a successor trained without regard to OLD, for gain and tax"
    )
    command.option("data", "--data", help=f"{_DATA} (default: as NEW)")
    command.option("data", "--style", help="as of pretrain (default: as NEW)")
    command.option("run", "--out", type=Path, metavar="DIR", help="folder (default: a new one below runs/)")
    command.set_defaults(resume=False)
    machine_options(command)

    command = add(
        "search",
        _search,
        "Search for a small network whose queries find their like in a large one's gallery.",
        "search --gallery runs/backbone --budget 0.1 --out runs/small",
    )
    command.option("search", "--gallery", required=True, metavar="RUN", help=_HELP["gallery"])
    settings_options(command, SearchConfig, _HELP, {"gallery": None, "data": f"{_DATA} (default: as RUN)"}, "search")
    machine_options(command)


_AS_OLD = {
    "data": _DATA,
    "backbone": "conv4, conv4_128, wrn28_10, or small-<depths>-<widths>-<kernels>-<features>",
    **PRETRAIN_HELP,
}


def _settings_of(run: str) -> dict[str, Any]:
    """The settings that a backbone was trained with; its data where they are now."""
    config = dict(load_run(run).state["config"])
    folder = Path(run)
    if folder.is_dir() and (folder / runs.CONFIG).exists() and isinstance(config.get("data"), str):
        config["data"] = runs.found(config["data"], read_json(folder / runs.CONFIG).get("out"), folder)
    return config


def _update(args: argparse.Namespace) -> None:
    given = given_settings(args, UpdateConfig)
    out = run_folder(args, f"update-{given.get('method', 'bct')}")
    with runs.claimed(out):
        settings, checkpoint = runs.prepare(out, "update", given, args.resume, FREE, "pretrain")
        if checkpoint is None:
            inherited = {name: value for name, value in _settings_of(settings["old"]).items() if name in _AS_OLD}
            # Another seed than the old model's: with the same, method none would be the old model again.
            seed = int(load_run(settings["old"]).state["config"].get("seed", 0)) + 1
            settings = {**inherited, "seed": seed, **settings}
        config = UpdateConfig.from_dict(settings)
        images = _images(config.data, config.style, args)
        old = OldModel(config.old, images)
        trainer = Updater(config, images, old, device=args.device, workers=args.workers)
        if checkpoint:
            trainer.restore(checkpoint)
        for note in images.notes:
            say_of(args)(note)
        runs.write_config(out, "update", config.to_dict())
        with runs.scalars(out, trainer.epoch) as report:
            finished = trainer.run(out, report=report, progress=not args.quiet)
        if not finished:
            print(f"stopped after {trainer.epoch} epochs; to go on: --out {out} --resume", file=sys.stderr)
            raise KeyboardInterrupt
        new = OldModel(out, images).to(args.device)
        results = {"method": config.method, "epochs": trainer.epoch, "accuracy": trainer.history[-1][2]}
        text = _judged(out, results, images, old, new, None, args)
    print(text, end="")
    print(f"{out / CHECKPOINT}")


def _compare_models(args: argparse.Namespace) -> None:
    settings = _settings_of(args.new)
    load_run(args.old)
    data = runs.absolute({"data": args.data})["data"] or settings["data"]
    images = _images(data, args.style or settings.get("style"), args)
    old, new, free = (
        None if run is None else OldModel(run, images).to(args.device) for run in (args.old, args.new, args.free)
    )
    assert old is not None and new is not None
    out = run_folder(args, "compare-models")
    with runs.claimed(out):
        if (out / runs.CONFIG).exists():
            raise ValueError(f"out: {out} already holds a run; give another folder")
        text = _judged(out, {"old": args.old, "new": args.new, "free": args.free}, images, old, new, free, args)
    print(text, end="")
    print(f"{out / RESULTS}")


def _images(data: str, style: str | None, args: argparse.Namespace) -> LabelledImages:
    images = open_images(data, style)
    images.check(skip_bad=args.skip_bad, workers=args.workers, progress=not args.quiet)
    return images


def _judged(
    out: Path,
    results: dict[str, Any],
    images: LabelledImages,
    old: OldModel,
    new: OldModel,
    free: OldModel | None,
    args: argparse.Namespace,
) -> str:
    """Writes the results of a comparison, its table and plots; returns the table."""
    found, seen = judge_update(images, old, new, free, workers=args.workers)
    results = {**results, **found}
    if not results["held_out"]:
        say_of(args)(
            "a model may have been trained on images that it is judged by; 'pretrain --holdout' keeps some apart"
        )
    text = update_table(results)
    write_json(out / RESULTS, results)
    write_text(out / TABLE, text)
    if "backfill" in results["known"]:
        groups = {"known classes": results["known"], "unseen classes": results["unseen"]}
        plots.backfill_plot(out / BACKFILL, {title: one for title, one in groups.items() if one})
    _show_flips(out, images, old, seen)
    return text


def _show_flips(out: Path, images: LabelledImages, old: OldModel, seen: Flipped) -> None:
    places = worst_flips(seen, len(seen.rows))
    predicted = seen.new.argmax(1)
    listed = [
        {
            "image": images.name(int(seen.rows[place])),
            "class": old.classes[int(seen.labels[place])],
            "predicted": old.classes[int(predicted[place])],
        }
        for place in places.tolist()
    ]
    write_json(out / FLIP_ROWS, {"negative_flips": listed})
    shown = places[:SHOWN].tolist()
    plots.thumbnails(
        out / FLIPS,
        [images.load(int(seen.rows[place])) for place in shown],
        [f"{row['class'][-32:]}\n-> {row['predicted'][-32:]}" for row in listed[:SHOWN]],
        f"{len(places)} of {len(seen.rows)} images that the old model has right and the new one wrong"
        + (f"; the surest {SHOWN}" if len(places) > SHOWN else ""),
    )


def _search(args: argparse.Namespace) -> None:
    given = given_settings(args, SearchConfig)
    out = run_folder(args, "search")
    with runs.claimed(out):
        saved = read_json(out / runs.CONFIG) if (out / runs.CONFIG).exists() else {}
        if saved and not args.resume:
            raise ValueError(f"out: {out} already holds a run; give --resume to go on, or another folder")
        if saved and saved.get("command") != "search":
            raise ValueError(f"out: {out} holds a run of 'kernelmeta {saved.get('command')}', not of 'search'")
        check_same(saved, given, ("data", "gallery"), f"the search in {out} has {{0!r}}, got {{1!r}}")
        for name in ("data", "gallery"):
            if name in saved:
                saved[name] = runs.found(saved[name], saved.get("out"), out)
        settings = {**saved, **given}
        trained = _settings_of(settings["gallery"])
        config = SearchConfig.from_dict({"data": trained["data"], **settings})
        images = _images(config.data, trained.get("style"), args)
        large = OldModel(config.gallery, images).to(args.device)
        rows, apart = rows_to_judge_by(images, large)
        if not apart or not trained.get("holdout"):
            raise ValueError(
                f"gallery: {config.gallery} was trained on all of these images, and none is left to judge by;"
                " 'kernelmeta pretrain --holdout 0.4' keeps some apart"
            )
        validation, test = (sides(images, torch.tensor(half)) for half in sides(images, rows))
        search = Search(
            config,
            large,
            images,
            images,
            validation,
            test,
            out,
            device=args.device,
            workers=args.workers,
            say=(lambda line: None) if args.quiet else say_of(args),
            progress=not args.quiet,
        )
        runs.write_config(out, "search", config.to_dict())
        try:
            results = search.run()
        except KeyboardInterrupt:
            print(f"stopped; to go on: --out {out} --resume", file=sys.stderr)
            raise
        write_json(out / SEARCH, results)
        text = search_table(results)
        write_text(out / SEARCH_TABLE, text)
        plots.operations_plot(out / SEARCH_PLOT, [results])
    print(text, end="")
    print(f"{out / 'models' / results['chosen'][config.reward]['architecture']}-head{os.sep}{CHECKPOINT}")
