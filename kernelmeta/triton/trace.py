"""Views of what a forward pass leaves for its backward pass: one array after the other, each from a multiple of 16 on
(``Arena`` in csrc/engine/arena.h).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from kernelmeta.ops._trace import elements, padded


class Trace:
    """``data`` [T, size], cut into ``fields``: name -> shape of one task's array. Absent arrays have an empty shape.

    ``at`` says where each begins; ``trace["u"]`` is the view [T, *shape].
    """

    def __init__(self, data: Tensor, fields: Mapping[str, tuple[int, ...]]) -> None:
        self.data, self.size = data, data.stride(0)
        self.at: dict[str, int] = {}
        self._views: dict[str, Tensor] = {}
        at = 0
        for name, shape in fields.items():
            self.at[name] = at
            if shape:
                strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
                start = data.storage_offset() + at
                self._views[name] = data.as_strided((data.shape[0], *shape), (self.size, *strides), start)
                at += padded(math.prod(shape))

    def __getitem__(self, name: str) -> Tensor:
        return self._views[name]

    def __contains__(self, name: str) -> bool:
        return name in self._views


def size_of(fields: Mapping[str, tuple[int, ...]]) -> int:
    return int(elements(*filter(None, fields.values())))
