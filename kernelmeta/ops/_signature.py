"""The arguments of a raw op, by name: declared once, as the text of a schema."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from typing import Any

from kernelmeta.mlp_parameters import MLPParameters

Args = tuple[Any, ...]

MLP = ", ".join(MLPParameters._fields)


def mlp_tensors(kind: str = "Tensor") -> str:
    """The ten tensors of `MLPParameters` in a schema; ``kind`` is "Tensor?" where an op has the MLP or not."""
    return ", ".join(f"{kind} {name}" for name in MLPParameters._fields)


def mlp_of(call: Any) -> MLPParameters:
    """The MLP among the arguments of a call; its tensors are None where there is none."""
    return MLPParameters(*(getattr(call, name) for name in MLPParameters._fields))


class Signature:
    """The arguments of a raw op.

    Args:
        text: as in a schema, "Tensor query, Tensor? query_index, int steps"; tensors come first.

    Attributes:
        names: of the arguments, in order.
        n_tensors: how many of them are tensors.
        call: a named tuple of the arguments.
        pack: the arguments by name -> a plain tuple in order. The ten of an MLP are given as ``mlp``.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        kinds, self.names = zip(*(argument.strip().rsplit(" ", 1) for argument in text.split(",")), strict=True)
        self.n_tensors = sum(kind.startswith("Tensor") for kind in kinds)
        if not all(kind.startswith("Tensor") for kind in kinds[: self.n_tensors]):
            raise ValueError(f"tensors come first in a schema: {text}")
        self.call = _named_tuple(self.names)
        self.pack = _packer(self.names)

    def at(self, name: str) -> int:
        return self.names.index(name)

    def replace(self, args: Args, **changed: Any) -> Args:
        return tuple(changed.get(name, value) for name, value in zip(self.names, args, strict=True))


def _named_tuple(names: tuple[str, ...]) -> Callable[..., Any]:
    make: Any = namedtuple  # (a type checker wants to see the fields)
    call: Callable[..., Any] = make("Call", names)
    return call


def _packer(names: tuple[str, ...]) -> Callable[..., Args]:
    """What `Signature.pack` is: made from text, as named tuples are, since it runs at every call of an op."""
    values, keywords = ", ".join(names), ", ".join(names)
    if MLP in values:
        values, keywords = values.replace(MLP, "*mlp"), keywords.replace(MLP, "mlp")
    packer: Callable[..., Args] = eval(f"lambda *, {keywords}: ({values},)")
    return packer
