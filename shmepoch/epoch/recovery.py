"""Recovery: what is recovered of a stored epoch, and its completions laid into fresh memory."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from itertools import pairwise

from msgspec.structs import asdict, replace

from shmepoch.epoch.codec import to_wire
from shmepoch.epoch.completions import CompletionEntry
from shmepoch.epoch.feed import NO_SLOT, SegmentFeed
from shmepoch.epoch.operations import OperationLifecycleSnapshot, OperationSpec, OperationStatus
from shmepoch.epoch.persisted import PersistedOpsSnapshot
from shmepoch.epoch.slots import Detail, encode_spec
from shmepoch.epoch.table import OperationTable
from shmepoch.errors import RecordInvalid, RecoveryNeedsRoom
from shmepoch.ids import OperationId, SessionId
from shmepoch.memory import layout as at
from shmepoch.memory.layout import OpsLifecycleConfig
from shmepoch.memory.segment import Segment

_log = logging.getLogger(__name__)

#: Sequences grow from where recovery puts them; half of the range is left for that.
_LAST_SEQ_LIMIT = 2**63


def require_consistent(snapshot: PersistedOpsSnapshot) -> None:
    """RECOVERY-3: `RecordInvalid` for what is no history of one epoch: a completion of sequence 0,
    completions out of order, an operation that ended twice or is in there twice."""
    for entry in snapshot.entries[:1]:
        if entry.seq < 1:
            raise _invalid(f"the completion of operation {entry.operation_id} has sequence 0")
    for before, after in pairwise(snapshot.entries):
        if after.seq <= before.seq:
            raise _invalid(f"its entries go from {before.seq} to {after.seq}")
    for after_seq, through in snapshot.skipped:
        if after_seq > through:
            raise _invalid(f"it skipped the sequences above {after_seq} and through {through}")
    for what, ids in (
        ("ended twice", (entry.operation_id for entry in snapshot.entries)),
        ("is among its operations twice", (operation.id for operation in snapshot.operations)),
        ("is among its specs twice", (spec.id for spec in snapshot.specs)),
    ):
        twice = _first_repeated(ids)
        if twice is not None:
            raise _invalid(f"operation {twice} {what}")


def _first_repeated(ids: Iterable[OperationId]) -> OperationId | None:
    seen: set[OperationId] = set()
    for id in ids:
        if id in seen:
            return id
        seen.add(id)
    return None


def _invalid(reason: str) -> RecordInvalid:
    return RecordInvalid("PersistedOpsSnapshot", reason)


def unfinished_operations(
    snapshot: PersistedOpsSnapshot,
) -> list[tuple[OperationLifecycleSnapshot, OperationSpec]]:
    """The operations that had not ended when the epoch was stored, as far as their specs were."""
    specs = {spec.id: spec for spec in snapshot.specs}
    return [
        (operation, specs[operation.id])
        for operation in snapshot.operations
        if not operation.status.is_terminal and operation.id in specs
    ]


def room_for(
    snapshot: PersistedOpsSnapshot, config: OpsLifecycleConfig, *, unfinished: bool
) -> OpsLifecycleConfig:
    """`config`, with more room where a recovery of `snapshot` takes more.

    Every completion must fit the feed, and with `unfinished` every operation that had not ended
    must fit the table. How much is retained is for `config` alone to say. Raises `RecordInvalid`
    for what cannot be recovered.
    """
    require_consistent(snapshot)
    operations = len(unfinished_operations(snapshot)) if unfinished else 0
    max_operations = max(config.max_operations, operations)
    largest = max((len(to_wire(entry)) for entry in snapshot.entries), default=0) + 2 * at.WORD
    return replace(
        config,
        max_operations=max_operations,
        feed_bytes=max(
            config.feed_bytes,
            at.least_feed_bytes(max_operations),
            largest // at.WORD * at.WORD,
        ),
    )


def require_room(
    snapshot: PersistedOpsSnapshot, config: OpsLifecycleConfig, *, unfinished: bool
) -> None:
    """`RecoveryNeedsRoom` unless an epoch of this size holds what a recovery brings back."""
    needed = asdict(room_for(snapshot, config, unfinished=unfinished))
    for setting, given in asdict(config).items():
        if needed[setting] != given:
            raise RecoveryNeedsRoom(snapshot.epoch_id, setting, needed[setting], given)


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
        raise _invalid(f"its last sequence is {last}, above 2**63")
    if snapshot.recovered_cursors != snapshot.cursors:
        _log.warning(
            "epoch %s: it cannot be continued from %s, since a cursor may be at 2**62 at most; "
            "it goes on from %s",
            snapshot.epoch_id,
            snapshot.cursors,
            snapshot.recovered_cursors,
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
                birth, session_id = len(retained), segment.session_id
                slot = _restore_operation(table, operation, spec, birth, seq, session_id)
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
    session_id: SessionId,
) -> int:
    [index] = table.free_slots(1)
    encoded = encode_spec(spec, session_id)
    table.fill(index, birth, encoded, operation.created_at_ms, 0)
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
