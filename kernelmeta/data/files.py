"""Text and JSON, and weights of unknown origin."""

from __future__ import annotations

import json
import math
import os
import warnings
from pathlib import Path
from typing import Any

import torch

from kernelmeta.data.file_kinds import is_safetensors, kind_of_file
from kernelmeta.data.replacing import replacing
from kernelmeta.data.tensor_files import read_tensors
from kernelmeta.data.words import one_line


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file whole or not at all. Raises OSError."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write a JSON file whole or not at all. Raises OSError, or ValueError for a number that is not finite."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The object in a JSON file. Raises OSError, or ValueError if it holds anything else."""
    try:
        content = parse_json(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON file ({one_line(error)})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def parse_json(text: str) -> Any:
    """What JSON text says. Raises ValueError for anything else, numbers beyond those of floats among it."""

    def number(digits: str) -> float:
        value = float(digits)
        if not math.isfinite(value):
            raise ValueError(f"the number {digits[:40]} is too large")
        return value

    def constant(name: str) -> float:
        raise ValueError(f"{name} is no number of JSON")

    try:
        return json.loads(text, parse_float=number, parse_constant=constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_weights(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A state dict from a file of unknown origin: safetensors, or what ``torch.save`` wrote.

    No pickle is run: ``torch.load(weights_only=True)`` builds tensors and plain containers only.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: neither format, truncated, or a pickle that holds anything but tensors and plain
            containers.
    """
    if Path(path).suffix == ".safetensors" or is_safetensors(path):
        return dict(read_tensors(path)[0])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle protocol; the error says enough
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises nearly anything on a foreign file
        kind = kind_of_file(path)
        is_pickle = kind is None or "torch.save" in kind
        seen = "" if is_pickle else f"{kind}, "
        raise ValueError(
            f"{path}: {seen}neither safetensors nor a checkpoint of tensors alone ({one_line(error)})"
        ) from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a dict of tensors, got {type(content).__name__}")
    for name, value in content.items():
        if isinstance(value, torch.Tensor):
            check_dense(path, str(name), value)
    return content


def check_dense(path: str | os.PathLike[str], name: str, tensor: torch.Tensor) -> None:
    """A tensor that a file holds has elements, as they are, in memory.

    Raises:
        ValueError: it is sparse, quantized, nested or on the meta device, which torch.save all writes.
    """
    faults = [
        ("nested", tensor.is_nested),
        ("quantized", tensor.is_quantized),
        ("on the meta device, without elements", tensor.is_meta),
        ("sparse", tensor.layout is not torch.strided),
    ]
    for fault, found in faults:
        if found:
            raise ValueError(f"{path}: {name or 'the tensor'} is {fault}; expected a plain one")
