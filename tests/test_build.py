"""What an installation does where something is missing or broken, and what it says about it."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="not in a source tree")
needs_tools = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("setuptools", "pybind11", "cmake", "ninja")),
    reason="setuptools, pybind11, cmake and ninja are not all installed",
)


@pytest.fixture
def build_backend(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("setuptools")
    monkeypatch.syspath_prepend(str(ROOT / "build_backend"))
    monkeypatch.delenv("KERNELMETA_BUILD", raising=False)
    return importlib.import_module("kernelmeta_build")


def without_torch(name: str) -> None:
    assert name == "torch"


def test_torch_is_found_beside_the_interpreter_of_an_isolated_build(
    build_backend: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_backend.importlib.util, "find_spec", without_torch)
    found = build_backend.find_torch()
    assert found.directory == Path(torch.__file__).parent
    assert found.version == torch.__version__


@pytest.mark.parametrize("hook", ["get_requires_for_build_wheel", "get_requires_for_build_editable"])
def test_torch_is_a_build_requirement_only_where_there_is_none(
    build_backend: ModuleType, monkeypatch: pytest.MonkeyPatch, hook: str
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(build_backend, "find_torch", lambda: None)
    monkeypatch.setattr(build_backend.build_meta, hook, lambda config: ["from-setuptools"])
    requirements = getattr(build_backend, hook)
    assert {r.split(">")[0] for r in requirements()} == {
        "from-setuptools", "cmake", "ninja", "pybind11", "torch"
    }  # fmt: skip
    here = build_backend.TorchInstallation("2.13", Path("/"))
    monkeypatch.setattr(build_backend, "find_torch", lambda: here)
    assert not any(r.startswith("torch") for r in requirements())
    monkeypatch.setenv("KERNELMETA_BUILD", "none")
    assert requirements() == ["from-setuptools"]


def test_unknown_choice(build_backend: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERNELMETA_BUILD", "gpu")
    with pytest.raises(SystemExit, match="'gpu'; accepted are auto, cpu, cuda, none"):
        build_backend.build_choice()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what a build needs, as `git clone` would give it, in a folder whose name has a space."""
    tree = tmp_path / "a tree"
    for name in ("build_backend", "csrc", "kernelmeta"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "_native"))
    for name in ("CMakeLists.txt", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, tree)
    return tree


def build(tree: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`setup.py build` (or another command), for what must fail or must not compile anything."""
    environment = {"KERNELMETA_BUILD": "auto", **environment}
    return subprocess.run(
        [sys.executable, "setup.py", "-q", *(command or ("build", "--build-lib", "out"))],
        cwd=tree,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


@needs_tools
def test_auto_without_a_compiler_gives_a_package_that_knows_why(tree: Path) -> None:
    done = build(tree, CXX="no-such-compiler")
    assert done.returncode == 0, done.stderr
    report = json.loads((tree / "out/kernelmeta/_native/build.json").read_text())
    assert report["cpu"] is False
    assert "no C++ compiler" in report["reason"]
    assert "no-such-compiler" in report["reason"]
    assert (tree / "out/kernelmeta/backends.py").is_file()
    assert not list((tree / "out").rglob("*.so"))


@needs_tools
def test_cpu_without_a_compiler_fails(tree: Path) -> None:
    done = build(tree, CXX="no-such-compiler", KERNELMETA_BUILD="cpu")
    assert done.returncode != 0
    assert "KERNELMETA_BUILD=cpu cannot be built: no C++ compiler" in done.stderr


@needs_tools
@pytest.mark.slow
def test_a_compile_error_fails_the_install(tree: Path) -> None:
    if not shutil.which("c++"):
        pytest.skip("no C++ compiler")
    (tree / "csrc/cpu/kernels.cpp").write_text("#error broken on purpose\n")
    done = build(tree)
    assert done.returncode != 0
    assert "broken on purpose" in done.stdout + done.stderr
    assert not (tree / "out/kernelmeta/_native/build.json").exists()


@needs_tools
def test_cuda_without_nvcc_fails(tree: Path) -> None:
    if not shutil.which("c++"):
        pytest.skip("no C++ compiler")
    done = build(tree, KERNELMETA_BUILD="cuda", CUDACXX="no-such-nvcc")
    assert done.returncode != 0
    assert "KERNELMETA_BUILD=cuda cannot be built: no nvcc was found" in done.stderr


@needs_tools
def test_architectures_that_are_none_are_refused(tree: Path) -> None:
    if not shutil.which("c++"):
        pytest.skip("no C++ compiler")
    done = build(tree, KERNELMETA_BUILD="cuda", CUDACXX=sys.executable, TORCH_CUDA_ARCH_LIST="9.0;Hopper")
    assert done.returncode != 0
    assert "TORCH_CUDA_ARCH_LIST is '9.0;Hopper'; accepted are compute capabilities" in done.stderr


def carried(tree: Path, sources: str) -> Path:
    """A library that was built elsewhere, in its place."""
    native = tree / "kernelmeta/_native"
    native.mkdir()
    (native / "libkernelmeta_cpu.so").write_text("carried")
    (native / "build.json").write_text(json.dumps({"cpu": True, "sources": sources}))
    return native / "libkernelmeta_cpu.so"


@needs_tools
def test_a_failing_build_leaves_what_was_there(tree: Path) -> None:
    if not shutil.which("c++"):
        pytest.skip("no C++ compiler")
    library = carried(tree, "others")
    (tree / "CMakeLists.txt").write_text("message(FATAL_ERROR broken)\n")
    assert build(tree, "build_ext", "--inplace", KERNELMETA_BUILD="cpu").returncode != 0
    assert library.read_text() == "carried"


@needs_tools
def test_kernels_of_these_sources_stay_where_nothing_can_be_compiled(tree: Path, build_backend: ModuleType) -> None:
    library = carried(tree, build_backend.fingerprint(tree))
    assert build(tree, "build_ext", "--inplace", CXX="no-such-compiler").returncode == 0
    assert library.read_text() == "carried"
    with (tree / "csrc/module.cpp").open("a") as source:
        source.write("// changed\n")
    assert build(tree, "build_ext", "--inplace", CXX="no-such-compiler").returncode == 0
    assert not library.exists()
    report = json.loads(library.with_name("build.json").read_text())
    assert "no C++ compiler" in report["reason"]


def program(path: Path, said: str) -> Path:
    """An executable that says something, whatever it is told."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\nprintf '{said}'\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("cards", "asked", "compiled"),
    [
        ("9.0\\n9.0\\n8.0\\n", "", [80, 90]),  # the cards that are there
        ("13.2\\n", "", [120]),  # a card newer than the compiler: by the PTX of the newest
        ("9.0\\n", "all", [80, 90, 100, 120]),  # for a wheel
        ("9.0\\n", "8.0;9.0+PTX", [80, 90]),
        ("", "", [80, 90, 100, 120]),  # no card
    ],
)
def test_architectures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cards: str, asked: str, compiled: list[int]
) -> None:
    pytest.importorskip("setuptools")
    monkeypatch.syspath_prepend(str(ROOT / "build_backend"))
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    setup = importlib.util.spec_from_file_location("kernelmeta_setup", ROOT / "setup.py")
    assert setup is not None
    assert setup.loader is not None
    module = importlib.util.module_from_spec(setup)
    setup.loader.exec_module(module)
    nvcc = program(tmp_path / "bin/nvcc", "compute_75\\ncompute_80\\ncompute_90\\ncompute_100\\ncompute_120\\n")
    if cards:
        program(tmp_path / "bin/nvidia-smi", cards)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/bin:/usr/bin" if cards else str(tmp_path / "bin"))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    assert module.cuda_architectures(str(nvcc)) == compiled


