"""(d) Whole operations, and reading what became of them."""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from bench import cells
from bench.harness import Contestant, Measure
from bench.loops import calls
from shmepoch import (
    CompletionEntry,
    OperationId,
    OperationKind,
    OperationResult,
    OperationSpec,
    RuntimeOpsLifecycleRegistry,
    SessionId,
)
from shmepoch.epoch.codec import to_wire, wire_decoder


def operate(registry: RuntimeOpsLifecycleRegistry, owner: SessionId, content: str) -> None:
    """Register, start and complete one operation."""
    id = OperationId.new()
    registry.register_operation(
        OperationSpec(
            id=id,
            kind=OperationKind.BACKGROUND_TOOL_OP,
            owner_session_id=owner,
            display_name="index",
            source_label="bench",
        )
    )
    registry.provisioning_succeeded(id)
    registry.complete_operation(id, OperationResult(id=id, content=content))


def _database(stack: ExitStack, synchronous: str) -> sqlite3.Connection:
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    database = sqlite3.connect(Path(folder) / "peer.db", isolation_level=None)
    stack.callback(database.close)
    database.execute("PRAGMA journal_mode = WAL")
    database.execute(f"PRAGMA synchronous = {synchronous}")
    database.execute("CREATE TABLE done (seq INTEGER PRIMARY KEY, id BLOB, content TEXT)")
    return database


def measures(stack: ExitStack, count: int) -> Iterator[Measure]:
    """The group, for so many operations a sample."""
    for size, label in ((100, "100 B"), (4096, "4 KiB"), (65536, "64 KiB")):
        yield Measure(f"operation, {label}", list(_operations(stack, count, "x" * size)))
    yield Measure("list_since of 100 entries", list(_reading(stack, count)))


def _operations(stack: ExitStack, count: int, content: str) -> Iterator[Contestant]:
    bindings = cells.epoch(stack)
    registry, owner = bindings.ops_lifecycle, bindings.session_id
    yield Contestant("shmepoch", calls(lambda: operate(registry, owner, content), count))
    for synchronous in ("normal", "full"):
        database = _database(stack, synchronous)
        insert = "INSERT INTO done (id, content) VALUES (?, ?)"
        id = OperationId.new().bytes
        yield Contestant(
            f"SQLite, {synchronous}",
            calls(partial(database.execute, insert, (id, content)), count),
            "one insert",
        )


def _reading(stack: ExitStack, count: int) -> Iterator[Contestant]:
    bindings = cells.epoch(stack)
    registry = bindings.ops_lifecycle
    for _ in range(100):
        operate(registry, bindings.session_id, "x" * 100)
    feed = registry.completion_feed()
    yield Contestant("shmepoch", calls(lambda: feed.list_since(0), count))
    decode = wire_decoder(tuple[CompletionEntry, ...]).decode
    wire = to_wire(feed.list_since(0).entries)
    yield Contestant("msgspec alone", calls(lambda: decode(wire), count), "decoding only")
