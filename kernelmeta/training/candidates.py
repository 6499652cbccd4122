"""The settings from which a comparison chooses, on the validation classes, for every learner and cell.

Steps and rates of the inner loop spread over what the authors of each method used and what features of other scales
need; the first candidates of a learner are its most usual ones, for quick runs.
"""

from __future__ import annotations

import itertools
import os
from typing import Any

from kernelmeta.data.files import read_json
from kernelmeta.training.learners import SOFT_KMEANS


def _grid(**choices: tuple[Any, ...]) -> tuple[dict[str, Any], ...]:
    return tuple(dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values()))


_ADAM = {"optimizer": ("Adam",), "lr": (1e-3,), "tasks_per_step": (4,)}
# The weights of the last step depend on the last few episodes; a mean over some thousand does not.
_SGD = {"tasks_per_step": (4,), "lr": (1e-2,), "average": (2000,)}
_SLOW = {"tasks_per_step": (16,), "lr": (1e-3,), "optimizer": ("Adam",), "weight_decay": (0.0,), "average": (2000,)}
# With a rate of 3e-3 all the way the training may settle where the first step is one back, above all on features whose
# cosines differ little.
_EQUIVARIANT = {"tasks_per_step": (16,), "optimizer": ("Adam",), "weight_decay": (0.0,)}
_CYCLE = {"lr": (3e-3,), "schedule": ("one_cycle",), "clip": (1.0,), **_EQUIVARIANT}

# Features as they are, square-rooted, centred.
_PLAIN = {"transform": ("none",), "center": ("none",)}
_ROOTED = {"transform": ("power:0.5",), "center": ("none", "task")}
_CENTRED = {"transform": ("power:0.5",), "center": ("task",)}
_FEATURES = (*_grid(**_PLAIN), *_grid(**_ROOTED), *_grid(transform=("none",), center=("train",)))


def _descents(**own: tuple[Any, ...]) -> tuple[dict[str, Any], ...]:
    """Fewer and larger steps than the published thousand of 1e-4."""
    return tuple({**one, **features} for features in _FEATURES for one in _grid(**own, rate=(3e-3,), steps=(100,)))


CANDIDATES: dict[str, tuple[dict[str, Any], ...]] = {
    "prototypes": ({"untrained": True}, *_grid(tasks_per_step=(4,), lr=(1e-3, 1e-2))),
    SOFT_KMEANS: (
        *_grid(scale=(10.0, 20.0, 5.0, 40.0), steps=(10, 3, 1, 30)),
        *_grid(scale=(10.0, 20.0, 5.0), steps=(10, 3), **_ROOTED),
    ),
    # The published settings first, then sharper and blunter, and other features, as for all.
    "pt_map": _grid(sharpness=(10.0, 20.0), tolerance=(1e-3,), **_CENTRED),
    "sinkhorn_kmeans": (
        *_grid(scale=(10.0, 20.0), tolerance=(1e-3,), **_CENTRED),
        *_grid(scale=(10.0,), tolerance=(1e-3,), **_PLAIN),
    ),
    "tim": _descents(marginal_weight=(1.0, 10.0)),
    "alpha_tim": _descents(alpha=(2.0, 7.0)),
    "laplacian_shot": tuple(
        {**one, **features} for features in _FEATURES for one in _grid(strength=(0.7, 0.3, 1.0), rectify=(True, False))
    ),
    "bd_cspn": tuple({"scale": scale, **features} for features in _FEATURES for scale in (10.0, 1.0, 20.0)),
    "logistic_regression": _grid(C=(10.0, 1.0), transform=("power:0.5",), center=("none",)),
    "anil": _grid(steps=(20, 5), inner_lr=(1.0, 0.1, 10.0), **_ADAM),
    "ridge": _grid(optimizer=("Adam",), lr=(1e-3, 1e-2), tasks_per_step=(4,)),
    "lqf": _grid(hidden=(64, 16), **_ADAM),
    # What the labels say and what was learned about the query rows, in either order; the latter alone; soft k-means,
    # which sharper logits suit where the query rows are unevenly spread, put right by the labels; the labels, and then
    # the gradient that knows no order, or the latter alone.
    "combined": (
        *_grid(
            phases=(
                "cross_entropy:20:0.1,synthetic_gradient:3:0.001",
                "cross_entropy:20:0.5,synthetic_gradient:3:0.001",
                "cross_entropy:20:0.1,synthetic_gradient:3:0.001,cross_entropy:20:0.1",
                "synthetic_gradient:3:0.001,cross_entropy:20:0.1",
                "synthetic_gradient:3:0.001",
            ),
            **_SGD,
        ),
        *_grid(
            phases=(
                "soft_assignment:3:1,cross_entropy:20:0.1,synthetic_gradient:3:0.001",
                "soft_assignment:3:1,synthetic_gradient:3:0.0001,cross_entropy:20:0.1",
            ),
            scale=(20.0,),
            **_SGD,
        ),
        *_grid(
            phases=(
                "soft_assignment:3:1,cross_entropy:20:0.1",
                "soft_assignment:3:1,cross_entropy:20:0.1,soft_assignment:3:1,cross_entropy:20:0.1",
            ),
            scale=(40.0, 20.0),
            **_SLOW,
        ),
        *_grid(
            phases=("cross_entropy:20:2.5,equivariant_gradient:5:0.01", "equivariant_gradient:5:0.01"),
            hidden=(16,),
            **_ROOTED,
            **_CYCLE,
        ),
    ),
    "equivariant": (
        *_grid(steps=(5,), inner_lr=(1e-2,), hidden=(16, 24), **_ROOTED, **_CYCLE),
        *_grid(steps=(3, 5), inner_lr=(1e-2,), lr=(1e-3,), average=(500,), **_EQUIVARIANT),
    ),
    "maml": _grid(inner_lr=(0.1, 0.03, 0.3), **_ADAM),
    "sib": (
        *_grid(steps=(3,), inner_lr=(1e-3, 1e-2), **_SGD),
        *_grid(steps=(10,), inner_lr=(1e-3, 1e-1), tasks_per_step=(4,), lr=(2e-3,), average=(2000,)),
        *_grid(steps=(1,), inner_lr=(1e-3,), tasks_per_step=(16,), lr=(1e-2,), average=(2000,)),
    ),
}


def read_candidates(path: str | os.PathLike[str]) -> dict[str, list[dict[str, Any]]]:
    """Candidates from a JSON file: an object, learner -> list of objects of settings.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: it holds something else.
    """
    content = read_json(path)
    for learner, candidates in content.items():
        if not isinstance(candidates, list) or not all(isinstance(candidate, dict) for candidate in candidates):
            raise ValueError(f"{path}: expected a list of settings for {learner!r}")
    return content
