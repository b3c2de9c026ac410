"""Waiting for operations to end: watchers, and barriers over several operations."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
import weakref
from collections.abc import Generator, Sequence
from typing import Final, Protocol, Self, TypeAlias

from shmepoch.epoch.completions import CompletionFeed
from shmepoch.epoch.operations import OperationTerminalOutcome, WaitAllResult, WaitAllSatisfied
from shmepoch.errors import DuplicateWaitOperation, WaitAlreadyActive
from shmepoch.ids import OperationId, RunId, WaitRequestId
from shmepoch.timeouts import deadline_after, pauses

#: Where an operation that is watched is registered: its slot, and the number of its registration.
Place: TypeAlias = tuple[int, int]
#: An operation that is watched, and the participant that watches it.
Watching: TypeAlias = tuple[Place, int]

#: How long a barrier pauses, at first and at most, before it polls again whether a transition is
#: over. A transition takes microseconds, unless its process was stopped.
_PAUSES_S: Final = 0.001, 0.05


class Source(Protocol):
    """The part of a registry that a wait needs."""

    @property
    def participant(self) -> int:
        """This process's participant key; its watchers are counted under it."""
        ...

    def completion_feed(self) -> CompletionFeed:
        """The feed whose advance is waited for."""
        ...

    def locate(self, id: OperationId) -> Pending:
        """An operation to be waited for; `NotFound` if the registry does not hold it."""
        ...

    def outcome_at(
        self, id: OperationId, place: Place, since: int
    ) -> OperationTerminalOutcome | None:
        """The outcome of an operation, or None while it has not ended. Raises `OutcomeDropped`."""
        ...

    def try_watch(self, places: Sequence[Place]) -> Sequence[Watching] | None:
        """Count a watcher of each that has not ended; None if that has to wait."""
        ...

    def unwatch(self, watched: Sequence[Watching]) -> None:
        """Stop watching these. Never waits, and never fails."""
        ...


class Pending:
    """An operation to wait for. It had not ended when the feed was at `since`, unless `outcome` is
    given."""

    def __init__(
        self,
        source: Source,
        id: OperationId,
        place: Place,
        since: int,
        outcome: OperationTerminalOutcome | None = None,
    ) -> None:
        self.id = id
        self.place = place
        self.outcome = outcome
        self._source = source
        self._feed = source.completion_feed()
        self._since = since

    def poll(self) -> OperationTerminalOutcome | None:
        if self.outcome is None:
            self.outcome = self._source.outcome_at(self.id, self.place, self._since)
        return self.outcome

    def wait(self, deadline: float | None) -> OperationTerminalOutcome:
        while True:
            watermark = self._feed.watermark()  # before the poll: an end after the poll raises it
            outcome = self.poll()
            if outcome is not None:
                return outcome
            self._feed.wait_for_advance(watermark, _remaining(deadline))

    async def wait_async(self) -> OperationTerminalOutcome:
        while True:
            watermark = self._feed.watermark()
            outcome = self.poll()
            if outcome is not None:
                return outcome
            await self._feed.advanced(watermark)


class OperationCompletionWatch:
    """One watcher of an operation. All its watchers get the same outcome, even if retention drops
    it.

    It counts as a watcher until it is resolved or closed, or its process ends.
    """

    def __init__(self, source: Source, pending: Pending) -> None:
        self.id = pending.id
        self._source = source
        self._outcome = pending.outcome
        watching: Watching = pending.place, source.participant
        self._watching = [watching] if self._outcome is None else []
        self._pending = pending

    def wait(self, timeout: float | None = None) -> OperationTerminalOutcome:
        """Block until the operation has ended; its outcome.

        Raises `TimeoutError` after `timeout` seconds and `EpochSealed` when the epoch ends. Raises
        `OutcomeDropped` if the epoch had no room to keep this outcome, because too many operations
        ran; or if the watch was closed before, and retention has dropped the outcome.
        """
        deadline = deadline_after(timeout, "OperationCompletionWatch.wait")
        if self._outcome is None:
            self._resolve(self._pending.wait(deadline))
        assert self._outcome is not None
        return self._outcome

    def __await__(self) -> Generator[object, None, OperationTerminalOutcome]:
        return self._wait_async().__await__()

    async def _wait_async(self) -> OperationTerminalOutcome:
        if self._outcome is None:
            self._resolve(await self._pending.wait_async())
        assert self._outcome is not None
        return self._outcome

    def _resolve(self, outcome: OperationTerminalOutcome) -> None:
        self._outcome = outcome
        self.close()

    def close(self) -> None:
        """Stop watching."""
        try:
            watching = self._watching.pop()  # atomic, since two threads may wait on one watch
        except IndexError:
            return
        self._source.unwatch([watching])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class _Turn:
    """One wait at a barrier. A parent's wait does not count in a forked child.

    Only its call has a reference to it. So it ends with the call, in whatever way the call ends.
    """

    def __init__(self) -> None:
        self.ended = False
        self._pid = os.getpid()

    @property
    def over(self) -> bool:
        return self.ended or self._pid != os.getpid()


