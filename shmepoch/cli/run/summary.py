"""What a run comes to, in figures."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from shmepoch.cli.streams import counted
from shmepoch.epoch.cursors import EpochCursorSnapshot


class Notices(msgspec.Struct, frozen=True, kw_only=True):
    """What agents were told: distinct notices, repetitions, and what never arrived."""

    delivered: int = 0
    duplicates: int = 0
    lost: int = 0


class SessionSummary(msgspec.Struct, frozen=True, kw_only=True):
    """One session's epoch as it ended."""

    session_id: str
    epoch_id: str
    watermark: int
    cursors: EpochCursorSnapshot
    notices: Notices


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """The whole run. `commands` are lines of the file, the rest of the counts operations.

    Of a run that was resumed they count from its beginning, and `finished_before` are the commands
    that needed nothing any more; kills, restarts and the duration are those since it was resumed.
    """

    commands: int
    finished_before: int
    operations: int
    completed: int
    failed: int
    terminated: int
    cancelled: int
    retried: int
    notices: Notices
    kills: int
    restarts: int
    duration_s: float
    sessions: Sequence[SessionSummary]

    def line(self) -> str:
        """The figures in one line."""
        return (
            f"{counted(self.commands, 'command')}, {self.completed} completed, "
            f"{self.failed} failed, {self.terminated} terminated, {self.cancelled} cancelled, "
            f"{self.retried} run again; "
            f"{counted(self.notices.delivered, 'notice')} delivered, "
            f"{counted(self.notices.duplicates, 'duplicate')}, {self.notices.lost} lost; "
            f"{counted(self.kills, 'kill')}, {self.duration_s:.1f} s"
        )
