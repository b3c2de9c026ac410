"""(d) Whole operations, and reading their completions."""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Final

from bench.contestants import BATCH, SHMEPOCH, TOGETHER
from bench.harness import Contestant, Measure
from bench.loops import Timed, calls
from bench.work import epoch, operate, operate_together, specified
from shmepoch import (
    Completed,
    CompletionEntry,
    OperationId,
    OperationResult,
    OpsLifecycleConfig,
    SessionRuntimeBindings,
)
from shmepoch._native import WRITER_BYTE, try_lock, unlock
from shmepoch.epoch.codec import to_wire, wire_decoder
from shmepoch.epoch.encoding import encode_outcome, encode_spec

#: Room for a batch of the largest records.
_ROOM: Final = OpsLifecycleConfig(feed_bytes=16 * 1024 * 1024)


def _database(stack: ExitStack, synchronous: str) -> sqlite3.Connection:
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    database = sqlite3.connect(Path(folder) / "peer.db", isolation_level=None)
    stack.callback(database.close)
    database.execute("PRAGMA journal_mode = WAL")
    database.execute(f"PRAGMA synchronous = {synchronous}")
    database.execute("CREATE TABLE done (seq INTEGER PRIMARY KEY, id BLOB, content TEXT)")
    return database


def measures(stack: ExitStack, count: int) -> Iterator[Measure]:
    """The group, for `count` operations in each sample."""
    for size, label in ((100, "100 B"), (4096, "4 KiB"), (65536, "64 KiB")):
        yield Measure(f"operation, {label}", list(_operations(stack, count, "x" * size)))
    yield Measure("list_since of 100 entries", list(_reading(stack, count)))


def _operations(stack: ExitStack, count: int, content: str) -> Iterator[Contestant]:
    yield Contestant(SHMEPOCH, calls(partial(operate, epoch(stack), content), count))
    yield Contestant(TOGETHER, _together(epoch(stack, _ROOM), content, count))
    bare = partial(_lock_and_encode, epoch(stack), content)
    yield Contestant("locks and encoding alone", calls(bare, count), "the floor")
    records = partial(_make_records, epoch(stack), content)
    yield Contestant("checked records alone", calls(records, count), "the floor of many at a time")
    for synchronous in ("normal", "full"):
        inserted = partial(_insert, _database(stack, synchronous), content)
        yield Contestant(f"SQLite, {synchronous}", calls(inserted, count), "one insert")


def _together(bindings: SessionRuntimeBindings, content: str, count: int) -> Timed:
    batch = calls(partial(operate_together, bindings, content, BATCH), count // BATCH)
    return lambda: batch() / BATCH


def _lock_and_encode(bindings: SessionRuntimeBindings, content: str) -> None:
    """Do the least work of three transitions: the kernel's lock, an encoded spec and an entry."""
    id, fd = OperationId.new(), bindings.shared_segment().fd
    spec = specified(id, bindings)
    to_wire(spec)
    entry = CompletionEntry(
        seq=1,
        operation_id=id,
        kind=spec.kind,
        display_name=spec.display_name,
        terminal_outcome=Completed(OperationResult(id=id, content=content)),
        completed_at_ms=1,
    )
    to_wire(entry)
    for _ in range(3):
        try_lock(fd, WRITER_BYTE, False)
        unlock(fd, WRITER_BYTE)


def _make_records(bindings: SessionRuntimeBindings, content: str) -> None:
    """Do the work for an operation's three records before any access to shared memory: make, check
    and encode them."""
    id = OperationId.new()
    encode_spec(specified(id, bindings), bindings.session_id)
    encode_outcome(Completed(OperationResult(id=id, content=content)))


def _insert(database: sqlite3.Connection, content: str) -> None:
    row = (OperationId.new().bytes, content)
    database.execute("INSERT INTO done (id, content) VALUES (?, ?)", row)


def _reading(stack: ExitStack, count: int) -> Iterator[Contestant]:
    bindings = epoch(stack)
    for _ in range(100):
        operate(bindings, "x" * 100)
    list_since = bindings.ops_lifecycle.completion_feed().list_since
    yield Contestant(SHMEPOCH, calls(partial(list_since, 0), count))
    decode = wire_decoder(tuple[CompletionEntry, ...]).decode
    wire = to_wire(list_since(0).entries)
    yield Contestant("msgspec alone", calls(partial(decode, wire), count), "decoding only")
