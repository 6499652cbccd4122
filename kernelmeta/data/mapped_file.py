"""Whether a file that is mapped into memory is still what it was when it was opened."""

from __future__ import annotations

import os
from dataclasses import dataclass

from kernelmeta.data.tensor_files import checksum_of_file


@dataclass
class MappedFile:
    """A mapped file as it was.

    Touching a page of a mapped file beyond the end to which somebody has cut it ends the process with SIGBUS, which
    Python cannot catch; bytes that somebody writes into it are read as if they had always been there. `check`, called
    before the pages are touched, turns both into an error, but for a file that is cut in the moment between. Replacing
    the file by a rename, as all writers of this package do, or deleting it, does no harm to what is mapped.
    """

    path: str
    device: int
    inode: int
    size: int
    modified: int  # ns
    checksum: int | None  # of `write_tensors`

    @classmethod
    def of(cls, path: str | os.PathLike[str], checksum: int | None = None) -> MappedFile:
        """The file as it is now. Raises OSError."""
        now = os.stat(path)
        return cls(os.path.abspath(path), now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns, checksum)

    def check(self) -> None:
        """Raises ValueError if the file was cut or written to."""
        try:
            now = os.stat(self.path)
        except OSError:
            return
        if (now.st_dev, now.st_ino) != (self.device, self.inode):
            return
        if (now.st_size, now.st_mtime_ns) == (self.size, self.modified):
            return
        if now.st_size < self.size:
            raise ValueError(f"{self.path}: cut from {self.size} bytes to {now.st_size} while it was in use")
        if self.checksum is None or now.st_size > self.size or checksum_of_file(self.path) != self.checksum:
            raise ValueError(f"{self.path}: written to while it was in use")
        self.modified = now.st_mtime_ns  # touched, no more
