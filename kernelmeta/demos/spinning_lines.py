"""Spinning lines: zero-shot regression, where what a task's answer is can be read off its unlabelled rows alone.

After Hu et al., "Empirical Bayes transductive meta-learning with synthetic gradients" (ICLR 2020, section 5.1). A task
is a line through 0: its rows are x ~ N(0, 1), its slope w = mean(x) + N(0, noise^2), its labels y = w x. Seeing the
rows without labels, the best guess of w is N(mean(x), noise^2), the posterior. Synthetic-gradient steps start at a
learned number theta0 that all tasks share:

    theta <- theta - rate sum_i x_i xi(theta x_i)

with xi a perceptron of three layers. They are the steps of a program (`kernelmeta.ops.program`) with one way, dot
products for a classifier and no labelled row; of its results only the classifier theta_K is used. q(w) = N(theta_K,
noise^2) is held against the posterior. It is trained by ``sum_i (y_i - theta_K x_i)^2 / 2``, with or without the
divergence KL(q | prior) to a learned prior N(mu, v). With it the best q is not the posterior: see `optimum`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernelmeta import ops
from kernelmeta.data.files import write_json, write_text
from kernelmeta.mlp_parameters import MLPParameters
from kernelmeta.phases import Phase
from kernelmeta.reference.synthetic_gradient_mlp import NORM_EPS


@dataclass(frozen=True)
class SpinningSettings:
    """What is drawn and trained; all seeds are trained side by side."""

    rows: int = 32  # n of a task
    noise: float = 0.1
    training_tasks: int = 240
    test_tasks: int = 240
    steps: int = 3  # K
    rate: float = 1e-3
    hidden: int = 8
    seeds: int = 5
    training_steps: int = 2000  # of Adam, each on some of the training tasks
    tasks_per_step: int = 16
    lr: float = 2e-2


QUICK = SpinningSettings(seeds=2, training_steps=100, lr=5e-2)


class Lines(NamedTuple):
    """Tasks of several seeds."""

    x: Tensor  # [seeds, T, n]
    w: Tensor  # [seeds, T]


class Perceptron(NamedTuple):
    """xi: Linear(1, H) - ReLU - Linear(H, H) - ReLU - Linear(H, 1), one for each seed."""

    weight1: Tensor  # [seeds, H, 1]
    bias1: Tensor  # [seeds, H]
    weight2: Tensor  # [seeds, H, H]
    bias2: Tensor  # [seeds, H]
    weight3: Tensor  # [seeds, 1, H]
    bias3: Tensor  # [seeds, 1]

    def of_seed(self, seed: int) -> MLPParameters:
        """One seed's, as ops take them: with a BatchNorm that changes nothing, see `unnormalised`."""
        w1, b1, w2, b2, w3, b3 = (p[seed] for p in self)
        gain, shift = torch.ones_like(b1), torch.zeros_like(b1)
        return MLPParameters(w1, b1, gain, shift, w2, b2, gain, shift, w3, b3)


def unnormalised(hidden: int) -> Tensor:
    """Statistics [2, 2, H] by which BatchNorm changes nothing: means 0, and variances that its epsilon makes 1."""
    stats = torch.zeros(2, 2, hidden, dtype=torch.float64)
    stats[:, 1] = 1 - NORM_EPS
    return stats


def draw(settings: SpinningSettings, tasks: int, part: int) -> Lines:
    """Tasks of every seed.

    Args:
        settings: rows, noise and seeds.
        tasks: T.
        part: 0 for training, 1 for the test.
    """
    xs, ws = [], []
    for seed in range(settings.seeds):
        generator = torch.Generator().manual_seed(2 * seed + part)
        x = torch.randn(tasks, settings.rows, generator=generator, dtype=torch.float64)
        xs.append(x)
        ws.append(x.mean(-1) + settings.noise * torch.randn(tasks, generator=generator, dtype=torch.float64))
    return Lines(torch.stack(xs), torch.stack(ws))


