"""What the query set does to a transductive answer: ``python -m benchmarks.query_sets BANK [RUN ...]``.

5-way tasks of the bank's test classes, with query rows of all classes, unevenly spread, of one class alone, or a single
row; prototypes, soft k-means and the trained runs on the same tasks. For each kind of query set also how often
`kernelmeta.FewShotClassifier` warns.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import torch
from torch import Tensor

import kernelmeta as km
from kernelmeta.training.answers import doubts, make_learner, probabilities

WAY, QUERY = 5, 15  # query rows of each class, on average
# How the query rows are spread over the classes, and which of them are taken.
QUERY_SETS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "75 rows, 15 of each class": ("even", lambda answers: answers >= 0),
    "75 rows, Dirichlet(2)": ("dirichlet:2", lambda answers: answers >= 0),
    "5 rows, one of each class": ("even", lambda answers: torch.arange(len(answers)) % QUERY == 0),
    "15 rows of one class": ("even", lambda answers: answers == 0),
    "5 rows of one class": ("even", lambda answers: (answers == 0) & (torch.arange(len(answers)) < 5)),
    "a single row": ("even", lambda answers: torch.arange(len(answers)) == 0),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.query_sets", description=__doc__)
    parser.add_argument("bank")
    parser.add_argument("runs", nargs="*", help="of kernelmeta train, 5-way")
    parser.add_argument("--tasks", type=int, default=1000)
    parser.add_argument("--shot", type=int, default=1)
    args = parser.parse_args()
    bank = km.data.FeatureBank.load(args.bank)
    methods = [make_learner(name, None, WAY, bank.n_features) for name in ("prototypes", "soft_kmeans")]
    methods += [make_learner(None, run, WAY, bank.n_features) for run in args.runs]
    print(
        "| query set |",
        " | ".join(chosen.method for chosen in methods),
        "| warned |\n|---|" + "---|" * (len(methods) + 1),
    )
    for title, (balance, taken) in QUERY_SETS.items():
        sampler = km.data.EpisodeSampler(bank, "test", way=WAY, shot=args.shot, query=QUERY, balance=balance, seed=0)
        right: list[list[float]] = [[] for _ in methods]
        warned = 0
        for task in range(args.tasks):
            support_index, labels, query_index, answers = (drawn[0] for drawn in sampler.draw(task, 1))
            rows = taken(answers)
            support, query = bank.features[support_index].float(), bank.features[query_index[rows]].float()
            for found, chosen in zip(right, methods, strict=True):
                given = probabilities(chosen.learner, support, labels, query).argmax(-1)
                found.append(float((given == answers[rows]).double().mean()))
            warned += doubts(methods[1].learner, support, labels, query, range(WAY)) is not None
        cells = []
        for found in right:
            values = 100 * torch.tensor(found)
            cells.append(f"{values.mean():.1f} ± {1.96 * values.std() / math.sqrt(len(found)):.1f}")
        print(f"| {title} | {' | '.join(cells)} | {100 * warned / args.tasks:.0f} % |", flush=True)


if __name__ == "__main__":
    main()
