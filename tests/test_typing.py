"""What a type checker knows of the public functions: their results are not anything."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import torch
import kernelmeta as km

x, y = torch.randn(1, 5, 4), torch.arange(5).view(1, 5)
one = torch.ones(1)
mlp = km.MLPParameters(*[torch.ones(1)] * 10)
head: km.nn.SIB = km.nn.SIB(5, 4)
rows = km.Ragged(torch.tensor([0, 5]), torch.tensor([0, 5]))
program = km.nn.Program(5, 4, (), start="given")

def right() -> None:
    logits: torch.Tensor = km.ops.program(x, y, x, (), n_way=5, scale=one)
    logits, classifier = km.ops.program(x, y, x, (), n_way=5, scale=one, return_weights=True)
    weight: torch.Tensor = classifier.weight
    logits, alpha = km.ops.ridge(x, y, x, one, one, one, n_way=5, return_coefficients=True)
    logits = km.ops.sib(x, y, x, one, one, one, mlp, steps=1, inner_lr=0.1)
    logits, classifier = km.ops.linear_head(x, y, x, one, one, one, return_weights=True)
    logits = head(x, y, x)
    logits, classifier = head(x, y, x, return_weights=True)
    logits = km.nn.SoftKMeans(5)(x[0], y[0], x[0], ragged=rows)
    logits = program(None, None, x, start=x)
    logits, classifier = program(x, y, x, return_weights=True, start=x)
    logits = head.from_bank(x[0], y, y, y)
    loss: torch.Tensor = head.gradients(x, y, x, y).loss
"""

WRONG = [
    "km.ops.program(x, y, x, (), n_way=5, scale=one).no_such_method()",
    "km.ops.program(x, y, x, (), n_way=5, scale=one, return_weights=True).weight",
    "km.ops.program(x, y, x, (), n_way=5, scale=one, return_weights=True)[1].no_such_field",
    "km.ops.sib(x, y, x, one, one, one, mlp, steps=1, inner_lr=0.1).no_such_method()",
    "km.ops.sib_inner_loop(x, x, one, one, mlp, steps=1, inner_lr=0.1).no_such_method()",
    "km.ops.linear_head(x, y, x, one, one, one).no_such_method()",
    "km.ops.ridge(x, y, x, one, one, one, n_way=5).no_such_method()",
    "km.ops.class_means(x, y, 5).no_such_method()",
    "km.ops.synthetic_gradient_mlp(x, mlp).no_such_method()",
    "km.nn.Prototypes(5)(x, y, x).no_such_method()",
    "program(None, None, x, start=x).no_such_method()",
    "program(x, y, x, begin=x)",
    "head(x, y, x, return_weights=True)[1].no_such_field",
    "head.from_bank(x[0], y, y, y).no_such_method()",
    "head.gradients(x, y, x, y).no_such_field",
    "km.ops.program(x, y, x, (), n_way=5, scale=one, ragged=(y, y))",
]


FIRST = PROGRAM.count("\n") + 2  # of WRONG, counted from 1


def written(folder: Path) -> Path:
    program = folder / "program.py"
    program.write_text(PROGRAM + "\n" + "\n".join(WRONG) + "\n")
    return program


def test_mypy_knows_the_results(tmp_path: Path) -> None:
    pytest.importorskip("mypy", reason="mypy is not installed")
    # With the project's own settings, so that the linter's cache serves here too.
    command = [sys.executable, "-m", "mypy", str(written(tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    found = {int(line.split(":")[1]) for line in done.stdout.splitlines() if ": error:" in line}
    assert found == {FIRST + i for i in range(len(WRONG))}, done.stdout + done.stderr


def test_pyright_knows_the_results(tmp_path: Path) -> None:
    """As an editor does that knows nothing of this project's settings."""
    folder = Path(sys.executable).parent  # that of the environment, which need not be on the PATH
    candidates = [shutil.which(name, path=path) for name in ("pyright", "basedpyright") for path in (folder, None)]
    pyright = next(filter(None, candidates), None)
    if pyright is None:
        pytest.skip("neither pyright nor basedpyright is installed")
    root = Path(__file__).parents[1]
    settings = {"extraPaths": [str(root)], "typeCheckingMode": "standard"}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [pyright, "--outputjson", "--pythonpath", sys.executable, "--project", str(tmp_path)]
    written(tmp_path)
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    said = json.loads(done.stdout)["generalDiagnostics"]
    found = {d["range"]["start"]["line"] + 1 for d in said if d["severity"] == "error"}
    assert found == {FIRST + i for i in range(len(WRONG))}, done.stdout + done.stderr
