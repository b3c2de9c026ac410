"""Recovery: it checks a stored epoch, and writes its completions into fresh memory."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from itertools import count, pairwise
from typing import TypeAlias

from msgspec.structs import asdict, replace

from shmepoch import _native as at
from shmepoch.config import OpsLifecycleConfig, least_feed_bytes
from shmepoch.epoch.completions import CompletionEntry
from shmepoch.epoch.encoding import Detail, encode_detail, encode_head, encode_outcome, encode_spec
from shmepoch.epoch.operations import LAST_COUNT, OperationLifecycleSnapshot, OperationSpec
from shmepoch.epoch.persisted import PersistedOpsSnapshot
from shmepoch.errors import RecordInvalid, RecoveryNeedsRoom
from shmepoch.events import Event, about
from shmepoch.ids import OperationId
from shmepoch.memory.layout import Layout
from shmepoch.memory.segment import Segment

_log = logging.getLogger(__name__)

RestoredRecord: TypeAlias = tuple[
    int, int, int, int, int, int, OperationId, bytes, bytes, bytes, bytes
]

#: The limit for recovered sequences: half of the range is left for new ones.
_LAST_SEQ_LIMIT = 2**63


def require_consistent(snapshot: PersistedOpsSnapshot) -> None:
    """RECOVERY-3: raise `RecordInvalid` if this is not the history of one epoch: a completion has
    sequence 0, completions are out of order, or an operation ended or is listed twice."""
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
    """The operations that had not ended when the epoch was stored, and whose specs were stored."""
    specs = {spec.id: spec for spec in snapshot.specs}
    return [
        (operation, specs[operation.id])
        for operation in snapshot.operations
        if not operation.status.is_terminal and operation.id in specs
    ]


def room_for(
    snapshot: PersistedOpsSnapshot, config: OpsLifecycleConfig, *, unfinished: bool
) -> OpsLifecycleConfig:
    """`config`, with more room if a recovery of `snapshot` needs more.

    Every completion must fit the feed, and with `unfinished` every operation that had not ended
    must fit the table. Only `config` decides how much is retained. Raises `RecordInvalid` for a
    snapshot that cannot be recovered.
    """
    require_consistent(snapshot)
    operations = len(unfinished_operations(snapshot)) if unfinished else 0
    max_operations = max(config.max_operations, operations)
    largest = max(map(_record_size, snapshot.entries), default=0)
    return replace(
        config,
        max_operations=max_operations,
        feed_bytes=max(config.feed_bytes, least_feed_bytes(max_operations), largest),
    )


def _record_size(entry: CompletionEntry) -> int:
    """The largest size of an entry's record."""
    first = encode_head(entry.kind, entry.display_name) + encode_outcome(entry.terminal_outcome)
    return Layout.record_size(len(first), at.SPEC_LIMIT + at.DETAIL_LIMIT)


def require_room(
    snapshot: PersistedOpsSnapshot, config: OpsLifecycleConfig, *, unfinished: bool
) -> None:
    """Raise `RecoveryNeedsRoom` if an epoch of this size cannot hold the recovered snapshot."""
    needed = asdict(room_for(snapshot, config, unfinished=unfinished))
    for setting, given in asdict(config).items():
        if needed[setting] != given:
            raise RecoveryNeedsRoom(snapshot.epoch_id, setting, needed[setting], given)


def restore_completions(segment: Segment, snapshot: PersistedOpsSnapshot, *, skip: int) -> None:
    """Write the entries and the terminal operations, and set the next sequence (RECOVERY-1).

    The newest entries are kept, as many as the feed holds. Sequences that are passed over, because
    a cursor is above the last entry or because of `skip`, will never have an entry.
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
            extra=about(
                Event.CURSOR_CAPPED, session=segment.session_id, epoch=snapshot.epoch_id, seq=last
            ),
        )
    assert segment.layout.config is not None
    floor = newest - segment.layout.config.max_completed
    operations = {operation.id: operation for operation in snapshot.operations}
    specs = {spec.id: spec for spec in snapshot.specs}
    room, records = segment.layout.feed_bytes, list[_Record]()
    for entry in reversed(snapshot.entries):
        operation = operations.get(entry.operation_id) if entry.seq > floor else None
        spec = specs.get(entry.operation_id)
        record = _Record(entry, operation, spec or _spec_of(operation, segment), segment)
        room -= record.size
        if room < 0 or last - entry.seq >= segment.layout.entries:
            break
        records.append(record)
    records.reverse()
    births = count(1)
    segment.epoch.restore(
        tuple([record.at_birth(next(births) if record.held else 0) for record in records]),
        records[0].seq - 1 if records else last,
        last,
        newest,
    )


class _Record:
    """A completion to restore, with the facts of its operation if that is retained."""

    def __init__(
        self,
        entry: CompletionEntry,
        operation: OperationLifecycleSnapshot | None,
        spec: OperationSpec | None,
        segment: Segment,
    ) -> None:
        self.seq = entry.seq
        self.held = operation is not None
        self._id = entry.operation_id
        self._completed_ms = entry.completed_at_ms
        self._created_ms = self._started = self._elapsed_ms = 0
        self._head = encode_head(entry.kind, entry.display_name)
        self._outcome = encode_outcome(entry.terminal_outcome)
        self._rest = self._detail = b""
        if len(self._head) > at.HEAD_LIMIT:
            raise _invalid(f"the display_name of operation {entry.operation_id} is too long")
        if entry.completed_at_ms > LAST_COUNT:
            raise _invalid(f"operation {entry.operation_id} ended at {entry.completed_at_ms}")
        if operation is not None and spec is not None:
            self._rest = encode_spec(spec, segment.session_id).rest
            self._detail = encode_detail(Detail.of(operation))
            self._created_ms = operation.created_at_ms
            self._started = 0 if operation.started_at_ms is None else operation.started_at_ms + 1
            self._elapsed_ms = operation.elapsed_ms or 0

    @property
    def size(self) -> int:
        """Its bytes in the feed."""
        first, second = self._head + self._outcome, self._rest + self._detail
        return Layout.record_size(len(first), len(second))

    def at_birth(self, birth: int) -> RestoredRecord:
        """The record as the native module takes it."""
        return (
            self.seq,
            birth,
            self._created_ms,
            self._started,
            self._completed_ms,
            self._elapsed_ms,
            self._id,
            self._head,
            self._outcome,
            self._rest,
            self._detail,
        )


def _spec_of(
    operation: OperationLifecycleSnapshot | None, segment: Segment
) -> OperationSpec | None:
    """A spec for a terminal operation that was stored without one."""
    if operation is None:
        return None
    return OperationSpec(
        id=operation.id,
        kind=operation.kind,
        owner_session_id=segment.session_id,
        display_name=operation.display_name,
        source_label="",
        child_session_id=operation.child_session_id,
    )
