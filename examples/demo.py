"""How much do unlabelled query rows help? The whole way, on the built-in glyphs, in a few minutes on two
cores.

A backbone learns some characters; a feature bank is made of others; SIB is meta-trained on the characters
of some scripts and tested, five unseen characters at a time with one example of each, on scripts never
seen. Twice: with query sets in which all classes are equally frequent, and with class frequencies drawn
from Dirichlet(2).

    python examples/demo.py [--out runs/demo]
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

from kernelmeta.cli import main as kernelmeta
from kernelmeta.training.evaluation import ahead
from kernelmeta.training.learners import TITLES

# Chosen on the validation classes.
# One thread: four tasks of this size are done before a second one would be awake.
TRAIN = ["--threads", "1", "--inner-lr", "1e-2", "--lr", "2e-3", "--tasks-per-step", "4", "--episodes", "80000"]
PROTOCOLS = {"even": "even", "Dirichlet(2)": "dirichlet:2"}


def run(*arguments: str) -> None:
    print(f"\n$ kernelmeta {' '.join(arguments)}", flush=True)
    code = kernelmeta(arguments)
    if code:
        raise SystemExit(code)


def row(name: str, result: dict[str, Any], against: str = "") -> str:
    return f"  {name:<14}{result['accuracy']:6.2f} ± {result['ci95']:.2f} %{against}"


def main() -> None:
    parser = argparse.ArgumentParser(description="The whole way on the built-in glyphs.")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder; its content is replaced")
    out: Path = parser.parse_args().out
    began = time.perf_counter()
    for name in ("backbone", *PROTOCOLS.values()):
        shutil.rmtree(out / name.replace(":", "-"), ignore_errors=True)

    run("pretrain", "glyphs", "--backbone", "conv4", "--out", f"{out}/backbone")
    bank = f"{out}/bank.safetensors"
    run("extract", "glyphs", "--weights", f"{out}/backbone/checkpoint.safetensors", "--out", bank)
    for balance in PROTOCOLS.values():
        folder = f"{out}/{balance.replace(':', '-')}"
        run("train", "--data", bank, "--query-balance", balance, *TRAIN, "--out", folder)

    print("\n5-way 1-shot on the test classes; differences are paired by episode; ± is the 95 % interval")
    for title, balance in PROTOCOLS.items():
        results = json.loads((out / balance.replace(":", "-") / "results.json").read_text())
        print(f"\n{title} queries, {results['episodes']} episodes")
        for name, base in results["baselines"].items():
            print(row(TITLES[name], base, f"   SIB is {ahead(base['difference'], base['difference_ci95'])}"))
        print(row(f"SIB, K = {results['steps']}", results))
    print(f"\n{time.perf_counter() - began:.0f} s in all; plots, checkpoints and logs are in {out}")


if __name__ == "__main__":
    main()
