"""The events of a run, for a view."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from shmepoch.cli.run.children import Child
from shmepoch.cli.run.jobs import Job
from shmepoch.epoch.completions import CompletionEntry
from shmepoch.epoch.cursors import EpochCursorSnapshot


class SessionFigures(Protocol):
    """The figures of one session for a view."""

    @property
    def number(self) -> int:
        """Its number, from 1 on."""
        ...

    @property
    def counts(self) -> Mapping[str, int]:
        """How many operations have ended with each status; 0 for any other status."""
        ...

    @property
    def watermark(self) -> int:
        """The watermark of its feed."""
        ...

    @property
    def decided(self) -> int:
        """Commands that have ended for good."""
        ...

    @property
    def running(self) -> int:
        """Commands that a worker is running."""
        ...

    @property
    def waiting(self) -> int:
        """Commands that are not assigned yet."""
        ...

    def cursors(self) -> EpochCursorSnapshot:
        """The epoch's cursors."""
        ...

    def participants(self) -> int:
        """How many processes are attached."""
        ...


class View(Protocol):
    """Shows a run to its user."""

    def began(self, sessions: Sequence[SessionFigures], commands: int) -> None:
        """The sessions are open."""
        ...

    def assigned(self, session: SessionFigures, job: Job) -> None:
        """A worker has taken a command."""
        ...

    def ended(self, session: SessionFigures, job: Job, entry: CompletionEntry) -> None:
        """A command's operation has ended."""
        ...

    def told(self, session: SessionFigures, through: int) -> None:
        """The agent has taken a turn, and was told of every completion through this one."""
        ...

    def lost_child(self, session: SessionFigures, child: Child) -> None:
        """A child was killed; another one is being started."""
        ...

    def interrupted(self, name: str, running: int, waiting: int) -> None:
        """A signal of this name ends the run while these numbers of commands run and wait."""
        ...

    def close(self) -> None:
        """The run is over."""
        ...
