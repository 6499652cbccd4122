"""Unlabelled rows whose classes' proportions are known: from a count, or for each of several bags.

Two experiments on glyphs of classes that no training saw, in the features of a small network trained on others.

1. *Counted proportions.* A task has one labelled row a class and query rows in unequal shares. Somebody counted the
   classes of n other rows of the same source. Soft k-means takes these shares for its marginals: relaxed and smoothed,
   or as they were counted, to be met.
2. *Bags without labels* (learning from label proportions). No row is labelled; the query rows come in bags whose
   proportions are known exactly. The start is the mean map (Quadrianto et al. 2009); soft assignments that meet the
   proportions of every bag refine it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from kernelmeta import ops
from kernelmeta.data.files import write_json, write_text
from kernelmeta.data.glyphs import load_glyphs
from kernelmeta.nn import CosineClassifier, Phase, Program, Prototypes, SoftKMeans

_VALIDATION, _TEST = 1, 2  # class splits; the tasks are of the test classes


@dataclass(frozen=True)
class ProportionsSettings:
    """What is trained, and on what it is judged."""

    hidden: int = 512  # of the backbone
    features: int = 64
    backbone_steps: int = 1500
    batch: int = 256
    lr: float = 1e-3
    ways: int = 5
    query: int = 75
    concentration: float = 2.0  # of the Dirichlet distribution of the query rows' shares
    counted: tuple[int, ...] = (10, 20, 50, 200)
    relax: float = 0.8
    smoothing: float = 2.0
    steps: int = 10
    scale: float = 10.0
    bags: int = 8
    rows_a_bag: int = 12
    of_bags: float = 1.0  # concentration of the shares of a bag
    tasks: int = 1000  # a seed
    seeds: int = 5


QUICK = ProportionsSettings(hidden=64, features=16, backbone_steps=40, tasks=40, seeds=2)


def train_backbone(settings: ProportionsSettings, seed: int) -> Tensor:
    """Train a network on the classes that are not the tasks', and return the features of each class of the tasks'.

    Args:
        settings: of the training.
        seed: of weights and draws.

    Returns:
        [C, rows, D].
    """
    glyphs = load_glyphs()
    images = glyphs.images.flatten(1).float() / 255
    images = images - images.mean(1, keepdim=True)
    split = glyphs.class_split[glyphs.labels]
    rest = (split != _TEST) & (split != _VALIDATION)
    classes, labels = glyphs.labels[rest].unique(return_inverse=True)
    own = images[rest]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = nn.Sequential(
            nn.Linear(images.shape[1], settings.hidden), nn.ReLU(), nn.Linear(settings.hidden, settings.features)
        )
        head = CosineClassifier(settings.features, len(classes))
    generator = torch.Generator().manual_seed(seed)
    parameters = [*backbone.parameters(), *head.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=settings.lr)
    for _ in range(settings.backbone_steps):
        chosen = torch.randint(len(own), (settings.batch,), generator=generator)
        loss = cross_entropy(head(backbone(own[chosen])), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        features = backbone(images)
    return torch.stack([features[glyphs.labels == c] for c in (glyphs.class_split == _TEST).nonzero()[:, 0]])


def dirichlet(shape: tuple[int, ...], ways: int, concentration: float, generator: torch.Generator) -> Tensor:
    """Shares [*shape, ways], of a symmetric Dirichlet distribution; by ``torch._sample_dirichlet``."""
    return torch._sample_dirichlet(torch.full((*shape, ways), concentration), generator=generator)


def draw_tasks(
    classes: Tensor, answers: Tensor, ways: int, shots: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of classes drawn for every task; no query row is a support row.

    Args:
        classes: [C, rows, D].
        answers: [T, Q], the classes that the query rows shall have, 0..N-1.
        ways: N.
        shots: labelled rows a class.
        generator: of the draws.

    Returns:
        Support [T, N shots, D], its labels, and query [T, Q, D].
    """
    T, Q = answers.shape
    chosen = torch.rand(T, len(classes), generator=generator).argsort(-1)[:, :ways]
    order = torch.rand(T, ways, classes.shape[1], generator=generator).argsort(-1)
    labels = torch.arange(ways).repeat_interleave(shots).expand(T, -1)
    support = classes[chosen.gather(1, labels), order[..., :shots].flatten(1)]
    others = torch.randint(shots, classes.shape[1], (T, Q), generator=generator)
    task = torch.arange(T).unsqueeze(-1)
    return support, labels, classes[chosen.gather(1, answers), order[task, answers, others]]


