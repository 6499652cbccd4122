"""Another revision against the working tree: ``python -m benchmarks.compare BASE``.

BASE is checked out and built in a temporary worktree. Both run in processes of their own and take turns. Exit code 1
if a cell is slower than BASE by more than ``--allow`` (2: noise does not fail it), beyond what the rounds scatter.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks.compare_worker import CELLS
from benchmarks.metadata import ROOT

WORKER = Path(__file__).with_name("compare_worker.py")


def has_same_sources(revision: str) -> bool:
    """Whether the library of the working tree is what a revision would build."""
    native = ["csrc", ":!csrc/tests", "CMakeLists.txt", "setup.py"]
    differs = subprocess.run(["git", "-C", str(ROOT), "diff", "--quiet", revision, "--", *native], check=False)
    return differs.returncode == 0


@contextmanager
def worktree(revision: str) -> Iterator[Path]:
    """A temporary checkout of a revision, built in place."""
    with tempfile.TemporaryDirectory(prefix="kernelmeta-compare-") as folder:
        path = Path(folder) / "base"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(path), revision], check=True)
        try:
            if has_same_sources(revision):
                print(f"{revision} has the same native sources: it gets the library of the working tree", flush=True)
                shutil.copytree(ROOT / "kernelmeta/_native", path / "kernelmeta/_native")
            else:
                print(f"building {revision}", flush=True)
                build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
                environment = {**os.environ, "KERNELMETA_BUILD": "cpu"}  # what is timed
                subprocess.run(build, cwd=path, env=environment, check=True, stdout=subprocess.DEVNULL)
            yield path
        finally:
            subprocess.run([*git, "remove", "--force", str(path)], check=True)


class Worker:
    """A process that times cells with one revision's package."""

    def __init__(self, root: Path, threads: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(WORKER), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=root,
            env={**os.environ, "PYTHONPATH": str(root)},
        )
        self.module = Path(self._answer())
        if root.resolve() not in self.module.resolve().parents:
            raise RuntimeError(f"expected the kernelmeta of {root}, got {self.module}")

    def _answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker ended with code {self.process.wait()}")
        found = json.loads(line)
        return found if isinstance(found, str) else line

    def time(self, cell: str, calls: int) -> float:
        """Median seconds of a call."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{cell} {calls}\n")
        self.process.stdin.flush()
        return statistics.median(json.loads(self._answer()))

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def verdict(ratios: Sequence[float], allow: float) -> bool:
    """Whether it is clearly slower: the median ratio beyond ``allow``, and three rounds of four beyond it too."""
    return statistics.median(ratios) > allow and sum(r > allow for r in ratios) >= 0.75 * len(ratios)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("base", help="a git revision")
    parser.add_argument("--cells", nargs="+", choices=tuple(CELLS), default=list(CELLS), metavar="CELL")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--allow", type=float, default=2.0, help="fail where slower by more than this factor")
    options = parser.parse_args(arguments)
    failed = []
    with ExitStack() as stack:
        base = Worker(stack.enter_context(worktree(options.base)), options.threads)
        stack.callback(base.close)
        here = Worker(ROOT, options.threads)
        stack.callback(here.close)
        print(f"{'cell':<22}{options.base[:12] + ', ms':>16}{'here, ms':>12}{'base / here':>14}{'range':>16}")
        for cell in options.cells:
            calls = max(1, min(200, int(0.05 / min(w.time(cell, 3) for w in (base, here)))))
            pairs = [(base.time(cell, calls), here.time(cell, calls)) for _ in range(options.rounds)]
            gains = [b / h for b, h in pairs]
            lost = verdict([h / b for b, h in pairs], options.allow)
            failed += [cell] * lost
            medians = [statistics.median(side) * 1e3 for side in zip(*pairs, strict=True)]
            scatter = f"{min(gains):.2f}-{max(gains):.2f}"
            print(
                f"{cell:<22}{medians[0]:>16.3f}{medians[1]:>12.3f}{statistics.median(gains):>14.2f}{scatter:>16}"
                + ("   SLOWER" if lost else ""),
                flush=True,
            )
    if failed:
        print(f"slower than {options.base} by more than {options.allow} times: {', '.join(failed)}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
