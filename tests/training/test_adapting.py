"""Many tasks from a file to files: each gets what it would get alone, whoever is killed on the way."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import make_bank, start

import kernelmeta as km
from kernelmeta.cli import main
from kernelmeta.data.bank import FORMAT
from kernelmeta.data.task_tables import COLUMNS
from kernelmeta.data.tensor_files import bytes_of
from kernelmeta.nn.learner import Learner
from kernelmeta.training.adapting import Learners
from kernelmeta.training.answers import make_learner

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
BANK = make_bank(samples=40)
Task = tuple[Any, list[int], list[Any], list[int]]


def draw_tasks(n: int, seed: int = 0, ways: tuple[int, int] = (1, 6), text: bool = True) -> list[Task]:
    """Of all sizes, one class and no query rows among them."""
    random = np.random.default_rng(seed)
    tasks: list[Task] = []
    for i in range(n):
        classes = random.choice(24, random.integers(ways[0], ways[1] + 1), replace=False)
        support, labels, query = [], [], []
        for c in classes.tolist():
            rows = (40 * c + random.permutation(40)).tolist()
            k = int(random.integers(1, 4))
            support += rows[:k]
            labels += [f"class {c}" if text else c] * k
            query += rows[k : k + int(random.integers(0, 4))]
        order = random.permutation(len(support))
        tasks.append((f"user {i}", [support[j] for j in order], [labels[j] for j in order], query))
    return tasks


def write(path: Path, tasks: list[Task], **options: Any) -> None:
    columns = dict(zip(("task", "support_rows", "support_labels", "query_rows"), zip(*tasks, strict=True), strict=True))
    types = {"support_rows": pa.list_(pa.int64()), "query_rows": pa.list_(pa.int64())}
    arrays = {name: pa.array(list(values), types.get(name)) for name, values in columns.items()}
    pq.write_table(pa.table(arrays), path, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("adapt")
    BANK.save(path / "bank.safetensors")
    for learner, more in (("sib", ("--inner-lr", "0.01")), ("anil", ())):
        args = ["train", "--data", str(path / "bank.safetensors"), "--learner", learner, *more, "--way", "3"]
        small = ["--query", "4", "--episodes", "64", "--eval-episodes", "0", "--quiet"]
        assert main([*args, *small, "--out", str(path / learner)]) == 0
    return path


def command(
    folder: Path, out: Path, *more: object, what: str = "prototypes", tasks: str = "tasks.parquet"
) -> list[str]:
    files = ("--tasks", folder / tasks, "--bank", folder / "bank.safetensors", "--out", out, "--quiet")
    return [str(word) for word in ("adapt", what, *files, *more)]


def answers(out: Path) -> dict[str, list[Any]]:
    files = sorted(out.glob("part-*.parquet"))
    return pa.concat_tables([pq.read_table(file) for file in files]).to_pydict()


@pytest.mark.parametrize("what", ["prototypes", "soft_kmeans", "ridge", "bd_cspn", "sib", "anil"])
@pytest.mark.parametrize(("text", "backend"), [(True, None), (False, None), (True, "reference")])
def test_every_task_gets_what_it_would_get_alone(folder, tmp_path, monkeypatch, what, text, backend):
    with km.use_backend(backend) if backend else contextlib.nullcontext():
        _every_task_gets_what_it_would_get_alone(folder, tmp_path, monkeypatch, what, text)


def _every_task_gets_what_it_would_get_alone(folder, tmp_path, monkeypatch, what, text):
    monkeypatch.setattr("kernelmeta.training.adapting.ELEMENTS", 3000)  # several calls a piece
    trained = what in ("sib", "anil")
    tasks = draw_tasks(60, ways=(3, 3) if trained else (1, 6), text=text)
    write(folder / "tasks.parquet", tasks, row_group_size=25)
    method = str(folder / what) if trained else what
    assert main(command(folder, tmp_path / "out", "--tasks-per-file", 10, what=method)) == 0
    assert len(list((tmp_path / "out").glob("part-*.parquet"))) == 7  # 10, 10, 5; 10, 10, 5; 10
    found = answers(tmp_path / "out")
    assert found["task"] == [task[0] for task in tasks]
    assert found["query_rows"] == [task[3] for task in tasks]
    for (_, support, labels, query), own, probability in zip(
        tasks, found["labels"], found["probabilities"], strict=True
    ):
        classes = sorted(set(labels))
        if len(classes) == 1 or not query:
            assert own == classes * len(query) and probability == [1.0] * len(query)
            continue
        chosen = make_learner(None if trained else what, method if trained else None, len(classes), 24)
        codes = torch.tensor([[classes.index(label) for label in labels]])
        with torch.no_grad():
            logits = chosen.learner(BANK.features[None, support], codes, BANK.features[None, query])[0]
        values, best = (logits / chosen.temperature).softmax(-1).max(-1)
        assert own == [classes[c] for c in best.tolist()]
        torch.testing.assert_close(torch.tensor(probability), values, rtol=1e-4, atol=1e-5)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (results["tasks"], results["files"]) == (60, 7)


@pytest.mark.parametrize("what", ["prototypes", "ridge", "soft_kmeans"])
def test_plain_pytorch_gets_tasks_of_the_same_size_in_one_call(folder, tmp_path, monkeypatch, what):
    """One after the other they took a hundred times as long; rows that are judged alone are filled up to the most."""
    tasks = draw_tasks(600, ways=(1, 4))
    write(folder / "tasks.parquet", tasks)
    sizes = {
        (len(set(labels)), len(support), len(query) if what == "soft_kmeans" else 0)
        for _, support, labels, query in tasks
        if len(set(labels)) > 1 and query
    }
    calls = []
    from_bank = Learner.from_bank

    def counted(self, *args, **options):
        assert options.get("ragged") is None
        calls.append(args[1].shape)
        return from_bank(self, *args, **options)

    monkeypatch.setattr(Learner, "from_bank", counted)
    with km.use_backend("reference"):
        assert main(command(folder, tmp_path / "out", what=what)) == 0
    assert len(calls) == len(sizes)


@pytest.mark.skipif(sys.platform != "linux", reason="needs files with holes, and /proc")
def test_a_bank_may_be_larger_than_memory(folder, tmp_path):
    """Twice as large as this machine's memory, most of it a hole of the file; a few rows at its end hold numbers."""
    D = 1 << 16
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    n = 2 * memory // (4 * D)
    features = torch.nn.functional.pad(BANK.features[:960], (0, D - BANK.n_features))
    labels = torch.zeros(n, dtype=torch.int64)
    labels[-960:] = BANK.labels[:960]
    header: dict[str, Any] = {
        "__metadata__": {"format": FORMAT, "class_names": json.dumps(list(BANK.class_names)), "source": "a test"}
    }
    at = 0
    shapes = {"features": ("F32", [n, D], 4 * D * n), "labels": ("I64", [n], 8 * n)}
    shapes["class_split"] = ("U8", [len(BANK.class_names)], len(BANK.class_names))
    for name, (dtype, shape, size) in shapes.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(tmp_path / "large.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.seek(4 * D * (n - 960), os.SEEK_CUR)
        file.write(bytes_of(features))
        file.write(bytes_of(labels))
        file.write(bytes_of(BANK.class_split))
    tasks = draw_tasks(20, 7)
    write(folder / "small.parquet", tasks)
    first = n - 960
    moved = [(task, [r + first for r in rows], y, [r + first for r in query]) for task, rows, y, query in tasks]
    write(tmp_path / "large.parquet", moved)
    assert main(command(folder, tmp_path / "small", tasks="small.parquet")) == 0
    words = [
        "adapt",
        "prototypes",
        "--tasks",
        "large.parquet",
        "--bank",
        "large.safetensors",
        "--out",
        "out",
        "--quiet",
    ]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; from kernelmeta.cli import main; sys.exit(main({words!r}))"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    small, large = answers(tmp_path / "small"), answers(tmp_path / "out")
    assert (small["task"], small["labels"]) == (large["task"], large["labels"])


def test_killed_again_and_again_nothing_is_lost_or_doubled(folder, tmp_path):
    write(folder / "many.parquet", draw_tasks(700, 1), row_group_size=190)
    assert main(command(folder, tmp_path / "whole", "--tasks-per-file", 20, tasks="many.parquet")) == 0
    want = {path.name: path.read_bytes() for path in (tmp_path / "whole").glob("part-*.parquet")}
    out, kills = tmp_path / "cut", 0
    for last in (0, 8, 20, 10**9):
        process = start(*command(folder, out, "--tasks-per-file", 20, "--resume", tasks="many.parquet"))
        while process.poll() is None and len(list(out.glob("part-*.parquet"))) <= last:
            time.sleep(0.001)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        output, errors = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), errors
    assert kills >= 2
    assert process.returncode == 0
    assert "700 tasks in 37 files" in output
    assert {path.name: path.read_bytes() for path in out.glob("part-*.parquet")} == want
    assert sorted(path.name for path in out.iterdir() if path.name not in want) == ["config.json", "results.json"]


