"""The views of a run: a live table on a terminal, elsewhere a line for each event."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Final, TextIO, cast

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TimeElapsedColumn
from rich.text import Text

from shmepoch.cli.run.children import Child
from shmepoch.cli.run.events import SessionFigures, View
from shmepoch.cli.run.jobs import Job
from shmepoch.cli.run.outcomes import ending
from shmepoch.cli.run.terminal import LastingStream
from shmepoch.cli.streams import counted, visible
from shmepoch.epoch.completions import CompletionEntry
from shmepoch.epoch.operations import Completed, Failed, OperationStatus, Terminated, status_of

#: How long after a change the table is drawn, and how often without a change, for the time.
_DRAW_AFTER_S: Final = 0.2
_DRAW_EVERY_S: Final = 1.0
#: The width of the names of the rows, and of the figures of one session.
_NAME_WIDTH: Final = 16
_FIGURE_WIDTH: Final = 9
#: How much of a failed command's output is shown: its last lines, and the beginning of each.
_SHOWN_LINES: Final = 10
_SHOWN_WIDTH: Final = 200


def view_for(stream: TextIO) -> View:
    """The view for a stream: a table for a terminal, else lines."""
    stream = cast(TextIO, LastingStream(stream))
    console = Console(file=stream)
    if stream.isatty() and not console.is_dumb_terminal:
        return TableView(console)
    return LineView(lambda line: print(visible(line), file=stream, flush=True))


class LineView:
    """A line for each event."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say

    def began(self, sessions: Sequence[SessionFigures], commands: int) -> None:
        before = sum(session.decided for session in sessions)
        finished = f", {before} of them finished before" if before else ""
        where = counted(len(sessions), "session")
        self._say(f"{counted(commands, 'command')} in {where}{finished}")

    def assigned(self, session: SessionFigures, job: Job) -> None:
        self._say(f"session {session.number}: started    line {job.line}: {job.command}")

    def ended(self, session: SessionFigures, job: Job, entry: CompletionEntry) -> None:
        status = status_of(entry.terminal_outcome)
        self._say(f"session {session.number}: {status:10} line {job.line}{_how(entry)}")
        for line in _printed(entry):
            self._say(line)

    def told(self, session: SessionFigures, through: int) -> None:
        told = counted(through, "completion")
        self._say(f"session {session.number}: agent has been told of {told}")

    def lost_child(self, session: SessionFigures, child: Child) -> None:
        self._say(f"session {session.number}: {_loss(child)}")

    def interrupted(self, name: str, running: int, waiting: int) -> None:
        self._say(_interruption(name, running, waiting))

    def close(self) -> None:
        pass


