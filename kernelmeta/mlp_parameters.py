"""The parameters of the synthetic-gradient MLP (Hu et al. 2020, section 4), as ops and modules take them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class MLPParameters(NamedTuple):
    """Linear(N, H) - ReLU - BatchNorm(H) - Linear(H, H) - ReLU - BatchNorm(H) - Linear(H, N)."""

    weight1: Tensor  # [H, N]
    bias1: Tensor  # [H]
    gain1: Tensor  # [H], BatchNorm's weight
    shift1: Tensor  # [H], BatchNorm's bias
    weight2: Tensor  # [H, H]
    bias2: Tensor  # [H]
    gain2: Tensor  # [H]
    shift2: Tensor  # [H]
    weight3: Tensor  # [N, H]
    bias3: Tensor  # [N]
