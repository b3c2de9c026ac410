"""What every store keeps and promises."""

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

#: The highest position there is.
LAST_SEQ: Final[CompletionSeq] = 2**64 - 1
#: Milliseconds before and after 1970 that SQLite's integers hold.
_TIME_END: Final = 2**63


class EpochCapture(Record, kw_only=True, frozen=True):
    """What is to be saved of one epoch: all of it, or what is new since the last capture.

    `snapshot` holds new completions, the operations that changed, and the cursors as they stood
    before those were read. `sealed` says that the epoch has ended.

    Raises `CaptureInvalid` for a position outside 0..2**64-1, or 1..2**64-1 for a completion, and
    for a time of completion that has more than 64 bits with its sign.
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


@runtime_checkable
class RuntimeStore(Protocol):
    """Epochs that outlive the machine's memory. Every method may be called from any thread.

    STORE-1: what a store knows of an epoch only grows, in whatever order captures arrive. Cursors
    become the larger of both, completions are appended and never rewritten, an operation has ended
    once its completion is stored, what a recovery left out stays left out, and a sealed epoch stays
    sealed.

    STORE-2: a session has at most one current epoch: the one recorded last, until it is sealed.
    Recording a new epoch that is not sealed seals those before it; their history stays.
    """

    def save(self, captures: Sequence[EpochCapture]) -> None:
        """Record all of `captures`, or nothing of them: they are durable when this returns.

        Saving the same again changes nothing. Raises `StoreWriteFailed`, after which the same call
        may be tried again, and `StoreConflict` that names the completion stored and the other one
        offered under its sequence.
        """
        ...

    def load(
        self, session_id: SessionId, *, max_entries: int | None = None
    ) -> PersistedOpsSnapshot | None:
        """The session's current epoch; None if it has none.

        Its `entries` are the newest `max_entries`, all for None. Its `operations` are those whose
        completions these are, then those that have not ended, in the order of their registration.
        Raises `StoreLoadFailed`.
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
        """What recoveries of an epoch have left out, in order. Raises `StoreReadFailed`."""
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

        `statuses` keeps those that ended so; `from_ms` and `until_ms` those that ended at or after
        the one and before the other. What is saved meanwhile may or may not appear. Raises
        `StoreReadFailed`.
        """
        ...

    def sessions(self) -> Iterator[SessionId]:
        """Every session that the store knows, in order. Raises `StoreReadFailed`."""
        ...

    def remove(self, session_id: SessionId) -> None:
        """Forget a session and its history; of no effect if it is unknown.

        Raises `StoreWriteFailed`.
        """
        ...

    def close(self) -> None:
        """Let go of the store; what was saved stays. Whatever is asked of it later fails."""
        ...
