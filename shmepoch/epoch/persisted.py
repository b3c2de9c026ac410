"""What of an epoch survives a reboot."""

from __future__ import annotations

from typing import TypeAlias

from shmepoch.epoch.codec import Record
from shmepoch.epoch.completions import CompletionEntry, CompletionSeq
from shmepoch.epoch.cursors import EpochCursorSnapshot
from shmepoch.epoch.operations import OperationLifecycleSnapshot, OperationSpec
from shmepoch.ids import RuntimeEpochId

SkippedRange: TypeAlias = tuple[CompletionSeq, CompletionSeq]
"""Sequences that a recovery left out: those above the first, through the second. No completion has
one of them, and none ever will."""


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

    @property
    def last_seq(self) -> CompletionSeq:
        """RECOVERY-1: the next sequence is above the last entry and above every cursor.

        A feed that restarted below a consumer's cursor would have its new completions taken for
        old ones.
        """
        return max(
            self.entries[-1].seq if self.entries else 0,
            self.cursors.agent_applied_cursor,
            self.cursors.runtime_observed_seq,
            self.cursors.runtime_last_injected_seq,
            max((through for _, through in self.skipped), default=0),
        )

    def left_out(self, skip: int) -> SkippedRange:
        """What a recovery leaves out that goes on `skip` sequences above the last one."""
        return self.entries[-1].seq if self.entries else 0, self.last_seq + skip
