"""``kernelmeta info``: what this installation can do."""

from __future__ import annotations

import argparse

from kernelmeta.command_line import Add


def add_commands(add: Add) -> None:
    """Adds this command to the parser."""
    add(
        "info",
        _info,
        "What is built, what runs, versions.",
        "info",
    )


def _info(args: argparse.Namespace) -> None:
    from kernelmeta.info import text

    print(text())
