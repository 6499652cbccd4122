"""Answers for rows that nobody has labelled: one task, whose classes and labelled rows are the user's own."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernelmeta import nn
from kernelmeta.data.words import listing
from kernelmeta.training.candidates import CANDIDATES
from kernelmeta.training.learners import LEARNERS, SOFT_KMEANS, tasks_together
from kernelmeta.training.loading import at_text, for_ways, load_learner
from kernelmeta.training.peers import PEERS, PeerLearner
from kernelmeta.training.proportions import Proportions


def _peer(name: str) -> Callable[..., PeerLearner]:
    """With the settings that a comparison tries first: the published ones, or the most usual."""
    return lambda n_way, n_features, **features: PeerLearner(name, n_way, {**CANDIDATES[name][0], **features})


# Without weights of a training: (ways, features, transform=..., center=...) -> learner.
UNTRAINED: dict[str, Callable[..., nn.Prototypes | nn.SoftKMeans | nn.RidgeHead | PeerLearner]] = {
    SOFT_KMEANS: nn.SoftKMeans,
    "prototypes": nn.Prototypes,
    "ridge": nn.RidgeHead,
    **{name: _peer(name) for name in PEERS},
}
# Those that may be told the classes' shares of the query rows.
TAKE_PROPORTIONS = (SOFT_KMEANS, *(name for name, kind in PEERS.items() if kind.takes_proportions))
METHODS = (SOFT_KMEANS, *(name for name in LEARNERS if name != "maml"), *PEERS)
SMALLEST, LARGEST = 1e-10, 1e18  # of a row's largest feature
_ROWS, _TASKS = 4096, 256  # that a call takes


class Chosen(NamedTuple):
    """A learner for a number of classes, in evaluation mode."""

    method: str
    learner: Any
    weights: str
    """Which weights of a training it has; empty where it has none."""
    temperature: float = 1.0
    """By which its logits are divided for probabilities."""
    features_of: str = ""
    """The backbone whose features it was trained on, as a bank names it; empty if nobody knows, or it wasn't."""


def method_or_weights(what: str) -> tuple[str | None, str | None]:
    """What somebody named, as a method that needs no training or as weights: the one or the other is None.

    Args:
        what: one of `METHODS`, or the path of a run folder or a checkpoint, which goes first.

    Raises:
        FileNotFoundError: it is neither.
    """
    if os.path.exists(what):
        return None, what
    if what in METHODS:
        return what, None
    close = difflib.get_close_matches(what, UNTRAINED, 1, 0.7)
    guess = f"; did you mean {close[0]}?" if close else ""
    raise FileNotFoundError(f"{what}: neither a run, nor one of {', '.join(UNTRAINED)}{guess}")


def make_learner(
    method: str | None,
    weights: str | os.PathLike[str] | None,
    n_way: int,
    n_features: int,
    at: str | None = None,
    *,
    transform: str | None = None,
    center: str | None = None,
) -> Chosen:
    """A learner for so many classes, in evaluation mode.

    Args:
        method: one of `METHODS`; None for that of the weights, or for soft k-means without any.
        weights: a run folder of ``kernelmeta train``, its checkpoint, or a published one; None for a method that has to
            be trained for nothing.
        at: which weights of the training: "best", "last", or None, see `load_learner`.
        transform, center: of the features, see :class:`kernelmeta.Transform`, for a method without weights; None for
            the method's own. There are no training rows for "train".

    Raises:
        OSError: the weights cannot be read.
        ValueError: no such method, one that must be trained, or weights that do not fit the method, the number of
            classes or the features.
    """
    if method is not None and method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    of_features = {"transform": transform, "center": center}
    features = {name: value for name, value in of_features.items() if value is not None}
    if weights is None:
        if at is not None:
            raise ValueError(f"at: {at!r} says which weights of a training, and none are given")
        method = method or SOFT_KMEANS
        if method not in UNTRAINED:
            raise ValueError(
                f"method: {method} must be trained; give the weights of a run of 'kernelmeta train --learner {method}',"
                f" or one of {', '.join(UNTRAINED)}, which need none"
            )
        if center == "train":
            raise ValueError("center: 'train' is for the weights of a training; a method without any has no such rows")
        return Chosen(method, UNTRAINED[method](n_way, n_features, **features).eval(), "")
    if features:
        name, value = next(iter(features.items()))
        raise ValueError(f"{name}: {value!r}, but weights of a training come with a {name} of their own")
    head, settings = load_learner(weights, at)
    trained: str = settings["learner"]
    if method is not None and method != trained:
        raise ValueError(f"method: {method}, but the weights in {os.fspath(weights)} are of {trained}")
    if trained == "maml":
        raise ValueError(f"weights: {os.fspath(weights)} is a whole network (maml), which takes no features of one row")
    if head.n_features != n_features:
        raise ValueError(
            f"weights: {os.fspath(weights)} was trained on {head.n_features} features, but the rows have {n_features}"
        )
    try:
        learner = for_ways(head, n_way).eval()
    except ValueError as error:
        raise ValueError(f"weights: {os.fspath(weights)} {error}") from None
    temperature, features_of = settings.get("temperature", 1.0), settings.get("features_of", "")
    return Chosen(trained, learner, at_text(settings), temperature, features_of)


