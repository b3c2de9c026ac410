"""`shmepoch history`: shows a session from a store, for people and for machines."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Annotated, Final, NamedTuple

import typer

from shmepoch.cli.entries import local_time
from shmepoch.cli.exits import reporting
from shmepoch.cli.options import Json, Store
from shmepoch.cli.run.plan import RUNS
from shmepoch.cli.streams import complain, print_json
from shmepoch.cli.tables import print_table, table_of_entries
from shmepoch.epoch.operations import OperationStatus
from shmepoch.errors import ShmepochError, StoreUnusable
from shmepoch.ids import SessionId
from shmepoch.monitoring.selection import digits_of, nearest
from shmepoch.stores import EpochOverview, HistoryEntry, SqliteRuntimeStore

#: The number of possible sessions that an error names.
_NAMED: Final = 10


def history(
    store: Store,
    session: Annotated[
        str | None,
        typer.Argument(
            help="The session's id, or how it begins; without one, every session is listed.",
            autocompletion=_stored_sessions,
        ),
    ] = None,
    status: Annotated[
        list[OperationStatus] | None, typer.Option(help="Only these; may be given several times.")
    ] = None,
    since: Annotated[datetime | None, typer.Option(help="Ended then or later.")] = None,
    until: Annotated[datetime | None, typer.Option(help="Ended before then.")] = None,
    last: Annotated[int | None, typer.Option(min=1, help="Only so many, the newest.")] = None,
    json: Json = False,
) -> None:
    """Show the contents of a store: its sessions and epochs, or how a session's operations ended.

    Times are local. The store is only read: a copy, a read-only mount or another user's will do.

    Examples:

        shmepoch history --store epochs.db
        shmepoch history --store epochs.db 01a2149c --status failed --last 10
        shmepoch history --store epochs.db 01a2149c --since 2026-03-01 --json

    Exit status: 0, or 2 for a session or a file that cannot be read.
    """
    with reporting(ShmepochError, ValueError):
        if session is None:
            chosen = {"--status": status, "--since": since, "--until": until, "--last": last}
            for option, value in chosen.items():
                if value:
                    raise typer.BadParameter(
                        "chooses among the operations of a session; name the session",
                        param_hint=option,
                    )
            _list_sessions(store, json=json)
        else:
            filters = _Filters(status or (), since, until, last)
            _show(store, session, filters, json=json)


class _Filters(NamedTuple):
    """The operations of a session to show."""

    statuses: Collection[OperationStatus]
    since: datetime | None
    until: datetime | None
    last: int | None


class SessionUnknown(ShmepochError, LookupError):
    """The store has no session with an id that begins with the written text."""

    text: str
    store: Path
    nearest: tuple[SessionId, ...]

    def _text(self) -> str:
        meant = f"; the nearest: {', '.join(map(str, self.nearest))}" if self.nearest else ""
        return (
            f"{self.store} knows no session with an id that begins with {self.text!r}{meant}; "
            "without a session, the command lists them"
        )


class SessionAmbiguous(ShmepochError, LookupError):
    """The store has several sessions with ids that begin with the written text."""

    text: str
    store: Path
    sessions: tuple[SessionId, ...]

    def _text(self) -> str:
        named = ", ".join(map(str, self.sessions[:_NAMED]))
        rest = len(self.sessions) - _NAMED
        more = f" and {rest} more" if rest > 0 else ""
        return (
            f"{self.text!r} may be any of {len(self.sessions)} sessions of {self.store}; write "
            f"more of the id: {named}{more}"
        )


def _list_sessions(store: Path, *, json: bool) -> None:
    """Print the sessions of a store and their epochs, the oldest session first; `StoreError` if it
    is unreadable.

    Damaged rows are left out; standard error names and counts them.
    """
    with _reading(store) as opened:
        for session in opened.overview():
            if session.session_id == RUNS:
                continue
            if json:
                print_json(session.to_json())
                continue
            print(f"session {session.session_id}")
            for epoch in session.epochs:
                print(f"  epoch {epoch.epoch_id}, {'ended' if epoch.sealed else 'current'}")
                print(f"    {_counts(epoch)}")


def _counts(epoch: EpochOverview) -> str:
    """How the operations of an epoch ended, and when the first and the last did."""
    counts = [
        f"{epoch.ended[status]} {status}" for status in OperationStatus if epoch.ended.get(status)
    ]
    if epoch.unfinished:
        counts.append(f"{epoch.unfinished} unfinished")
    if epoch.first_at_ms is not None and epoch.last_at_ms is not None:
        times = dict.fromkeys(map(local_time, (epoch.first_at_ms, epoch.last_at_ms)))
        counts.append(" to ".join(times))
    return ", ".join(counts) or "no operations"


def _show(store: Path, text: str, filters: _Filters, *, json: bool) -> None:
    """Print the completions of every epoch of a session that match.

    Damaged rows are left out; standard error names and counts them. Raises `SessionUnknown` and
    `SessionAmbiguous`, and `StoreError` if the store is not readable.
    """
    with _reading(store) as opened:
        entries: Iterable[HistoryEntry] = opened.history(
            _chosen(opened, text),
            statuses=filters.statuses or None,
            from_ms=_milliseconds(filters.since),
            until_ms=_milliseconds(filters.until),
        )
        if filters.last is not None:
            entries = deque(entries, filters.last)
        if json:
            for entry in entries:
                print_json(entry.to_json())
        else:
            _print_tables(entries)


def _chosen(store: SqliteRuntimeStore, text: str) -> SessionId:
    """The session whose id is, or begins with, the written text: hexadecimal digits, with hyphens
    or without."""
    digits = digits_of(text)
    known = {one.bytes.hex(): one for one in store.sessions() if one != RUNS}
    found = [id for name, id in known.items() if digits and name.startswith(digits)]
    if not found:
        raise SessionUnknown(text, store.path, nearest(digits, known))
    if len(found) > 1:
        raise SessionAmbiguous(text, store.path, tuple(found))
    return found[0]


def _stored_sessions(context: typer.Context, incomplete: str) -> list[str]:
    """The sessions that a shell offers to complete an id; none if they are not known."""
    with contextlib.suppress(ShmepochError, OSError):
        path = context.params.get("store")
        if path is not None:
            with SqliteRuntimeStore(path, read_only=True) as store:
                names = (str(id) for id in store.sessions() if id != RUNS)
                return [name for name in names if name.startswith(incomplete)]
    return []


@contextlib.contextmanager
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
    with SqliteRuntimeStore(path, read_only=True) as opened:
        yield opened
        if opened.damaged:
            complain(f"{path}: damaged rows that are not shown: {opened.damaged}")


def _print_tables(entries: Iterable[HistoryEntry]) -> None:
    """Print a table for each epoch."""
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
