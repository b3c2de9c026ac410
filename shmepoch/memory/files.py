"""Files in /dev/shm: created complete, and opened only if they belong to this user alone.

POSIX shared memory on Linux is a file in /dev/shm (shm_overview(7)).

MAKE-1: a process that opens a name finds the file whole. So a file is made under its own
provisional name, reserved and filled, and only then given its name, in one step. Its creator holds
the presence byte from the beginning. A killed creator leaves a file with a provisional name whose
presence byte no process holds; `remove_leftovers` removes it.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
import time
from pathlib import Path
from typing import Final

from shmepoch._native import PRESENCE_BYTE, Descriptor, Memory, rename_new, try_lock
from shmepoch.errors import (
    SegmentForeign,
    SegmentInRemoval,
    SharedMemoryExhausted,
    SharedMemoryUnusable,
)

SHM_DIR: Final = Path("/dev/shm")

#: The bytes of the random token that makes a provisional name unique.
_TOKEN_SIZE: Final = 8
_PROVISIONAL: Final = re.compile(r"\.[0-9a-f]{16}\.new\Z")

_MODE: Final = 0o600
_OWNED: Final = stat.S_IFREG | _MODE
#: How long an attach waits for a process that removes the file, which takes two system calls.
_REMOVAL_S: Final = 1.0
#: The errors of open(2) for files that are not regular.
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


class NewFile:
    """A file that is being made. Its name is provisional, so other processes do not open it."""

    def __init__(self, path: Path, size: int) -> None:
        """Make a file of `size` bytes, all reserved, to be published as `path`.

        Raises `SharedMemoryExhausted` if there is not enough room: a later write to a page that
        tmpfs cannot provide would be a SIGBUS.
        """
        self._path: Final = path
        self._provisional: Path
        self.fd: Final = self._create()
        self._published = False
        try:
            os.fchmod(self.fd.fileno(), _MODE)  # undoes the umask
            _reserve(self.fd, size)
        except BaseException:
            self.close()
            raise

    def _create(self) -> Descriptor:
        while True:
            token = secrets.token_hex(_TOKEN_SIZE)
            self._provisional = self._path.with_name(f"{self._path.name}.{token}.new")
            made = Descriptor.open(self._provisional, os.O_CREAT | os.O_EXCL | os.O_RDWR, _MODE)
            try:
                if try_lock(made, PRESENCE_BYTE, True) and is_same(made, self._provisional):
                    return made
            except BaseException:
                self._provisional.unlink(missing_ok=True)
                raise
            made.close()  # it was removed as a leftover before it was locked

    def publish(self, *, replace: bool = False) -> None:
        """Give the file its name; `FileExistsError` if it is taken and not to be replaced."""
        self.fd.fileno()  # raises if it is closed, as in a forked child
        (os.replace if replace else rename_new)(self._provisional, self._path)
        self._published = True

    def discard(self) -> None:
        """Remove the file unless it was published; a forked child leaves its parent's alone."""
        if not (self._published or self.fd.closed):
            self._provisional.unlink(missing_ok=True)

    def close(self) -> None:
        """Discard the file and close its descriptor."""
        self.discard()
        self.fd.close()


def _reserve(fd: Descriptor, size: int) -> None:
    try:
        os.posix_fallocate(fd.fileno(), 0, size)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        room = os.statvfs(SHM_DIR)
        raise SharedMemoryExhausted(size, room.f_bavail * room.f_frsize, str(SHM_DIR)) from error


def provisional_paths(prefix: str) -> list[Path]:
    """The files with this prefix that are being made, or that a killed creator left."""
    with os.scandir(SHM_DIR) as entries:
        return [
            SHM_DIR / entry.name
            for entry in entries
            if entry.name.startswith(prefix) and is_provisional(entry.name)
        ]


def is_provisional(name: str) -> bool:
    """Whether a file of this name is being made, or was left by a creator that was killed."""
    return _PROVISIONAL.search(name) is not None


def map_shared(fd: Descriptor, size: int) -> Memory:
    """The first `size` bytes of a file, mapped through a description of their own."""
    return Memory(fd, size)


def unlink(fd: Descriptor, path: Path) -> bool:
    """Remove the name `path` if it still names this file; whether it did."""
    named = is_same(fd, path)
    if named:
        path.unlink(missing_ok=True)
    return named


def is_same(fd: Descriptor, path: str | Path) -> bool:
    """Whether `path` names this file."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(fd.fileno()))
    except FileNotFoundError:
        return False


def open_owned(path: str | Path) -> Descriptor:
    """Open a file of this user's that no other user may open.

    Raises `FileNotFoundError`, or `SegmentForeign` with the owner or type that was found.
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

    Returns the descriptor, the file's size, its first `length` bytes or fewer, and its memory if
    `mapped`. The memory may be None; then the caller uses `map_shared`.

    The lock is taken before the last check of the file's number of names, since a process that
    removes the file holds the byte alone meanwhile. Raises `SegmentInRemoval` if that process is
    stopped. This process must not complete the removal: by then another file may have the name.
    """
    began = time.monotonic()
    while True:
        whole = Descriptor.open_held(path, byte, _OWNED, length, mapped)
        if whole is not None:
            return whole
        # Not the common case: step by step, to find out what is wrong.
        opened = open_owned(path)
        try:
            held, found = try_lock(opened, byte, True), os.fstat(opened.fileno())
            if held and found.st_nlink > 0:
                return opened, found.st_size, os.pread(opened.fileno(), length, 0), None
        except BaseException:
            opened.close()
            raise
        # A process that removes the file holds the lock alone: try again.
        opened.close()
        if time.monotonic() > began + _REMOVAL_S:
            raise SegmentInRemoval(os.path.basename(path), _REMOVAL_S)
        time.sleep(0.0001)


def _not_owned(path: str | Path, mode: int, uid: int) -> SegmentForeign:
    """Why this file is not accepted: its type, its owner or its mode."""
    if not stat.S_ISREG(mode):
        return _foreign(path, "type", "regular file", "other")
    if uid != os.geteuid():
        return _foreign(path, "owner", os.geteuid(), uid)
    return _foreign(path, "mode", oct(_MODE), oct(stat.S_IMODE(mode)))


def _refusal(path: str | Path, error: OSError) -> Exception:
    """`SegmentForeign` if the error of open(2) means that; else the error itself."""
    if isinstance(error, PermissionError):
        found = os.lstat(path)
        return _not_owned(path, found.st_mode, found.st_uid)
    if error.errno in _OTHER_TYPES:
        return _foreign(path, "type", "regular file", _OTHER_TYPES[error.errno])
    return error


def _foreign(path: str | Path, field: str, expected: object, actual: object) -> SegmentForeign:
    return SegmentForeign(os.path.basename(path), field, expected, actual)
