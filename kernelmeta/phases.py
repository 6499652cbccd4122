"""Phases of a program: which rows drive the classifier, by which oracle, for how many steps, at which rate."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

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
    "marginal_entropy": "query",
}
LABELLED = ("cross_entropy", "squared_error", "hinge")
GUESSED = ("synthetic_gradient", "equivariant_gradient")  # by an MLP
# Those that may know the shares of the query rows that the classes have, and what they take them to be if not told.
SHARING = {"proportions": "uniform", "assignment": "uniform", "soft_assignment": "none"}
MARGINALS = ("none", "uniform", "given")  # in the order of enum Shares in csrc/engine/marginals.h
ENTROPIES = ("entropy", "marginal_entropy")
LEAST_BEYOND_1 = 0.01  # |alpha - 1|, where it is not 1: nearer, 1 / (alpha - 1) costs digits

_TERM = re.compile(r"\s*([+-]?)\s*(?:(\d+\.?\d*(?:[eE][+-]?\d+)?)\s*\*\s*)?([a-z_]+)(?:@(support|query))?\s*(?=[+-]|$)")


class Part(NamedTuple):
    """One oracle of a phase's steps, which are along the sum of all of them."""

    oracle: str
    rows: str
    weight: float = 1.0
    marginals: str = "none"
    relax: float = 1.0
    alpha: float = 1.0

    def means(self, reduction: str | None) -> bool:
        """Whether the loss is the mean over the rows, rather than the sum.

        Without a ``reduction``: the mean of a loss, and the sum of guessed gradients, as published.
        """
        if reduction is None:
            return self.oracle not in GUESSED
        return reduction == "mean"

    @property
    def term(self) -> str:
        """As it is written in a sum."""
        return f"{'-' if self.weight < 0 else '+'} {abs(self.weight)!r}*{self.oracle}@{self.rows}"


