"""BD-CSPN: class means put right by the query rows that look like them."""

from __future__ import annotations

from torch import Tensor

from kernelmeta.reference.norms import unit
from kernelmeta.reference.task_rows import one_hot_targets
from kernelmeta.tasks import Ragged
from kernelmeta.transductive.tasks import Tasks, check_least, solved


def rectified(tasks: Tasks, scale: float) -> Tensor:
    """Class means [T, N, D] of the support rows and of the query rows that are nearest to each, by their cosines.

    The query rows are shifted by the difference between the two means of all rows (Liu et al. 2020, eq. 8); a class
    takes its rows with weights ``exp(scale cos)`` that sum to 1 (eqs. 6 and 7).
    """
    means = unit(tasks.means()).mT
    shifted = tasks.query + (tasks.support.mean(-2, keepdim=True) - tasks.query.mean(-2, keepdim=True))
    cosines = unit(shifted) @ means
    nearest = one_hot_targets(cosines.argmax(-1), means.shape[-1], cosines.dtype)
    # (less the largest possible cosine: the weights' ratios stay, and nothing overflows)
    of_support = tasks.members * (scale * (unit(tasks.support) @ means - 1)).exp()
    of_query = nearest * (scale * (cosines - 1)).exp()
    mass = of_support.sum(-2) + of_query.sum(-2)
    return (of_support.mT @ tasks.support + of_query.mT @ shifted) / mass.unsqueeze(-1)


def bd_cspn(
    support: Tensor,
    support_labels: Tensor,
    query: Tensor,
    *,
    n_way: int,
    scale: float = 10.0,
    ragged: Ragged | None = None,
) -> Tensor:
    """BD-CSPN (Liu, Song and Qin, "Prototype rectification for few-shot learning", ECCV 2020, eqs. 6-8).

    Cosines to the rectified class means. The shift between the support rows and the query rows assumes that both have
    their classes in equal proportions.

    Args:
        support: [T, S, D]; every class needs at least one row.
        support_labels: [T, S] int64 in 0..N-1.
        query: [T, Q, D].
        n_way: N.
        scale: epsilon, of the cosines in the weights and in what is returned; 10 as published.
        ragged: tasks of unequal size: features are [all rows, D] then, see `kernelmeta.Ragged`.

    Returns:
        Logits ``scale cos``, [T, Q, N] or [all query rows, N], float32 or float64.

    Raises:
        ValueError, TypeError: an argument that does not fit, named.
    """
    check_least(scale=(scale, 0.0))

    def solve(tasks: Tasks) -> Tensor:
        return scale * unit(tasks.query) @ unit(rectified(tasks, scale)).mT

    return solved(solve, support, support_labels, query, n_way=n_way, ragged=ragged)
