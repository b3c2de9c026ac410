"""Operations as records: what readers and stores are given of them, read without a lock."""

from __future__ import annotations

import logging

from shmepoch.epoch.completions import CompletionBatch, CompletionEntry, CompletionSeq
from shmepoch.epoch.cursors import CursorState, EpochCursorSnapshot
from shmepoch.epoch.feed import SegmentFeed
from shmepoch.epoch.operations import OperationLifecycleSnapshot, status_of
from shmepoch.epoch.persisted import PersistedOpsSnapshot
from shmepoch.epoch.slots import OperationView, Slot
from shmepoch.epoch.table import OperationTable
from shmepoch.ids import RuntimeEpochId
from shmepoch.memory.segment import Segment

_log = logging.getLogger(__name__)


class OperationReader:
    """Reads the operations of one segment: their slots, and the entries that ended them."""

    def __init__(self, segment: Segment, table: OperationTable, feed: SegmentFeed) -> None:
        self._segment = segment
        self._table = table
        self._feed = feed
        #: Whether a warning of the cursors was logged.
        self._told = False

    def list(self) -> list[OperationLifecycleSnapshot]:
        """Every operation that the registry holds, by display name."""
        found = (self.snapshot(slot) for slot in self._table.held())
        return sorted(
            (snapshot for snapshot in found if snapshot is not None),
            key=lambda snapshot: (snapshot.display_name, snapshot.id),
        )

    def snapshot(self, slot: Slot) -> OperationLifecycleSnapshot | None:
        """The operation in `slot`, or None if it is not held any more."""
        view = self._table.view(slot)
        if view is None:
            return None
        entry = None
        if view.slot.terminal_seq:
            entry = self._feed.entry(view.slot.terminal_seq)
            if entry is None:
                return None  # dropped from the feed since, and with it from the registry
        return self._described(view, entry)

    def capture(
        self, epoch_id: RuntimeEpochId, cursor_state: CursorState, after_seq: CompletionSeq
    ) -> tuple[PersistedOpsSnapshot, CompletionBatch]:
        """What a store needs that has the completions up to `after_seq`, and the batch that the
        others came in."""
        # PERSIST-1: cursors before entries. The other way round, a cursor could be stored that is
        # above an entry that was not, and that completion would never be delivered.
        cursors = self._continuable(cursor_state)
        slots = (s for s in self._table.held() if not 0 < s.terminal_seq <= after_seq)
        views = [view for slot in slots if (view := self._table.view(slot))]
        views.sort(key=lambda view: view.slot.birth)
        # After the operations: one that has ended has its entry here, unless it was dropped since.
        batch = self._feed.list_since(after_seq)
        entries = {entry.seq: entry for entry in batch.entries}
        held = [v for v in views if not v.slot.terminal_seq or v.slot.terminal_seq in entries]
        snapshot = PersistedOpsSnapshot(
            epoch_id=epoch_id,
            operations=tuple(self._described(v, entries.get(v.slot.terminal_seq)) for v in held),
            specs=tuple(view.spec for view in held),
            entries=batch.entries,
            cursors=cursors,
        )
        return snapshot, batch

    def _described(
        self, view: OperationView, entry: CompletionEntry | None
    ) -> OperationLifecycleSnapshot:
        return OperationLifecycleSnapshot(
            id=view.spec.id,
            kind=view.spec.kind,
            display_name=view.spec.display_name,
            status=status_of(entry.terminal_outcome) if entry else view.slot.status,
            peer_ready=view.detail.peer_handle is not None,
            progress_count=view.detail.progress_count,
            watcher_count=0 if entry else self._table.watchers(view.slot),
            last_progress=view.detail.last_progress,
            terminal_outcome=entry.terminal_outcome if entry else None,
            child_session_id=view.spec.child_session_id,
            peer_handle=view.detail.peer_handle,
            created_at_ms=view.slot.created_at_ms,
            started_at_ms=view.detail.started_at_ms,
            completed_at_ms=entry.completed_at_ms if entry else None,
            elapsed_ms=view.slot.elapsed_ms if entry else None,
        )

    def _continuable(self, cursor_state: CursorState) -> EpochCursorSnapshot:
        """The cursors for a store, which keeps the highest it is given: one that it could not be
        continued from would hide where the consumer really is for good."""
        cursors = cursor_state.snapshot()
        stored = cursors.continuable(self._feed.watermark())
        if stored != cursors and not self._told:
            self._told = True
            _log.warning(
                "epoch %s: no store takes %s, since a cursor may be at 2**62 at most; it is given "
                "%s",
                self._segment.epoch_id,
                cursors,
                stored,
            )
        return stored