class WaitAll:
    """The one barrier of a registry handle. It has no reference to the handle, so the handle and
    its mapping are freed with the last user."""

    def __init__(self) -> None:
        # In the order of arrival: the first one waits, and the others are refused.
        self._turns: list[weakref.ref[_Turn]] = []

    def wait(
        self,
        source: Source,
        run_id: RunId,
        ids: Sequence[OperationId],
        timeout: float | None,
    ) -> WaitAllResult:
        deadline, turn = deadline_after(timeout, "wait_all"), _Turn()
        try:
            self._begin(turn)
            with _Watched(source, ids) as watched:
                for pause in pauses(*_PAUSES_S):
                    if watched.watch():
                        break
                    if _remaining(deadline) == 0:
                        raise TimeoutError(
                            f"a transition of the epoch took longer than {timeout} s"
                        )
                    time.sleep(pause)
                outcomes = [pending.wait(deadline) for pending in watched.pending]
        finally:
            turn.ended = True
        return _satisfied(run_id, ids, outcomes)

    async def wait_async(
        self, source: Source, run_id: RunId, ids: Sequence[OperationId]
    ) -> WaitAllResult:
        turn = _Turn()
        try:
            self._begin(turn)
            with _Watched(source, ids) as watched:
                for pause in pauses(*_PAUSES_S):
                    if watched.watch():
                        break
                    await asyncio.sleep(pause)
                outcomes = [await pending.wait_async() for pending in watched.pending]
        finally:
            turn.ended = True
        return _satisfied(run_id, ids, outcomes)

    def _begin(self, turn: _Turn) -> None:
        mine = weakref.ref(turn)
        self._turns.append(mine)
        for reference in list(self._turns):
            if reference is mine:
                return
            other = reference()
            if other is not None and not other.over:
                self._turns.remove(mine)
                raise WaitAlreadyActive
            with contextlib.suppress(ValueError):  # another wait was faster
                self._turns.remove(reference)


class _Watched:
    """The operations of one barrier. It watches those that have not ended until it is left."""

    def __init__(self, source: Source, ids: Sequence[OperationId]) -> None:
        self._source = source
        self.pending = _locate(source, ids)
        self._watching: Sequence[Watching] = ()

    def watch(self) -> bool:
        """Watch them; False if it would have to wait for a transition."""
        live = [pending.place for pending in self.pending if pending.poll() is None]
        watching = self._source.try_watch(live) if live else ()
        if watching is None:
            return False
        self._watching = watching
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._watching:
            self._source.unwatch(self._watching)


def _locate(source: Source, ids: Sequence[OperationId]) -> list[Pending]:
    seen: set[OperationId] = set()
    for id in ids:
        if id in seen:
            raise DuplicateWaitOperation(id)
        seen.add(id)
    return [source.locate(id) for id in ids]


def _satisfied(
    run_id: RunId, ids: Sequence[OperationId], outcomes: list[OperationTerminalOutcome]
) -> WaitAllResult:
    return WaitAllResult(
        outcomes=tuple(zip(ids, outcomes, strict=True)),
        satisfied=WaitAllSatisfied(
            wait_request_id=WaitRequestId.new(), run_id=run_id, operation_ids=tuple(ids)
        ),
    )


def _remaining(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.0, deadline - time.monotonic())