def mixed_backbones(features_of: Mapping[str, str]) -> str | None:
    """What is wrong with features of different backbones, or None.

    Args:
        features_of: what holds features, or was trained on some -> the backbone as a bank names it, empty if unknown.
    """
    known = {name: backbone for name, backbone in features_of.items() if backbone}
    first = next(iter(known), "")
    other = next((name for name in known if known[name] != known[first]), None)
    if other is None:
        return None
    return (
        f"features of two backbones, {known[first]} ({first}) and {known[other]} ({other}), cannot be compared: the"
        " answers mean nothing"
    )


def check_use(chosen: Chosen, *, transductive: bool, proportions: bool) -> None:
    """Raise a ValueError where a method cannot be used like that.

    Args:
        transductive: the query rows are judged together; else each alone.
        proportions: those of the query rows are given.
    """
    if proportions and not _takes_proportions(chosen.learner):
        raise ValueError(f"proportions: {chosen.method} takes none; these do: {', '.join(TAKE_PROPORTIONS)}")
    if not proportions and getattr(chosen.learner, "needs_proportions", False):
        raise ValueError(f"proportions: {chosen.method} must be told the classes' shares of the query rows; give them")
    if proportions and not transductive:
        raise ValueError("proportions: with transductive=False each row is judged alone, and one row has none")
    if not transductive and _only_together(chosen.learner):
        why = (
            "shares the rows of a call out among all classes"
            if getattr(chosen.learner, "assumes_even", False)
            else "takes from each row the mean of a call's rows (center task)"
        )
        raise ValueError(
            f"transductive=False: {chosen.method} {why}, and cannot judge a row alone; prototypes and ridge do"
        )


def _takes_proportions(learner: Any) -> bool:
    takes = getattr(learner, "takes_proportions", False) or getattr(learner, "needs_proportions", False)
    return isinstance(learner, nn.SoftKMeans) or takes


def told(learner: Any, n_features: int, relax: float) -> Any:
    """The learner that is called with proportions: for soft k-means, the program whose soft assignments meet them.

    ``relax``: how far they are trusted, for one that can say so.
    """
    if not isinstance(learner, nn.SoftKMeans):
        return learner
    phase = nn.Phase("soft_assignment", learner.steps, 1.0, marginals="given", relax=relax)
    return nn.Program(
        learner.n_way, n_features, [phase], scale=learner.scale, transform=learner.transform, center=learner.center
    ).eval()


def _only_together(learner: Any) -> bool:
    """Whether a learner has no answer for a row alone."""
    return getattr(learner, "assumes_even", False) or _center(learner) == "task"


def _center(learner: Any) -> str:
    found: str = learner.transform.center if isinstance(learner, PeerLearner) else getattr(learner, "center", "none")
    return found


