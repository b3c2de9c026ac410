"""The processes that hold the locks of a file, as /proc tells this user.

The locks of a segment belong to open file descriptions, so fcntl(2) cannot name their holders.
The kernel lists the locks with each descriptor (proc_pid_fdinfo(5)). Processes of other users are
left out, and so are those of containers that this one does not see.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from typing import Final, NamedTuple

#: A lock, such as `lock:	1: OFDLCK  ADVISORY  WRITE -1 00:1a:1234 0 0`; neighbours are one range.
_LOCK: Final = re.compile(
    rb"^lock:\s+\d+: OFDLCK .* ([0-9a-f]+):([0-9a-f]+):(\d+) (\d+) (\d+|EOF)$", re.MULTILINE
)


class Holder(NamedTuple):
    """A descriptor of a process, and the ranges of bytes that are locked through it."""

    pid: int
    descriptor: int
    ranges: tuple[range, ...]

    def holds(self, byte: int) -> bool:
        """Whether the lock of a byte is among them."""
        return any(byte in locked for locked in self.ranges)


def holders(file: os.stat_result) -> list[Holder]:
    """Every descriptor with a lock on this file. It covers the processes that this user may inspect
    and that have the file mapped."""
    place = os.major(file.st_dev), os.minor(file.st_dev), file.st_ino
    found: list[Holder] = []
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        # It has ended, or it is another user's.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            if _has_mapped(int(pid), place):
                found += _of_process(int(pid), place)
    return found


def is_stopped(pid: int) -> bool:
    """Whether a process stands still: a signal or a debugger has stopped it."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            return stat.read().rpartition(b") ")[2][:1] in (b"T", b"t")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return False


def _has_mapped(pid: int, place: tuple[int, int, int]) -> bool:
    """Whether a process has the file mapped. Each process that holds a lock of the file has.

    While a descriptor is read, the kernel holds a reference to its file. If the process is killed
    meanwhile, its locks end later. So the descriptors of other processes are not read.
    """
    major, minor, inode = place
    mapped = f" {major:02x}:{minor:02x} {inode} ".encode()
    with open(f"/proc/{pid}/maps", "rb") as maps:
        return mapped in maps.read()


def _of_process(pid: int, place: tuple[int, int, int]) -> Iterator[Holder]:
    for descriptor in os.listdir(f"/proc/{pid}/fdinfo"):
        with contextlib.suppress(FileNotFoundError):  # closed since
            with open(f"/proc/{pid}/fdinfo/{descriptor}", "rb") as info:
                ranges = tuple(_ranges(info.read(), place))
            if ranges:
                yield Holder(pid, int(descriptor), ranges)


def _ranges(info: bytes, place: tuple[int, int, int]) -> Iterator[range]:
    for major, minor, inode, first, last in _LOCK.findall(info):
        if (int(major, 16), int(minor, 16), int(inode)) == place:
            yield range(int(first), 2**63 if last == b"EOF" else int(last) + 1)