def test_ranks_share_the_pieces(folder, tmp_path):
    write(folder / "shared.parquet", draw_tasks(100, 2))
    args = command(folder, tmp_path / "one", "--tasks-per-file", 20, tasks="shared.parquet")
    assert main(args) == 0
    launcher = ("torch.distributed.run", "--nproc-per-node=2", "--standalone")
    args = command(folder, tmp_path / "two", "--tasks-per-file", 20, tasks="shared.parquet")
    process = start(*args, launcher=launcher)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "100 tasks in 5 files" in output
    assert json.loads((tmp_path / "two" / "results.json").read_text())["processes"] == 2
    for path in (tmp_path / "one").glob("part-*.parquet"):
        assert (tmp_path / "two" / path.name).read_bytes() == path.read_bytes()


def refused(capsys, args: list[str]) -> str:
    capsys.readouterr()
    assert main(args) == 2
    return capsys.readouterr().err


def test_a_first_call_with_resume_says_that_it_is_the_first(folder, tmp_path, capsys):
    write(folder / "tasks.parquet", draw_tasks(20))
    for out, words in (("answers", "; these"), ("answer", f"; did you mean {tmp_path / 'answers'}?; these")):
        assert main(command(folder, tmp_path / out, "--resume")) == 0
        assert f"--resume: no answers are in {tmp_path / out} yet{words} are the first" in capsys.readouterr().err
    assert main(command(folder, tmp_path / "answer", "--resume")) == 0
    assert "--resume" not in capsys.readouterr().err


