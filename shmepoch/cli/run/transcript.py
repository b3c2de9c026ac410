"""The transcript: what one session's agent was told, one JSON object a line."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Self

import msgspec

from shmepoch.epoch.completions import CompletionEntry, CompletionFeedGap
from shmepoch.epoch.operations import (
    Aborted,
    Cancelled,
    Completed,
    Failed,
    OperationTerminalOutcome,
    Terminated,
    status_of,
)
from shmepoch.ids import RuntimeEpochId, SessionId
from shmepoch.runtime.boundary import Notice


class Line(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One notice; of a gap, `seq` is the last that is missing and `after_seq` is set."""

    epoch_id: str
    seq: int
    after_seq: int | None = None
    operation_id: str = ""
    command: str = ""
    status: str = ""
    output: str = ""


def path_in(folder: Path, session_id: SessionId) -> Path:
    """Where a session's transcript lies."""
    return folder / f"{session_id}.jsonl"


class Transcript:
    """A transcript that is being written, by one agent after the other."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("r+b" if path.exists() else "w+b")
        # The last line is cut if its agent was killed while it wrote; its notice comes again.
        content = self._file.read()
        self._file.truncate(content.rfind(b"\n") + 1)
        self._file.seek(0, os.SEEK_END)

    def append(self, epoch_id: RuntimeEpochId, notices: Iterable[Notice]) -> None:
        """Write notices and wait until they are on the disk."""
        for notice in notices:
            self._file.write(msgspec.json.encode(_line(str(epoch_id), notice)) + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()


def read(path: Path) -> list[Line]:
    """The whole lines of a transcript; none if it was never begun."""
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    return [msgspec.json.decode(line, type=Line) for line in whole.splitlines()]


def _line(epoch_id: str, notice: Notice) -> Line:
    if isinstance(notice, CompletionFeedGap):
        return Line(epoch_id=epoch_id, seq=notice.dropped_through, after_seq=notice.after_seq)
    return Line(
        epoch_id=epoch_id,
        seq=notice.seq,
        operation_id=str(notice.operation_id),
        command=notice.display_name,
        status=status_of(notice.terminal_outcome),
        output=_output(notice),
    )


def _output(entry: CompletionEntry) -> str:
    outcome: OperationTerminalOutcome = entry.terminal_outcome
    match outcome:
        case Completed(result):
            return result.content
        case Failed(error):
            return error
        case Aborted(reason) | Cancelled(reason) | Terminated(reason):
            return reason or ""
        case _:
            return ""
