"""Oracles on tiles: where a step's G = d loss / d Z comes from, and how a gradient of G finds its way back to Z.

One small function an oracle, its derivative beside it (the formulas: csrc/engine/oracles.h). z, g, gg and gz are tiles
[rows, ways]; ``ways`` [1, ways] says which columns are classes, ``y`` holds the labels, one-hot; the loss is ``share``
times the sum over the rows. Whoever calls masks the result. The synthetic gradient stands in `mlp_kernels`.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from kernelmeta.phases import ORACLES


def _number(name: str) -> tl.constexpr:
    return tl.constexpr(list(ORACLES).index(name))


CROSS_ENTROPY = _number("cross_entropy")
SQUARED_ERROR = _number("squared_error")
HINGE = _number("hinge")
ENTROPY = _number("entropy")
SOFT_ASSIGNMENT = _number("soft_assignment")
SYNTHETIC_GRADIENT = _number("synthetic_gradient")
EQUIVARIANT_GRADIENT = _number("equivariant_gradient")

# Those of classes' shares of the rows: programs with them run in plain PyTorch.
WITHOUT_KERNELS = ("proportions", "assignment", "marginal_entropy")


@triton.jit
def softmax(z, ways):
    """softmax(z) and log sum exp(z) of every row."""
    z = tl.where(ways, z, -float("inf"))
    top = tl.max(z, 1)
    e = tl.exp(z - top[:, None])
    total = tl.sum(e, 1)
    return e / total[:, None], top + tl.log(total)


@triton.jit
def _softmax_backward(p, gp):
    return p * (gp - tl.sum(p * gp, 1)[:, None])


@triton.jit
def cross_entropy(z, y, ways, share):
    p, _ = softmax(z, ways)
    return (p - y) * share


@triton.jit
def cross_entropy_backward(z, gg, ways, share):
    p, _ = softmax(z, ways)
    return _softmax_backward(p, gg) * share


@triton.jit
def squared_error(z, y, share, target):
    return (z - target * y) * share


@triton.jit
def squared_error_backward(gg, share):
    return gg * share


@triton.jit
def hinge(z, y, ways, share):
    own = tl.sum(z * y, 1)[:, None]
    violated = tl.where(ways & (1 + z - own > 0), 1 - y, 0.0)
    return (violated - y * tl.sum(violated, 1)[:, None]) * share


@triton.jit
def hinge_backward(gg):
    """Its G is constant between kinks."""
    return gg * 0


@triton.jit
def _entropy_terms(z, ways):
    """p = softmax(z) and h = log p + entropy(p)."""
    p, log_sum = softmax(z, ways)
    log_p = tl.where(ways, z - log_sum[:, None], 0.0)
    return p, log_p - tl.sum(p * log_p, 1)[:, None]


@triton.jit
def entropy(z, ways, share):
    p, h = _entropy_terms(z, ways)
    return -p * h * share


@triton.jit
def entropy_backward(z, gg, ways, share):
    p, h = _entropy_terms(z, ways)
    mean = tl.sum(p * gg, 1)[:, None]
    along = tl.sum(p * h * gg, 1)[:, None]
    return p * (along - (gg - mean) * (h + 1)) * share


@triton.jit
def soft_assignment(z, ways):
    """softmax(z) itself: not a gradient, but what soft k-means moves its centres with."""
    p, _ = softmax(z, ways)
    return p


@triton.jit
def soft_assignment_backward(z, gg, ways):
    p, _ = softmax(z, ways)
    return _softmax_backward(p, gg)


@triton.jit
def oracle(z, y, ways, share, target, ORACLE: tl.constexpr):
    """G of the oracles that have no parameters of their own."""
    if ORACLE == CROSS_ENTROPY:
        g = cross_entropy(z, y, ways, share)
    elif ORACLE == SQUARED_ERROR:
        g = squared_error(z, y, share, target)
    elif ORACLE == HINGE:
        g = hinge(z, y, ways, share)
    elif ORACLE == ENTROPY:
        g = entropy(z, ways, share)
    elif ORACLE == SOFT_ASSIGNMENT:
        g = soft_assignment(z, ways)
    else:
        tl.static_assert(False, "this oracle has no Triton kernel")
        g = z
    return g


@triton.jit
def oracle_backward(z, gg, ways, share, ORACLE: tl.constexpr):
    """(dG / dz)^T gg."""
    if ORACLE == CROSS_ENTROPY:
        gz = cross_entropy_backward(z, gg, ways, share)
    elif ORACLE == SQUARED_ERROR:
        gz = squared_error_backward(gg, share)
    elif ORACLE == HINGE:
        gz = hinge_backward(gg)
    elif ORACLE == ENTROPY:
        gz = entropy_backward(z, gg, ways, share)
    elif ORACLE == SOFT_ASSIGNMENT:
        gz = soft_assignment_backward(z, gg, ways)
    else:
        tl.static_assert(False, "this oracle has no Triton kernel")
        gz = z
    return gz
