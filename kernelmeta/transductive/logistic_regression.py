"""Logistic regression of scikit-learn: the inductive peer."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernelmeta.tasks import Ragged
from kernelmeta.transductive.tasks import Tasks, check_least, solved


def logistic_regression(
    support: Tensor,
    support_labels: Tensor,
    query: Tensor,
    *,
    n_way: int,
    C: float = 1.0,
    most_steps: int = 1000,
    ragged: Ragged | None = None,
) -> Tensor:
    """``sklearn.linear_model.LogisticRegression``, fitted to the support rows of one task after the other.

    Args:
        support: [T, S, D]; every class needs at least one row.
        support_labels: [T, S] int64 in 0..N-1.
        query: [T, Q, D].
        n_way: N, at least 2.
        C: inverse strength of the ridge.
        most_steps: of L-BFGS.
        ragged: tasks of unequal size: features are [all rows, D] then, see `kernelmeta.Ragged`.

    Returns:
        Logarithms of probabilities, [T, Q, N] or [all query rows, N]; NaN for a task with a row that is not finite.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError, TypeError: an argument that does not fit, named.
    """
    check_least(C=(C, 0.0), most_steps=(most_steps, 1))
    if C == 0:
        raise ValueError("C: expected more than 0, got 0")
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise ImportError("scikit-learn is not installed: pip install 'kernelmeta[sklearn]'") from error

    def solve(tasks: Tasks) -> Tensor:
        (T, Q, _), N = tasks.query.shape, tasks.members.shape[-1]
        if N < 2:
            raise ValueError(f"n_way: logistic regression needs at least 2 classes, got {N}")
        scores = torch.full((T, Q, N), math.nan, dtype=tasks.query.dtype)
        finite = (tasks.support.isfinite().flatten(1).all(-1) & tasks.query.isfinite().flatten(1).all(-1)).tolist()
        support, labels, query = (t.detach().cpu().numpy() for t in (tasks.support, tasks.labels, tasks.query))
        for t in range(T):
            if finite[t]:
                model = LogisticRegression(C=C, tol=1e-6, max_iter=most_steps).fit(support[t], labels[t])
                scores[t] = torch.from_numpy(model.predict_log_proba(query[t]))
        return scores.to(tasks.query.device)

    return solved(solve, support, support_labels, query, n_way=n_way, ragged=ragged)
