"""alpha-TIM: TIM with entropies that tolerate classes of unequal size."""

from __future__ import annotations

from torch import Tensor

from kernelmeta.tasks import Ragged
from kernelmeta.transductive.information import descended
from kernelmeta.transductive.tasks import Tasks, check_least, solved
from kernelmeta.transductive.tim import check_options


def alpha_tim(
    support: Tensor,
    support_labels: Tensor,
    query: Tensor,
    *,
    n_way: int,
    alpha: float = 2.0,
    steps: int = 1000,
    rate: float = 1e-4,
    temperature: float = 15.0,
    support_weight: float = 1.0,
    marginal_weight: float = 1.0,
    conditional_weight: float = 1.0,
    ragged: Ragged | None = None,
) -> Tensor:
    """alpha-TIM (Veilleux et al., "Realistic evaluation of transductive few-shot learning", NeurIPS 2021, eq. 7).

    As `tim`, with the alpha-entropies ``(1 - sum_n p_n^alpha) / (alpha - 1)`` (Tsallis; their eq. 5) of the mean
    prediction and of each row in the place of Shannon's; the cross-entropy stays, as in the published settings. It
    does not assume that all classes have equally many query rows, though it leans that way.

    Args:
        support: [T, S, D], usually of length 1; every class needs at least one row.
        support_labels: [T, S] int64 in 0..N-1.
        query: [T, Q, D].
        n_way: N.
        alpha: above 1; published are 2 for one shot and 7 for five.
        steps, rate: of Adam.
        temperature: of the logits ``temperature (x w - |w|^2 / 2)``.
        support_weight, marginal_weight, conditional_weight: of the three parts.
        ragged: tasks of unequal size: features are [all rows, D] then, see `kernelmeta.Ragged`.

    Returns:
        Logits, [T, Q, N] or [all query rows, N], float32 or float64.

    Raises:
        ValueError, TypeError: an argument that does not fit, named.
    """
    check_options(steps, rate, temperature, support_weight, marginal_weight, conditional_weight)
    check_least(alpha=(alpha, 1.0))
    if alpha == 1:
        raise ValueError("alpha: expected more than 1, got 1; with 1 the entropies are Shannon's, see tim")

    def slope(p: Tensor) -> Tensor:
        """Minus the derivative of the entropy."""
        return alpha / (alpha - 1) * p ** (alpha - 1)

    def solve(tasks: Tasks) -> Tensor:
        return descended(
            tasks, classifier="euclidean", temperature=temperature, steps=steps, rate=rate,
            support_weight=support_weight, of_marginal=lambda mean: marginal_weight * slope(mean),
            of_rows=lambda p: -conditional_weight * slope(p),
        )  # fmt: skip

    return solved(solve, support, support_labels, query, n_way=n_way, ragged=ragged)
