"""Drives the one CMake build; everything that is not native is in pyproject.toml.

``KERNELMETA_BUILD`` = auto (default) | cpu | cuda | none. "auto" gives a package without kernels only
where there is no C++ compiler or no PyTorch to compile against, and one without CUDA kernels only where
there is no nvcc; any other trouble fails the install. No GPU is needed. What was built, or why not, is
written to kernelmeta/_native/build.json, because pip hides the output.

``TORCH_CUDA_ARCH_LIST`` names the compute capabilities to compile for ("8.0;9.0", "80 90+PTX"), or "all": those of
`CUDA_ARCHITECTURES` that the compiler knows. Without it they are those of the cards in this machine, and all of them
where there is no card. The newest of them gets PTX too.

What an earlier build left in the package is replaced once the new one is complete, and not before.
"""

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
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_backend"))

from kernelmeta_build import TorchInstallation, build_choice, find_torch, fingerprint  # noqa: E402

NATIVE = "kernelmeta/_native"
CUDA_ARCHITECTURES = (80, 86, 89, 90, 100, 120)


def missing_for_a_build(torch: TorchInstallation | None) -> str | None:
    """What this machine lacks for a native build, as a sentence, or None if it lacks nothing."""
    compilers = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    if not any(shutil.which(name) for name in compilers):
        return f"no C++ compiler was found at install time (looked for {', '.join(compilers)})"
    if torch is None:
        return "no PyTorch was found to compile against at install time"
    if not (torch.directory / "include/torch/csrc/stable/library.h").is_file():
        return f"the PyTorch {torch.version} found at install time has no headers of the stable ABI"
    return None


def find_nvcc() -> str | None:
    """CUDA's compiler: ``CUDACXX``, else in ``CUDA_HOME``, on PATH, or where CUDA installs itself."""
    named = os.environ.get("CUDACXX")
    if named:
        return shutil.which(named)
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    folders = [f"{home}/bin"] if home else [os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"]
    return shutil.which("nvcc", path=os.pathsep.join(folders))


def cards() -> set[int]:
    """Compute capabilities of the NVIDIA cards in this machine; empty where there is none, or no driver."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return set()
    command = [smi, "--query-gpu=compute_cap", "--format=csv,noheader"]
    said = subprocess.run(command, capture_output=True, text=True).stdout
    return {int(major + minor) for major, minor in re.findall(r"^(\d+)\.(\d)$", said, re.MULTILINE)}


def cuda_architectures(nvcc: str) -> list[int]:
    """What to compile for, in ascending order."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").lower().replace("+ptx", "").replace(".", "").strip()
    if asked not in ("", "all"):
        names = asked.replace(";", " ").replace(",", " ").split()
        try:
            return sorted({int(name.rstrip("af")) for name in names})
        except ValueError:
            raise SystemExit(
                f"kernelmeta: TORCH_CUDA_ARCH_LIST is {os.environ['TORCH_CUDA_ARCH_LIST']!r}; accepted are compute"
                " capabilities like '8.0;9.0', or 'all'"
            ) from None
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    known = {int(name.removeprefix("compute_")) for name in listed if name.removeprefix("compute_").isdigit()}
    if not asked:
        # A card that this compiler does not know yet runs the PTX of the newest architecture that it does.
        here = {max((a for a in known if a <= card), default=card) for card in cards()}
        if here:
            return sorted(here)
    return [a for a in CUDA_ARCHITECTURES if a in known]


def tool(name: str) -> str:
    """Path of a build tool: the one beside this environment's packages, else the one on PATH."""
    scripts = sysconfig.get_path("scripts")  # not on PATH where the environment is not activated
    path = shutil.which(name, path=os.pathsep.join([scripts, os.environ.get("PATH", os.defpath)]))
    if path is None:
        raise SystemExit(
            f"kernelmeta: '{name}' is needed to compile the kernels and was not found. Install it"
            " (pip install cmake ninja pybind11), or install without --no-build-isolation, or set"
            " KERNELMETA_BUILD=none"
        )
    return path


