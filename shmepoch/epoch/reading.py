"""Operations as records for readers and stores, read without a lock."""

from __future__ import annotations

import logging

from shmepoch.epoch.completions import CompletionBatch, CompletionSeq
from shmepoch.epoch.cursors import CursorState, EpochCursorSnapshot
from shmepoch.epoch.feed import SegmentFeed
from shmepoch.epoch.operations import OperationLifecycleSnapshot
from shmepoch.epoch.persisted import PersistedOpsSnapshot
from shmepoch.epoch.table import OperationTable, OperationView
from shmepoch.events import Event, about
from shmepoch.ids import OperationId, RuntimeEpochId
from shmepoch.memory.segment import Segment

_log = logging.getLogger(__name__)


class OperationReader:
    """Reads the operations of one segment."""

    def __init__(self, segment: Segment, table: OperationTable, feed: SegmentFeed) -> None:
        self._segment = segment
        self._table = table
        self._feed = feed
        #: Whether a warning about the cursors was logged.
        self._told = False

    def list(self) -> list[OperationLifecycleSnapshot]:
        """Every operation that the registry holds, by display name."""
        return sorted(
            map(_described, self._table.held()),
            key=lambda snapshot: (snapshot.display_name, snapshot.id),
        )

    def snapshot(self, id: OperationId) -> OperationLifecycleSnapshot | None:
        """One operation, or None if the registry does not hold it."""
        view = self._table.find(id)
        return None if view is None else _described(view)

    def capture(
        self, epoch_id: RuntimeEpochId, cursor_state: CursorState, after_seq: CompletionSeq
    ) -> tuple[PersistedOpsSnapshot, CompletionBatch]:
        """The snapshot for a store that has the completions up to `after_seq`, and the batch with
        the later ones."""
        # PERSIST-1: cursors before entries. In the other order, a stored cursor could be above an
        # entry that was not stored, and that completion would never be delivered.
        cursors = self._continuable(cursor_state)
        views = {view.birth: view for view in self._table.live()}
        # After the operations: an operation that has ended meanwhile has its entry here.
        batch = self._feed.list_since(after_seq)
        floor = self._table.words().floor
        for entry in batch.entries:
            if entry.seq > floor:
                view = self._table.in_record(entry.seq, entry)
                if view is not None:
                    views[view.birth] = view
        ended = {entry.operation_id for entry in batch.entries}
        held = sorted(
            (view for view in views.values() if view.entry or view.spec.id not in ended),
            key=lambda view: view.birth,
        )
        snapshot = PersistedOpsSnapshot(
            epoch_id=epoch_id,
            operations=tuple(map(_described, held)),
            specs=tuple(view.spec for view in held),
            entries=batch.entries,
            cursors=cursors,
        )
        return snapshot, batch

    def _continuable(self, cursor_state: CursorState) -> EpochCursorSnapshot:
        """The cursors for a store. A store keeps the highest position, so a position from which the
        epoch cannot be continued would hide the consumer's real position for good."""
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
                extra=about(
                    Event.CURSOR_CAPPED,
                    session=self._segment.session_id,
                    epoch=self._segment.epoch_id,
                ),
            )
        return stored


def _described(view: OperationView) -> OperationLifecycleSnapshot:
    entry = view.entry
    return OperationLifecycleSnapshot(
        id=view.spec.id,
        kind=view.spec.kind,
        display_name=view.spec.display_name,
        status=view.status,
        peer_ready=view.detail.peer_handle is not None,
        progress_count=view.detail.progress_count,
        watcher_count=view.watchers,
        last_progress=view.detail.last_progress,
        terminal_outcome=entry.terminal_outcome if entry else None,
        child_session_id=view.spec.child_session_id,
        peer_handle=view.detail.peer_handle,
        created_at_ms=view.created_at_ms,
        started_at_ms=view.started_at_ms,
        completed_at_ms=entry.completed_at_ms if entry else None,
        elapsed_ms=view.elapsed_ms,
    )
