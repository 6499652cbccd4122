"""A small network for queries, chosen for how it searches the gallery of a large one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kernelmeta.data.files import read_json, write_json
from kernelmeta.data.images import LabelledImages, batches
from kernelmeta.graceful.judging import Sides, views
from kernelmeta.graceful.retrieval import Labels, Views, cross_scores, nearest
from kernelmeta.graceful.small import PREFIX, Architecture, SmallBackbone
from kernelmeta.graceful.supernet import Space, SuperNet, architecture_of
from kernelmeta.graceful.updating import OldModel, UpdateConfig, Updater, load_run
from kernelmeta.training.checkpoint import CHECKPOINT
from kernelmeta.training.settings import Settings, as_float, check_numbers, check_types

Say = Callable[[str], None]
Judge = Callable[[Architecture], "Rewards"]
REWARDS = ("self", "cross", "product")
JUDGED = "judged.json"
CALIBRATION = 256  # images from which a sampled backbone's BatchNorm takes its statistics
# Strangers among the first generation, parents of the next, and how often a gene of a child changes.
POPULATION, PARENTS, MUTATION = 32, 8, 0.15


SPACE = Space()


class Rewards(NamedTuple):
    """Top-1 retrieval of an architecture with the supernet's weights, in percent."""

    self: float  # M(q,q): its queries in its own gallery
    cross: float  # M(q,g): its queries in the large model's gallery

    def of(self, reward: str) -> float:
        """ "self", "cross", or their "product" (of shares, in percent).

        Args:
            reward: which.
        """
        return self.self * self.cross / 100 if reward == "product" else float(getattr(self, reward))


