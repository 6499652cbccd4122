"""What a successor keeps and what it breaks, on images that neither model was trained on."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernelmeta.data.images import ArrayImages, LabelledImages
from kernelmeta.graceful.compatible import match_classes
from kernelmeta.graceful.flips import flips
from kernelmeta.graceful.retrieval import Labels, Views, backfill, compatibility
from kernelmeta.graceful.updating import OldModel
from kernelmeta.training.pretraining import held_out


class Sides(NamedTuple):
    """Rows of a set of images: those that are looked for, and those that are looked through."""

    query: list[int]
    gallery: list[int]


def sides(images: LabelledImages, rows: Tensor) -> Sides:
    """Images halved: by groups (typeface families) where they have groups, else by class.

    Args:
        images: a set.
        rows: [n] int64, of the images to halve.
    """
    groups = images.groups if isinstance(images, ArrayImages) else None
    generator = torch.Generator().manual_seed(1)
    if groups is not None:
        kinds = groups[rows].unique()
        if len(kinds) > 1:
            first = kinds[torch.randperm(len(kinds), generator=generator)[: len(kinds) // 2]]
            chosen = torch.isin(groups[rows], first)
            return Sides(rows[chosen].tolist(), rows[~chosen].tolist())
    order = rows[torch.randperm(len(rows), generator=generator)]
    labels = images.labels[order]
    place = torch.zeros(len(order), dtype=torch.int64)  # within its class
    for c in labels.unique():
        place[labels == c] = torch.arange(int((labels == c).sum()))
    return Sides(order[place % 2 == 0].tolist(), order[place % 2 == 1].tolist())


def views(model: OldModel, images: LabelledImages, halves: Sides, *, workers: int = 0) -> Views:
    """A model's features of both sides.

    Args:
        model: a backbone and its classifier.
        images: a set.
        halves: rows of it.
        workers: processes that decode images.
    """
    return Views(
        model.features(images, halves.query, workers=workers), model.features(images, halves.gallery, workers=workers)
    )


def judge_retrieval(
    images: LabelledImages,
    halves: Sides,
    old: OldModel,
    new: OldModel,
    free: OldModel | None = None,
    *,
    workers: int = 0,
) -> dict[str, Any]:
    """`Compatibility` and the backfill curve, as JSON takes them.

    Args:
        images: a set.
        halves: rows of the queries and of the gallery.
        old: the old model.
        new: its successor.
        free: trained as the successor was, without regard to the old one.
        workers: processes that decode images.

    Raises:
        ValueError: no class has images on both sides.
    """
    labels = Labels(images.labels[halves.query], images.labels[halves.gallery])
    seen = [None if model is None else views(model, images, halves, workers=workers) for model in (old, new, free)]
    before, after = seen[:2]
    assert before is not None and after is not None
    made = compatibility(before, after, labels, seen[2]).to_dict()
    if new.n_features >= old.n_features:
        curve = backfill(before, after, labels)
        made["backfill"] = [{"share": share, **scores._asdict()} for share, scores in curve]
    return {"queries": len(halves.query), "gallery": len(halves.gallery), **made}


@torch.no_grad()
def logits_of(model: OldModel, images: LabelledImages, rows: list[int], *, workers: int = 0) -> Tensor:
    """[n, C] on the CPU.

    Args:
        model: a backbone and its classifier.
        images: a set.
        rows: of it.
        workers: processes that decode images.
    """
    device = model.classifier.weight.device
    made: Tensor = model.classifier(model.features(images, rows, workers=workers).to(device))
    return made.cpu()


class Flipped(NamedTuple):
    """Answers of two models to the same images."""

    rows: Tensor  # [n] int64, of the set
    labels: Tensor  # [n] int64, classes of the old model
    old: Tensor  # [n, C] logits
    new: Tensor  # [n, C] logits, columns as the old ones


def answers(images: LabelledImages, rows: Tensor, old: OldModel, new: OldModel, *, workers: int = 0) -> Flipped:
    """Logits of both models over the classes of the old one.

    Args:
        images: a set.
        rows: [n] int64, of it; those of classes that the old model does not know are left out.
        old: the old model.
        new: its successor, which knows the same classes or more.
        workers: processes that decode images.

    Raises:
        ValueError: the successor lacks a class of the old model; no image is of a class that both know.
    """
    columns = match_classes(old.classes, new.classes, same=False)
    place = {name: index for index, name in enumerate(old.classes)}
    class_of = torch.tensor([place.get(name, -1) for name in images.class_names])
    kept = rows[class_of[images.labels[rows]] >= 0]
    if not len(kept):
        raise ValueError(f"data: {images.source} has no image to judge by of a class that the old model knows")
    picked = torch.tensor([int((columns == c).nonzero()[0, 0]) for c in range(len(old.classes))])
    before = logits_of(old, images, kept.tolist(), workers=workers)
    after = logits_of(new, images, kept.tolist(), workers=workers)[:, picked]
    return Flipped(kept, class_of[images.labels[kept]], before, after)


def rows_to_judge_by(images: LabelledImages, *models: OldModel) -> tuple[Tensor, bool]:
    """Images of the classes that the first model knows, kept from those models that were trained on this very set.

    Args:
        images: a set.
        models: one or more.

    Returns:
        Rows [n] int64, and whether it is certain that no model was trained on them: that of a model trained on another
        set, which may hold some of these images, is not known.

    Raises:
        ValueError: the first model knows no class of these images.
    """
    known = set(models[0].classes)
    of_known = torch.tensor([name in known for name in images.class_names])[images.labels]
    if not bool(of_known.any()):
        raise ValueError(f"data: {images.source} has no class that {models[0].path} knows")
    fingerprint = images.fingerprint()
    here = [model for model in models if model.fingerprint == fingerprint]
    shares = {float(model.config.get("holdout", 0.0)) for model in here}
    if len(shares) == 1 and (share := shares.pop()):
        kept = (of_known & held_out(images, share)).nonzero().flatten()
        return kept, len(here) == len(models)
    return of_known.nonzero().flatten(), False


def judge_update(
    images: LabelledImages, old: OldModel, new: OldModel, free: OldModel | None = None, *, workers: int = 0
) -> tuple[dict[str, Any], Flipped]:
    """Flips, compatibility and the backfill curve, on known classes; the latter two on unseen classes as well.

    Args:
        images: a set.
        old: the old model.
        new: its successor.
        free: trained as the successor was, without regard to the old one.
        workers: processes that decode images.

    Returns:
        The results, as JSON takes them, and the answers of both models.

    Raises:
        ValueError: classes that do not match, or nothing to judge by.
    """
    models = [model for model in (old, new, free) if model is not None]
    rows, apart = rows_to_judge_by(images, *models)
    seen = answers(images, rows, old, new, workers=workers)
    results: dict[str, Any] = {
        "images": len(seen.rows),
        "held_out": apart,
        "classes": len(old.classes),
        "new_classes": len(set(new.classes) - set(old.classes)),
        "flips": flips_of(seen),
        "known": judge_retrieval(images, sides(images, rows), old, new, free, workers=workers),
        "unseen": None,
    }
    trained_on = {name for model in models for name in model.classes}
    unseen = torch.tensor([name not in trained_on for name in images.class_names])[images.labels].nonzero().flatten()
    if len(images.labels[unseen].unique()) > 1:
        results["unseen"] = judge_retrieval(images, sides(images, unseen), old, new, free, workers=workers)
    return results, seen


def flips_of(seen: Flipped) -> dict[str, float | None]:
    """Errors and flips in percent, and relative negative flips, by `flips`.

    Args:
        seen: answers of both models.
    """
    found = flips(seen.new, seen.old, seen.labels)
    made: dict[str, float | None] = {
        name: 100 * float(getattr(found, name)) for name in ("error_old", "error_new", "negative", "positive")
    }
    for name in ("relative_negative", "negative_impact"):
        value = float(getattr(found, name))
        made[name] = value if math.isfinite(value) else None
    return made


def worst_flips(seen: Flipped, most: int) -> Tensor:
    """[n] int64, places in ``seen`` of what the old model had right and the new one has wrong, the surest first.

    Args:
        seen: answers of both models.
        most: how many.
    """
    wrong = (seen.old.argmax(1) == seen.labels) & (seen.new.argmax(1) != seen.labels)
    places = wrong.nonzero().flatten()
    chances = seen.new[places].softmax(1)
    sure = chances.max(1).values - chances.gather(1, seen.labels[places, None])[:, 0]
    return places[sure.argsort(descending=True, stable=True)[:most]]
