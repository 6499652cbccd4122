"""``kernelmeta`` and ``python -m kernelmeta``: the command, or a line that says what it needs.

`pip install kernelmeta` brings what the ops need. What the commands need besides comes with ``kernelmeta[train]``.
"""

from __future__ import annotations

import importlib.util
import sys

# What ``kernelmeta[train]`` brings, by the name to import and the name to install.
_NEEDED = {"tqdm": "tqdm", "PIL": "pillow", "matplotlib": "matplotlib", "tensorboard": "tensorboard"}


def main() -> int:
    """Run the command; returns its exit code."""
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
