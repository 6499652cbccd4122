"""Training a backbone as a plain classifier of its classes, as Hu et al. (ICLR 2020) do before
meta-training.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from kernelmeta import nn
from kernelmeta.data.images import BACKBONE_SPLIT, LabelledImages, batches
from kernelmeta.data.words import listing, one_line
from kernelmeta.training.backbones import check_backbone, make_backbone
from kernelmeta.training.checkpoint import CHECKPOINT, Checkpoint, count, optimizer_tensors, restore_optimizer, rows
from kernelmeta.training.finite import NotFiniteError, not_finite
from kernelmeta.training.interruptions import interruptions
from kernelmeta.training.settings import Settings, check_numbers, check_types

Report = Callable[[str, float, int], None]
CHECKPOINT_SECONDS = 60.0
# Settings that may differ between a checkpoint and the run that goes on from it; images have a fingerprint.
FREE = ("epochs", "data")
# Of settings that checkpoints of earlier versions do not name.
DEFAULTS = {"holdout": 0.0}


@dataclass(frozen=True)
class PretrainConfig(Settings):
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
    holdout: float = 0.0

    def __post_init__(self) -> None:
        check_types(self)
        least = {"epochs": 1, "warmup_epochs": 0, "milestone": 0, "batch_size": 2, "seed": 0}
        check_numbers(self, least, ("lr", "momentum", "weight_decay", "warmup_epochs", "epochs"))
        check_backbone(self.backbone)
        if not 0 <= self.holdout < 1:
            raise ValueError(f"holdout: expected a share of at least 0 and less than 1, got {self.holdout}")

    def rate(self, epoch: float) -> float:
        """The learning rate ``epoch`` epochs into the run."""
        if epoch < self.warmup_epochs:
            return self.lr * epoch / self.warmup_epochs
        return self.lr * (1.0 if epoch < self.milestone else 0.1)


class Pretrainer:
    """A backbone and a cosine classifier, trained on the classes kept for the backbone, or, where there are
    none, on the meta-training classes (as published); its state is a checkpoint.

    Raises:
        ValueError: there are too few images.
    """

    def __init__(
        self, config: PretrainConfig, images: LabelledImages, *, device: str = "cpu", workers: int = 0
    ) -> None:
        self.config, self.images, self.device, self.workers = config, images, device, workers
        self.fingerprint = images.fingerprint()
        code = BACKBONE_SPLIT if bool((images.class_split == BACKBONE_SPLIT).any()) else 0
        classes = (images.class_split == code).nonzero().flatten()
        if len(classes) < 2:
            raise ValueError(f"{images.source}: {len(classes)} classes to train a backbone on; 2 are needed")
        self.target = torch.full((len(images.class_split),), -1).index_copy(0, classes, torch.arange(len(classes)))
        self.class_names = tuple(images.class_names[c] for c in classes.tolist())
        kept = torch.isin(images.labels, classes) & ~held_out(images, config.holdout)
        self.rows = kept.nonzero().flatten().numpy()
        if len(self.rows) < config.batch_size:
            raise ValueError(f"batch_size: {config.batch_size}, but there are only {len(self.rows)} images")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.backbone, self.classifier = (module.to(device) for module in self._modules())
        self.parameters = [
            p for module in (self.backbone, self.classifier) for p in module.parameters() if p.requires_grad
        ]
        self.optimizer = torch.optim.SGD(
            self.parameters,
            config.lr,
            config.momentum,
            weight_decay=config.weight_decay,
            nesterov=config.momentum > 0,
        )
        self.epoch = self.batch = 0
        self.sums = torch.zeros(2, device=device)  # of the loss and of right answers, in the epoch that has begun
        self.history: list[tuple[int, float, float]] = []  # epochs done, loss, accuracy in percent

    def _modules(self) -> tuple[Any, torch.nn.Module]:
        """A backbone, [n, channels, H, H] -> [n, D], and a classifier, [n, D] -> [n, C]."""
        backbone = make_backbone(self.config.backbone, self.images.channels, self.images.size)
        D = backbone.n_features(self.images.size, self.images.size)
        return backbone, nn.CosineClassifier(D, len(self.class_names))

    def checkpoint(self) -> Checkpoint:
        """All that the run needs to go on, and all that extraction needs."""
        return Checkpoint(
            "pretrain",
            {
                "backbone": self.backbone.state_dict(),
                "classifier": self.classifier.state_dict(),
                "optimizer": optimizer_tensors(self.optimizer),
                "progress": {"sums": self.sums},
            },
            {
                "epoch": self.epoch,
                "batch": self.batch,
                "seed": self.config.seed,
                "config": self.config.to_dict(),
                "images": self.fingerprint,
                "style": getattr(self.images, "style_name", None),
                "classes": list(self.class_names),
                "history": self.history,
            },
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint of the same configuration. Raises ValueError if it does not fit."""
        state = checkpoint.state
        try:
            if state["images"] != self.fingerprint:
                raise ValueError("data: not the images that the run began with")
            for name, value in self.config.to_dict().items():
                trained = state["config"].get(name, DEFAULTS.get(name))
                if name not in FREE and trained != value:
                    raise ValueError(f"{name}: the checkpoint was trained with {trained!r}, not {value!r}")
            epoch, batch, history = count(state, "epoch"), count(state, "batch"), rows(state, "history")
            if batch >= len(self.rows) // self.config.batch_size:
                raise ValueError(f"the checkpoint does not fit the run (batch {batch} is beyond an epoch)")
            self.backbone.load_state_dict(checkpoint.tensors["backbone"])
            self.classifier.load_state_dict(checkpoint.tensors["classifier"])
            restore_optimizer(self.optimizer, checkpoint.tensors["optimizer"])
            self.sums.copy_(checkpoint.tensors["progress"]["sums"])
            self.epoch, self.batch, self.history = epoch, batch, history
        except (KeyError, RuntimeError, TypeError) as error:
            raise ValueError(f"the checkpoint does not fit the run ({one_line(error)})") from None
        bad = not_finite(self._tensors())
        if bad:
            raise ValueError(f"the checkpoint holds NaN or infinite numbers ({bad[0]})")

    def run(self, out: Path, *, report: Report | None = None, progress: bool = False) -> bool:
        """Train to the end, with checkpoints in ``out`` after every epoch and every minute.

        Returns:
            False if Ctrl-C, SIGTERM or SIGHUP ended it early; the checkpoint holds where.

        Raises:
            OSError: a checkpoint could not be written.
            NotFiniteError: the loss or a parameter became NaN or infinite; the last checkpoint is one from before.
            ValueError: an image could not be read.
        """
        with interruptions() as interrupted:
            while self.epoch < self.config.epochs:
                if not self._run_epoch(out, interrupted, progress):
                    return False
                if report:
                    epochs, loss, accuracy = self.history[-1]
                    report("loss", loss, epochs)
                    report("accuracy", accuracy, epochs)
        return True

    def _run_epoch(self, out: Path, interrupted: Callable[[], bool], progress: bool) -> bool:
        """The rest of the epoch that has begun; False if interrupted."""
        c, key = self.config, (self.config.seed, self.epoch)
        order = np.random.default_rng(key).permutation(self.rows)
        n_batches = len(order) // c.batch_size
        rows = order[self.batch * c.batch_size : n_batches * c.batch_size].tolist()
        self.backbone.train()
        self.classifier.train()
        bar = tqdm(
            total=n_batches * c.batch_size,
            initial=self.batch * c.batch_size,
            desc=f"pretrain, epoch {self.epoch + 1}/{c.epochs}",
            unit="image",
            disable=not progress,
            leave=self.epoch + 1 == c.epochs,
        )
        saved_at = time.monotonic()
        with bar:
            for pixels, labels in batches(self.images, rows, c.batch_size, key=key, workers=self.workers):
                for group in self.optimizer.param_groups:
                    group["lr"] = c.rate(self.epoch + (self.batch + 1) / n_batches)
                self._step(pixels.to(self.device), self.target[labels].to(self.device))
                self.batch += 1
                loss_sum = float(self.sums[0])
                if not math.isfinite(loss_sum):
                    self._refuse(f"the loss is {loss_sum}", order[(self.batch - 1) * c.batch_size :][: c.batch_size])
                stop = interrupted()
                if self.batch < n_batches and (stop or time.monotonic() - saved_at > CHECKPOINT_SECONDS):
                    self._save(out)
                    saved_at = time.monotonic()
                # After the checkpoint: where the terminal is gone, this is an error.
                bar.update(len(labels))
                bar.set_postfix_str(f"loss {loss_sum / self.batch:.3f}", refresh=False)
                if stop and self.batch < n_batches:
                    return False
        loss, right = (float(value) / n_batches for value in self.sums)
        self.epoch, self.batch = self.epoch + 1, 0
        self.sums.zero_()
        self.history.append((self.epoch, loss, 100 * right / c.batch_size))
        self._save(out)
        return self.epoch == c.epochs or not interrupted()

    def _save(self, out: Path) -> None:
        bad = not_finite(self._tensors())
        if bad:
            self._refuse(f"{bad[0]} is NaN or infinite", None)
        self.checkpoint().save(out / CHECKPOINT)

    def _tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint holds, by name."""
        return {f"{group}.{name}": t for group, named in self.checkpoint().tensors.items() for name, t in named.items()}

    def _refuse(self, what: str, batch: Any) -> NoReturn:
        seen = "" if batch is None else f" ({listing([self.images.name(row) for row in batch], 3)})"
        raise NotFiniteError(
            f"training stopped: {what} after epoch {self.epoch + 1}, batch {self.batch}{seen}; is the rate (lr"
            f" {self.config.lr:g}) too large? The last checkpoint, if there is one, is from before"
        )

    def _step(self, pixels: Tensor, answers: Tensor) -> None:
        loss, logits = self._loss(pixels, answers)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            self.sums += torch.stack([loss, (logits.argmax(1) == answers).sum()])

    def _loss(self, pixels: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
        """Of a batch: what is minimised, a scalar, and logits [n, C]."""
        logits: Tensor = self.classifier(self.backbone(pixels))
        return F.cross_entropy(logits, answers), logits


def held_out(images: LabelledImages, share: float) -> Tensor:
    """[n] bool: the images kept from training, the same for every run of the same images.

    Whole groups (typeface families) where the images have groups; else a share of each class, by a shuffle.

    Args:
        share: of the groups, or of each class, 0 to 1; one or more where it is above 0 and there are two or more.
    """
    n = len(images.labels)
    if not share:
        return torch.zeros(n, dtype=torch.bool)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    groups = getattr(images, "groups", None)
    if groups is not None:
        kinds = groups.unique()
        shuffled = kinds[torch.randperm(len(kinds), generator=torch.Generator().manual_seed(0))]
        return torch.isin(groups, shuffled[: max(1, round(share * len(kinds)))])
    held = torch.zeros(n, dtype=torch.bool)
    labels = images.labels[order]
    for c in range(len(images.class_split)):
        rows = order[labels == c]
        held[rows[: min(len(rows) - 1, max(1, round(share * len(rows))))]] = True
    return held
