"""Starts without a labelled row, from bags of rows whose proportions of classes are known; and such proportions."""

from __future__ import annotations

import torch
from torch import Tensor

from kernelmeta.ops import _checks
from kernelmeta.reference.norms import unit
from kernelmeta.reference.precision import promoted, without_autocast


@without_autocast
def mean_map(
    query: Tensor,
    proportions: Tensor,
    bag_offsets: Tensor,
    *,
    ridge: float = 1e-3,
    normalize: bool = True,
) -> Tensor:
    """Class means that explain the means of the bags: theta = (P^T P + ridge)^-1 P^T M (Quadrianto et al. 2009).

    The mean of a bag is the sum of the class means, each times its share of the bag. With at least as many bags as
    classes, whose proportions differ, the class means follow by least squares.

    Args:
        query: [T, Q, D], or [all query rows, D] of tasks of unequal size.
        proportions: P, [T, B, N], the classes' shares of each bag.
        bag_offsets: [T, B + 1] int64, or [B + 1] for all tasks alike: bag b owns a task's rows offsets[b] ..
            offsets[b + 1], and every row is in a bag. A bag without a row has no part in it.
        ridge: added to the diagonal of P^T P.
        normalize: of normalised rows, as a cosine classifier reads them.

    Returns:
        theta [T, N, D], a ``start`` of :func:`program`, differentiable in everything.

    Raises:
        ValueError, TypeError: an argument that does not fit, named.
    """
    _checks.tensors(query=query, proportions=proportions)
    _checks.dimensions("proportions", proportions, "[T, B, N]")
    T, B, _ = proportions.shape
    _checks.integers("bag_offsets", bag_offsets, query)
    if bag_offsets.dim() == 1:
        bag_offsets = bag_offsets.expand(T, -1)
    _checks.shape("bag_offsets", bag_offsets, (T, B + 1), "[T, B + 1]")
    if query.dim() not in (2, 3):
        raise ValueError(f"query: expected shape [T, Q, D] or [all query rows, D], got {_checks.shape_text(query)}")
    if not 0 < ridge < float("inf"):
        raise ValueError(f"ridge: expected a positive number, got {ridge}")
    rows, P = promoted(query.flatten(0, -2), proportions)
    counts = bag_offsets.diff().flatten()
    if int(counts.sum()) != len(rows) or int(counts.min() if len(counts) else 0) < 0:
        raise ValueError(f"bag_offsets: expected bags of {len(rows)} rows in all, got {int(counts.sum())}")
    bag = torch.repeat_interleave(torch.arange(T * B, device=rows.device), counts, output_size=len(rows))
    sums = rows.new_zeros(T * B, rows.shape[-1]).index_add(0, bag, unit(rows) if normalize else rows)
    means = (sums / counts.clamp(min=1).unsqueeze(-1)).view(T, B, rows.shape[-1])
    P = P * (counts > 0).view(T, B, 1)
    gram = P.mT @ P + ridge * torch.eye(P.shape[-1], dtype=P.dtype, device=P.device)
    found: Tensor = torch.linalg.solve(gram, P.mT @ means)
    return found


def smoothed_proportions(counts: Tensor, *, by: float = 2.0) -> Tensor:
    """(counts + by) / (n + by N): shares of N classes, from how many of n rows were counted in each.

    A class of which no row happened to be counted is not left out.

    Args:
        counts: [..., N], 0 or more.
        by: what each class is taken to have had beforehand.

    Returns:
        [..., N], which sum to 1; float32 if the counts are integers.

    Raises:
        ValueError: counts below 0, ``by`` below 0, or nothing to divide by.
    """
    if by < 0:
        raise ValueError(f"by: expected 0 or more, got {by}")
    values = counts if counts.is_floating_point() else counts.to(torch.float32)
    total = values.sum(-1, keepdim=True) + by * counts.shape[-1]
    if not bool((values >= 0).all()) or not bool((total > 0).all()):
        raise ValueError("counts: expected numbers from 0, at least one of which is not 0 where `by` is")
    return (values + by) / total
