"""safetensors files with a checksum.

They are what the safetensors library reads and writes; what it has no use for is the metadata entry ``crc32``: eight
hexadecimal digits, the CRC-32 of all bytes of the file with eight zeros in their place. A file without that entry, of
another tool, is read as it is. The bytes of a file are a function of its content.
"""

from __future__ import annotations

import errno
import json
import math
import mmap
import os
import stat
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kernelmeta.data.file_kinds import is_safetensors, kind_of_file
from kernelmeta.data.replacing import replacing
from kernelmeta.data.words import one_line

CHECKSUM = "crc32"
_UNKNOWN = "00000000"
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip
# What is read besides, of other tools.
_BY_NAME = {name: dtype for dtype, name in _DTYPES.items()} | {
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_NO_RESERVE = 0x4000  # mmap.MAP_NORESERVE, from Python 3.11 on
_PIECE = 1 << 24


class Pieces(NamedTuple):
    """A tensor that is made a piece at a time, [..., the rest of the shape], and never held as a whole."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: Iterable[Tensor]


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor | Pieces], metadata: dict[str, str]
) -> None:
    """Write a safetensors file whole or not at all.

    Raises:
        OSError: it cannot be written.
        TypeError: a dtype that the project does not use.
        ValueError: pieces that do not make up the shape.
    """
    with replacing(path) as temporary:
        _write(temporary, tensors, {**metadata, CHECKSUM: _UNKNOWN})


def _write(path: Path, tensors: Mapping[str, Tensor | Pieces], metadata: dict[str, str]) -> None:
    # The widest numbers first, so that all are aligned.
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"{name}: {tensor.dtype} cannot be written")
        begin, end = end, end + math.prod(tensor.shape) * tensor.dtype.itemsize
        shape = list(tensor.shape)
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    start = len(text).to_bytes(8, "little") + text
    checksum = zlib.crc32(start)
    with open(path, "wb") as file:
        file.write(start)
        for name in names:
            left = math.prod(tensors[name].shape) * tensors[name].dtype.itemsize
            for data in _bytes(tensors[name]):
                checksum = zlib.crc32(data, checksum)
                file.write(data)
                left -= len(data)
            if left:
                raise ValueError(f"{name}: the pieces do not make up {list(tensors[name].shape)}")
        file.seek(_place_of_checksum(start))
        file.write(f"{checksum:08x}".encode())


def _bytes(tensor: Tensor | Pieces) -> Iterator[memoryview]:
    if isinstance(tensor, Pieces):
        for piece in tensor.pieces:
            if piece.dtype is not tensor.dtype:
                raise ValueError(f"expected pieces of {tensor.dtype}, got {piece.dtype}")
            yield bytes_of(piece)
        return
    data = bytes_of(tensor)
    for at in range(0, len(data), _PIECE):
        yield data[at : at + _PIECE]


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor's elements, in order."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.numel() <= 1:  # may have any stride and count as contiguous
        flat = torch.empty(flat.shape, dtype=flat.dtype).copy_(flat)
    return flat.view(torch.uint8).numpy().data


def _place_of_checksum(start: bytes) -> int:
    """Where in a file the digits stand. The metadata come first, and a quotation mark within a string has a backslash
    before it, so that nothing else looks like this.
    """
    key = f'"{CHECKSUM}":"'.encode()
    return start.index(key) + len(key)


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors (memory-mapped, on the CPU) and metadata of a safetensors file, once all of it was read for its checksum.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: it is truncated, or no safetensors file, or its checksum is not that of its bytes.
    """
    mode = os.stat(path).st_mode  # the usual errors for a file that is missing
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path}: not a regular file: tensors are mapped, which needs one")
    with open(path, "rb"):  # and for one that must not be read
        pass
    try:
        with safe_open(path, framework="np") as file:  # looks at the header, and maps nothing that could be written to
            metadata: dict[str, str] = file.metadata() or {}
            if CHECKSUM in metadata:
                _verify(path, metadata[CHECKSUM])
            return _mapped(path), metadata
    except SafetensorError as error:
        kind = None if is_safetensors(path) else kind_of_file(path)
        fault = "truncated, or not a safetensors file" if kind is None else f"{kind}, not a safetensors file"
        raise ValueError(f"{path}: {fault} ({one_line(error)})") from None


def _mapped(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a file with a sound header. What is written to one of them is this process' own.

    The safetensors library has the system set memory aside for all that could be written to, so that a file larger than
    memory could not be opened.
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        if hasattr(mmap, "MAP_PRIVATE"):
            flags = mmap.MAP_PRIVATE | (_NO_RESERVE if sys.platform == "linux" else 0)
            memory = mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        else:
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    tensors = {}
    for name, entry in sorted(header.items()):
        if name == "__metadata__":
            continue
        if entry["dtype"] not in _BY_NAME:
            raise ValueError(f"{path}: {name}: of dtype {entry['dtype']}, which is not read")
        dtype, shape = _BY_NAME[entry["dtype"]], entry["shape"]
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        if begin == end:
            tensors[name] = torch.empty(shape, dtype=dtype)
        elif begin % dtype.itemsize:  # the kernels read whole elements
            tensors[name] = torch.frombuffer(bytearray(memory[begin:end]), dtype=dtype).view(shape)
        else:
            count = (end - begin) // dtype.itemsize
            tensors[name] = torch.frombuffer(memory, dtype=dtype, count=count, offset=begin).view(shape)
    return tensors


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The metadata of a safetensors file alone. Raises OSError or ValueError."""
    try:
        with safe_open(path, framework="np") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path}: truncated, or not a safetensors file ({one_line(error)})") from None


def _verify(path: str | os.PathLike[str], expected: str) -> None:
    found = checksum_of_file(path)
    if f"{found:08x}" != expected:
        raise ValueError(f"{path}: damaged: its checksum is {found:08x}, but it was written with {expected}")


def checksum_of_file(path: str | os.PathLike[str]) -> int:
    """The CRC-32 of a file that `write_tensors` wrote, by its bytes as they are now."""
    with open(path, "rb") as file:
        length = file.read(8)
        start = bytearray(length + file.read(int.from_bytes(length, "little")))
        try:
            place = _place_of_checksum(bytes(start))
        except ValueError:  # a foreign tool wrote it with spaces
            raise ValueError(f"{path}: damaged, or its metadata {CHECKSUM!r} is of another tool") from None
        start[place : place + len(_UNKNOWN)] = _UNKNOWN.encode()
        checksum = zlib.crc32(start)
        while piece := file.read(_PIECE):
            checksum = zlib.crc32(piece, checksum)
    return checksum
