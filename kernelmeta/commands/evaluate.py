"""``kernelmeta evaluate``: the accuracy of what was trained."""

from __future__ import annotations

import argparse
from pathlib import Path

from kernelmeta.command_line import DATA_HELP, HELP, Add, at_option, bank_of, machine_options, say_of
from kernelmeta.data import EpisodeSampler
from kernelmeta.data.files import write_json
from kernelmeta.training.answers import mixed_backbones
from kernelmeta.training.evaluation import evaluate, table, title
from kernelmeta.training.loading import for_ways, learner_text, load_learner
from kernelmeta.training.plots import steps_plot
from kernelmeta.training.settings import bounds


def add_commands(add: Add) -> None:
    """Adds this command to the parser."""
    command = add(
        "evaluate",
        _evaluate,
        "Accuracy of a trained learner beside prototypes and soft k-means.",
        "evaluate runs/one --query-balance dirichlet:2",
    )
    command.add_argument("checkpoint", metavar="RUN|CHECKPOINT", help="what train made, or a published checkpoint")
    command.option("data", "--data", help=DATA_HELP + " (default: as trained)")
    command.option(
        "episodes", "--split", default="test", metavar="{train,val,test}", help="of the classes (default: test)"
    )
    command.option("episodes", "--episodes", type=int, default=2000, help="episodes to evaluate on (default: 2000)")
    for name in ("way", "shot", "query"):
        command.option("episodes", f"--{name}", type=int, help=HELP[name] + " (default: as trained)")
    command.option("episodes", "--query-balance", help=HELP["query_balance"] + " (default: as trained)")
    command.option("episodes", "--seed", type=int, default=0, help="seed of the episodes (default: 0)")
    command.option("output", "--json", type=Path, metavar="FILE", help="write the results to this file")
    command.option(
        "output", "--plot", type=Path, metavar="FILE", help="draw the accuracy over the inner steps, as a PNG"
    )
    command.option("data", "--backbone", help=HELP["backbone"])
    command.option("data", "--weights", metavar="FILE", help=HELP["weights"])
    at_option(command)
    machine_options(command)


def _evaluate(args: argparse.Namespace) -> None:
    if args.episodes < 2:
        raise ValueError(f"episodes: expected at least 2, got {args.episodes}")
    head, trained = load_learner(args.checkpoint, args.at)
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
    mixed = mixed_backbones({args.checkpoint: trained.get("features_of", ""), data: bank.backbone})
    if mixed is not None:
        say_of(args)(f"warning: {mixed}")
    # Of sizes that were drawn for every episode, the most ways, the fewest shots, the most query rows.
    way = bounds(trained["way"])[1] if args.way is None else args.way
    if way < 2:
        raise ValueError(f"--way: expected at least 2, got {way}")
    try:
        head = for_ways(head, way)
    except ValueError as error:
        raise ValueError(f"--way: {args.checkpoint} {error}") from None
    balance = args.query_balance or trained.get("query_balance", "even").partition(",")[0]
    sampler = EpisodeSampler(
        bank,
        args.split,
        way=way,
        shot=bounds(trained.get("shot", 1))[0] if args.shot is None else args.shot,
        query=bounds(trained.get("query", 15))[1] if args.query is None else args.query,
        balance=balance,
        seed=args.seed,
    )
    results = evaluate(
        head.to(args.device),
        bank.features.to(args.device),
        sampler,
        args.episodes,
        learner=trained["learner"],
        temperature=trained.get("temperature", 1.0),
        progress=not args.quiet,
    )
    results |= {name: trained[name] for name in ("at", "at_episodes", "trained_episodes") if name in trained}
    results |= {"query_balance": balance, "seed": args.seed, "split": args.split, "data": data}
    if args.json is not None:
        write_json(args.json, results)
    if args.plot is not None:
        steps_plot(args.plot, results, title(results))
    print(f"{args.checkpoint}: {learner_text(trained)}")
    print(table(results))