GOOD: Task = ("a user", [0, 40], ["x", "y"], [1, 41])


BAD: list[tuple[Any, str]] = [
    (("bad", [0, 960], ["x", "y"], [1]), "support_rows: expected 0..959, got 960"),
    (("bad", [0, 40], ["x", "y"], [3, -1]), "query_rows: expected 0..959, got -1"),
    (("bad", [0, 40], ["x"], [1]), "2 support_rows, but 1 support_labels"),
    (("bad", [], [], [1]), "no support_rows"),
    (("bad", None, ["x"], [1]), "no support_rows"),
    (("bad", [0, 40], ["x", None], [1]), "support_labels has an element without a value"),
    (("bad", [0, 40], ["x", "y"], None), "no query_rows"),
    (("bad", [0, 40], ["x", "y"], [1, None]), "query_rows has an element without a value"),
]


@pytest.mark.parametrize(("task", "message"), BAD)
def test_a_task_that_cannot_be_is_named(folder, tmp_path, capsys, task, message):
    write(tmp_path / "tasks.parquet", [GOOD, task, GOOD])
    args = command(folder, tmp_path / "out")
    args[args.index("--tasks") + 1] = str(tmp_path / "tasks.parquet")
    assert f"task bad: {message}" in refused(capsys, args)
    assert not list(tmp_path.glob("out/part*"))


