"""`shmepoch history`: what a store has of a session, for people and for machines."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from shmepoch.cli.run.plan import RUNS
from shmepoch.epoch.operations import (
    Aborted,
    Cancelled,
    Completed,
    Failed,
    OperationStatus,
    OperationTerminalOutcome,
    Terminated,
    status_of,
)
from shmepoch.errors import ShmepochError, StoreUnusable
from shmepoch.ids import SessionId
from shmepoch.stores import HistoryEntry, SqliteRuntimeStore

#: How wide a table is that no terminal bounds: a name has at most 200 bytes.
_UNBOUNDED_WIDTH: Final = 400


class SessionUnknown(ShmepochError, LookupError):
    """The store has never heard of the session."""

    session_id: SessionId
    store: Path

    def __init__(self, session_id: SessionId, store: Path) -> None:
        super().__init__(
            f"{store} knows no session {session_id}", session_id=session_id, store=store
        )


def list_sessions(store: Path) -> None:
    """Print the sessions that a store knows, the oldest first; `StoreError` if unreadable."""
    with _open(store) as opened:
        for session_id in opened.sessions():
            if session_id != RUNS:
                print(session_id)


def show(
    store: Path,
    session_id: SessionId,
    *,
    statuses: Collection[OperationStatus],
    since: datetime | None,
    until: datetime | None,
    json: bool,
) -> None:
    """Print the completions of every epoch of a session that match.

    Raises `SessionUnknown`, and `StoreError` if the store is not readable.
    """
    with _open(store) as opened:
        if session_id not in opened.sessions():
            raise SessionUnknown(session_id, store)
        entries = opened.history(
            session_id,
            statuses=statuses or None,
            from_ms=_milliseconds(since),
            until_ms=_milliseconds(until),
        )
        if json:
            for entry in entries:
                print(entry.to_json().decode())
        else:
            _print_tables(entries)


def _open(store: Path) -> SqliteRuntimeStore:
    if not store.exists():  # opening it would make it
        raise StoreUnusable(store, "there is no such file")
    return SqliteRuntimeStore(store)


def _print_tables(entries: Iterable[HistoryEntry]) -> None:
    """A table for each epoch."""
    console = Console()
    if not console.is_terminal:
        console.width = _UNBOUNDED_WIDTH
    for epoch_id, items in groupby(entries, key=lambda item: item.epoch_id):
        table = Table(title=f"epoch {epoch_id}", title_justify="left", box=None)
        table.add_column("seq", justify="right", no_wrap=True)
        table.add_column("ended", no_wrap=True)
        table.add_column("status", no_wrap=True)
        for heading in ("name", "how"):
            table.add_column(heading, overflow="fold")
        for item in items:
            entry = item.entry
            ended = datetime.fromtimestamp(entry.completed_at_ms / 1000)
            table.add_row(
                str(entry.seq),
                ended.isoformat(" ", "seconds"),
                status_of(entry.terminal_outcome),
                Text(entry.display_name),  # a command may look like markup
                Text(_how(entry.terminal_outcome)),
            )
        console.print(table)


def _how(outcome: OperationTerminalOutcome) -> str:
    match outcome:
        case Completed(result):
            return f"in {result.duration_ms} ms"
        case Failed(text) | Terminated(text):
            return text.partition("\n")[0]
        case Aborted(reason) | Cancelled(reason):
            return (reason or "").partition("\n")[0]
        case _:
            return ""


def _milliseconds(moment: datetime | None) -> int | None:
    """Milliseconds since the Unix epoch; a moment without a zone is local time."""
    return None if moment is None else round(moment.timestamp() * 1000)
