"""What of an epoch survives a reboot."""

from __future__ import annotations

from typing import Self, TypeAlias

import msgspec

from shmepoch.epoch.codec import Record, decode_json
from shmepoch.epoch.completions import CompletionEntry, CompletionSeq
from shmepoch.epoch.cursors import EpochCursorSnapshot, Position, WrittenCursors
from shmepoch.epoch.operations import OperationLifecycleSnapshot, OperationSpec
from shmepoch.ids import RuntimeEpochId

SkippedRange: TypeAlias = tuple[Position, Position]
"""Sequences that a recovery left out: those above the first, through the second. No completion has
one of them, and none ever will."""


class _Written(msgspec.Struct):
    """What the JSON of a `PersistedOpsSnapshot` has to have besides."""

    cursors: WrittenCursors


class PersistedOpsSnapshot(Record, kw_only=True, frozen=True):
    """An epoch as it is stored: enough to continue it in a new segment.

    `operations` are those the registry held, terminal ones included, with the `specs` they were
    registered with; `entries` are the feed's, those beyond the registry's retention too.
    """

    epoch_id: RuntimeEpochId
    operations: tuple[OperationLifecycleSnapshot, ...] = ()
    specs: tuple[OperationSpec, ...] = ()
    entries: tuple[CompletionEntry, ...] = ()
    cursors: EpochCursorSnapshot = EpochCursorSnapshot()
    skipped: tuple[SkippedRange, ...] = ()
    """What every recovery so far has left out; the next sequence is above them (RECOVERY-2)."""

    @classmethod
    def from_json(cls, data: bytes | str) -> Self:
        decode_json(_Written, data, cls)
        return decode_json(cls, data)

    @property
    def last_seq(self) -> CompletionSeq:
        """RECOVERY-1: the next sequence is above the last entry and above every cursor.

        A feed that restarted below a consumer's cursor would have its new completions taken for
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
        """Where the cursors go on after a recovery: CURSOR-2 says what they may be at most."""
        return self.cursors.continuable(self._last_stored)

    def left_out(self, skip: int) -> SkippedRange:
        """What a recovery leaves out that goes on `skip` sequences above the last one."""
        return self.entries[-1].seq if self.entries else 0, self.last_seq + skip
