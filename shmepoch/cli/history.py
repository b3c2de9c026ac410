"""`shmepoch history`: what a store has of a session, for people and for machines."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table

from shmepoch.epoch.operations import Completed, OperationStatus, status_of
from shmepoch.ids import SessionId
from shmepoch.stores import HistoryEntry, SqliteRuntimeStore, StoreUnusable


def show(
    store: Path,
    session_id: SessionId,
    *,
    statuses: Collection[OperationStatus],
    since: datetime | None,
    until: datetime | None,
    json: bool,
) -> None:
    """Print the completions of every epoch of a session that match; `StoreError` if unreadable."""
    if not store.exists():  # opening it would make it
        raise StoreUnusable(store, "there is no such file")
    with SqliteRuntimeStore(store) as opened:
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
            Console().print(_table(entries))


def _table(entries: Iterable[HistoryEntry]) -> Table:
    table = Table("epoch", "seq", "ended", "status", "ms", "operation", "name")
    for item in entries:
        entry = item.entry
        outcome = entry.terminal_outcome
        ended = datetime.fromtimestamp(entry.completed_at_ms / 1000, UTC).astimezone()
        table.add_row(
            str(item.epoch_id),
            str(entry.seq),
            ended.isoformat(" ", "milliseconds"),
            status_of(outcome),
            str(outcome.result.duration_ms) if isinstance(outcome, Completed) else "",
            str(entry.operation_id),
            entry.display_name,
        )
    return table


def _milliseconds(moment: datetime | None) -> int | None:
    """Milliseconds since the Unix epoch; a moment without a zone is local time."""
    return None if moment is None else round(moment.timestamp() * 1000)
