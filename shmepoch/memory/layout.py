"""Where the parts of one segment lie: derived from its configuration, never stored.

The byte layout itself is `native/layout.h`; its names are constants of `shmepoch._native`.
"""

from __future__ import annotations

from typing import Final

from shmepoch import _native as at
from shmepoch.config import OpsLifecycleConfig


class Layout:
    """The layout of a segment; `config` None lays out cursors only."""

    def __init__(self, config: OpsLifecycleConfig | None) -> None:
        self.config: Final = config
        self.max_participants: Final = (config or OpsLifecycleConfig()).max_participants
        completed, _, operations, feed_bytes, participants, _ = self.capacities()
        parts = at.layout(completed, operations, feed_bytes, participants)
        self.size: Final = parts["size"]
        self.fingerprints: Final = parts["fingerprints"]
        self.retained: Final = parts["retained"]
        self.index: Final = parts["index"]
        #: How many sequences the feed can hold.
        self.entries: Final = parts["index_count"]
        self.slots: Final = operations
        self.slots_at: Final = parts["slots"]
        self.slot_size: Final = parts["slot_size"]
        self.records: Final = parts["records"]
        self.feed_bytes: Final = feed_bytes

    def capacities(self) -> tuple[int, int, int, int, int, int]:
        """The words at `CAPACITIES_AT`, from which `from_capacities` rebuilds this layout."""
        if self.config is None:
            return 0, 0, 0, 0, self.max_participants, 0
        return self.config.capacities()

    @staticmethod
    def from_capacities(words: tuple[int, ...]) -> Layout:
        """The layout of a segment whose header holds `words`; `ConfigInvalid` if none has them."""
        completed, concurrent, operations, feed_bytes, participants, store_wait_ms = words
        if not (completed or operations or feed_bytes):
            return Layout(None)
        return Layout(
            OpsLifecycleConfig(
                max_completed=completed,
                max_concurrent=concurrent or None,
                max_operations=operations,
                feed_bytes=feed_bytes,
                max_participants=participants,
                store_wait_ms=store_wait_ms,
            )
        )

    def slot(self, index: int) -> int:
        """The offset of an operation slot."""
        return self.slots_at + index * self.slot_size

    def fingerprint(self, index: int) -> int:
        """The offset of a slot's word in the fingerprint column."""
        return self.fingerprints + index * at.WORD

    def index_word(self, seq: int) -> int:
        """The offset of a sequence's word in the index."""
        return self.index + seq % self.entries * at.WORD

    @staticmethod
    def record_size(first: int, second: int) -> int:
        """The bytes of a record in the feed, from the lengths of its two parts; each is padded."""
        return at.RECORD_SIZE + sum(-(-part // at.WORD) * at.WORD for part in (first, second))

    @staticmethod
    def cursor(index: int) -> int:
        """The offset of a cursor."""
        return at.CURSORS_AT + index * at.LINE

    @staticmethod
    def participant(index: int) -> int:
        """The offset of a participant slot."""
        return at.PARTICIPANTS_AT + index * at.PARTICIPANT_SIZE
