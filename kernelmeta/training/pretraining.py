"""Training a backbone as a plain classifier of its classes, as Hu et al. (ICLR 2020) do before
meta-training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from kernelmeta import nn
from kernelmeta.data.files import one_line
from kernelmeta.data.images import BACKBONE_SPLIT, LabelledImages, batches
from kernelmeta.training.backbones import BACKBONES, make_backbone
from kernelmeta.training.checkpoint import Checkpoint, optimizer_tensors, restore_optimizer
from kernelmeta.training.trainer import CHECKPOINT

Report = Callable[[str, float, int], None]


@dataclass(frozen=True)
class PretrainConfig:
    """Settings of `kernelmeta pretrain`; the defaults are the published ones for miniImageNet.

    The rate rises linearly for ``warmup_epochs``, stays, and is a tenth after ``milestone`` epochs.

    Raises:
        ValueError: a setting out of its range, named.
    """

    data: str
    backbone: str = "conv4"
    style: str | None = None
    epochs: int = 130
    warmup_epochs: int = 10
    milestone: int = 60
    batch_size: int = 64
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"epochs": 1, "warmup_epochs": 0, "milestone": 0, "batch_size": 2, "seed": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name}: expected at least {low}, got {getattr(self, name)}")
        for name in ("lr", "momentum", "weight_decay"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: expected a number of at least 0, got {getattr(self, name)}")
        if self.backbone not in BACKBONES:
            raise ValueError(f"backbone: expected one of {', '.join(BACKBONES)}, got {self.backbone!r}")

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> PretrainConfig:
        """From what `to_dict` gave; other keys are left aside. Raises ValueError."""
        names = {field.name for field in fields(cls)}
        try:
            return cls(**{name: value for name, value in settings.items() if name in names})
        except TypeError as error:
            raise ValueError(f"config: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """The settings, as JSON takes them."""
        return asdict(self)

    def rate(self, epoch: float) -> float:
        """The learning rate ``epoch`` epochs into the run."""
        if epoch < self.warmup_epochs:
            return self.lr * epoch / self.warmup_epochs
        return self.lr * (1.0 if epoch < self.milestone else 0.1)


class Pretrainer:
    """A backbone and a cosine classifier, trained on the classes kept for the backbone, or, where there are
    none, on the meta-training classes (as published); its state is a checkpoint after every epoch.

    Raises:
        ValueError: there are too few images.
    """

    def __init__(
        self, config: PretrainConfig, images: LabelledImages, *, device: str = "cpu", workers: int = 0
    ) -> None:
        self.config, self.images, self.device, self.workers = config, images, device, workers
        code = BACKBONE_SPLIT if bool((images.class_split == BACKBONE_SPLIT).any()) else 0
        classes = (images.class_split == code).nonzero().flatten()
        if len(classes) < 2:
            raise ValueError(f"{images.source}: {len(classes)} classes to train a backbone on; 2 are needed")
        self.target = torch.full((len(images.class_split),), -1).index_copy(0, classes, torch.arange(len(classes)))
        self.rows = torch.isin(images.labels, classes).nonzero().flatten().numpy()
        if len(self.rows) < config.batch_size:
            raise ValueError(f"batch_size: {config.batch_size}, but there are only {len(self.rows)} images")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.backbone = make_backbone(config.backbone, images.channels, images.size).to(device)
            D = self.backbone.n_features(images.size, images.size)
            self.classifier = nn.CosineClassifier(D, len(classes)).to(device)
        self.parameters = [*self.backbone.parameters(), *self.classifier.parameters()]
        self.optimizer = torch.optim.SGD(
            self.parameters,
            config.lr,
            config.momentum,
            weight_decay=config.weight_decay,
            nesterov=config.momentum > 0,
        )
        self.epoch = 0
        self.history: list[tuple[int, float, float]] = []  # epochs done, loss, accuracy in percent

    def checkpoint(self) -> Checkpoint:
        """All that the run needs to go on, and all that extraction needs."""
        return Checkpoint(
            "pretrain",
            {
                "backbone": self.backbone.state_dict(),
                "classifier": self.classifier.state_dict(),
                "optimizer": optimizer_tensors(self.optimizer),
            },
            {
                "epoch": self.epoch,
                "seed": self.config.seed,
                "config": self.config.to_dict(),
                "history": self.history,
            },
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint of the same configuration. Raises ValueError if it does not fit."""
        try:
            self.backbone.load_state_dict(checkpoint.tensors["backbone"])
            self.classifier.load_state_dict(checkpoint.tensors["classifier"])
            restore_optimizer(self.optimizer, checkpoint.tensors["optimizer"])
            self.epoch = int(checkpoint.state["epoch"])
            self.history = [tuple(row) for row in checkpoint.state["history"]]
        except (KeyError, RuntimeError, TypeError) as error:
            raise ValueError(f"the checkpoint does not fit the run ({one_line(error)})") from None

    def run(self, out: Path, *, report: Report | None = None, progress: bool = False) -> None:
        """Train to the end; a checkpoint in ``out`` after every epoch, so that any interruption costs one
        at most.

        Raises:
            OSError: a checkpoint could not be written.
            ValueError: an image could not be read.
        """
        while self.epoch < self.config.epochs:
            loss, accuracy = self._run_epoch(progress)
            self.epoch += 1
            self.history.append((self.epoch, loss, accuracy))
            self.checkpoint().save(out / CHECKPOINT)
            if report:
                report("loss", loss, self.epoch)
                report("accuracy", accuracy, self.epoch)

    def _run_epoch(self, progress: bool) -> tuple[float, float]:
        c, key = self.config, (self.config.seed, self.epoch)
        order = np.random.default_rng(key).permutation(self.rows)
        n_batches = len(order) // c.batch_size
        self.backbone.train()
        self.classifier.train()
        loss_sum = torch.zeros((), device=self.device)
        right = torch.zeros((), device=self.device)
        bar = tqdm(
            total=n_batches * c.batch_size,
            desc=f"pretrain, epoch {self.epoch + 1}/{c.epochs}",
            unit="image",
            disable=not progress,
            leave=self.epoch + 1 == c.epochs,
        )
        loader = batches(self.images, order.tolist(), c.batch_size, key=key, drop_last=True, workers=self.workers)
        for i, (pixels, labels) in enumerate(loader):
            for group in self.optimizer.param_groups:
                group["lr"] = c.rate(self.epoch + (i + 1) / n_batches)
            answers = self.target[labels].to(self.device)
            logits: Tensor = self.classifier(self.backbone(pixels.to(self.device)))
            loss = F.cross_entropy(logits, answers)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            loss_sum += loss.detach()
            right += (logits.detach().argmax(1) == answers).sum()
            bar.update(len(labels))
            bar.set_postfix_str(f"loss {float(loss_sum) / (i + 1):.3f}", refresh=False)
        bar.close()
        return float(loss_sum) / n_batches, 100 * float(right) / (n_batches * c.batch_size)
