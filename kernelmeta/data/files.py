"""Reading files from outside, and writing files whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside ``path`` to write to; renamed to ``path`` if the block ends well, else deleted.

    ``path`` thus holds the old content or the new, whenever the process is killed. Missing folders are made.

    Raises:
        OSError: the folder cannot be written to, or the disk is full.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file whole or not at all. Raises OSError."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write a JSON file whole or not at all. Raises OSError."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The object in a JSON file. Raises OSError, or ValueError if it holds anything else."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON file ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def write_tensors(path: str | os.PathLike[str], tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file whole or not at all. Raises OSError.

    With a single metadata entry the file's bytes are a function of the content; safetensors writes several in
    any order.
    """
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        try:
            save_file(contiguous, temporary, metadata)
        except SafetensorError as error:
            raise OSError(f"{path}: could not be written ({one_line(error)})") from None


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors (memory-mapped, on the CPU) and metadata of a safetensors file.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: it is truncated, or no safetensors file.
    """
    with open(path, "rb"):  # the usual errors for a file that is missing or must not be read
        pass
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path}: truncated, or not a safetensors file ({one_line(error)})") from None


def read_weights(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A state dict from a file of unknown origin: safetensors, or what ``torch.save`` wrote.

    No pickle is run: ``torch.load(weights_only=True)`` builds tensors and plain containers only.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: neither format, truncated, or a pickle that holds anything but tensors and plain
            containers.
    """
    if Path(path).suffix == ".safetensors":
        return dict(read_tensors(path)[0])
    with open(path, "rb"):
        pass
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle protocol; the error says enough
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises nearly anything on a foreign file
        raise ValueError(f"{path}: neither safetensors nor a checkpoint of tensors alone ({one_line(error)})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a dict of tensors, got {type(content).__name__}")
    return content


def one_line(error: BaseException) -> str:
    """What an error says, on one line of no more than 200 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
