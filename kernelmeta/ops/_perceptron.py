"""A perceptron's layers as the raw ops take them: in one tensor, as `Perceptron` in csrc/engine/ntk.h lays them out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernelmeta.ops import _checks
from kernelmeta.ops._trace import elements, padded

MOST_LAYERS = 8
OPTIONS = "int[] widths, bool biased, float slope"


class Packed(NamedTuple):
    parameters: Tensor
    widths: tuple[int, ...]
    biased: bool


def check(weights: Sequence[Tensor], biases: Sequence[Tensor] | None, features: int, slope: float) -> None:
    """Raise a ValueError for layers that do not follow one another, or do not read these features."""
    if not isinstance(slope, (int, float)) or not 0 <= slope < math.inf:
        raise ValueError(f"slope: expected a number of at least 0, got {slope!r}")
    if not isinstance(weights, Sequence) or not 1 <= len(weights) <= MOST_LAYERS:
        raise ValueError(f"weights: expected those of 1 to {MOST_LAYERS} layers, in order")
    if biases is not None and (not isinstance(biases, Sequence) or len(biases) != len(weights)):
        raise ValueError(f"biases: expected one for each of the {len(weights)} layers, or None")
    _checks.tensors(**{f"weights[{i}]": w for i, w in enumerate(weights)})
    for i, w in enumerate(weights):
        if w.dim() != 2 or w.shape[1] != features or w.shape[0] < 1:
            raise ValueError(f"weights[{i}]: expected [units, {features}], got {_checks.shape_text(w)}")
        features = w.shape[0]
    if biases is not None:
        _checks.tensors(**{f"biases[{i}]": b for i, b in enumerate(biases)})
        for i, (w, b) in enumerate(zip(weights, biases, strict=True)):
            _checks.shape(f"biases[{i}]", b, (w.shape[0],), "[units]")


def pack(weights: Sequence[Tensor], biases: Sequence[Tensor] | None) -> Packed:
    parts = []
    dtype = weights[0].dtype
    for t in (*weights, *(biases or ())):
        dtype = torch.promote_types(dtype, t.dtype)
    for i, w in enumerate(weights):
        parts.append(_aligned(w.to(dtype), rows=i > 0))
        if biases is not None:
            parts.append(_aligned(biases[i].to(dtype), rows=False))
    widths = (weights[0].shape[1], *(w.shape[0] for w in weights))
    return Packed(torch.cat(parts), widths, biases is not None)


def _aligned(t: Tensor, *, rows: bool) -> Tensor:
    """Flat, of a multiple of 16 elements, and so its rows if they are to be."""
    if rows:
        t = pad(t, (0, -t.shape[1] % 16))
    return pad(t.reshape(-1), (0, -t.numel() % 16))


def unpack(parameters: Tensor, widths: Sequence[int], biased: bool) -> list[tuple[Tensor, Tensor | None]]:
    """Weight [units, inputs] and bias [units] of every layer."""
    layers = []
    at = 0
    for i, (inputs, units) in enumerate(pairwise(widths)):
        across = padded(inputs) if i > 0 else inputs
        weight = parameters[at : at + units * across].view(units, across)[:, :inputs]
        at += padded(units * across)
        layers.append((weight, parameters[at : at + units] if biased else None))
        at += padded(units) if biased else 0
    return layers


def hidden_elements(widths: Sequence[int], ld: Any) -> Any:
    """``PerHiddenLayer``."""
    return elements(*((padded(width), ld) for width in widths[1:-1]))
