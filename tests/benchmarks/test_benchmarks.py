"""What the benchmarks' numbers stand on: the peers compute the same, the counts are right, the clock is read right."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("benchmarks", reason="the benchmarks are not part of the installed package")

import itertools
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import kernelmeta
from benchmarks import agreement, anil, compare, counts, report, timing
from benchmarks.peers import OWN, PEERS, Unavailable
from benchmarks.problem import MODES, Size, draw

EAGER = [name for name in PEERS if not name.startswith("compile")]  # compiling takes half a minute each
SMALL = Size(T=3, N=3, S=7, D=13, K=2, dtype="float64")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", EAGER)
def test_peers_agree_with_the_reference_in_float64(name: str, mode: str) -> None:
    problem = draw(SMALL, inner_lr=0.1)
    try:
        runner = PEERS[name].prepare(problem, mode)
    except Unavailable as reason:
        pytest.skip(str(reason))
    agreement.check(name, PEERS[name], runner, problem, mode)


@pytest.mark.parametrize("wrong", [{"K": 1}, {"T": 2}])
def test_other_work_is_noticed(wrong: dict[str, int]) -> None:
    problem = draw(SMALL._replace(dtype="float32"))
    other = problem._replace(size=problem.size._replace(**wrong), inputs=[
        inputs._replace(**{k: v[: wrong.get("T", 3)] for k, v in inputs._asdict().items()}) for inputs in problem.inputs
    ])  # fmt: skip
    with pytest.raises(agreement.Disagreement):
        agreement.check("dual", PEERS["dual"], PEERS["dual"].prepare(other, "train"), problem, "train")


@pytest.mark.parametrize("name", [*OWN, "dual"])
def test_only_a_peer_is_left_out_for_being_wrong(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernelmeta's own wrong numbers are an error, whichever way it is called: of SIB and of ANIL."""
    size = SMALL._replace(dtype="float32")
    prepare = PEERS[name].prepare

    def off(problem: Any, mode: str) -> Any:
        runner = prepare(problem, mode)
        return lambda i: (runner(i)[0] + 1, runner(i)[1])

    monkeypatch.setitem(PEERS, name, PEERS[name]._replace(prepare=off))
    if name == "dual":
        cell, note = report.measure(size, "train", ["kernelmeta", name], seconds=0.01)
        assert name not in cell["peers"] and "dual left out" in note
        return
    with pytest.raises(agreement.Disagreement):
        report.measure(size, "train", ["kernelmeta", name], seconds=0.01)
    title, of_anil = anil.PEERS[name]
    problem = anil.draw(anil.AnilSize(D=16), copies=1)

    def off_anil(problem: Any) -> Any:
        runner = of_anil(problem)
        return lambda i: (runner(i)[0] + 1, runner(i)[1])

    monkeypatch.setitem(anil.PEERS, name, (title, off_anil))
    with pytest.raises(agreement.Disagreement):
        anil.checked(problem, [name], 1e-4)


def test_fresh_gradients() -> None:
    runner = PEERS["kernelmeta"].prepare(draw(SMALL, copies=1), "train")
    first = [g.clone() for g in runner(0)[1]]
    assert all(torch.equal(a, b) for a, b in zip(first, runner(1)[1], strict=True))


def test_counts_of_the_published_setting() -> None:
    size = Size()  # T=1 N=5 S=5 Q=75 D=640 K=3
    assert counts.dual_flops(size) == 75 * 76 * 640 + 2 * 75 * 5 * 640 + 2 * 5 * 640 + 3 * (
        2 * 75 * 75 * 5 + 2 * 75 * (2 * 5 * 40 + 40 * 40)
    )
    forward, train, features = (counts.sib(size, mode) for mode in MODES)
    assert forward.flops < train.flops < features.flops
    assert forward.bytes < train.bytes < features.bytes
    assert counts.sib(size._replace(T=7), "train").flops == 7 * train.flops
    # two steps on many rows are cheaper in D dimensions
    assert counts.direct_flops(Size(N=20, S=20, D=64, K=1)) < counts.dual_flops(Size(N=20, S=20, D=64, K=1))


def test_floor_is_the_larger_limit() -> None:
    assert counts.Work(10.0, 1.0).floor(2.0, 1.0) == 5.0
    assert counts.Work(1.0, 10.0).floor(2.0, 1.0) == 10.0


def test_timing_interleaves_and_rotates() -> None:
    order: list[tuple[str, int]] = []
    found = timing.interleave(
        {name: lambda i, name=name: order.append((name, i)) for name in "ab"}, seconds=1e-4, rounds=3, warm_up=2
    )
    assert [i for name, i in order if name == "a"] == list(range(sum(name == "a" for name, _ in order)))
    changes = sum(x[0] != y[0] for x, y in itertools.pairwise(order))
    assert changes == 1 + 1 + 5  # warm-up of a, then b; blocks a b a b a b
    assert found["a"].low <= found["a"].median <= found["a"].high
    assert len(found["a"].rounds) == 3


def test_quantiles_and_ratios() -> None:
    timed = timing.summary([[1.0, 2.0, 3.0], [4.0, 5.0]])
    assert timed.median == 3.0 and timed.rounds == (2.0, 4.5)
    assert timing.quantile([0.0, 10.0], 0.1) == pytest.approx(1.0)
    assert timing.ratio(timing.summary([[8.0], [4.0], [2.0]]), timing.summary([[1.0], [1.0], [1.0]])) == (4.0, 2.0, 8.0)


def test_compare_fails_on_a_clear_loss_only() -> None:
    assert not compare.verdict([1.1, 0.9, 5.0, 1.0], 2.0)
    assert not compare.verdict([1.9] * 8, 2.0)
    assert compare.verdict([2.2] * 7 + [1.0], 2.0)


@pytest.fixture(scope="module")
def unbuilt_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources of the benchmarks and of the package, without what was compiled."""
    tree, root = tmp_path_factory.mktemp("tree"), Path(report.__file__).resolve().parent.parent
    for name in ("benchmarks", "kernelmeta"):
        shutil.copytree(root / name, tree / name, ignore=shutil.ignore_patterns("_native", "*.so", "results"))
    return tree


@pytest.mark.parametrize("command", ["report", "grid", "anil", "programs", "many_rows"])
def test_nothing_is_timed_without_kernels(command: str, unbuilt_tree: Path) -> None:
    """Where the source tree shadows what is installed, the plain reference would be timed in the kernels' place."""
    found = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{command}"], cwd=unbuilt_tree, capture_output=True, text=True
    )
    assert found.returncode == 2, found.stdout
    assert f"{unbuilt_tree / 'kernelmeta'} has no CPU kernels" in found.stderr and "--installed" in found.stderr


def test_what_is_installed_can_be_timed_from_a_source_tree(unbuilt_tree: Path) -> None:
    program = "import sys; sys.path.insert(0, ''); import benchmarks.report, kernelmeta; print(kernelmeta.__file__)"
    tree, installed = (
        Path(subprocess.run([sys.executable, "-c", program, *option], cwd=unbuilt_tree, capture_output=True, text=True,
                            check=True).stdout.strip()).parent
        for option in ([], ["--installed"])
    )  # fmt: skip
    assert tree == unbuilt_tree / "kernelmeta"
    assert installed == Path(kernelmeta.__file__).parent
