"""Run folders: the files that training commands leave, and what a run is resumed from."""

from __future__ import annotations

import difflib
import os
import platform
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from kernelmeta.data.files import read_json, write_json
from kernelmeta.data.locks import FolderLock
from kernelmeta.data.replacing import sweep
from kernelmeta.data.words import listing
from kernelmeta.training.checkpoint import CHECKPOINT, Checkpoint, check_same
from kernelmeta.version import __version__

CONFIG, RESULTS = "config.json", "results.json"
# What names the data: files may be named otherwise, or have moved. Fingerprints tell whether they are the same.
WHERE = ("data", "weights", "backbone", "update_from")
PATHS = ("data", "weights", "update_from", "old", "gallery")


@contextmanager
def claimed(out: Path) -> Iterator[None]:
    """The run folder for this process alone, made if it is not there, and taken away again if it stays empty.

    What earlier processes left half-written when they were killed is deleted.

    Raises:
        ValueError: another process is at work there.
        OSError: it cannot be made.
    """
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    out.mkdir(parents=True, exist_ok=True)
    try:
        held = FolderLock(out)
    except BlockingIOError:
        raise ValueError(f"out: another process is at work in {out}") from None
    try:
        for within, _, _ in os.walk(out):
            sweep(Path(within))
        yield
    finally:
        with suppress(OSError):  # not empty
            for folder in made:
                folder.rmdir()
        held.close()


def begun(out: Path, config: str = CONFIG) -> bool:
    """Whether a folder holds a run, or the beginning of one, whose settings are in a file of that name."""
    return any((out / name).exists() for name in (config, CHECKPOINT))


def likeliest(out: Path, config: str = CONFIG) -> str:
    """The runs that may have been meant by ``out``, which holds none: "; did you mean runs/one?", or empty."""
    with suppress(OSError):
        inside = sorted(str(folder) for folder in out.iterdir() if begun(folder, config))
        if inside:
            return f"; it holds the run{'s' if len(inside) > 1 else ''} {listing(inside, 5)}"
    # A slip in the last name, or in the name of a folder on the way that is not there; spelled as `out` is.
    slips = [(out.parent, out.name, "")]
    slips += [(p.parent, p.name, str(out.relative_to(p))) for p in out.parents if p.name and not p.exists()]
    for above, name, rest in slips:
        with suppress(OSError):
            there = [folder.name for folder in above.iterdir() if folder.name != name and begun(folder / rest, config)]
            close = difflib.get_close_matches(name, there, 1)
            if close:
                return f"; did you mean {above / close[0] / rest}?"
    return ""


def check_begun(out: Path, config: str = CONFIG) -> None:
    """Raises ValueError where nothing is there to go on with."""
    if not begun(out, config):
        what = "holds no run to go on with" if out.exists() else "is not there"
        raise ValueError(f"--resume: {out} {what}{likeliest(out, config)} (without --resume a new one begins there)")


def prepare(
    out: Path, command: str, given: dict[str, Any], resume: bool, free: Collection[str], kind: str | None = None
) -> tuple[dict[str, Any], Checkpoint | None]:
    """Settings of the run in ``out``, and its checkpoint if it has one to go on from.

    Args:
        given: what the user set.
        free: settings that may differ from the run's when it is resumed; any other is an error.
        kind: of its checkpoint, if that is not the command's name.

    Raises:
        ValueError: ``out`` holds another run, or a checkpoint without settings; a setting differs; its configuration is
            not its checkpoint's.
        OSError: ``out`` cannot be read.
    """
    trained_before = (out / CHECKPOINT).exists()
    if not resume:
        if trained_before:
            raise ValueError(f"out: {out} already holds a run; give --resume to go on, or another folder")
        return given, None
    if not (out / CONFIG).exists():
        raise ValueError(f"out: {out} holds a checkpoint but no {CONFIG}")
    written = read_json(out / CONFIG)
    if written.get("command") != command:
        raise ValueError(f"out: {out} holds a run of 'kernelmeta {written.get('command')}', not of {command!r}")
    if not trained_before:
        return {**written, **given}, None
    checkpoint = Checkpoint.load(out / CHECKPOINT, kind or command)
    trained = checkpoint.state.get("config")
    if not isinstance(trained, dict):
        raise ValueError(f"{out / CHECKPOINT}: it does not hold the settings of its run")
    check_same(trained, written, free, f"{out / CONFIG} says {{1!r}}, but its checkpoint was trained with {{0!r}}")
    check_same(trained, given, free, f"the run in {out} has {{0!r}}, got {{1!r}}")
    for name in (*WHERE, *PATHS):
        if name in free and trained.get(name) is not None:
            trained = {**trained, name: found(trained[name], written.get("out"), out)}
    return {**trained, **given}, checkpoint


def found(path: str, written_to: Any, out: Path) -> str:
    """A file or folder that a run was given: where it was, or if it is not there any more, as far from the run folder
    as it was from the folder ``written_to``.
    """
    if os.path.exists(path) or not isinstance(written_to, str):
        return path
    moved = os.path.normpath(os.path.join(os.path.abspath(out), os.path.relpath(path, written_to)))
    return moved if os.path.exists(moved) else path


def absolute(given: dict[str, Any]) -> dict[str, Any]:
    """Settings with the paths among them spelled so that they hold from any folder."""
    return {
        name: os.path.abspath(value) if name in PATHS and value not in (None, "", "glyphs") else value
        for name, value in given.items()
    }


def write_config(out: Path, command: str, settings: dict[str, Any]) -> None:
    """The full configuration, seed and versions included. Raises OSError."""
    versions = {"kernelmeta": __version__, "torch": torch.__version__, "python": platform.python_version()}
    content = {"command": command, **settings, "out": os.path.abspath(out), "threads": torch.get_num_threads()}
    write_json(out / CONFIG, {**content, "versions": versions})


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
