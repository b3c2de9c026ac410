"""Recovery: laying a stored epoch's completions into fresh memory that nobody uses yet."""

from __future__ import annotations

from itertools import pairwise

from shmepoch.epoch.codec import to_wire
from shmepoch.epoch.completions import CompletionEntry
from shmepoch.epoch.feed import NO_SLOT, SegmentFeed
from shmepoch.epoch.operations import OperationLifecycleSnapshot, OperationSpec, OperationStatus
from shmepoch.epoch.persisted import PersistedOpsSnapshot
from shmepoch.epoch.table import Detail, OperationTable, encode_spec
from shmepoch.errors import RecordInvalid
from shmepoch.memory import layout as at
from shmepoch.memory.segment import Segment

#: Sequences grow from where recovery puts them; half of the range is left for that.
_LAST_SEQ_LIMIT = 2**63


def restore_completions(
    segment: Segment,
    feed: SegmentFeed,
    table: OperationTable,
    snapshot: PersistedOpsSnapshot,
    *,
    skip: int,
) -> None:
    """Lay in the entries and the terminal operations, and set the next sequence (RECOVERY-1).

    The newest entries are kept, as many as the feed holds. Sequences that have no entry, because
    a cursor stands above the last one or `skip` says so, will never have one.
    """
    newest, last = snapshot.left_out(skip)
    if last > _LAST_SEQ_LIMIT:
        raise RecordInvalid("PersistedOpsSnapshot", f"its last sequence is {last}, above 2**63")
    for before, after in pairwise(snapshot.entries):
        if after.seq <= before.seq:
            raise RecordInvalid(
                "PersistedOpsSnapshot", f"its entries go from {before.seq} to {after.seq}"
            )
    capacity, budget = segment.layout.ring[1], segment.layout.ring[3]
    kept: dict[int, tuple[CompletionEntry, bytes]] = {}
    for entry in reversed(snapshot.entries):
        data = to_wire(entry)
        budget -= len(data) + at.WORD
        if budget < 0 or last - entry.seq >= capacity:
            break
        kept[entry.seq] = entry, data
    dropped = min(kept, default=last + 1) - 1

    operations = {operation.id: operation for operation in snapshot.operations}
    specs = {spec.id: spec for spec in snapshot.specs}
    memory, position = segment.memory, 0
    retained: list[int] = []
    assert segment.layout.config is not None
    floor = newest - segment.layout.config.max_completed
    for seq in range(dropped + 1, last + 1):
        slot = NO_SLOT
        if seq in kept:
            entry, data = kept[seq]
            operation = operations.get(entry.operation_id)
            if seq > floor and operation is not None:
                spec = specs.get(entry.operation_id) or _spec_of(operation, segment)
                retained.append(seq)
                slot = _restore_operation(table, operation, spec, len(retained), seq)
                memory.store(at.REGISTRATIONS_AT, len(retained))
        else:
            data = b""
        position = feed.put(seq, position, data, slot)
    memory.store(at.DROPPED_AT, dropped)
    memory.store(at.COLLECTED_AT, min(retained, default=last + 1) - 1)
    memory.store(at.ORIGIN_AT, last - len(retained))
    memory.store(at.WATERMARK_AT, last)
    memory.store(at.SKIPPED_AT, newest)
    memory.store(at.SKIPPED_AT + at.WORD, last)
    memory.store(at.RECLAIMED_AT, max(0, table.floor(table.words())))


def _restore_operation(
    table: OperationTable,
    operation: OperationLifecycleSnapshot,
    spec: OperationSpec,
    birth: int,
    seq: int,
) -> int:
    [index] = table.free_slots(1)
    table.fill(index, birth, encode_spec(spec), operation.created_at_ms, 0)
    slot = table.slot(index)
    table.change(slot, OperationStatus.RUNNING, Detail.of(operation))
    table.end(slot, seq, operation.elapsed_ms or 0)
    return index


def _spec_of(operation: OperationLifecycleSnapshot, segment: Segment) -> OperationSpec:
    return OperationSpec(
        id=operation.id,
        kind=operation.kind,
        owner_session_id=segment.session_id,
        display_name=operation.display_name,
        source_label="",
        child_session_id=operation.child_session_id,
    )
