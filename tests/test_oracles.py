"""One list of oracles in every language, and the example of docs/programs.md, "Adding an oracle", on every backend."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from kernelmeta.phases import LABELLED, ORACLES

ROOT = Path(__file__).parents[1]
HEADER = ROOT / "csrc/engine/oracles.h"

sources = pytest.mark.skipif(not HEADER.exists(), reason="needs the source tree")


@sources
def test_lists_agree() -> None:
    text = HEADER.read_text()
    structs = {
        name: (oracle, label == "true")
        for name, oracle, label in re.findall(
            r"struct (\w+) \{\n  static constexpr Oracle kOracle = Oracle::k\1;\n"
            r'  static constexpr const char\* kName = "(\w+)";\n'
            r"  static constexpr bool kNeedsLabels = (\w+);",
            text,
        )
    }
    listed = re.search(r"using Oracles =\s*OracleList<([\w\s,]+)>;", text)
    assert listed is not None
    found = [structs[name] for name in re.findall(r"\w+", listed[1])]
    assert [name for name, _ in found] == list(ORACLES)
    assert {name for name, labelled in found if labelled} == set(LABELLED)


def test_triton_has_the_numbers() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from kernelmeta.triton import oracle_kernels

    without = oracle_kernels.WITHOUT_KERNELS
    numbers = {name: getattr(oracle_kernels, name.upper()).value for name in ORACLES if name not in without}
    assert numbers == {name: i for i, name in enumerate(ORACLES) if name not in without}
    assert set(without) < set(ORACLES)


@sources
def test_those_that_a_shift_of_the_logits_does_not_change_are_the_same() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from kernelmeta.triton import oracle_kernels

    (body,) = re.findall(r"constexpr bool blind_to_shift\(Oracle oracle\) \{(.*?)\}", HEADER.read_text(), re.S)
    names = dict(re.findall(r'kOracle = Oracle::(\w+);\n.*?kName = "(\w+)";', HEADER.read_text()))
    blind = {names[oracle] for oracle in re.findall(r"Oracle::(\w+)", body)}
    (condition,) = re.findall(
        r"# `blind_to_shift`.*?\n\s+if \((.*?)\):", (ROOT / "kernelmeta/triton/phase_kernels.py").read_text(), re.S
    )
    on_triton = {name.lower() for name in re.findall(r"ORACLE != (\w+)", condition)}
    assert len(blind) > 5
    assert on_triton == blind - set(oracle_kernels.WITHOUT_KERNELS)


# ---- the worked example


def blocks(step: str) -> list[str]:
    """The code of a step, by the file it names."""
    section = (ROOT / "docs/programs.md").read_text().split("## Adding an oracle")[1]
    text = re.split(r"\n\d\. \*\*`", section.split(f"**`{step}`**")[1])[0]
    return [textwrap.dedent(code) for code in re.findall(r"   ```\w+\n(.*?)   ```", text, re.S)]


def insert(path: Path, *changes: tuple[str, str]) -> None:
    """Every code before the (last) place where its text stands."""
    text = path.read_text()
    for before, code in changes:
        at = text.rindex(before)
        text = text[:at] + code + text[at:]
    path.write_text(text)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package and the sources with the example added, as the text says."""
    path = tmp_path_factory.mktemp("with collision")
    for folder in ("kernelmeta", "csrc"):
        shutil.copytree(ROOT / folder, path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "CMakeLists.txt", path)
    number, struct = blocks("csrc/engine/oracles.h")
    oracles = path / "csrc/engine/oracles.h"
    insert(oracles, ("  kEnd  //", textwrap.indent(number, "  ")), ("// An MLP's guess", struct + "\n"))
    oracles.write_text(re.sub(r"(using Oracles =[^;]*)>;", r"\1, Collision>;", oracles.read_text()))
    (name,) = blocks("kernelmeta/phases.py")
    insert(path / "kernelmeta/phases.py", ('}\nLABELLED = ("', textwrap.indent(name, "    ")))
    (gradient,) = blocks("kernelmeta/reference/program.py")
    insert(
        path / "kernelmeta/reference/program.py",
        ("    elif oracle not in GUESSED:", textwrap.indent(gradient, "    ")),
    )
    functions, forward, backward = blocks("kernelmeta/triton/oracle_kernels.py")
    triton = path / "kernelmeta/triton/oracle_kernels.py"
    insert(triton, ("@triton.jit\ndef oracle(", functions + "\n\n"))
    text = triton.read_text()
    for code in (forward, backward):
        variable = code.split("\n")[1].split()[0]
        last = f"    elif ORACLE == SOFT_ASSIGNMENT:\n        {variable} ="
        assert last in text
        text = text.replace(last, textwrap.indent(code, "    ") + last)
    triton.write_text(text)
    return path


