"""What runs where: choice, forcing, the reasons given, and the one warning."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import timeit
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import kernelmeta as km
from kernelmeta import info
from kernelmeta.backends import NAMES, _no_build, select, use_backend

CPU = km.backends()["cpu"]
needs_kernels = pytest.mark.skipif(not CPU.available, reason=f"no CPU kernels: {CPU.reason}")


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True
    )


def test_every_backend_is_listed_and_says_why_it_cannot_run() -> None:
    found = km.backends()
    assert tuple(found) == NAMES
    for backend in found.values():
        assert backend.available == (not backend.reason)
    assert found["reference"].available


@needs_kernels
def test_automatic_choice_prefers_kernels() -> None:
    assert select("cpu") == "cpu"
    assert CPU.details["instruction_set"] in ("avx512", "avx2", "sse2", "neon", "generic")


def test_forcing_holds_inside_the_block_only() -> None:
    before = select("cpu")
    with use_backend("reference"):
        assert select("cpu") == "reference"
        with use_backend(None):
            assert select("cpu") == before
        assert select("cpu") == "reference"
    assert select("cpu") == before


def test_plain_call_forces_until_the_next() -> None:
    before = select("cpu")
    use_backend("reference")
    try:
        assert select("cpu") == "reference"
    finally:
        use_backend(None)
    assert select("cpu") == before


def test_forcing_is_undone_by_an_exception() -> None:
    before = select("cpu")
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert select("cpu") == before


@needs_kernels
def test_threads_do_not_see_each_others_choice() -> None:
    seen: list[str] = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(select("cpu")))
        thread.start()
        thread.join()
    assert seen == ["cpu"]


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match=r"'gpu'.*cpu, cuda, triton, reference"):
        use_backend("gpu")


def test_a_backend_that_cannot_run_is_an_error_with_the_reason() -> None:
    for name, backend in km.backends().items():
        if not backend.available:
            with pytest.raises(RuntimeError, match=f"'{name}' cannot run: ") as caught:
                use_backend(name)
            assert backend.reason in str(caught.value)


@needs_kernels
def test_a_forced_backend_refuses_tensors_of_other_devices() -> None:
    with use_backend("cpu"), pytest.raises(RuntimeError, match="'cpu' is forced and does not take cuda"):
        select("cuda")


@needs_kernels
def test_select_is_quick() -> None:
    seconds = min(timeit.repeat(lambda: select("cpu"), number=10_000, repeat=5)) / 10_000
    assert seconds < 1e-6


@needs_kernels
def test_compiled_code_follows_the_choice() -> None:
    @torch.compile(fullgraph=True, backend="eager")
    def marked(x: torch.Tensor) -> torch.Tensor:
        return x + (1 if select(x.device.type) == "cpu" else 2)

    @torch.compile(fullgraph=True, backend="eager")
    def forced_inside(x: torch.Tensor) -> torch.Tensor:
        with use_backend("reference"):
            return x + (1 if select(x.device.type) == "cpu" else 2)

    x = torch.zeros(())
    assert marked(x) == 1
    with use_backend("reference"):
        assert marked(x) == 2
    assert marked(x) == 1
    assert forced_inside(x) == 2
    assert marked(x) == 1
    assert select("cpu") == "cpu"


def test_environment_forces_in_every_thread() -> None:
    done = run_python(
        "import threading; from kernelmeta.backends import select\n"
        "t = threading.Thread(target=lambda: print(select('cpu'))); t.start(); t.join()",
        KERNELMETA_BACKEND="reference",
    )
    assert done.stdout.split() == ["reference"], done.stderr


@pytest.mark.cuda_build
@pytest.mark.parametrize(("name", "message"), [("gpu", "'gpu'; accepted are"), ("cuda", "'cuda' cannot run: ")])
def test_environment_naming_what_cannot_run_is_an_error_of_the_first_op(name: str, message: str) -> None:
    if km.backends().get(name) and km.backends()[name].available:
        pytest.skip(f"{name} runs here")
    done = run_python(
        "import kernelmeta; from kernelmeta.backends import select; print('imported'); select('cpu')",
        KERNELMETA_BACKEND=name,
    )
    assert done.returncode == 1
    assert "imported" in done.stdout
    assert message in done.stderr.splitlines()[-1]


# A package whose library is missing, without building one: the library is hidden from this process.
WITHOUT_LIBRARY = """
import sys, warnings, torch
def missing(path): raise OSError("libsomething.so: cannot open shared object file")
torch.ops.load_library = missing
import kernelmeta as km
from kernelmeta.backends import select, use_backend
"""


def test_without_kernels_it_runs_and_says_so_once() -> None:
    done = run_python(
        WITHOUT_LIBRARY
        + """
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    with use_backend("reference"): select("cpu")
    print(len(caught))
    print(select("cpu"), select("cpu"), len(caught), caught[0].message)
