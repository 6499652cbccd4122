"""PT-MAP: centres that move towards what optimal transport assigns to them."""

from __future__ import annotations

from torch import Tensor

from kernelmeta.tasks import Ragged
from kernelmeta.transductive.tasks import Tasks, check_least, solved
from kernelmeta.transductive.transport import TOLERANCE, transport


def pt_map(
    support: Tensor,
    support_labels: Tensor,
    query: Tensor,
    *,
    n_way: int,
    steps: int = 20,
    rate: float = 0.2,
    sharpness: float = 10.0,
    tolerance: float = TOLERANCE,
    proportions: Tensor | None = None,
    ragged: Ragged | None = None,
) -> Tensor:
    """PT-MAP (Hu, Gripon and Pateux, "Leveraging the feature distribution in transfer-based few-shot learning", 2020,
    algorithm 1), without its transform of the features: that is ``Transform("power:0.5", "task")``.

    In each step the query rows are shared out by `transport` over squared distances (eq. 3), and every centre moves by
    ``rate`` towards the mean of its support rows and of its share of the query rows (eq. 6). It assumes that all
    classes have equally many query rows, unless it is told their proportions.

    Args:
        support: [T, S, D]; every class needs at least one row.
        support_labels: [T, S] int64 in 0..N-1.
        query: [T, Q, D].
        n_way: N.
        steps: of the centres.
        rate: alpha.
        sharpness: lambda, times the squared distances.
        tolerance: of `transport`.
        proportions: [T, N], the shares of the query rows that the classes have; equal ones if None.
        ragged: tasks of unequal size: features are [all rows, D] then, see `kernelmeta.Ragged`.

    Returns:
        The logarithm of the last plan, [T, Q, N] or [all query rows, N], float32 or float64.

    Raises:
        ValueError, TypeError: an argument that does not fit, named.
    """
    check_least(steps=(steps, 0), rate=(rate, 0.0), sharpness=(sharpness, 0.0), tolerance=(tolerance, 0.0))

    def solve(tasks: Tasks) -> Tensor:
        centers, counts = tasks.means(), tasks.counts.unsqueeze(-1)
        labelled = centers * counts

        def plan() -> Tensor:
            # |q - m|^2 but for |q|^2, which is the same for all classes
            distances = centers.square().sum(-1).unsqueeze(-2) - 2 * tasks.query @ centers.mT
            return transport(-sharpness * distances, tasks.proportions, tolerance=tolerance)

        for _ in range(steps):
            assigned = plan().exp().mT  # [T, N, Q]
            estimate = (labelled + assigned @ tasks.query) / (counts + assigned.sum(-1, keepdim=True))
            centers = centers + rate * (estimate - centers)
        return plan()

    return solved(solve, support, support_labels, query, n_way=n_way, proportions=proportions, ragged=ragged)
