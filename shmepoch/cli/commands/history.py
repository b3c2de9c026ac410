"""`shmepoch history`: shows a session from a store, for people and for machines."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from shmepoch.cli.exits import reporting
from shmepoch.cli.options import Json, Store
from shmepoch.cli.run.plan import RUNS
from shmepoch.cli.streams import complain, print_json
from shmepoch.cli.tables import print_table, table_of_entries
from shmepoch.epoch.operations import OperationStatus
from shmepoch.errors import ShmepochError, StoreUnusable
from shmepoch.ids import SessionId
from shmepoch.stores import HistoryEntry, SqliteRuntimeStore


def history(
    store: Store,
    session: Annotated[
        str | None, typer.Argument(help="The session's id; without one, every session is listed.")
    ] = None,
    status: Annotated[
        list[OperationStatus] | None, typer.Option(help="Only these; may be given several times.")
    ] = None,
    since: Annotated[datetime | None, typer.Option(help="Ended then or later.")] = None,
    until: Annotated[datetime | None, typer.Option(help="Ended before then.")] = None,
    json: Json = False,
) -> None:
    """Show a session from a store: how its operations ended, epoch by epoch.

    Times are local. Exit status: 0, or 2 for a session or a file that cannot be read.
    """
    with reporting(ShmepochError, ValueError):
        if session is None:
            for option, value in (("--status", status), ("--since", since), ("--until", until)):
                if value:
                    raise typer.BadParameter(
                        "chooses among the operations of a session; name the session",
                        param_hint=option,
                    )
            _list_sessions(store, json=json)
        else:
            _show(
                store,
                SessionId.parse(session),
                statuses=status or (),
                since=since,
                until=until,
                json=json,
            )


class SessionUnknown(ShmepochError, LookupError):
    """The store does not have the session."""

    session_id: SessionId
    store: Path
    message = "{store} knows no session {session_id}"


def _list_sessions(store: Path, *, json: bool) -> None:
    """Print the sessions of a store, the oldest first; `StoreError` if it is unreadable.

    Damaged rows are left out; standard error names and counts them.
    """
    with _reading(store) as opened:
        for session_id in opened.sessions():
            if session_id != RUNS:
                if json:
                    print_json(msgspec.json.encode({"session_id": str(session_id)}))
                else:
                    print(session_id)


def _show(
    store: Path,
    session_id: SessionId,
    *,
    statuses: Collection[OperationStatus],
    since: datetime | None,
    until: datetime | None,
    json: bool,
) -> None:
    """Print the completions of every epoch of a session that match.

    Damaged rows are left out; standard error names and counts them. Raises
    `SessionUnknown`, and `StoreError` if the store is not readable.
    """
    with _reading(store) as opened:
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
                print_json(entry.to_json())
        else:
            _print_tables(entries)


@contextmanager
def _reading(path: Path) -> Iterator[SqliteRuntimeStore]:
    """Open a store for reading only; at the end, report how many rows are damaged."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise StoreUnusable(path, "there is no such file") from None
    except OSError as error:
        raise StoreUnusable(path, error.strerror or str(error)) from error
    if size == 0:
        raise StoreUnusable(path, "it is empty, and no store")
    logging.getLogger("shmepoch.stores").setLevel(logging.WARNING)  # it names each damaged row
    with SqliteRuntimeStore(path, read_only=True) as opened:
        yield opened
        if opened.damaged:
            complain(f"{path}: damaged rows that are not shown: {opened.damaged}")


def _print_tables(entries: Iterable[HistoryEntry]) -> None:
    """A table for each epoch."""
    for epoch_id, items in groupby(entries, key=lambda item: item.epoch_id):
        print_table(table_of_entries(f"epoch {epoch_id}", (item.entry for item in items)))


def _milliseconds(moment: datetime | None) -> int | None:
    """Milliseconds since the Unix epoch; a moment without a zone is local time."""
    if moment is None:
        return None
    try:
        return round(moment.timestamp() * 1000)
    except (ValueError, OverflowError):
        # In UTC the year may be below 1 or above 9999; a few hours do not matter there.
        return round(moment.replace(tzinfo=UTC).timestamp() * 1000)
