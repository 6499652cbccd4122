"""Fine-tuning, linearised and in full, of one backbone on one draw of a few digits of each class.

LQF (Achille et al., "LQF: Linear quadratic fine-tuning", CVPR 2021) in closed form, beside full fine-tuning with the
cross entropy and linear probes. Every choice (ridge, rate, head to start from, statistics of normalisation) is made on
validation images.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernelmeta.linear.closed_form import solutions
from kernelmeta.linear.digits import CLASSES, Digits, accuracy
from kernelmeta.linear.lqf import Linearised, lqf
from kernelmeta.linear.probes import logistic_head, ridge_head


@dataclass(frozen=True)
class FineTuningSettings:
    """What is trained and adapted."""

    backbones: tuple[str, ...] = (
        "small-1.1-16.32.64-5.3.3-64", "small-2.2-16.32.64-3.3.3-64", "small-1.1-24.48.96-5.3.3-64",
    )  # fmt: skip
    pretrain_epochs: int = 12
    shots: tuple[int, ...] = (5, 20)
    draws: int = 3
    validation: int = 500
    test: int = 2000
    scale: float = 15.0
    slope: float = 0.01
    heads: tuple[float, ...] = (1e-2, 1e-1, 1.0)  # ridges of heads that LQF starts from
    ridges: tuple[float, ...] = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)  # in units of the kernel's mean eigenvalue
    decays: tuple[float, ...] = (1e-5, 1e-4, 1e-3, 1e-2)  # of probes with the cross entropy
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)  # of Adam, in full fine-tuning
    epochs: int = 60
    batch_size: int = 25
    most_steps: int = 2000  # in which an optimizer is to come near the optimum


CHUNK = 100  # rows whose Jacobians are there at once


def renormalised(backbone: nn.Module, images: Tensor) -> nn.Module:
    """A copy of a backbone whose normalisation takes its statistics from these images.

    Args:
        backbone: in evaluation mode, as the copy.
        images: [n, ...].
    """
    own = copy.deepcopy(backbone)
    for part in own.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.reset_running_stats()
            part.momentum = None  # the plain mean over batches, of which there is one
    with torch.no_grad():
        own.train()(images)
    return own.eval()


def fine_tuned(
    network: nn.Module, train: Digits, *, lr: float, frozen_norms: bool, epochs: int, batch_size: int, seed: int
) -> nn.Module:
    """A copy of a network, all of it trained by the cross entropy with Adam and a cosine schedule.

    Args:
        network: backbone and head.
        train: images to learn from.
        lr: at the start.
        frozen_norms: keep the statistics of normalisation.
        epochs, batch_size: of the training.
        seed: of the order.
    """
    model = copy.deepcopy(network).requires_grad_(True)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    generator = torch.Generator().manual_seed(seed)
    model.train(not frozen_norms)
    for _ in range(epochs):
        for rows in torch.randperm(len(train.labels), generator=generator).split(batch_size):
            optimizer.zero_grad()
            F.cross_entropy(model(train.images[rows]), train.labels[rows]).backward()
            optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def outputs_of(model: nn.Module, digits: Digits) -> Tensor:
    """[n, ...], some images at a time."""
    return torch.cat([model(images) for images in digits.images.split(250)])


def one_draw(
    backbone: nn.Module, train: Digits, validation: Digits, test: Digits, settings: FineTuningSettings, seed: int
) -> dict[str, Any]:
    """Accuracy on the test images in percent, by method, and what LQF chose.

    Args:
        backbone: trained on glyphs, in evaluation mode.
        train, validation, test: images.
        settings: of every method.
        seed: of full fine-tuning's order.

    Returns:
        "accuracy" by method, and "chosen" by LQF: "renormalised", "head", "ridge".
    """
    wanted = F.one_hot(train.labels, CLASSES).float()
    of_backbones = {False: backbone, True: renormalised(backbone, train.images)}
    features = outputs_of(backbone, train)
    found: dict[str, float] = {}

    def best(models: Iterable[tuple[Any, nn.Module]]) -> tuple[float, Any]:
        """Accuracy on the test of the best of some models on the validation images, and which it is."""
        top, kept = -1.0, (0.0, None)
        for choice, model in models:
            score = accuracy(outputs_of(model, validation), validation)
            if score > top:
                top, kept = score, (accuracy(outputs_of(model, test), test), choice)
        return kept

    squared = (
        (r, nn.Sequential(backbone, ridge_head(features, wanted, r))) for r in (*settings.heads, *settings.ridges)
    )
    found["probe, squared error"], _ = best(squared)
    logistic = {d: nn.Sequential(backbone, logistic_head(features, train.labels, CLASSES, d)) for d in settings.decays}
    found["probe, cross entropy"], decay = best(logistic.items())

    def linearised(renorm: bool, head: float, scale: float, slope: float) -> Iterator[tuple[Any, nn.Module]]:
        body = of_backbones[renorm]
        start = nn.Sequential(body, ridge_head(outputs_of(body, train), scale * wanted, head)).eval()
        model = Linearised(start) if slope == 0 else lqf(start, slope=slope)
        solved = solutions(model, train.images, scale * wanted, settings.ridges, chunk_size=CHUNK)
        return (((renorm, head, ridge), model) for ridge, model in solved)

    starts = itertools.product((False, True), settings.heads)
    every = (one for start in starts for one in linearised(*start, settings.scale, settings.slope))
    found["LQF"], (renorm, head, ridge) = best(every)
    # The others start as LQF chose.
    for name, scale, slope in (
        ("LQF, targets times 1", 1.0, settings.slope), ("LQF, ReLU kept", settings.scale, 0.0),
    ):  # fmt: skip
        found[name], _ = best(linearised(renorm, head, scale, slope))

    tuned = (
        ((lr, frozen), fine_tuned(logistic[decay], train, lr=lr, frozen_norms=frozen, epochs=settings.epochs,
                                  batch_size=settings.batch_size, seed=seed))
        for lr in settings.rates for frozen in (True, False)
    )  # fmt: skip
    found["full fine-tuning"], _ = best(tuned)
    return {"accuracy": found, "chosen": {"renormalised": renorm, "head": head, "ridge": ridge}}
