"""A process that is stopped after each instruction of what it does in native code."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any, Final

_TRACEME: Final = 0
_CONT: Final = 7
_SINGLESTEP: Final = 9

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


class Stepped:
    """Stands for an object, and has the process stopped after each instruction of its methods.

    Made in the child that `images` is to look at.
    """

    def __init__(self, native: Any) -> None:
        self._native = native
        _ptrace(_TRACEME, 0)

    def __getattr__(self, name: str) -> Callable[..., object]:
        method = getattr(self._native, name)

        def stepped(*args: object) -> object:
            os.kill(os.getpid(), signal.SIGSTOP)
            try:
                return method(*args)
            finally:
                os.kill(os.getpid(), signal.SIGSTOP)

        return stepped


def steps(pid: int) -> Iterator[None]:
    """Between any two instructions of what a child of this thread's does with something `Stepped`;
    it exits with 0 in the end."""
    stepping = False
    _, status = os.waitpid(pid, 0)
    while os.WIFSTOPPED(status):
        if os.WSTOPSIG(status) == signal.SIGSTOP:  # and not SIGTRAP: it begins, or has ended
            stepping = not stepping
        yield
        _ptrace(_SINGLESTEP if stepping else _CONT, pid)
        _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def images(pid: int, fd: int, size: int) -> list[bytes]:
    """Every content that the file of `fd` has, one after the other, while a child of this thread's
    runs the methods of something `Stepped`; it exits with 0 in the end."""
    seen: list[bytes] = []
    for _ in steps(pid):
        image = os.pread(fd, size, 0)
        if not seen or image != seen[-1]:
            seen.append(image)
    return seen


def _ptrace(request: int, pid: int) -> None:
    if _libc.ptrace(request, pid, None, None) == -1:
        error = ctypes.get_errno()
        raise OSError(error, f"ptrace({request}): {os.strerror(error)}")
