"""Descendants: every process that this one has started, directly or through others."""

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
    """Become the parent of each descendant whose own parent ends, instead of init.

    A process group is not enough: `timeout` and `setsid`, for example, leave it.
    """
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def end_with_parent(parent: int) -> None:
    """Let the kernel kill this process when the parent with this pid ends; at once if it has
    ended."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def children() -> set[int]:
    """The children of this process, zombies included."""
    return {pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if _is_child(pid)}


def kill_children(*, keep: Set[int] = frozenset()) -> None:
    """Kill every child except those in `keep`, and their descendants; returns when none is left.

    When a child is killed, this process gets its children, if it has called `adopt_orphans`. A
    process of another user, which it may not kill, is left alone.
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
    """Reap the children that have ended by themselves."""
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
