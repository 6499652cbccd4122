"""Phases of a program: which rows drive the classifier, by which oracle, for how many steps, at which rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# In the order of enum Oracle in csrc/engine/oracles.h, each with the rows it uses unless told otherwise.
ORACLES = {
    "cross_entropy": "support",
    "squared_error": "support",
    "hinge": "support",
    "entropy": "query",
    "soft_assignment": "query",
    "synthetic_gradient": "query",
    "equivariant_gradient": "query",
    "proportions": "query",
    "assignment": "query",
}
LABELLED = ("cross_entropy", "squared_error", "hinge")
GUESSED = ("synthetic_gradient", "equivariant_gradient")  # by an MLP
# Those that may know the shares of the query rows that the classes have, and what they take them to be if not told.
SHARING = {"proportions": "uniform", "assignment": "uniform", "soft_assignment": "none"}
MARGINALS = ("none", "uniform", "given")  # in the order of enum Shares in csrc/engine/marginals.h


@dataclass(frozen=True)
class Phase:
    """Some steps of one kind.

    Args:
        oracle: what supplies the gradient of the logits:
            "cross_entropy", "squared_error" (with the one-hot labels times a scale as targets), "hinge" (Weston &
            Watkins 1998, margin 1): losses of labelled rows, the support rows;
            "entropy": of the predictions, a loss that needs no labels;
            "soft_assignment": no gradient; the classifier moves by ``lr`` towards the mean of its start (weighing as
            much as the class's support rows) and of the query rows, each shared out among the classes by softmax.
            With ``lr=1`` this is soft k-means (Ren et al. 2018). Cosine classifiers only;
            "synthetic_gradient": an MLP guesses the gradient from the logits (Hu et al. 2020);
            "equivariant_gradient": the same by an MLP that looks at each row and class by themselves, so that it takes
            any number of classes, numbered in any order (:class:`kernelmeta.nn.EquivariantGradientMLP`);
            "proportions": the KL divergence of the mean prediction from the shares of the rows that the classes are
            known to have;
            "assignment": the same shares as a constraint: the gradient leads from the predictions to the nearest ones
            whose mean they are (optimal transport; `kernelmeta.reference.transport`).
        steps: 0 or more.
        lr: the learning rate, the first value of the rates where they are learned.
        rows: "support" or "query"; the oracle's own if None.
        learn_rates: a module that runs the phase learns one rate for each step (Li et al. 2017, Meta-SGD).
        marginals: what "proportions", "assignment" and "soft_assignment" take the classes' shares of the query rows to
            be: "uniform", "given" (the ``proportions`` of the call) or, for "soft_assignment", "none": it shares each
            row out by itself. None: uniform, or of "soft_assignment" none.
        relax: above 0 and at most 1: how far "assignment" and "soft_assignment" trust the shares. 1: they are met;
            less, for shares that were counted on a few rows: a KL divergence of weight relax / (1 - relax) from them.

    Raises:
        ValueError, TypeError: an argument that is not as above, named.
    """

    oracle: str
    steps: int
    lr: float
    rows: str | None = None
    learn_rates: bool = False
    marginals: str | None = None
    relax: float = 1.0

    def __post_init__(self) -> None:
        if self.oracle not in ORACLES:
            raise ValueError(f"oracle: expected one of {', '.join(ORACLES)}, got {self.oracle!r}")
        if not isinstance(self.steps, int) or isinstance(self.steps, bool):
            raise TypeError(f"steps: expected an int, got {type(self.steps).__name__}")
        if self.steps < 0:
            raise ValueError(f"steps: expected 0 or more, got {self.steps}")
        if not isinstance(self.lr, (int, float)) or isinstance(self.lr, bool):
            raise TypeError(f"lr: expected a float, got {type(self.lr).__name__}")
        if not math.isfinite(self.lr):
            raise ValueError(f"lr: expected a finite number, got {self.lr}")
        if self.rows is None:
            object.__setattr__(self, "rows", ORACLES[self.oracle])
        if self.rows not in ("support", "query"):
            raise ValueError(f"rows: expected support, query or None, got {self.rows!r}")
        if self.rows == "query" and self.oracle in LABELLED:
            raise ValueError(f"rows: {self.oracle} needs labels, and the query rows have none; use support")
        if self.rows == "support" and self.oracle in SHARING:
            raise ValueError(f"rows: {self.oracle} is for query rows, got support")
        if self.marginals is None:
            object.__setattr__(self, "marginals", SHARING.get(self.oracle, "none"))
        least = "uniform" if self.oracle in ("proportions", "assignment") else "none"
        accepted = MARGINALS[MARGINALS.index(least) :] if self.oracle in SHARING else ("none",)
        if self.marginals not in accepted:
            raise ValueError(f"marginals: {self.oracle} takes {', '.join(accepted)}, got {self.marginals!r}")
        if not isinstance(self.relax, (int, float)) or isinstance(self.relax, bool):
            raise TypeError(f"relax: expected a float, got {type(self.relax).__name__}")
        if not 0 < self.relax <= 1:
            raise ValueError(f"relax: expected more than 0 and at most 1, got {self.relax}")
        if self.relax != 1 and (self.oracle == "proportions" or self.marginals == "none"):
            raise ValueError(f"relax: there is no constraint of {self.oracle} to relax, got {self.relax}")

    def means(self, reduction: str | None) -> bool:
        """Whether the loss is the mean over the rows, rather than the sum.

        Without a ``reduction``: the mean of a loss, and the sum of guessed gradients, as published.
        """
        if reduction is None:
            return self.oracle not in GUESSED
        return reduction == "mean"


def total_steps(phases: Sequence[Phase]) -> int:
    return sum(phase.steps for phase in phases)
