"""Reading the checkpoints that the published SIB code writes: dicts with the keys netFeat, SIB, lr and nbStep."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

_CHECKPOINT_KEYS = {"netFeat", "SIB", "lr", "nbStep"}


def part(checkpoint: Mapping[str, Any], name: str) -> Mapping[str, Tensor]:
    """The state_dict called ``name`` of a whole checkpoint; a state_dict is returned as it is.

    Raises:
        ValueError: the checkpoint lacks that part or has keys that no published checkpoint has, named.
    """
    if not _CHECKPOINT_KEYS & checkpoint.keys():
        return checkpoint
    unknown = checkpoint.keys() - _CHECKPOINT_KEYS
    if unknown:
        raise ValueError(f"checkpoint: unknown key {min(unknown)!r}; expected {sorted(_CHECKPOINT_KEYS)}")
    if name not in checkpoint:
        raise ValueError(f"checkpoint: no key {name!r}; it has {sorted(checkpoint)}")
    found: Mapping[str, Tensor] = checkpoint[name]
    return found


def take(state_dict: Mapping[str, Tensor], expected: Iterable[str], what: str) -> dict[str, Tensor]:
    """The tensors with these names; the steps that BatchNorm counted may be there or not, and are left out.

    Raises:
        ValueError: a key is missing or unknown, named.
    """
    names = set(expected)
    for key in sorted(names):
        if key not in state_dict:
            raise ValueError(f"{what}: missing key {key!r}")
    for key in sorted(state_dict):
        if key not in names and not key.endswith(".num_batches_tracked"):
            raise ValueError(f"{what}: unknown key {key!r}")
    return {key: state_dict[key] for key in names}
