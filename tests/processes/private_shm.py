"""A private /dev/shm of a process, as small as a container's."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Final

_NEWNS: Final = 0x00020000
_NEWUSER: Final = 0x10000000
_REC_PRIVATE: Final = 0x4000 | 0x40000

_libc = ctypes.CDLL(None, use_errno=True)


class NoPrivateMounts(Exception):
    """This machine does not allow this user private mounts."""


def mount_private_shm(size: int) -> None:
    """Give this process, which must have one thread, an empty /dev/shm of `size` bytes."""
    uid, gid = os.getuid(), os.getgid()
    _call(_libc.unshare(_NEWNS | (_NEWUSER if uid else 0)))
    if uid:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
    _call(_libc.mount(None, b"/", None, _REC_PRIVATE, None))
    _call(_libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, f"size={size}".encode()))


def _call(result: int) -> None:
    if result:
        error = ctypes.get_errno()
        raise NoPrivateMounts(os.strerror(error))
