"""A summary of every epoch in shared memory, for the people who run them.

MONITOR-1: a summary takes no lock and changes nothing. It also works for an epoch whose processes
are all dead, or whose writer is stopped in the middle of a transition.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from enum import StrEnum
from typing import Final, TypeVar

import msgspec

from shmepoch import _native as at
from shmepoch._native import is_locked
from shmepoch.epoch.codec import Record
from shmepoch.epoch.completions import CompletionSeq
from shmepoch.epoch.cursors import EpochCursorSnapshot
from shmepoch.epoch.operations import Count, OperationStatus
from shmepoch.epoch.table import STATUSES, OperationTable
from shmepoch.errors import LayoutUnsupported, SegmentCorrupted, SegmentForeign
from shmepoch.ids import RuntimeEpochId, SessionId
from shmepoch.memory.namespaces import list_segments, segment_path
from shmepoch.memory.participants import Participant, Role
from shmepoch.memory.segment import ObservedSegment

T = TypeVar("T")

#: The errors for a segment that cannot be read.
DAMAGE: Final = (SegmentCorrupted, SegmentForeign, LayoutUnsupported)


class EpochState(StrEnum):
    """The state of an epoch, as far as its segment tells."""

    OPEN = "open"
    """Processes have it attached, and it takes changes."""
    SEALED = "sealed"
    """Its runtime has ended it."""
    ABANDONED = "abandoned"
    """It takes changes, and no process except observers has it attached. A runtime may continue
    it."""
    DAMAGED = "damaged"
    """Its segment cannot be read: damaged, of another release, or open to other users."""


class EpochSummary(Record, kw_only=True, frozen=True):
    """One epoch at about one moment. Times are wall-clock milliseconds since the Unix epoch.

    For a damaged one only `namespace`, `session_id`, `state`, `problem`, `alive_at_ms` and `bytes`
    are known, and mostly `epoch_id`.
    """

    namespace: str
    session_id: SessionId
    state: EpochState
    alive_at_ms: Count
    """The last time at which a process is known to have had it attached."""
    bytes: Count
    """The shared memory that it takes."""
    problem: str | None = None
    """The damage of a damaged one."""
    epoch_id: RuntimeEpochId | None = None
    created_at_ms: Count = 0
    participants: dict[Role, Count] = msgspec.field(default_factory=dict)
    """The number of live processes of each role."""
    dead: Count = 0
    """Participants that died and that no runtime has cleared yet."""
    operations: dict[OperationStatus, Count] = msgspec.field(default_factory=dict)
    """The number of operations of each status, of those that have not ended."""
    ended: Count = 0
    """The number of operations that have ended. A recovered epoch counts those that it held at its
    recovery, and later ones."""
    watermark: CompletionSeq = 0
    dropped_through: CompletionSeq = 0
    durable_through: CompletionSeq = 0
    repairs: Count = 0
    """How often a writer found and undid the unfinished transition of a writer that was killed."""
    cursors: EpochCursorSnapshot = EpochCursorSnapshot()
    skipped_after: CompletionSeq = 0
    skipped_through: CompletionSeq = 0
    """The last recovery left out the sequences above the first and up to the second."""

    @property
    def lags(self) -> dict[str, int]:
        """The number of completions of the feed above each cursor."""
        skipped = self.skipped_after, self.skipped_through
        positions = msgspec.structs.asdict(self.cursors).items()
        return {
            name: completions_between(position, self.watermark, skipped)
            for name, position in positions
        }


def completions_between(
    after: CompletionSeq, through: CompletionSeq, skipped: tuple[CompletionSeq, CompletionSeq]
) -> int:
    """The number of completions with a sequence above one and up to another, without the sequences
    that the recovery skipped."""
    left_out = min(through, skipped[1]) - max(after, skipped[0])
    return max(0, through - after - max(0, left_out))


def summaries(namespace: str | None = None) -> Iterator[EpochSummary]:
    """A summary of each of this user's epochs, in no order; of one namespace if that is given."""
    for found, session_id in list_segments(namespace):
        summary = summarize(found, session_id)
        if summary is not None:
            yield summary


def summarize(namespace: str, session_id: SessionId) -> EpochSummary | None:
    """A summary of the session's epoch; None if the session has no segment."""
    try:
        segment = ObservedSegment.peek(namespace, session_id)
    except FileNotFoundError:
        return None
    except DAMAGE as error:
        try:
            file = os.lstat(segment_path(namespace, session_id))
        except FileNotFoundError:
            return None  # removed since
        return of_damaged(namespace, session_id, error, file)
    try:
        return of_segment(segment)
    except SegmentCorrupted as error:
        return of_damaged(namespace, session_id, error, os.fstat(segment.fd), segment.epoch_id)
    finally:
        segment.close()


