"""Ridge regression from the support rows, in D dimensions: the closed form of Bertinetto et al., ICLR 2019 (R2-D2)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from kernelmeta.reference.precision import promoted, without_autocast


@without_autocast
def ridge(
    support: Tensor, support_labels: Tensor, query: Tensor, lam: Tensor, scale: Tensor, bias: Tensor, *, n_way: int
) -> Tensor:
    """``Z = scale X W + bias``, ``W = (X_s^T X_s + lam I)^-1 X_s^T Y``. See :func:`kernelmeta.ops.ridge`."""
    support, query, lam, scale, bias = promoted(support, query, lam, scale, bias)
    targets = one_hot(support_labels, n_way).to(support.dtype)
    eye = torch.eye(support.shape[-1], dtype=support.dtype, device=support.device)
    across = support.transpose(-1, -2)
    weights = torch.linalg.solve(across @ support + lam * eye, across @ targets)
    return scale * (query @ weights) + bias
