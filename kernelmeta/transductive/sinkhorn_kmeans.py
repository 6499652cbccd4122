"""Soft k-means whose clusters have the sizes that they are told to have."""

from __future__ import annotations

from torch import Tensor

from kernelmeta.reference.norms import unit
from kernelmeta.tasks import Ragged
from kernelmeta.transductive.tasks import Tasks, check_least, solved
from kernelmeta.transductive.transport import TOLERANCE, transport


def sinkhorn_kmeans(
    support: Tensor,
    support_labels: Tensor,
    query: Tensor,
    *,
    n_way: int,
    steps: int = 10,
    scale: float = 10.0,
    tolerance: float = TOLERANCE,
    proportions: Tensor | None = None,
    ragged: Ragged | None = None,
) -> Tensor:
    """`kernelmeta.nn.SoftKMeans` (Ren et al. 2018, eq. 5, with cosines) with `transport` in the place of the softmax
    (Huang et al. 2019 and Hu et al. 2020 have it likewise).

    It assumes that all classes have equally many query rows, unless it is told their proportions.

    Args:
        support: [T, S, D]; every class needs at least one row.
        support_labels: [T, S] int64 in 0..N-1.
        query: [T, Q, D].
        n_way: N.
        steps: refinements; after the last one the query rows are shared out once more.
        scale: of the cosines.
        tolerance: of `transport`.
        proportions: [T, N], the shares of the query rows that the classes have; equal ones if None.
        ragged: tasks of unequal size: features are [all rows, D] then, see `kernelmeta.Ragged`.

    Returns:
        The logarithm of the last plan, [T, Q, N] or [all query rows, N], float32 or float64.

    Raises:
        ValueError, TypeError: an argument that does not fit, named.
    """
    check_least(steps=(steps, 0), scale=(scale, 0.0), tolerance=(tolerance, 0.0))

    def solve(tasks: Tasks) -> Tensor:
        tasks = tasks._replace(support=unit(tasks.support), query=unit(tasks.query))
        theta, counts = tasks.means(), tasks.counts.unsqueeze(-1)
        labelled = theta * counts

        def plan() -> Tensor:
            return transport(scale * tasks.query @ unit(theta).mT, tasks.proportions, tolerance=tolerance)

        for _ in range(steps):
            assigned = plan().exp().mT  # [T, N, Q]
            theta = (labelled + assigned @ tasks.query) / (counts + assigned.sum(-1, keepdim=True))
        return plan()

    return solved(solve, support, support_labels, query, n_way=n_way, proportions=proportions, ragged=ragged)
