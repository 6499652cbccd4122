"""Ridge regression of one-hot labels on the support rows (R2-D2, Bertinetto et al. 2019, equation 6)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad

from kernelmeta.backends import is_traced
from kernelmeta.reference.class_means import check_labels
from kernelmeta.reference.precision import promoted, without_autocast
from kernelmeta.reference.task_rows import each_task, gathered
from kernelmeta.tasks import Ragged


def solve(
    support: Tensor,
    labels: Tensor,
    query: Tensor,
    regularization: Tensor,
    scale: Tensor,
    bias: Tensor,
    n_way: int,
    first_task: int = 0,
) -> tuple[Tensor, Tensor]:
    """Logits [T, Q, N] and coefficients alpha [T, S, N] with W = alpha^T X, of T tasks of equal size.

    Errors count the tasks from ``first_task`` on.
    """
    kernel = support @ support.transpose(-1, -2)
    matrix = kernel + regularization * torch.eye(support.shape[-2], dtype=support.dtype, device=support.device)
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if not is_traced():
        check_labels(labels, n_way)
        _check_regular(matrix, factor, failed, first_task)
    alpha = torch.cholesky_solve(one_hot(labels, n_way).to(support.dtype), factor)
    return scale * (query @ (support.transpose(-1, -2) @ alpha)) + bias, alpha


def _check_regular(matrix: Tensor, factor: Tensor, failed: Tensor, first_task: int) -> None:
    """Pivots that are nothing but rounding mean a singular matrix."""
    smallest = matrix.diagonal(dim1=-2, dim2=-1).amax(-1, keepdim=True) * matrix.shape[-1]
    tiny = factor.diagonal(dim1=-2, dim2=-1).square() <= smallest * torch.finfo(matrix.dtype).eps
    singular = ((failed != 0) | tiny.any(-1)) & matrix.isfinite().all(-1).all(-1)
    if singular.any():
        task = first_task + int(singular.nonzero()[0])
        raise ValueError(
            f"ridge: the system of task {task} is singular; a larger regularization, or fewer support rows that repeat "
            "each other, would help"
        )


@without_autocast
def ridge_with_coefficients(
    support: Tensor,
    support_labels: Tensor,
    query: Tensor,
    regularization: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    n_way: int,
    support_index: Tensor | None = None,
    query_index: Tensor | None = None,
    ragged: Ragged | None = None,
) -> tuple[Tensor, Tensor]:
    """Logits and the coefficients of W, [T, S, N] or [sum S, N]; arguments as :func:`kernelmeta.ops.ridge`."""
    support, query = gathered(support, support_index, "support"), gathered(query, query_index, "query")
    support, query, regularization, scale, bias = promoted(support, query, regularization, scale, bias)
    if ragged is None:
        return solve(support, support_labels, query, regularization, scale, bias, n_way)
    logits, coefficients = [query.new_zeros(0, n_way)], [query.new_zeros(0, n_way)]
    for t, (s, q, own) in enumerate(each_task(ragged, n_way)):
        z, alpha = solve(support[None, s], support_labels[None, s], query[None, q], regularization, scale, bias, own, t)
        logits.append(pad(z[0], (0, n_way - own), value=float("-inf")))
        coefficients.append(pad(alpha[0], (0, n_way - own)))
    return torch.cat(logits), torch.cat(coefficients)


def ridge(
    support: Tensor,
    support_labels: Tensor,
    query: Tensor,
    regularization: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    return_coefficients: bool = False,
    **options: Any,
) -> Any:
    """A ridge regression for each task. See :func:`kernelmeta.ops.ridge`."""
    logits, coefficients = ridge_with_coefficients(
        support, support_labels, query, regularization, scale, bias, **options
    )
    return (logits, coefficients) if return_coefficients else logits
