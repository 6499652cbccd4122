"""``kernelmeta adapt``: a classifier for each of many tasks, and its answers."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from kernelmeta.command_line import Add, at_option, claimed_by_first, feature_options, machine_options, say_of
from kernelmeta.data.files import read_json, write_json
from kernelmeta.data.task_tables import Piece, unanswered
from kernelmeta.data.words import counted
from kernelmeta.ranks import Ranks, ranks
from kernelmeta.training import runs
from kernelmeta.training.adapting import Adapter, Job
from kernelmeta.training.answers import UNTRAINED

_ENGINES = ("processes", "ray")


def add_commands(add: Add) -> None:
    """Adds this command to the parser."""
    command = add(
        "adapt",
        _adapt,
        "Adapt a classifier to each of many tasks, and label each task's own rows with it.",
        "adapt --tasks tasks.parquet --bank bank.safetensors --out predictions/",
    )
    command.add_argument(
        "what",
        nargs="?",
        default="prototypes",
        metavar="RUN|METHOD",
        help=f"what train made, or one of {', '.join(UNTRAINED)} (default: prototypes, which judge each row alone)",
    )
    command.option(
        "data",
        "--tasks",
        required=True,
        metavar="FILE",
        help="Parquet, or a folder of such files: columns task, support_rows, support_labels, query_rows (lists)",
    )
    command.option("data", "--bank", required=True, metavar="BANK", help="whose rows the tasks name by their numbers")
    command.option(
        "data",
        "--skip-bad",
        action="store_true",
        help="go on without tasks that cannot be answered: they get no labels, and 'problem' says why (default: stop)",
    )
    feature_options(command)
    at_option(command)
    command.option("output", "--out", type=Path, required=True, metavar="DIR", help="folder of the answers, Parquet")
    command.option(
        "output",
        "--tasks-per-file",
        type=int,
        default=65_536,
        help="tasks in a file of answers, which a kill may lose (default: 65536)",
    )
    command.option("run", "--resume", action="store_true", help="go on with the answers in --out, if there are any")
    command.option(
        "run", "--engine", choices=_ENGINES, default="processes",
        help="processes: this one, or those of torchrun; ray: the workers of a Ray cluster (default: processes)",
    )  # fmt: skip
    machine_options(command, skips=False)


def _adapt(args: argparse.Namespace) -> None:
    if args.tasks_per_file < 1:
        raise ValueError(f"--tasks-per-file: expected at least 1, got {args.tasks_per_file}")
    # From any folder: workers may be elsewhere.
    what = os.path.abspath(args.what) if os.path.exists(args.what) else args.what
    tasks, bank, out = (os.path.abspath(path) for path in (args.tasks, args.bank, args.out))
    job = Job(
        tasks, bank, what, out, args.tasks_per_file, args.at, args.device, args.transform, args.center, args.skip_bad
    )
    with ranks(args.device) as processes, claimed_by_first(args.out, processes):
        _adapt_in(args, job, processes)


def _adapt_in(args: argparse.Namespace, job: Job, processes: Ranks) -> None:
    adapter = Adapter(job)
    out: Path = args.out
    if args.resume and processes.first and not runs.begun(out):
        say_of(args)(f"--resume: no answers are in {out} yet{runs.likeliest(out)}; these are the first")
    _check_same(out, adapter.fingerprint, args.resume)
    if processes.first and adapter.mixed is not None:
        say_of(args)(f"warning: {adapter.mixed}")
    processes.barrier()  # everybody has looked at the folder before anybody writes to it
    missing = adapter.missing()
    began, left = time.monotonic(), sum(piece.n for piece in missing)
    if processes.first:
        runs.write_config(out, "adapt", {"what": args.what, "fingerprint": adapter.fingerprint})
    processes.barrier()
    if args.engine == "ray":
        from kernelmeta.training.adapting_on_ray import on_ray

        answered = on_ray(job, missing)
    else:
        answered = adapter.run(missing[processes.rank :: processes.size])
    try:
        _watch(adapter, answered, progress=processes.first and not args.quiet)
    except KeyboardInterrupt:
        if processes.first:
            print(f"stopped; to go on: --out {out} --resume", file=sys.stderr)
        raise
    processes.barrier()
    if not processes.first:
        return
    seconds = time.monotonic() - began
    done, files = len(adapter.files), len(adapter.files.pieces())
    bad, first = unanswered(out / piece.name for piece in adapter.files.pieces())
    results = {"tasks": done, "files": files, "tasks_now": left, "seconds": seconds, "processes": processes.size,
               "unanswered": bad}  # fmt: skip
    write_json(out / runs.RESULTS, results)
    if bad == done and bad:
        raise ValueError(f"no task could be answered; the first: {first}")
    if bad:
        say_of(args)(f"{counted(bad, 'task')} without an answer ('problem' says why); the first: {first}")
    rate = f"; {left / seconds:,.0f} tasks a second" if left else ""
    print(f"{out}: {done:,} tasks in {files:,} file{'s' if files != 1 else ''}{rate}")


def _watch(adapter: Adapter, answered: Iterator[Piece], progress: bool) -> None:
    """Lets the pieces be answered; with a bar, which tells what is there, whoever it is from."""
    total = len(adapter.files)

    def there() -> int:
        return total - sum(piece.n for piece in adapter.missing())

    with tqdm(total=total, initial=there() if progress else 0, desc="adapt", unit="task", disable=not progress) as bar:
        for _ in answered:
            if progress:
                bar.update(there() - bar.n)


def _check_same(out: Path, fingerprint: dict[str, Any], resume: bool) -> None:
    """Raises ValueError where the folder holds the answers of another run, or of one that is not to be gone on with."""
    if not (out / runs.CONFIG).exists():
        if any(out.glob("*.parquet")):
            raise ValueError(f"out: {out} holds other .parquet files")
        return
    saved = read_json(out / runs.CONFIG)
    if saved.get("command") != "adapt":
        raise ValueError(f"out: {out} holds a run of 'kernelmeta {saved.get('command')}', not of 'adapt'")
    if not resume and not any(out.glob("part-*.parquet")):
        return  # begun, without an answer yet
    if not resume:
        raise ValueError(f"out: {out} already holds answers; give --resume to go on, or another folder")
    then = saved.get("fingerprint", {})
    other = [name for name, value in fingerprint.items() if then.get(name) != value]
    if other:
        raise ValueError(f"{other[0].replace('_', ' ')}: not what the answers in {out} were begun with")
