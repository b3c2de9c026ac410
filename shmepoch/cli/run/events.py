"""What happens during a run, for whoever shows it."""

from __future__ import annotations

from typing import Protocol

from shmepoch.cli.run.jobs import Job
from shmepoch.epoch.completions import CompletionEntry
from shmepoch.epoch.cursors import EpochCursorSnapshot


class Standing(Protocol):
    """One session as a view may show it."""

    number: int
    running: int
    counts: dict[str, int]
    watermark: int

    @property
    def waiting(self) -> int:
        """Commands that no worker has yet."""
        ...

    def cursors(self) -> EpochCursorSnapshot:
        """The epoch's cursors."""
        ...

    def participants(self) -> int:
        """How many processes are attached."""
        ...


class View(Protocol):
    """Shows a run to its user."""

    def began(self, sessions: list[Standing], commands: int) -> None:
        """The sessions are there."""
        ...

    def assigned(self, session: Standing, job: Job) -> None:
        """A worker has taken a command."""
        ...

    def ended(self, session: Standing, job: Job, entry: CompletionEntry) -> None:
        """A command's operation has ended."""
        ...

    def told(self, session: Standing) -> None:
        """The agent has taken a turn."""
        ...

    def lost_child(self, session: Standing, role: str, pid: int, *, killed: bool) -> None:
        """A child has died; `killed` by the run itself."""
        ...

    def close(self) -> None:
        """The run is over."""
        ...
