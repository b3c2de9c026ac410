"""A process that is stopped after each instruction of its native calls."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from shmepoch import _native

_TRACEME: Final = 0
_CONT: Final = 7
_SINGLESTEP: Final = 9

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long

#: The methods of a native Epoch that change it.
TRANSITIONS: Final = frozenset(
    (
        "register",
        "start",
        "change",
        "end",
        "terminate",
        "seal",
        "collect",
        "watch",
        "watch_each",
        "copy",
    )
)


class Stepped:
    """Stands for an object, and lets the process be stopped after each instruction of some methods.

    Made in the child that is traced.
    """

    def __init__(self, native: Any, methods: frozenset[str] = TRANSITIONS) -> None:
        self._native = native
        self._methods = methods
        _ptrace(_TRACEME, 0)

    def __getattr__(self, name: str) -> Callable[..., object]:
        method: Callable[..., object] = getattr(self._native, name)
        if name not in self._methods:
            return method

        def stepped(*args: object) -> object:
            os.kill(os.getpid(), signal.SIGSTOP)
            try:
                return method(*args)
            finally:
                os.kill(os.getpid(), signal.SIGSTOP)

        return stepped


def steps(pid: int) -> Iterator[None]:
    """Yield after each instruction that a child of this thread executes in `Stepped` methods. The
    child exits with 0, or is killed when the caller ends the iteration."""
    stepping = False
    _, status = os.waitpid(pid, 0)
    try:
        while os.WIFSTOPPED(status):
            if os.WSTOPSIG(status) == signal.SIGSTOP:  # not SIGTRAP: a method begins, or has ended
                stepping = not stepping
            if stepping:
                yield
            _ptrace(_SINGLESTEP if stepping else _CONT, pid)
            _, status = os.waitpid(pid, 0)
    except GeneratorExit:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):  # it has ended already
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        raise
    assert os.waitstatus_to_exitcode(status) == 0


def interleave(pid: int, n: int, happen: Callable[[], object]) -> bool:
    """Call `happen` after the n-th instruction of a child of this thread in `Stepped` methods;
    whether there were so many. The child exits with 0."""
    for step, _ in enumerate(steps(pid)):
        if step == n:
            happen()
            _run_to_the_end(pid)
            return True
    return False


def native_steps(pid: int) -> list[int]:
    """The numbers of the steps at which a child of this thread is inside the native module, and not
    in the interpreter around it. The child exits with 0."""
    spans: list[range] = []
    inside = []
    for step, _ in enumerate(steps(pid)):
        spans = spans or list(_code_of_the_native_module(pid))
        *_, counter = Path(f"/proc/{pid}/syscall").read_text().split()
        if any(int(counter, 16) in span for span in spans):
            inside.append(step)
    return inside


def _code_of_the_native_module(pid: int) -> Iterator[range]:
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        addresses, rights, *_, file = line.split()
        if "x" in rights and file == _native.__file__:
            begin, end = addresses.split("-")
            yield range(int(begin, 16), int(end, 16))


def _run_to_the_end(pid: int) -> None:
    while True:
        _ptrace(_CONT, pid)
        _, status = os.waitpid(pid, 0)
        if not os.WIFSTOPPED(status):
            assert os.waitstatus_to_exitcode(status) == 0
            return


def images(pid: int, fd: int, size: int) -> list[bytes]:
    """Every content of the file of `fd`, in order, while a child of this thread runs `Stepped`
    methods. The child exits with 0."""
    seen = [os.pread(fd, size, 0)]
    for _ in steps(pid):
        image = os.pread(fd, size, 0)
        if image != seen[-1]:
            seen.append(image)
    last = os.pread(fd, size, 0)
    return seen if last == seen[-1] else [*seen, last]


def _ptrace(request: int, pid: int) -> None:
    if _libc.ptrace(request, pid, None, None) == -1:
        error = ctypes.get_errno()
        raise OSError(error, f"ptrace({request}): {os.strerror(error)}")
