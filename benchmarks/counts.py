"""Counted work: floating-point operations and bytes that an op cannot do without.

Sizes T, S, Q, N, D, H, K as everywhere. A product of [a, b] and [b, c] counts 2abc. Terms smaller by a
factor of H or D (normalising, softmax, activations) are left out: a floor may be too low, never too high.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from benchmarks.problem import DTYPES, Size


class Work(NamedTuple):
    """Of one call."""

    flops: float
    bytes: float

    def floor(self, flops_per_second: float, bytes_per_second: float) -> float:
        """Seconds below which no implementation can be: whichever limit is larger."""
        return max(self.flops / flops_per_second, self.bytes / bytes_per_second)


def _mlp_flops(rows: int, N: int, H: int) -> float:
    return 2.0 * rows * (2 * N * H + H * H)


def dual_flops(size: Size) -> float:
    """One task forward in the dual form: half the Gram matrix, C, |theta0|^2, then A G a step."""
    _, N, _, D, K, _ = size
    Q = size.Q
    once = Q * (Q + 1) * D + 2.0 * Q * N * D + 2.0 * N * D
    return once + K * (2.0 * Q * Q * N + _mlp_flops(Q, N, size.H))


def direct_flops(size: Size) -> float:
    """One task forward in D dimensions: Xhat theta^T and Xhat^T G a step, and the last logits."""
    _, N, _, D, K, _ = size
    Q = size.Q
    return 2.0 * Q * N * D * (2 * K + 1) + K * _mlp_flops(Q, N, size.H)


def sib(size: Size, mode: str) -> Work:
    """The whole episode, :func:`kernelmeta.ops.sib`; the cheaper form is counted.

    Backward: two products for each product of the forward pass, except that a step needs A only once more, and
    that without feature gradients D is met only on the way to theta0 (one product Q x N x D).
    """
    T, N, S, D, K, _ = size
    Q, element = size.Q, DTYPES[size.dtype].itemsize
    flops = 2.0 * S * D + min(dual_flops(size), direct_flops(size))
    features = (S + Q) * D * element
    data = features + Q * N * 4.0
    if mode != "forward":
        mlp = 2 * K * _mlp_flops(Q, N, size.H)
        dual = K * 2.0 * Q * Q * N + 2.0 * Q * N * D
        direct = 2.0 * Q * N * D * (2 * K + 1)
        if mode == "train+features":
            # the gradient of A (K outer products), then both factors of Xhat Xhat^T and of Xhat theta0^T
            dual += K * 2.0 * Q * Q * N + 2.0 * Q * Q * D + 2.0 * Q * N * D
            direct *= 2
            data += features  # written
        flops += mlp + min(dual, direct)
        data += Q * D * element + Q * N * 4.0  # the rows again, and the gradient that arrives
    return Work(T * flops, T * data)


def learner(size: Size, support_steps: int = 0, query_steps: int = 0, mlp_steps: int = 0) -> Work:
    """Forward and backward of a classifier that takes steps by the gradients of support rows, then of query rows.

    In the space of the rows or in D dimensions, whichever is cheaper; no gradient of the features.
    """
    T, N, S, D, _, _ = size
    Q = size.Q
    once, live = 2.0 * Q * N * D, 0.0
    if support_steps:
        once += S * (S + 1) * D + 2.0 * Q * S * D + 2.0 * S * N * D
        live += support_steps * 2.0 * S * S * N + 2.0 * Q * S * N
    if query_steps:
        once += Q * (Q + 1) * D
        live += query_steps * 2.0 * Q * Q * N
    direct = 2.0 * N * D * (2 * (support_steps * S + query_steps * Q) + Q)
    flops = min(once + live, direct) + min(live + 2.0 * Q * N * D, direct) + 3 * mlp_steps * _mlp_flops(Q, N, size.H)
    element = DTYPES[size.dtype].itemsize
    return Work(T * flops, T * (2.0 * (S + Q) * D * element + 3 * Q * N * 4.0))


def mlp(size: Size, mode: str) -> Work:
    """:func:`kernelmeta.ops.synthetic_gradient_mlp` on [T, Q, N]."""
    rows = size.T * size.Q
    passes = 1 if mode == "forward" else 3
    return Work(passes * _mlp_flops(rows, size.N, size.H), (2 if mode == "forward" else 5) * rows * size.N * 4.0)


def focal_distillation(rows: int, classes: int) -> Work:
    """:func:`kernelmeta.ops.focal_distillation`, forward and backward: both logits are read twice, a gradient is
    written; exponentials, three an element in each direction, are left out.
    """
    return Work(0.0, 5 * rows * classes * 4.0)


def linearised_descent(T: int, S: int, Q: int, widths: Sequence[int], steps: int) -> Work:
    """:func:`kernelmeta.ops.linearised_descent`, forward and backward to rows and weights: the backward pass takes
    two products for each of the forward pass, the steps once more.

    Query rows enter by what they move by along the weights' own move, which is a sum over support rows: a matrix
    product a layer besides those of the network. Support rows need the derivatives of N outputs, and half of the
    products of those.
    """
    N, flops = widths[-1], 0.0
    for i, (inputs, units) in enumerate(pairwise(widths)):
        flops += 2.0 * (S + Q) * inputs * units + S * (S + 1) * inputs + 2.0 * S * Q * (inputs + units)
        if i > 0:
            flops += 2.0 * Q * inputs * units
        if i < len(widths) - 2:
            flops += N * S * (N * S + 1) * units + (2.0 * N * S * inputs * units if i > 0 else 0.0)
    rows = (S + Q) * widths[0] * 4.0
    return Work(T * (3 * flops + 3 * steps * 2.0 * (N * S) ** 2), T * 3 * rows)


def class_means(size: Size, mode: str) -> Work:
    """:func:`kernelmeta.ops.class_means`; ``train`` with the gradient of the weights alone."""
    T, N, S, D, _, _ = size
    element = DTYPES[size.dtype].itemsize
    flops, data = 4.0 * S * D + N * D, S * D * element + N * D * 4.0
    if mode != "forward":
        flops += 2.0 * N * D
        data += N * D * 4.0 + (S * D * element)
        if mode == "train+features":
            flops += 4.0 * S * D
            data += S * D * element
    return Work(T * flops, T * data)
