"""Nothing that is not finite passes without a word."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor
from torch.nn.utils import get_total_norm


class NotFiniteError(ValueError):
    """A loss or a parameter became NaN or infinite in training."""


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the floating-point tensors with a NaN or infinite element."""
    floating = {name: t.detach() for name, t in tensors.items() if t.is_floating_point() and t.numel()}
    # One number of all of them is quick, and enough where all is well.
    if not floating or get_total_norm(list(floating.values()), math.inf).isfinite():
        return []
    return [name for name, t in floating.items() if not t.isfinite().all()]


def check_weights(path: object, tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError if weights from a file are not finite."""
    bad = not_finite({name: t for name, t in tensors.items() if isinstance(t, Tensor)})
    if bad:
        raise ValueError(f"{path}: holds NaN or infinite weights ({bad[0]})")
