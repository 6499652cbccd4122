"""What is timed: sizes, and the inputs and parameters that all peers share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernelmeta import nn
from kernelmeta.mlp_parameters import MLPParameters

# What the inputs of one problem may take together, over all copies.
_COPIES_BYTES = 256 << 20
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


class Size(NamedTuple):
    """One cell of the grid. H is 8 N and Q is 15 N, as published."""

    T: int = 1
    N: int = 5
    S: int = 5
    D: int = 640
    K: int = 3
    dtype: str = "float32"

    @property
    def Q(self) -> int:
        return 15 * self.N

    @property
    def H(self) -> int:
        return 8 * self.N

    def __str__(self) -> str:
        return f"T{self.T}-N{self.N}-S{self.S}-Q{self.Q}-D{self.D}-K{self.K}-{self.dtype}"


# "forward": logits without autograd. "train": logits, cross entropy, gradients of the 13 parameters.
# "train+features": the gradients of support and query rows too.
MODES = ("forward", "train", "train+features")


class Inputs(NamedTuple):
    """One batch of T episodes."""

    support: Tensor  # [T, S, D]
    labels: Tensor  # [T, S]
    query: Tensor  # [T, Q, D]
    answers: Tensor  # [T, Q]


class Parameters(NamedTuple):
    """What SIB learns; float32 whatever the features are stored in (float64 for float64)."""

    weight: Tensor  # [D]
    scale: Tensor  # [1]
    bias: Tensor  # [1]
    mlp: MLPParameters

    def leaves(self) -> list[Tensor]:
        return [self.weight, self.scale, self.bias, *self.mlp]

    def fresh(self, dtype: torch.dtype | None = None) -> Parameters:
        """Copies that require gradients, perhaps in another precision."""
        weight, scale, bias, *mlp = (t.detach().to(dtype or t.dtype).clone().requires_grad_() for t in self.leaves())
        return Parameters(weight, scale, bias, MLPParameters(*mlp))


class Problem(NamedTuple):
    """Several copies of the inputs, of different values, to be used in turn so that caches do not flatter."""

    size: Size
    inner_lr: float
    inputs: Sequence[Inputs]
    parameters: Parameters


def draw(size: Size, *, inner_lr: float = 1e-3, copies: int | None = None, seed: int = 0) -> Problem:
    """Features like a backbone's (not negative, classes overlap), parameters as at the start of training."""
    T, N, S, D, K, _ = size
    dtype = DTYPES[size.dtype]
    generator = torch.Generator().manual_seed(seed)
    if copies is None:
        copies = max(2, min(8, _COPIES_BYTES // (T * (S + size.Q) * D * dtype.itemsize)))

    def inputs() -> Inputs:
        centres = torch.randn(T, N, D, generator=generator)
        labels = (torch.arange(S) % N).expand(T, S).contiguous()
        answers = (torch.arange(size.Q) % N).expand(T, size.Q).contiguous()

        def rows(of: Tensor) -> Tensor:
            means = centres.gather(1, of.unsqueeze(-1).expand(-1, -1, D))
            return (means + torch.randn(means.shape, generator=generator)).relu().to(dtype)

        return Inputs(rows(labels), labels, rows(answers), answers)

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        head = nn.SIB(N, D, K)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    parameters = Parameters(head.weight, head.scale, head.bias, head.mlp.tensors()).fresh(wide)
    return Problem(size, inner_lr, [inputs() for _ in range(copies)], parameters)
