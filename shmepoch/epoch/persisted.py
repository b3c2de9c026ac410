"""The records of an epoch that survive a reboot."""

from __future__ import annotations

from typing import Self, TypeAlias

import msgspec

from shmepoch.epoch.codec import Record, decode_json
from shmepoch.epoch.completions import CompletionEntry, CompletionSeq
from shmepoch.epoch.cursors import EpochCursorSnapshot, Position, WrittenCursors
from shmepoch.epoch.operations import OperationLifecycleSnapshot, OperationSpec
from shmepoch.ids import RuntimeEpochId

SkippedRange: TypeAlias = tuple[Position, Position]
"""Sequences that a recovery skipped: those above the first, through the second. No completion ever
has one of them."""


class _Written(msgspec.Struct):
    """The other required fields in the JSON of a `PersistedOpsSnapshot`."""

    cursors: WrittenCursors


class PersistedOpsSnapshot(Record, kw_only=True, frozen=True):
    """An epoch as it is stored: enough to continue it in a new segment.

    `operations` are those that the registry held, terminal ones included, and `specs` are their
    specs. `entries` are those of the feed, which may go back further than the registry's retention.
    """

    epoch_id: RuntimeEpochId
    operations: tuple[OperationLifecycleSnapshot, ...] = ()
    specs: tuple[OperationSpec, ...] = ()
    entries: tuple[CompletionEntry, ...] = ()
    cursors: EpochCursorSnapshot = EpochCursorSnapshot()
    skipped: tuple[SkippedRange, ...] = ()
    """The sequences that the recoveries so far have skipped; the next is above them
    (RECOVERY-2)."""

    @classmethod
    def from_json(cls, data: bytes | str) -> Self:
        decode_json(_Written, data, cls)
        return decode_json(cls, data)

    @property
    def last_seq(self) -> CompletionSeq:
        """RECOVERY-1: the next sequence is above the last entry and above every cursor.

        If a feed restarted below a consumer's cursor, the consumer would take new completions for
        old ones.
        """
        cursors = self.recovered_cursors
        return max(
            self._last_stored,
            cursors.agent_applied_cursor,
            cursors.runtime_observed_seq,
            cursors.runtime_last_injected_seq,
        )

    @property
    def _last_stored(self) -> CompletionSeq:
        newest = self.entries[-1].seq if self.entries else 0
        return max(newest, *(through for _, through in self.skipped), 0)

    @property
    def recovered_cursors(self) -> EpochCursorSnapshot:
        """The positions of the cursors after a recovery; CURSOR-2 limits them."""
        return self.cursors.continuable(self._last_stored)

    def left_out(self, skip: int) -> SkippedRange:
        """The sequences that a recovery skips if it continues `skip` above the last one."""
        return self.entries[-1].seq if self.entries else 0, self.last_seq + skip
