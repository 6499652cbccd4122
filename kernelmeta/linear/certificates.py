"""Certificates on many random draws: how often there is one, how near it is to what happens, whether it ever fails."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernelmeta.linear.convergence import adaptive_step, certificate, local_rate
from kernelmeta.linear.ntk import ntk_gram
from kernelmeta.linear.results import Say, markdown_table, silent, write_results


class Task(NamedTuple):
    """Two-layer linear networks and their data, [T, ...] float64 each."""

    X: Tensor  # [T, n, d]
    Y: Tensor  # [T, n, m]
    W1: Tensor  # [T, d, h]
    W2: Tensor  # [T, h, m]

    def minimum(self) -> Tensor:
        """[T] the least loss of any network."""
        return (self.Y - self.X @ (torch.linalg.pinv(self.X) @ self.Y)).square().sum((-2, -1)) / 2

    def loss(self, minimum: Tensor) -> Tensor:
        """[T] above the least. Args: minimum: [T]."""
        return (self.X @ self.W1 @ self.W2 - self.Y).square().sum((-2, -1)) / 2 - minimum

    def stepped(self, lr: Tensor) -> Task:
        """After one step of gradient descent. Args: lr: [T]."""
        R, rate = self.X @ self.W1 @ self.W2 - self.Y, lr.reshape(-1, 1, 1)
        back = self.X.mT @ R
        return self._replace(W1=self.W1 - rate * (back @ self.W2.mT), W2=self.W2 - rate * (self.W1.mT @ back))


@dataclass(frozen=True)
class CertificateSettings:
    """What is drawn."""

    draws: int = 1000  # of the first shape and scale
    seeds_unheld: int = 10  # so many times as many, whose certificates are made and not held against descent
    other_draws: int = 100
    shapes: tuple[tuple[int, int, int, int], ...] = ((20, 5, 3, 16), (20, 5, 3, 8), (20, 5, 3, 6), (6, 10, 2, 12))
    """n, d, m, h."""
    scales: tuple[float, ...] = (1.0, 0.3, 3.0)
    steps: int = 300
    adaptive_draws: int = 100
    adaptive_steps: int = 5000
    relu_widths: tuple[int, ...] = (64, 256, 1024)
    shown: int = 6
    seed: int = 0


QUICK = CertificateSettings(
    draws=50, seeds_unheld=2, other_draws=10, steps=60, adaptive_draws=2, adaptive_steps=3000, relu_widths=(64,)
)


def draw(T: int, shape: tuple[int, int, int, int], scale: float, seed: int) -> Task:
    """Gaussian inputs of unit length on average, targets of a linear map and a little noise, Gaussian weights.

    Args:
        T: networks.
        shape: n, d, m, h.
        scale: standard deviation of the weights.
        seed: of the draw.
    """
    n, d, m, h = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(T, *size, generator=generator, dtype=torch.float64)

    X = normal(n, d) / math.sqrt(d)
    return Task(X, X @ normal(d, m) + 0.1 * normal(n, m), scale * normal(d, h), scale * normal(h, m))


def held(task: Task, steps: int) -> tuple[dict[str, Any], Tensor]:
    """What is certain of these networks, and what gradient descent then does.

    Args:
        task: T networks.
        steps: of gradient descent with the certified rate.

    Returns:
        Numbers, of those that have a certificate; and the losses [steps + 1, T] of these, relative to the first.
    """
    found = certificate(*task)
    kept = Task(*(t[found.valid] for t in task))
    lr, rho = found.lr[found.valid], found.rho[found.valid]
    minimum = kept.minimum()
    start = kept.loss(minimum)
    # Near the minimum the loss above it is rounding alone.
    rounding = 1e-10 * (start + kept.Y.square().sum((-2, -1)))
    losses, broken = [start], 0
    for t in range(steps):
        local = local_rate(*kept, lr).factor
        kept = kept.stepped(lr)
        losses.append(kept.loss(minimum))
        bounds = (rho * losses[-2], rho ** (t + 1) * start, local * losses[-2])
        broken += sum(int((losses[-1] > bound + rounding).sum()) for bound in bounds)
    curves = torch.stack(losses)
    settled = (curves[-1] > rounding).nonzero().squeeze(1)
    ratio = ((curves[-1] / curves[0])[settled].log() / steps) / rho[settled].log()
    numbers = {
        "draws": len(found.valid),
        "certified": int(found.valid.sum()),
        "steps": steps,
        "violations": broken,
        "one_minus_rho": _quantiles(1 - rho),
        "measured_over_certified": _quantiles(ratio),
    }
    return numbers, curves / start


def slowest(settings: CertificateSettings) -> dict[str, Any]:
    """The rates that are certain of many draws of the first shape and scale, those that are `held` among them.

    Args:
        settings: what is drawn.
    """
    gains = []
    for seed in range(settings.seed, settings.seed + settings.seeds_unheld):
        found = certificate(*draw(settings.draws, settings.shapes[0], settings.scales[0], seed))
        gains.append(torch.where(found.valid, 1 - found.rho, 0.0))
    return {"draws": settings.draws * settings.seeds_unheld, "one_minus_rho": _quantiles(torch.cat(gains))}


def _quantiles(x: Tensor) -> dict[str, float | None]:
    if not len(x):
        return {"least": None, "median": None, "largest": None}
    return {"least": float(x.min()), "median": float(x.median()), "largest": float(x.max())}


def adaptive_against_constant(T: int, shape: tuple[int, int, int, int], seed: int, most: int) -> list[dict[str, int]]:
    """Steps to a millionth of the first loss, with the adaptive rate and with the best constant one of a grid.

    Args:
        T: networks.
        shape: n, d, m, h.
        seed: of the draw.
        most: steps that are tried.
    """
    task = draw(T, shape, 1.0, seed)
    rates = torch.logspace(-3.5, 0, 29, dtype=torch.float64)

    def steps(at: Task, rate: Callable[[Task], Tensor]) -> Tensor:
        minimum = at.minimum()
        goal = 1e-6 * at.loss(minimum)
        taken = torch.full(goal.shape, most)
        for k in range(most):
            taken[(at.loss(minimum) < goal) & (taken == most)] = k
            if (taken.reshape(-1, T).amin(0) < most).all():
                break
            at = at.stepped(rate(at))
            at = Task(*(t.nan_to_num(0.0, 0.0, 0.0).clamp(-1e8, 1e8) for t in at))  # where a rate is too large
        return taken.reshape(-1, T).amin(0)

    constant = steps(Task(*(t.repeat(len(rates), 1, 1) for t in task)), lambda at: rates.repeat_interleave(T))
    adaptive = steps(task, lambda at: adaptive_step(*at))
    return [{"adaptive": int(a), "constant": int(c)} for a, c in zip(adaptive, constant, strict=True)]


def relu_measured(width: int, seed: int, steps: int) -> dict[str, float]:
    """A ReLU network trained by gradient descent: the smallest eigenvalue of its tangent kernel at the start, the
    factor that it would mean for a network that stays linear, and the one that is measured. Nothing here is certified.

    Args:
        width: hidden units.
        seed: of the draw.
        steps: of gradient descent.
    """
    torch.manual_seed(seed)
    n, d = 20, 10
    network = torch.nn.Sequential(torch.nn.Linear(d, width), torch.nn.ReLU(), torch.nn.Linear(width, 1)).double()
    x, y = torch.randn(n, d, dtype=torch.float64), torch.randn(n, 1, dtype=torch.float64)
    values = torch.linalg.eigvalsh(ntk_gram(network, x[None])[0].detach())
    lr = 1 / float(values[-1])
    optimizer = torch.optim.SGD(network.parameters(), lr=lr)
    losses = []
    for _ in range(steps + 1):
        optimizer.zero_grad()
        loss = (network(x) - y).square().sum() / 2
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
    return {
        "width": width,
        "least_eigenvalue": float(values[0]),
        "factor_if_linear": (1 - lr * float(values[0])) ** 2,
        "measured_factor": (losses[-1] / losses[0]) ** (1 / steps),
    }


def experiment(settings: CertificateSettings, say: Say = silent) -> dict[str, Any]:
    """All of it.

    Args:
        settings: what is drawn.
        say: takes a line about the progress.
    """
    rows, shown = [], None
    for shape in settings.shapes:
        for scale in settings.scales:
            first = shape == settings.shapes[0] and scale == settings.scales[0]
            task = draw(settings.draws if first else settings.other_draws, shape, scale, settings.seed)
            numbers, curves = held(task, settings.steps)
            rows.append({"shape": shape, "scale": scale, **numbers})
            if first:
                shown = (task, curves[:, : settings.shown])
            say(f"certificate: shape {shape}, scale {scale:g}: {numbers['certified']} of {numbers['draws']}")
    assert shown is not None
    some = Task(*(t[: settings.shown] for t in shown[0]))
    adaptive = adaptive_against_constant(
        settings.adaptive_draws, settings.shapes[0], settings.seed + 1, settings.adaptive_steps
    )
    return {
        "settings": asdict(settings),
        "rows": rows,
        "slowest": slowest(settings),
        "adaptive": adaptive,
        "relu": [relu_measured(width, settings.seed, settings.steps) for width in settings.relu_widths],
        "curves": {"rho": certificate(*some).rho.tolist(), "loss": shown[1].T.tolist()},
    }


def run(out: Path, *, quick: bool, say: Say) -> str:
    """What ``kernelmeta demo certificate`` does; see `write_results`.

    Args:
        out: a folder.
        quick: fewer draws and steps.
        say: takes lines about the progress.

    Returns:
        The table, as Markdown.

    Raises:
        OSError: files cannot be written.
    """
    from kernelmeta.linear.plots import certificate_plot

    found = experiment(QUICK if quick else CertificateSettings(), say)
    return write_results(out, "certificate", found, quick=quick, table=table, plot=certificate_plot)


def table(found: dict[str, Any]) -> list[str]:
    """What was found, as lines of Markdown.

    Args:
        found: what `experiment` returns.
    """

    def cell(values: dict[str, float | None], key: str, digits: str) -> str:
        value = values[key]
        return "" if value is None else format(value, digits)

    held = [
        (
            ", ".join(map(str, row["shape"])), f"{row['scale']:g}", f"{row['certified']} of {row['draws']}",
            row["violations"], cell(row["one_minus_rho"], "least", ".2g"), cell(row["one_minus_rho"], "median", ".2g"),
            cell(row["measured_over_certified"], "median", ".1f"),
        )
        for row in found["rows"]
    ]  # fmt: skip
    relu = [
        (row["width"], f"{row['least_eigenvalue']:.3g}", f"{row['factor_if_linear']:.5f}",
         f"{row['measured_factor']:.5f}")
        for row in found["relu"]
    ]  # fmt: skip
    more = found["slowest"]
    ratios = sorted(row["adaptive"] / row["constant"] for row in found["adaptive"])
    return [
        f"**Certificates** of two-layer linear networks, held against {found['settings']['steps']} steps of gradient"
        " descent each.",
        "",
        *markdown_table(
            ("n, d, m, h", "scale", "certified", "violations", "1 - rho, least", "1 - rho, median",
             "measured over certified log rate, median"),
            held,
        ),
        "",
        f"Of {more['draws']} draws of the first kind (no certificate counts as 0) 1 - rho is"
        f" {cell(more['one_minus_rho'], 'least', '.2g')} at least and {cell(more['one_minus_rho'], 'median', '.2g')} in"
        " the median.",
        "",
        f"**Adaptive steps** to a millionth of the loss take {ratios[len(ratios) // 2]:.2f} times those of the best"
        f" constant rate in the median of {len(ratios)} draws, {ratios[-1]:.2f} at most.",
        "",
        "**ReLU networks**, measured, not certified:",
        "",
        *markdown_table(
            ("width", "least eigenvalue of the kernel", "factor of a step if it stayed linear", "measured factor"),
            relu, words=0,
        ),
    ]  # fmt: skip
