"""Small tensors that modules make of plain numbers, kept since making one costs as much as a check."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kernelmeta.backends import is_traced

Numbers = tuple[float, ...] | tuple[tuple[float, ...]]


def _themselves(*numbers: float) -> Numbers:
    return numbers


class KeptNumbers:
    """Numbers as a tensor of another tensor's type, on its device.

    A tensor belongs to the mode it was made in: one made for torch.func, torch.compile or FakeTensorMode must not be
    met by a later call. Only an ordinary one is kept, and `torch.inference_mode` makes ordinary ones too.

    Args:
        of: the numbers, from what a call gives; called only where that is not what it was.
    """

    def __init__(self, of: Callable[..., Numbers] = _themselves) -> None:
        self._of = of
        self._given: tuple[float, ...] = ()
        self._tensor: Tensor | None = None

    def __call__(self, given: tuple[float, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """[len(numbers)], or one row of them, without gradient; of ``like``'s type where no other is told."""
        kept, dtype = self._tensor, dtype or like.dtype
        if (
            kept is not None
            and self._given == given
            and kept.dtype is dtype
            and kept.device == like.device
            and not is_traced()
        ):
            return kept
        with torch.inference_mode(False):
            made = torch.tensor(self._of(*given), dtype=dtype, device=like.device)
        if type(like) in (Tensor, torch.nn.Parameter) and type(made) is Tensor and not is_traced():
            self._given, self._tensor = given, made
        return made

    def __deepcopy__(self, memo: object) -> KeptNumbers:
        return KeptNumbers(self._of)

    def __reduce__(self) -> tuple[type[KeptNumbers], tuple[Callable[..., Numbers]]]:
        return KeptNumbers, (self._of,)