class BuildPy(build_py):
    """Starts from an empty folder, so that no file of an earlier build gets into the wheel."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / "kernelmeta", ignore_errors=True)
        super().run()


class BuildNative(build_ext):
    """Configures, builds and installs CMake's targets into the package."""

    def run(self) -> None:
        package_root = ROOT if self.inplace or self.editable_mode else Path(self.build_lib).resolve()
        choice = build_choice()
        torch = None if choice == "none" else find_torch()
        reason = "the install was asked for no kernels (KERNELMETA_BUILD=none)"
        if choice != "none":
            reason = missing_for_a_build(torch) or ""
        nvcc = find_nvcc() if choice in ("auto", "cuda") and not reason else None
        without_cuda = reason or (
            "the install was asked for no CUDA kernels (KERNELMETA_BUILD=cpu)"
            if choice == "cpu"
            else "no nvcc was found at install time (CUDACXX, CUDA_HOME, PATH, /usr/local/cuda)"
        )
        if choice in ("cpu", "cuda") and (reason or (choice == "cuda" and not nvcc)):
            raise SystemExit(f"kernelmeta: KERNELMETA_BUILD={choice} cannot be built: {reason or without_cuda}")
        report: dict[str, Any] = {
            "requested": choice, "cpu": not reason, "reason": reason, "cuda": nvcc is not None,
            "cuda_reason": "" if nvcc else without_cuda, "cuda_architectures": [], "module": False, "torch": None,
            "sources": fingerprint(ROOT),
        }  # fmt: skip
        built = None
        if not reason:
            assert torch is not None
            report["torch"] = torch.version
            report["module"] = self.has_python_headers()
            if nvcc:
                report["cuda_architectures"] = cuda_architectures(nvcc)
            built = self.cmake(
                torch, module=report["module"], nvcc=nvcc, architectures=report["cuda_architectures"]
            )  # fmt: skip
        elif choice == "auto" and self.has_these_kernels(package_root, report["sources"]):
            self.announce(f"kernelmeta: the kernels that are there stay: {reason}", level=3)
            return
        else:
            self.announce(f"kernelmeta: no kernels are built: {reason}", level=3)
        self.replace(package_root, built, report)

    @staticmethod
    def has_these_kernels(package_root: Path, sources: str) -> bool:
        """Whether the package holds kernels built from these sources, here or on another machine."""
        path = package_root / NATIVE / "build.json"
        found = json.loads(path.read_text()) if path.is_file() else {}
        return bool(found.get("cpu")) and found.get("sources") == sources

    @staticmethod
    def replace(package_root: Path, built: Path | None, report: dict[str, Any]) -> None:
        """Put what was built (or nothing) in the place of what the package has."""
        native = package_root / NATIVE
        shutil.rmtree(native, ignore_errors=True)
        for old in native.parent.glob("_C.*.so"):
            old.unlink()
        native.mkdir(parents=True)
        if built is not None:
            shutil.copytree(built / "kernelmeta", native.parent, dirs_exist_ok=True)
        (native / "build.json").write_text(json.dumps(report, indent=2) + "\n")

    @staticmethod
    def has_python_headers() -> bool:
        """Whether the pybind11 module can be built; the kernels themselves need no Python headers."""
        return (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file()

    def cmake(self, torch: TorchInstallation, *, module: bool, nvcc: str | None, architectures: list[int]) -> Path:
        """The folder that holds what was built, laid out as in the package."""
        cmake, ninja = tool("cmake"), tool("ninja")
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        # Paths of tools are given anew each time: an isolated build's are gone when the next one starts.
        options = {
            "CMAKE_BUILD_TYPE": os.environ.get("CMAKE_BUILD_TYPE", "Release"),
            "CMAKE_MAKE_PROGRAM": ninja,
            "KERNELMETA_VERSION": self.distribution.get_version(),
            "KERNELMETA_TORCH_DIR": torch.directory,
            "KERNELMETA_TORCH_VERSION": torch.version,
            "KERNELMETA_LIBRARY": "ON",
            "KERNELMETA_CUDA": "ON" if nvcc else "OFF",
            "KERNELMETA_CUDA_ARCHITECTURES": ",".join(map(str, architectures)),  # a list with ";" would be cut
            "KERNELMETA_MODULE": "ON" if module else "OFF",
            "Python_EXECUTABLE": sys.executable,
        }
        if nvcc:
            options["CMAKE_CUDA_COMPILER"] = nvcc
        if module:
            if importlib.util.find_spec("pybind11") is None:
                tool("pybind11-config")  # raises: names what to install
            import pybind11

            options["pybind11_DIR"] = pybind11.get_cmake_dir()
        configure: list[str | Path] = [cmake, "-S", ROOT, "-B", build, "-G", "Ninja"]
        self.call([*configure, *(f"-D{name}={value}" for name, value in options.items())])
        self.call([cmake, "--build", build])
        built = build / "built"
        shutil.rmtree(built, ignore_errors=True)
        self.call([cmake, "--install", build, "--prefix", built])
        return built

    def call(self, command: list[str | Path]) -> None:
        self.announce(" ".join(map(str, command)), level=2)
        done = subprocess.run(command)
        if done.returncode:
            raise SystemExit(f"kernelmeta: the native build failed (exit status {done.returncode})")

    def get_outputs(self) -> list[str]:
        return sorted(map(str, (Path(self.build_lib) / NATIVE).glob("*")))

    def get_output_mapping(self) -> dict[str, str]:
        return {}


setup(
    ext_modules=[Extension("kernelmeta._C", sources=[])],
    cmdclass={"build_ext": BuildNative, "build_py": BuildPy},
)
