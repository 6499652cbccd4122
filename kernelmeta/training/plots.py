"""Plots of a run, as PNG."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from kernelmeta.data.replacing import replacing
from kernelmeta.training.learners import TITLES


def new_panels(n: int) -> tuple[Any, Any]:
    """A figure and its n panels side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * n, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, [figure.add_subplot(1, n, i + 1) for i in range(n)]


def save(figure: Any, path: str | os.PathLike[str]) -> None:
    """Write a figure, whole or not at all. Raises OSError."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _legend(figure: Any, axes: Any) -> None:
    """Below the plot, where it hides nothing of it."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)


def training_plot(
    path: str | os.PathLike[str],
    unit: str,
    at: Sequence[float],
    loss: Sequence[float],
    accuracy: Sequence[float],
    validation: Sequence[tuple[float, float]] = (),
) -> None:
    """Loss and accuracy (percent) over ``at`` (episodes or epochs, as ``unit`` says). Raises OSError."""
    figure, (left, right) = new_panels(2)
    left.plot(at, loss, linewidth=0.8)
    left.set(xlabel=unit, ylabel="loss")
    right.plot(at, accuracy, linewidth=0.8, label="training")
    if validation:
        right.plot(*zip(*validation, strict=True), marker="o", markersize=3, label="validation")
    right.set(xlabel=unit, ylabel="accuracy, %")
    _legend(figure, right)
    save(figure, path)


def steps_plot(path: str | os.PathLike[str], results: dict[str, Any], label: str) -> None:
    """Accuracy over the number of inner steps, beside the baselines; from what `evaluate` returns. Raises
    OSError.

    Args:
        label: of the curve.
    """
    from matplotlib.ticker import MaxNLocator

    figure, (axes,) = new_panels(1)
    curve = results["accuracy_over_steps"]
    axes.errorbar(
        [row["steps"] for row in curve],
        [row["accuracy"] for row in curve],
        yerr=[row["ci95"] for row in curve],
        marker="o",
        capsize=3,
        label=label,
    )
    for style, (name, row) in zip(("--", ":"), results["baselines"].items(), strict=True):
        axes.axhline(row["accuracy"], linestyle=style, color="grey", label=TITLES[name])
    axes.set(xlabel="inner steps K", ylabel="accuracy, %")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(figure, axes)
    save(figure, path)


def comparison_plot(path: str | os.PathLike[str], results: dict[str, Any], titles: Sequence[str]) -> None:
    """Accuracy of every learner with its interval, a panel for every cell; from what `Comparison.run` returns. Raises
    OSError.

    Args:
        titles: of the panels.
    """
    cells, learners = results["cells"], results["titles"]
    figure, panels = new_panels(len(cells))
    for axes, cell, title in zip(panels, cells, titles, strict=True):
        rows = [cell["learners"][name] for name in learners]
        heights = range(len(rows) - 1, -1, -1)
        for row, height in zip(rows, heights, strict=True):
            axes.errorbar(row["accuracy"], height, xerr=row["ci95"], marker="o", capsize=3)
        axes.set(title=title, xlabel="accuracy, %", yticks=list(heights), yticklabels=list(learners.values()))
        axes.margins(y=0.1)
        axes.grid(axis="x", linewidth=0.3)
    save(figure, path)