def counted_tasks(
    classes: Tensor, settings: ProportionsSettings, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Support [T, N, D], labels, query [T, Q, D], answers [T, Q] and the source's shares [T, N]."""
    generator = torch.Generator().manual_seed(10_000 + seed)
    shares = dirichlet((settings.tasks,), settings.ways, settings.concentration, generator)
    answers = shares.multinomial(settings.query, replacement=True, generator=generator)
    return *draw_tasks(classes, answers, settings.ways, 1, generator), answers, shares


def refined(settings: ProportionsSettings, relax: float | None, start: str = "class_means") -> Program:
    """Soft k-means whose assignments meet given proportions, or none where ``relax`` is None."""
    marginals = {} if relax is None else {"marginals": "given", "relax": relax}
    phase = Phase("soft_assignment", settings.steps, 1.0, **marginals)  # type: ignore[arg-type]
    return Program(settings.ways, settings.features, [phase], start=start, scale=settings.scale)


def right(logits: Tensor, answers: Tensor) -> Tensor:
    """Accuracy of every task in percent, [T]."""
    return 100 * (logits.argmax(-1) == answers).double().mean(-1)


@torch.no_grad()
def counted(classes: Tensor, settings: ProportionsSettings, seed: int) -> dict[str, dict[str, Tensor]]:
    """Accuracy of each task, by the number of rows that were counted ("exact": the query rows' own), and method."""
    support, labels, query, answers, shares = counted_tasks(classes, settings, seed)
    N = settings.ways
    generator = torch.Generator().manual_seed(20_000 + seed)
    means = SoftKMeans(N, settings.features, settings.steps, settings.scale)
    without = right(means(support, labels, query), answers)
    found = {}
    exact = torch.nn.functional.one_hot(answers, N).double().mean(1).float()
    for n in (*settings.counted, None):
        hard = smooth = exact
        if n is not None:
            drawn = shares.multinomial(n, replacement=True, generator=generator)
            numbers = torch.nn.functional.one_hot(drawn, N).sum(1)
            hard = ops.smoothed_proportions(numbers, by=0.0)
            smooth = ops.smoothed_proportions(numbers, by=settings.smoothing)
        of_hard = refined(settings, 1.0)(support, labels, query, proportions=hard)
        of_relaxed = refined(settings, settings.relax)(support, labels, query, proportions=smooth)
        found["exact" if n is None else str(n)] = {
            "soft k-means": without, "hard": right(of_hard, answers), "relaxed": right(of_relaxed, answers),
        }  # fmt: skip
    return found


@torch.no_grad()
def bags(classes: Tensor, settings: ProportionsSettings, seed: int) -> dict[str, Tensor]:
    """Accuracy of each task on the rows of its bags, by method."""
    generator = torch.Generator().manual_seed(30_000 + seed)
    T, N, B, n = settings.tasks, settings.ways, settings.bags, settings.rows_a_bag
    shares = dirichlet((T, B), N, settings.of_bags, generator)
    answers = shares.flatten(0, 1).multinomial(n, replacement=True, generator=generator).view(T, B * n)
    exact = torch.nn.functional.one_hot(answers.view(T, B, n), N).double().mean(2).float()
    offsets = torch.arange(B + 1) * n
    support, labels, query = draw_tasks(classes, answers, N, 5, generator)
    known: dict[str, Any] = {"proportions": exact, "bag_offsets": offsets}
    return {
        "5 labelled rows a class, prototypes": right(Prototypes(N, settings.features)(support, labels, query), answers),
        "mean map": right(Program(N, settings.features, [], start="mean_map")(None, None, query, **known), answers),
        "mean map, soft k-means": right(refined(settings, None, "mean_map")(None, None, query, **known), answers),
        "mean map, assignments of bags": right(refined(settings, 1.0, "mean_map")(None, None, query, **known), answers),
    }  # fmt: skip


def interval(values: Tensor) -> tuple[float, float]:
    """Mean, and half of its 95 % interval, over tasks."""
    return float(values.mean()), 1.96 * float(values.std()) / math.sqrt(len(values))


def run(out: Path, *, quick: bool, say: Callable[[str], None]) -> str:
    """What ``kernelmeta demo proportions`` does: numbers, their configuration, a table and a plot, into ``out``.

    Args:
        out: a folder.
        quick: fewer seeds, steps and tasks.
        say: takes lines about the progress.

    Returns:
        The table, as Markdown.

    Raises:
        OSError: files cannot be written.
    """
    from kernelmeta.demos.plots import proportions_plot

    settings = QUICK if quick else ProportionsSettings()
    of_counts, of_bags = [], []
    for seed in range(settings.seeds):
        classes = train_backbone(settings, seed)
        of_counts.append(counted(classes, settings, seed))
        of_bags.append(bags(classes, settings, seed))
        say(f"seed {seed}: " + ", ".join(f"{name} {float(v.mean()):.1f}" for name, v in of_bags[-1].items()))
    rows = []
    for n in of_counts[0]:
        together = {name: torch.cat([c[n][name] for c in of_counts]) for name in of_counts[0][n]}
        row: dict[str, Any] = {"rows": n, "soft k-means": float(together["soft k-means"].mean())}
        for name in ("hard", "relaxed"):
            gain, half = interval(together[name] - together["soft k-means"])
            row[name] = {"accuracy": float(together[name].mean()), "gain": gain, "ci95": half}
        rows.append(row)
    without: dict[str, Any] = {}
    for name in of_bags[0]:
        accuracy, half = interval(torch.cat([b[name] for b in of_bags]))
        without[name] = {"accuracy": accuracy, "ci95": half}
    found = {
        "command": "demo proportions", "quick": quick, "settings": asdict(settings), "counted": rows, "bags": without,
    }  # fmt: skip
    write_json(out / "proportions.json", found)
    proportions_plot(out / "proportions.png", found)
    text = table(found)
    write_text(out / "proportions.md", text)
    return text


def table(found: dict[str, Any]) -> str:
    """What was found, as Markdown.

    Args:
        found: what `run` writes as JSON.
    """
    settings = found["settings"]
    lines = [
        f"**Counted proportions**: points over soft k-means, {settings['ways']} ways, one labelled row a class,"
        f" {settings['query']} query rows in Dirichlet({settings['concentration']:g}) shares;"
        f" {settings['seeds']} backbones, {settings['tasks']} tasks each. Relaxed: `relax={settings['relax']:g}` and"
        f" (counts + {settings['smoothing']:g}) / (n + {settings['smoothing'] * settings['ways']:g}); hard: counts / n,"
        " which must be met.",
        "",
        "| rows counted | soft k-means, % | relaxed | hard |",
        "| --- | ---: | ---: | ---: |",
    ]
    for row in found["counted"]:
        gains = [f"{row[name]['gain']:+.2f} ± {row[name]['ci95']:.2f}" for name in ("relaxed", "hard")]
        lines.append(f"| {row['rows']} | {row['soft k-means']:.1f} | {' | '.join(gains)} |")
    lines += [
        "",
        f"**Bags without labels**: accuracy in percent on the rows of {settings['bags']} bags of"
        f" {settings['rows_a_bag']} rows, whose proportions are known.",
        "",
        "| method | accuracy |",
        "| --- | ---: |",
    ]
    for name, value in found["bags"].items():
        lines.append(f"| {name} | {value['accuracy']:.1f} ± {value['ci95']:.1f} |")
    lines += ["", "± is the 95 % interval over the tasks."]
    return "\n".join(lines) + "\n"
