"""Training a successor of a pretrained backbone that keeps what its users rely on."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernelmeta import nn
from kernelmeta.data.images import LabelledImages, batches
from kernelmeta.data.words import one_line
from kernelmeta.graceful.compatible import frozen_classifier, influence_loss, match_classes
from kernelmeta.ops import focal_distillation
from kernelmeta.training.backbones import make_backbone
from kernelmeta.training.checkpoint import CHECKPOINT, Checkpoint
from kernelmeta.training.finite import check_weights
from kernelmeta.training.pretraining import FREE as PRETRAIN_FREE
from kernelmeta.training.pretraining import PretrainConfig, Pretrainer
from kernelmeta.training.settings import as_float

METHODS = {
    "bct": "the old classifier's cross-entropy on the new features is added: no indexing anew",
    "focal": "focal distillation from the old logits: fewer new mistakes",
    "ldi": "logit-difference inhibition: the same, by a margin",
    "head": "the old classifier, frozen, is the only one: small networks for a large gallery",
    "none": "as if there were no old model",
}
_THROUGH_OLD_CLASSIFIER = ("bct", "head")
FREE = (*PRETRAIN_FREE, "old")


@dataclass(frozen=True)
class UpdateConfig(PretrainConfig):
    """Settings of `kernelmeta update`: those of `kernelmeta pretrain`, and what the successor keeps.

    Raises:
        ValueError: a setting out of its range, named.
    """

    old: str = ""
    method: str = "bct"
    weight: float = 1.0
    alpha: float = 1.0
    beta: float = 5.0
    tau: float = 100.0
    margin: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method not in METHODS:
            raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {self.method!r}")
        for name in ("weight", "alpha", "beta", "tau", "margin"):
            value = as_float(getattr(self, name))
            if not 0 <= value < float("inf") or (name == "tau" and not value):
                raise ValueError(
                    f"{name}: expected a number of {'more than' if name == 'tau' else 'at least'} 0, got {value}"
                )


class OldModel:
    """A backbone and its classifier, as `kernelmeta pretrain` or `kernelmeta update` left them.

    Args:
        path: the run folder, or its checkpoint.
        images: those it shall see.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: it is no such run, or cannot take such images.
    """

    def __init__(self, path: str | os.PathLike[str], images: LabelledImages) -> None:
        checkpoint = load_run(path)
        state, self.path = checkpoint.state, str(path)
        self.config: dict[str, Any] = dict(state["config"])
        self.fingerprint = state.get("images")
        try:
            self.classes = tuple(str(name) for name in state["classes"])
        except (KeyError, TypeError):
            raise ValueError(
                f"{path}: it does not name its classes; a run of this version of 'kernelmeta pretrain' does"
            ) from None
        try:
            name = str(self.config["backbone"])
            with torch.random.fork_rng(devices=[]):
                self.backbone = make_backbone(name, images.channels, images.size)
            weight = checkpoint.tensors["classifier"]["weight"]
            self.classifier = nn.CosineClassifier(weight.shape[1], len(weight))
            self.classifier.load_state_dict(checkpoint.tensors["classifier"])
            self.backbone.load_state_dict(checkpoint.tensors["backbone"])
            D = self.backbone.n_features(images.size, images.size)
            if (len(self.classes), D) != tuple(weight.shape):
                raise ValueError(f"{len(self.classes)} classes and {D} features for a classifier {list(weight.shape)}")
        except (KeyError, RuntimeError, TypeError) as error:
            raise ValueError(f"{path}: the weights do not fit ({one_line(error)})") from None
        except ValueError as error:
            raise ValueError(f"{path}: it cannot take images of {images.source} ({one_line(error)})") from None
        for module in (self.backbone, self.classifier):
            check_weights(path, module.state_dict())
            module.requires_grad_(False).eval()
        self.n_features = D

    def to(self, device: str) -> OldModel:
        """This model, on a device.

        Args:
            device: "cpu" or "cuda".
        """
        self.backbone.to(device)
        self.classifier.to(device)
        return self

    @torch.no_grad()
    def features(self, images: LabelledImages, rows: list[int], *, workers: int = 0) -> Tensor:
        """[n, D], on the CPU.

        Args:
            images: a set.
            rows: of it.
            workers: processes that decode images.
        """
        device = self.classifier.weight.device
        made = [self.backbone(pixels.to(device)).cpu() for pixels, _ in batches(images, rows, 256, workers=workers)]
        return torch.cat(made) if made else torch.empty(0, self.n_features)


def load_run(path: str | os.PathLike[str]) -> Checkpoint:
    """The checkpoint of a backbone's run.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: it is no such run.
    """
    file = Path(path)
    if file.is_dir():
        file = file / CHECKPOINT
        if not file.exists():
            raise ValueError(f"{path}: no run of 'kernelmeta pretrain': it holds no {CHECKPOINT}")
    elif not file.exists():
        raise ValueError(f"{path}: there is no such run")
    checkpoint = Checkpoint.load(file, "pretrain")
    if not isinstance(checkpoint.state.get("config"), dict):
        raise ValueError(f"{path}: it does not hold the settings of its run")
    return checkpoint


class Updater(Pretrainer):
    """A `Pretrainer` whose loss knows the old model.

    Args:
        config: settings.
        images: what the successor is trained on.
        old: the model that it succeeds.
        device: "cpu" or "cuda".
        workers: processes that decode images.

    Raises:
        ValueError: too few images, classes that do not match, or features narrower than the old ones.
    """

    config: UpdateConfig

    def __init__(
        self, config: UpdateConfig, images: LabelledImages, old: OldModel, *, device: str = "cpu", workers: int = 0
    ) -> None:
        self.old = old
        super().__init__(config, images, device=device, workers=workers)
        old.to(device)
        if config.method in _THROUGH_OLD_CLASSIFIER:
            self.old_classifier.to(device)

    def _modules(self) -> tuple[Any, torch.nn.Module]:
        backbone, classifier = super()._modules()
        method, D = self.config.method, backbone.n_features(self.images.size, self.images.size)
        self.columns = match_classes(self.old.classes, self.class_names, same=method in ("focal", "ldi"))
        if method in _THROUGH_OLD_CLASSIFIER:
            if self.old.n_features > D or (method == "head" and self.old.n_features < D):
                more = " or more" if method == "bct" else ""
                raise ValueError(
                    f"backbone: {self.config.backbone} gives {D} features; the old classifier takes"
                    f" {self.old.n_features}{more}"
                )
            self.old_classifier = self._old_classifier()
        return backbone, self.old_classifier if method == "head" else classifier

    def _old_classifier(self) -> torch.nn.Module:
        """The old classifier with a row for each class of the successor."""
        answers = self.target[self.images.labels[self.rows]]
        fresh = (self.columns[answers] < 0).nonzero().flatten()
        features = self.old.features(self.images, self.rows[fresh.numpy()].tolist(), workers=self.workers)
        return frozen_classifier(
            self.old.classifier.cpu(), columns=self.columns, features=features, labels=answers[fresh]
        )

    def _loss(self, pixels: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
        c = self.config
        features: Tensor = self.backbone(pixels)
        if c.method == "head":
            logits: Tensor = self.classifier(features)
            return F.cross_entropy(logits, answers), logits
        logits = self.classifier(features)
        if c.method in ("focal", "ldi"):
            with torch.no_grad():
                old_logits = self.old.classifier(self.old.backbone(pixels))[:, self.columns]
            # The mean over classes, so that one weight fits any number of them, as that of the divergence does.
            distance = {"distance": "ldi_mean", "margin": c.margin} if c.method == "ldi" else {"tau": c.tau}
            loss = focal_distillation(
                logits, old_logits, answers, alpha=c.alpha, beta=c.beta, weight=c.weight, **distance
            )
            return loss, logits
        loss = F.cross_entropy(logits, answers)
        if c.method == "bct":
            loss = loss + c.weight * influence_loss(features, answers, self.old_classifier, self.old.n_features)
        return loss, logits
