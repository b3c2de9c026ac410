"""Trials of the kernel functions that shmepoch needs, on a file in shared memory.

Some kernels that call themselves Linux lack some of these functions: gVisor is a new
implementation, and sandboxes forbid system calls. The file has a provisional name, so that it is a
leftover if its trial is killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import platform
import secrets
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from shmepoch._native import PAGE, PRESENCE_BYTE, Descriptor, is_locked, rename_new, try_lock
from shmepoch.memory.files import SHM_DIR

#: The time that a trial waits for its other process.
_PATIENCE_S: Final = 20.0
_PAUSE_S: Final = 0.001
_FUTEX_WAIT: Final = 0
_FUTEX_WAKE: Final = 1
_BLOCK: Final = 512  # what stat(2) counts a file's memory in
#: The number of the system call futex(2): no C library has a function for it.
_FUTEX: Final = {
    "x86_64": 202,
    "aarch64": 98,
    "riscv64": 98,
    "loongarch64": 98,
    "ppc64le": 221,
    "s390x": 238,
    "armv7l": 240,
    "i686": 240,
}
#: A byte that is not among those that a new file has locked.
_BYTE: Final = PRESENCE_BYTE + 1


class TrialFailed(Exception):
    """The kernel did not do what it should; the message says what it did."""


def try_memory() -> None:
    """posix_fallocate(3) reserves the pages of a file."""
    with _Trial() as file:
        os.posix_fallocate(file.fd.fileno(), 0, PAGE)
        reserved = os.fstat(file.fd.fileno()).st_blocks * _BLOCK
        _expect(reserved >= PAGE, f"of {PAGE} bytes {reserved} were reserved")


def try_rename() -> None:
    """renameat2(2) with RENAME_NOREPLACE gives a name that is free, and no other."""
    with _Trial() as file, _Trial() as taken:
        try:
            rename_new(file.path, taken.path)
        except FileExistsError:
            pass
        else:
            raise TrialFailed("a name that was taken was given away")
        before, file.path = file.path, _path()
        rename_new(before, file.path)
        _expect(file.path.exists(), "the file does not have its new name")


def try_locks() -> None:
    """A lock of an open file description excludes others, in this process too (fcntl(2))."""
    with _Trial() as file:
        first, second = file.open(), file.open()
        try:
            _expect(try_lock(first, _BYTE, False), "a free byte could not be locked")
            _expect(not try_lock(second, _BYTE, False), "a locked byte was locked once more")
            first.close()
            _expect(try_lock(second, _BYTE, False), "a lock outlived its description")
        finally:
            first.close()
            second.close()


def try_deaths() -> None:
    """The locks of a process go when it is killed."""
    with _Trial() as file:
        with file.sleeper():
            _expect(is_locked(file.fd, _BYTE), "the lock of another process is not seen")
        _expect(not is_locked(file.fd, _BYTE), "a lock outlived its process")


def try_wakes() -> None:
    """A futex in a shared mapping of a file wakes another process."""
    with _Trial() as file, file.sleeper(), file.mapped() as memory:
        _wait(
            lambda: _futex(memory, _FUTEX_WAKE, 2**31 - 1) > 0,
            "a process that sleeps was not woken",
        )


TRIALS: Final[dict[str, Callable[[], None]]] = {
    "reserved memory (posix_fallocate)": try_memory,
    "renaming (renameat2 with RENAME_NOREPLACE)": try_rename,
    "locks (of open file descriptions)": try_locks,
    "deaths (a lock goes with its process)": try_deaths,
    "waking (a futex in a shared file)": try_wakes,
}


def is_gvisor() -> bool:
    """Whether the kernel is gVisor. Only its command line and its release tell a program so."""
    try:
        line = Path("/proc/cmdline").read_text()
    except OSError:
        line = ""
    return "gvisor" in line or "gvisor" in platform.release()


class _Trial:
    """A page in shared memory, with a name until the end of the trial."""

    def __init__(self) -> None:
        self.path = _path()
        self.fd: Final = Descriptor.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        with contextlib.suppress(OSError):  # unlocked, it is a leftover; a kernel may lack locks
            try_lock(self.fd, PRESENCE_BYTE, True)
        os.truncate(self.fd.fileno(), PAGE)

    def open(self) -> Descriptor:
        """Another open file description of it."""
        return Descriptor.open(self.path, os.O_RDWR)

    @contextlib.contextmanager
    def mapped(self) -> Iterator[mmap.mmap]:
        """The page, as memory that its processes share."""
        opened = self.open()
        try:
            with mmap.mmap(opened.fileno(), PAGE) as memory:
                yield memory
        finally:
            opened.close()

    @contextlib.contextmanager
    def sleeper(self) -> Iterator[None]:
        """Run another process that holds a byte, if it can, and sleeps on the first word. The
        process is killed at the end."""
        # The page is written and not only mapped: then a lack of room is an error, not a SIGBUS.
        os.pwrite(self.fd.fileno(), bytes(PAGE), 0)
        pid = os.fork()
        if pid == 0:
            self._sleep()
        try:
            with self.mapped() as memory:
                _wait(lambda: memory[0] > 0, "another process did not start")
            yield
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

    def _sleep(self) -> None:
        try:
            held = self.open()
            with contextlib.suppress(OSError):
                try_lock(held, _BYTE, False)
            with self.mapped() as memory:
                memory[:4] = bytes((1, 1, 1, 1))
                while True:
                    _futex(memory, _FUTEX_WAIT, 0x01010101)
        finally:
            os._exit(1)

    def __enter__(self) -> _Trial:
        return self

    def __exit__(self, *exc: object) -> None:
        self.fd.close()
        self.path.unlink(missing_ok=True)


def _path() -> Path:
    return SHM_DIR / f"shmepoch.doctor.trial.{secrets.token_hex(8)}.new"


def _expect(true: bool, otherwise: str) -> None:
    if not true:
        raise TrialFailed(otherwise)


def _wait(look: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while not look():
        _expect(time.monotonic() < deadline, otherwise)
        time.sleep(_PAUSE_S)


def _futex(memory: mmap.mmap, operation: int, value: int) -> int:
    """Call futex(2) on the first word of `memory`; returns the kernel's result."""
    number = _FUTEX.get(platform.machine())
    if number is None:
        raise TrialFailed(f"not tried: the number of futex(2) on {platform.machine()} is not known")
    word = ctypes.c_uint32.from_buffer(memory)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        result = libc.syscall(
            ctypes.c_long(number), ctypes.byref(word), operation, value, None, None, 0
        )
        error = ctypes.get_errno()
        if result < 0 and error not in (errno.EAGAIN, errno.EINTR):
            raise OSError(error, os.strerror(error))
        return int(result)
    finally:
        del word  # or the mapping could not be closed
