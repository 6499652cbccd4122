"""The kernels against the oldest PyTorch that is supported: python tools/abi_test.py 2.10.0 (`make abi-test`).

Of that wheel, which is downloaded into build/, only the headers and one library are taken. The CPU library is
compiled against these headers; every function that it calls must be in that library; and what was compiled must
agree with the reference when the PyTorch that is installed loads it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = "torch/lib/libtorch_cpu.so"


def unpacked(version: str, folder: Path) -> Path:
    """The folder ``torch`` of that version, with its headers and one library."""
    if not list(folder.glob("torch-*.whl")):
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, f"torch=={version}"]
        subprocess.run(pip, check=True)
    with zipfile.ZipFile(next(folder.glob("torch-*.whl"))) as wheel:
        names = [name for name in wheel.namelist() if name.startswith("torch/include/") or name == LIBRARY]
        wheel.extractall(folder, [name for name in names if not (folder / name).exists()])
    return folder / "torch"


def symbols(library: Path, which: str) -> set[str]:
    """The functions that a shared library defines, or that it asks others for; of PyTorch's C interface."""
    said = subprocess.run(["nm", "-D", f"--{which}-only", library], check=True, capture_output=True, text=True).stdout
    return set(re.findall(r" [TtUWwVv] ((?:aoti_)?torch_\w+)", said))


def main() -> None:
    version = sys.argv[1]
    folder = ROOT / "build" / f"torch-{version}"
    folder.mkdir(parents=True, exist_ok=True)
    torch = unpacked(version, folder)
    scripts = Path(sys.executable).parent
    options = {
        "CMAKE_MAKE_PROGRAM": scripts / "ninja",
        "KERNELMETA_TORCH_DIR": torch,
        "KERNELMETA_TORCH_VERSION": version,
        "KERNELMETA_MODULE": "OFF",
    }
    build = ROOT / f"build/cmake-torch-{version}"
    configure = [scripts / "cmake", "-S", ROOT, "-B", build, "-G", "Ninja"]
    subprocess.run([*configure, *(f"-D{name}={value}" for name, value in options.items())], check=True)
    subprocess.run([scripts / "cmake", "--build", build, "--target", "kernelmeta_cpu"], check=True)
    built = build / "libkernelmeta_cpu.so"
    asked = symbols(built, "undefined")
    missing = sorted(asked - symbols(folder / LIBRARY, "defined"))
    if missing or not asked:
        raise SystemExit(f"PyTorch {version} lacks {', '.join(missing) or 'everything'}")
    print(f"PyTorch {version} has all {len(asked)} functions of its that the library calls")
    # In the place of the library that is installed, outside of the source tree.
    with tempfile.TemporaryDirectory() as name:
        package, smoke = Path(name) / "kernelmeta", Path(name) / "tried/here/smoke.py"
        shutil.copytree(ROOT / "kernelmeta", package, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(built, package / "_native")
        smoke.parent.mkdir(parents=True)
        shutil.copy(ROOT / ".ci/smoke.py", smoke)
        subprocess.run([sys.executable, smoke, "cpu"], cwd=name, env={**os.environ, "PYTHONPATH": name}, check=True)


if __name__ == "__main__":
    main()
