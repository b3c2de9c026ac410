"""The completion feed in an epoch's memory: readers take no lock, the writer appends under one."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

import msgspec

from shmepoch.arguments import require_position
from shmepoch.epoch.codec import to_wire, wire_decoder
from shmepoch.epoch.completions import CompletionBatch, CompletionEntry, CompletionSeq
from shmepoch.epoch.operations import OperationSpec
from shmepoch.errors import EpochGone, EpochSealed, SegmentCorrupted
from shmepoch.memory import layout as at
from shmepoch.memory.clock import wall_ms
from shmepoch.memory.segment import Segment
from shmepoch.timeouts import pauses

#: The slot of an entry whose operation the table does not hold.
NO_SLOT = 2**32 - 1

#: Far above any feed, and far below where a position and what is added to it overflow.
_LAST_POSITION = 2**63

#: How long an event loop pauses, at first and at most, before it looks again how far a store is.
_PAUSES_S = 0.001, 0.02

_entries_decoder = wire_decoder(tuple[CompletionEntry, ...])


def encode_entry(
    seq: CompletionSeq, spec: OperationSpec, outcome: msgspec.Raw, started_ms: int
) -> bytes:
    """The entry of an operation that ends now, for the ring; `outcome` is encoded already."""
    return to_wire(
        CompletionEntry(
            seq=seq,
            operation_id=spec.id,
            kind=spec.kind,
            display_name=spec.display_name,
            terminal_outcome=outcome,  # type: ignore[arg-type] # once for all, before the lock
            completed_at_ms=max(wall_ms(), started_ms),
        )
    )


class SegmentFeed:
    """The `CompletionFeed` of one segment.

    FEED-2: `dropped_through` is raised before what it covers is overwritten. A reader copies
    first and looks at it afterwards, so an entry that was overwritten while it was copied is known
    to be dropped and is never returned.
    """

    def __init__(self, segment: Segment) -> None:
        self._segment = segment
        self._memory = segment.memory
        self._ring = segment.layout.ring

    def watermark(self) -> CompletionSeq:
        """The highest committed sequence; 0 before the first."""
        return self._memory.load(at.WATERMARK_AT)

    def list_since(self, after_seq: CompletionSeq) -> CompletionBatch:
        """The retained entries with `seq > after_seq`, in order, with the watermark.

        Raises `SegmentCorrupted` for an entry that is neither whole nor dropped.
        """
        after_seq = require_position(after_seq, "list_since", "after_seq")
        memory = self._memory
        while True:
            watermark = memory.load(at.WATERMARK_AT)
            dropped = memory.load(at.DROPPED_AT)
            if watermark - dropped > self._ring[1]:
                raise self._corrupted_word(
                    "watermark", f"at most {dropped + self._ring[1]}", watermark
                )
            first = max(after_seq, dropped) + 1
            entries: tuple[CompletionEntry, ...] = ()
            if first <= watermark:
                first_whole, data = memory.ring_gather(self._ring, first, watermark)
                dropped = memory.load(at.DROPPED_AT)
                if first_whole > max(first, dropped + 1):
                    raise self._corrupted(first_whole - 1, "a whole entry", "a torn one")
                entries = self._decode(data, first)
                if dropped >= first:
                    entries = tuple(entry for entry in entries if entry.seq > dropped)
            if dropped <= watermark:
                return CompletionBatch(
                    entries=entries, watermark=watermark, dropped_through=dropped
                )
            # The writer has gone round the ring meanwhile; its watermark must have, too.
            watermark = memory.load(at.WATERMARK_AT)
            if dropped > watermark:
                raise self._corrupted_word("dropped_through", f"at most {watermark}", dropped)

    def wait_for_advance(
        self, after_seq: CompletionSeq, timeout: float | None = None
    ) -> CompletionSeq:
        """Block until the watermark is above `after_seq` and return it.

        Raises `TimeoutError` after `timeout` seconds and `EpochSealed` when the epoch ends.
        """
        return self._segment.waiters.wait_above(after_seq, timeout)

    async def advanced(self, after_seq: CompletionSeq) -> CompletionSeq:
        """Like `wait_for_advance`, without blocking the event loop."""
        return await self._segment.waiters.above(after_seq)

    def entry(self, seq: CompletionSeq) -> CompletionEntry | None:
        """The entry of one committed sequence, or None if it was dropped."""
        data = self.encoded(seq)
        return self.decode(data, seq) if data else None

    def encoded(self, seq: CompletionSeq) -> bytes:
        """What `decode` reads the entry of a committed sequence from; nothing if it was dropped."""
        memory = self._memory
        if seq <= memory.load(at.DROPPED_AT):
            return b""
        first_whole, data = memory.ring_gather(self._ring, seq, seq)
        if seq <= memory.load(at.DROPPED_AT):
            return b""
        if first_whole > seq:
            raise self._corrupted(seq, "a whole entry", "a torn one")
        return data

    def decode(self, data: bytes, seq: CompletionSeq) -> CompletionEntry | None:
        """The entry that was `encoded`; None for a sequence that recovery skipped."""
        entries = self._decode(data, seq)
        return entries[0] if entries else None

    # --- how far a store has come -------------------------------------------------------------

    def durable_through(self) -> CompletionSeq:
        """Every completion up to this one is in a store, unless it was dropped before."""
        return self._memory.load(at.DURABLE_AT)

    def mark_durable(self, seq: CompletionSeq) -> None:
        """A store has taken everything up to `seq`; writers that wait for it go on."""
        with contextlib.suppress(EpochSealed, EpochGone):  # then no writer waits any more
            self._segment.cell(at.DURABLE_AT).advance(seq)
            self._segment.waiters.wake_writers()

    def wait_durable(self, seq: CompletionSeq, timeout: float | None = None) -> None:
        """Block until a store has every completion up to `seq`.

        Raises `TimeoutError` after `timeout` seconds, always if nothing persists the epoch, and
        `EpochSealed` when the epoch ends before.
        """
        seq = require_position(seq, "wait_durable", "seq")
        if self.durable_through() < seq:
            self._segment.waiters.wait_durable(seq, timeout)
            self._require_durable(seq)

    async def durable(self, seq: CompletionSeq) -> None:
        """Like `wait_durable`, without blocking the event loop."""
        seq = require_position(seq, "durable", "seq")
        # A store comes further a few times a second; no bell is rung for that.
        for pause in pauses(*_PAUSES_S):
            if self.durable_through() >= seq or self._segment.ended:
                break
            await asyncio.sleep(pause)
        self._require_durable(seq)

    def _require_durable(self, seq: CompletionSeq) -> None:
        if self.durable_through() < seq:
            raise self._segment.closed_error()

    # --- the writer's side: all of it under the segment's writer lock -------------------------

    @property
    def payload_limit(self) -> int:
        """The largest encoded entry that fits."""
        return self._ring[3]

    def find_room(self, lengths: Sequence[int]) -> tuple[int, CompletionSeq]:
        """Where new entries of these lengths begin, once those through the second are dropped.

        FEED-3: the entries of one commit fit the ring together, so none overwrites another.
        """
        memory, ring = self._memory, self._ring
        watermark = memory.load(at.WATERMARK_AT)
        dropped = memory.load(at.DROPPED_AT)
        begin, length, _ = memory.ring_at(ring, watermark)
        if begin % at.WORD or begin > _LAST_POSITION:
            raise self._corrupted(watermark, "a position on a word", begin)
        if length > ring[3]:
            raise self._corrupted(watermark, f"a length of at most {ring[3]}", length)
        begin += _padded(length)
        end = begin + sum(map(_padded, lengths))
        dropped = max(dropped, watermark + len(lengths) - ring[1])
        while dropped < watermark:
            oldest, *_ = memory.ring_at(ring, dropped + 1)
            if oldest > begin:
                raise self._corrupted(dropped + 1, f"a position of at most {begin}", oldest)
            if oldest + ring[3] >= end:
                break
            dropped += 1
        return begin, dropped

    def drop_through(self, seq: CompletionSeq) -> None:
        """Drop the entries up to this one, before anything is written in their place."""
        if seq > self._memory.load(at.DROPPED_AT):
            self._memory.store(at.DROPPED_AT, seq)

    def put(self, seq: CompletionSeq, position: int, data: bytes, slot: int) -> int:
        """Write the entry of a sequence past the watermark; where the next one begins."""
        self._memory.ring_put(self._ring, seq, position, data, slot)
        return position + _padded(len(data))

    def slot_of(self, seq: CompletionSeq) -> int:
        """The slot whose operation this entry ended, or `NO_SLOT`."""
        return self._memory.ring_at(self._ring, seq)[2]

    # --- audit --------------------------------------------------------------------------------

    def check(self) -> None:
        """Verify the rings against the words that say what is valid in them."""
        memory, ring = self._memory, self._ring
        watermark, dropped = self.watermark(), memory.load(at.DROPPED_AT)
        if memory.load(at.DURABLE_AT) > watermark:
            raise self._corrupted_word(
                "durable_seq", f"at most {watermark}", memory.load(at.DURABLE_AT)
            )
        end = None
        for seq in range(dropped + 1, watermark + 1):
            position, length, _ = memory.ring_at(ring, seq)
            if end is not None and position != end:
                raise self._corrupted(seq, f"position {end}", position)
            end = position + _padded(length)
            entry = self.entry(seq)
            if entry is not None and entry.seq != seq:
                raise self._corrupted(seq, seq, entry.seq)
        if end is not None and end - memory.ring_at(ring, dropped + 1)[0] > ring[3]:
            raise self._corrupted(watermark, f"entries of at most {ring[3]} bytes", "more")

    def _decode(self, data: bytes, first: CompletionSeq) -> tuple[CompletionEntry, ...]:
        try:
            return _entries_decoder.decode(data)
        except (msgspec.DecodeError, ValueError) as error:
            raise self._corrupted(first, "decodable entries", str(error)) from error

    def _corrupted(self, seq: int, expected: object, actual: object) -> SegmentCorrupted:
        return self._corrupted_word(f"feed[{seq}]", expected, actual)

    def _corrupted_word(self, field: str, expected: object, actual: object) -> SegmentCorrupted:
        return SegmentCorrupted(self._segment.name, field, expected, actual)


def _padded(length: int) -> int:
    return -(-length // at.WORD) * at.WORD
