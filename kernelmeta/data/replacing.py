"""Writing a file whole or not at all, wherever its path leads."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kernelmeta.data.locks import lock

_SUFFIX = ".tmp"
# What a rename answers where the file can be written to, but not be replaced.
_NOT_REPLACEABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY, errno.EXDEV)


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path to write to; if the block ends well, its content becomes that of ``path``, else it is deleted.

    A file is replaced by a rename, so that it holds the old content or the new, whenever the process is killed. Its
    owner and mode stay; of a symbolic link, the target is replaced; another hard link keeps the old content. What
    exists and is no regular file (a pipe, a device, ``/dev/stdout``) is written into, and so is a file that may be
    written to but not replaced: in a folder that is read-only, of another owner, a mount point. Missing folders are
    made; what writers of the same path left that were killed is deleted.

    Raises:
        OSError: the path is a folder, or cannot be written to, or the disk is full.
    """
    written_into, target = _destination(path)
    try:
        handle, temporary = _temporary(target)
    except OSError as error:
        if error.errno not in _NOT_REPLACEABLE or not os.access(target, os.W_OK):
            raise
        written_into = written_into or target
        handle, temporary = _temporary(Path(tempfile.gettempdir()) / target.name)
    try:
        yield temporary
        if written_into is None:
            with open(temporary, "rb") as written:
                os.fsync(written.fileno())
            try:
                _like(temporary, target)
                os.replace(temporary, target)
            except OSError as error:
                if error.errno not in _NOT_REPLACEABLE or not target.exists():
                    raise
                written_into = target
        if written_into is not None:
            try:
                _pour(temporary, written_into)
            except BrokenPipeError as error:
                raise BrokenPipeError(error.errno, "nobody reads it any more", os.fspath(path)) from None
    finally:
        temporary.unlink(missing_ok=True)
        os.close(handle)


def sweep(folder: Path, name: str = "") -> None:
    """Delete what writers of ``name`` (of any name, if empty) left in ``folder`` when they were killed."""
    prefix = f".{name[:_KEPT]}." if name else "."
    try:
        entries = [entry.path for entry in os.scandir(folder) if _is_ours(entry.name, prefix)]
    except OSError:
        return
    for entry in entries:
        with contextlib.suppress(OSError):  # it is being written, or gone, or somebody else's
            handle = os.open(entry, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
            try:
                if lock(handle, wait=False):
                    os.unlink(entry)
            finally:
                os.close(handle)


# Characters of a file's name that its temporary file's name repeats: names are at most 255 bytes long.
_KEPT = 48


def _is_ours(name: str, prefix: str) -> bool:
    return name.startswith(prefix) and re.search(r"\.[0-9a-f]{12}\.tmp$", name) is not None


def _destination(path: str | os.PathLike[str]) -> tuple[Path | int | None, Path]:
    """What is to be written into, a path or one of this process's open files, if anything; and the file to replace."""
    place = Path(path)
    try:
        mode = os.stat(place).st_mode
    except FileNotFoundError:
        mode = None
    if mode is not None and stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    descriptor, behind_proc = _open_file(place)
    if mode is not None and (descriptor is not None or behind_proc or not stat.S_ISREG(mode)):
        return (place if descriptor is None else descriptor), Path(tempfile.gettempdir()) / place.name
    target = Path(os.path.realpath(place))
    if mode is None:
        target.parent.mkdir(parents=True, exist_ok=True)
    elif not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    return None, target


def _open_file(path: Path) -> tuple[int | None, bool]:
    """The number of the open file of this process that a path leads to (/dev/stdout is 1), and whether it leads through
    /proc: what is open there may have another name by now, or none.
    """
    place = os.path.abspath(path)
    for _ in range(40):
        folder, name = os.path.split(place)
        folder = os.path.realpath(folder)
        if name.isdigit() and re.fullmatch(rf"/dev/fd|/proc/{os.getpid()}(/task/\d+)?/fd", folder):
            return int(name), True
        if folder.startswith("/proc/"):
            return None, True
        if not os.path.islink(place):
            break
        place = os.path.normpath(os.path.join(folder, os.readlink(place)))
    return None, False


def _temporary(target: Path) -> tuple[int, Path]:
    """A new file beside ``target``, locked for as long as its handle is open, and only so long: see `sweep`."""
    sweep(target.parent, target.name)
    while True:
        temporary = target.parent / f".{target.name[:_KEPT]}.{secrets.token_hex(6)}{_SUFFIX}"
        handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        lock(handle)
        if os.fstat(handle).st_nlink:  # else it was swept away before it was locked
            return handle, temporary
        os.close(handle)


def _like(temporary: Path, target: Path) -> None:
    """Owner and mode of the file that is replaced. Raises PermissionError if the owner cannot be kept."""
    try:
        old = os.stat(target)
    except FileNotFoundError:
        return
    new = os.stat(temporary)
    if (old.st_uid, old.st_gid) != (new.st_uid, new.st_gid):
        os.chown(temporary, old.st_uid, old.st_gid)
    os.chmod(temporary, stat.S_IMODE(old.st_mode))


def _pour(source: Path, into: Path | int) -> None:
    for stream in (sys.stdout, sys.stderr):  # what was printed before comes before
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    # Not O_CREAT, which is refused for another user's pipe in /tmp.
    descriptor = os.dup(into) if isinstance(into, int) else os.open(into, os.O_WRONLY | os.O_TRUNC)
    with open(source, "rb") as content, os.fdopen(descriptor, "wb") as output:
        shutil.copyfileobj(content, output, 1 << 20)
