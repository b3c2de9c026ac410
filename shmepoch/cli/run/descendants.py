"""Descendants: every process that this one has started, however far it went from its parent."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from collections.abc import Set
from typing import Final

# linux/prctl.h
_PR_SET_PDEATHSIG: Final = 1
_PR_SET_CHILD_SUBREAPER: Final = 36


def adopt_orphans() -> None:
    """Become the parent of each descendant whose own parent ends, where init would.

    A process group would not hold them together: `timeout` and `setsid`, among others, leave it.
    """
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def end_with_parent(parent: int) -> None:
    """Be killed when the parent ends, which has this process id; at once if it has ended."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def children() -> set[int]:
    """The children of this process, zombies included."""
    return {pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if _is_child(pid)}


def kill_children(*, keep: Set[int] = frozenset()) -> None:
    """Kill every child but those in `keep`, and theirs, and return once none is left.

    Killing a child hands its own children to this process, which must have adopted orphans. What
    runs as another user, and so may not be killed, is left.
    """
    while others := children() - keep:
        for pid in others:
            try:
                os.kill(pid, signal.SIGKILL)  # not reaped yet, so no other process has its number
            except PermissionError:
                keep |= {pid}
            else:
                os.waitpid(pid, 0)


def reap_children() -> None:
    """Forget the children that have ended by themselves."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG) != (0, 0):
            pass


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, *map(ctypes.c_ulong, (value, 0, 0, 0))) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"prctl({option}): {os.strerror(error)}")


def _is_child(pid: int) -> bool:
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True
