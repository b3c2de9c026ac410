"""The signals that end a command early."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
from collections.abc import Callable
from types import FrameType
from typing import Final

INTERRUPTIONS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def on_interruption(handler: Callable[[int, FrameType | None], None]) -> None:
    """Handle these signals; but not a SIGHUP that is ignored, as nohup does."""
    for number in INTERRUPTIONS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


class End:
    """The signals that ask a server for its end; the second one ends the process at once."""

    def __init__(self) -> None:
        # Not an Event: a handler may run while its own thread holds the Event's lock.
        self._asked = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._numbers: list[int] = []
        on_interruption(self._ask)

    def asked_for_within(self, seconds: float) -> bool:
        """Wait for the first signal for this time; whether it has come."""
        return bool(select.select([self._asked], [], [], seconds)[0])

    def _ask(self, number: int, _: FrameType | None) -> None:
        self._numbers.append(number)
        if len(self._numbers) > 1:
            os._exit(128 + number)
        os.eventfd_write(self._asked, 1)


class Interruptions:
    """Handles these signals until the process ends, and passes them to an event loop if there is
    one.

    It does not use asyncio's handlers: they are removed with the loop, and after that a signal
    would change the exit status of a run that has ended.
    """

    def __init__(self) -> None:
        self._early: list[int] = []
        self._pass_on = self._early.append
        on_interruption(self._hear)

    def pass_to(self, interrupt: Callable[[int], None]) -> None:
        """Make the running loop call `interrupt` with each signal, earlier ones included."""
        loop = asyncio.get_running_loop()

        def pass_on(number: int) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and the run has ended
                loop.call_soon_threadsafe(interrupt, number)

        self._pass_on = pass_on
        for number in self._early:
            interrupt(number)

    def end(self) -> None:
        """Ignore the signals: the run has ended, and the process is about to end."""
        for number in INTERRUPTIONS:
            signal.signal(number, signal.SIG_IGN)  # the interpreter removes handlers at exit

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._pass_on(number)