"""
    )
    first, second = done.stdout.splitlines()
    assert first == "0"
    assert second.startswith("reference reference 1 kernelmeta runs its plain PyTorch reference")
    assert km.backends()["cpu"].reason in second or "cannot open shared object file" in second


def test_sources_are_told_from_what_was_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script in the clone finds kernelmeta/ there, which has no kernels."""
    site, native = tmp_path / "site", tmp_path / "clone" / "kernelmeta" / "_native"
    monkeypatch.setattr(sys.modules["kernelmeta.backends"], "NATIVE", native)
    monkeypatch.setattr(sys, "path", [str(site)])
    assert _no_build().endswith("install the package (pip install .)")
    built = site / "kernelmeta" / "_native" / "build.json"
    built.parent.mkdir(parents=True)
    built.write_text("{}")
    assert _no_build() == (
        f"{native.parent} are the sources; the package is in {site}, and found from any other folder"
    )


def test_without_kernels_compiled_code_says_so_too() -> None:
    done = run_python(
        WITHOUT_LIBRARY
        + """
warnings.simplefilter("always")
f = torch.compile(lambda x: x + (select(x.device.type) == "reference"), fullgraph=True, backend="eager")
print(f(torch.zeros(())).item(), f(torch.zeros(())).item())
"""
    )
    assert done.stdout.split() == ["1.0", "1.0"], done.stderr
    assert done.stderr.count("RuntimeWarning: kernelmeta runs its plain PyTorch reference") == 1


@needs_kernels
@pytest.mark.parametrize("isa", ["avx512", "avx2", "sse2"])
def test_forced_instruction_set(isa: str) -> None:
    done = run_python(
        "import torch, kernelmeta as km\n"
        "cpu = km.backends()['cpu']; print(cpu.details.get('instruction_set'), cpu.reason)\n"
        "x = torch.arange(100.); cpu.available and print(torch.equal(torch.ops.kernelmeta.noop(x), x))",
        KERNELMETA_ISA=isa,
    )
    if "not among the compiled" in done.stdout or "this CPU cannot run" in done.stdout:
        pytest.skip(done.stdout.strip())
    assert done.stdout.split() == [isa, "True"], done.stderr


@needs_kernels
def test_an_instruction_set_that_is_not_there_is_an_error_not_a_slow_run() -> None:
    done = run_python(
        "from kernelmeta.backends import select\nselect('cpu')", KERNELMETA_ISA="mmx", KERNELMETA_BACKEND=""
    )
    assert done.returncode == 1
    assert "KERNELMETA_ISA=mmx: not among the compiled instruction sets" in done.stderr.splitlines()[-1]


def _strided() -> torch.Tensor:
    return torch.arange(24.0).view(4, 6)[:, ::2].t()


@needs_kernels
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.arange(7, dtype=torch.int64),
        lambda: torch.randn(3, 5, dtype=torch.bfloat16),
        lambda: torch.zeros(0, 4),
        lambda: torch.tensor(1.5),
        lambda: torch.randn(2).expand(3, 2),
        _strided,
    ],
)
def test_noop_goes_through_the_kernel_table(make: Callable[[], torch.Tensor]) -> None:
    x = make()
    y = torch.ops.kernelmeta.noop(x)
    assert y.dtype == x.dtype
    assert y.is_contiguous()
    assert torch.equal(y, x)
    assert x.numel() == 0 or y.data_ptr() != x.data_ptr()


def test_info_shows_everything() -> None:
    facts = info.collect()
    json.dumps(facts)
    report = info.text()
    assert f"kernelmeta {km.__version__}" in report
    for name, backend in km.backends().items():
        assert any(line.split()[:1] == [name] for line in report.splitlines())
        assert backend.reason in report
    if CPU.available:
        assert facts["build"]["version"] == km.__version__
        assert CPU.details["instruction_set"] in facts["build"]["instruction_sets"]
