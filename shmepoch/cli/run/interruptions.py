"""The signals that end a command early."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable
from types import FrameType
from typing import Final

INTERRUPTIONS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def on_interruption(handler: Callable[[int, FrameType | None], None]) -> None:
    """Handle them from now on; but for a SIGHUP that is ignored, which is how nohup asks for it."""
    for number in INTERRUPTIONS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


class Interruptions:
    """Hears them until the process ends, and passes them to an event loop once there is one.

    Not asyncio's own handlers: those are taken away with the loop, and after that a signal would
    change how a run ends that has ended.
    """

    def __init__(self) -> None:
        self._early: list[int] = []
        self._pass_on = self._early.append
        on_interruption(self._hear)

    def pass_to(self, interrupt: Callable[[int], None]) -> None:
        """Have the running loop call `interrupt` with each signal, those before this as well."""
        loop = asyncio.get_running_loop()

        def pass_on(number: int) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and the run has ended
                loop.call_soon_threadsafe(interrupt, number)

        self._pass_on = pass_on
        for number in self._early:
            interrupt(number)

    def end(self) -> None:
        """Ignore them: the run has ended, and its process is about to."""
        for number in INTERRUPTIONS:
            signal.signal(number, signal.SIG_IGN)  # the interpreter takes handlers away as it ends

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._pass_on(number)
