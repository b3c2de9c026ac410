"""The protocol of every store, and its promises."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence
from typing import Final, Protocol, runtime_checkable

from shmepoch.epoch.codec import Record
from shmepoch.epoch.completions import CompletionEntry, CompletionSeq
from shmepoch.epoch.operations import OperationStatus
from shmepoch.epoch.persisted import PersistedOpsSnapshot, SkippedRange
from shmepoch.errors import CaptureInvalid
from shmepoch.ids import RuntimeEpochId, SessionId

#: The highest possible position.
LAST_SEQ: Final[CompletionSeq] = 2**64 - 1
#: Milliseconds before and after 1970 that SQLite's integers hold.
_TIME_END: Final = 2**63


class EpochCapture(Record, kw_only=True, frozen=True):
    """One epoch to be saved: all of it, or its news since the last capture.

    `snapshot` holds new completions, the operations that changed, and the cursors from before those
    were read. `sealed` says that the epoch has ended.

    Raises `CaptureInvalid` for a position outside 0..2**64-1, for a completion's sequence outside
    1..2**64-1, and for a time of completion that does not fit a signed integer of 64 bits.
    """

    session_id: SessionId
    snapshot: PersistedOpsSnapshot
    sealed: bool = False

    def __post_init__(self) -> None:
        cursors = self.snapshot.cursors
        for name in cursors.__struct_fields__:
            self._check(name, getattr(cursors, name), 0, LAST_SEQ)
        for position in itertools.chain.from_iterable(self.snapshot.skipped):
            self._check("skipped", position, 0, LAST_SEQ)
        for entry in self.snapshot.entries:
            if not 1 <= entry.seq <= LAST_SEQ:
                self._check("seq", entry.seq, 1, LAST_SEQ)
            if not -_TIME_END <= entry.completed_at_ms < _TIME_END:
                field = f"completed_at_ms of completion {entry.seq}"
                self._check(field, entry.completed_at_ms, -_TIME_END, _TIME_END - 1)

    def _check(self, field: str, value: int, least: int, most: int) -> None:
        if not least <= value <= most:
            raise CaptureInvalid(self.snapshot.epoch_id, field, value, f"{least} to {most}")


class HistoryEntry(Record, frozen=True):
    """One completion of a session, and the epoch that it belongs to."""

    epoch_id: RuntimeEpochId
    entry: CompletionEntry


class EpochOverview(Record, kw_only=True, frozen=True):
    """What a store has of one epoch, summed up. Times are milliseconds since the Unix epoch."""

    epoch_id: RuntimeEpochId
    sealed: bool
    """Whether it has ended; else it is the session's current one."""
    ended: dict[OperationStatus, int]
    """How many operations ended with each status."""
    unfinished: int
    """How many had not ended when the store last heard of them."""
    first_at_ms: int | None = None
    """When the first of them ended; None if none has."""
    last_at_ms: int | None = None
    """When the last of them ended."""


class SessionOverview(Record, kw_only=True, frozen=True):
    """What a store has of one session: its epochs, in the order they were recorded."""

    session_id: SessionId
    epochs: tuple[EpochOverview, ...]


@runtime_checkable
class RuntimeStore(Protocol):
    """Keeps epochs beyond the life of the machine's memory. All methods may be called from any
    thread.

    STORE-1: a stored epoch only grows, in whatever order captures arrive. A cursor becomes the
    larger of both, and completions are appended and never rewritten. An operation has ended when
    its completion is stored. Skipped sequences stay skipped, and a sealed epoch stays sealed.

    STORE-2: a session has at most one current epoch: the last recorded one, until it is sealed.
    Recording a new epoch that is not sealed seals the earlier ones; their history stays.
    """

    def save(self, captures: Sequence[EpochCapture]) -> None:
        """Record all of `captures`, or none: they are durable when this returns.

        Saving the same captures again changes nothing. Raises `StoreWriteFailed`, after which the
        same call may be tried again. Raises `StoreConflict`, which names the stored completion and
        the other one that has the same sequence.
        """
        ...

    def load(
        self, session_id: SessionId, *, max_entries: int | None = None
    ) -> PersistedOpsSnapshot | None:
        """The session's current epoch; None if it has none.

        Its `entries` are the newest `max_entries`, or all for None. Its `operations` are those of
        these entries, then those that have not ended, in the order of their registration. Raises
        `StoreLoadFailed`.
        """
        ...

    def last_seq(self, epoch_id: RuntimeEpochId) -> CompletionSeq:
        """The highest sequence stored of an epoch; 0 if there is none. Raises `StoreReadFailed`."""
        ...

    def list_entries(
        self,
        epoch_id: RuntimeEpochId,
        after_seq: CompletionSeq = 0,
        through_seq: CompletionSeq = LAST_SEQ,
        limit: int | None = None,
    ) -> list[CompletionEntry]:
        """The stored completions of an epoch above `after_seq`, up to and including `through_seq`,
        in order; the first `limit` of them. Raises `StoreReadFailed`."""
        ...

    def list_skipped(self, epoch_id: RuntimeEpochId) -> list[SkippedRange]:
        """The sequences that recoveries of an epoch skipped, in order. Raises `StoreReadFailed`."""
        ...

    def history(
        self,
        session_id: SessionId,
        *,
        statuses: Collection[OperationStatus] | None = None,
        from_ms: int | None = None,
        until_ms: int | None = None,
    ) -> Iterator[HistoryEntry]:
        """The completions of every epoch of a session, epochs in the order they were recorded.

        `statuses` selects by the final status; `from_ms` and `until_ms` select operations that
        ended at or after the first time and before the second. Completions that are saved meanwhile
        may or may not appear. Raises `StoreReadFailed`.
        """
        ...

    def sessions(self) -> Iterator[SessionId]:
        """Every session that the store knows, in order. Raises `StoreReadFailed`."""
        ...

    def overview(self) -> Iterator[SessionOverview]:
        """What the store has of every session, summed up, in the order of `sessions`. Raises
        `StoreReadFailed`."""
        ...

    def remove(self, session_id: SessionId) -> None:
        """Remove a session and its history; no effect if it is unknown.

        Raises `StoreWriteFailed`.
        """
        ...

    def close(self) -> None:
        """Close the store. Saved epochs stay; every later call fails."""
        ...