@torch.no_grad()
def probabilities(
    learner: Any,
    support: Tensor,
    labels: Tensor,
    query: Tensor,
    *,
    transductive: bool = True,
    temperature: float = 1.0,
    proportions: Proportions | None = None,
) -> Tensor:
    """Of each class, [Q, N], for the rows of one task.

    Args:
        learner: one for N classes.
        support: [S, D], with ``labels`` [S] in 0..N-1.
        query: [Q, D].
        transductive: a learner that looks at the query rows sees all of them at once; else each alone.
        temperature: by which the logits are divided.
        proportions: of the query rows, for a learner that takes them.

    Raises:
        ValueError: rows too large or too small to be compared, or without a finite answer.
    """
    for name, rows in (("support", support), ("query", query)):
        check_range(name, rows)
    if not len(query):
        return query.new_zeros(0, learner.n_way)
    if learner.transductive and transductive:
        task = (support[None], labels[None], query[None])
        if proportions is None:
            return _finite(torch.softmax(learner(*task)[0] / temperature, -1))
        learner = told(learner, query.shape[1], proportions.relax).to(query.device)
        logits = learner(*task, proportions=proportions.shares[None].to(query.device))[0]
        return _finite(torch.softmax(logits / temperature, -1), "or the proportions cannot be met: leave them out, or ")
    found = []
    if not learner.transductive:
        for rows in query.split(_ROWS):
            found.append(learner(support[None], labels[None], rows[None])[0])
    else:
        together = 1 if tasks_together(learner) else _TASKS  # (a learner that couples the tasks of a call gets one)
        for rows in query.split(together):
            T = len(rows)
            own = (support.expand(T, *support.shape), labels.expand(T, -1), rows[:, None])
            found.append(learner(*own)[:, 0])
    return _finite(torch.softmax(torch.cat(found) / temperature, -1))


def check_range(name: str, rows: Tensor) -> None:
    """Raise a ValueError for rows whose length the learners cannot compute with; zeros are such that they can."""
    if not rows.numel():
        return
    largest = rows.abs().amax(1)
    bad = ((largest > LARGEST) | ((largest < SMALLEST) & (largest > 0))).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"{name}: {len(bad)} rows are too large or too small to be compared: the largest feature of row {bad[0]} "
            f"is {float(largest[bad[0]]):.3g}, and it must lie in {SMALLEST:.0e}..{LARGEST:.0e}; rescale the features"
        )


def _finite(found: Tensor, why: str = "") -> Tensor:
    bad = (~found.isfinite().all(1)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"query: {len(bad)} rows have no finite answer: {listing(bad)}; {why}rescale the features")
    return found


@torch.no_grad()
def doubts(
    learner: Any,
    support: Tensor,
    labels: Tensor,
    query: Tensor,
    classes: Sequence[object],
    proportions: Proportions | None = None,
) -> str | None:
    """Why a transductive answer for these query rows is doubtful, or None.

    A transductive learner takes the query rows for a fair sample of all classes, or of classes with the proportions p
    that it is told. One row alone is none, and neither are rows of one class: those of which prototypes, which look at
    each row alone, give a class more than a share of 0.6 + 0.4 p, where p is 1 / N if nobody knows better
    (benchmarks/query_sets.py: how often that is so). ``classes``: the names of the N classes.
    """
    if not learner.transductive or not len(query) or learner.n_way < 2:
        return None
    alone = "prototypes and ridge"
    advice = (
        f"{alone} judge each row alone"
        if _only_together(learner) or proportions is not None
        else f"transductive=False judges each row alone, as do {alone}"
    )
    if len(query) == 1:
        return f"a single row has no others to be judged together with; {advice}"
    best = probabilities(nn.Prototypes(learner.n_way), support, labels, query).argmax(-1)
    shares = torch.bincount(best, minlength=learner.n_way).double().cpu() / len(query)
    told = torch.full_like(shares, 1 / learner.n_way) if proportions is None else proportions.shares.cpu()
    excess, largest = (shares - (0.6 + 0.4 * told)).max(0)
    if float(excess) <= 0:
        return None
    share, name = f"{100 * float(shares[largest]):.0f} %", classes[int(largest)]
    if proportions is not None:
        return (
            f"judged alone, {share} of these rows belong to one class ({name}), whose proportion is given as"
            f" {100 * float(told[largest]):.3g} %; {advice}"
        )
    if _takes_proportions(learner):
        advice = f"proportions= tells it how many rows each class has, and {advice}"
    return (
        f"judged alone, {share} of these rows belong to one class ({name}), and a method that judges them together "
        f"would rather spread them over all {learner.n_way} classes; {advice}"
    )
