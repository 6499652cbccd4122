"""Gram matrices of kernels that need no network: linear, cosine, radial basis functions."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import normalize

from kernelmeta.reference.precision import without_autocast


def _rows(x1: Tensor, x2: Tensor | None) -> tuple[Tensor, Tensor]:
    x2 = x1 if x2 is None else x2
    if x1.dim() < 2 or x2.dim() < 2 or x1.shape[-1] != x2.shape[-1]:
        raise ValueError(f"x2: expected rows of {x1.shape[-1]} features as in x1, got shape {list(x2.shape)}")
    return x1, x2


@without_autocast
def linear_gram(x1: Tensor, x2: Tensor | None = None, *, bias: float = 0.0) -> Tensor:
    """``<x, y> + bias^2``: the tangent kernel of a linear head, whose bias is a parameter where ``bias`` is 1.

    Args:
        x1: [..., n, D].
        x2: [..., m, D]; ``x1`` if None.
        bias: added, squared.

    Returns:
        [..., n, m]

    Raises:
        ValueError: shapes that do not fit.
    """
    x1, x2 = _rows(x1, x2)
    return x1 @ x2.mT + bias**2


@without_autocast
def cosine_gram(x1: Tensor, x2: Tensor | None = None) -> Tensor:
    """``<x, y> / (|x| |y|)``; zero where a row is.

    Args:
        x1: [..., n, D].
        x2: [..., m, D]; ``x1`` if None.

    Returns:
        [..., n, m]

    Raises:
        ValueError: shapes that do not fit.
    """
    x1, x2 = _rows(x1, x2)
    return normalize(x1, dim=-1) @ normalize(x2, dim=-1).mT


@without_autocast
def rbf_gram(x1: Tensor, x2: Tensor | None = None, *, length: float | Tensor = 1.0) -> Tensor:
    """``exp(-|x - y|^2 / (2 length^2))``.

    Args:
        x1: [..., n, D].
        x2: [..., m, D]; ``x1`` if None.
        length: a number, or a tensor that [..., n, m] is divided by.

    Returns:
        [..., n, m]

    Raises:
        ValueError: shapes that do not fit.
    """
    x1, x2 = _rows(x1, x2)
    middle = x1.detach().mean(-2, keepdim=True)  # (distances of rows far from zero would be lost in rounding)
    x1, x2 = x1 - middle, x2 - middle
    squares = x1.square().sum(-1).unsqueeze(-1) + x2.square().sum(-1).unsqueeze(-2) - 2 * x1 @ x2.mT
    return (-squares.clamp_min(0) / (2 * length**2)).exp()
