"""Reading the checkpoints that the published SIB code writes: dicts with the keys netFeat, SIB, lr and nbStep."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

# What wrappers of modules put before every name: DataParallel and its like, torch.compile.
_PREFIXES = ("module.", "_orig_mod.")
_CHECKPOINT_KEYS = ("netFeat", "SIB", "lr", "nbStep")


def part(checkpoint: Mapping[str, Any], name: str) -> Mapping[str, Tensor]:
    """The state_dict called ``name`` of a whole checkpoint, or a state_dict itself; without wrappers' prefixes.

    Raises:
        TypeError: no dict.
        ValueError: a key is missing or unknown, named.
    """
    _check_mapping("checkpoint", checkpoint)
    if not any(key in checkpoint for key in _CHECKPOINT_KEYS):
        return unwrapped(checkpoint)
    _check_keys("checkpoint", checkpoint, _CHECKPOINT_KEYS)
    found: Mapping[str, Tensor] = checkpoint[name]
    _check_mapping(f"checkpoint[{name!r}]", found)
    return unwrapped(found)


def unwrapped(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The state_dict of the module within DataParallel, DistributedDataParallel or torch.compile, if it is one's."""
    found = dict(state_dict)
    while found and any(all(str(key).startswith(prefix) for key in found) for prefix in _PREFIXES):
        found = {str(key).partition(".")[2]: value for key, value in found.items()}
    return found


def take(state_dict: Mapping[str, Tensor], expected: Iterable[str], what: str) -> dict[str, Tensor]:
    """The tensors with these names; the steps that BatchNorm counted may be there or not, and are left out.

    Raises:
        ValueError: a key is missing or unknown, named.
    """
    names = list(expected)
    norms = [name.removesuffix("running_mean") for name in names if name.endswith(".running_mean")]
    counters = {f"{norm}num_batches_tracked" for norm in norms}
    _check_keys(what, [key for key in state_dict if key not in counters], names)
    return {key: state_dict[key] for key in names}


def _check_mapping(what: str, given: object) -> None:
    if not isinstance(given, Mapping):
        raise TypeError(f"{what}: expected a dict, got {type(given).__name__}")


def _check_keys(what: str, given: Iterable[str], expected: Sequence[str]) -> None:
    given = set(given)
    for key in expected:
        if key not in given:
            raise ValueError(f"{what}: missing key {key!r}")
    for key in sorted(given - set(expected), key=str):
        raise ValueError(f"{what}: unknown key {key!r}")
