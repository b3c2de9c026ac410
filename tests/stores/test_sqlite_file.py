"""The file of an SQLite store: what it looks like, how it grows up, and files that are no store."""

from __future__ import annotations

import sqlite3
import stat
from pathlib import Path
from typing import Any

import pytest

from shmepoch.epoch.operations import OperationStatus
from shmepoch.errors import (
    ConfigInvalid,
    StoreLoadFailed,
    StoreReadFailed,
    StoreUnusable,
    StoreWriteFailed,
)
from shmepoch.stores import SqliteRuntimeStore
from shmepoch.stores import schema as store_schema
from tests.stores.samples import Epoch, completion, completions, running
from tests.support import spec


def ask(path: Path, query: str, *parameters: object) -> list[Any]:
    """What somebody with the sqlite3 tool sees."""
    connection = sqlite3.connect(path)
    try:
        found = connection.execute(query, parameters).fetchall()
        connection.commit()
        return found
    finally:
        connection.close()


# --- the settings ---------------------------------------------------------------------------------


@pytest.mark.parametrize("busy_timeout", [-1, float("inf"), float("nan"), None])
def test_a_busy_timeout_is_a_number_of_seconds(path: Path, busy_timeout: Any) -> None:
    with pytest.raises(ConfigInvalid, match="busy_timeout"):
        SqliteRuntimeStore(path, busy_timeout=busy_timeout)


@pytest.mark.parametrize("synchronous", ["off", "FULL", "", None])
def test_synchronous_is_full_or_normal(path: Path, synchronous: Any) -> None:
    with pytest.raises(ConfigInvalid, match="synchronous"):
        SqliteRuntimeStore(path, synchronous=synchronous)


@pytest.mark.parametrize(("settings", "level"), [({}, 2), ({"synchronous": "normal"}, 1)])
def test_synchronous_reaches_the_connection(path: Path, settings: Any, level: int) -> None:
    with SqliteRuntimeStore(path, **settings) as store, store._database.write() as connection:
        assert connection.execute("PRAGMA synchronous").fetchone() == (level,)
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_a_relative_path_is_the_same_file_after_a_change_of_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    epoch = Epoch()
    with SqliteRuntimeStore("store.db") as store:
        monkeypatch.chdir("/")
        store._database.close()
        assert store.path == tmp_path / "store.db"
    with SqliteRuntimeStore(tmp_path / "store.db") as store:
        assert store.load(epoch.session_id) is None
        assert repr(store) == f"SqliteRuntimeStore('{tmp_path}/store.db')"


# --- what lies there ------------------------------------------------------------------------------


def test_what_was_saved_is_there_after_reopening(path: Path) -> None:
    epoch, work = Epoch(), spec()
    capture = epoch.capture(
        completions(1, 3), operations=[running(work)], specs=[work], cursors=(1, 2, 3)
    )
    with SqliteRuntimeStore(path) as store:
        store.save([capture])
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    with SqliteRuntimeStore(path) as store:
        assert store.load(epoch.session_id) == capture.snapshot


def test_the_file_is_its_users_alone(sqlite: SqliteRuntimeStore) -> None:
    sqlite.save([Epoch().capture()])
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in sqlite.path.parent.iterdir()}
    assert modes == dict.fromkeys(("store.db", "store.db-wal", "store.db-shm"), 0o600)


def test_history_can_be_read_with_the_sqlite3_tool(sqlite: SqliteRuntimeStore) -> None:
    epoch = Epoch()
    entry = completion(1, content="größer", at_ms=1_700_000_000_500)
    sqlite.save([epoch.capture([entry])])
    rows = ask(
        sqlite.path,
        "SELECT session_id, epoch_id, seq, status, completed_at, "
        "json_extract(entry, '$.terminal_outcome.result.content') FROM history",
    )
    assert rows == [
        (str(epoch.session_id), str(epoch.id), 1, "completed", "2023-11-14 22:13:20", "größer")
    ]


def test_stored_completions_are_never_rewritten(sqlite: SqliteRuntimeStore) -> None:
    epoch = Epoch()
    sqlite.save([epoch.capture(completions(1, 3))])
    ask(
        sqlite.path,
        "CREATE TRIGGER rewritten BEFORE UPDATE ON entries "
        "BEGIN SELECT raise(ABORT, 'an entry was rewritten'); END",
    )
    entries = sqlite.list_entries(epoch.id)
    sqlite.save([epoch.capture([*entries, completion(4)], cursors=(4, 4, 4))])
    sqlite.save([epoch.capture(entries, sealed=True)])
    assert sqlite.list_entries(epoch.id)[:3] == entries


