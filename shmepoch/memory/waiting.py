"""Waiting for a watermark: threads sleep in a futex, event loops are called back."""

from __future__ import annotations

import asyncio
import contextlib
import operator
import threading
from collections.abc import Callable
from typing import Final, Protocol

from shmepoch.memory import layout as at
from shmepoch.memory._native import Memory

_NS: Final = 1_000_000_000
#: A longer timeout is none: it would not fit the clock.
_FOREVER_S: Final = 1e9
_POSITIONS: Final = range(2**64)


def require_position(value: int) -> None:
    """Raise `OverflowError` or `TypeError` for what is not an unsigned 64-bit position."""
    if operator.index(value) not in _POSITIONS:
        raise OverflowError(f"a position is 0 to 2**64-1, not {value}")


class AsyncWait:
    """One coroutine that waits for the watermark of `memory` to be above `after`."""

    def __init__(self, memory: Memory, after: int) -> None:
        require_position(after)
        self.memory: Final = memory
        self._after: Final = after
        self._loop: Final = asyncio.get_running_loop()
        self.future: Final[asyncio.Future[None]] = self._loop.create_future()

    @property
    def over(self) -> bool:
        """Whether there is nothing left to wait for."""
        memory = self.memory
        return memory.load(at.WATERMARK_AT) > self._after or memory.load(at.STATE_AT) != at.OPEN

    def resolve(self) -> None:
        """Let the coroutine go on; from any thread."""
        with contextlib.suppress(RuntimeError):  # its loop was closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._finish)

    def _finish(self) -> None:
        if not self.future.done():
            self.future.set_result(None)


class AsyncWaits(Protocol):
    """Where the coroutines that wait are kept, and how they hear of a commit."""

    def add(self, wait: AsyncWait, /) -> None:
        """From now on, `wait` is resolved once it is over."""
        ...

    def discard(self, wait: AsyncWait, /) -> None:
        """Nobody waits for this any more."""
        ...

    def notify(self) -> None:
        """Something was committed, or the epoch ended."""
        ...


class LocalWaits:
    """The coroutines that wait for private memory: whoever commits is in the same process."""

    def __init__(self) -> None:
        self.after_fork()

    def add(self, wait: AsyncWait, /) -> None:
        with self._lock:
            self._waits.add(wait)
        if wait.over:  # the commit may have come between the caller's look and the line above
            wait.resolve()

    def discard(self, wait: AsyncWait, /) -> None:
        with self._lock:
            self._waits.discard(wait)

    def notify(self) -> None:
        if self._waits:
            with self._lock:
                over = [wait for wait in self._waits if wait.over]
            for wait in over:
                wait.resolve()

    def after_fork(self) -> None:
        """Forget the parent's: its coroutines do not run in this child."""
        self._lock = threading.Lock()
        self._waits: set[AsyncWait] = set()


class Waiters:
    """Everybody who waits for one epoch's watermark, or for the epoch's end."""

    def __init__(
        self, memory: Memory, closed_error: Callable[[], Exception], waits: AsyncWaits
    ) -> None:
        self._memory = memory
        self._closed_error = closed_error
        self._waits = waits

    def notify(self) -> None:
        """Wake everybody; after the store that they wait for. No system call if nobody sleeps."""
        self._memory.wake(at.EVENT_AT)
        self._waits.notify()

    def wait_above(self, after: int, timeout: float | None) -> int:
        """Block until the watermark is above `after`, and return it.

        Raises `TimeoutError` after `timeout` seconds, and what a closed epoch raises when it ends.
        """
        limit = None if timeout is None else _limit_ns(timeout)
        if not self._memory.wait_above(at.WATERMARK_AT, after, at.EVENT_AT, at.STATE_AT, limit):
            raise TimeoutError(f"the watermark was not above {after} within {timeout} s")
        return self._reached(after)

    def wait_durable(self, seq: int, timeout: float) -> None:
        """Block until a store has everything up to `seq`, or the epoch ends; `TimeoutError`."""
        limit = _limit_ns(timeout)
        if not self._memory.wait_above(at.DURABLE_AT, seq - 1, at.EVENT_AT, at.STATE_AT, limit):
            raise TimeoutError(f"the store did not have {seq} within {timeout} s")

    def wake_writers(self) -> None:
        """Wake those who wait for the store; after it has said how far it has come."""
        self._memory.wake(at.EVENT_AT)

    async def above(self, after: int) -> int:
        """Like `wait_above`, without blocking the event loop."""
        wait = AsyncWait(self._memory, after)
        if not wait.over:
            self._waits.add(wait)
            try:
                await wait.future
            finally:
                self._waits.discard(wait)
        return self._reached(after)

    def _reached(self, after: int) -> int:
        # Completions that were committed before the epoch ended are still delivered.
        watermark = self._memory.load(at.WATERMARK_AT)
        if watermark > after:
            return watermark
        raise self._closed_error()


def _limit_ns(timeout: float) -> int | None:
    return round(max(0.0, timeout) * _NS) if timeout < _FOREVER_S else None