@dataclass(frozen=True)
class SearchConfig(Settings):
    """Settings of `kernelmeta search`.

    Args:
        data: images; those of the gallery's run by default.
        gallery: the large model's run.
        budget: the most multiplications of the small network, as a share of the large one's.
        judged: architectures that each search judges.
        reward: "self", "cross" or "product": which search's network is kept.
        epochs: of the supernet.
        final_epochs: of the networks that were chosen, trained anew.
        batch_size, lr, seed: of all training.

    Raises:
        ValueError: a setting out of its range, named.
    """

    data: str
    gallery: str
    budget: float = 0.1
    judged: int = 200
    reward: str = "product"
    epochs: int = 12
    final_epochs: int = 12
    batch_size: int = 64
    lr: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        check_numbers(self, {"judged": 1, "epochs": 1, "final_epochs": 1, "batch_size": 2}, ("lr", "budget"))
        if self.reward not in REWARDS:
            raise ValueError(f"reward: expected one of {', '.join(REWARDS)}, got {self.reward!r}")
        if not as_float(self.budget):
            raise ValueError("budget: expected a share of more than 0")

    def training(self, backbone: str, epochs: int, method: str, holdout: float) -> UpdateConfig:
        """Of one of its trainings.

        Args:
            backbone: its name.
            epochs: of it.
            method: "head" through the gallery's classifier, or "none".
            holdout: share of the images to keep from it.
        """
        return UpdateConfig(
            self.data,
            backbone=backbone,
            epochs=epochs,
            warmup_epochs=min(1, epochs - 1),
            milestone=max(1, epochs * 3 // 4),
            batch_size=self.batch_size,
            lr=self.lr,
            seed=self.seed,
            holdout=holdout,
            old=self.gallery,
            method=method,
        )


class SuperNetTrainer(Updater):
    """Trains a supernet through the gallery's frozen classifier: in every step the largest network, the smallest, and
    one drawn at random.

    Args:
        config: settings, method "head"; its backbone is the largest of the space.
        space: of the architectures.
        images, gallery, device, workers: see `Updater`.
    """

    def __init__(
        self,
        config: UpdateConfig,
        space: Space,
        images: LabelledImages,
        gallery: OldModel,
        *,
        device: str = "cpu",
        workers: int = 0,
    ) -> None:
        self.space = space
        super().__init__(config, images, gallery, device=device, workers=workers)

    def _modules(self) -> tuple[Any, torch.nn.Module]:
        _, classifier = super()._modules()
        return SuperNet(self.space, self.old.n_features, self.images.channels), classifier

    def _loss(self, pixels: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
        drawn = self.space.draw(np.random.default_rng((self.config.seed, self.epoch, self.batch)))
        logits = [self.classifier(self.backbone(pixels, a)) for a in (None, self.space.smallest(), drawn)]
        return torch.stack([F.cross_entropy(one, answers) for one in logits]).mean(), logits[0]


def operations(backbone: torch.nn.Module, channels: int, size: int) -> int:
    """Multiplications of its convolutions and linear layers for one image [channels, size, size].

    Args:
        backbone: it may be any module that takes images.
        channels: of the image.
        size: of its sides.
    """
    counted: list[int] = []

    def count(module: torch.nn.Module, inputs: Any, made: Tensor) -> None:
        weight: Tensor = module.weight  # type: ignore[assignment]
        counted.append(made[0].numel() * weight[0].numel())

    kinds = (torch.nn.Conv2d, torch.nn.Linear)
    hooks = [m.register_forward_hook(count) for m in backbone.modules() if isinstance(m, kinds)]
    try:
        with torch.no_grad():
            device = next(backbone.parameters()).device
            was = backbone.training
            backbone.eval()(torch.zeros(1, channels, size, size, device=device))
            backbone.train(was)
    finally:
        for hook in hooks:
            hook.remove()
    return sum(counted)


def random_search(
    space: Space, fits: Callable[[Architecture], bool], judge: Judge, judged: int, seed: int
) -> list[str]:
    """Judges architectures drawn at random within the budget, each once.

    Args:
        space: of the architectures.
        fits: whether one is within the budget.
        judge: what is to be called with each.
        judged: how many; all, where there are fewer.
        seed: of the draws.

    Returns:
        Their names.

    Raises:
        ValueError: none is within the budget.
    """
    candidates = _within(space, fits)
    order = np.random.default_rng((seed, 0)).permutation(len(candidates))[:judged]
    for index in order:
        judge(candidates[index])
    return [candidates[index].name for index in order]


def evolve(
    space: Space, fits: Callable[[Architecture], bool], judge: Judge, reward: str, judged: int, seed: int
) -> list[str]:
    """Evolutionary search: the best architectures so far are crossed and mutated.

    Args:
        space: of the architectures.
        fits: whether one is within the budget.
        judge: gives an architecture's rewards.
        reward: "self", "cross" or "product".
        judged: architectures to judge; all, where there are fewer.
        seed: of the draws.

    Returns:
        The names of those judged, in their order.

    Raises:
        ValueError: none is within the budget.
    """
    candidates = _within(space, fits)
    judged = min(judged, len(candidates))
    random = np.random.default_rng((seed, 1 + REWARDS.index(reward)))
    found: dict[Architecture, float] = {}
    for index in random.permutation(len(candidates))[: min(POPULATION, judged)]:
        found[candidates[index]] = judge(candidates[index]).of(reward)
    genes = space.genes()
    misses = 0
    while len(found) < judged:
        parents = sorted(found, key=found.__getitem__, reverse=True)[:PARENTS]
        mother, father = (sum(parents[i], ()) for i in random.integers(0, len(parents), 2))
        child = [a if random.random() < 0.5 else b for a, b in zip(mother, father, strict=True)]
        child = [int(random.choice(g)) if random.random() < MUTATION else v for v, g in zip(child, genes, strict=True)]
        made = architecture_of(child)
        if made in found or not fits(made):
            misses += 1
            if misses < 200:
                continue
            # The neighbourhood is used up: a stranger.
            left = [candidate for candidate in candidates if candidate not in found]
            made = left[int(random.integers(len(left)))]
        misses = 0
        found[made] = judge(made).of(reward)
    return [architecture.name for architecture in found]


def _within(space: Space, fits: Callable[[Architecture], bool]) -> list[Architecture]:
    found = [architecture for architecture in space if fits(architecture)]
    if not found:
        raise ValueError("budget: no architecture is that small; give a larger share")
    return found


class Search:
    """Trains a supernet through the gallery's classifier, searches it, and trains what was found anew.

    Everything is kept in the run folder as soon as it is there; a search that was stopped goes on from it.

    Args:
        config: settings.
        gallery: the large model.
        train: images to train on.
        images: those to judge by.
        validation: rows of ``images`` by which architectures are judged.
        test: rows of ``images`` by which the chosen ones are judged, once.
        out: the run folder.
        space: of the architectures.
        device: "cpu" or "cuda".
        workers: processes that decode images.
        say: takes lines about the progress.
        progress: show bars.

    Raises:
        ValueError: classes that do not match, no architecture within the budget.
    """

    def __init__(
        self,
        config: SearchConfig,
        gallery: OldModel,
        train: LabelledImages,
        images: LabelledImages,
        validation: Sides,
        test: Sides,
        out: Path,
        *,
        space: Space = SPACE,
        device: str = "cpu",
        workers: int = 0,
        say: Say = lambda line: None,
        progress: bool = False,
    ) -> None:
        self.config, self.gallery, self.train_images, self.images = config, gallery, train, images
        self.validation, self.test, self.out, self.space = validation, test, out, space
        self.device, self.workers, self.say, self.progress = device, workers, say, progress
        self.size, self.channels = images.size, images.channels
        self.holdout = float(gallery.config.get("holdout", 0.0))
        self._seen: Views | None = None
        self.gallery_operations = operations(gallery.backbone, self.channels, self.size)
        _within(space, self.fits)

    def cost(self, architecture: Architecture) -> int:
        """Multiplications of an architecture for one image."""
        return architecture.operations(self.size, self.gallery.n_features, self.channels)

    def fits(self, architecture: Architecture) -> bool:
        """Whether it is within the budget."""
        return self.cost(architecture) <= self.config.budget * self.gallery_operations

    def backbone(self, architecture: Architecture) -> str:
        """Its name as a backbone with the gallery's number of features."""
        return f"{PREFIX}{architecture.name}-{self.gallery.n_features}"

    def run(self) -> dict[str, Any]:
        """All of it; the results, as JSON takes them.

        Raises:
            OSError: a file cannot be written.
            ValueError: the folder holds another search; training diverged (`NotFiniteError`).
            KeyboardInterrupt: it was stopped; what is done is kept.
        """
        judge = self._judge(self._supernet())
        c = self.config
        searches = {"random": random_search(self.space, self.fits, judge, c.judged, c.seed)}
        for reward in REWARDS:
            self.say(f"evolutionary search, reward {reward}")
            searches[reward] = evolve(self.space, self.fits, judge, reward, c.judged, c.seed)
        judge.save()
        best = {r: max(searches[r], key=lambda name: judge.known[name].of(r)) for r in REWARDS}
        best["random"] = max(searches["random"], key=lambda name: judge.known[name].of(c.reward))
        large = self._large()
        chosen = {}
        for name, found in best.items():
            architecture = parse(found)
            chosen[name] = {
                "architecture": found,
                "operations": self.cost(architecture),
                "cost_ratio": self.gallery_operations / self.cost(architecture),
                "supernet": judge.known[found]._asdict(),
                "scores": self.test_one(architecture, "head"),
            }
        free = self.test_one(parse(best[c.reward]), "none")
        judged = {
            name: {**rewards._asdict(), "operations": self.cost(parse(name))} for name, rewards in judge.known.items()
        }
        return {
            "reward": c.reward,
            "budget": c.budget,
            "gallery": {
                "backbone": self.gallery.config["backbone"],
                "operations": self.gallery_operations,
                "scores": cross_scores(*large, self._labels(self.test))._asdict(),
            },
            "queries": len(self.test.query),
            "items": len(self.test.gallery),
            "searches": {name: len(names) for name, names in searches.items()},
            "chosen": chosen,
            "free": {"architecture": best[c.reward], "scores": free},
            "judged": judged,
        }

    def train_one(self, architecture: Architecture, method: str) -> OldModel:
        """A backbone of that architecture, trained anew; or the one that is there already.

        Args:
            architecture: of the backbone.
            method: "head" through the gallery's classifier, or "none".

        Raises:
            OSError: a file cannot be written.
            NotFiniteError: training diverged.
            KeyboardInterrupt: it was stopped.
        """
        c = self.config
        config = c.training(self.backbone(architecture), c.final_epochs, method, self.holdout)
        trainer = Updater(config, self.train_images, self.gallery, device=self.device, workers=self.workers)
        folder = self.out / "models" / f"{architecture.name}-{method}"
        self._train(trainer, folder)
        return OldModel(folder, self.images).to(self.device)

    def test_one(self, architecture: Architecture, method: str) -> dict[str, Any]:
        """M(q,q) and M(q,g) of `train_one` on the test rows.

        Args:
            architecture, method: see `train_one`.
        """
        small = self._views(self.train_one(architecture, method), self.test)
        labels = self._labels(self.test)
        own, cross = cross_scores(*small, labels), cross_scores(small.query, self._large().gallery, labels)
        return {"query_query": own._asdict(), "query_gallery": cross._asdict()}

    def _large(self) -> Views:
        """The gallery model's features of the test rows."""
        if self._seen is None:
            self._seen = self._views(self.gallery, self.test)
        return self._seen

    def _labels(self, halves: Sides) -> Labels:
        return Labels(self.images.labels[halves.query], self.images.labels[halves.gallery])

    def _views(self, model: OldModel, halves: Sides) -> Views:
        return views(model, self.images, halves, workers=self.workers)

    def _train(self, trainer: Updater, folder: Path) -> None:
        if (folder / CHECKPOINT).exists():
            trainer.restore(load_run(folder))
        if trainer.epoch < trainer.config.epochs:
            self.say(f"training {folder.name}")
            folder.mkdir(parents=True, exist_ok=True)
            if not trainer.run(folder, progress=self.progress):
                raise KeyboardInterrupt
            self.say(f"{folder.name}: {trainer.history[-1][2]:.1f} % in training")

    def _supernet(self) -> SuperNetTrainer:
        config = self.config.training(self.backbone(self.space.largest()), self.config.epochs, "head", self.holdout)
        trainer = SuperNetTrainer(
            config, self.space, self.train_images, self.gallery, device=self.device, workers=self.workers
        )
        self._train(trainer, self.out / "supernet")
        return trainer

    def _judge(self, trainer: SuperNetTrainer) -> _Judge:
        rows = np.random.default_rng((self.config.seed, 9)).permutation(trainer.rows)[:CALIBRATION]
        calibration = [pixels.to(self.device) for pixels, _ in batches(self.train_images, rows.tolist(), CALIBRATION)]
        query, items = (
            torch.cat([pixels for pixels, _ in batches(self.images, side, 256, workers=self.workers)])
            for side in self.validation
        )
        supernet = trainer.backbone.eval()
        assert isinstance(supernet, SuperNet)
        return _Judge(
            supernet,
            calibration,
            Views(query, items),
            self._views(self.gallery, self.validation).gallery,
            self._labels(self.validation),
            self.out / JUDGED,
            self.say,
        )


class _Judge:
    """Rewards of architectures with a supernet's weights, each judged once; what is known outlives the process."""

    def __init__(
        self,
        supernet: SuperNet,
        calibration: Iterable[Tensor],
        pixels: Views,
        large_gallery: Tensor,
        labels: Labels,
        file: Path,
        say: Say,
    ) -> None:
        self.supernet, self.calibration, self.pixels = supernet, list(calibration), pixels
        self.large_gallery, self.labels, self.file, self.say = large_gallery, labels, file, say
        self.known: dict[str, Rewards] = {}
        if file.exists():
            try:
                self.known = {str(name): Rewards(*map(float, row)) for name, row in read_json(file).items()}
            except (TypeError, ValueError) as error:
                raise ValueError(f"{file}: not the judged architectures of a search ({error})") from None

    def __call__(self, architecture: Architecture) -> Rewards:
        name = architecture.name
        if name not in self.known:
            backbone = self.supernet.extract(architecture, self.calibration)
            query, items = (self._features(backbone, side) for side in self.pixels)
            self.known[name] = Rewards(self._top1(query, items), self._top1(query, self.large_gallery))
            if len(self.known) % 50 == 0:
                self.save()
                self.say(f"{len(self.known)} architectures judged")
        return self.known[name]

    def save(self) -> None:
        write_json(self.file, {name: list(rewards) for name, rewards in self.known.items()})

    @torch.no_grad()
    def _features(self, backbone: SmallBackbone, pixels: Tensor) -> Tensor:
        device = backbone.embedding.weight.device
        return torch.cat([backbone(part.to(device)).cpu() for part in pixels.split(256)])

    def _top1(self, query: Tensor, gallery: Tensor) -> float:
        found = nearest(query, gallery, backend="torch")
        return 100 * float((self.labels.gallery[found] == self.labels.query).double().mean())


def parse(name: str) -> Architecture:
    """The architecture of that name."""
    return architecture_of(int(number) for number in name.replace("-", ".").split("."))
