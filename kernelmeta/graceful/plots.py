"""Plots of updates, as PNG: who flipped, the backfill curve, accuracy over operations."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from kernelmeta.training.plots import new_panels, save

REWARD_TITLES = {
    "self": "M(q,q) as reward",
    "cross": "M(q,g) as reward",
    "product": "the product as reward",
    "random": "random search",
}


def backfill_plot(path: str | os.PathLike[str], curves: Mapping[str, dict[str, Any]]) -> None:
    """Top-1 and mean average precision over the share of the gallery that is indexed anew. Raises OSError.

    Args:
        path: of the file.
        curves: title -> what `judge_retrieval` returns; lines show the old and the free model, each in its own gallery,
            of the first.
    """
    figure, both = new_panels(2)
    titles = {"top1": "top-1, %", "mean_average_precision": "mean average precision, %"}
    for axes, (metric, label) in zip(both, titles.items(), strict=True):
        for title, found in curves.items():
            curve = found["backfill"]
            values = [_mean(row[metric]) for row in curve]
            axes.plot([100 * row["share"] for row in curve], values, marker="o", markersize=4, label=title)
        first = next(iter(curves.values()))
        name = next(iter(curves))
        for pair, style, text in (("old_old", ":", "old in old"), ("free_free", "--", "free in free")):
            if first.get(pair):
                axes.axhline(_mean(first[pair][metric]), linestyle=style, color="grey", label=f"{text}, {name}")
        axes.set(xlabel="gallery indexed anew, %", ylabel=label)
    _legend(figure, both[0])
    save(figure, path)


def _legend(figure: Any, axes: Any) -> None:
    """Below the plots, in two columns: these titles are long."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)


def _mean(value: Any) -> float:
    return float(value["mean"]) if isinstance(value, dict) else float(value)


def operations_plot(path: str | os.PathLike[str], results: Sequence[dict[str, Any]]) -> None:
    """M(q,q) and M(q,g) of every judged architecture over its operations, and those of the chosen ones trained anew.
    Raises OSError.

    Args:
        path: of the file.
        results: what `Search.run` returns, one a seed.
    """
    figure, both = new_panels(2)
    for axes, reward, pair, label in (
        (both[0], "self", "query_query", "M(q,q), top-1, %"),
        (both[1], "cross", "query_gallery", "M(q,g), top-1, %"),
    ):
        for index, found in enumerate(results):
            judged = list(found["judged"].values())
            axes.scatter(
                [2e-6 * row["operations"] for row in judged],
                [row[reward] for row in judged],
                s=5,
                color="lightgrey",
                label="judged, the supernet's weights" if not index else None,
            )
        for number, (name, title) in enumerate(REWARD_TITLES.items()):
            rows = [found["chosen"][name] for found in results if name in found["chosen"]]
            axes.scatter(
                [2e-6 * row["operations"] for row in rows],
                [row["scores"][pair]["top1"] for row in rows],
                s=30,
                color=f"C{number}",
                marker="os^x"[number],
                label=f"trained anew: {title}",
            )
        axes.axhline(
            sum(found["gallery"]["scores"]["top1"] for found in results) / len(results),
            linestyle="--",
            color="grey",
            label="M(g,g)",
        )
        axes.set(xlabel="MFLOPs an image", ylabel=label, xscale="log")
    _legend(figure, both[0])
    save(figure, path)


def flips_plot(path: str | os.PathLike[str], arms: Mapping[str, dict[str, Any]]) -> None:
    """Negative flips over the error, a point with standard errors for every arm. Raises OSError.

    Args:
        path: of the file.
        arms: title -> means and standard errors of "error_new" and "negative", in percent.
    """
    figure, (axes,) = new_panels(1)
    for number, (name, row) in enumerate(arms.items()):
        x, y = row["error_new"], row["negative"]
        axes.errorbar(
            x["mean"],
            y["mean"],
            xerr=x["standard_error"],
            yerr=y["standard_error"],
            marker="os^vDPX*d"[number % 9],
            markersize=5,
            linestyle="none",
            label=name,
        )
    axes.set(xlabel="error of the successor, %", ylabel="negative flips, %")
    _legend(figure, axes)
    save(figure, path)


def thumbnails(path: str | os.PathLike[str], images: Sequence[Tensor], titles: Sequence[str], title: str) -> None:
    """Images in a grid, eight a row, each with a title. Raises OSError.

    Args:
        path: of the file.
        images: [channels, H, H] each, of any range.
        titles: one each.
        title: above all; also what is said where there are no images.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns, n_rows = 8, max(1, -(-len(images) // 8))
    figure = Figure(figsize=(1.5 * columns, 1.9 * n_rows + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    for index, (image, text) in enumerate(zip(images, titles, strict=True)):
        axes = figure.add_subplot(n_rows, columns, index + 1)
        low, high = float(image.min()), float(image.max())
        shown = (image - low) / (high - low or 1.0)
        if len(shown) == 1:
            axes.imshow(shown[0].numpy(), cmap="gray_r")
        else:
            axes.imshow(shown.permute(1, 2, 0).numpy())
        axes.set_title(text, fontsize=5)
        axes.set_axis_off()
    save(figure, path)
