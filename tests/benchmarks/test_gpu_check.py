"""gpu_check without a GPU: time limits, what is saved, what is not built again."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu_check
from benchmarks.gpu_check import Step, check, run


def is_alive(pid: int) -> bool:
    """Zombies, which nobody has collected yet, are not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("then", ["wait", "true"])
def test_a_step_leaves_no_process_behind(then: str) -> None:
    found = run(Step(["sh", "-c", f"sleep 60 & echo $!; {then}"], 1), 1)
    child = int(found["end"])
    assert found["status"] == ("0" if then == "true" else "not finished in 1 s")
    end = time.monotonic() + 5
    while is_alive(child) and time.monotonic() < end:
        time.sleep(0.05)
    assert not is_alive(child)


def test_what_a_step_said_before_its_end_is_kept() -> None:
    code = "import os, time; print('so far', os.environ['JAX_PLATFORMS']); time.sleep(60)"
    found = run(Step([sys.executable, "-c", code], 3), 3)
    assert found["end"] == "so far cpu\n"


def test_a_command_that_is_not_there() -> None:
    assert run(Step(["/no/such/tool"], 1), 1)["status"] == "could not be run"


def test_the_record_is_written_after_every_step(tmp_path: Path) -> None:
    record, measured = tmp_path / "record.json", tmp_path / "measured.json"
    show = f"print(open({str(record)!r}).read())"
    every = {
        "build": Step(["false"], 5),
        "cells": Step([sys.executable, "-c", f"open({str(measured)!r}, 'w').write('[1]'); exit(3)"], 20),
        "tests": Step([sys.executable, "-c", show], 20),
        "late": Step(["true"], 5),
    }
    arguments = (every, ["build", "tests", "cells"], 60, {"steps": {}}, record, measured)
    assert check(*arguments, built=lambda: True) == 1
    found = json.loads(record.read_text())
    assert {name: step["status"] for name, step in found["steps"].items()} == {"build": "0", "cells": "3", "tests": "0"}
    assert found["measured"] == [1]
    assert json.loads(found["steps"]["tests"]["end"])["steps"].keys() == {"build", "cells"}
    assert check(*arguments, built=lambda: False) == 1
    assert list(json.loads(record.read_text())["steps"]) == ["build", "cells", "tests"]


def test_a_failed_build_ends_it_and_no_time_is_no_start(tmp_path: Path) -> None:
    every = {"build": Step(["false"], 5), "tests": Step(["true"], 5)}
    record = tmp_path / "record.json"
    assert check(every, list(every), 60, {"steps": {}}, record, tmp_path / "none", built=lambda: False) == 1
    assert list(json.loads(record.read_text())["steps"]) == ["build"]
    assert check(every, ["tests"], 1, {"steps": {}}, record, tmp_path / "none") == 1
    assert json.loads(record.read_text())["steps"]["tests"]["status"] == "not started: no time left"


@pytest.mark.parametrize(
    ("architectures", "sources", "there", "expected"),
    [
        ([80, 90], "now", True, True),
        ([80], "now", True, False),
        ([90], "before", True, False),
        ([90], "now", False, False),
    ],
)
def test_a_library_for_the_card_is_not_built_again(
    architectures: list[int], sources: str, there: bool, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    native = tmp_path / "kernelmeta/_native"
    native.mkdir(parents=True)
    (native / "build.json").write_text(json.dumps({"cuda_architectures": architectures, "sources": sources}))
    if there:
        (native / "libkernelmeta_cuda.so").touch()
    monkeypatch.syspath_prepend(str(gpu_check.metadata.ROOT / "build_backend"))
    pytest.importorskip("setuptools")
    import kernelmeta_build

    monkeypatch.setattr(kernelmeta_build, "fingerprint", lambda root: "now")
    monkeypatch.setattr(gpu_check.metadata, "ROOT", tmp_path)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    assert gpu_check.is_built() == expected


def test_results_go_where_out_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUT", str(tmp_path))
    assert gpu_check.results_path("NVIDIA H100") == tmp_path / "gpu-check.json"
    monkeypatch.delenv("OUT")
    assert gpu_check.results_path("NVIDIA H100 80GB HBM3").name.startswith("nvidia-h100-80gb-hbm3-20")
    assert os.environ.get("OUT") is None