def _terms(text: str) -> list[tuple[float, str, str | None]]:
    """Weight, oracle and rows of every term of a sum."""
    terms: list[tuple[float, str, str | None]] = []
    at = 0
    while at < len(text) or not terms:
        found = _TERM.match(text, at)
        if found is None or (terms and not found[1]):
            raise ValueError(
                f"oracle: expected one of {', '.join(ORACLES)}, or a sum such as "
                f"'cross_entropy + 0.5*entropy - marginal_entropy', got {text!r}"
            )
        sign, weight, name, rows = found.groups()
        terms.append((float(weight or 1) * (-1 if sign == "-" else 1), name, rows))
        at = found.end()
    return terms


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
            whose mean they are (optimal transport; `kernelmeta.reference.transport`);
            "marginal_entropy": of the mean prediction; spread out by a negative weight.
            Or a weighted sum of these but "soft_assignment", whose steps are along the sum of their gradients, such
            as "cross_entropy + entropy - marginal_entropy" (TIM; Boudiaf et al. 2020), "0.5*entropy" or
            "cross_entropy + 0.1*entropy@support". Each term has rows of its own; marginals, relax and alpha are those
            of the terms that know them.
        steps: 0 or more.
        lr: the learning rate, the first value of the rates where they are learned.
        rows: "support" or "query"; the oracle's own if None. Of a sum, whose terms say it themselves, None; afterwards
            it is "query" if some term reads query rows.
        learn_rates: a module that runs the phase learns one rate for each step (Li et al. 2017, Meta-SGD).
        marginals: what "proportions", "assignment" and "soft_assignment" take the classes' shares of the query rows to
            be: "uniform", "given" (the ``proportions`` of the call) or, for "soft_assignment", "none": it shares each
            row out by itself. None: uniform, or of "soft_assignment" none.
        relax: above 0 and at most 1: how far "assignment" and "soft_assignment" trust the shares. 1: they are met;
            less, for shares that were counted on a few rows: a KL divergence of weight relax / (1 - relax) from them.
        alpha: above 0: "entropy" and "marginal_entropy" are ``(1 - sum_n p_n^alpha) / (alpha - 1)`` (Tsallis;
            alpha-TIM, Veilleux et al. 2021); 1: Shannon's. Nothing else within 0.01 of 1.

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
    alpha: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.oracle, str):
            raise TypeError(f"oracle: expected a str, got {type(self.oracle).__name__}")
        terms = _terms(self.oracle)
        for weight, oracle, _ in terms:
            if oracle not in ORACLES:
                raise ValueError(f"oracle: expected one of {', '.join(ORACLES)}, got {oracle!r}")
            if not math.isfinite(weight):
                raise ValueError(f"oracle: expected finite weights, got {self.oracle!r}")
            if oracle == "soft_assignment" and self.is_sum:
                raise ValueError(
                    f"oracle: soft_assignment is no gradient and takes no part in a sum, got {self.oracle!r}"
                )
        oracles = [oracle for _, oracle, _ in terms]
        if not isinstance(self.steps, int) or isinstance(self.steps, bool):
            raise TypeError(f"steps: expected an int, got {type(self.steps).__name__}")
        if self.steps < 0:
            raise ValueError(f"steps: expected 0 or more, got {self.steps}")
        if not isinstance(self.lr, (int, float)) or isinstance(self.lr, bool):
            raise TypeError(f"lr: expected a float, got {type(self.lr).__name__}")
        if not math.isfinite(self.lr):
            raise ValueError(f"lr: expected a finite number, got {self.lr}")
        if self.is_sum:
            own = "query" if any((rows or ORACLES[oracle]) == "query" for _, oracle, rows in terms) else "support"
            if self.rows not in (None, own):
                raise ValueError(
                    f"rows: expected None for a sum, whose terms say it as in entropy@support, got {self.rows!r}"
                )
            object.__setattr__(self, "rows", own)
        elif self.rows is None:
            object.__setattr__(self, "rows", ORACLES[self.oracle])
        if self.rows not in ("support", "query"):
            raise ValueError(f"rows: expected support, query or None, got {self.rows!r}")
        for _, oracle, rows in terms:
            rows = rows or (ORACLES[oracle] if self.is_sum else self.rows)
            if rows == "query" and oracle in LABELLED:
                raise ValueError(f"rows: {oracle} needs labels, and the query rows have none; use support")
            if rows == "support" and oracle in SHARING:
                raise ValueError(f"rows: {oracle} is for query rows, got support")
        sharing = [oracle for oracle in oracles if oracle in SHARING]
        if self.marginals is None:
            object.__setattr__(self, "marginals", SHARING[sharing[0]] if sharing else "none")
        least = "uniform" if sharing and sharing != ["soft_assignment"] else "none"
        accepted = MARGINALS[MARGINALS.index(least) :] if sharing else ("none",)
        if self.marginals not in accepted:
            raise ValueError(f"marginals: {self.oracle} takes {', '.join(accepted)}, got {self.marginals!r}")
        if not isinstance(self.relax, (int, float)) or isinstance(self.relax, bool):
            raise TypeError(f"relax: expected a float, got {type(self.relax).__name__}")
        if not 0 < self.relax <= 1:
            raise ValueError(f"relax: expected more than 0 and at most 1, got {self.relax}")
        if self.relax != 1 and (self.marginals == "none" or not set(sharing) - {"proportions"}):
            raise ValueError(f"relax: there is no constraint of {self.oracle} to relax, got {self.relax}")
        if not isinstance(self.alpha, (int, float)) or isinstance(self.alpha, bool):
            raise TypeError(f"alpha: expected a float, got {type(self.alpha).__name__}")
        if not (0 < self.alpha < math.inf and (self.alpha == 1 or abs(self.alpha - 1) >= LEAST_BEYOND_1)):
            raise ValueError(
                f"alpha: expected a finite number above 0, and 1 or not within {LEAST_BEYOND_1} of it, got {self.alpha}"
            )
        if self.alpha != 1 and not set(oracles) & set(ENTROPIES):
            raise ValueError(f"alpha: {self.oracle} has no entropy, got {self.alpha}")
        object.__setattr__(self, "_parts", tuple(self._part(*term) for term in terms))

    @property
    def is_sum(self) -> bool:
        """Whether the oracle is a sum, be it of one weighted term."""
        return self.oracle not in ORACLES

    def _part(self, weight: float, oracle: str, rows: str | None) -> Part:
        return Part(
            oracle,
            rows or (ORACLES[oracle] if self.is_sum else str(self.rows)),
            weight,
            str(self.marginals) if oracle in SHARING else "none",
            self.relax if oracle in SHARING and oracle != "proportions" else 1.0,
            self.alpha if oracle in ENTROPIES else 1.0,
        )

    @property
    def parts(self) -> tuple[Part, ...]:
        """What the sum is of; one part of weight 1 where it is no sum."""
        parts: tuple[Part, ...] = self._parts  # type: ignore[attr-defined]
        return parts


def parts_of(phases: Sequence[Phase]) -> list[Part]:
    """All parts of the phases that take steps."""
    return [part for phase in phases if phase.steps for part in phase.parts]


def total_steps(phases: Sequence[Phase]) -> int:
    return sum(phase.steps for phase in phases)
