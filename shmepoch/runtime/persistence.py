"""The persistence channel: keeps a store up to date with epochs, from outside the hot path."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterable
from types import TracebackType
from typing import Final, Self

from shmepoch.epoch.bindings import SessionRuntimeBindings
from shmepoch.epoch.codec import Record
from shmepoch.errors import (
    ChannelClosed,
    ConfigInvalid,
    EpochGone,
    EpochSealed,
    ObserverReadOnly,
    ShmepochError,
    StoreConflict,
    StoreError,
    StoreWriteFailed,
)
from shmepoch.ids import RuntimeEpochId
from shmepoch.runtime.followed import EpochPersistence, Followed
from shmepoch.stores.protocol import RuntimeStore

__all__ = ["ChannelStatus", "EpochPersistence", "PersistenceChannel"]

_log = logging.getLogger(__name__)

#: How many seconds the completions of a channel may wait for others at most.
MOST_DELAY_S: Final = 3600.0
#: How often epochs are looked at for what wakes nobody: cursors, and operations that begin. Those
#: that something was stored of since the last such look are looked at more often.
_LOOK_S: Final = 1.0
_WARM_LOOK_S: Final = 0.05
#: How often completions that wait for `max_delay` to pass are counted: in tenths of it, but not
#: less often than this.
_COUNT_S: Final = 0.05

_FIRST_RETRY_S: Final = 0.05
_LAST_RETRY_S: Final = 5.0


class ChannelStatus(Record, kw_only=True, frozen=True):
    """What a persistence channel has done, and what keeps it from doing more."""

    epochs: tuple[EpochPersistence, ...]
    flushes: int
    """Transactions that the store took."""
    entries: int
    """Completions in them."""
    failures: int
    """Times that the store failed."""
    failing: bool
    """Whether it failed the last time; it is tried again."""
    last_error: str | None
    """Why it failed when it last did, however long ago."""

    @property
    def lag(self) -> int:
        """How many completions of all epochs are not in the store yet."""
        return sum(epoch.lag for epoch in self.epochs)

    @property
    def missed(self) -> int:
        """Completions of all epochs that retention dropped before the channel had read them."""
        return sum(epoch.missed for epoch in self.epochs)


class PersistenceChannel:
    """Follows any number of epochs with one thread, and keeps a store up to date with them.

    A completion is durable within `max_delay` seconds, as far as the store's speed allows, and
    sooner if `max_entries` of them wait; what came meanwhile, in every epoch, goes into the same
    transaction. Cursors, and operations that begin, wake nobody: they are durable within about a
    second, and within about 50 ms if anything of the epoch was stored during the last second. A
    channel without work looks at its epochs once a second and does nothing else.

    PERSIST-2: it holds nothing that could be lost. What is new it reads from the epochs, and where
    to go on from the store, so it may be killed anywhere and another one started, in any process,
    beside it if need be. While the store fails it tries again, with growing pauses, and the epochs
    go on; `status` tells.

    Its methods may be called from any thread. After a fork it belongs to the parent.
    """

    def __init__(
        self, store: RuntimeStore, *, max_delay: float = 0.05, max_entries: int = 512
    ) -> None:
        if not (isinstance(max_delay, int | float) and 0 <= max_delay <= MOST_DELAY_S):
            allowed = f"a number of seconds from 0 to {MOST_DELAY_S:.0f}"
            raise ConfigInvalid("max_delay", max_delay, allowed)
        if type(max_entries) is not int or max_entries < 1:
            raise ConfigInvalid("max_entries", max_entries, "an integer, 1 or above")
        self._store: Final = store
        self._max_delay: Final = max_delay
        self._max_entries: Final = max_entries
        self._pid: Final = os.getpid()
        #: Held while the store is written to: whoever has it knows that nothing is being written.
        self._saving: Final = threading.Lock()
        self._state: Final = threading.Condition()
        # Under `_state`:
        self._epochs: dict[RuntimeEpochId, Followed] = {}
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False
        self._ended = False
        self._requested = 0
        self._served = 0
        # The thread's own:
        self._wake: Final = asyncio.Event()
        self._advanced: set[Followed] = set()
        self._warm: set[Followed] = set()
        self._took_s = 0.0
        self._flushes = 0
        self._entries = 0
        self._failures = 0
        self._failing = False
        self._last_error: Exception | None = None

    # --- what is followed ---------------------------------------------------------------------

    def follow(self, bindings: SessionRuntimeBindings) -> None:
        """Keep an epoch durable from now on; of no effect if it is followed already.

        Raises `ObserverReadOnly` for an observer's bindings: an epoch says how far its store is.
        """
        self._require_mine()
        if bindings.read_only:
            raise ObserverReadOnly(bindings.epoch_id)
        with self._state:
            self._require_open()
            if bindings.epoch_id in self._epochs:
                return
            self._epochs[bindings.epoch_id] = followed = Followed(bindings)
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._main, name="shmepoch-persistence", daemon=True
                )
                self._thread.start()
            elif self._loop is not None:
                self._loop.call_soon_threadsafe(self._advanced.add, followed)
            self._signal()

    def unfollow(self, bindings: SessionRuntimeBindings) -> None:
        """Follow an epoch no longer: once this returns, the channel writes nothing of it.

        What is not stored by then is not stored any more; `flush` first. Of no effect if the epoch
        is not followed.
        """
        self._require_mine()
        with self._saving, self._state:
            followed = self._epochs.pop(bindings.epoch_id, None)
            if followed is not None and followed.waiting is not None and self._loop is not None:
                self._loop.call_soon_threadsafe(followed.waiting.cancel)

    def flush(
        self, timeout: float | None = None, *, bindings: SessionRuntimeBindings | None = None
    ) -> None:
        """Block until everything that was committed to the followed epochs by now is durable.

        After `timeout` seconds it raises `StoreWriteFailed` if the store fails, `TimeoutError` if
        it is slow; the channel goes on trying. Raises the error of an epoch that cannot be stored
        at all, with `bindings` only if it is theirs, and `ChannelClosed`.
        """
        self._require_mine()
        with self._state:
            self._require_open()
            if self._thread is None:
                return
            self._requested += 1
            mine = self._requested
            self._signal()
            self._state.wait_for(lambda: self._served >= mine or self._ended, timeout)
            if self._served < mine:
                if self._ended:
                    raise ChannelClosed
                if self._failing:
                    error = self._last_error
                    why = error.reason if isinstance(error, StoreWriteFailed) else error
                    raise StoreWriteFailed(f"{why} (flush waited {timeout} s)") from error
                raise TimeoutError(f"the store was not up to date within {timeout} s")
            for followed in self._epochs.values():
                asked_for = bindings is None or followed.id == bindings.epoch_id
                if asked_for and followed.error is not None:
                    raise followed.error

    def status(self) -> ChannelStatus:
        """How far the store has come, what it took and what it did not."""
        self._require_mine()
        with self._state:
            return ChannelStatus(
                epochs=tuple(followed.status() for followed in self._epochs.values()),
                flushes=self._flushes,
                entries=self._entries,
                failures=self._failures,
                failing=self._failing,
                last_error=None if self._last_error is None else str(self._last_error),
            )

    def close(self) -> None:
        """Store what there is, or log that it could not be, and stop. The store stays open."""
        if self._pid != os.getpid():
            return
        with self._state:
            self._closed = True
            thread, self._thread = self._thread, None
            self._signal()
        if thread is not None:
            thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _require_mine(self) -> None:
        # Before any lock: in a forked child whoever held one does not exist.
        if self._pid != os.getpid():
            raise ChannelClosed

    def _require_open(self) -> None:
        if self._closed or self._ended:
            raise ChannelClosed

    def _signal(self) -> None:
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._wake.set)

    # --- the thread: when to look -------------------------------------------------------------

    def _main(self) -> None:
        try:
            asyncio.run(self._run())
        finally:
            with self._state:
                self._ended = True
                self._state.notify_all()

    async def _run(self) -> None:
        with self._state:
            self._loop = asyncio.get_running_loop()
        try:
            await self._keep_storing()
        finally:
            with self._state:
                self._loop = None
        requested = self._requested
        if self._store_news(self._followed(), thoroughly=True):
            self._serve(requested)
        else:
            _log.error(
                "closed while the store fails; %d completions are in shared memory only",
                self.status().lag,
            )

    async def _keep_storing(self) -> None:
        next_look = pause = 0.0
        retry_at, retry_s, tried = 0.0, _FIRST_RETRY_S, 0
        while not self._closed:
            await self._woken(pause)
            # A flush that somebody waits for does not wait for the next try.
            if self._failing and self._requested == tried and time.monotonic() < retry_at:
                pause = retry_at - time.monotonic()
                continue
            await self._coalesce()
            requested = tried = self._requested
            asked = requested > self._served
            if asked or time.monotonic() >= next_look:
                candidates: Iterable[Followed] = self._followed()
                next_look = time.monotonic() + _LOOK_S
                self._warm.clear()
            else:
                candidates = self._advanced | self._warm
            if self._store_news(candidates, thoroughly=asked):
                self._serve(requested)
                retry_s = _FIRST_RETRY_S
                pause = _WARM_LOOK_S if self._warm else next_look - time.monotonic()
            else:
                pause, retry_s = retry_s, min(retry_s * 2, _LAST_RETRY_S)
                retry_at = time.monotonic() + pause

    async def _woken(self, timeout: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._wake.wait(), max(0.0, timeout))
        self._wake.clear()

    async def _coalesce(self) -> None:
        """Give further completions the time that `max_delay` leaves, less what storing takes."""
        count_s = min(self._max_delay / 10, _COUNT_S)
        # One count less, because a wake-up and the timers of the event loop come late.
        end = time.monotonic() + self._max_delay - count_s - self._took_s
        while self._advanced and not self._is_pressed() and (left := end - time.monotonic()) > 0:
            await self._woken(min(left, count_s))

    def _is_pressed(self) -> bool:
        return (
            self._closed
            or self._requested > self._served
            or sum(followed.pending() for followed in self._advanced) >= self._max_entries
        )

    async def _watch(self, followed: Followed) -> None:
        with contextlib.suppress(EpochSealed, EpochGone):
            await followed.feed.advanced(followed.durable)
        self._advanced.add(followed)
        self._wake.set()

    # --- the thread: what to store ------------------------------------------------------------

    def _followed(self) -> list[Followed]:
        with self._state:
            return list(self._epochs.values())

    def _serve(self, requested: int) -> None:
        with self._state:
            self._served = requested
            self._state.notify_all()

    def _store_news(self, candidates: Iterable[Followed], *, thoroughly: bool) -> bool:
        """Store what is new of them; False if the store failed, and it is to be tried again."""
        began = time.monotonic()
        due = self._due(candidates, thoroughly=thoroughly)
        while due:
            try:
                self._save(due)
                break
            except Exception as error:  # whatever it is, the epochs go on and keep what is new
                conflicting = _conflicting(error, due)
                if conflicting is None:
                    self._failed(error)
                    self._advanced.update(due)
                    return False
                _give_up(conflicting, error)
                due.remove(conflicting)
        self._took_s = time.monotonic() - began
        self._failing = False
        return True

    def _due(self, candidates: Iterable[Followed], *, thoroughly: bool) -> list[Followed]:
        due = []
        for followed in candidates:
            try:
                if followed.is_due(thoroughly=thoroughly):
                    due.append(followed)
            except ShmepochError as error:
                _give_up(followed, error)
        self._advanced.clear()
        return due

    def _save(self, due: list[Followed]) -> None:
        """Store what is new of them, in one transaction."""
        with self._saving:
            readings = []
            for followed in due:
                if self._epochs.get(followed.id) is not followed:
                    continue
                try:
                    readings.append((followed, followed.read(self._store)))
                except StoreError:
                    raise
                except ShmepochError as error:
                    _give_up(followed, error)
            if readings:
                self._store.save([reading.capture for _, reading in readings])
                self._flushes += 1
            for followed, reading in readings:
                followed.stored(reading)
                self._entries += len(reading.capture.snapshot.entries)
                self._warm.add(followed)
                self._listen(followed)

    def _listen(self, followed: Followed) -> None:
        if followed.waiting is None or followed.waiting.done():
            followed.waiting = asyncio.create_task(self._watch(followed))

    def _failed(self, error: Exception) -> None:
        if not self._failing:
            _log.error("nothing is stored until the store works again: %s", error)
        self._failing = True
        self._failures += 1
        self._last_error = error
        for followed in self._followed():
            followed.ask_again()


def _conflicting(error: Exception, due: list[Followed]) -> Followed | None:
    """The one whose stored history contradicts it, if that is what the store failed at."""
    if not isinstance(error, StoreConflict):
        return None
    return next((followed for followed in due if followed.id == error.epoch_id), None)


def _give_up(followed: Followed, error: Exception) -> None:
    _log.error("epoch %s cannot be stored any more: %s", followed.id, error)
    followed.error = error
