"""The details of one epoch, for people who inspect it.

MONITOR-1: reading them takes no lock and changes nothing. Damaged parts are left out and the rest
is reported, above all the processes that have a damaged epoch attached.
"""

from __future__ import annotations

import os
import pwd
import stat
from collections.abc import Callable, Iterable, Iterator
from enum import StrEnum
from functools import partial
from typing import Any, Final, TypeVar

import msgspec
from msgspec.structs import asdict, replace

from shmepoch import _native as at
from shmepoch._native import is_locked
from shmepoch.epoch.codec import Record
from shmepoch.epoch.completions import CompletionEntry
from shmepoch.epoch.feed import SegmentFeed
from shmepoch.epoch.operations import (
    Count,
    OperationKind,
    OperationProgressUpdate,
    OperationStatus,
)
from shmepoch.epoch.table import OperationTable, OperationView
from shmepoch.errors import SegmentCorrupted
from shmepoch.ids import OperationId, SessionId
from shmepoch.memory.clock import wall_ms
from shmepoch.memory.namespaces import segment_path
from shmepoch.memory.participants import Role, number_of, slot_of
from shmepoch.memory.segment import ObservedSegment
from shmepoch.monitoring.epochs import (
    DAMAGE,
    EpochSummary,
    counted,
    of_damaged,
    of_segment,
)
from shmepoch.monitoring.holders import Holder, holders, is_stopped

T = TypeVar("T")

#: The number of reads in a row that must find a word beside a free lock. A writer may come in
#: between two of them, but not between each two.
_LOOKS: Final = 5


class Lock(StrEnum):
    """The locks of an epoch that one process holds at a time."""

    WRITER = "writer"
    """During a transition."""
    RUNTIME = "runtime"
    AGENT = "agent"
    """Agents that were built to share the epoch hold it together."""
    LOOP = "loop"


_BYTES: Final = {
    Lock.WRITER: at.WRITER_BYTE,
    Lock.RUNTIME: at.RUNTIME_BYTE,
    Lock.AGENT: at.AGENT_BYTE,
    Lock.LOOP: at.LOOP_BYTE,
}


class Process(Record, frozen=True):
    """A process that is visible from here, with its id as seen from here."""

    pid: Count
    stopped: bool
    """Whether it stands still, as after SIGSTOP."""


class Attached(Record, kw_only=True, frozen=True):
    """A participant: a process that has the epoch attached, or had it when it died."""

    slot: Count
    number: Count
    """The number of participants that had joined the epoch, this one included."""
    role: Role
    pid: Count
    """Its process id as it sees it itself; this differs from ours in another container."""
    alive: bool
    joined_at_ms: Count
    process: Process | None = None
    """Its process, if that is visible from here."""
    holds: tuple[Lock, ...] = ()
    """The locks that are known to be its own."""


class Unfinished(Record, kw_only=True, frozen=True):
    """An operation that has not ended."""

    id: OperationId
    kind: OperationKind
    display_name: str
    source_label: str
    status: OperationStatus
    created_at_ms: Count
    started_at_ms: Count | None
    elapsed_ms: Count
    """The time since its start, or since its registration if it was not started."""
    runner: Attached | None
    """The participant that runs it; None if that participant has left."""
    progress_count: Count
    progress: OperationProgressUpdate | None
    """The last report of its progress."""
    watchers: Count


class Use(Record, frozen=True):
    """How much of a table or a ring is used."""

    used: Count
    capacity: Count


class EpochDetails(EpochSummary, kw_only=True, frozen=True):
    """One epoch at about one moment, with what its summary has.

    The details of a damaged epoch are its readable parts; `problem` names the part that is not.
    """

    path: str
    owner_uid: Count
    owner: str | None
    """The owner's name; None if that user has none here."""
    mode: str
    """The permissions of the file, in octal."""
    processes: tuple[Process, ...] = ()
    """The processes that have it attached and are visible from here."""
    attached: tuple[Attached, ...] = ()
    locks: dict[Lock, tuple[Process, ...]] = msgspec.field(default_factory=dict)
    """The locks that are held, each with its holders that are visible from here."""
    broken_off: bool = False
    """Whether a transition was broken off. The next writer repairs it."""
    unfinished: tuple[Unfinished, ...] = ()
    """The operations that have not ended, the oldest first."""
    retained: dict[OperationStatus, Count] = msgspec.field(default_factory=dict)
    """How many operations have ended in each way, of those that the registry retains."""
    entries: tuple[CompletionEntry, ...] = ()
    """The last entries of the feed."""
    use: dict[str, Use] = msgspec.field(default_factory=dict)
    """How full each table and ring is."""


