"""Benchmarks: every op beside its peers (peers.py) and the machine's own limits (floors.py).

They time the kernelmeta that Python finds, which beside this folder is that of the source tree; with ``--installed``
the one that is installed, wherever they are started.
"""

import sys
from pathlib import Path

if "--installed" in sys.argv[1:]:
    _tree, _path = Path(__file__).resolve().parent.parent, sys.path[:]
    sys.path[:] = [entry for entry in _path if Path(entry).resolve() != _tree]
    try:
        import kernelmeta  # noqa: F401 (every later import finds it loaded)
    finally:
        sys.path[:] = _path