def test_what_a_run_leaves_in_the_tree_does_not_change_what_the_linter_says(tmp_path: Path) -> None:
    """`make demo` makes runs/, which has the name of a module of the tests."""
    ruff = shutil.which("ruff", path=os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]]))
    if ruff is None:
        pytest.skip("ruff is not installed")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__", "vectors"))
    imported = {
        name
        for path in (tmp_path / "tests").rglob("*.py")
        for name in re.findall(r"^(?:from|import) (\w+)", path.read_text(), re.MULTILINE)
    }
    assert "runs" in imported
    for name in imported - {"benchmarks", "kernelmeta"}:
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "results.py").touch()
    done = subprocess.run([ruff, "check", "--no-cache", "tests"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@needs_tools
@pytest.mark.slow
def test_installed_without_kernels_it_works_and_says_why(tree: Path, tmp_path: Path) -> None:
    (tree / "build/lib/kernelmeta").mkdir(parents=True)
    target = tmp_path / "target"
    environment = {**os.environ, "KERNELMETA_BUILD": "none", "PYTHONPATH": ""}
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--target", str(target), str(tree)], env=environment, check=True)
    assert not list(target.rglob("*.so"))
    code = (
        "import kernelmeta as km; from kernelmeta import info, backends\n"
        "from kernelmeta.backends import select\n"
        "print(km.__file__); print(km.backends()['cpu'].reason); print(select('cpu'), select('cpu'))\n"
        "assert km.backends()['cpu'].reason in info.text()"
    )
    environment["PYTHONPATH"] = str(target)
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    path, reason, chosen = done.stdout.splitlines()
    assert Path(path).is_relative_to(target)
    assert reason == "the install was asked for no kernels (KERNELMETA_BUILD=none)"
    assert chosen == "reference reference"
    assert done.stderr.count("RuntimeWarning") == 1


def test_an_import_brings_no_package_that_takes_time() -> None:
    """What plots, reads images or talks to scikit-learn is imported by what needs it, and so are parts of PyTorch that
    PyTorch itself does not import."""
    code = "import sys, torch; before = {*sys.modules}; import kernelmeta; print(*({*sys.modules} - before))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    brought = {name.partition(".")[0] for name in done.stdout.split()}
    assert "kernelmeta" in brought
    assert brought - sys.stdlib_module_names <= {"kernelmeta", "numpy", "safetensors"}
