"""The equivariant gradient's MLP as a module."""

from __future__ import annotations

import torch
from torch import Tensor

from kernelmeta.nn.synthetic_gradient_mlp import MLPModule
from kernelmeta.reference.equivariant_gradient import PAIR_INPUTS, equivariant_gradient_mlp


class EquivariantGradientMLP(MLPModule):
    """Guesses d loss / d logits from logits, for any number of classes and in whatever order they are numbered.

    The same small MLP looks at every pair of a row and a class: at the class's log-probability, at how that compares
    with the other classes and with the other rows, at how much of all rows the class has, and at the row's entropy
    (``kernelmeta/reference/equivariant_gradient.py`` has the seven formulas). :class:`SyntheticGradientMLP` reads all
    logits of a row instead, in the order of the classes, and fits one number of them.

    Args:
        hidden: H.
        norm_stats: whose statistics the two BatchNorms use: "task" or "running".

    Parameters are named as in :class:`kernelmeta.MLPParameters`, with ``weight1`` [H, 7], ``weight3`` [1, H] and
    ``bias3`` [1]; ``running_stats`` [2, 2, H] holds the running mean and variance of both layers. The last layer starts
    small, so that the first steps are.

    Raises:
        ValueError: a size below 1, or other statistics.
    """

    def __init__(self, hidden: int = 16, norm_stats: str = "task") -> None:
        if hidden < 1:
            raise ValueError(f"hidden: expected at least 1, got {hidden}")
        if norm_stats not in ("task", "running"):
            raise ValueError(f"norm_stats: expected one of task, running, got {norm_stats!r}")
        super().__init__(PAIR_INPUTS, hidden, 1, norm_stats)
        with torch.no_grad():
            self.weight3.mul_(0.3)

    def forward(self, logits: Tensor) -> Tensor:
        """[T, Q, N] or [Q, N] logits -> guessed gradients of the same shape.

        In plain PyTorch; within the steps of a :class:`Program` the fused kernels do the same.
        """
        return equivariant_gradient_mlp(
            logits, self.tensors(), norm_stats=self.norm_stats, running_stats=self.running_stats
        )

    def extra_repr(self) -> str:
        return f"hidden={self.hidden}, norm_stats={self.norm_stats!r}"
