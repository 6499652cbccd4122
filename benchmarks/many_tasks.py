"""Millions of tasks from a file to files: ``python -m benchmarks.many_tasks``.

Draws tasks as personal classifiers have them (a few labelled rows of a few classes each, all sizes), answers them with
``kernelmeta adapt`` in one process and in two, and with a logistic regression of scikit-learn for each task; says how
many tasks a second that is, how much memory it takes, and what 10^9 tasks take by that and on GPUs, by arithmetic.

On a machine with other work, a second of a processor says more than a second: if two processes do as much in one as a
single process does, dividing the tasks costs nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import kernelmeta as km
from kernelmeta.data.task_tables import TaskFiles, Tasks, arrow

CLASSES, SAMPLES = 1000, 200
WAYS, SHOTS, QUERIES = (2, 10), (1, 5), (1, 5)  # of a task; support and query rows of each of its classes
GPU_BYTES = 3.35e12  # a second, of an H100's memory
MINUTE = 60


def write_bank(path: Path, features: int) -> None:
    """Gaussian classes."""
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(CLASSES).repeat_interleave(SAMPLES)
    means = torch.randn(CLASSES, features, generator=random)
    rows = torch.randn(len(labels), features, generator=random).mul_(2).add_(means[labels])
    km.data.FeatureBank.from_arrays(rows, labels).save(path)


def write_tasks(path: Path, n: int, group: int) -> None:
    """``n`` tasks in row groups."""
    pa = arrow()
    import pyarrow.parquet as pq

    random = np.random.default_rng(0)

    def groups() -> Iterator[Any]:
        for first in range(0, n, group):
            T = min(group, n - first)
            ways = random.integers(WAYS[0], WAYS[1] + 1, T)
            task = np.repeat(np.arange(T), ways)
            # Classes of a task follow each other, from a random one on.
            place = np.arange(len(task)) - np.repeat(np.cumsum(ways) - ways, ways)
            classes = (random.integers(0, CLASSES, T)[task] + place) % CLASSES
            columns: dict[str, Any] = {"task": np.arange(first, first + T)}
            for name, (low, high), offset in (("support_rows", SHOTS, 0), ("query_rows", QUERIES, SAMPLES // 2)):
                counts = random.integers(low, high + 1, len(task))
                of = np.repeat(np.arange(len(task)), counts)
                rows = classes[of] * SAMPLES + offset + random.integers(0, SAMPLES // 2, len(of))
                ends = np.concatenate([[0], np.cumsum(np.bincount(task[of], minlength=T))]).astype(np.int32)
                columns[name] = pa.ListArray.from_arrays(pa.array(ends), pa.array(rows))
                if name == "support_rows":
                    columns["support_labels"] = pa.ListArray.from_arrays(pa.array(ends), pa.array(classes[of]))
            yield pa.table(columns)

    tables = groups()
    first = next(tables)
    with pq.ParquetWriter(path, first.schema) as writer:
        writer.write_table(first, row_group_size=group)
        for table in tables:
            writer.write_table(table, row_group_size=group)


def adapted(folder: Path, out: str, processes: int, method: str) -> tuple[float, float, float, float]:
    """Seconds of the work, of processors, of the whole command; and the largest memory of a process in MB."""
    code = (
        "import resource, sys, time; from kernelmeta.cli import main; began = time.process_time()\n"
        "code, done = main(sys.argv[1:]), resource.getrusage(resource.RUSAGE_SELF)\n"
        # (in one piece, so that the words of two processes do not mix)
        "sys.stderr.write(f'measured {done.ru_maxrss} {time.process_time() - began}\\n'); sys.exit(code)"
    )
    program = folder / "measured.py"
    program.write_text(code)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    files = ["--tasks", folder / "tasks.parquet", "--bank", folder / "bank.safetensors", "--out", folder / out]
    command = [sys.executable, *launcher, program, "adapt", method, *files, "--quiet", "--threads", 1]
    began = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(done.stderr)
    # (Two processes' lines may meet in one.)
    measured = re.findall(r"measured (\d+) ([\d.]+)", done.stderr)
    memory, processor = max(float(m) for m, _ in measured), sum(float(seconds) for _, seconds in measured)
    results = json.loads((folder / out / "results.json").read_text())
    return results["seconds"], processor, time.perf_counter() - began, memory / 1000


def regressions(folder: Path, n: int) -> tuple[float, float, float]:
    """Tasks a second, and a second of a processor, with a logistic regression for each, and its accuracy in percent."""
    from sklearn.linear_model import LogisticRegression

    bank = km.data.FeatureBank.load(folder / "bank.safetensors", non_finite="keep")
    files = TaskFiles(folder / "tasks.parquet", n)
    tasks: Tasks
    ((_, tasks),) = files.read(files.pieces()[:1])
    features, answers = bank.features.numpy(), bank.labels.numpy()
    right = rows = 0
    began, busy = time.perf_counter(), time.process_time()
    for t in range(len(tasks)):
        support = slice(*tasks.support_offsets[t : t + 2])
        query = tasks.query_rows[slice(*tasks.query_offsets[t : t + 2])]
        model = LogisticRegression().fit(features[tasks.support_rows[support]], answers[tasks.support_rows[support]])
        right += int((model.predict(features[query]) == answers[query]).sum())
        rows += len(query)
    T = len(tasks)
    return T / (time.perf_counter() - began), T / (time.process_time() - busy), 100 * right / rows


def accuracy(folder: Path, out: str) -> float:
    """Of the answers, in percent."""
    import pyarrow.parquet as pq

    right = rows = 0
    for path in sorted((folder / out).glob("part-*.parquet"))[:4]:
        table = pq.read_table(path)
        found, query = (np.asarray(table.column(name).combine_chunks().flatten()) for name in ("labels", "query_rows"))
        right, rows = right + int((found == query // SAMPLES).sum()), rows + len(found)
    return 100 * right / rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.many_tasks", description=__doc__)
    parser.add_argument("--tasks", type=int, default=1_000_000)
    parser.add_argument("--features", type=int, default=384)
    parser.add_argument("--method", default="prototypes")
    parser.add_argument("--regressions", type=int, default=300, help="tasks that scikit-learn is timed on")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_bank(folder / "bank.safetensors", args.features)
        write_tasks(folder / "tasks.parquet", args.tasks, group=min(250_000, -(-args.tasks // 8)))
        bank_mb = (folder / "bank.safetensors").stat().st_size / 1e6
        print(f"{args.tasks:,} tasks, {args.features} features, a bank of {bank_mb:.0f} MB, {args.method}\n")
        print(
            "| | tasks a second | a second of a processor | whole command | memory of a process | accuracy |"
            "\n|---|---|---|---|---|---|"
        )
        rates, of_processor = {}, {}
        for processes in (1, 2):
            seconds, processor, whole, memory = adapted(folder, f"out-{processes}", processes, args.method)
            rates[processes], of_processor[processes] = args.tasks / seconds, args.tasks / processor
            print(
                f"| {processes} process{'es' if processes > 1 else ''} | {rates[processes]:,.0f} |"
                f" {of_processor[processes]:,.0f} | {whole:.1f} s |"
                f" {memory:.0f} MB | {accuracy(folder, f'out-{processes}'):.1f} % |",
                flush=True,
            )
        rate, plain, right = regressions(folder, args.regressions)
        print(f"| logistic regression a task, 1 process | {rate:,.0f} | {plain:,.0f} | | | {right:.1f} % |")
        print(
            f"\ntwo processes: {rates[2] / rates[1]:.2f} times one, {2 * of_processor[2] / of_processor[1]:.2f} by"
            f" seconds of processors; one: {of_processor[1] / plain:,.0f} times the regressions, likewise"
        )
        rows = sum(WAYS) / 2 * (sum(SHOTS) + sum(QUERIES)) / 2
        gpu = GPU_BYTES / (rows * args.features * 4)
        print(
            f"10^9 tasks: {1e9 / of_processor[1] / 3600:.1f} hours of one such core; an H100 that reads {rows:.0f} rows"
            f" of {4 * args.features} bytes a task at {GPU_BYTES / 1e12:.2f} TB/s: {1e9 / gpu:.0f} s at least, if the"
            f" bank fits; in {MINUTE} s, files aside: {max(1, -(-1e9 // (gpu * MINUTE))):.0f} of them"
        )


if __name__ == "__main__":
    main()
