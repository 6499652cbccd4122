"""The synthetic-gradient MLP as a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernelmeta import ops
from kernelmeta.mlp_parameters import MLPParameters


class MLPModule(nn.Module):
    """Linear - ReLU - BatchNorm, twice, then Linear: the parameters of an MLP that guesses gradients."""

    running_stats: Tensor
    weight3: nn.Parameter

    def __init__(self, inputs: int, hidden: int, outputs: int, norm_stats: str) -> None:
        super().__init__()
        self.hidden, self.norm_stats = hidden, norm_stats
        for i, (rows_in, rows_out) in enumerate(((inputs, hidden), (hidden, hidden), (hidden, outputs)), 1):
            for name, parameter in nn.Linear(rows_in, rows_out).named_parameters():
                self.register_parameter(f"{name}{i}", parameter)
            if i < 3:
                self.register_parameter(f"gain{i}", nn.Parameter(torch.ones(hidden)))
                self.register_parameter(f"shift{i}", nn.Parameter(torch.zeros(hidden)))
        self.register_buffer("running_stats", torch.tensor([0.0, 1.0]).view(1, 2, 1).repeat(2, 1, hidden))

    def tensors(self) -> MLPParameters:
        """The ten parameters, in the order in which the ops take them."""
        own = self._parameters
        return MLPParameters(*[own[name] for name in MLPParameters._fields])  # type: ignore[arg-type]


class SyntheticGradientMLP(MLPModule):
    """Guesses d loss / d logits from logits: Linear - ReLU - BatchNorm, twice, then Linear (Hu et al. 2020, sec. 4).

    Args:
        n_way: N.
        hidden: H; 8 N, as published, if None.
        norm_stats: whose statistics BatchNorm uses: "task", "batch" or "running".

    Parameters are named as in :class:`kernelmeta.MLPParameters`; ``running_stats`` [2, 2, H] holds the
    running mean and variance of both layers.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(self, n_way: int, hidden: int | None = None, norm_stats: str = "task") -> None:
        hidden = 8 * n_way if hidden is None else hidden
        if n_way < 1 or hidden < 1:
            raise ValueError(f"n_way and hidden: expected at least 1, got {n_way} and {hidden}")
        super().__init__(n_way, hidden, n_way, norm_stats)
        self.n_way = n_way

    def forward(self, logits: Tensor) -> Tensor:
        """[T, Q, N] or [Q, N] logits -> guessed gradients of the same shape."""
        return ops.synthetic_gradient_mlp(
            logits, self.tensors(), norm_stats=self.norm_stats, running_stats=self.running_stats
        )

    def extra_repr(self) -> str:
        return f"n_way={self.n_way}, hidden={self.hidden}, norm_stats={self.norm_stats!r}"
