"""What counted proportions are worth to soft k-means: ``python -m benchmarks.counted_proportions BANK``.

5-way tasks of the bank's test classes, 75 query rows in shares drawn from Dirichlet(2). Soft k-means without
proportions, with those of the query rows, and with the counts of n rows that are drawn with the same shares, as
``kernelmeta.FewShotClassifier(counts=...)`` takes them; gains in points, paired by task.
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor

import kernelmeta as km
from kernelmeta.training.answers import told
from kernelmeta.training.proportions import counted_proportions

WAY, COUNTED = 5, (10, 20, 50, 200, 1000)


def interval(values: Tensor) -> str:
    """Mean and half of the 95 % interval."""
    return f"{values.mean():.1f} ± {1.96 * values.std() / math.sqrt(len(values)):.1f}"


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.counted_proportions", description=__doc__)
    parser.add_argument("bank")
    parser.add_argument("--tasks", type=int, default=1000)
    parser.add_argument("--split", default="test")
    args = parser.parse_args()
    bank = km.data.FeatureBank.load(args.bank)
    titles = [*(f"{n} counted" for n in COUNTED), "true shares"]
    print("| labelled rows a class | soft k-means |", " | ".join(titles), "|\n|---|---|" + "---|" * len(titles))
    for shot in (1, 5):
        sampler = km.data.EpisodeSampler(bank, args.split, way=WAY, shot=shot, query=15, balance="dirichlet:2", seed=0)
        support_index, labels, query_index, answers = sampler.draw(0, args.tasks)
        support, query = bank.features[support_index].float(), bank.features[query_index].float()
        true = torch.nn.functional.one_hot(answers, WAY).double().mean(1)

        def right(learner: torch.nn.Module, *rows: Tensor, answers: Tensor = answers, **known: Tensor) -> Tensor:
            return 100 * (learner(*rows, **known).argmax(-1) == answers).double().mean(-1)

        plain = km.nn.SoftKMeans(WAY)
        without = right(plain, support, labels, query)
        generator = torch.Generator().manual_seed(0)
        cells = [interval(without)]
        for n in (*COUNTED, None):
            if n is None:
                relax, shares = 1.0, true
            else:
                drawn = true.multinomial(n, replacement=True, generator=generator)
                counts = torch.nn.functional.one_hot(drawn, WAY).sum(1)
                known = [counted_proportions(of_task, range(WAY)) for of_task in counts]
                relax, shares = known[0].relax, torch.stack([each.shares for each in known])
            head = told(plain, bank.n_features, relax)
            gain = right(head, support, labels, query, proportions=shares.float()) - without
            cells.append(f"{'+' if gain.mean() > 0 else ''}{interval(gain)}")
        print(f"| {shot} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
