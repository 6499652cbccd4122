"""Tensors come back as they were, to us and to the safetensors library; a file that was damaged is noticed."""

# ruff: noqa: PT017 (what an error says is part of the case)

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from kernelmeta.data.tensor_files import read_tensors, write_tensors

DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
)  # fmt: skip
LETTERS = list('abc"\\\n\t{}[]:, ü\u2028€𝄞.crc320') + ['"crc32":"', "\x7f", "\x01"]


def text(random: np.random.Generator) -> str:
    return "".join(random.choice(LETTERS, int(random.integers(0, 30))))


def check(random: np.random.Generator, folder: Path) -> None:
    tensors = {}
    for i in range(int(random.integers(1, 8))):
        shape = random.integers(0, 6, int(random.integers(0, 4))).tolist()
        tensor = torch.from_numpy(random.integers(-100, 100, shape)).to(DTYPES[int(random.integers(len(DTYPES)))])
        tensors[f"{i}{text(random)}"] = tensor.transpose(0, -1) if tensor.dim() else tensor
    metadata = {f"{i}{text(random)}": text(random) for i in range(int(random.integers(0, 4)))}
    path = folder / "file"
    write_tensors(path, tensors, metadata)
    whole = path.read_bytes()
    found, read = read_tensors(path)
    theirs = load_file(path)
    with safe_open(path, "pt") as file:
        assert file.metadata() == read
    assert {k: v for k, v in read.items() if k != "crc32"} == metadata
    for name, tensor in tensors.items():
        assert found[name].dtype == theirs[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor) and torch.equal(theirs[name], tensor)
    write_tensors(path, dict(reversed(tensors.items())), dict(reversed(metadata.items())))
    assert path.read_bytes() == whole, "the order of tensors and metadata matters"
    for _ in range(20):
        path.write_bytes(damaged(random, whole))
        try:
            again, metadata_again = read_tensors(path)
        except ValueError as error:
            assert "\n" not in str(error).replace(str(path), ""), error
            continue
        # Nothing but the name of the checksum itself may have changed.
        assert "crc32" not in metadata_again or path.read_bytes() == whole, "damage passed"
        assert {name: tensor.tolist() for name, tensor in again.items()} == {n: t.tolist() for n, t in tensors.items()}


def damaged(random: np.random.Generator, whole: bytes) -> bytes:
    at = int(random.integers(0, len(whole)))
    kind = random.integers(0, 4)
    if kind == 0:
        return whole[:at]
    if kind == 1:
        return whole[:at] + bytes([whole[at] ^ (1 << int(random.integers(8)))]) + whole[at + 1 :]
    if kind == 2:
        return whole[:at] + random.bytes(int(random.integers(1, 9))) + whole[at:]
    return whole[:at] + whole[at + int(random.integers(1, 9)) :]
