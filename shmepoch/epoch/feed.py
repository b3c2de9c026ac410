"""The completion feed of an epoch: readers take no lock, and writers do not delay them."""

from __future__ import annotations

import asyncio
import contextlib

import msgspec

from shmepoch import _native as at
from shmepoch._native import Refused
from shmepoch.arguments import require_position
from shmepoch.epoch.codec import wire_decoder
from shmepoch.epoch.completions import CompletionBatch, CompletionEntry, CompletionSeq
from shmepoch.epoch.encoding import ENTRY_TEMPLATE
from shmepoch.epoch.following import FeedFollower
from shmepoch.errors import EpochGone, EpochSealed
from shmepoch.memory.segment import Segment
from shmepoch.timeouts import pauses

#: How long an event loop pauses, at first and at most, before it polls the store's progress again.
_PAUSES_S = 0.001, 0.02

_entries_decoder = wire_decoder(tuple[CompletionEntry, ...])


class SegmentFeed:
    """The `CompletionFeed` of one segment."""

    def __init__(self, segment: Segment) -> None:
        self._segment = segment
        self._memory = segment.memory
        self._epoch = segment.epoch

    def watermark(self) -> CompletionSeq:
        """The highest committed sequence; 0 before the first."""
        return self._memory.load(at.WATERMARK_AT)

    def list_since(self, after_seq: CompletionSeq) -> CompletionBatch:
        """The retained entries with `seq > after_seq`, in order, with the watermark.

        Raises `SegmentCorrupted` for an entry that is neither whole nor dropped.
        """
        after_seq = require_position(after_seq, "list_since", "after_seq")
        try:
            watermark, dropped, data = self._epoch.list_since(after_seq, ENTRY_TEMPLATE)
        except Refused as refused:
            raise self._segment.refusal(refused) from None
        entries: tuple[CompletionEntry, ...] = ()
        if data is not None:
            try:
                entries = _entries_decoder.decode(data)
            except (msgspec.DecodeError, ValueError) as error:
                field = f"feed above {max(after_seq, dropped)}"
                raise self._segment.corrupted(field, "decodable entries", str(error)) from error
        return CompletionBatch(entries=entries, watermark=watermark, dropped_through=dropped)

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

    def follow(self, after_seq: CompletionSeq = 0) -> FeedFollower:
        """The completions above `after_seq`, and then those that come, until the epoch is sealed:
        for `for` and for `async for`."""
        return FeedFollower(self, require_position(after_seq, "follow", "after_seq"))

    def __repr__(self) -> str:
        return f"SegmentFeed(epoch_id={self._segment.epoch_id!r}, watermark={self.watermark()})"

    # --- the progress of a store --------------------------------------------------------------

    def durable_through(self) -> CompletionSeq:
        """Every completion up to this one is in a store, unless it was dropped before."""
        return self._memory.load(at.DURABLE_AT)

    def mark_durable(self, seq: CompletionSeq) -> None:
        """Record that a store has everything up to `seq`, and wake the writers that wait for
        that."""
        with contextlib.suppress(EpochSealed, EpochGone):  # then no writer waits
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
        # A store advances a few times a second, and rings no doorbell.
        for pause in pauses(*_PAUSES_S):
            if self.durable_through() >= seq or self._segment.ended:
                break
            await asyncio.sleep(pause)
        self._require_durable(seq)

    def _require_durable(self, seq: CompletionSeq) -> None:
        if self.durable_through() < seq:
            raise self._segment.closed_error()
