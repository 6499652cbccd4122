"""Ctrl-C while the command is being imported, which takes seconds: it ends as later on, with 130 and no traceback.

Importing this module sees to it.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType

# What the command is started by: `kernelmeta`, or `python -m kernelmeta`, in which "-m" stands there during the import.
_NAMES = ("kernelmeta", "kernelmeta.exe", "-m")


def _end(number: int, frame: FrameType | None) -> None:
    os._exit(130)


def _end_quietly() -> None:
    """Until `started`, if it is the command that imports this package."""
    by_command = os.path.basename((sys.argv or [""])[0]) in _NAMES and "kernelmeta" in " ".join(sys.orig_argv)
    in_main = threading.current_thread() is threading.main_thread()
    if by_command and in_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def started() -> None:
    """Ctrl-C raises KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


_end_quietly()
