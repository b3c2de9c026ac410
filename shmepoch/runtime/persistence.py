"""The persistence channel: it keeps a store up to date with epochs, outside the hot path."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterable
from numbers import Integral
from types import TracebackType
from typing import Final, Self

from shmepoch.arguments import require
from shmepoch.epoch.bindings import SessionRuntimeBindings
from shmepoch.epoch.codec import Record
from shmepoch.errors import (
    CaptureInvalid,
    ChannelClosed,
    ConfigInvalid,
    EpochGone,
    EpochSealed,
    ObserverReadOnly,
    StoreConflict,
    StoreWriteFailed,
)
from shmepoch.events import Event, about
from shmepoch.ids import RuntimeEpochId
from shmepoch.runtime.followed import EpochPersistence, Followed
from shmepoch.stores.protocol import RuntimeStore
from shmepoch.timeouts import limit_s, setting_s

__all__ = ["ChannelStatus", "EpochPersistence", "PersistenceChannel"]

_log = logging.getLogger(__name__)

#: The longest time, in seconds, that completions may wait for others.
MOST_DELAY_S: Final = 3600.0
#: How often epochs are polled for changes that do not wake the channel: cursors, and operations
#: that begin. An epoch of which something was stored since the last such poll is polled more often.
_POLL_S: Final = 1.0
_WARM_POLL_S: Final = 0.05
#: How often completions that wait for `max_delay` to pass are counted: every tenth of it, and at
#: least this often.
_COUNT_S: Final = 0.05

_FIRST_RETRY_S: Final = 0.05
_LAST_RETRY_S: Final = 5.0

#: Errors that may be about one capture and not about the store.
_OF_ONE_CAPTURE: Final = (StoreConflict, CaptureInvalid, ValueError, TypeError, ArithmeticError)


class ChannelStatus(Record, kw_only=True, frozen=True):
    """The work of a persistence channel, and its failures."""

    epochs: tuple[EpochPersistence, ...]
    flushes: int
    """Transactions that the store took."""
    entries: int
    """Completions in them."""
    failures: int
    """Times that the store failed."""
    failing: bool
    """Whether the last attempt did not store everything; it is tried again."""
    last_error: str | None
    """Why the store failed the last time, however long ago."""

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
    sooner if `max_entries` of them wait. Completions that come meanwhile, in any epoch, go into the
    same transaction. Cursors, and operations that begin, do not wake the channel: they are durable
    within about a second, or within about 50 ms if anything of the epoch was stored during the last
    second. A channel without work only polls its epochs once a second.

    PERSIST-2: it has no state that could be lost. It reads the news from the epochs, and the
    position to continue from the store. So it may be killed at any point, and another one may be
    started in any process, even beside it. While the store fails it tries again, with growing
    pauses, and the epochs go on; `status` reports it.

    PERSIST-3: a fault of one epoch does not delay others. If the store does not take several
    together, they are saved one by one. An epoch that it does not take alone is saved alone from
    then on. An epoch that it can never take is given up.

    Its methods may be called from any thread. After a fork it belongs to the parent.
    """

    def __init__(
        self, store: RuntimeStore, *, max_delay: float = 0.05, max_entries: int = 512
    ) -> None:
        require(RuntimeStore, store, "PersistenceChannel", "store")
        delay = setting_s(max_delay, "max_delay")
        if delay is None or not 0 <= max_delay <= MOST_DELAY_S:
            allowed = f"a number of seconds from 0 to {MOST_DELAY_S:.0f}"
            raise ConfigInvalid("max_delay", max_delay, allowed)
        entries: object = max_entries  # numpy's integers are allowed, too
        if isinstance(entries, bool) or not isinstance(entries, Integral) or entries < 1:
            raise ConfigInvalid("max_entries", max_entries, "an integer, 1 or above")
        self._store: Final = store
        self._max_delay: Final = delay
        self._max_entries: Final = int(entries)
        self._pid: Final = os.getpid()
        #: Signal handlers and finalizers may enter it again. It is never held during a wait for the
        #: store or another thread.
        self._state: Final = threading.Condition(threading.RLock())
        # Under `_state`:
        self._saving: frozenset[Followed] = frozenset()
        self._epochs: dict[RuntimeEpochId, Followed] = {}
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False
        self._ended = False
        self._requested = 0
        self._served = 0
        # Used by the thread only:
        self._wake: Final = asyncio.Event()
        self._advanced: set[Followed] = set()
        self._warm: set[Followed] = set()
        self._took_s = 0.0
        self._flushes = 0
        self._entries = 0
        self._failures = 0
        self._store_works = True
        self._failure: Exception | None = None
        self._last_error: Exception | None = None

    # --- following epochs ---------------------------------------------------------------------

    def follow(self, bindings: SessionRuntimeBindings) -> None:
        """Start to keep an epoch durable; no effect if it is followed already.

        Raises `ObserverReadOnly` for an observer's bindings: following writes `durable_seq` to the
        epoch.
        """
        require(SessionRuntimeBindings, bindings, "PersistenceChannel.follow", "bindings")
        self._require_mine()
        if bindings.read_only:
            raise ObserverReadOnly(bindings.epoch_id)
        with self._state:
            self._require_open()
            if bindings.epoch_id in self._epochs:
                return
            followed = Followed(bindings)
            is_first = self._thread is None
            if is_first:
                self._start()
            self._epochs[bindings.epoch_id] = followed
            if self._loop is not None and not is_first:
                self._loop.call_soon_threadsafe(self._advanced.add, followed)
            self._signal()

    def unfollow(self, bindings: SessionRuntimeBindings) -> None:
        """Stop following an epoch: after this returns, the channel writes nothing of it.

        Anything that is not stored by then will not be stored; `flush` first. No effect if the
        epoch is not followed.
        """
        require(SessionRuntimeBindings, bindings, "PersistenceChannel.unfollow", "bindings")
        self._require_mine()
        with self._state:
            followed = self._epochs.pop(bindings.epoch_id, None)
            if followed is None:
                return
            if followed.waiting is not None and self._loop is not None:
                self._loop.call_soon_threadsafe(followed.waiting.cancel)
            if threading.current_thread() is not self._thread:
                self._state.wait_for(lambda: followed not in self._saving)

    def flush(
        self, timeout: float | None = None, *, bindings: SessionRuntimeBindings | None = None
    ) -> None:
        """Block until everything that was committed to the followed epochs by now is durable.

        After `timeout` seconds it raises `StoreWriteFailed` if the store fails, `TimeoutError` if
        it is slow; the channel goes on trying. Raises the error of an epoch that can never be
        stored, and `ChannelClosed`. With `bindings`, it waits for their epoch only. Infinity means
        no limit.
        """
        require(SessionRuntimeBindings | None, bindings, "PersistenceChannel.flush", "bindings")
        limit = limit_s(timeout, "flush")
        self._require_mine()
        if threading.current_thread() is self._thread:
            raise StoreWriteFailed("the store waits for its own channel, within a call of that")
        with self._state:
            self._require_open()
            if self._thread is None:
                return
            self._requested += 1
            mine = self._requested
            self._signal()
            self._state.wait_for(lambda: self._is_stored(mine, bindings) or self._ended, limit)
            asked_for = self._asked_for(bindings)
            if not self._is_stored(mine, bindings):
                if self._ended:
                    raise ChannelClosed
                error = next((one.failure for one in asked_for if one.failure), None)
                if error is not None:
                    why = error.reason if isinstance(error, StoreWriteFailed) else error
                    raise StoreWriteFailed(f"{why} (flush waited {timeout} s)") from error
                raise TimeoutError(f"the store was not up to date within {timeout} s")
            for followed in asked_for:
                if followed.error is not None:
                    raise followed.error

    def _is_stored(self, request: int, bindings: SessionRuntimeBindings | None) -> bool:
        return self._served >= request and not any(f.failure for f in self._asked_for(bindings))

    def _asked_for(self, bindings: SessionRuntimeBindings | None) -> list[Followed]:
        if bindings is None:
            return list(self._epochs.values())
        followed = self._epochs.get(bindings.epoch_id)
        return [] if followed is None else [followed]

    def status(self) -> ChannelStatus:
        """The store's progress, and its failures."""
        self._require_mine()
        with self._state:
            return ChannelStatus(
                epochs=tuple(followed.status() for followed in self._epochs.values()),
                flushes=self._flushes,
                entries=self._entries,
                failures=self._failures,
                failing=self._failure is not None,
                last_error=None if self._last_error is None else str(self._last_error),
            )

    def close(self) -> None:
        """Store what is new, or log that this failed, and stop. The store stays open."""
        if self._pid != os.getpid():
            return
        with self._state:
            self._closed = True
            thread = self._thread
            self._signal()
        # A thread without an identity is about to be started, by a call that this handler
        # interrupted.
        if thread is not None and thread.ident and thread is not threading.current_thread():
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
        # Before any lock: in a forked child, the thread that held one does not exist.
        if self._pid != os.getpid():
            raise ChannelClosed

    def _require_open(self) -> None:
        if self._closed or self._ended:
            raise ChannelClosed

    def _signal(self) -> None:
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._wake.set)

    # --- the thread: when to store ------------------------------------------------------------

    def _start(self) -> None:
        """Start the thread. A failure leaves nothing behind, so the next call may try again."""
        loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._main, args=[loop], name="shmepoch-persistence", daemon=True
        )
        self._loop = loop
        try:
            self._thread.start()
        except BaseException:
            self._thread = self._loop = None
            loop.close()
            raise

    def _main(self, loop: asyncio.AbstractEventLoop) -> None:
        with self._state:
            if self._thread is not threading.current_thread():
                return  # a handler raised while it was started
        try:
            with asyncio.Runner(loop_factory=lambda: loop) as runner:
                runner.run(self._run())
        finally:
            with self._state:
                self._ended = True
                self._state.notify_all()

    async def _run(self) -> None:
        try:
            await self._keep_storing()
        finally:
            with self._state:
                self._loop = None
        requested = self._requested
        self._store_news(self._followed(), requested, thoroughly=True)
        if self._failure is not None:
            lag = self.status().lag
            _log.error(
                "closed while the store fails; %d completions are in shared memory only",
                lag,
                extra=about(Event.CHANNEL_CLOSED_BEHIND, completions=lag),
            )

    async def _keep_storing(self) -> None:
        next_poll = pause = 0.0
        retry_at, retry_s, tried, works = 0.0, _FIRST_RETRY_S, 0, True
        while not self._closed:
            await self._woken(pause)
            # A flush does not wait for the time of the next try.
            if not works and self._requested == tried and time.monotonic() < retry_at:
                pause = retry_at - time.monotonic()
                continue
            await self._coalesce()
            requested = tried = self._requested
            asked = requested > self._served
            if asked or time.monotonic() >= next_poll:
                candidates: Iterable[Followed] = self._followed()
                next_poll = time.monotonic() + _POLL_S
                self._warm.clear()
            else:
                candidates = [f for f in self._advanced | self._warm if not f.is_suspect]
            works = self._store_news(candidates, requested, thoroughly=asked)
            if works:
                retry_s = _FIRST_RETRY_S
                pause = _WARM_POLL_S if self._warm else next_poll - time.monotonic()
            else:
                pause, retry_s = retry_s, min(retry_s * 2, _LAST_RETRY_S)
                retry_at = time.monotonic() + pause

    async def _woken(self, timeout: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._wake.wait(), max(0.0, timeout))
        self._wake.clear()

    async def _coalesce(self) -> None:
        """Wait for further completions: for `max_delay`, less the time that storing takes."""
        count_s = min(self._max_delay / 10, _COUNT_S)
        # One interval less, because a wake-up and the timers of the event loop come late.
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
        try:
            await followed.feed.advanced(followed.durable)
        except (EpochSealed, EpochGone):
            pass
        except Exception as error:  # the next poll finds what there is, or what is wrong
            _log.debug(
                "epoch %s is not waited for: %s",
                followed.id,
                error,
                extra=about(
                    Event.EPOCH_NOT_AWAITED,
                    session=followed.bindings.session_id,
                    epoch=followed.id,
                    reason=str(error),
                ),
            )
        self._advanced.add(followed)
        self._wake.set()

    # --- the thread: storing ------------------------------------------------------------------

    def _followed(self) -> list[Followed]:
        with self._state:
            return list(self._epochs.values())

    def _store_news(
        self, candidates: Iterable[Followed], requested: int, *, thoroughly: bool
    ) -> bool:
        """Store the news of these epochs. False if the store does not seem to work; then all is
        tried again."""
        began, flushes = time.monotonic(), self._flushes
        due = self._due(candidates, thoroughly=thoroughly)
        left, taken, error = self._save_in_turn(due)
        works = error is None or taken
        if not self._store_works and self._flushes > flushes:
            self._store_works = True
            _log.info("the store works again", extra=about(Event.STORE_WORKS))
        if error is not None:
            self._note(error, left[0], works=works)
        with self._state:
            for followed in due:
                followed.failure = error if followed in left else None
            self._served = requested
            failures = (one.failure for one in self._epochs.values() if one.failure)
            self._failure = error or next(failures, None)
            self._state.notify_all()
        self._advanced.update(one for one in left if not one.is_suspect)
        self._took_s = time.monotonic() - began
        return works

    def _due(self, candidates: Iterable[Followed], *, thoroughly: bool) -> list[Followed]:
        due = []
        for followed in candidates:
            try:
                if followed.is_due(thoroughly=thoroughly):
                    due.append(followed)
            except Exception as error:
                _give_up(followed, error)
        self._advanced.clear()
        return due

    def _save_in_turn(
        self, due: Iterable[Followed]
    ) -> tuple[list[Followed], bool, Exception | None]:
        """Save the epochs that never failed together, and the suspect ones one by one.

        Returns the epochs that were not saved, beginning with the one that failed; whether the
        store took anything, or was only given suspect epochs; and the error.
        """
        # Those that failed least come first, so that a failing epoch is not always first.
        ordered = sorted(due, key=lambda followed: followed.failures)
        sound = [followed for followed in ordered if not followed.is_suspect]
        alone = [[followed] for followed in ordered if followed.is_suspect]
        waiting = [sound, *alone] if sound else alone
        taken = not sound
        while waiting:
            group = waiting.pop(0)
            try:
                taken |= self._save(group)
            except Exception as error:  # after any error, the epochs go on and keep their news
                culprit = _culprit(error, group)
                if culprit is not None:
                    _give_up(culprit, error)
                    group.remove(culprit)
                    waiting[:0] = [group] if group else []
                    continue
                for followed in self._followed():
                    followed.ask_again()
                if len(group) == 1:
                    group[0].failures += 1
                    return [one for group in (group, *waiting) for one in group], taken, error
                waiting[:0] = [[followed] for followed in group]
        return [], taken, None

    def _save(self, group: Iterable[Followed]) -> bool:
        """Store the news of these epochs in one transaction; whether there was anything to
        store."""
        with self._state:
            still = [one for one in group if self._epochs.get(one.id) is one]
            self._saving = frozenset(still)
        try:
            readings = []
            for followed in still:
                followed.locate(self._store)
                try:
                    readings.append((followed, followed.read()))
                except MemoryError:
                    raise
                except Exception as error:
                    _give_up(followed, error)
            if readings:
                self._store.save([reading.capture for _, reading in readings])
                self._flushes += 1
            for followed, reading in readings:
                followed.stored(reading)
                self._entries += len(reading.capture.snapshot.entries)
                self._warm.add(followed)
                self._listen(followed)
            return bool(readings)
        finally:
            with self._state:
                self._saving = frozenset()
                self._state.notify_all()

    def _listen(self, followed: Followed) -> None:
        if followed.waiting is None or followed.waiting.done():
            followed.waiting = asyncio.create_task(self._watch(followed))

    def _note(self, error: Exception, followed: Followed, *, works: bool) -> None:
        """Log the failure, unless it was logged before."""
        if not works:
            if self._store_works:
                self._store_works = False
                _log.error(
                    "nothing is stored until the store works again: %s",
                    error,
                    extra=about(Event.STORE_FAILED, reason=str(error)),
                )
        elif not followed.is_suspect:
            followed.is_suspect = True
            _log.error(
                "epoch %s is not stored, although others are: %s",
                followed.id,
                error,
                extra=about(
                    Event.EPOCH_REFUSED,
                    session=followed.bindings.session_id,
                    epoch=followed.id,
                    reason=str(error),
                ),
            )
        self._last_error = error
        self._failures += 1


def _culprit(error: Exception, group: list[Followed]) -> Followed | None:
    """The epoch that can never be stored, if it is the cause of the error."""
    if isinstance(error, StoreConflict | CaptureInvalid):
        return next((followed for followed in group if followed.id == error.epoch_id), None)
    return group[0] if len(group) == 1 and isinstance(error, _OF_ONE_CAPTURE) else None


def _give_up(followed: Followed, error: Exception) -> None:
    _log.error(
        "epoch %s cannot be stored any more: %s",
        followed.id,
        error,
        extra=about(
            Event.EPOCH_GIVEN_UP,
            session=followed.bindings.session_id,
            epoch=followed.id,
            seq=followed.durable,
            reason=str(error),
        ),
    )
    followed.error, followed.failure = error, None
