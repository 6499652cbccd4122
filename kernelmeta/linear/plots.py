"""Plots of linearised learning, as PNG."""

from __future__ import annotations

import os
from typing import Any

from kernelmeta.training.plots import new_panels, save


def double_descent_plot(path: str | os.PathLike[str], found: dict[str, Any]) -> None:
    """Test loss, test error and training loss over the width, by label noise; test loss by ridge; the same of networks.
    Raises OSError.

    Args:
        path: of the file.
        found: what `kernelmeta.linear.double_descent.run` writes as JSON.
    """
    figure, panels = new_panels(4)
    loss, error, fitted, ridged = panels
    number = 0
    for data, one in found["features"].items():
        for noise in one["settings"]["noises"]:
            rows = [row for row in one["rows"] if row["noise"] == noise and row["ridge"] == 0]
            label = f"{data}, {100 * noise:.0f} % label noise"
            for axes, measure in ((loss, "test_loss"), (error, "test_error"), (fitted, "train_loss")):
                _band(
                    axes, [row["width"] / one["train"] for row in rows], [row[measure] for row in rows], number, label
                )
            number += 1
    data, one = next(iter(found["features"].items()))
    noise = one["settings"]["noises"][-1]
    for index, ridge in enumerate(one["settings"]["ridges"]):
        rows = [row for row in one["rows"] if row["noise"] == noise and row["ridge"] == ridge]
        _band(
            ridged, [row["width"] / one["train"] for row in rows], [row["test_loss"] for row in rows], index,
            f"ridge {ridge:g}",
        )  # fmt: skip
    if found["deep"] is not None:
        deep = found["deep"]
        at = [row["parameters"] / (deep["train"] * deep["classes"]) for row in deep["rows"]]
        for axes, measure in ((loss, "test_loss"), (error, "test_error"), (fitted, "train_loss")):
            _band(axes, at, [row[measure] for row in deep["rows"]], number, "networks, mnist1d (parameters / targets)")
    for axes in panels:
        axes.axvline(1, color="grey", linestyle=":", linewidth=1)
        axes.set(xscale="log", xlabel="features / training rows")
    for axes, label in ((loss, "test loss"), (fitted, "training loss"), (ridged, f"test loss, {data}")):
        axes.set(yscale="log", ylabel=label)
    fitted.set_ylim(bottom=1e-4)
    error.set(ylabel="test error, %")
    ridged.legend(fontsize="x-small")
    handles, labels = loss.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    save(figure, path)


def _band(axes: Any, x: list[float], values: list[dict[str, float]], number: int, label: str) -> None:
    """Medians, and their intervals as a band."""
    axes.plot(x, [v["median"] for v in values], marker=".", color=f"C{number}", label=label)
    axes.fill_between(
        x, [v["low"] for v in values], [v["high"] for v in values], color=f"C{number}", alpha=0.2, linewidth=0
    )


def width_plot(path: str | os.PathLike[str], found: dict[str, Any]) -> None:
    """The gap of the outputs and the drift of the kernel over the width, a line a seed. Raises OSError.

    Args:
        path: of the file.
        found: what `kernelmeta.linear.width.experiment` returns.
    """
    figure, panels = new_panels(2)
    labels = {"output_gap": "gap of the outputs", "kernel_drift": "drift of the kernel"}
    widths = [row["width"] for row in found["rows"]]
    for axes, (name, label) in zip(panels, labels.items(), strict=True):
        for seed, of_seed in enumerate(found["slopes"][name]):
            values = [row[name][seed] for row in found["rows"]]
            axes.plot(widths, values, marker=".", label=f"seed {seed}: slope {of_seed:.2f}")
        axes.set(xscale="log", yscale="log", xlabel="width", ylabel=label)
        axes.legend(fontsize="small")
    save(figure, path)


def fine_tuning_plot(path: str | os.PathLike[str], found: dict[str, Any]) -> None:
    """Points ahead of full fine-tuning, by method and shots. Raises OSError.

    Args:
        path: of the file.
        found: what `kernelmeta.linear.lqf_demo.experiment` returns.
    """
    figure, panels = new_panels(len(found["means"]))
    for axes, (shot, by_method) in zip(panels, found["means"].items(), strict=True):
        names = [name for name in by_method if name != "full fine-tuning"]
        axes.barh(
            range(len(names)),
            [by_method[name]["ahead_of_full"] for name in names],
            xerr=[by_method[name]["standard_error"] for name in names],
        )
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.axvline(0, color="grey", linewidth=1)
        axes.set(xlabel=f"points ahead of full fine-tuning, {shot} images a class")
    save(figure, path)


def certificate_plot(path: str | os.PathLike[str], found: dict[str, Any]) -> None:
    """The loss of a few networks as it went, and what was certain of it. Raises OSError.

    Args:
        path: of the file.
        found: what `kernelmeta.linear.certificates.experiment` returns.
    """
    figure, (axes,) = new_panels(1)
    curves = found["curves"]
    for number, (rho, losses) in enumerate(zip(curves["rho"], curves["loss"], strict=True)):
        steps = range(len(losses))
        axes.plot(steps, losses, color=f"C{number}", label=f"rho {rho:.4f}")
        axes.plot(steps, [rho**t for t in steps], color=f"C{number}", linestyle="--")
    axes.set(yscale="log", xlabel="step", ylabel="loss over the first; dashed: what is certain")
    axes.set_ylim(bottom=1e-8)
    axes.legend(fontsize="small")
    save(figure, path)
