"""The summary of a run, in figures."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from shmepoch.cli.streams import counted
from shmepoch.epoch.cursors import EpochCursorSnapshot


class Notices(msgspec.Struct, frozen=True, kw_only=True):
    """The notices of the agents: distinct ones, repetitions, and lost ones."""

    delivered: int = 0
    duplicates: int = 0
    lost: int = 0


class SessionSummary(msgspec.Struct, frozen=True, kw_only=True):
    """One session's epoch at the end."""

    session_id: str
    epoch_id: str
    watermark: int
    cursors: EpochCursorSnapshot
    notices: Notices


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """The whole run. `commands` counts lines of the file; the other counts are of operations.

    In a resumed run they count from its first beginning, and `finished_before` counts the commands
    that had finished earlier; kills, restarts and the duration count from the resumption.
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
