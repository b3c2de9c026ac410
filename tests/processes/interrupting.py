"""Signal handlers at every point where Python runs one.

CPython checks for signals when a function begins and when a call returns. An exception of a handler
there is as if the call had raised it, and the call's result is lost. A profile function does the
same, at one such point after the other, the first time that the point is reached.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, Final, Self

import shmepoch

_LIBRARY: Final = shmepoch.__path__[0]


class Interrupted(BaseException):
    """The exception of a signal handler, like KeyboardInterrupt."""


def interrupt() -> None:
    """A handler that raises."""
    raise Interrupted


class Interrupt:
    """Runs `handler` at the point with this number, within the library, if there are so many."""

    def __init__(self, point: int, handler: Callable[[], object]) -> None:
        self._left = point
        self._handler = handler
        self._passed: set[object] = set()
        #: Whether the handler has run.
        self.came = False

    def during(self, act: Callable[[], object]) -> None:
        """Call `act`, with the handler at that point; swallows the exception of `interrupt`."""
        before = sys.getprofile()
        sys.setprofile(self._profile)
        try:
            act()
        except Interrupted:
            pass
        finally:
            sys.setprofile(before)

    def _profile(self, frame: FrameType, event: str, argument: Any) -> None:
        if self.came or event not in ("call", "c_return"):
            return
        if not frame.f_code.co_filename.startswith(_LIBRARY):
            return
        point = frame.f_code, frame.f_lasti, event
        if point in self._passed:
            return
        self._passed.add(point)
        if self._left == 0:
            self.came = True
            self._handler()
        self._left -= 1


def interrupts(
    handler: Callable[[], object] = interrupt, *, least: int = 11
) -> Iterator[Interrupt]:
    """One for each point, until there are no more points."""
    point = 0
    while True:
        each = Interrupt(point, handler)
        yield each
        if not each.came:
            break
        point += 1
    assert point >= least, "it was not interrupted where it works"


class EveryBytecode:
    """A context that raises at the bytecode with this number, if there are so many, and swallows
    the exception. It calls `is_free` at each bytecode."""

    def __init__(self, point: int, is_free: Callable[[], bool]) -> None:
        self._left = point
        self._is_free = is_free
        #: Whether `is_free` was true at each bytecode.
        self.free = True
        #: Whether it has raised.
        self.came = False

    def __enter__(self) -> Self:
        self._before = sys.gettrace()
        sys.settrace(self._trace)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        sys.settrace(self._before)
        return kind is Interrupted

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(_LIBRARY):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode" and not self.came:
            self.free = self.free and self._is_free()
            if self._left == 0:
                self.came = True
                raise Interrupted
            self._left -= 1
        return self._trace
