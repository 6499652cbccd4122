"""``kernelmeta completion``: what a shell needs to complete commands, options and file names."""

from __future__ import annotations

import argparse

from kernelmeta.command_line import Add


def add_commands(add: Add) -> None:
    """Adds this command to the parser."""
    command = add(
        "completion",
        _completion,
        "Print a script that teaches a shell to complete this command.",
        "completion bash",
    )
    command.add_argument("shell", choices=("bash", "zsh", "tcsh"), metavar="SHELL", help="bash, zsh or tcsh")


def _completion(args: argparse.Namespace) -> None:
    try:
        import shtab
    except ImportError:
        raise ImportError("completion needs shtab: pip install 'kernelmeta[completion]'") from None
    print(shtab.complete(args.parser, args.shell))
