"""What the query set does to a transductive answer: ``python -m benchmarks.query_sets BANK [RUN|METHOD ...]``.

5-way tasks of the bank's test classes, with query rows of all classes, unevenly spread, of one class alone, or a single
row; prototypes, soft k-means and what else is named on the same tasks. For each kind of query set also how often
`kernelmeta.FewShotClassifier` warns. ``--told`` adds a column for each method that takes proportions, which is told
those of the query rows; ``--counted N`` another one, given the counts of N rows drawn with these.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import torch
from torch import Tensor

import kernelmeta as km
from kernelmeta.training.answers import METHODS, TAKE_PROPORTIONS, Chosen, doubts, make_learner, probabilities
from kernelmeta.training.proportions import proportions_of

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
    parser.add_argument("runs", nargs="*", help="of kernelmeta train, 5-way, or methods")
    parser.add_argument("--tasks", type=int, default=1000)
    parser.add_argument("--shot", type=int, default=1)
    parser.add_argument("--only", default="", metavar="TEXT", help="query sets whose titles hold this")
    parser.add_argument("--told", action="store_true")
    parser.add_argument("--counted", type=int, metavar="N")
    args = parser.parse_args()
    bank = km.data.FeatureBank.load(args.bank)
    named: list[tuple[str | None, str | None]] = [("prototypes", None), ("soft_kmeans", None)]
    named += [(name, None) if name in METHODS else (None, name) for name in args.runs]
    # method, what it is told of the proportions
    columns: list[tuple[Chosen, str]] = []
    for method, run in named:
        chosen = make_learner(method, run, WAY, bank.n_features)
        takes = chosen.method in TAKE_PROPORTIONS
        told = ["told"] * args.told + ["counted"] * (args.counted is not None) if takes else []
        columns += [(chosen, what) for what in ["", *told]]
    titles = [f"{chosen.method}, {what}" if what else chosen.method for chosen, what in columns]
    print("| query set |", " | ".join(titles), "| warned |\n|---|" + "---|" * (len(columns) + 1))
    for title, (balance, taken) in QUERY_SETS.items():
        if args.only not in title:
            continue
        sampler = km.data.EpisodeSampler(bank, "test", way=WAY, shot=args.shot, query=QUERY, balance=balance, seed=0)
        right: list[list[float]] = [[] for _ in columns]
        warned = 0
        for task in range(args.tasks):
            support_index, labels, query_index, answers = (drawn[0] for drawn in sampler.draw(task, 1))
            rows = taken(answers)
            support, query = bank.features[support_index].float(), bank.features[query_index[rows]].float()
            true = torch.bincount(answers[rows], minlength=WAY).double() / int(rows.sum())
            known = {"": None, "told": proportions_of(true, None, range(WAY))}
            if args.counted is not None:
                generator = torch.Generator().manual_seed(task)
                drawn = torch.multinomial(true, args.counted, replacement=True, generator=generator)
                known["counted"] = proportions_of(None, torch.bincount(drawn, minlength=WAY), range(WAY))
            for found, (chosen, what) in zip(right, columns, strict=True):
                given = probabilities(chosen.learner, support, labels, query, proportions=known[what]).argmax(-1)
                found.append(float((given == answers[rows]).double().mean()))
            warned += doubts(columns[1][0].learner, support, labels, query, range(WAY)) is not None
        cells = []
        for found in right:
            values = 100 * torch.tensor(found)
            cells.append(f"{values.mean():.1f} ± {1.96 * values.std() / math.sqrt(len(found)):.1f}")
        print(f"| {title} | {' | '.join(cells)} | {100 * warned / args.tasks:.0f} % |", flush=True)


if __name__ == "__main__":
    main()
