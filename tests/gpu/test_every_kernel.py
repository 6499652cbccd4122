"""every_kernel.py, which compute-sanitizer is given, runs every kernel that docs/cuda.md lists."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import kernelmeta as km

ROOT = Path(__file__).resolve().parents[2]
REASON = km.backends()["cuda"].reason


@pytest.mark.skipif(bool(REASON), reason=f"needs a GPU: {REASON}")
def test_the_script_runs_every_kernel() -> None:
    table = set(re.findall(r"^\| `(\w+)` \|[\d |]+\|$", (ROOT / "docs/cuda.md").read_text(), re.MULTILINE))
    command = [sys.executable, str(Path(__file__).with_name("every_kernel.py")), "--kernels"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ran = set(re.findall(r"(\w+?)_kernel<", done.stdout))
    assert table <= ran, f"not run: {sorted(table - ran)}"