class TableView:
    """A table of the sessions; above it, the commands that did not complete."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            BarColumn(bar_width=None), MofNCompleteColumn(), TimeElapsedColumn()
        )
        self._live = Live(console=console, auto_refresh=False)
        self._sessions: Sequence[SessionFigures] = ()
        self._bar = TaskID(0)
        self._next: asyncio.TimerHandle | None = None
        self._stale = False

    def began(self, sessions: Sequence[SessionFigures], commands: int) -> None:
        self._sessions = sessions
        self._bar = self._progress.add_task("commands", total=commands)
        self._live.start()
        self._draw()

    def assigned(self, session: SessionFigures, job: Job) -> None:
        self._changed()

    def ended(self, session: SessionFigures, job: Job, entry: CompletionEntry) -> None:
        status = status_of(entry.terminal_outcome)
        if status is not OperationStatus.COMPLETED:
            self._say(f"line {job.line} {status}{_how(entry)}: {job.command}")
            for line in _printed(entry):
                self._say(line)
        self._changed()

    def told(self, session: SessionFigures, through: int) -> None:
        self._changed()

    def lost_child(self, session: SessionFigures, child: Child) -> None:
        self._say(f"session {session.number}: {_loss(child)}")
        self._changed()

    def interrupted(self, name: str, running: int, waiting: int) -> None:
        self._say(_interruption(name, running, waiting))

    def close(self) -> None:
        if self._next is not None:
            self._draw()
            self._next.cancel()
            self._live.stop()

    def _say(self, line: str) -> None:
        self._console.print(Text(visible(line)), soft_wrap=True)

    def _changed(self) -> None:
        if not self._stale:
            self._stale = True
            self._draw_after(_DRAW_AFTER_S)

    def _draw_after(self, seconds: float) -> None:
        if self._next is not None:
            self._next.cancel()
        self._next = asyncio.get_running_loop().call_later(seconds, self._draw)

    def _draw(self) -> None:
        decided = sum(session.decided for session in self._sessions)
        self._progress.update(self._bar, completed=decided)
        self._live.update(Group(self._table(), self._progress), refresh=True)
        self._stale = False
        self._draw_after(_DRAW_EVERY_S)

    def _table(self) -> Text:
        shown = self._columns()
        columns = [_figures(session) for session in self._sessions]
        rows = {"session": [str(session.number) for session in self._sessions[:shown]]}
        rows |= {name: [str(column[name]) for column in columns[:shown]] for name in columns[0]}
        if len(columns) > 1:
            rows["session"].append(f"all {len(columns)}")
            for name in columns[0]:
                rows[name].append(str(sum(column[name] for column in columns)))
        # Laid out by hand: it is drawn every second, and a rich.table takes several times as long.
        lines = (
            f"{name:{_NAME_WIDTH}}" + "".join(f"{figure:>{_FIGURE_WIDTH}}" for figure in figures)
            for name, figures in rows.items()
        )
        return Text("\n".join(lines), no_wrap=True, overflow="crop")

    def _columns(self) -> int:
        """How many sessions fit beside the column of their sum."""
        return max(1, (self._console.width - _NAME_WIDTH) // _FIGURE_WIDTH - 1)


def _figures(session: SessionFigures) -> dict[str, int]:
    """The figures of a session, by the names of the table's rows."""
    cursors = session.cursors()
    return {
        "waiting": session.waiting,
        "running": session.running,
        "completed": session.counts[OperationStatus.COMPLETED],
        "failed": session.counts[OperationStatus.FAILED],
        "terminated": session.counts[OperationStatus.TERMINATED],
        "cancelled": session.counts[OperationStatus.CANCELLED],
        "watermark": session.watermark,
        "runtime observed": cursors.runtime_observed_seq,
        "runtime injected": cursors.runtime_last_injected_seq,
        "agent applied": cursors.agent_applied_cursor,
        "lag": max(0, session.watermark - cursors.agent_applied_cursor),
        "participants": session.participants(),
    }


def _how(entry: CompletionEntry) -> str:
    match entry.terminal_outcome:
        case Completed(result):
            return f" in {result.duration_ms} ms"
        case Failed(text) | Terminated(text):
            first_line, _, _ = text.partition("\n")
            return f" ({first_line})"
        case _:
            return ""


def _printed(entry: CompletionEntry) -> list[str]:
    """The last lines of a failed command's output."""
    if status_of(entry.terminal_outcome) is not OperationStatus.FAILED:
        return []
    lines = ending(entry).output.splitlines()
    shown = [f"    | {_cut(line)}" for line in lines[-_SHOWN_LINES:]]
    return ["    | ..."] * (len(lines) > _SHOWN_LINES) + shown


def _cut(line: str) -> str:
    return line if len(line) <= _SHOWN_WIDTH else f"{line[:_SHOWN_WIDTH]}..."


def _loss(child: Child) -> str:
    who = f"{child.role} process {child.pid}"
    return f"{who} was killed{' on purpose' if child.killed else ''}; another takes its place"


def _interruption(name: str, running: int, waiting: int) -> str:
    return (
        f"{name}: {counted(running, 'command')} ended while running, {waiting} not run; "
        "a second signal kills what still runs"
    )
