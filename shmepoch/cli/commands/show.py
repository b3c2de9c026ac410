"""`shmepoch show`: everything about one epoch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Annotated, Final

import typer
from msgspec.structs import asdict
from rich.table import Table
from rich.text import Text

from shmepoch.cli.entries import local_time
from shmepoch.cli.exits import reporting
from shmepoch.cli.options import AllNamespaces, Epoch, Json, Namespace, chosen_namespace
from shmepoch.cli.streams import print_json, visible
from shmepoch.cli.tables import print_table, span, table_of_entries
from shmepoch.epoch.operations import OperationStatus
from shmepoch.errors import SessionNotFound
from shmepoch.memory.clock import wall_ms
from shmepoch.monitoring.details import Attached, EpochDetails, Lock, Process, Unfinished, describe
from shmepoch.monitoring.epochs import EpochState
from shmepoch.monitoring.selection import select

#: The largest number of entries that can be requested: no feed has more.
_MOST_ENTRIES: Final = 2**31
#: The least width of a table: an operation's id and status leave half of it to its texts.
_LEAST_WIDTH: Final = 110


def show(
    epoch: Epoch,
    entries: Annotated[
        int,
        typer.Option(min=0, max=_MOST_ENTRIES, help="How many of the feed's last entries to show."),
    ] = 10,
    namespace: Namespace = None,
    all_namespaces: AllNamespaces = False,
    json: Json = False,
) -> None:
    """Show one epoch: its processes, its locks, its operations, its feed and its cursors.

    It waits for no process and changes nothing.

    Examples:

        shmepoch show 01a2149c
        shmepoch show 01a2149c --entries 50 --json

    Exit status: 0, or 2 if no epoch or more than one is meant.
    """
    with reporting():
        chosen, session_id = select(epoch, chosen_namespace(namespace, all_namespaces))
        found = describe(chosen, session_id, entries=entries)
        if found is None:
            raise SessionNotFound(session_id, chosen)
        if json:
            print_json(found.to_json())
        else:
            _print(found, wall_ms())


def _print(epoch: EpochDetails, now_ms: int) -> None:
    facts = list(_facts(epoch, now_ms))
    width = max(len(name) for name, _ in facts)
    for name, fact in facts:
        print(f"{name:{width}}  {visible(fact)}")
    for table in _tables(epoch, now_ms):
        print()
        print_table(table, least=_LEAST_WIDTH)


def _facts(epoch: EpochDetails, now_ms: int) -> Iterator[tuple[str, str]]:
    yield "session", str(epoch.session_id)
    yield "epoch", str(epoch.epoch_id or "not known")
    yield "namespace", epoch.namespace
    yield "state", epoch.state
    if epoch.problem is not None:
        yield "problem", epoch.problem
    if epoch.created_at_ms:
        yield "made", _ago(epoch.created_at_ms, now_ms)
    alive = epoch.state is EpochState.OPEN
    yield "last sign of life", "now" if alive else _ago(epoch.alive_at_ms, now_ms)
    yield "file", epoch.path
    owner = "" if epoch.owner is None else f" ({epoch.owner})"
    yield "owner", f"user {epoch.owner_uid}{owner}, mode {epoch.mode}"
    yield "size", f"{epoch.bytes:,} bytes"
    yield "attached by", _named(epoch.processes) or "no process that is visible from here"
    if not epoch.use:
        return  # nothing of its memory could be read
    for lock in Lock:
        yield f"{lock} lock", _holding(epoch, lock)
    if epoch.broken_off:
        yield "transition", "broken off; the next writer repairs what it has left"
    if epoch.repairs:
        yield "repairs", f"{epoch.repairs:,}, of what writers have left that were killed"
    yield "watermark", f"{epoch.watermark:,}"
    yield "dropped through", f"{epoch.dropped_through:,}"
    yield "durable through", f"{epoch.durable_through:,}"
    if epoch.skipped_through:
        skipped = f"{epoch.skipped_after + 1:,} to {epoch.skipped_through:,}"
        yield "skipped", f"{skipped}, by the last recovery"
    ended = ", ".join(
        f"{status} {epoch.retained[status]:,}"
        for status in OperationStatus
        if status in epoch.retained
    )
    yield "ended, retained", ended or "none"


def _ago(at_ms: int, now_ms: int) -> str:
    return f"{span(now_ms - at_ms)} ago, at {local_time(at_ms)}"


def _holding(epoch: EpochDetails, lock: Lock) -> str:
    if lock not in epoch.locks:
        return "free"
    held = _named(epoch.locks[lock]) or "a process that is not visible from here"
    return f"held by {held}"


def _named(processes: Iterable[Process]) -> str:
    return ", ".join(
        f"process {process.pid}{' (stopped)' if process.stopped else ''}" for process in processes
    )


def _tables(epoch: EpochDetails, now_ms: int) -> Iterator[Table]:
    if epoch.attached:
        yield _table_of_attached(epoch, now_ms)
    if epoch.unfinished:
        yield _table_of_unfinished(epoch.unfinished)
    if epoch.entries:
        yield table_of_entries("the last entries of the feed", epoch.entries)
    if epoch.use:
        yield _table_of_cursors(epoch)
        yield _table_of_use(epoch)


def _table(
    title: str, left: Iterable[str], *, right: Iterable[str] = (), folded: Iterable[str] = ()
) -> Table:
    table = Table(title=title, title_justify="left", box=None)
    for heading in left:
        table.add_column(heading, no_wrap=True)
    for heading in right:
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in folded:
        table.add_column(heading, overflow="fold")
    return table


def _table_of_attached(epoch: EpochDetails, now_ms: int) -> Table:
    table = _table("participants", ("slot", "role", "process", "state", "since", "holds"))
    for one in epoch.attached:
        table.add_row(
            str(one.slot),
            one.role,
            _pid(one),
            _state(one),
            span(now_ms - one.joined_at_ms),
            ", ".join(one.holds),
        )
    return table


def _pid(one: Attached) -> str:
    if one.process is None:
        return f"{one.pid} (not visible from here)" if one.alive else str(one.pid)
    if one.process.pid == one.pid:
        return str(one.pid)
    return f"{one.process.pid} ({one.pid} in its container)"


def _state(one: Attached) -> str:
    if not one.alive:
        return "dead"
    return "stopped" if one.process is not None and one.process.stopped else "alive"


def _table_of_unfinished(operations: Iterable[Unfinished]) -> Table:
    table = _table(
        "operations that have not ended",
        ("operation", "status", "for"),
        folded=("run by", "name", "progress"),
    )
    for one in operations:
        table.add_row(
            str(one.id),
            one.status,
            span(one.elapsed_ms),
            _runner(one.runner),
            Text(visible(one.display_name)),
            Text(visible(_progress(one))),
        )
    return table


def _runner(runner: Attached | None) -> str:
    return (
        "one that has left" if runner is None else f"{runner.role} {_pid(runner)}, {_state(runner)}"
    )


def _progress(operation: Unfinished) -> str:
    if operation.progress is None:
        return ""
    percent = operation.progress.percent
    return f"{'' if percent is None else f'{percent:.0f}% '}{operation.progress.message}"


def _table_of_cursors(epoch: EpochDetails) -> Table:
    table = _table("cursors", ("cursor",), right=("position", "lag"))
    for name, position in asdict(epoch.cursors).items():
        table.add_row(name, f"{position:,}", f"{epoch.lags[name]:,}")
    return table


def _table_of_use(epoch: EpochDetails) -> Table:
    table = _table("room", ("of",), right=("used", "capacity", "full"))
    for name, use in epoch.use.items():
        full = f"{100 * use.used // use.capacity}%"
        table.add_row(name.replace("_", " "), f"{use.used:,}", f"{use.capacity:,}", full)
    return table
