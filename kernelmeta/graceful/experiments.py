"""What updates keep and cost on glyphs: three experiments, each a function of its settings and seeds.

Typeface families are split into training, validation and test ones: no family of the test was seen in training or when
settings were chosen. Settings are chosen on the validation families with seeds of their own; the test families are
looked at once.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernelmeta.data.files import write_json
from kernelmeta.data.images import BACKBONE_SPLIT, ArrayImages
from kernelmeta.graceful.judging import Sides, answers, flips_of, judge_retrieval, sides
from kernelmeta.graceful.search import Rewards, Search, SearchConfig
from kernelmeta.graceful.small import Architecture
from kernelmeta.graceful.updating import OldModel, UpdateConfig, Updater, load_run
from kernelmeta.training.checkpoint import CHECKPOINT, check_same
from kernelmeta.training.pretraining import PretrainConfig, Pretrainer
from kernelmeta.training.sources import open_images

Say = Callable[[str], None]
# Seeds on which settings are chosen; those that are reported count from 0.
CHOOSING = (1000, 1001)


@dataclass(frozen=True)
class Parts:
    """Rows of a set of glyphs, by what they are for."""

    images: ArrayImages
    train: Tensor  # [n] int64, of known classes in training families
    val: Tensor  # of known classes in validation families
    test: Tensor  # of known classes in test families
    unseen: Tensor  # of classes no model is trained on, in test families

    def subset(self, rows: Tensor) -> ArrayImages:
        """A set to train on: all known classes that ``rows`` hold.

        Args:
            rows: [n] int64.
        """
        images = self.images
        present, labels = images.labels[rows].unique(return_inverse=True)
        return ArrayImages(
            images.pixels[rows],
            labels,
            torch.full((len(present),), BACKBONE_SPLIT, dtype=torch.uint8),
            tuple(images.class_names[c] for c in present.tolist()),
            images.source,
            groups=None if images.groups is None else images.groups[rows],
        )


def parts(data: str, *, most_classes: int | None = None, shares: tuple[float, float] = (0.6, 0.15)) -> Parts:
    """Glyphs, split by typeface family.

    Args:
        data: "glyphs", or the file of the large set.
        most_classes: of the known ones, so many at most.
        shares: of the families, for training and for validation; the rest is for the test.

    Raises:
        OSError: there is no such file.
        ValueError: it is not a file of glyphs with their typefaces.
    """
    images = open_images(data)
    if not isinstance(images, ArrayImages) or images.groups is None:
        raise ValueError(f"data: expected glyphs with their typefaces, got {data}")
    generator = torch.Generator().manual_seed(0)
    families = torch.randperm(int(images.groups.max()) + 1, generator=generator)
    n = len(families)
    bounds = [0, round(shares[0] * n), round((shares[0] + shares[1]) * n), n]
    part = torch.empty(n, dtype=torch.int64)
    for index in range(3):
        part[families[bounds[index] : bounds[index + 1]]] = index
    part_of = part[images.groups]
    known = (images.class_split == BACKBONE_SPLIT) | (images.class_split == 0)
    # A class counts where each part has images of it, the test two: one to look for, one to find.
    for index, least in ((0, 4), (1, 2), (2, 2)):
        counts = torch.bincount(images.labels[part_of == index], minlength=len(known))
        known &= counts >= least
    if most_classes is not None:
        chosen = known.nonzero().flatten()
        chosen = chosen[torch.randperm(len(chosen), generator=generator)[:most_classes]]
        known = torch.zeros_like(known).index_fill(0, chosen, True)
    of_known = known[images.labels]
    train, val, test = (((part_of == index) & of_known).nonzero().flatten() for index in range(3))
    unseen = ((part_of == 2) & (images.class_split == 2)[images.labels]).nonzero().flatten()
    return Parts(images, train, val, test, unseen)


class Trained:
    """Trains models into a folder, or takes those that are there already: an experiment goes on where it was stopped.

    Args:
        out: the folder.
        say: takes a line for every model.
    """

    def __init__(self, out: Path, say: Say) -> None:
        self.out, self.say = out, say

    def __call__(self, name: str, config: PretrainConfig, images: ArrayImages, old: OldModel | None = None) -> OldModel:
        """The model of that name.

        Args:
            name: of its folder.
            config: settings.
            images: to train on.
            old: the model it succeeds, where ``config`` is that of an update.

        Raises:
            OSError: the folder cannot be written to.
            ValueError: it holds models with other settings; training diverged (`NotFiniteError`).
        """
        folder = self.out / name
        if (folder / CHECKPOINT).exists():
            state = load_run(folder).state
            check_same(state["config"], config.to_dict(), ("old",), f"{folder} was trained with {{0!r}}, not {{1!r}}")
            if state["epoch"] == config.epochs:
                return OldModel(folder, images)
        began = time.monotonic()
        if isinstance(config, UpdateConfig):
            assert old is not None
            trainer: Pretrainer = Updater(config, images, old)
        else:
            trainer = Pretrainer(config, images)
        if (folder / CHECKPOINT).exists():
            trainer.restore(load_run(folder))
        folder.mkdir(parents=True, exist_ok=True)
        if not trainer.run(folder):
            raise KeyboardInterrupt
        self.say(f"{name}: {trainer.history[-1][2]:.1f} % in training, {time.monotonic() - began:.0f} s")
        return OldModel(folder, images)


def update_of(config: PretrainConfig, **settings: Any) -> UpdateConfig:
    """Settings of an update with those of a training.

    Args:
        config: of the training.
        settings: that differ, and those of the update.
    """
    return UpdateConfig(**{**asdict(config), **settings})


def mean_and_error(values: Sequence[float]) -> dict[str, float]:
    """Mean and standard error.

    Args:
        values: one a seed.
    """
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "standard_error": error}


def judge_flips(parts: Parts, rows: Tensor, old: OldModel, new: OldModel) -> dict[str, Any]:
    """Errors and flips in percent.

    Args:
        parts: the glyphs.
        rows: [n] int64, to judge by.
        old: the old model.
        new: its successor.
    """
    return flips_of(answers(parts.images, rows, old, new))


@dataclass(frozen=True)
class FlipSettings:
    """Of the experiment on flips: what is trained and compared."""

    data: str = "glyphs"
    seeds: int = 8
    most_classes: int | None = None
    backbone: str = "small-1.1-16.32.64-5.3.3-64"
    larger: str = "small-1.1-24.48.96-5.3.3-64"
    other_seeds: int = 2  # of all arms but the plain and the distilled successor
    epochs: int = 8
    lr: float = 0.2
    weights: tuple[float, ...] = (0.05, 0.2, 1.0)


def flip_experiment(settings: FlipSettings, out: Path, say: Say) -> dict[str, Any]:
    """Negative flips of a successor of the same architecture and another seed, with and without focal distillation.

    The weight is that of the fewest negative flips on the validation families among those whose error there is at most
    0.3 points above that of the plain successor. Beside it: uniform weights (beta 0), temperature 1, logit-difference
    inhibition, a plain successor trained for three quarters and for three halves of the epochs (for errors to match), a
    larger one; these with fewer seeds.

    Args:
        settings: what is trained.
        out: folder of the models.
        say: takes lines about the progress.

    Raises:
        OSError: files cannot be read or written.
    """
    began = time.monotonic()
    split = parts(settings.data, most_classes=settings.most_classes)
    images = split.subset(split.train)
    train = Trained(out / "models", say)
    base = _config(settings.backbone, settings.epochs, settings.lr)
    say(f"{len(images.class_names)} classes, {len(split.train)} training glyphs, {len(split.test)} test glyphs")

    def successor(name: str, seed: int, old: OldModel, **change: Any) -> OldModel:
        config = update_of(base, **{"seed": 500 + seed, "method": "focal", **change})
        return train(f"{name}-{seed}", config, images, old)

    choice: dict[str, Any] = {}
    for seed in CHOOSING:
        old = train(f"old-{seed}", replace(base, seed=seed), images)
        plain = successor("none", seed, old, method="none")
        choice.setdefault("none", []).append(judge_flips(split, split.val, old, plain))
        for weight in settings.weights:
            new = successor(f"focal-{weight:g}", seed, old, weight=weight)
            choice.setdefault(f"{weight:g}", []).append(judge_flips(split, split.val, old, new))
    means = {
        name: {key: statistics.fmean(row[key] for row in rows) for key in ("negative", "error_new")}
        for name, rows in choice.items()
    }
    most = means["none"]["error_new"] + 0.3
    fit = {name: row for name, row in means.items() if name != "none" and row["error_new"] <= most}
    chosen = float(min(fit, key=lambda name: fit[name]["negative"])) if fit else settings.weights[0]

    arms: dict[str, dict[str, Any]] = {
        "none": {"method": "none"},
        "focal": {"weight": chosen},
        "uniform": {"weight": chosen, "beta": 0.0},
        "tau 1": {"weight": chosen, "tau": 1.0},
        "ldi": {"method": "ldi", "weight": chosen},
        "none, three quarters as long": {"method": "none", **_schedule(settings.epochs * 3 // 4)},
        "none, half as long again": {"method": "none", **_schedule(settings.epochs * 3 // 2)},
        "larger, none": {"method": "none", "backbone": settings.larger},
        "larger, focal": {"weight": chosen, "backbone": settings.larger},
    }
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in arms}
    for seed in range(settings.seeds):
        old = train(f"old-{seed}", replace(base, seed=seed), images)
        for name, change in arms.items():
            if seed >= (settings.seeds if name in ("none", "focal") else settings.other_seeds):
                continue
            new = successor(name.replace(" ", "-").replace(",", ""), seed, old, **change)
            rows[name].append(judge_flips(split, split.test, old, new))
        write_json(out / "flips-so-far.json", rows)
    return {
        "experiment": "flips",
        "settings": asdict(settings),
        "training": {name: value for name, value in base.to_dict().items() if name != "data"},
        "classes": len(images.class_names),
        "glyphs": {"train": len(split.train), "validation": len(split.val), "test": len(split.test)},
        "chosen_weight": chosen,
        "validation": means,
        "arms": {name: _summary(found) for name, found in rows.items()},
        "matched_error": matched_error(rows),
        "rows": rows,
        "seconds": time.monotonic() - began,
    }


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    defined = {key: [row[key] for row in rows if row[key] is not None] for key in rows[0]}
    return {key: mean_and_error(values) if values else None for key, values in defined.items()} | {"seeds": len(rows)}


def matched_error(rows: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Negative flips of the distilled successor beside those that a plain one would have at the same error.

    Args:
        rows: by arm, one a seed; the plain arms, of other lengths of training, tell how negative flips go with the
            error (a line through their means). The seeds that all of them have count.
    """
    seeds = min(len(found) for name, found in rows.items() if name.startswith("none"))
    plain = [found[:seeds] for name, found in rows.items() if name.startswith("none")]
    distilled = rows["focal"][:seeds]
    points = sorted(
        (statistics.fmean(row["error_new"] for row in found), statistics.fmean(row["negative"] for row in found))
        for found in plain
    )
    error = statistics.fmean(row["error_new"] for row in distilled)
    mean_x, mean_y = (statistics.fmean(values) for values in zip(*points, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0
    return {
        "error": error,
        "negative_focal": statistics.fmean(row["negative"] for row in distilled),
        "negative_plain": mean_y + slope * (error - mean_x),
        "plain_points": points,
        "seeds": seeds,
    }


def _schedule(epochs: int) -> dict[str, Any]:
    """The rate falls to a tenth after three quarters of the epochs."""
    epochs = max(1, epochs)
    return {"epochs": epochs, "warmup_epochs": 1 if epochs > 2 else 0, "milestone": max(1, epochs * 3 // 4)}


def _config(backbone: str, epochs: int, lr: float) -> PretrainConfig:
    return PretrainConfig("glyphs", backbone=backbone, lr=lr, batch_size=128, **_schedule(epochs))


@dataclass(frozen=True)
class CompatibleSettings:
    """Of the experiment on backward compatibility."""

    data: str = "glyphs"
    seeds: int = 5
    most_classes: int | None = 200
    backbone: str = "small-1.1-16.32.64-5.3.3-64"
    epochs: int = 12
    batch_size: int = 32
    lr: float = 0.1
    old_share: float = 0.2  # of the training families
    old_epochs: int = 30
    weights: tuple[float, ...] = (1.0, 4.0)


def compatible_experiment(settings: CompatibleSettings, out: Path, say: Say) -> dict[str, Any]:
    """A successor trained on more typefaces searches the gallery that the old model indexed.

    Three galleries: of the typefaces that the old model was trained on; of typefaces that no model has seen; of such
    typefaces and classes that no model has seen. Queries are of typefaces that no model has seen.

    The weight of the influence loss is that of the largest sum of update gains (top-1, mean average precision) on the
    validation families (in the first gallery) among those with a tax of at most one point in both; without such, of the
    smallest tax.

    Args:
        settings: what is trained.
        out: folder of the models.
        say: takes lines about the progress.

    Raises:
        OSError: files cannot be read or written.
    """
    began = time.monotonic()
    split = parts(settings.data, most_classes=settings.most_classes)
    train = Trained(out / "models", say)
    base = replace(_config(settings.backbone, settings.epochs, settings.lr), batch_size=settings.batch_size)
    assert split.images.groups is not None
    families = split.images.groups[split.train].unique()
    shuffled = families[torch.randperm(len(families), generator=torch.Generator().manual_seed(2))]
    few = shuffled[: max(1, round(settings.old_share * len(shuffled)))]
    fewer = split.train[torch.isin(split.images.groups[split.train], few)]
    before, after = split.subset(fewer), split.subset(split.train)
    say(f"old: {len(before.class_names)} classes, {len(fewer)} glyphs")
    say(f"new: {len(after.class_names)} classes, {len(split.train)} glyphs")

    def old_and_free(seed: int) -> tuple[OldModel, OldModel]:
        old = train(f"old-{seed}", replace(base, **_schedule(settings.old_epochs), seed=seed), before)
        return old, train(f"free-{seed}", replace(base, seed=500 + seed), after)

    def successor(seed: int, old: OldModel, weight: float) -> OldModel:
        config = update_of(base, seed=500 + seed, method="bct", weight=weight)
        return train(f"bct-{weight:g}-{seed}", config, after, old)

    choice: dict[str, list[dict[str, Any]]] = {}
    for seed in CHOOSING:
        old, free = old_and_free(seed)
        for weight in settings.weights:
            halves = Sides(split.val.tolist(), fewer.tolist())
            found = judge_retrieval(split.images, halves, old, successor(seed, old, weight), free)
            choice.setdefault(f"{weight:g}", []).append({key: found[key] for key in ("update_gain", "tax")})
    metrics = ("top1", "mean_average_precision")
    tax = {w: max(statistics.fmean(row["tax"][m] for row in found) for m in metrics) for w, found in choice.items()}
    gain = {
        w: sum(statistics.fmean(row["update_gain"][m] or 0.0 for row in found) for m in metrics)
        for w, found in choice.items()
    }
    cheap = [w for w in choice if tax[w] <= 1]
    chosen = float(max(cheap, key=gain.__getitem__) if cheap else min(choice, key=tax.__getitem__))

    groups = {
        "known": Sides(split.test.tolist(), fewer.tolist()),
        "unseen_typefaces": sides(split.images, split.test),
        "unseen_classes": sides(split.images, split.unseen),
    }
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name, halves in groups.items() if all(halves)}
    for seed in range(settings.seeds):
        old, free = old_and_free(seed)
        new = successor(seed, old, chosen)
        for name, judged in rows.items():
            judged.append(judge_retrieval(split.images, groups[name], old, new, free))
    return {
        "experiment": "compatible",
        "settings": asdict(settings),
        "training": {name: value for name, value in base.to_dict().items() if name != "data"},
        "classes": {"old": len(before.class_names), "new": len(after.class_names)},
        "glyphs": {"old": len(fewer), "new": len(split.train), "test": len(split.test), "unseen": len(split.unseen)},
        "chosen_weight": chosen,
        "validation": {w: {"worst_tax": tax[w], "sum_of_gains": gain[w]} for w in choice},
        "galleries": {name: _compatibility_summary(found) for name, found in rows.items()},
        "rows": rows,
        "seconds": time.monotonic() - began,
    }


def _compatibility_summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    metrics = ("top1", "mean_average_precision")
    made: dict[str, Any] = {}
    for pair in ("old_old", "new_old", "new_new", "free_free", "free_old", "update_gain", "tax"):
        made[pair] = {}
        for metric in metrics:
            values = [row[pair][metric] for row in rows if row[pair][metric] is not None]
            made[pair][metric] = mean_and_error(values) if values else None
    made["backfill"] = [
        {
            "share": rows[0]["backfill"][index]["share"],
            **{metric: mean_and_error([row["backfill"][index][metric] for row in rows]) for metric in metrics},
        }
        for index in range(len(rows[0]["backfill"]))
    ]
    return made


@dataclass(frozen=True)
class SearchSettings:
    """Of the experiment on heterogeneous search: what is trained and searched."""

    data: str = "glyphs"
    seeds: int = 3
    most_classes: int | None = 80
    gallery: str = "small-2.2-32.64.128-5.3.3-64"
    gallery_epochs: int = 14
    epochs: int = 12
    final_epochs: int = 14
    batch_size: int = 32
    judged: int = 200
    budget: float = 0.1
    widths: tuple[int, ...] = (24, 64)  # of the last stage, for the table by width
    lr: float = 0.1


def search_experiment(settings: SearchSettings, out: Path, say: Say) -> dict[str, Any]:
    """Small networks that search a large one's gallery: by width, and as evolutionary and random search choose them.

    Architectures are judged by the validation families; the chosen ones, trained anew, by the test families, once.

    Args:
        settings: what is trained and searched.
        out: folder of the models.
        say: takes lines about the progress.

    Raises:
        OSError: files cannot be read or written.
    """
    began = time.monotonic()
    split = parts(settings.data, most_classes=settings.most_classes)
    train = Trained(out / "models", say)
    images = split.subset(split.train)
    base = replace(_config(settings.gallery, settings.gallery_epochs, settings.lr), batch_size=settings.batch_size)
    validation, test = sides(split.images, split.val), sides(split.images, split.test)
    say(f"{len(images.class_names)} classes, {len(split.train)} training glyphs, {len(split.test)} test glyphs")
    found, by_width = [], []
    for seed in range(settings.seeds):
        large = train(f"gallery-{seed}", replace(base, seed=seed), images)
        config = SearchConfig(
            "glyphs",
            large.path,
            budget=settings.budget,
            judged=settings.judged,
            epochs=settings.epochs,
            final_epochs=settings.final_epochs,
            batch_size=settings.batch_size,
            lr=settings.lr,
            seed=500 + seed,
        )
        search = Search(config, large, images, split.images, validation, test, out / f"search-{seed}", say=say)
        row = search.run()
        judged = row.pop("judged")
        row["judged"] = len(judged)
        write_json(out / f"judged-{seed}.json", judged)
        found.append(row)
        by_width.append({str(h): _width(search, h) for h in settings.widths})
    return {
        "experiment": "search",
        "settings": asdict(settings),
        "training": {name: value for name, value in base.to_dict().items() if name != "data"},
        "classes": len(images.class_names),
        "glyphs": {"train": len(split.train), "validation": len(split.val), "test": len(split.test)},
        "gallery": mean_and_error([row["gallery"]["scores"]["top1"] for row in found]),
        "chosen": {
            name: {
                "architectures": [row["chosen"][name]["architecture"] for row in found],
                "cost_ratio": mean_and_error([row["chosen"][name]["cost_ratio"] for row in found]),
                **{
                    pair: mean_and_error([row["chosen"][name]["scores"][pair]["top1"] for row in found])
                    for pair in ("query_query", "query_gallery")
                },
                "product": mean_and_error([_product(row["chosen"][name]["scores"]) for row in found]),
            }
            for name in found[0]["chosen"]
        },
        "free": mean_and_error([row["free"]["scores"]["query_gallery"]["top1"] for row in found]),
        "by_width": {
            h: {
                "architecture": by_width[0][h]["architecture"],
                "cost_ratio": by_width[0][h]["cost_ratio"],
                **{
                    pair: mean_and_error([row[h][pair] for row in by_width])
                    for pair in ("query_query", "query_gallery", "free_gallery", "free_free")
                },
            }
            for h in by_width[0]
        },
        "rows": {"searches": found, "by_width": by_width},
        "seconds": time.monotonic() - began,
    }


def _product(scores: dict[str, Any]) -> float:
    return Rewards(scores["query_query"]["top1"], scores["query_gallery"]["top1"]).of("product")


def _width(search: Search, h: int) -> dict[str, Any]:
    """A backbone of that width, compatible and free, on the test families."""
    architecture = Architecture((1, 1), (max(8, h // 4), max(16, h // 2), h), (3, 3, 3))
    small, free = (search.test_one(architecture, method) for method in ("head", "none"))
    return {
        "architecture": architecture.name,
        "cost_ratio": search.gallery_operations / search.cost(architecture),
        "query_query": small["query_query"]["top1"],
        "query_gallery": small["query_gallery"]["top1"],
        "free_gallery": free["query_gallery"]["top1"],
        "free_free": free["query_query"]["top1"],
    }
