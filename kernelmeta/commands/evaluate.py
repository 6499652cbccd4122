"""``kernelmeta evaluate``: the accuracy of what was trained."""

from __future__ import annotations

import argparse
from pathlib import Path

from kernelmeta.command_line import DATA_HELP, HELP, Add, bank_of, machine_options
from kernelmeta.data import EpisodeSampler
from kernelmeta.data.files import write_json
from kernelmeta.training.evaluation import evaluate, table, title
from kernelmeta.training.loading import load_learner
from kernelmeta.training.plots import steps_plot


def add_commands(add: Add) -> None:
    """Adds this command to the parser."""
    command = add("evaluate", _evaluate, "Accuracy of a trained learner beside prototypes and soft k-means.")
    command.add_argument("checkpoint", metavar="RUN_DIR|CHECKPOINT", help="what train made, or a published checkpoint")
    command.add_argument("--data", help=DATA_HELP + " (default: as trained)")
    command.add_argument("--split", default="test", help="train, val or test (default: test)")
    command.add_argument("--episodes", type=int, default=2000, help="episodes to evaluate on (default: 2000)")
    for name in ("shot", "query"):
        command.add_argument(f"--{name}", type=int, help=HELP[name] + " (default: as trained)")
    command.add_argument("--query-balance", help=HELP["query_balance"] + " (default: as trained)")
    command.add_argument("--seed", type=int, default=0, help="seed of the episodes (default: 0)")
    command.add_argument("--json", type=Path, metavar="FILE", help="write the results to this file")
    command.add_argument("--plot", type=Path, metavar="FILE", help="draw the accuracy over the inner steps, as a PNG")
    command.add_argument("--backbone", help=HELP["backbone"])
    command.add_argument("--weights", metavar="FILE", help=HELP["weights"])
    machine_options(command)


def _evaluate(args: argparse.Namespace) -> None:
    if args.episodes < 2:
        raise ValueError(f"episodes: expected at least 2, got {args.episodes}")
    head, trained = load_learner(args.checkpoint)
    data = args.data or trained.get("data")
    if data is None:
        raise ValueError(f"--data: {args.checkpoint} does not say what it was trained on; give a bank")
    same = args.data is None and args.weights is None
    bank = bank_of(
        args,
        data,
        trained.get("weights") if same else args.weights,
        trained.get("backbone") if same else args.backbone,
        trained["learner"],
    )
    if bank.n_features != head.n_features:
        raise ValueError(f"--data: the learner takes {head.n_features} features, {data} has {bank.n_features}")
    balance = args.query_balance or trained.get("query_balance", "even")
    sampler = EpisodeSampler(
        bank,
        args.split,
        way=trained["way"],
        shot=trained.get("shot", 1) if args.shot is None else args.shot,
        query=trained.get("query", 15) if args.query is None else args.query,
        balance=balance,
        seed=args.seed,
    )
    results = evaluate(
        head.to(args.device),
        bank.features.to(args.device),
        sampler,
        args.episodes,
        learner=trained["learner"],
        progress=not args.quiet,
    )
    results |= {"query_balance": balance, "seed": args.seed, "split": args.split, "data": data}
    if args.json is not None:
        write_json(args.json, results)
    if args.plot is not None:
        steps_plot(args.plot, results, title(results))
    print(table(results))
