"""``kernelmeta`` and ``python -m kernelmeta``: the command, or a line that says what it needs.

`pip install kernelmeta` brings what the ops need. What the commands need besides comes with ``kernelmeta[train]``.
"""

from __future__ import annotations

import importlib.util
import os
import sys

# What ``kernelmeta[train]`` brings, by the name to import and the name to install.
_NEEDED = {"tqdm": "tqdm", "PIL": "pillow", "matplotlib": "matplotlib", "tensorboard": "tensorboard"}


def main() -> int:
    """Run the command; returns its exit code, 141 where nobody reads on what it prints (``kernelmeta info | head``), as
    of a program that SIGPIPE ends.
    """
    try:
        code = _command()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is printed at the very end
        return 141
    return code


def _command() -> int:
    if sys.argv[1:] in (["info"], ["--version"]):  # which need nothing
        from kernelmeta import __version__
        from kernelmeta.info import text

        print(text() if sys.argv[1] == "info" else f"kernelmeta {__version__}")
        return 0
    missing = [package for module, package in _NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        print(
            f"kernelmeta: error: the command needs {', '.join(missing)}: pip install 'kernelmeta[train]'",
            file=sys.stderr,
        )
        return 2
    from kernelmeta.cli import main as command

    return command()


if __name__ == "__main__":
    sys.exit(main())
