"""TIM: a classifier whose predictions of the query rows are sharp, and spread over the classes."""

from __future__ import annotations

import torch
from torch import Tensor

from kernelmeta.tasks import Ragged
from kernelmeta.transductive.information import CLASSIFIERS, descended
from kernelmeta.transductive.tasks import Tasks, check_least, solved


def tim(
    support: Tensor,
    support_labels: Tensor,
    query: Tensor,
    *,
    n_way: int,
    steps: int = 1000,
    rate: float = 1e-4,
    temperature: float = 15.0,
    support_weight: float = 1.0,
    marginal_weight: float = 1.0,
    conditional_weight: float = 1.0,
    classifier: str = "euclidean",
    proportions: Tensor | None = None,
    ragged: Ragged | None = None,
) -> Tensor:
    """TIM-GD (Boudiaf et al., "Transductive information maximization for few-shot learning", NeurIPS 2020, eqs. 1-3).

    From the class means, Adam descends on the cross-entropy of the support rows, minus the entropy of the mean
    prediction of the query rows, plus their mean entropy, each with its weight. It assumes that all classes have
    equally many query rows. Where it is told their proportions p, the divergence KL(p | mean prediction) stands in the
    place of minus the entropy.

    Args:
        support: [T, S, D], usually of length 1; every class needs at least one row.
        support_labels: [T, S] int64 in 0..N-1.
        query: [T, Q, D].
        n_way: N.
        steps, rate: of Adam.
        temperature: of the logits ``temperature (x w - |w|^2 / 2)``.
        support_weight, marginal_weight, conditional_weight: of the three parts.
        classifier: "euclidean", as above; "cosine": ``temperature cos(x, w)``, as in some implementations.
        proportions: [T, N], the shares of the query rows that the classes have.
        ragged: tasks of unequal size: features are [all rows, D] then, see `kernelmeta.Ragged`.

    Returns:
        Logits, [T, Q, N] or [all query rows, N], float32 or float64.

    Raises:
        ValueError, TypeError: an argument that does not fit, named.
    """
    check_options(steps, rate, temperature, support_weight, marginal_weight, conditional_weight)
    if classifier not in CLASSIFIERS:
        raise ValueError(f"classifier: expected one of {', '.join(CLASSIFIERS)}, got {classifier!r}")

    def solve(tasks: Tasks) -> Tensor:
        tiny = torch.finfo(tasks.query.dtype).tiny

        def of_marginal(mean: Tensor) -> Tensor:
            mean = mean.clamp_min(tiny)
            if tasks.proportions is None:
                return marginal_weight * (mean.log() + 1)
            return -marginal_weight * tasks.proportions / mean

        def of_rows(p: Tensor) -> Tensor:
            return -conditional_weight * (p.clamp_min(tiny).log() + 1)

        return descended(
            tasks, classifier=classifier, temperature=temperature, steps=steps, rate=rate,
            support_weight=support_weight, of_marginal=of_marginal, of_rows=of_rows,
        )  # fmt: skip

    return solved(solve, support, support_labels, query, n_way=n_way, proportions=proportions, ragged=ragged)


def check_options(
    steps: int,
    rate: float,
    temperature: float,
    support_weight: float,
    marginal_weight: float,
    conditional_weight: float,
) -> None:
    """Raise for what no descent can have, named."""
    check_least(
        steps=(steps, 0), rate=(rate, 0.0), temperature=(temperature, 0.0), support_weight=(support_weight, 0.0),
        marginal_weight=(marginal_weight, 0.0), conditional_weight=(conditional_weight, 0.0),
    )  # fmt: skip
