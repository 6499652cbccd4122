"""The experiments on the built-in glyphs, small: what `kernelmeta demo graceful` runs."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from kernelmeta.data.files import read_json, write_json, write_text
from kernelmeta.graceful import experiments, plots
from kernelmeta.graceful.experiments import CompatibleSettings, FlipSettings, SearchSettings
from kernelmeta.graceful.tables import PAIRS

Say = Callable[[str], None]
EXPERIMENTS: dict[str, tuple[Any, Any]] = {
    "flips": (FlipSettings, experiments.flip_experiment),
    "compatible": (CompatibleSettings, experiments.compatible_experiment),
    "search": (SearchSettings, experiments.search_experiment),
}
GALLERIES = {
    "known": "typefaces that the old model was trained on",
    "unseen_typefaces": "typefaces that no model has seen",
    "unseen_classes": "classes that no model has seen",
}
RESULTS, TABLE = "demo.json", "demo.md"
# On 13 training glyphs a class, not 20 and more: longer, and narrower where it costs.
SETTINGS: dict[str, Any] = {
    "flips": FlipSettings(seeds=3, other_seeds=1, epochs=24, weights=(0.2, 1.0)),
    "compatible": CompatibleSettings(seeds=2, epochs=24, old_share=0.4, old_epochs=40),
    "search": SearchSettings(seeds=1, gallery_epochs=24, epochs=24, final_epochs=24, widths=(24, 64)),
}
QUICK: dict[str, dict[str, Any]] = {
    "flips": {"seeds": 2, "epochs": 3, "most_classes": 12, "weights": (0.2,)},
    "compatible": {"seeds": 2, "epochs": 3, "old_epochs": 3, "most_classes": 12, "weights": (1.0,)},
    "search": {
        "gallery": "small-2.1-16.32.64-3.3.3-32",
        "gallery_epochs": 3,
        "epochs": 3,
        "final_epochs": 3,
        "most_classes": 12,
        "judged": 12,
        "budget": 0.3,
        "widths": (24,),
    },
}


def run(out: Path, *, quick: bool, say: Say) -> str:
    """All three experiments, one after the other; goes on from what is in ``out``.

    Args:
        out: folder of the models, ``demo.json``, ``demo.md`` and a plot for each.
        quick: seconds instead of minutes: too short to show anything but that it runs.
        say: takes lines about the progress.

    Returns:
        Tables, as Markdown.

    Raises:
        OSError: files cannot be written.
    """
    found, written = {}, []
    for name, (_, experiment) in EXPERIMENTS.items():
        settings = replace(SETTINGS[name], **(QUICK[name] if quick else {}))
        say(f"{name}: {' '.join((experiment.__doc__ or '').split('. ')[0].split())}")
        found[name] = experiment(settings, out / name, say)
        plot(name, out / f"{name}.png", found[name], out / name)
        written.append(table(name, found[name]))
    write_json(out / RESULTS, found)
    text = "\n".join(written)
    write_text(out / TABLE, text)
    return text


def plot(name: str, path: str | os.PathLike[str], results: dict[str, Any], out: Path) -> None:
    """The plot of an experiment. Raises OSError.

    Args:
        name: of the experiment.
        path: of the file.
        results: of the experiment.
        out: the folder it ran in.
    """
    if name == "flips":
        plots.flips_plot(path, results["arms"])
    elif name == "compatible":
        plots.backfill_plot(path, {GALLERIES[key]: found for key, found in results["galleries"].items()})
    else:
        rows = results["rows"]["searches"]
        judged = [read_json(out / f"judged-{seed}.json") for seed in range(len(rows))]
        plots.operations_plot(path, [{**row, "judged": one} for row, one in zip(rows, judged, strict=True)])


def table(name: str, results: dict[str, Any]) -> str:
    """Means with standard errors, as Markdown.

    Args:
        name: of the experiment.
        results: of it.
    """
    if name == "flips":
        lines = [
            f"**Flips**, in percent of {results['glyphs']['test']} test glyphs; focal distillation with weight"
            f" {results['chosen_weight']:g}.",
            "",
            "| successor | error | negative flips | positive flips | relative NFR | seeds |",
            "| --- | ---: | ---: | ---: | ---: | ---: |",
        ]
        for arm, row in results["arms"].items():
            cells = [_with_error(row[key]) for key in ("error_new", "negative", "positive")]
            relative = _with_error(row["relative_negative"])
            lines.append(f"| {arm} | {' | '.join(cells)} | {relative} | {row['seeds']} |")
        matched = results["matched_error"]
        lines += [
            "",
            f"The distilled successor errs on {matched['error']:.2f} and has {matched['negative_focal']:.2f} negative"
            f" flips; a plain one of that error would have {matched['negative_plain']:.2f}.",
        ]
    elif name == "compatible":
        lines = [
            f"**Backward compatibility**, in percent; influence loss with weight {results['chosen_weight']:g}.",
            "",
        ]
        for key, found in results["galleries"].items():
            lines += [f"Gallery of {GALLERIES[key]}:", "", "| queries in gallery | top-1 | mean average precision |"]
            lines += ["| --- | ---: | ---: |"]
            for pair, title in {**PAIRS, "update_gain": "update gain, share", "tax": "tax, points"}.items():
                cells = [_with_error(found[pair][metric]) for metric in ("top1", "mean_average_precision")]
                lines.append(f"| {title} | {' | '.join(cells)} |")
            lines.append("")
        lines.pop()
    else:
        lines = [
            f"**Small networks in a large one's gallery**, top-1 in percent; M(g,g) {_with_error(results['gallery'])}.",
            "",
            "| network | cost ratio | M(q,q) | M(q,g) | free, M(q,g) |",
            "| --- | ---: | ---: | ---: | ---: |",
        ]
        for h, row in results["by_width"].items():
            cells = [_with_error(row[key]) for key in ("query_query", "query_gallery", "free_gallery")]
            lines.append(f"| width {h} | {row['cost_ratio']:.0f} | {' | '.join(cells)} |")
        for reward, row in results["chosen"].items():
            cells = [_with_error(row[key]) for key in ("query_query", "query_gallery")]
            title = plots.REWARD_TITLES[reward]
            free = _with_error(results["free"]) if reward == "product" else ""
            lines.append(f"| {title} | {row['cost_ratio']['mean']:.0f} | {' | '.join(cells)} | {free} |")
    return "\n".join(lines) + "\n"


def _with_error(value: dict[str, float] | None) -> str:
    return "" if value is None else f"{value['mean']:.2f} ± {value['standard_error']:.2f}"
