"""The operations in a store: kept apart from their completions, and joined again on load."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

from shmepoch.epoch.codec import Record
from shmepoch.epoch.completions import CompletionEntry
from shmepoch.epoch.cursors import EpochCursorSnapshot
from shmepoch.epoch.operations import OperationLifecycleSnapshot, OperationSpec, status_of
from shmepoch.epoch.persisted import PersistedOpsSnapshot, SkippedRange
from shmepoch.ids import OperationId, RuntimeEpochId


class StoredOperation(Record, frozen=True):
    """One operation without its outcome, which is in its completion."""

    lifecycle: OperationLifecycleSnapshot
    spec: OperationSpec | None


def stored_operations(snapshot: PersistedOpsSnapshot) -> dict[OperationId, StoredOperation]:
    """The operations of a capture in their stored form, in the capture's order."""
    specs = {spec.id: spec for spec in snapshot.specs}
    return {
        operation.id: StoredOperation(
            msgspec.structs.replace(operation, terminal_outcome=None), specs.get(operation.id)
        )
        for operation in snapshot.operations
    }


def unfinished(operations: Mapping[OperationId, StoredOperation]) -> Iterable[OperationId]:
    """The operations of a capture that had not ended when it was made."""
    return (id for id, stored in operations.items() if not stored.lifecycle.status.is_terminal)


def assemble(
    epoch_id: RuntimeEpochId,
    cursors: EpochCursorSnapshot,
    entries: Iterable[tuple[CompletionEntry, StoredOperation | None]],
    live: Iterable[StoredOperation],
    skipped: Iterable[SkippedRange],
) -> PersistedOpsSnapshot:
    """Join the parts of a stored epoch for a recovery."""
    pairs = list(entries)
    operations = [_ended(stored, entry) for entry, stored in pairs if stored is not None]
    operations += live
    return PersistedOpsSnapshot(
        epoch_id=epoch_id,
        operations=tuple(stored.lifecycle for stored in operations),
        specs=tuple(stored.spec for stored in operations if stored.spec is not None),
        entries=tuple(entry for entry, _ in pairs),
        cursors=cursors,
        skipped=tuple(skipped),
    )


def _ended(stored: StoredOperation, entry: CompletionEntry) -> StoredOperation:
    """An operation after its completion, even if it was last stored before its end."""
    lifecycle = stored.lifecycle
    elapsed_ms = lifecycle.elapsed_ms
    if elapsed_ms is None:
        elapsed_ms = max(0, entry.completed_at_ms - lifecycle.created_at_ms)
    ended = msgspec.structs.replace(
        lifecycle,
        status=status_of(entry.terminal_outcome),
        watcher_count=0,
        terminal_outcome=entry.terminal_outcome,
        completed_at_ms=entry.completed_at_ms,
        elapsed_ms=elapsed_ms,
    )
    return StoredOperation(ended, stored.spec)
