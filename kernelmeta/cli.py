"""The command ``kernelmeta``: the parser of all commands, and how they end.

Every command ends with 0, or with 2 and one line on stderr that says what was wrong with its input, or with
130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from kernelmeta.command_line import Command, Parser, check_machine
from kernelmeta.commands import (
    adapt,
    compare,
    completion,
    demo,
    evaluate,
    extract,
    importing,
    info,
    predict,
    pretrain,
    share,
    train,
)
from kernelmeta.data.words import size_text
from kernelmeta.graceful import commands as graceful
from kernelmeta.starting import started
from kernelmeta.version import __version__

_COMMANDS = (
    pretrain, extract, importing, train, evaluate, predict, adapt, share, compare, graceful, demo, info, completion,
)  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    whole = Parser(prog="kernelmeta", description="Few-shot learning with fused inner loops.", allow_abbrev=False)
    whole.add_argument("--version", action="version", version=f"kernelmeta {__version__}")
    whole.set_defaults(parser=whole)
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Command)
    whole.commands = commands.choices

    def add(name: str, run: Callable[[argparse.Namespace], None], text: str, example: str) -> Command:
        command = commands.add_parser(name, help=text, description=text, example=example)
        command.set_defaults(run=run)
        return command

    for module in _COMMANDS:
        module.add_commands(add)
    return whole


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    # An error in a process that decodes images arrives with that process's traceback before it.
    return lines[-1].partition("Error: ")[2] or lines[-1] if "Traceback" in str(error) else " ".join(lines)


def _out_of_memory(error: RuntimeError) -> str | None:
    """What an allocation that failed within PyTorch asked for, to read; None if that is not what happened."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError):
        size = re.search(r"Tried to allocate ([\d.]+ \w+)", text)
        return f"out of memory on the device: {size.group(1) if size else 'more'} were asked for"
    asked = re.search(r"can't allocate memory: you tried to allocate (\d+) bytes", text)
    if asked:
        return f"out of memory: {size_text(int(asked.group(1)))} were asked for at once"
    if "bad_alloc" in text or "Storage size calculation overflowed" in text:
        return f"out of memory ({' '.join(text.split())[:120]})"
    return None


@contextlib.contextmanager
def _plain_warnings(command: str) -> Iterator[None]:
    """What Python warns of is a line of the command, without the line of source that did it."""

    def alone(message: Warning | str, *_: Any, **__: Any) -> str:
        return f"kernelmeta {command}: warning: {' '.join(str(message).split())}\n"

    before, warnings.formatwarning = warnings.formatwarning, alone
    try:
        yield
    finally:
        warnings.formatwarning = before


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code.

    Raises:
        BrokenPipeError: nobody reads any more what the command prints.
    """
    try:
        started()
        args = parser().parse_args(argv)
    except KeyboardInterrupt:
        return 130
    # A name that is not UTF-8, or a terminal that takes no ±, are no reason to lose what was computed.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        with _plain_warnings(args.command):
            check_machine(args)
            args.run(args)
    except BrokenPipeError as error:
        if error.filename is None:  # what the command prints
            raise
        return _failed(args, _one_line(error))
    except (ValueError, TypeError, OSError, OverflowError, RecursionError, MemoryError, ImportError) as error:
        return _failed(args, _one_line(error))
    except RuntimeError as error:
        text = _out_of_memory(error)
        if text is None:
            raise
        return _failed(args, text)
    except KeyboardInterrupt:
        return 130
    return 0


def _failed(args: argparse.Namespace, text: str) -> int:
    with contextlib.suppress(OSError):  # the terminal may be gone
        print(f"kernelmeta {args.command}: error: {' '.join(text.splitlines())}", file=sys.stderr)
    return 2