def of_segment(segment: ObservedSegment) -> EpochSummary:
    """A summary of an epoch.

    Raises `SegmentCorrupted` where its memory is damaged. If only its newest record is damaged, it
    returns the summary of a damaged epoch with all the rest.
    """
    attached = segment.participants.list()
    alive = [one.role for one in attached if one.alive]
    if segment.sealed:
        state = EpochState.SEALED
    elif is_locked(segment.fd, at.RUNTIME_BYTE) or any(role is not Role.OBSERVER for role in alive):
        state = EpochState.OPEN
    else:
        state = EpochState.ABANDONED
    problem = None
    try:
        alive_at_ms = last_sign_of_life(segment, attached)
    except SegmentCorrupted as error:
        state, problem = EpochState.DAMAGED, str(error)
        alive_at_ms = os.fstat(segment.fd).st_mtime_ns // 10**6
    memory = segment.memory
    # The cursors are read first: a cursor that is read later may be ahead of the watermark.
    cursors = EpochCursorSnapshot(*memory.load_column(at.CURSORS_AT, at.CURSORS, at.LINE))
    operations, ended = _operations(segment)
    skipped_after, skipped_through = segment.skipped
    return EpochSummary(
        namespace=segment.namespace,
        session_id=segment.session_id,
        state=state,
        problem=problem,
        alive_at_ms=alive_at_ms,
        bytes=segment.layout.size,
        epoch_id=segment.epoch_id,
        created_at_ms=memory.load(at.CREATED_AT),
        participants=counted(alive),
        dead=len(attached) - len(alive),
        operations=operations,
        ended=ended,
        cursors=cursors,
        watermark=memory.load(at.WATERMARK_AT),
        dropped_through=memory.load(at.DROPPED_AT),
        durable_through=memory.load(at.DURABLE_AT),
        repairs=memory.load(at.REPAIRS_AT),
        skipped_after=skipped_after,
        skipped_through=skipped_through,
    )


def last_sign_of_life(segment: ObservedSegment, attached: Iterable[Participant]) -> int:
    """The last time at which a process is known to have had the epoch attached.

    `attached` are the participants that are listed, dead or alive. GC-1: the last sign of life is
    the newest of these times:

    - the time of the epoch's file. A participant that leaves in good order sets it, and the
      session's runtime does once a minute
    - the time at which a listed participant joined
    - the end of the newest operation

    So an epoch whose processes were all killed looks older than it is. With a runtime the
    difference is a minute at most. Without one it is the time since the last worker joined or ended
    an operation. A clock that was set back makes the epoch look younger.
    """
    at_ms = [os.fstat(segment.fd).st_mtime_ns // 10**6, *(one.joined_at_ms for one in attached)]
    if segment.layout.config is not None:
        newest = OperationTable(segment).record(segment.memory.load(at.WATERMARK_AT))
        if newest is not None:
            at_ms.append(newest.completed_at_ms)
    return max(0, *at_ms)


def _operations(segment: ObservedSegment) -> tuple[dict[OperationStatus, int], int]:
    """The number of operations of each status, of those that have not ended; and of ended ones."""
    if segment.layout.config is None:
        return {}, 0
    table = OperationTable(segment)
    words = table.words()
    ended = words.watermark - words.origin
    if words.registrations == ended:
        return {}, ended
    # Specs are not decoded: that would take longer than all the rest.
    live = (slot.word & at.STATUS_MASK for slot in table.slots() if not slot.terminal_seq)
    return counted(STATUSES[status] for status in live), ended


def counted(found: Iterable[T]) -> dict[T, int]:
    """The number of each. Making a Counter takes longer than counting these few."""
    counts: dict[T, int] = {}
    for one in found:
        counts[one] = counts.get(one, 0) + 1
    return counts


def of_damaged(
    namespace: str,
    session_id: SessionId,
    error: Exception,
    file: os.stat_result,
    epoch_id: RuntimeEpochId | None = None,
) -> EpochSummary:
    """A summary of an epoch that cannot be read, with the reason."""
    return EpochSummary(
        namespace=namespace,
        session_id=session_id,
        state=EpochState.DAMAGED,
        problem=str(error),
        alive_at_ms=max(file.st_mtime_ns // 10**6, 0),
        bytes=file.st_size,
        epoch_id=epoch_id,
    )