def test_a_save_that_says_nothing_new_writes_nothing(sqlite: SqliteRuntimeStore) -> None:
    epoch, work = Epoch(), spec()
    capture = epoch.capture(completions(1, 3), operations=[running(work)], specs=[work])
    sqlite.save([capture])
    log = sqlite.path.with_name("store.db-wal")
    before = log.stat().st_size
    sqlite.save([capture, capture])
    assert log.stat().st_size == before


def test_what_is_asked_of_one_session_reads_no_other(sqlite: SqliteRuntimeStore) -> None:
    """Every statement of every method."""
    epochs = [Epoch() for _ in range(50)]
    work = spec()
    capture = epochs[0].capture(completions(1, 4), operations=[running(work)], specs=[work])
    sqlite.save([epoch.capture(completions(1, 3)) for epoch in epochs[1:]] + [capture])
    seen: list[str] = []
    for connection in (sqlite._database.write, sqlite._database.read):
        with connection() as traced:
            traced.set_trace_callback(seen.append)
    epoch = epochs[0]
    sqlite.save([epoch.capture(completions(5, 6), operations=[running(work, progress=1)])])
    sqlite.save([epoch.capture(sqlite.list_entries(epoch.id), sealed=True)])
    again = Epoch(epoch.session_id)
    sqlite.save([again.capture([completion(1)])])
    sqlite.load(epoch.session_id)
    sqlite.last_seq(epoch.id)
    failed_ones = [OperationStatus.FAILED]
    list(sqlite.history(epoch.session_id, statuses=failed_ones, from_ms=0, until_ms=1))
    list(sqlite.sessions())
    sqlite.remove(epoch.session_id)
    statements = {s for s in seen if s.split()[0] not in ("BEGIN", "COMMIT", "--")}
    assert len(statements) > 12
    for statement in statements:
        plan = [row[3] for row in ask(sqlite.path, f"EXPLAIN QUERY PLAN {statement}")]
        scans = [step for step in plan if step.startswith("SCAN") and "CONSTANT ROW" not in step]
        assert scans == [], statement


# --- growing up -----------------------------------------------------------------------------------


