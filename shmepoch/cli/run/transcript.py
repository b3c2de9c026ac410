"""The transcript: the notices of one session's agent, one JSON object on each line."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Self

import msgspec

from shmepoch.cli.run.outcomes import Ending, ending, name_is_cut
from shmepoch.cli.run.past import line_of
from shmepoch.epoch.completions import CompletionFeedGap
from shmepoch.epoch.operations import (
    Aborted,
    Cancelled,
    Failed,
    OperationTerminalOutcome,
    Terminated,
    status_of,
)
from shmepoch.ids import RuntimeEpochId, SessionId
from shmepoch.runtime.boundary import Notice


class Line(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One notice. For a gap, `seq` is the last missing sequence and `after_seq` is set.

    A field that does not apply is left out.
    """

    epoch_id: str
    seq: int
    after_seq: int | None = None
    operation_id: str = ""
    line: int = 0
    """The command's line in the jobs file."""
    command: str = ""
    command_cut: bool = False
    """Whether `command` is only the beginning of it."""
    status: str = ""
    exit_status: int | None = None
    """The exit status of a command that ended by itself."""
    signal: str | None = None
    """The name of the signal that killed it."""
    duration_ms: int | None = None
    completed_at_ms: int = 0
    """When it ended, in milliseconds since the Unix epoch."""
    output: str = ""
    """Its output; if it did not complete, the reason stands above."""
    output_cut: bool = False
    """Whether the beginning of its output is missing."""
    output_bytes: int | None = None
    """The bytes of the whole output, if it was cut."""


def path_in(folder: Path, session_id: SessionId) -> Path:
    """The path of a session's transcript."""
    return folder / f"{session_id}.jsonl"


class Transcript:
    """A transcript that is being written, by one agent after the other."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("r+b" if path.exists() else "w+b")
        # The last line is incomplete if its agent was killed while it wrote; its notice comes
        # again.
        content = self._file.read()
        self._file.truncate(content.rfind(b"\n") + 1)
        self._file.seek(0, os.SEEK_END)

    def append(self, epoch_id: RuntimeEpochId, notices: Iterable[Notice]) -> None:
        """Write notices and wait until they are on the disk."""
        with self._named():
            for notice in notices:
                self._file.write(msgspec.json.encode(_line(str(epoch_id), notice)) + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        with self._named():
            self._file.close()

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Adds the name of the file to an `OSError`."""
        try:
            yield
        except OSError as error:
            error.filename = self._file.name
            raise


def read(path: Path) -> list[Line]:
    """The complete lines of a transcript; none if the file does not exist."""
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    return [msgspec.json.decode(line, type=Line) for line in whole.splitlines()]


def _line(epoch_id: str, notice: Notice) -> Line:
    if isinstance(notice, CompletionFeedGap):
        return Line(epoch_id=epoch_id, seq=notice.dropped_through, after_seq=notice.after_seq)
    how = ending(notice)
    return Line(
        epoch_id=epoch_id,
        seq=notice.seq,
        operation_id=str(notice.operation_id),
        line=line_of(notice.operation_id),
        command=notice.display_name,
        command_cut=name_is_cut(notice.display_name),
        status=status_of(notice.terminal_outcome),
        exit_status=how.exit_status,
        signal=how.signal,
        duration_ms=how.duration_ms,
        completed_at_ms=notice.completed_at_ms,
        output=_output(notice.terminal_outcome, how),
        output_cut=how.output_bytes is not None,
        output_bytes=how.output_bytes,
    )


def _output(outcome: OperationTerminalOutcome, how: Ending) -> str:
    match outcome:
        case Failed(error) if how.duration_ms is not None:
            why, _, _ = error.partition("\n")
            return f"{why}\n{how.output}"
        case Failed(reason) | Aborted(reason) | Cancelled(reason) | Terminated(reason):
            return reason or ""
        case _:
            return how.output
