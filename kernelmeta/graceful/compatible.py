"""Backward-compatible training: the features of a new model are found in a gallery that the old one has indexed.

Shen, Xiong, Xia, Soatto: Towards Backward-Compatible Representation Learning, CVPR 2020.
"""

from __future__ import annotations

from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernelmeta.nn.cosine_classifier import CosineClassifier

Classifier = nn.Linear | CosineClassifier


def frozen_classifier(
    old: Classifier,
    *,
    columns: Tensor | None = None,
    features: Tensor | None = None,
    labels: Tensor | None = None,
) -> Classifier:
    """The old classifier with a row for every class of the new model, frozen.

    A class that the old model never saw gets the mean of its old features for a weight: scaled to the mean length of
    the old rows where the classifier is linear, with the mean of the old biases.

    Args:
        old: [n, D] -> [n, C_old]; it stays as it is.
        columns: [C] int64, the old class that each new class is, or -1. None: the same classes in the same order.
        features: [n, D], the old model's features of images of the new classes.
        labels: [n] int64 in 0..C-1, their classes.

    Returns:
        A module [n, D] -> [n, C] without gradients of its own.

    Raises:
        ValueError: a class is new and has no features, or ``columns`` names a class that the old model has not.
    """
    made = deepcopy(old)
    weight = old.weight.detach()
    if columns is not None:
        columns = columns.to(weight.device)
        if bool((columns >= len(weight)).any()):
            raise ValueError(f"columns: expected classes below {len(weight)}, got {int(columns.max())}")
        fresh = (columns < 0).nonzero().flatten()
        rows = weight[columns.clamp(min=0)].clone()
        if len(fresh):
            rows[fresh] = _class_means(weight, fresh, features, labels).to(rows)
        if isinstance(made, nn.Linear):
            made.out_features = len(rows)
            rows[fresh] = F.normalize(rows[fresh], dim=1) * weight.norm(dim=1).mean()
            if made.bias is not None:
                before = made.bias.detach()
                bias = before[columns.clamp(min=0)].clone()
                bias[fresh] = before.mean()
                made.bias = nn.Parameter(bias)
        made.weight = nn.Parameter(rows)
    return made.requires_grad_(False).eval()


def _class_means(weight: Tensor, fresh: Tensor, features: Tensor | None, labels: Tensor | None) -> Tensor:
    if features is None or labels is None:
        raise ValueError(f"features: {len(fresh)} classes are new; the old model's features of their images are needed")
    if features.dim() != 2 or features.shape[1] != weight.shape[1] or labels.shape != features.shape[:1]:
        raise ValueError(
            f"features: expected [n, {weight.shape[1]}] and n labels, got {list(features.shape)} and"
            f" {list(labels.shape)}"
        )
    belongs = labels.to(features.device) == fresh.to(features.device)[:, None]  # [new classes, n]
    counts = belongs.sum(1, keepdim=True)
    if not bool(counts.all()):
        raise ValueError(f"features: none of class {int(fresh[counts.flatten() == 0][0])}, which is new")
    return belongs.to(features.dtype) @ features / counts


def influence_loss(new_features: Tensor, labels: Tensor, old_classifier: nn.Module, n_features: int) -> Tensor:
    """Cross-entropy of the old classifier on the new features: what makes a new model backward-compatible.

    Args:
        new_features: [n, D_new]; where they are wider than the old ones, the first ``n_features`` count.
        labels: [n] int64, classes of ``old_classifier``.
        old_classifier: [n, n_features] -> [n, C], frozen: see `frozen_classifier`.
        n_features: D of the old model.

    Returns:
        A scalar.

    Raises:
        ValueError: the new features are narrower than the old ones.
    """
    if new_features.dim() != 2 or new_features.shape[1] < n_features:
        raise ValueError(f"new_features: expected [n, {n_features} or more], got {list(new_features.shape)}")
    return F.cross_entropy(old_classifier(new_features[:, :n_features]), labels)


@torch.no_grad()
def match_classes(old: tuple[str, ...], new: tuple[str, ...], *, same: bool) -> Tensor:
    """[C] int64: where each of the classes ``new`` is among ``old``, or -1.

    Args:
        old, new: names of classes, each once.
        same: the new model may not know other classes.

    Raises:
        ValueError: the new model lacks a class of the old one, or, with ``same``, has one that the old one has not.
    """
    place = {name: index for index, name in enumerate(old)}
    missing = [name for name in old if name not in set(new)]
    if missing:
        raise ValueError(f"classes: {len(missing)} of the old model's {len(old)} are not there, {missing[0]!r} first")
    added = [name for name in new if name not in place]
    if same and added:
        raise ValueError(
            f"classes: {len(added)} that the old model does not know, {added[0]!r} first; only bct, head and none can"
            " take new classes"
        )
    return torch.tensor([place.get(name, -1) for name in new])
