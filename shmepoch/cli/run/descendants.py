"""Descendants: every process that this one has started, however far it went from its parent."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from collections.abc import Set
from typing import Final

_PR_SET_CHILD_SUBREAPER: Final = 36  # linux/prctl.h


def adopt_orphans() -> None:
    """Become the parent of each descendant whose own parent ends, where init would.

    A process group would not hold them together: `timeout` and `setsid`, among others, leave it.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, *map(ctypes.c_ulong, (1, 0, 0, 0))) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"prctl(PR_SET_CHILD_SUBREAPER): {os.strerror(error)}")


def children() -> set[int]:
    """The children of this process, zombies included."""
    return {pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if _is_child(pid)}


def kill_children(*, keep: Set[int] = frozenset()) -> None:
    """Kill every child but those in `keep`, and theirs, and return once none is left.

    Killing a child hands its own children to this process, which must have adopted orphans.
    """
    while others := children() - keep:
        for pid in others:
            os.kill(pid, signal.SIGKILL)  # not reaped yet, so the number is nobody else's
            os.waitpid(pid, 0)


def reap_children() -> None:
    """Forget the children that have ended by themselves."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG) != (0, 0):
            pass


def _is_child(pid: int) -> bool:
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True
