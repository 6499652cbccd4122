"""Plots of the demos, as PNG."""

from __future__ import annotations

import os
from typing import Any

from kernelmeta.training.plots import new_panels, save


def spinning_plot(path: str | os.PathLike[str], found: dict[str, Any]) -> None:
    """KL(q | posterior) and squared error of every seed, by training. Raises OSError.

    Args:
        path: of the file.
        found: what `kernelmeta.demos.spinning_lines.run` writes as JSON.
    """
    figure, panels = new_panels(2)
    names = list(found["runs"])
    for axes, measure, label in zip(panels, ("kl", "mse"), ("KL(q | posterior)", "squared error of w"), strict=True):
        for at, name in enumerate(names):
            values = found["runs"][name][measure]
            axes.plot([at] * len(values), values, "o", alpha=0.6)
        axes.set(ylabel=label, xticks=range(len(names)), xticklabels=names)
        axes.margins(x=0.2)
    panels[0].axhline(found["optimum"]["kl"], color="grey", linestyle=":", label="best linear, with KL")
    panels[0].legend()
    save(figure, path)


def domains_plot(path: str | os.PathLike[str], found: dict[str, Any]) -> None:
    """Accuracy on every target, by method, seeds as points. Raises OSError.

    Args:
        path: of the file.
        found: what `kernelmeta.demos.domains.run` writes as JSON.
    """
    targets = list(found["gains"]["targets"])
    figure, panels = new_panels(len(targets))
    for axes, target in zip(panels, targets, strict=True):
        rows = [row for row in found["rows"] if row["target"] == target]
        methods = [name for name in rows[0] if name not in ("seed", "target")]
        for at, name in enumerate(methods):
            axes.plot([row[name] for row in rows], [at] * len(rows), "o", alpha=0.6)
        axes.set(title=target, xlabel="accuracy, %", yticks=range(len(methods)), yticklabels=methods)
        axes.grid(axis="x", linewidth=0.3)
    save(figure, path)


def proportions_plot(path: str | os.PathLike[str], found: dict[str, Any]) -> None:
    """Gains by how many rows were counted, and accuracy without labels. Raises OSError.

    Args:
        path: of the file.
        found: what `kernelmeta.demos.proportions.run` writes as JSON.
    """
    figure, (left, right) = new_panels(2)
    counted = found["counted"]
    for name in ("relaxed", "hard"):
        means = [row[name]["gain"] for row in counted]
        left.errorbar(range(len(counted)), means, [row[name]["ci95"] for row in counted], marker="o", label=name)
    left.axhline(0, color="grey", linewidth=0.5)
    left.set(xlabel="rows counted", ylabel="points over soft k-means")
    left.set(xticks=range(len(counted)), xticklabels=[row["rows"] for row in counted])
    left.legend()
    bags = found["bags"]
    for at, value in enumerate(bags.values()):
        right.errorbar([value["accuracy"]], [at], xerr=[value["ci95"]], marker="o")
    right.set(xlabel="accuracy, %", yticks=range(len(bags)), yticklabels=list(bags))
    right.grid(axis="x", linewidth=0.3)
    save(figure, path)
