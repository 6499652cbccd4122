"""Run folders: the files that training commands leave, and what a run is resumed from."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from kernelmeta.data.files import read_json, write_json
from kernelmeta.training.trainer import CHECKPOINT
from kernelmeta.version import __version__

CONFIG, RESULTS = "config.json", "results.json"


def prepare(out: Path, command: str, given: dict[str, Any], resume: bool) -> tuple[dict[str, Any], bool]:
    """Settings of the run in ``out``, and whether it has a checkpoint to go on from.

    Args:
        given: what the user set. When resuming, a setting that the run has otherwise is an error;
            ``episodes`` and
            ``epochs`` may differ, to train longer.

    Raises:
        ValueError: ``out`` holds another run; a setting differs.
        OSError: ``out`` cannot be read.
    """
    begun = (out / CHECKPOINT).exists()
    if not resume:
        if begun:
            raise ValueError(f"out: {out} already holds a run; give --resume to go on, or another folder")
        return given, False
    if not (out / CONFIG).exists():
        if begun:
            raise ValueError(f"out: {out} holds a checkpoint but no {CONFIG}")
        return given, False
    saved = read_json(out / CONFIG)
    if saved.get("command") != command:
        raise ValueError(f"out: {out} holds a run of 'kernelmeta {saved.get('command')}', not of {command!r}")
    for name, value in given.items():
        if name not in ("episodes", "epochs") and saved.get(name) != value:
            raise ValueError(f"{name}: the run in {out} has {saved.get(name)!r}, got {value!r}")
    return {**saved, **given}, begun


def write_config(out: Path, command: str, settings: dict[str, Any]) -> None:
    """The full configuration, seed and versions included. Raises OSError."""
    versions = {"kernelmeta": __version__, "torch": torch.__version__, "python": platform.python_version()}
    content = {"command": command, **settings, "threads": torch.get_num_threads(), "versions": versions}
    write_json(out / CONFIG, content)


@contextmanager
def scalars(out: Path, from_step: int) -> Iterator[Callable[[str, float, int], None]]:
    """A function (name, value, step) that writes TensorBoard scalars; what lies beyond ``from_step`` is
    superseded.
    """
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(out), purge_step=from_step or None)
    try:
        yield lambda name, value, step: writer.add_scalar(name, value, step)
    finally:
        writer.close()
