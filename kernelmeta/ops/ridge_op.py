"""Ridge regression from the support rows of every task, in closed form, in the space of the rows.

The D x D system of the textbook is, by Woodbury's identity, one of S x S: ``W = X^T (X X^T + lam I)^-1 Y`` with the
support rows X. PyTorch's batched Cholesky factor solves it, and differentiates itself, any number of times.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from kernelmeta.ops import _checks


def ridge(
    support: Tensor, support_labels: Tensor, query: Tensor, lam: Tensor, scale: Tensor, bias: Tensor, *, n_way: int
) -> Tensor:
    """``Z = scale X_q W + bias`` with ``W = argmin |X_s W - Y|^2 + lam |W|^2`` (Bertinetto et al. 2019, eq. 4-6).

    Args:
        support: [T, S, D].
        support_labels: [T, S] int64 in 0..n_way-1; Y are their one-hot rows.
        query: [T, Q, D].
        lam, scale, bias: [1]; lam is positive.
        n_way: N.

    Returns:
        Logits [T, Q, N], in the dtype that features and parameters promote to (under autocast float32 at least).

    Raises:
        ValueError: shapes, devices or labels that do not fit, named; a singular system, with its task (on a GPU, where
            looking would wait for the device, that task's logits are NaN instead).
        TypeError: features that are not floating point, labels that are not int64.
    """
    _checks.tensors(support=support, query=query, lam=lam, scale=scale, bias=bias)
    T, S, _ = _checks.episode(support, None, query, None)
    for name, tensor in (("lam", lam), ("scale", scale), ("bias", bias)):
        _checks.one_value(name, tensor)
    if not isinstance(n_way, int) or n_way < 1:
        raise ValueError(f"n_way: expected an int of at least 1, got {n_way!r}")
    _checks.labels("support_labels", support_labels, (T, S), support)
    eager = not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()
    looks = eager and support.device.type == "cpu"
    if looks and support_labels.numel() and not 0 <= int(support_labels.min()) <= int(support_labels.max()) < n_way:
        raise ValueError(f"support_labels: labels must be in 0..{n_way - 1}")
    tensors = (support, query, lam, scale, bias)
    compute, result = _checks.precisions(tensors) or (support.dtype, support.dtype)
    support, query, lam, scale, bias = (t.to(compute) for t in tensors)
    with torch.autocast(support.device.type, enabled=False):
        targets = one_hot(support_labels, n_way).to(compute)
        gram = support @ support.transpose(-1, -2)
        factor, info = torch.linalg.cholesky_ex(gram + lam * torch.eye(S, dtype=compute, device=gram.device))
        if looks and info.any():
            task = int(info.nonzero()[0, 0])
            raise ValueError(
                f"lam: the ridge system of task {task} is singular (lam = {float(lam):g}); lam must be positive, and "
                "large enough for rows that depend on each other; rows must be finite"
            )
        factor = torch.where((info == 0).view(-1, 1, 1), factor, torch.full_like(factor, float("nan")))
        weights = support.transpose(-1, -2) @ torch.cholesky_solve(targets, factor)
        logits = scale * (query @ weights) + bias
    return logits.to(result)
