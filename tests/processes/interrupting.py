"""Interrupts at every point at which Python runs a signal handler.

CPython looks for signals when a function begins, after a call, and when a loop goes round. A trace
function raises there, at one such point after the other; at each the first time it is come by.
"""

from __future__ import annotations

import opcode
import sys
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any, Final

import shmepoch

#: After these the interpreter looks for signals.
_LOOKS: Final = frozenset({"CALL", "CALL_FUNCTION_EX", "CALL_KW", "JUMP_BACKWARD"})
_LIBRARY: Final = shmepoch.__path__[0]


class Interrupted(BaseException):
    """What a signal handler raised, as KeyboardInterrupt is."""


class Interrupt:
    """Raises at the point of this number, within the library, if there are so many."""

    def __init__(self, point: int) -> None:
        self._left = point
        self._looked: dict[FrameType, bool] = {}
        self._passed: set[tuple[CodeType, int]] = set()
        #: Whether it has raised.
        self.raised = False

    def during(self, act: Callable[[], object]) -> None:
        """Act, and swallow this interrupt."""
        before = sys.gettrace()
        sys.settrace(self._trace)
        try:
            act()
        except Interrupted:
            pass
        finally:
            sys.settrace(before)
            self._looked.clear()

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(_LIBRARY):
            return None
        if event == "call":
            frame.f_trace_opcodes = True
            self._pass(frame)
        elif event == "opcode":
            if self._looked.get(frame, False):
                self._pass(frame)
            name = opcode.opname[frame.f_code.co_code[frame.f_lasti]]
            self._looked[frame] = name in _LOOKS
        return self._trace

    def _pass(self, frame: FrameType) -> None:
        point = frame.f_code, frame.f_lasti
        if self.raised or point in self._passed:
            return
        self._passed.add(point)
        if self._left == 0:
            self.raised = True
            raise Interrupted
        self._left -= 1


def interrupts() -> Iterator[Interrupt]:
    """One for each point, until one finds that there are no more."""
    point = 0
    while True:
        interrupt = Interrupt(point)
        yield interrupt
        if not interrupt.raised:
            break
        point += 1
    assert point > 20, "it was not interrupted where it works"
