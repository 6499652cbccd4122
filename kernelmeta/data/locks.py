"""Locks on open files, which end with the process that holds them, however it ends."""

from __future__ import annotations

import errno
import os

try:
    import fcntl
except ImportError:  # not a POSIX system: no locks
    fcntl = None  # type: ignore[assignment]


def lock(handle: int, wait: bool = True) -> bool:
    """Lock an open file for this process alone until the handle is closed.

    Args:
        wait: until it is free.

    Returns:
        False if somebody else holds it, or if this file system has no locks and ``wait`` is not set.
    """
    if fcntl is None:
        return wait
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        return wait and error.errno not in (errno.EAGAIN, errno.EACCES)
    return True


class FolderLock:
    """A folder that is this process's alone until `close`. Where a file system has no locks, it is everybody's.

    Raises:
        BlockingIOError: another process holds it.
        OSError: there is no such folder.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._handle: int | None = None
        if fcntl is None:
            return
        self._handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                self.close()
                raise BlockingIOError(error.errno, "another process is writing to it", str(folder)) from None
        _held.add(self)

    def close(self) -> None:
        """Give the folder back."""
        _held.discard(self)
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


_held: set[FolderLock] = set()


def _let_go_in_child() -> None:
    # A process that decodes images may live on for a while after its parent was killed; the lock is not its own.
    for held in list(_held):
        held.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_child)
