"""Parameters that lie one after the other in one tensor: an optimizer's step is one kernel, a message one message."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

# Optimizers of torch.optim that do to an entry what depends on that entry alone, whatever tensor it is in.
_ENTRY_BY_ENTRY = (
    "ASGD",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "NAdam",
    "RAdam",
    "RMSprop",
    "Rprop",
    "SGD",
)


class FlatParameters:
    """Parameters of one precision, on one device, as parts of one.

    The parameters stay what they are, for their module and whoever else holds them; only where they lie changes. After
    a backward pass `gather` brings their gradients together.

    Args:
        parameters: at least one.
    """

    flat: nn.Parameter
    """[n], all entries; what the optimizer is given."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.flat = nn.Parameter(torch.cat([p.detach().reshape(-1) for p in self.parameters]))
        grad = self.flat.grad = torch.zeros_like(self.flat)
        sizes = [p.numel() for p in self.parameters]
        for parameter, entries in zip(self.parameters, self.flat.detach().split(sizes), strict=True):
            parameter.data = entries.view_as(parameter)
        self._gradients = [entries.view_as(p) for p, entries in zip(self.parameters, grad.split(sizes), strict=True)]

    def gather(self) -> None:
        """The gradients of all parameters -> that of `flat`; zeros where there is none."""
        found = [p.grad for p in self.parameters]
        given = [g for g in found if g is not None]
        if len(given) < len(found):
            torch._foreach_zero_(self._gradients)
        places = [place for place, g in zip(self._gradients, found, strict=True) if g is not None]
        torch._foreach_copy_(places, given)


def can_be_flat(parameters: Sequence[Tensor], optimizer: str) -> bool:
    """Whether an optimizer, by its name, does the same to the parameters in one tensor."""
    alike = all(a.dtype is b.dtype and a.device == b.device for a, b in pairwise(parameters))
    return len(parameters) > 0 and alike and optimizer in _ENTRY_BY_ENTRY
