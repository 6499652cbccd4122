"""Random episodes and parameters for the tests of ops and modules, and how results are compared."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from kernelmeta.mlp_parameters import MLPParameters


class Episode(NamedTuple):
    """Arguments of ``sib``: everything that gets a gradient, and the labels."""

    support: Tensor
    labels: Tensor
    query: Tensor
    weight: Tensor
    scale: Tensor
    bias: Tensor
    mlp: MLPParameters

    def arguments(self) -> tuple[Any, ...]:
        return tuple(self)

    def leaves(self) -> list[Tensor]:
        return [self.support, self.query, self.weight, self.scale, self.bias, *self.mlp]

    def map(self, f: Any) -> Episode:
        """f applied to every floating-point tensor."""
        support, labels, query, weight, scale, bias, mlp = self
        return Episode(f(support), labels, f(query), f(weight), f(scale), f(bias), MLPParameters(*map(f, mlp)))

    def fresh(self, dtype: torch.dtype | None = None) -> Episode:
        """Copies that require gradients, perhaps in another precision."""
        return self.map(lambda t: t.detach().to(dtype or t.dtype).clone().requires_grad_())


def draw_labels(T: int, S: int, N: int, generator: torch.Generator) -> Tensor:
    """Every class at least once, the rest of the S rows anywhere, in any order."""
    rest = torch.randint(N, (T, S - N), generator=generator)
    labels = torch.cat([torch.arange(N).expand(T, N), rest], 1)
    return labels.gather(1, torch.rand(T, S, generator=generator).argsort(1))


def draw_mlp(N: int, H: int, dtype: torch.dtype, generator: torch.Generator) -> MLPParameters:
    def normal(*shape: int, size: float = 1.0) -> Tensor:
        return torch.randn(*shape, dtype=dtype, generator=generator) * size

    def positive(n: int) -> Tensor:
        return torch.rand(n, dtype=dtype, generator=generator) + 0.5

    return MLPParameters(
        normal(H, N, size=0.5), normal(H), positive(H), normal(H, size=0.3),
        normal(H, H, size=H**-0.5), normal(H), positive(H), normal(H, size=0.3),
        normal(N, H, size=H**-0.5), normal(N, size=0.3),
    )  # fmt: skip


def draw_pair_mlp(H: int, dtype: torch.dtype, generator: torch.Generator) -> MLPParameters:
    """Of the equivariant gradient."""
    mlp = draw_mlp(7, H, dtype, generator)
    return mlp._replace(weight3=mlp.weight3[:1].clone(), bias3=mlp.bias3[:1].clone())


def draw(
    T: int = 2,
    S: int = 7,
    Q: int = 11,
    N: int = 3,
    D: int = 13,
    H: int = 8,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Episode:
    g = torch.Generator().manual_seed(seed)
    return Episode(
        support=torch.randn(T, S, D, dtype=dtype, generator=g),
        labels=draw_labels(T, S, N, g),
        query=torch.randn(T, Q, D, dtype=dtype, generator=g),
        weight=torch.rand(D, dtype=dtype, generator=g) + 0.5,
        scale=torch.tensor([7.3], dtype=dtype),
        bias=torch.tensor([0.11], dtype=dtype),
        mlp=draw_mlp(N, H, dtype, g),
    )


def running_stats(H: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(2, 2, H, dtype=dtype, generator=torch.Generator().manual_seed(1)) + 0.5


@st.composite
def shapes(draw: Any) -> dict[str, int]:
    """Sizes of an episode: ways 2 to 7, unequal class counts, D no multiple of anything, one query row at times."""
    N = draw(st.integers(2, 7))
    return {
        "T": draw(st.integers(1, 4)),
        "S": draw(st.integers(N, 3 * N)),
        "Q": draw(st.integers(1, 40)),
        "N": N,
        "D": draw(st.integers(2, 70)),
        "H": draw(st.integers(1, 40)),
    }


def flat(results: Any) -> list[Tensor]:
    """All tensors of a result, however nested."""
    if isinstance(results, Tensor):
        return [results]
    return [tensor for part in results for tensor in flat(part)]


def relative_error(got: Tensor, want: Tensor) -> float:
    """Largest absolute error over the largest absolute value wanted (at least 1e-3: what cancels to
    almost nothing is held to an absolute error); infinite where something is not finite.
    """
    got, want = got.detach().double(), want.detach().double()
    assert got.shape == want.shape, (got.shape, want.shape)
    if want.numel() == 0:
        return 0.0
    if not torch.isfinite(got).all():
        return float("inf")
    return float((got - want).abs().max() / want.abs().max().clamp_min(1e-3))


def assert_close(got: Any, want: Any, tolerance: float) -> None:
    errors = [relative_error(g, w) for g, w in zip(got, want, strict=True)]
    assert max(errors) <= tolerance, [f"{e:.1e}" for e in errors]