def refined(theta0: Tensor, x: Tensor, xi: Perceptron, steps: int, rate: float) -> Tensor:
    """theta_K [seeds, T] after so many synthetic-gradient steps.

    Args:
        theta0: [seeds].
        x: [seeds, T, n].
        xi: what says the gradient with respect to a prediction.
        steps: K.
        rate: of a step.
    """
    T = x.shape[1]
    none = x.new_empty(T, 0, 1), torch.empty(T, 0, dtype=torch.int64)  # no labelled row
    found = []
    for seed, rows in enumerate(x):
        _, slopes = ops.program(
            *none, rows.unsqueeze(-1), [Phase("synthetic_gradient", steps, rate)], n_way=1, classifier="dot",
            start=theta0[seed].expand(T, 1, 1), mlp=xi.of_seed(seed), running_stats=unnormalised(xi.bias1.shape[1]),
            reduction="sum", return_weights=True,
        )  # fmt: skip
        found.append(slopes.weight[:, 0, 0])
    return torch.stack(found)


def train(settings: SpinningSettings, with_prior: bool, steps: int) -> dict[str, list[float]]:
    """One training run a seed, and what it is worth on the test tasks.

    Args:
        settings: of the tasks and of the training.
        with_prior: whether KL(q | prior) is part of the loss.
        steps: K.

    Returns:
        Lists over the seeds: "kl" (of q from the posterior), "mse" (of theta_K, against w), "slope" (of theta_K over
        mean(x), by least squares), "prior_variance", "theta0".
    """
    B, H = settings.seeds, settings.hidden
    shapes: list[tuple[int, ...]] = [(H, 1), (H,), (H, H), (H,), (1, H), (1,)]
    drawn: list[list[Tensor]] = [[] for _ in shapes]
    for seed in range(B):
        generator = torch.Generator().manual_seed(seed)
        for shape, own in zip(shapes, drawn, strict=True):
            scale = 1 / math.sqrt(shape[-1]) if len(shape) == 2 else 0.0
            own.append(scale * torch.randn(*shape, generator=generator, dtype=torch.float64))
    xi = Perceptron(*(torch.stack(own).requires_grad_() for own in drawn))
    theta0 = torch.zeros(B, dtype=torch.float64, requires_grad=True)
    mean, log_variance = (torch.zeros(B, dtype=torch.float64, requires_grad=True) for _ in range(2))
    data, variance = draw(settings, settings.training_tasks, 0), settings.noise**2
    order = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam([*xi, theta0, mean, log_variance], lr=settings.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.lr, total_steps=settings.training_steps)
    for _ in range(settings.training_steps):
        chosen = torch.randperm(settings.training_tasks, generator=order)[: settings.tasks_per_step]
        x, w = data.x[:, chosen], data.w[:, chosen]
        theta = refined(theta0, x, xi, steps, settings.rate)
        loss = x.square().sum(-1) * (w - theta).square() / 2  # sum_i (w x_i - theta x_i)^2 / 2
        if with_prior:
            loss = loss + divergence(theta, variance, mean.unsqueeze(-1), log_variance.exp().unsqueeze(-1))
        optimizer.zero_grad()
        loss.mean(-1).sum().backward()
        torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 10.0)
        optimizer.step()
        schedule.step()
    test = draw(settings, settings.test_tasks, 1)
    with torch.no_grad():
        theta, center = refined(theta0, test.x, xi, steps, settings.rate), test.x.mean(-1)
        centred = center - center.mean(-1, keepdim=True)
        found = {
            "kl": divergence(theta, variance, center, variance).mean(-1),
            "mse": (theta - test.w).square().mean(-1),
            "slope": (centred * theta).sum(-1) / centred.square().sum(-1),
            "prior_variance": log_variance.exp(),
            "theta0": theta0,
        }
    return {name: values.tolist() for name, values in found.items()}


def divergence(mean: Tensor, variance: float, other: Tensor, other_variance: Tensor | float) -> Tensor:
    """KL(N(mean, variance) | N(other, other_variance))."""
    ratio = torch.as_tensor(variance / other_variance, dtype=torch.float64)
    return ((mean - other).square() / other_variance + ratio - 1 - ratio.log()) / 2


class Optimum(NamedTuple):
    """The best that is linear in mean(x), theta_K = s mean(x), where KL(q | prior) is part of the loss."""

    slope_squared: float  # s^2
    prior_variance: float  # v
    kl: float  # of q from the posterior


