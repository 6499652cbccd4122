"""Checkpoints: one safetensors file with all that a run needs to go on bit for bit.

Tensors are named ``<group>.<name>``; everything else is one JSON object in the metadata. The bytes are a
function of the content: no time stamps, no paths of the run folder. A checksum tells whether they still are what was
written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from kernelmeta.data import FeatureBank
from kernelmeta.data.files import parse_json
from kernelmeta.data.tensor_files import read_metadata, read_tensors, write_tensors

FORMAT = "kernelmeta-checkpoint-1"
# What else a checkpoint may be.
_KINDS = {
    "pretrain": ", which is a backbone ('kernelmeta extract --weights' makes a bank with it)",
    "train": ", which is a learner ('kernelmeta evaluate' tells its accuracy)",
}
_KEY = "kernelmeta"
CHECKPOINT = "checkpoint.safetensors"  # what it is called in a run's folder
AVERAGED = "average"  # the group with the running mean of the weights, where there is one
BEST = "best"  # the group with the weights that were best on the validation classes, where there are any


def fingerprint(bank: FeatureBank) -> dict[str, int]:
    """Tells whether a bank is the one that a run began with."""
    return {"samples": len(bank.labels), "features": bank.n_features, "crc32": bank.crc32}


@dataclass
class Checkpoint:
    """Tensors by group, and what JSON holds.

    Args:
        kind: what wrote it, "train" or "pretrain".
        tensors: group -> name -> tensor.
        state: anything that JSON takes; floats come back exactly.
    """

    kind: str
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it, whole or not at all. Raises OSError."""
        flat = {f"{group}.{name}": t for group, named in self.tensors.items() for name, t in named.items()}
        content = {"format": FORMAT, "kind": self.kind, "groups": sorted(self.tensors), "state": self.state}
        write_tensors(path, flat, {_KEY: json.dumps(content, sort_keys=True)})

    @classmethod
    def load(cls, path: str | os.PathLike[str], kind: str) -> Checkpoint:
        """Read it.

        Raises:
            OSError: there is no such file, or it cannot be read.
            ValueError: truncated, foreign, or of another kind.
        """
        flat, metadata = read_tensors(path)
        if _KEY not in metadata and metadata.get("format", "").startswith("kernelmeta-bank"):
            raise ValueError(f"{path}: no checkpoint of kernelmeta, but a feature bank")
        try:
            content = parse_json(metadata[_KEY])
            if content["format"] != FORMAT:
                raise ValueError
            tensors: dict[str, dict[str, Tensor]] = {str(group): {} for group in content["groups"]}
            for name, tensor in flat.items():
                group, _, rest = name.partition(".")
                tensors[group][rest] = tensor.clone()
            found, state = content["kind"], dict(content["state"])
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{path}: no checkpoint of kernelmeta") from None
        if found != kind:
            raise ValueError(
                f"{path}: expected a checkpoint of 'kernelmeta {kind}', got one of {found!r}" + _KINDS.get(found, "")
            )
        return cls(kind, tensors, state)


def checkpoint_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The state alone of a checkpoint, without its tensors; empty of a file that is none. Raises OSError."""
    try:
        state = parse_json(read_metadata(path)[_KEY])["state"]
    except (KeyError, TypeError, ValueError):
        return {}
    return dict(state) if isinstance(state, dict) else {}


def check_same(trained: Mapping[str, Any], others: Mapping[str, Any], free: Collection[str], text: str) -> None:
    """Raises ValueError, the setting's name and ``text`` with both values, where settings differ that must not."""
    for name, value in others.items():
        if name in trained and name not in free and trained[name] != value:
            raise ValueError(f"{name}: {text.format(trained[name], value)}")


def count(state: dict[str, Any], name: str) -> int:
    """A number of steps, say, from the state of a checkpoint. Raises ValueError if it is none, KeyError if missing."""
    value = state[name]
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"the checkpoint does not fit the run ({name}: expected 0 or more, got {value!r})")
    return value


def rows(state: dict[str, Any], name: str) -> list[Any]:
    """Triples of numbers, a history, from the state of a checkpoint. Raises ValueError if it is none, KeyError."""
    value = state[name]
    if not isinstance(value, list) or not all(isinstance(row, list) and len(row) == 3 for row in value):
        raise ValueError(f"the checkpoint does not fit the run ({name}: expected a list of triples)")
    return [tuple(row) for row in value]


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """The state of an optimizer as named tensors. Its settings are not in it: they belong to the
    configuration.
    """
    tensors = {}
    for index, named in optimizer.state_dict()["state"].items():
        for name, value in named.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value
            elif value is not None:
                raise ValueError(
                    f"optimizer: {type(optimizer).__name__} keeps {name!r} outside of tensors;"
                    " its state cannot be saved"
                )
    return tensors


def restore_optimizer(optimizer: Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` took. Raises ValueError."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = tensor
    try:
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"optimizer: the saved state does not fit ({error})") from None