def describe(namespace: str, session_id: SessionId, *, entries: int = 10) -> EpochDetails | None:
    """The details of the session's epoch, with the last `entries` entries of its feed; None if the
    session has no segment."""
    try:
        segment = ObservedSegment.peek(namespace, session_id)
    except FileNotFoundError:
        return None
    except DAMAGE as error:
        return _unreadable(namespace, session_id, error)
    try:
        return _Reading(segment).details(entries)
    finally:
        segment.close()


def _unreadable(namespace: str, session_id: SessionId, error: Exception) -> EpochDetails | None:
    try:
        file = os.lstat(segment_path(namespace, session_id))
    except FileNotFoundError:
        return None
    summary = of_damaged(namespace, session_id, error, file)
    return _with_file(summary, file, processes=_processes(holders(file)))


def _with_file(summary: EpochSummary, file: os.stat_result, **facts: Any) -> EpochDetails:
    try:
        owner = pwd.getpwuid(file.st_uid).pw_name
    except KeyError:
        owner = None
    return EpochDetails(
        **asdict(summary),
        path=str(segment_path(summary.namespace, summary.session_id)),
        owner_uid=file.st_uid,
        owner=owner,
        mode=f"{stat.S_IMODE(file.st_mode):04o}",
        **facts,
    )


def _processes(holding: Iterable[Holder]) -> tuple[Process, ...]:
    return tuple(Process(pid, is_stopped(pid)) for pid in sorted({one.pid for one in holding}))


