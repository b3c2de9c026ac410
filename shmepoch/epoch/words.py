"""The words that commit transitions, read together and held against each other."""

from __future__ import annotations

import struct
from typing import Final, Self

import msgspec

from shmepoch.errors import SegmentCorrupted
from shmepoch.memory import layout as at
from shmepoch.memory._native import Memory
from shmepoch.memory.layout import Layout

#: Far above any feed, and far below where a sequence and what is added to it overflow.
LAST_WATERMARK: Final = 2**63 + 2**62

#: From `origin` to `reclaimed_through`, without the words in between that are not read here.
_BESIDES: Final = struct.Struct(
    f"=Q{at.SKIPPED_AT - at.CREATED_AT}xQQ{at.DROPPED_AT - at.SKIPPED_AT - 2 * at.WORD}x"
    f"QQ{at.COLLECTED_AT - at.REGISTRATIONS_AT}xQQ"
)


class Words(msgspec.Struct, frozen=True, gc=False):
    """What an epoch had committed when they were read.

    Under the writer lock only its holder changes them, so a transition reads them once.
    """

    registrations: int
    watermark: int
    origin: int
    skipped_after: int
    skipped_through: int
    dropped: int
    intent: int
    collected: int
    reclaimed: int

    @classmethod
    def load(cls, memory: Memory, name: str) -> Self:
        """The words as they stand.

        Those that never change once an epoch is found are held against each other here; the rest
        may be of different moments, and are held against each other by `check`.

        OPS-5: loaded before the slots that are held against them. What a killed writer had prepared
        is undone before its birth or sequence is committed for another operation; so a reader that
        sees that commit cannot see the leftover any more.
        """
        words = cls(
            memory.load(at.REGISTRATIONS_AT),
            memory.load(at.WATERMARK_AT),
            *_BESIDES.unpack(memory.read(at.ORIGIN_AT, _BESIDES.size)),
        )
        watermark = words.watermark
        if not (
            words.skipped_after <= words.skipped_through <= watermark <= LAST_WATERMARK
            and words.origin <= watermark
        ):
            _require(
                name,
                ("watermark", watermark, 0, LAST_WATERMARK),
                ("skipped_through", words.skipped_through, words.skipped_after, watermark),
                ("origin", words.origin, 0, watermark),
            )
        return words

    @property
    def active(self) -> int:
        """How many operations have not ended: what was registered less what has ended."""
        return self.registrations - (self.watermark - self.origin)

    def floor(self, max_completed: int) -> int:
        """The sequence up to which terminal operations are not retained any more."""
        newest = self.watermark - max_completed
        if newest < self.skipped_through:
            newest -= self.skipped_through - self.skipped_after  # these are no operations
        return max(self.collected, self.dropped, newest)

    def check(self, layout: Layout, name: str) -> None:
        """Hold the words against each other, under the writer lock.

        Every walk over sequences or slots is bounded by them, so nothing starts before this.
        """
        lowest = max(0, self.watermark - layout.ring[1])
        _require(
            name,
            ("dropped_through", self.dropped, lowest, self.watermark),
            ("collected_through", self.collected, 0, self.watermark),
            ("reclaimed_through", self.reclaimed, lowest, self.watermark),
        )
        self.check_active(layout, name)

    def check_active(self, layout: Layout, name: str) -> None:
        """Hold the two counters against each other, where they are of one moment."""
        assert layout.config is not None
        most = layout.config.max_operations
        _require(name, ("registrations less completions", self.active, 0, most))


def _require(name: str, *bounds: tuple[str, int, int, int]) -> None:
    for field, value, least, most in bounds:
        if not least <= value <= most:
            raise SegmentCorrupted(name, field, f"{least} to {most}", value)