PYTHON = """
import torch, kernelmeta as km
from kernelmeta.reference.program import oracle_gradient

torch.manual_seed(0)
z = torch.randn(2, 7, 3, dtype=torch.float64, requires_grad=True)
loss = -z.softmax(-1).square().sum() / 2 / 7
torch.testing.assert_close(oracle_gradient("collision", z, None, mean=True), torch.autograd.grad(loss, z)[0])

leaves = [torch.randn(2, 6, 9, dtype=torch.float64, requires_grad=True) for _ in range(2)]
labels, phases = torch.arange(3).repeat(2, 2), [km.nn.Phase("collision", 2, 0.5)]
scale = torch.full((1,), 10.0, dtype=torch.float64)
found = []
for backend in BACKENDS:
    with km.use_backend(backend):
        logits = km.ops.program(leaves[0], labels, leaves[1], phases, n_way=3, scale=scale)
    found.append([logits, *torch.autograd.grad(logits.square().sum(), leaves)])
torch.testing.assert_close(*found) if len(found) == 2 else None
"""


@sources
@pytest.mark.parametrize("backends", [("reference",), ("reference", "triton")], ids=["reference", "triton"])
def test_worked_example(copy: Path, backends: tuple[str, ...]) -> None:
    if "triton" in backends:
        pytest.importorskip("triton", reason="Triton is not installed")
    environment = {**os.environ, "PYTHONPATH": str(copy), "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("KERNELMETA_BACKEND", None)
    command = [sys.executable, "-c", PYTHON.replace("BACKENDS", repr(backends))]
    done = subprocess.run(command, env=environment, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@sources
@pytest.mark.rare
def test_worked_example_compiled(copy: Path) -> None:
    """Step 1 with nothing forgotten: on a CPU core and lane by lane; and with the list forgotten: an error."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    build = ["-B", "build", "-G", "Ninja", "-DKERNELMETA_TESTS=ON", "-DKERNELMETA_CUDA=OFF"]
    for command in (
        ["cmake", "-S", ".", *build],
        ["cmake", "--build", "build", "--target", "worked_oracle"],
        ["build/csrc/tests/worked_oracle"],
    ):
        done = subprocess.run(
            command, cwd=copy, env={**os.environ, "PATH": tools}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr

    oracles = copy / "csrc/engine/oracles.h"
    whole = oracles.read_text()
    oracles.write_text(whole.replace(", Collision>;", ">;"))
    command = [*compiler.split(), "-std=c++20", "-fsyntax-only", "-Icsrc", "-x", "c++", "csrc/engine/oracles.h"]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    oracles.write_text(whole)
    assert done.returncode != 0
    assert "every oracle of the enum has its struct in the list" in done.stderr


@sources
def test_a_kernel_without_the_oracle_does_not_compile(copy: Path) -> None:
    """Triton, whose last branch was taken for whatever it did not know."""
    pytest.importorskip("triton", reason="Triton is not installed")
    without = copy / "kernelmeta/triton/oracle_kernels.py"
    whole = without.read_text()
    without.write_text((ROOT / "kernelmeta/triton/oracle_kernels.py").read_text())
    environment = {**os.environ, "PYTHONPATH": str(copy), "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("KERNELMETA_BACKEND", None)
    command = [sys.executable, "-c", PYTHON.replace("BACKENDS", "('triton',)")]
    done = subprocess.run(command, env=environment, cwd=copy, capture_output=True, text=True)
    without.write_text(whole)
    assert done.returncode != 0
    assert "this oracle has no Triton kernel" in done.stderr
