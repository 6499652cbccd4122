"""Networks and their linearisations, over the width: how far training goes from the kernel at the initialisation.

A network of one hidden layer in the kernel's parametrisation, ``relu(x W1 / sqrt(d)) W2 / sqrt(h)``, trained by
gradient descent on the squared error, and the same linearised at its start, whose outputs after any number of steps
are known in closed form (Lee et al., "Wide neural networks of any depth evolve as linear models under gradient
descent", NeurIPS 2019, equations 8 to 11). The gap between the two and the drift of the kernel fall as a power of the
width.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernelmeta.data.glyphs import load_glyphs
from kernelmeta.linear.results import Say, markdown_table, silent, write_results


@dataclass(frozen=True)
class WidthSettings:
    """What is drawn and trained."""

    widths: tuple[int, ...] = (32, 64, 128, 256, 512)
    fit_to: int = 256  # slopes are fitted up to this width
    seeds: int = 5
    train: int = 64
    test: int = 64
    steps: int = 500
    rate: float = 1.0  # over the largest eigenvalue of the kernel


QUICK = WidthSettings(widths=(32, 64, 128, 256), seeds=5, train=32, test=32, steps=200)


def two_classes(train: int, test: int) -> tuple[Tensor, Tensor, Tensor]:
    """Glyphs of two halves of the classes, told apart by +1 and -1.

    Args:
        train: training rows.
        test: test rows.

    Returns:
        [train, d], [test, d] of unit length times sqrt(d), and the targets [train].
    """
    glyphs = load_glyphs()
    rows = torch.randperm(len(glyphs.labels), generator=torch.Generator().manual_seed(0))[: train + test]
    x = glyphs.images[rows].flatten(1).double()
    x = x - x.mean(0)
    x = x * (math.sqrt(x.shape[1]) / x.norm(dim=1, keepdim=True))
    signs = torch.where(glyphs.labels[rows] % 2 == 0, 1.0, -1.0).double()
    return x[:train], x[train:], signs[:train]


def kernel(x1: Tensor, x2: Tensor, W1: Tensor, W2: Tensor) -> Tensor:
    """The tangent kernel of the network, [B, n1, n2]: ``a a' / h`` of the hidden units, and ``x x' / d`` times the
    products of derivatives.

    Args:
        x1, x2: [n, d].
        W1: [B, d, h].
        W2: [B, h].
    """
    d, h = W1.shape[1:]
    first, second = (x @ W1 / math.sqrt(d) for x in (x1, x2))
    of_second_layer = first.relu() @ second.relu().mT / h
    active, of_active = (((z > 0) * W2.unsqueeze(1)) for z in (first, second))
    return of_second_layer + (x1 @ x2.mT / d) * (active @ of_active.mT / h)


def trained(x: Tensor, y: Tensor, W1: Tensor, W2: Tensor, lr: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """The weights after full gradient descent on ``|f(x) - y|^2 / 2``.

    Args:
        x: [n, d].
        y: [n].
        W1, W2: [B, d, h], [B, h].
        lr: [B].
        steps: of gradient descent.
    """
    d, h = W1.shape[1:]
    xd, rate = x / math.sqrt(d), (lr / math.sqrt(h)).reshape(-1, 1, 1)
    W2 = W2.unsqueeze(-1)
    for _ in range(steps):
        z = xd @ W1
        a = z.relu()
        gap = a @ W2 / math.sqrt(h) - y.unsqueeze(-1)
        W1, W2 = W1 - rate * (xd.mT @ ((z > 0) * (gap @ W2.mT))), W2 - rate * (a.mT @ gap)
    return W1, W2.squeeze(-1)


def linearised(K: Tensor, Kt: Tensor, start: Tensor, of_test: Tensor, y: Tensor, lr: Tensor, steps: int) -> Tensor:
    """What the linearised network says of the test rows after so many steps, [B, m].

    ``f_t(x') = f_0(x') + K(x', X) K^-1 (1 - (1 - lr K)^t) (y - f_0(X))``

    Args:
        K, Kt: [B, n, n] and [B, m, n].
        start, of_test: [B, n] and [B, m], outputs at the start.
        y: [n].
        lr: [B].
        steps: t.
    """
    values, vectors = torch.linalg.eigh(K)
    moved = -torch.expm1(steps * torch.log1p(-(lr.unsqueeze(-1) * values).clamp_max(1 - 1e-15)))
    along = (vectors.mT @ (y - start).unsqueeze(-1)).squeeze(-1) * moved / values
    return of_test + (Kt @ (vectors @ along.unsqueeze(-1))).squeeze(-1)


def slope(widths: list[int], values: list[float]) -> float:
    """Of a straight line through the logarithms, by least squares.

    Args:
        widths, values: of the points.
    """
    x, y = ([math.log(v) for v in each] for each in (widths, values))
    mx, my = statistics.fmean(x), statistics.fmean(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum((a - mx) ** 2 for a in x)


def experiment(settings: WidthSettings, say: Say = silent) -> dict[str, Any]:
    """The gap of the outputs and the drift of the kernel, of every width and seed, and their slopes.

    Args:
        settings: what is drawn and trained.
        say: takes a line about the progress.

    Returns:
        "rows", one a width with "output_gap" and "kernel_drift" of every seed; "slopes" of each, of every seed.
    """
    x, test, y = two_classes(settings.train, settings.test)
    d = x.shape[1]
    rows = []
    for h in settings.widths:
        draws = [torch.Generator().manual_seed(1000 * h + seed) for seed in range(settings.seeds)]
        W1 = torch.stack([torch.randn(d, h, generator=g, dtype=torch.float64) for g in draws])
        W2 = torch.stack([torch.randn(h, generator=g, dtype=torch.float64) for g in draws])

        def outputs(at: Tensor, first: Tensor, second: Tensor) -> Tensor:
            hidden = (at @ first / math.sqrt(d)).relu()
            return (hidden @ second.unsqueeze(-1)).squeeze(-1) / math.sqrt(second.shape[-1])

        K = kernel(x, x, W1, W2)
        lr = settings.rate / torch.linalg.eigvalsh(K)[:, -1]
        start, of_test = outputs(x, W1, W2), outputs(test, W1, W2)
        want = linearised(K, kernel(test, x, W1, W2), start, of_test, y, lr, settings.steps)
        V1, V2 = trained(x, y, W1, W2, lr, settings.steps)
        got = outputs(test, V1, V2)
        gap = (got - want).norm(dim=1) / (want - of_test).norm(dim=1)
        drift = (kernel(x, x, V1, V2) - K).norm(dim=(1, 2)) / K.norm(dim=(1, 2))
        rows.append({"width": h, "output_gap": gap.tolist(), "kernel_drift": drift.tolist()})
        say(f"ntk: width {h}")
    fitted = [row for row in rows if row["width"] <= settings.fit_to]
    widths = [row["width"] for row in fitted]
    slopes = {
        name: [slope(widths, [row[name][seed] for row in fitted]) for seed in range(settings.seeds)]
        for name in ("output_gap", "kernel_drift")
    }
    return {"settings": asdict(settings), "rows": rows, "slopes": slopes}


def run(out: Path, *, quick: bool, say: Say) -> str:
    """What ``kernelmeta demo ntk`` does; see `write_results`.

    Args:
        out: a folder.
        quick: fewer rows and steps.
        say: takes lines about the progress.

    Returns:
        The table, as Markdown.

    Raises:
        OSError: files cannot be written.
    """
    from kernelmeta.linear.plots import width_plot

    found = experiment(QUICK if quick else WidthSettings(), say)
    return write_results(out, "ntk", found, quick=quick, table=table, plot=width_plot)


def table(found: dict[str, Any]) -> list[str]:
    """What was found, as lines of Markdown.

    Args:
        found: what `experiment` returns.
    """
    settings = found["settings"]
    measures = ("output_gap", "kernel_drift")
    rows = [[row["width"], *(f"{statistics.fmean(row[name]):.4f}" for name in measures)] for row in found["rows"]]
    slopes = []
    for name in measures:
        of_seeds = found["slopes"][name]
        slopes.append(f"{statistics.fmean(of_seeds):.2f} ({', '.join(f'{v:.2f}' for v in of_seeds)})")
    rows.append([f"slope, to {settings['fit_to']}", *slopes])
    return [
        f"**Networks and their linearisations** after {settings['steps']} steps on {settings['train']} glyphs; means"
        f" over {settings['seeds']} seeds.",
        "",
        *markdown_table(("width", "gap of the outputs", "drift of the kernel"), rows, words=0),
    ]
