"""What a successor keeps and what it breaks, on images that neither model was trained on."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernelmeta.data.images import ArrayImages, LabelledImages
from kernelmeta.graceful.compatible import match_classes
from kernelmeta.graceful.retrieval import Labels, Views, backfill, compatibility
from kernelmeta.graceful.updating import OldModel


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
    rows: Tensor,
    old: OldModel,
    new: OldModel,
    free: OldModel | None = None,
    *,
    workers: int = 0,
) -> dict[str, Any]:
    """`Compatibility` and the backfill curve, as JSON takes them.

    Args:
        images: a set.
        rows: [n] int64, of the images to judge by; half of them become the gallery.
        old: the old model.
        new: its successor.
        free: trained as the successor was, without regard to the old one.
        workers: processes that decode images.

    Raises:
        ValueError: no class has images on both sides.
    """
    halves = sides(images, rows)
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
