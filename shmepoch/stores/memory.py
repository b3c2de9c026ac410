"""A store in memory, which is lost when its process ends: for tests and experiments."""

from __future__ import annotations

import operator
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from types import TracebackType
from typing import Final, Self

from shmepoch.epoch.completions import CompletionEntry, CompletionSeq
from shmepoch.epoch.cursors import EpochCursorSnapshot
from shmepoch.epoch.operations import OperationStatus, status_of
from shmepoch.epoch.persisted import PersistedOpsSnapshot, SkippedRange
from shmepoch.errors import StoreConflict, StoreLoadFailed, StoreReadFailed, StoreWriteFailed
from shmepoch.ids import OperationId, RuntimeEpochId, SessionId
from shmepoch.stores.operations import StoredOperation, assemble, stored_operations, unfinished
from shmepoch.stores.protocol import (
    LAST_SEQ,
    EpochCapture,
    EpochOverview,
    HistoryEntry,
    SessionOverview,
)

_CLOSED: Final = "it was closed"


class _Epoch:
    """One recorded epoch. A save changes a copy, so readers need no lock."""

    def __init__(self, session_id: SessionId) -> None:
        self.session_id: Final = session_id
        self.sealed = False
        self.cursors = EpochCursorSnapshot()
        self.skipped: dict[CompletionSeq, CompletionSeq] = {}
        self.entries: dict[CompletionSeq, CompletionEntry] = {}
        self.ended: dict[OperationId, StoredOperation | None] = {}
        self.live: dict[OperationId, StoredOperation] = {}

    def copy(self) -> _Epoch:
        other = _Epoch(self.session_id)
        other.sealed, other.cursors = self.sealed, self.cursors
        other.skipped = self.skipped.copy()
        other.entries, other.ended = self.entries.copy(), self.ended.copy()
        other.live = self.live.copy()
        return other

    def merge(self, capture: EpochCapture) -> None:
        snapshot = capture.snapshot
        self.sealed |= capture.sealed
        self.cursors = EpochCursorSnapshot(
            **{
                name: max(getattr(self.cursors, name), getattr(snapshot.cursors, name))
                for name in EpochCursorSnapshot.__struct_fields__
            }
        )
        for after, through in snapshot.skipped:
            self.skipped[after] = max(through, self.skipped.get(after, 0))
        operations = stored_operations(snapshot)
        for entry in snapshot.entries:
            stored = self.entries.get(entry.seq)
            if stored is None:
                id = entry.operation_id
                self.entries[entry.seq] = entry
                self.ended[id] = operations.get(id) or self.live.get(id)
            elif stored != entry:
                raise StoreConflict(snapshot.epoch_id, f"the completion {entry.seq}", stored, entry)
        self.live.update((id, operations[id]) for id in unfinished(operations))
        self.live = {id: stored for id, stored in self.live.items() if id not in self.ended}

    def overview(self, epoch_id: RuntimeEpochId) -> EpochOverview:
        times = [entry.completed_at_ms for entry in self.entries.values()]
        return EpochOverview(
            epoch_id=epoch_id,
            sealed=self.sealed,
            ended=Counter(status_of(entry.terminal_outcome) for entry in self.entries.values()),
            unfinished=len(self.live),
            first_at_ms=min(times, default=None),
            last_at_ms=max(times, default=None),
        )

    def between(self, after: CompletionSeq, through: CompletionSeq) -> list[CompletionEntry]:
        return [self.entries[seq] for seq in sorted(self.entries) if after < seq <= through]