def optimum(rows: int, noise: float) -> Optimum:
    """In closed form but for a fixed point: with q = N(s m, noise^2), m = mean(x) ~ N(0, 1 / n), the loss is

        n E(w - s m)^2 / 2 + KL(q | N(0, v)),   hence   v = noise^2 + s^2 / n,   s = n / (n + 1 / v).

    Args:
        rows: n.
        noise: of the slopes.
    """
    v = noise**2 + 1 / rows
    for _ in range(100_000):
        s = rows / (rows + 1 / v)
        v = noise**2 + s * s / rows
    return Optimum(s * s, v, (1 - s) ** 2 / rows / (2 * noise**2))


def run(out: Path, *, quick: bool, say: Callable[[str], None]) -> str:
    """What ``kernelmeta demo spinning-lines`` does: numbers, their configuration, a table and a plot, into ``out``.

    Args:
        out: a folder.
        quick: fewer seeds and training steps.
        say: takes lines about the progress.

    Returns:
        The table, as Markdown.

    Raises:
        OSError: files cannot be written.
    """
    from kernelmeta.demos.plots import spinning_plot

    settings = QUICK if quick else SpinningSettings()
    runs: dict[str, Any] = {}
    for name, with_prior, steps in (
        ("no steps", False, 0),
        ("without KL", False, settings.steps),
        ("with KL", True, settings.steps),
    ):
        runs[name] = {"steps": steps, **train(settings, with_prior, steps)}
        say(f"{name}: KL(q | posterior) {mean_of(runs[name]['kl']):.3f}")
    best = optimum(settings.rows, settings.noise)
    found: dict[str, Any] = {
        "command": "demo spinning-lines", "quick": quick, "settings": asdict(settings), "runs": runs,
        "optimum": best._asdict(), "reproduced": reproduced(runs),
    }  # fmt: skip
    write_json(out / "spinning_lines.json", found)
    spinning_plot(out / "spinning_lines.png", found)
    text = table(found)
    write_text(out / "spinning_lines.md", text)
    return text


def mean_of(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def reproduced(runs: dict[str, Any]) -> dict[str, bool]:
    """Which of the expected figures hold, for the means over the seeds."""
    means = {name: {key: mean_of(own[key]) for key in ("kl", "mse", "prior_variance")} for name, own in runs.items()}
    return {
        "without KL: KL(q | posterior) at most 0.15": means["without KL"]["kl"] <= 0.15,
        "without KL: squared error of w at most 0.013": means["without KL"]["mse"] <= 0.013,
        "with KL: KL(q | posterior) in [0.45, 0.95]": 0.45 <= means["with KL"]["kl"] <= 0.95,
        "with KL: the prior's variance in [0.011, 0.03]": 0.011 <= means["with KL"]["prior_variance"] <= 0.03,
        "no steps: KL(q | posterior) at least 1.4": means["no steps"]["kl"] >= 1.4,
    }


def table(found: dict[str, Any]) -> str:
    """What was found, as Markdown.

    Args:
        found: what `run` writes as JSON.
    """
    settings, best = found["settings"], found["optimum"]
    lines = [
        f"**Spinning lines**: {settings['training_tasks']} training tasks and {settings['test_tasks']} test tasks of"
        f" {settings['rows']} unlabelled rows, K = {settings['steps']} steps of {settings['rate']:g}; means over"
        f" {settings['seeds']} seeds, and the least and the largest.",
        "",
        "| training | KL(q \\| posterior) | squared error of w | theta_K over mean(x), squared | prior's variance |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, own in found["runs"].items():
        squared = [s * s for s in own["slope"]]
        prior = _spread(own["prior_variance"]) if name == "with KL" else ""
        lines.append(f"| {name} | {_spread(own['kl'])} | {_spread(own['mse'])} | {_spread(squared)} | {prior} |")
    lines += [
        f"| with KL, the best linear theta_K | {best['kl']:.3f} | | {best['slope_squared']:.3f} |"
        f" {best['prior_variance']:.4f} |",
        "",
        "Expected, and found:",
        "",
    ]
    lines += [f"* {what}: {'yes' if holds else 'no'}" for what, holds in found["reproduced"].items()]
    return "\n".join(lines) + "\n"


def _spread(values: Sequence[float]) -> str:
    return f"{mean_of(values):.4f} ({min(values):.4f} to {max(values):.4f})"
