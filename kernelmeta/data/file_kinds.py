"""What a file is that is not what was expected: told by its first bytes, for the sake of the error."""

from __future__ import annotations

import os
import zipfile

_STARTS = (
    (b"\x93NUMPY", "a NumPy array (.npy)"),
    (b"PAR1", "a Parquet file"),
    (b"ARROW1", "an Arrow file"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    (b"CDF\x01", "a NetCDF file"),
    (b"CDF\x02", "a NetCDF file"),
    (b"MATLAB 5.0", "a MATLAB file"),
    (b"SQLite format 3\x00", "an SQLite database"),
    (b"version https://git-lfs", "a pointer of Git LFS ('git lfs pull' fetches the file itself)"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"BZh", "a bzip2 archive"),
    (b"\xfd7zXZ\x00", "an xz archive"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"\x89PNG\r\n", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"GIF8", "a GIF image"),
    (b"%PDF", "a PDF document"),
    (b"GGUF", "a GGUF file"),
)


def is_safetensors(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins as safetensors files do: the length of a JSON object, and its brace."""
    with open(path, "rb") as file:
        start = file.read(9)
    # A header is at most 100 MB long.
    return len(start) == 9 and start[8:] == b"{" and int.from_bytes(start[:8], "little") <= 100_000_000


def kind_of_file(path: str | os.PathLike[str]) -> str | None:
    """ "a NumPy array (.npy)", say; None where its first bytes tell nothing."""
    with open(path, "rb") as file:
        start = file.read(1024)
    if not start:
        return "an empty file"
    for magic, kind in _STARTS:
        if start.startswith(magic):
            return kind
    if start.startswith(b"PK\x03\x04"):
        return _kind_of_zip(path)
    if start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "a pickle, as torch.save wrote them before PyTorch 1.6 (.pt, .pth, .pkl)"
    if start[257:262] == b"ustar":
        return "a tar archive"
    return _kind_of_text(start)


def _kind_of_zip(path: str | os.PathLike[str]) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError):
        return "a zip archive, cut off"
    if any(name.rpartition("/")[2] == "data.pkl" for name in names):
        return "a file of torch.save (.pt, .pth)"
    if names and all(name.endswith(".npy") for name in names):
        return "an archive of NumPy arrays (.npz)"
    return "a zip archive"


def _kind_of_text(start: bytes) -> str | None:
    try:
        text = start.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if error.start < len(start) - 4 or error.start == 0:  # not merely a character cut in two
            return None
        text = start[: error.start].decode("utf-8-sig")
    if any(ord(character) < 32 and character not in "\t\n\r\f" for character in text):
        return None
    if text.lstrip()[:1] in ("{", "["):
        return "JSON text"
    first = text.lstrip().splitlines()[0] if text.strip() else ""
    if first.startswith("<"):
        return "HTML or XML text (an error page in the place of the file?)"
    for separator, name in ((",", ".csv"), ("\t", ".tsv"), (";", ".csv")):
        if separator in first:
            return f"a table in text ({name})"
    return "text"