class InMemoryRuntimeStore:
    """A `RuntimeStore` in this process's memory."""

    def __init__(self) -> None:
        #: A signal handler or a finalizer may save in the middle of its own thread's save.
        self._lock = threading.RLock()
        self._epochs: dict[RuntimeEpochId, _Epoch] | None = {}

    def save(self, captures: Sequence[EpochCapture]) -> None:
        def merged(epochs: dict[RuntimeEpochId, _Epoch]) -> dict[RuntimeEpochId, _Epoch]:
            epochs = epochs.copy()
            for capture in captures:
                _merge(epochs, capture)
            return epochs

        self._change(merged)

    def _change(
        self, make: Callable[[dict[RuntimeEpochId, _Epoch]], dict[RuntimeEpochId, _Epoch]]
    ) -> None:
        with self._lock:
            while True:
                before = self._epochs
                if before is None:
                    raise StoreWriteFailed(_CLOSED)
                after = make(before)
                # Between these two lines there is no call, so no other code can run.
                if self._epochs is before:
                    self._epochs = after
                    return

    def load(
        self, session_id: SessionId, *, max_entries: int | None = None
    ) -> PersistedOpsSnapshot | None:
        if self._epochs is None:
            raise StoreLoadFailed(session_id, _CLOSED)
        for epoch_id, epoch in self._epochs.items():
            if epoch.session_id == session_id and not epoch.sealed:
                entries = epoch.between(0, LAST_SEQ)
                if max_entries is not None:
                    entries = entries[max(0, len(entries) - operator.index(max_entries)) :]
                return assemble(
                    epoch_id,
                    epoch.cursors,
                    ((entry, epoch.ended[entry.operation_id]) for entry in entries),
                    epoch.live.values(),
                    sorted(epoch.skipped.items()),
                )
        return None

    def last_seq(self, epoch_id: RuntimeEpochId) -> CompletionSeq:
        epoch = self._readable().get(epoch_id)
        return max(epoch.entries, default=0) if epoch else 0

    def list_entries(
        self,
        epoch_id: RuntimeEpochId,
        after_seq: CompletionSeq = 0,
        through_seq: CompletionSeq = LAST_SEQ,
        limit: int | None = None,
    ) -> list[CompletionEntry]:
        epoch = self._readable().get(epoch_id)
        return epoch.between(after_seq, through_seq)[:limit] if epoch else []

    def list_skipped(self, epoch_id: RuntimeEpochId) -> list[SkippedRange]:
        epoch = self._readable().get(epoch_id)
        return sorted(epoch.skipped.items()) if epoch else []

    def history(
        self,
        session_id: SessionId,
        *,
        statuses: Collection[OperationStatus] | None = None,
        from_ms: int | None = None,
        until_ms: int | None = None,
    ) -> Iterator[HistoryEntry]:
        for epoch_id, epoch in self._readable().items():
            if epoch.session_id == session_id:
                for entry in epoch.between(0, LAST_SEQ):
                    if (
                        (statuses is None or status_of(entry.terminal_outcome) in statuses)
                        and (from_ms is None or from_ms <= entry.completed_at_ms)
                        and (until_ms is None or entry.completed_at_ms < until_ms)
                    ):
                        yield HistoryEntry(epoch_id, entry)

    def sessions(self) -> Iterator[SessionId]:
        return iter(sorted({epoch.session_id for epoch in self._readable().values()}))

    def overview(self) -> Iterator[SessionOverview]:
        for session_id in self.sessions():
            epochs = self._readable().items()
            yield SessionOverview(
                session_id=session_id,
                epochs=tuple(e.overview(id) for id, e in epochs if e.session_id == session_id),
            )

    def remove(self, session_id: SessionId) -> None:
        self._change(
            lambda epochs: {id: e for id, e in epochs.items() if e.session_id != session_id}
        )

    def close(self) -> None:
        self._epochs = None

    def _readable(self) -> dict[RuntimeEpochId, _Epoch]:
        if self._epochs is None:
            raise StoreReadFailed(_CLOSED)
        return self._epochs

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _merge(epochs: dict[RuntimeEpochId, _Epoch], capture: EpochCapture) -> None:
    epoch_id, session_id = capture.snapshot.epoch_id, capture.session_id
    epoch = epochs.get(epoch_id)
    if epoch is None:
        if not capture.sealed:
            for id, other in epochs.items():
                if other.session_id == session_id and not other.sealed:
                    epochs[id] = other.copy()
                    epochs[id].sealed = True
        epoch = _Epoch(session_id)
    elif epoch.session_id != session_id:
        raise StoreConflict(epoch_id, "the session", epoch.session_id, session_id)
    epochs[epoch_id] = epoch = epoch.copy()
    epoch.merge(capture)
