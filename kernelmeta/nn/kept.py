"""Small tensors that modules make of plain numbers, kept since making one costs as much as a check."""

from __future__ import annotations

import torch
from torch import Tensor

from kernelmeta.backends import is_traced

Numbers = tuple[float, ...] | tuple[tuple[float, ...]]


class KeptNumbers:
    """Numbers as a tensor of another tensor's type, on its device.

    A tensor belongs to the mode it was made in: one made for torch.func, torch.compile or FakeTensorMode must not be
    met by a later call. Only an ordinary one is kept, and `torch.inference_mode` makes ordinary ones too.
    """

    def __init__(self) -> None:
        self._numbers: Numbers = ()
        self._tensor: Tensor | None = None

    def __call__(self, numbers: Numbers, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """[len(numbers)], or one row of them, without gradient; of ``like``'s type where no other is told."""
        kept, dtype = self._tensor, dtype or like.dtype
        if (
            kept is not None
            and kept.dtype is dtype
            and kept.device == like.device
            and self._numbers == numbers
            and not is_traced()
        ):
            return kept
        with torch.inference_mode(False):
            made = torch.tensor(numbers, dtype=dtype, device=like.device)
        if type(like) in (Tensor, torch.nn.Parameter) and type(made) is Tensor and not is_traced():
            self._numbers, self._tensor = numbers, made
        return made

    def __deepcopy__(self, memo: object) -> KeptNumbers:
        return KeptNumbers()

    def __reduce__(self) -> tuple[type[KeptNumbers], tuple[()]]:
        return KeptNumbers, ()
