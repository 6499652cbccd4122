"""The Python code that the documentation shows runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = ("README.md", "docs/learners.md", "docs/programs.md", "docs/glyphs.md")
BLOCKS = [
    pytest.param(block, id=f"{name}-{i}")
    for name in FILES
    for i, block in enumerate(
        re.findall(r"^```python\n(.*?)^```", (ROOT / name).read_text(encoding="utf-8"), re.M | re.S)
    )
]


@pytest.mark.parametrize("block", BLOCKS)
def test_the_code_runs(block):
    # Together with the imports that an earlier block of the file may have made.
    exec(compile(f"import torch\nimport kernelmeta as km\n{block}", "documentation", "exec"), {})
