"""``python -m tests.fuzz``."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.fuzz.running import SLICE, cases, one_case, targets


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Drawn cases, see the package's text.")
    parser.add_argument("--minutes", type=float, default=1.0, help="for how long, all targets together (default: 1)")
    parser.add_argument("--only", default="", help=f"some of {', '.join(targets())}")
    parser.add_argument("--first", type=int, help="seed of the first case (default: by the clock)")
    parser.add_argument("--seed", type=int, help="run this one case")
    args = parser.parse_args()
    names = [name for name in args.only.split(",") if name] or targets()
    unknown = sorted(set(names) - set(targets()))
    if unknown:
        parser.error(f"--only: no target {unknown[0]!r}; there are {', '.join(targets())}")
    if args.seed is not None:
        for name in names:
            with tempfile.TemporaryDirectory() as folder:
                one_case(name, args.seed, Path(folder))
        return 0
    first = int(time.time()) * 1000 if args.first is None else args.first
    end = time.monotonic() + 60 * args.minutes
    done = dict.fromkeys(names, 0)
    failures = []
    while time.monotonic() < end:
        for name in names:
            n, failed = cases(name, first + done[name], min(SLICE, max(0.1, end - time.monotonic())))
            done[name] += n
            for failure in failed:
                print(failure, flush=True)
            failures += failed
        print(", ".join(f"{name} {n}" for name, n in done.items()) + f"; {len(failures)} failures", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
