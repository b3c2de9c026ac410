"""Reads epochs again and again: a segment that was opened once is kept open."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Final, NamedTuple

from shmepoch import _native as at
from shmepoch._native import is_locked
from shmepoch.cli.watch.columns import Key
from shmepoch.config import OpsLifecycleConfig
from shmepoch.epoch.completions import CompletionBatch, CompletionSeq
from shmepoch.epoch.feed import SegmentFeed
from shmepoch.epoch.table import OperationTable, OperationView
from shmepoch.errors import SegmentCorrupted
from shmepoch.memory.namespaces import list_segments
from shmepoch.memory.participants import Participant
from shmepoch.memory.segment import ObservedSegment
from shmepoch.monitoring.details import is_broken_off, used_feed_bytes
from shmepoch.monitoring.epochs import DAMAGE, EpochSummary, of_segment, summarize

#: The number of segments that are kept open. Each takes a descriptor; a process has 1,024 by
#: default. The other segments are opened each time, which takes longer.
_MOST_OPEN: Final = 512


class Reader:
    """Sums up the epochs of one namespace, or of all. Only one thread may use it at a time."""

    def __init__(self, namespace: str | None) -> None:
        self._namespace = namespace
        self._open: dict[Key, ObservedSegment] = {}

    def summaries(self) -> list[EpochSummary]:
        """All of them as they are now; `OSError` if shared memory cannot be listed."""
        found = list(list_segments(self._namespace))
        for key in self._open.keys() - found:
            self._open.pop(key).close()
        return [summary for key in found if (summary := self._summary(key)) is not None]

    def _summary(self, key: Key) -> EpochSummary | None:
        try:
            segment = self._segment(key)
            if segment is not None:
                return of_segment(segment)
        except FileNotFoundError:
            return None
        except DAMAGE:
            pass
        return summarize(*key)  # damaged epochs, too

    def _segment(self, key: Key) -> ObservedSegment | None:
        """The segment that has the name now, if it is kept open."""
        segment = self._open.get(key)
        if segment is not None and not segment.named:
            self._open.pop(key).close()  # another epoch has the name
            segment = None
        if segment is None and len(self._open) < _MOST_OPEN:
            segment = self._open[key] = ObservedSegment.peek(*key)
        return segment

    def close(self) -> None:
        """Close the segments that are kept open."""
        while self._open:
            self._open.popitem()[1].close()


class Place(StrEnum):
    """Whether an epoch's segment still has its session's name."""

    NAMED = "named"
    REPLACED = "replaced"
    """A later epoch of the session has the name."""
    REMOVED = "removed"


class Seen(NamedTuple):
    """One epoch at about one moment, as its page needs it."""

    place: Place
    summary: EpochSummary
    config: OpsLifecycleConfig | None
    participants: Sequence[Participant] = ()
    operations: Sequence[OperationView] = ()
    feed_bytes: int = 0
    """The room that the retained completions take."""
    writer_held: bool = False
    broken_off: bool = False
    """Whether a transition was broken off. The next writer repairs it."""
    batch: CompletionBatch | None = None
    """The feed's entries above the requested sequence, if there are any."""
    problem: str | None = None
    """The part that could not be read, if the rest could."""


class EpochReader:
    """Reads one epoch. It goes on with the mapped memory when the epoch's name is gone. Only one
    thread may use it at a time."""

    def __init__(self, key: Key) -> None:
        self.key: Final = key
        self._segment: ObservedSegment | None = None

    def read(self, after_seq: CompletionSeq, most: int) -> Seen | None:
        """The epoch with the last `most` completions above `after_seq`; None if there is no epoch.
        Raises `SegmentCorrupted` where it became damaged."""
        if self._segment is None:
            try:
                self._segment = ObservedSegment.peek(*self.key)
            except FileNotFoundError:
                return None
            except DAMAGE:
                summary = summarize(*self.key)
                return None if summary is None else Seen(Place.NAMED, summary, None)
        segment = self._segment
        summary = of_segment(segment)
        config = segment.layout.config
        seen = Seen(
            self._place(segment),
            summary,
            config,
            participants=segment.participants.list(),
            writer_held=is_locked(segment.fd, at.WRITER_BYTE),
            broken_off=is_broken_off(segment),
        )
        if config is None:
            return seen
        try:
            batch = None
            if summary.watermark > after_seq:
                batch = SegmentFeed(segment).list_since(max(after_seq, summary.watermark - most))
            return seen._replace(
                operations=list(OperationTable(segment).live()),
                feed_bytes=used_feed_bytes(segment),
                batch=batch,
            )
        except SegmentCorrupted as error:
            return seen._replace(problem=str(error))

    def _place(self, segment: ObservedSegment) -> Place:
        if segment.named:
            return Place.NAMED
        return Place.REPLACED if segment.path.exists() else Place.REMOVED

    def close(self) -> None:
        """Close the segment, if it was opened."""
        if self._segment is not None:
            self._segment.close()
            self._segment = None
