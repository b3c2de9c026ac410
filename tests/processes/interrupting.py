"""Signal handlers at every point at which Python runs one.

CPython looks for signals when a function begins and when a call returns; what a handler raises
there is as if the call had raised it, and what the call returned is lost. A profile function does
the same, at one such point after the other; at each the first time it is come by.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, Final

import shmepoch

_LIBRARY: Final = shmepoch.__path__[0]


class Interrupted(BaseException):
    """What a signal handler raised, as KeyboardInterrupt is."""


def interrupt() -> None:
    """The handler that raises."""
    raise Interrupted


class Interrupt:
    """Has `handler` run at the point of this number, within the library, if there are so many."""

    def __init__(self, point: int, handler: Callable[[], object]) -> None:
        self._left = point
        self._handler = handler
        self._passed: set[object] = set()
        #: Whether the handler has run.
        self.came = False

    def during(self, act: Callable[[], object]) -> None:
        """Act, with the handler at that point; swallows what `interrupt` raises."""
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


def interrupts(handler: Callable[[], object] = interrupt) -> Iterator[Interrupt]:
    """One for each point, until one finds that there are no more."""
    point = 0
    while True:
        each = Interrupt(point, handler)
        yield each
        if not each.came:
            break
        point += 1
    assert point > 10, "it was not interrupted where it works"