def test_tasks_that_cannot_be_are_left_out_if_told_to(folder, tmp_path, capsys):
    """The others get what they would get without them, whichever come first, and each file the same bytes again."""
    bad = [*(task for task, _ in BAD), ("bad", [0, 40], ["x", "y"], [1, 7]), ("bad", [7, 40], ["x", "y"], [1])]
    messages = [*(message for _, message in BAD), *["no finite answer; are its rows finite, and not too large?"] * 2]
    good = draw_tasks(len(bad), 5)
    write(tmp_path / "good.parquet", good)
    write(tmp_path / "tasks.parquet", [task for pair in zip(bad, good, strict=True) for task in pair])
    bank = make_bank(samples=40)
    bank.features[7] = float("nan")
    bank.save(tmp_path / "bank.safetensors")
    for name in ("good", "tasks"):
        args = command(tmp_path, tmp_path / name, "--skip-bad", "--tasks-per-file", 7, tasks=f"{name}.parquet")
        assert main(args) == 0
    assert f"10 tasks without an answer ('problem' says why); the first: task bad: {messages[0]}" in (
        capsys.readouterr().err
    )
    assert json.loads((tmp_path / "tasks" / "results.json").read_text())["unanswered"] == len(bad)
    whole, alone = answers(tmp_path / "tasks"), answers(tmp_path / "good")
    assert {name: values[1::2] for name, values in whole.items()} == alone
    assert alone["problem"] == [None] * len(good)
    assert whole["problem"][::2] == messages
    assert whole["labels"][::2] == whole["probabilities"][::2] == [None] * len(bad)
    assert whole["query_rows"][2] == [3, -1]


def test_classes_that_weights_do_not_take_are_left_out_if_told_to(folder, tmp_path, capsys):
    write(folder / "tasks.parquet", [GOOD, *draw_tasks(4, ways=(3, 3))])
    assert main(command(folder, tmp_path / "out", "--skip-bad", what=str(folder / "sib"))) == 0
    found = answers(tmp_path / "out")
    assert "was trained for 3 classes at a time, not 2" in found["problem"][0]
    assert found["problem"][1:] == [None] * 4 and all(found["labels"][1:])
    write(folder / "few.parquet", [GOOD])
    line = refused(
        capsys, command(folder, tmp_path / "no", "--skip-bad", what=str(folder / "sib"), tasks="few.parquet")
    )
    assert "no task could be answered; the first: task a user: weights: " in line


def test_tasks_beside_one_with_too_many_classes_are_answered(folder, tmp_path, monkeypatch):
    """In one call, if the learner had taken them all."""
    tasks = draw_tasks(12, 6, ways=(2, 4))
    write(folder / "tasks.parquet", tasks)
    assert main(command(folder, tmp_path / "all")) == 0
    whole, taken = answers(tmp_path / "all"), Learners.for_ways

    def for_ways(self: Learners, n_way: int) -> Any:
        if n_way == 4:
            raise ValueError("too many")
        return taken(self, n_way)

    monkeypatch.setattr(Learners, "for_ways", for_ways)
    assert main(command(folder, tmp_path / "some", "--skip-bad")) == 0
    some = answers(tmp_path / "some")
    large = [len(set(labels)) == 4 and bool(query) for _, _, labels, query in tasks]
    assert any(large) and not all(large)
    assert some["problem"] == ["too many" if bad else None for bad in large]
    assert some["labels"] == [None if bad else labels for bad, labels in zip(large, whole["labels"], strict=True)]


def test_a_run_that_a_bad_task_stopped_goes_on_without_it(folder, tmp_path, capsys):
    write(folder / "tasks.parquet", [GOOD, GOOD, BAD[0][0], GOOD])
    args = command(folder, tmp_path / "out", "--tasks-per-file", 1)
    assert "task bad" in refused(capsys, args)
    assert main([*args, "--resume", "--skip-bad"]) == 0
    assert [problem is None for problem in answers(tmp_path / "out")["problem"]] == [True, True, False, True]


def test_what_does_not_fit_is_named(folder, tmp_path, capsys):
    write(folder / "few.parquet", [GOOD])
    out = tmp_path / "out"
    few = {"tasks": "few.parquet"}
    line = refused(capsys, command(folder, out, what=str(folder / "sib"), **few))
    assert "task a user: weights: " in line and "was trained for 3 classes at a time, not 2" in line
    assert "must be trained" in refused(capsys, command(folder, out, what="sib", **few))
    assert "No such file" in refused(capsys, command(folder, out, tasks="none.parquet"))
    assert "tasks-per-file: expected at least 1" in refused(capsys, command(folder, out, "--tasks-per-file", 0, **few))
    pq.write_table(pa.table({"task": [1], "support_rows": [[1]], "query_rows": [[1]]}), folder / "less.parquet")
    assert "no column 'support_labels'" in refused(capsys, command(folder, out, tasks="less.parquet"))
    pq.write_table(pa.table({name: [1] for name in COLUMNS}), folder / "flat.parquet")
    assert "column 'support_rows': expected lists, got int64" in refused(
        capsys, command(folder, out, tasks="flat.parquet")
    )
    assert not list(out.glob("part*"))