def test_a_file_of_an_earlier_schema_is_migrated(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    epoch = Epoch()
    with SqliteRuntimeStore(path) as store:
        store.save([epoch.capture(completions(1, 3))])
        later = (*store_schema.MIGRATIONS, ("ALTER TABLE epochs ADD COLUMN label TEXT",))
        monkeypatch.setattr(store_schema, "MIGRATIONS", later)
    with SqliteRuntimeStore(path) as store:
        assert store.last_seq(epoch.id) == 3
    assert ask(path, "PRAGMA user_version") == [(len(later),)]
    assert ask(path, "SELECT label FROM epochs") == [(None,)]


def test_a_migration_that_fails_leaves_the_file_as_it_was(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with SqliteRuntimeStore(path):
        pass
    version = len(store_schema.MIGRATIONS)
    with monkeypatch.context() as patched:
        broken = ("ALTER TABLE epochs ADD COLUMN label TEXT", "UPDATE nothing SET all = 1")
        patched.setattr(store_schema, "MIGRATIONS", (*store_schema.MIGRATIONS, broken))
        with pytest.raises(StoreUnusable):
            SqliteRuntimeStore(path)
    assert ask(path, "PRAGMA user_version") == [(version,)]
    with SqliteRuntimeStore(path) as store:
        store.save([Epoch().capture()])


def test_a_file_of_a_later_schema_is_refused_and_left_alone(path: Path) -> None:
    with SqliteRuntimeStore(path):
        pass
    ask(path, "PRAGMA user_version = 7")
    with pytest.raises(StoreUnusable, match=r"schema has version 7.*up to 1.*later"):
        SqliteRuntimeStore(path)
    assert ask(path, "PRAGMA user_version") == [(7,)]


def test_another_programs_database_is_refused_and_left_alone(path: Path) -> None:
    ask(path, "CREATE TABLE accounts (name)")
    with pytest.raises(StoreUnusable, match="another program's"):
        SqliteRuntimeStore(path)
    assert ask(path, "SELECT name FROM sqlite_master") == [("accounts",)]
    assert ask(path, "PRAGMA journal_mode") == [("delete",)]


def test_an_empty_file_becomes_a_store(path: Path) -> None:
    path.touch()
    with SqliteRuntimeStore(path) as store:
        store.save([Epoch().capture()])


# --- what is no store -----------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"not a database at all\n" * 100, b"SQLite format 3\0" + b"x"])
def test_a_file_that_is_no_database_is_refused_and_left_alone(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(StoreUnusable, match="not a database") as caught:
        SqliteRuntimeStore(path)
    assert isinstance(caught.value.__cause__, sqlite3.DatabaseError)
    assert path.read_bytes() == content


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreUnusable, match=r"no folder .*/none; create it first"):
        SqliteRuntimeStore(tmp_path / "none" / "store.db")


def test_a_folder_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(StoreUnusable):
        SqliteRuntimeStore(tmp_path)


def spoil(path: Path, table: str) -> None:
    """Overwrite the root page of a table, as a failing disk might."""
    ((page,),) = ask(path, "SELECT rootpage FROM sqlite_master WHERE name = ?", table)
    ((size,),) = ask(path, "PRAGMA page_size")
    with path.open("r+b") as file:
        file.seek((page - 1) * size)
        file.write(b"\xde\xad" * (size // 2))


@pytest.mark.parametrize("table", ["epochs", "entries", "operations"])
def test_a_damaged_table_never_looks_empty(path: Path, table: str) -> None:
    epoch, work = Epoch(), spec()
    with SqliteRuntimeStore(path) as store:
        store.save([epoch.capture(completions(1, 3), operations=[running(work)], specs=[work])])
    spoil(path, table)
    with SqliteRuntimeStore(path) as store:
        with pytest.raises(StoreLoadFailed, match="malformed") as caught:
            store.load(epoch.session_id)
        assert isinstance(caught.value.__cause__, sqlite3.DatabaseError)
        with pytest.raises(StoreWriteFailed, match="malformed"):
            store.save([epoch.capture([completion(4)], operations=[running(spec())])])
        if table == "entries":
            with pytest.raises(StoreReadFailed, match="malformed"):
                store.list_entries(epoch.id)


@pytest.mark.parametrize(
    ("table", "column", "value"),
    [
        ("entries", "entry", "{"),
        ("entries", "entry", "{}"),
        ("entries", "operation", "[]"),
        ("operations", "operation", "null"),
        ("epochs", "epoch_id", "no-uuid"),
        ("entries", "entry", b"\xff"),
        ("epochs", "agent_applied_cursor", "many"),
    ],
)
def test_a_damaged_row_never_looks_empty(
    sqlite: SqliteRuntimeStore, table: str, column: str, value: object
) -> None:
    epoch, work = Epoch(), spec()
    sqlite.save([epoch.capture([completion(1)], operations=[running(work)], specs=[work])])
    ask(sqlite.path, f"UPDATE {table} SET {column} = ?", value)
    with pytest.raises(StoreLoadFailed) as caught:
        sqlite.load(epoch.session_id)
    assert caught.value.reason
    if column in ("entry", "epoch_id"):
        with pytest.raises(StoreReadFailed):
            list(sqlite.history(epoch.session_id))


def test_a_file_that_was_removed_is_noticed(path: Path) -> None:
    """What is written to a file without a name would be lost, and was promised."""
    epoch = Epoch()
    with SqliteRuntimeStore(path) as store:
        store.save([epoch.capture([completion(1)])])
        for part in path.parent.iterdir():
            part.unlink()
        with pytest.raises(StoreWriteFailed, match=r"store.db: the file was moved or removed"):
            store.save([epoch.capture([completion(2)])])
        # The next save goes to what the path names now. Whoever reads has to notice, too.
        store.save([epoch.capture(completions(1, 2))])
        with pytest.raises(StoreReadFailed, match="moved or removed"):
            store.last_seq(epoch.id)
        assert store.last_seq(epoch.id) == 2
    with SqliteRuntimeStore(path) as store:
        assert store.last_seq(epoch.id) == 2


def test_a_file_that_was_replaced_is_noticed(path: Path, tmp_path: Path) -> None:
    epoch = Epoch()
    other = tmp_path / "other.db"
    with SqliteRuntimeStore(other) as store:
        store.save([epoch.capture(completions(1, 5))])
    with SqliteRuntimeStore(path) as store:
        for part in path.parent.glob("store.db*"):
            part.unlink()
        other.rename(path)
        with pytest.raises(StoreLoadFailed, match="moved or removed"):
            store.load(epoch.session_id)
        assert store.last_seq(epoch.id) == 5
