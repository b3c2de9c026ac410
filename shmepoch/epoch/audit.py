"""The audit of an epoch: it checks every invariant of its memory.

It checks a copy that was made under the writer lock, so it does not delay other processes.
"""

from __future__ import annotations

from shmepoch import _native as at
from shmepoch.epoch.table import OperationTable
from shmepoch.memory.layout import Layout
from shmepoch.memory.segment import Segment


class Audit:
    """One check of the copy of an epoch. Raises `SegmentCorrupted` that names the damaged field."""

    def __init__(self, segment: Segment) -> None:
        self._segment = segment
        self._memory = segment.memory
        self._layout = segment.layout
        self._epoch = segment.epoch
        self._table = OperationTable(segment)
        self._words = self._table.words()

    def check(self) -> None:
        """Check the words, the records, and the slots."""
        if self._memory.load(at.DURABLE_AT) > self._words.watermark:
            raise self._segment.corrupted(
                "durable_seq", f"at most {self._words.watermark}", self._memory.load(at.DURABLE_AT)
            )
        kept = self._check_slots()
        self._check_records(kept)

    def _check_records(self, kept: list[tuple[int, int]]) -> None:
        """Records follow each other, and do not overlap records that are kept for watchers."""
        words, end, first = self._words, 0, None
        spans = list(kept)
        for seq in range(words.dropped + 1, words.watermark + 1):
            word = self._memory.load(self._layout.index_word(seq))
            position = word & ~at.HAS_RECORD
            if position < end:
                raise self._segment.corrupted(f"feed[{seq}].position", f"at least {end}", position)
            first = position if first is None else first
            end = position
            if not word & at.HAS_RECORD:
                continue
            view = self._table.in_record(seq)
            if view is not None and view.entry is not None and view.entry.seq != seq:
                raise self._segment.corrupted(f"feed[{seq}].entry", seq, view.entry.seq)
            end += self._size(seq)
            spans.append((position, end - position))
            if view is not None and seq > words.floor:
                place = self._table.place(view.spec.id)
                if place != (-1, seq):
                    raise self._segment.corrupted(
                        f"feed[{seq}].fingerprint", f"found at {seq}", place
                    )
        head = self._memory.load(at.HEAD_AT)
        if end > head:
            raise self._segment.corrupted("head", f"at least {end}", head)
        room = self._segment.layout.feed_bytes
        if first is not None and head - first > room:
            raise self._segment.corrupted("head", f"at most {first + room}", head)
        self._check_apart(spans)

    def _check_apart(self, spans: list[tuple[int, int]]) -> None:
        """No two of these spans share a byte of the ring."""
        room, taken = self._segment.layout.feed_bytes, bytearray(self._segment.layout.feed_bytes)
        for position, size in spans:
            for offset in range(0, size, at.WORD):
                word_at = (position + offset) % room
                if taken[word_at]:
                    raise self._segment.corrupted("records", "apart", f"two at {word_at}")
                taken[word_at] = 1

    def _size(self, seq: int) -> int:
        record = self._table.record(seq)
        if record is None:
            raise self._segment.corrupted(f"feed[{seq}].record", "a record", None)
        first, second = record.head + record.outcome, record.rest + record.detail
        return Layout.record_size(len(first), len(second))

    def _check_slots(self) -> list[tuple[int, int]]:
        """The positions and sizes of records that slots keep and that the feed has dropped."""
        words, live, seen, kept = self._words, 0, set[bytes](), list[tuple[int, int]]()
        for slot in self._epoch.used():
            found = self._table.slot(slot)
            field = f"slot[{slot}]"
            if found is None:
                raise self._segment.corrupted(f"{field}.word", "of an operation", None)
            seq, id = found.terminal_seq, found.id
            offset = self._layout.slot(slot)
            position = self._memory.load(offset + at.SLOT_POSITION)
            if seq:
                if self._table.outcome(slot, found.birth, 0) is None:
                    raise self._segment.corrupted(f"{field}.position", "of its record", position)
                if seq <= words.dropped:
                    kept.append((position, self._record_size(position)))
                if not self._memory.load(at.KEPT_AT):
                    raise self._segment.corrupted("kept", "set", 0)
                continue
            live += 1
            view = self._table.in_slot(slot)
            if view is None or id in seen:
                raise self._segment.corrupted(f"{field}.id", "held once", id.hex())
            seen.add(id)
            if self._memory.load(self._layout.fingerprint(slot)) != view.spec.id.fingerprint:
                raise self._segment.corrupted(f"{field}.fingerprint", "that of its id", "another")
            uncommitted = self._memory.load(offset + at.SLOT_TERMINAL_SEQ)
            if uncommitted:
                raise self._segment.corrupted(f"{field}.terminal_seq", 0, uncommitted)
        active = words.registrations - (words.watermark - words.origin)
        if live != active:
            raise self._segment.corrupted("registrations", f"{live} operations live", active)
        return kept

    def _record_size(self, position: int) -> int:
        room = self._segment.layout.feed_bytes
        offset = (position + at.RECORD_LENGTHS) % room
        lengths = self._memory.load(self._layout.records + offset)
        head, outcome = lengths >> 32 & 0xFFF, lengths & 0xFFFFFFFF
        rest, detail = lengths >> 44 & 0x3FF, lengths >> 54
        return Layout.record_size(head + outcome, rest + detail)
