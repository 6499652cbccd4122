"""The classifier that a support set proposes (Hu et al. 2020, section 4.1)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from kernelmeta.backends import is_traced
from kernelmeta.reference.norms import unit
from kernelmeta.reference.precision import promoted, without_autocast
from kernelmeta.reference.task_rows import check_label_range


@without_autocast
def class_means(support: Tensor, support_labels: Tensor, n_way: int, weight: Tensor | None = None) -> Tensor:
    """Weighted means of the normalised support rows of every class. See :func:`kernelmeta.ops.class_means`."""
    if not is_traced():
        check_labels(support_labels, n_way)
    if weight is not None:
        support, weight = promoted(support, weight)
    members = one_hot(support_labels, n_way).to(support.dtype)  # [T, S, N]
    sums = members.transpose(-1, -2) @ unit(support)
    means = sums / members.sum(-2).unsqueeze(-1)
    return means if weight is None else means * weight


def check_labels(labels: Tensor, n_way: int) -> None:
    """Labels [T, S] in range, and every class with a row."""
    check_label_range(labels, n_way)
    present = (labels.unsqueeze(-1) == torch.arange(n_way, device=labels.device)).any(-2)
    if not present.all():
        task, way = (~present).nonzero()[0].tolist()
        raise ValueError(
            f"support_labels: task {task} has no row of class {way}; every class needs at least one support row"
        )
