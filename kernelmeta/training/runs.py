"""Run folders: the files that training commands leave, and what a run is resumed from."""

from __future__ import annotations

import platform
import time
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
    # torch.utils.tensorboard writes from a thread of its own, where a full disk ends in a traceback.
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter

    out.mkdir(parents=True, exist_ok=True)
    with open(out / f"events.out.tfevents.{time.time_ns()}.{platform.node()}", "wb") as file:
        records = RecordWriter(file)

        def write(**content: Any) -> None:
            records.write(Event(wall_time=time.time(), **content).SerializeToString())
            file.flush()

        def report(name: str, value: float, step: int) -> None:
            write(step=step, summary=Summary(value=[Summary.Value(tag=name, simple_value=value)]))

        write(file_version="brain.Event:2")
        if from_step:
            write(step=from_step + 1, session_log=SessionLog(status=SessionLog.START))
        yield report
