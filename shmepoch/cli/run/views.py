"""How a run is shown: a live table on a terminal, elsewhere a line for each event."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from typing import Final, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TimeElapsedColumn
from rich.table import Table

from shmepoch.cli.run.events import Standing, View
from shmepoch.cli.run.jobs import Job
from shmepoch.epoch.completions import CompletionEntry
from shmepoch.epoch.operations import Completed, Failed, OperationStatus, Terminated, status_of

_SHOWN: Final = (
    OperationStatus.COMPLETED,
    OperationStatus.FAILED,
    OperationStatus.TERMINATED,
    OperationStatus.CANCELLED,
)
#: Between two drawings of the table: often enough to watch, and idle runs draw nothing.
_DRAW_EVERY_S: Final = 0.2


def view_for(stream: TextIO) -> View:
    """The view that fits where the events go."""
    return TableView(stream) if stream.isatty() else LineView(stream)


class LineView:
    """A line for each event."""

    def __init__(self, stream: TextIO = sys.stdout) -> None:
        self._stream = stream

    def began(self, sessions: Sequence[Standing], commands: int) -> None:
        self._say(f"{commands} commands in {len(sessions)} sessions")

    def assigned(self, session: Standing, job: Job) -> None:
        self._say(f"session {session.number}: started   line {job.line}: {job.command}")

    def ended(self, session: Standing, job: Job, entry: CompletionEntry) -> None:
        status = status_of(entry.terminal_outcome)
        self._say(f"session {session.number}: {status:9} line {job.line}: {_how(entry)}")

    def told(self, session: Standing) -> None:
        pass

    def lost_child(self, session: Standing, role: str, pid: int, *, killed: bool) -> None:
        how = "killed" if killed else "died"
        self._say(f"session {session.number}: {role} {pid} {how}; starting another")

    def close(self) -> None:
        pass

    def _say(self, line: str) -> None:
        print(line, file=self._stream, flush=True)


def _how(entry: CompletionEntry) -> str:
    match entry.terminal_outcome:
        case Completed(result):
            return f"in {result.duration_ms} ms"
        case Failed(text) | Terminated(text):
            return text.partition("\n")[0]
        case _:
            return ""


class TableView:
    """A table of the sessions that is drawn again when something has changed."""

    def __init__(self, stream: TextIO) -> None:
        self._console = Console(file=stream)
        self._progress = Progress(
            BarColumn(bar_width=None), MofNCompleteColumn(), TimeElapsedColumn()
        )
        self._live = Live(console=self._console, auto_refresh=False)
        self._sessions: Sequence[Standing] = ()
        self._bar = TaskID(0)
        self._drawing: asyncio.TimerHandle | None = None

    def began(self, sessions: Sequence[Standing], commands: int) -> None:
        self._sessions = sessions
        self._bar = self._progress.add_task("commands", total=commands)
        self._live.start()
        self._changed()

    def assigned(self, session: Standing, job: Job) -> None:
        self._changed()

    def ended(self, session: Standing, job: Job, entry: CompletionEntry) -> None:
        self._changed()

    def told(self, session: Standing) -> None:
        self._changed()

    def lost_child(self, session: Standing, role: str, pid: int, *, killed: bool) -> None:
        self._changed()

    def close(self) -> None:
        if self._drawing is not None:
            self._drawing.cancel()
        if self._live.is_started:
            self._draw()
            self._live.stop()

    def _changed(self) -> None:
        if self._drawing is None:
            loop = asyncio.get_running_loop()
            self._drawing = loop.call_later(_DRAW_EVERY_S, self._draw)

    def _draw(self) -> None:
        self._drawing = None
        undecided = sum(session.waiting + session.running for session in self._sessions)
        total = self._progress.tasks[self._bar].total or 0
        self._progress.update(self._bar, completed=max(0, total - undecided))
        self._live.update(Group(self._table(), self._progress), refresh=True)

    def _table(self) -> Table:
        table = Table("session", "waiting", "running", *(str(status) for status in _SHOWN))
        for heading in ("watermark", "observed", "injected", "applied", "lag", "participants"):
            table.add_column(heading)
        for column in table.columns:
            column.justify = "right"
        for session in self._sessions:
            cursors = session.cursors()
            figures = (
                session.number,
                session.waiting,
                session.running,
                *(session.counts.get(status, 0) for status in _SHOWN),
                session.watermark,
                cursors.runtime_observed_seq,
                cursors.runtime_last_injected_seq,
                cursors.agent_applied_cursor,
                max(0, session.watermark - cursors.agent_applied_cursor),
                session.participants(),
            )
            table.add_row(*map(str, figures))
        return table