def test_answers_of_other_tasks_are_not_gone_on_with(folder, tmp_path, capsys):
    out = tmp_path / "out"
    write(folder / "few.parquet", [GOOD])
    few = {"tasks": "few.parquet"}
    assert main(command(folder, out, **few)) == 0
    assert "already holds answers; give --resume" in refused(capsys, command(folder, out, **few))
    assert "method: not what the answers" in refused(capsys, command(folder, out, "--resume", what="ridge", **few))
    line = refused(capsys, command(folder, out, "--resume", "--tasks-per-file", 5, **few))
    assert "tasks per file: not what the answers" in line
    write(folder / "few.parquet", [GOOD, GOOD])
    assert "tasks: not what the answers" in refused(capsys, command(folder, out, "--resume", **few))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x.parquet").write_bytes(b"")
    assert "holds other .parquet files" in refused(capsys, command(folder, tmp_path / "other", **few))


def test_tasks_may_lie_in_a_folder_of_files(folder, tmp_path):
    tasks = draw_tasks(30, 4, text=False)
    (tmp_path / "tasks").mkdir()
    write(tmp_path / "tasks" / "b.parquet", tasks[20:])
    write(tmp_path / "tasks" / "a.parquet", tasks[:20])
    args = command(folder, tmp_path / "out")
    args[args.index("--tasks") + 1] = str(tmp_path / "tasks")
    assert main(args) == 0
    assert answers(tmp_path / "out")["task"] == [task[0] for task in tasks]


def test_without_pyarrow_it_says_what_is_missing(folder, tmp_path, capsys, monkeypatch):
    write(folder / "few.parquet", [GOOD])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install 'kernelmeta[parquet]'" in refused(
        capsys, command(folder, tmp_path / "out", tasks="few.parquet")
    )


def test_without_ray_it_says_what_is_missing(folder, tmp_path, capsys, monkeypatch):
    write(folder / "few.parquet", [GOOD])
    monkeypatch.setitem(sys.modules, "ray", None)
    args = command(folder, tmp_path / "out", "--engine", "ray", tasks="few.parquet")
    assert "pip install 'kernelmeta[ray]'" in refused(capsys, args)


@pytest.mark.rare
def test_a_worker_of_a_cluster_is_killed(folder, tmp_path):
    ray = pytest.importorskip("ray", reason="ray is not installed")
    pytest.importorskip("ray.data", reason="ray data is not installed")
    from kernelmeta.training.adapting import Adapter, Job
    from kernelmeta.training.adapting_on_ray import on_ray

    write(folder / "cluster.parquet", draw_tasks(3000, 5))
    assert main(command(folder, tmp_path / "one", "--tasks-per-file", 50, tasks="cluster.parquet")) == 0
    job = Job(
        str(folder / "cluster.parquet"), str(folder / "bank.safetensors"), "prototypes", str(tmp_path / "two"), 50
    )
    (tmp_path / "two").mkdir()
    ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False)
    try:
        done, killed = [], []
        for piece in on_ray(job, Adapter(job).missing()):
            done.append(piece)
            if len(done) == 5:
                killed = workers()
                assert len(killed) == 2
                os.kill(killed[0], signal.SIGKILL)
    finally:
        ray.shutdown()
    assert killed and len(done) == 60 == len(set(done))
    for path in (tmp_path / "one").glob("part-*.parquet"):
        assert (tmp_path / "two" / path.name).read_bytes() == path.read_bytes()


def workers() -> list[int]:
    """Processes of Ray that answer tasks."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            name = path.read_bytes()
        except OSError:
            continue
        if name.startswith(b"ray::") and b"MapWorker" in name:
            found.append(int(path.parent.name))
    return found
