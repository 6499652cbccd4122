"""The vectors of tests/vectors as one file that a C++ program reads: python golden_vectors.py OUT FILE.npz...

For each array a line, ``<file>/<name> <numbers>``, and then the numbers, float64, without a separator. Nothing but
Python's own library is needed.
"""

from __future__ import annotations

import array
import ast
import struct
import sys
import zipfile
from pathlib import Path

_TYPES = {"<f4": "f", "<f8": "d", "<i8": "q"}


def numbers(npy: bytes) -> array.array[float]:
    """The numbers of a .npy file, in order, as float64."""
    assert npy[:6] == b"\x93NUMPY" and npy[6] == 1, "expected version 1 of the format"
    (length,) = struct.unpack("<H", npy[8:10])
    header = ast.literal_eval(npy[10 : 10 + length].decode("latin1"))
    assert not header["fortran_order"] or len(header["shape"]) < 2
    stored = array.array(_TYPES[header["descr"]], npy[10 + length :])
    if sys.byteorder == "big":
        stored.byteswap()
    return array.array("d", stored)


def main(out: str, *files: str) -> None:
    with open(out, "wb") as to:
        for file in map(Path, files):
            with zipfile.ZipFile(file) as arrays:
                for entry in arrays.namelist():
                    values = numbers(arrays.read(entry))
                    if sys.byteorder == "big":
                        values.byteswap()
                    to.write(f"{file.stem}/{entry.removesuffix('.npy')} {len(values)}\n".encode())
                    to.write(values.tobytes())


if __name__ == "__main__":
    main(*sys.argv[1:])