class _Reading:
    """One reading of an epoch. It goes on where a part of the memory is damaged."""

    def __init__(self, segment: ObservedSegment) -> None:
        self._segment = segment
        self._memory = segment.memory
        self._file = os.fstat(segment.fd)
        self._holders = holders(self._file)
        self._damage: SegmentCorrupted | None = None

    def details(self, entries: int) -> EpochDetails:
        """All details, with the last `entries` entries of the feed."""
        summary = self._part(lambda: of_segment(self._segment), None)
        attached: list[Attached] = self._part(lambda: list(self._attached()), [])
        facts: dict[str, Any] = {
            "processes": _processes(self._holders),
            "attached": tuple(attached),
            "locks": dict(self._locks()),
            "broken_off": is_broken_off(self._segment),
            "use": {"participants": Use(len(attached), self._segment.layout.max_participants)},
        }
        config = self._segment.layout.config
        if config is not None:
            facts |= self._of_operations(attached, entries)
            retained = sum(facts["retained"].values())
            facts["use"] |= {
                "operations": Use(len(self._segment.epoch.used()), config.max_operations),
                "feed_bytes": Use(used_feed_bytes(self._segment), config.feed_bytes),
                "feed_entries": Use(_feed_entries(self._segment), self._segment.layout.entries),
                "retained": Use(retained, config.max_completed),
            }
        return _with_file(self._marked(summary), self._file, **facts)

    def _part(self, read: Callable[[], T], otherwise: T) -> T:
        """The result of `read`; `otherwise` if it finds damage, which is kept for the end."""
        try:
            return read()
        except SegmentCorrupted as error:
            self._damage = self._damage or error
            return otherwise

    def _marked(self, summary: EpochSummary | None) -> EpochSummary:
        """The summary. It says what is damaged, if anything is."""
        if self._damage is None:
            assert summary is not None
            return summary
        segment = self._segment
        marked = of_damaged(
            segment.namespace, segment.session_id, self._damage, self._file, segment.epoch_id
        )
        if summary is None:
            return marked
        return replace(summary, state=marked.state, problem=marked.problem)

    # --- the attached processes --------------------------------------------------------------

    def _attached(self) -> Iterator[Attached]:
        for one in self._segment.participants.list():
            byte = at.PARTICIPANT_BYTE + one.slot
            # A child that was forked just now may still have its parent's descriptor.
            own = [holder for holder in self._holders if one.alive and holder.holds(byte)]
            own.sort(key=lambda holder: holder.pid != one.pid)
            yield Attached(
                slot=one.slot,
                number=one.number,
                role=one.role,
                pid=one.pid,
                alive=one.alive,
                joined_at_ms=one.joined_at_ms,
                process=next(iter(_processes(own[:1])), None),
                holds=tuple(lock for lock in Lock if any(h.holds(_BYTES[lock]) for h in own)),
            )

    def _locks(self) -> Iterator[tuple[Lock, tuple[Process, ...]]]:
        for lock, byte in _BYTES.items():
            holding = self._holding_writer() if lock is Lock.WRITER else self._holding(byte)
            if holding is not None:
                yield lock, _processes(holding)

    def _holding(self, byte: int) -> list[Holder] | None:
        """The visible processes that hold a lock; None if it is free."""
        if not is_locked(self._segment.fd, byte):
            return None
        return [holder for holder in self._holders if holder.holds(byte)]

    def _holding_writer(self) -> list[Holder] | None:
        """Like `_holding`, for the writer lock. Writers take and release it many times meanwhile.
        So an invisible process holds it only if each read finds it held and no visible holder."""
        for _ in range(_LOOKS):
            holding = self._holding(at.WRITER_BYTE)
            if holding is None or holding:
                return holding
            self._holders = holders(self._file)
        return []

    # --- operations and the feed ----------------------------------------------------------------

    def _of_operations(self, attached: list[Attached], entries: int) -> dict[str, Any]:
        table = OperationTable(self._segment)
        runners = {(one.number, one.slot): one for one in attached}
        now_ms = wall_ms()
        views = (
            self._part(partial(table.in_slot, slot), None) for slot in self._segment.epoch.used()
        )
        live = sorted((view for view in views if view is not None), key=lambda view: view.birth)
        statuses: list[OperationStatus] = []  # those before a damaged one stay
        self._part(lambda: statuses.extend(view.status for view in table.retained()), None)
        return {
            "unfinished": tuple(
                _unfinished(
                    view,
                    runners.get((number_of(view.participant), slot_of(view.participant))),
                    now_ms,
                )
                for view in live
            ),
            "retained": counted(statuses),
            "entries": tuple(self._part(lambda: self._last(entries), [])),
        }

    def _last(self, count: int) -> list[CompletionEntry]:
        feed = SegmentFeed(self._segment)
        after = feed.watermark() - count
        skipped_after, skipped_through = self._segment.skipped
        if after < skipped_through:
            after -= skipped_through - skipped_after
        entries = list(feed.list_since(max(0, after)).entries)
        return entries[max(0, len(entries) - count) :]


def is_broken_off(segment: ObservedSegment) -> bool:
    """Whether a transition was broken off: its intent stands, and no writer is at work."""
    return all(
        not is_locked(segment.fd, at.WRITER_BYTE) and segment.memory.load(at.INTENT_AT) != 0
        for _ in range(_LOOKS)
    )


def used_feed_bytes(segment: ObservedSegment) -> int:
    """The used bytes of the byte ring: from the start of the oldest record to the start of the next
    one."""
    if not _feed_entries(segment):
        return 0
    memory, layout = segment.memory, segment.layout
    oldest = memory.load(at.DROPPED_AT) + 1
    begin = memory.load(layout.index_word(oldest)) & ~at.HAS_RECORD
    return min(max(0, memory.load(at.HEAD_AT) - begin), layout.feed_bytes)


def _feed_entries(segment: ObservedSegment) -> int:
    """The number of entries that are not dropped, with the sequences that a recovery skipped."""
    dropped, watermark = segment.memory.load(at.DROPPED_AT), segment.memory.load(at.WATERMARK_AT)
    return min(max(0, watermark - dropped), segment.layout.entries)


def _unfinished(view: OperationView, runner: Attached | None, now_ms: int) -> Unfinished:
    since_ms = view.created_at_ms if view.started_at_ms is None else view.started_at_ms
    return Unfinished(
        id=view.spec.id,
        kind=view.spec.kind,
        display_name=view.spec.display_name,
        source_label=view.spec.source_label,
        status=view.status,
        created_at_ms=view.created_at_ms,
        started_at_ms=view.started_at_ms,
        elapsed_ms=max(0, now_ms - since_ms),
        runner=runner,
        progress_count=view.detail.progress_count,
        progress=view.detail.last_progress,
        watchers=view.watchers,
    )
