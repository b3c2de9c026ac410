"""Files in /dev/shm: made whole, opened only if they are this user's alone.

POSIX shared memory on Linux is a file in /dev/shm (shm_overview(7)). It is opened as one here, so
that it can be made without a name (O_TMPFILE), filled, and only then linked: a process that opens
the name finds it whole, and a creator that is killed leaves nothing.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from pathlib import Path
from typing import Final

from shmepoch._native import Descriptor, Memory, try_lock
from shmepoch.errors import (
    SegmentForeign,
    SegmentInRemoval,
    SharedMemoryExhausted,
    SharedMemoryUnusable,
)

SHM_DIR: Final = Path("/dev/shm")

_MODE: Final = 0o600
_OWNED: Final = stat.S_IFREG | _MODE
#: How long an attach waits for a process that removes the file, which takes two system calls.
_REMOVAL_S: Final = 1.0
#: How open(2) refuses what is no regular file.
_OTHER_TYPES: Final = {
    errno.ELOOP: "symbolic link",
    errno.EISDIR: "directory",
    errno.ENXIO: "socket or unread pipe",
}


def require_shm() -> None:
    """Raise `SharedMemoryUnusable` where this process can neither make a segment nor attach one."""
    if not SHM_DIR.is_dir():
        raise SharedMemoryUnusable(str(SHM_DIR), "is not there")
    if not os.access(SHM_DIR, os.R_OK | os.W_OK | os.X_OK):
        raise SharedMemoryUnusable(str(SHM_DIR), "is not writable")


def create_unnamed(size: int) -> Descriptor:
    """A descriptor of a new file of `size` bytes, all reserved, that has no name yet.

    Raises `SharedMemoryExhausted` where there is not enough room: a write to a page that tmpfs
    cannot provide later would be a SIGBUS.
    """
    made = Descriptor.open(SHM_DIR, os.O_TMPFILE | os.O_RDWR, _MODE)
    try:
        os.fchmod(made.fileno(), _MODE)  # gives back what the umask took away
        os.posix_fallocate(made.fileno(), 0, size)
    except OSError as error:
        made.close()
        if error.errno != errno.ENOSPC:
            raise
        room = os.statvfs(SHM_DIR)
        raise SharedMemoryExhausted(size, room.f_bavail * room.f_frsize, str(SHM_DIR)) from error
    return made


def map_shared(fd: Descriptor, size: int) -> Memory:
    """The first `size` bytes of a file, mapped through a description of their own."""
    return Memory(fd, size)


def link(fd: Descriptor, path: Path) -> None:
    """Give a file a name; `FileExistsError` if it is taken."""
    shm = Descriptor.open(SHM_DIR, os.O_PATH | os.O_DIRECTORY)
    try:
        # os.link follows the symbolic link, as it must here, only beside a directory descriptor.
        source = f"/proc/self/fd/{fd.fileno()}"
        os.link(source, path, src_dir_fd=shm.fileno(), follow_symlinks=True)
    finally:
        shm.close()


def unlink(fd: Descriptor, path: Path) -> None:
    """Remove the name `path` if it still names this file."""
    if is_same(fd, path):
        path.unlink(missing_ok=True)


def is_same(fd: Descriptor, path: str | Path) -> bool:
    """Whether `path` names this file."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(fd.fileno()))
    except FileNotFoundError:
        return False


def open_owned(path: str | Path) -> Descriptor:
    """Open a file of this user's that no other user may open.

    Raises `FileNotFoundError`, or `SegmentForeign` that says whose or what it is.
    """
    try:
        opened = Descriptor.open(path, os.O_RDWR | os.O_NOFOLLOW)
    except OSError as error:
        raise _refusal(path, error) from None
    found = os.fstat(opened.fileno())
    if found.st_mode != _OWNED or found.st_uid != os.geteuid():
        opened.close()
        raise _not_owned(path, found.st_mode, found.st_uid)
    return opened


def open_held(
    path: str, byte: int, length: int, *, mapped: bool = True
) -> tuple[Descriptor, int, bytes, Memory | None]:
    """Like `open_owned`, and take the shared lock on `byte`.

    The descriptor, the file's size, its first `length` bytes or what it has of them, and the whole
    file if it is to be `mapped`, or None if `map_shared` has to be asked.

    The lock comes before the last look at the name, that is, at how many the file has: a process
    that removes it holds the byte alone while it does. Raises `SegmentInRemoval` if that process
    stands still: to finish the removal for it could take the name from a file that has it since.
    """
    began = time.monotonic()
    while True:
        whole = Descriptor.open_held(path, byte, _OWNED, length, mapped)
        if whole is not None:
            return whole
        # Not the common case: done step by step, which says what is wrong.
        opened = open_owned(path)
        try:
            held, found = try_lock(opened, byte, True), os.fstat(opened.fileno())
            if held and found.st_nlink > 0:
                return opened, found.st_size, os.pread(opened.fileno(), length, 0), None
        except BaseException:
            opened.close()
            raise
        # A process removes the file, and holds the lock alone while it does: look again.
        opened.close()
        if time.monotonic() > began + _REMOVAL_S:
            raise SegmentInRemoval(os.path.basename(path), _REMOVAL_S)
        time.sleep(0.0001)


def _not_owned(path: str | Path, mode: int, uid: int) -> SegmentForeign:
    """Why this is no file of this user's that no other user may open."""
    if not stat.S_ISREG(mode):
        return _foreign(path, "type", "regular file", "other")
    if uid != os.geteuid():
        return _foreign(path, "owner", os.geteuid(), uid)
    return _foreign(path, "mode", oct(_MODE), oct(stat.S_IMODE(mode)))


def _refusal(path: str | Path, error: OSError) -> Exception:
    """What the error of open(2) says of the file, if it says that it is another's."""
    if isinstance(error, PermissionError):
        found = os.lstat(path)
        return _not_owned(path, found.st_mode, found.st_uid)
    if error.errno in _OTHER_TYPES:
        return _foreign(path, "type", "regular file", _OTHER_TYPES[error.errno])
    return error


def _foreign(path: str | Path, field: str, expected: object, actual: object) -> SegmentForeign:
    return SegmentForeign(os.path.basename(path), field, expected, actual)
