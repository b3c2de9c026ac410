"""Waiting for a watermark: threads sleep in a futex, event loops are called back."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Final, Protocol

from shmepoch import _native as at
from shmepoch._native import Memory
from shmepoch.arguments import require_position
from shmepoch.events import Event, about
from shmepoch.timeouts import limit_s

_log = logging.getLogger(__name__)

_NS: Final = 1_000_000_000

#: How long a sleeper waits before it polls: the longest delay if a writer was killed, or failed,
#: between its commit and its wake call.
RECHECK_S: Final = 0.25

_reported: Final[set[tuple[object, ...]]] = set()


def report_once(what: str, error: Exception) -> None:
    """Log a failure that only causes delay, once for each cause."""
    cause = (what, type(error), getattr(error, "errno", None))
    if cause not in _reported:
        _reported.add(cause)
        _log.warning(
            "%s (%s: %s); reported once",
            what,
            type(error).__name__,
            error,
            extra=about(Event.WAKE_FAILED, reason=str(error)),
        )


class AsyncWait:
    """One coroutine that waits for the watermark of `memory` to be above `after`."""

    def __init__(self, memory: Memory, after: int) -> None:
        self.memory: Final = memory
        self._after: Final = require_position(after, "advanced", "after_seq")
        self._loop: Final = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self.future: Final[asyncio.Future[None]] = self._loop.create_future()

    @property
    def over(self) -> bool:
        """Whether the wait has its result, or its coroutine no longer waits."""
        memory = self.memory
        return (
            memory.load(at.WATERMARK_AT) > self._after
            or memory.load(at.STATE_AT) != at.OPEN
            or self.future.done()
            or self._loop.is_closed()
        )

    def resolve(self) -> None:
        """Let the coroutine go on; from any thread."""
        with contextlib.suppress(RuntimeError):  # its loop is closed, so the wait has ended
            self._loop.call_soon_threadsafe(self._finish)

    def poll_by_itself(self) -> None:
        """Poll from time to time, in its event loop; for a wait that may miss a notification."""
        if self.over:
            self._finish()
        else:
            self._timer = self._loop.call_later(RECHECK_S, self.poll_by_itself)

    def end(self) -> None:
        """Stop waiting, in whatever state the wait is."""
        if self._timer is not None:
            self._timer.cancel()
        if not self._loop.is_closed():  # a closed loop cannot deliver the cancellation
            self.future.cancel()

    def _finish(self) -> None:
        if not self.future.done():
            self.future.set_result(None)


class AsyncWaits(Protocol):
    """The set of the waiting coroutines, which tells them of a commit.

    WAIT-2: no lock is held where other code can run. A finalizer or a signal handler may run at any
    instruction, and may end a wait, begin one or commit. So the waits are kept in a set whose
    single operations are atomic: by the interpreter lock, or in builds without it by the set's own
    lock. The set hashes by identity, so its operations run no Python code.
    """

    def add(self, wait: AsyncWait, /) -> None:
        """Resolve `wait` when it is over. Called in its event loop."""
        ...

    def discard(self, wait: AsyncWait, /) -> None:
        """Forget a wait that is over, or that was never added."""
        ...

    def notify(self) -> None:
        """Resolve the waits that are over, after a commit or the epoch's end."""
        ...


class LocalWaits:
    """The coroutines that wait for private memory: its writers are in the same process."""

    def __init__(self) -> None:
        self.after_fork()

    def add(self, wait: AsyncWait, /) -> None:
        self._waits.add(wait)
        # A writer that is interrupted between its commit and `notify` does not notify. The commit
        # may also have come between the caller's check and the line above.
        wait.poll_by_itself()

    def discard(self, wait: AsyncWait, /) -> None:
        self._waits.discard(wait)

    def notify(self) -> None:
        if self._waits:
            for wait in list(self._waits):
                if wait.over:
                    wait.resolve()
                    self._waits.discard(wait)

    def after_fork(self) -> None:
        """Forget the parent's waits: its coroutines do not run in this child."""
        self._waits: set[AsyncWait] = set()


class Waiters:
    """The waiters for one epoch's watermark, or for the epoch's end."""

    def __init__(
        self, memory: Memory, closed_error: Callable[[], Exception], waits: AsyncWaits
    ) -> None:
        self._memory = memory
        self._closed_error = closed_error
        self._waits = waits

    def notify(self) -> None:
        """Wake every waiter, after the store that they wait for; no system call if none sleeps.

        WAIT-1: the commit stands, so a failure here is not raised. A sleeper that was not woken
        soon polls by itself.
        """
        try:
            self._memory.wake(at.EVENT_AT)
            self._waits.notify()
        except Exception as error:
            report_once("not every sleeper was woken after a commit; it will poll by itself", error)

    def wait_above(self, after: int, timeout: float | None) -> int:
        """Block until the watermark is above `after`, and return it.

        Raises `TimeoutError` after `timeout` seconds, and the closed error when the epoch ends.
        """
        limit = _limit_ns(timeout, "wait_for_advance")
        after = require_position(after, "wait_for_advance", "after_seq")
        if not self._memory.wait_above(at.WATERMARK_AT, after, at.EVENT_AT, at.STATE_AT, limit):
            raise TimeoutError(f"the watermark was not above {after} within {timeout} s")
        return self._reached(after)

    def wait_durable(self, seq: int, timeout: float | None) -> None:
        """Block until a store has everything up to `seq`, or the epoch ends. Raises
        `TimeoutError`."""
        limit = _limit_ns(timeout, "wait_durable")
        if not self._memory.wait_above(at.DURABLE_AT, seq - 1, at.EVENT_AT, at.STATE_AT, limit):
            raise TimeoutError(f"the store did not have {seq} within {timeout} s")

    def wake_writers(self) -> None:
        """Wake the writers that wait for the store, after `durable_seq` has advanced."""
        self._memory.wake(at.EVENT_AT)

    async def above(self, after: int) -> int:
        """Like `wait_above`, without blocking the event loop."""
        wait = AsyncWait(self._memory, after)
        if not wait.over:
            try:
                self._waits.add(wait)
                await wait.future
            finally:
                self._waits.discard(wait)
                wait.end()
        return self._reached(after)

    def _reached(self, after: int) -> int:
        # Completions that were committed before the epoch ended are still delivered.
        watermark = self._memory.load(at.WATERMARK_AT)
        if watermark > after:
            return watermark
        raise self._closed_error()


def _limit_ns(timeout: float | None, call: str) -> int | None:
    limit = limit_s(timeout, call)
    return None if limit is None else round(limit * _NS)
