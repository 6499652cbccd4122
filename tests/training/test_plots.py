"""Plots: the names of the tables, and nothing hidden."""

from __future__ import annotations

import pytest
from matplotlib.container import ErrorbarContainer

from kernelmeta import nn
from kernelmeta.data import EpisodeSampler
from kernelmeta.training import plots
from kernelmeta.training.evaluation import evaluate, table, title
from kernelmeta.training.learners import TITLES


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved, in the place of files."""
    saved = []
    monkeypatch.setattr(plots, "save", lambda figure, path: saved.append(figure))
    return saved


def legend_box(figure):
    figure.canvas.draw()
    (legend,) = figure.legends
    return legend, legend.get_window_extent()


def test_accuracy_over_steps_has_the_names_of_the_table(bank, figures):
    sampler = EpisodeSampler(bank, "test", way=4, query=3)
    results = evaluate(nn.SIB(4, bank.n_features, steps=2).eval(), bank.features, sampler, 20)
    plots.steps_plot("x.png", results, title(results))
    legend, _ = legend_box(figures[0])
    names = [text.get_text() for text in legend.get_texts()]
    assert sorted(names) == sorted(["prototypes", "soft k-means", "SIB, K = 2"])
    for name in names:
        assert f"{name} " in table(results)


@pytest.mark.parametrize("values", [[90, 91, 92, 93], [93, 92, 91, 90], [50, 50, 50, 50], [99.9, 20, 99.9, 20]])
def test_no_error_bar_is_hidden_by_the_legend(figures, values):
    curve = [{"steps": k, "accuracy": value, "ci95": 5.0} for k, value in enumerate(values)]
    baselines = {name: {"accuracy": values[0], "ci95": 1.0} for name in ("prototypes", "soft_kmeans")}
    plots.steps_plot("x.png", {"accuracy_over_steps": curve, "baselines": baselines}, "SIB, K = 3")
    legend, box = legend_box(figures[0])
    (axes,) = figures[0].axes
    (bars,) = (c for c in axes.containers if isinstance(c, ErrorbarContainer))
    assert not box.overlaps(axes.get_window_extent())
    for line in bars.lines[1]:
        assert not box.overlaps(line.get_window_extent())
    plots.training_plot("x.png", "episodes", [1, 2], [1.0, 0.5], [50.0, 60.0], [(1, 40.0), (2, 45.0)])
    _, box = legend_box(figures[1])
    assert not any(box.overlaps(axes.get_window_extent()) for axes in figures[1].axes)


def test_a_comparison_calls_learners_as_everybody_does(figures):
    from kernelmeta.training.comparison import CONTESTANTS
    from kernelmeta.training.comparison import TITLES as ALL

    assert set(ALL) == set(CONTESTANTS)
    assert all(ALL[name] == title for name, title in TITLES.items())
    row = {"accuracy": 50.0, "ci95": 1.0}
    cells = [{"learners": dict.fromkeys(ALL, row)}]
    plots.comparison_plot("x.png", {"cells": cells, "titles": ALL}, ["a cell"])
    labels = [text.get_text() for text in figures[0].axes[0].get_yticklabels()]
    assert labels == list(ALL.values())
