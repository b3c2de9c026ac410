"""The file of an SQLite store: its schema, its migrations, and files that are not a store."""

from __future__ import annotations

import os
import shutil
import sqlite3
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest

from shmepoch.epoch.operations import OperationStatus
from shmepoch.errors import (
    ConfigInvalid,
    StoreLoadFailed,
    StoreReadFailed,
    StoreUnusable,
    StoreWriteFailed,
)
from shmepoch.stores import SqliteRuntimeStore, database
from shmepoch.stores import schema as store_schema
from tests.stores.samples import Epoch, completion, completions, running
from tests.support import spec


def ask(path: Path, query: str, *parameters: object) -> list[Any]:
    """The result of a query in the sqlite3 tool."""
    connection = sqlite3.connect(path)
    try:
        found = connection.execute(query, parameters).fetchall()
        connection.commit()
        return found
    finally:
        connection.close()


# --- the settings ---------------------------------------------------------------------------------


@pytest.mark.parametrize("busy_timeout", [-1, float("nan"), numpy.float32("nan"), None, "1"])
def test_a_busy_timeout_is_a_number_of_seconds(path: Path, busy_timeout: Any) -> None:
    with pytest.raises(ConfigInvalid, match="busy_timeout"):
        SqliteRuntimeStore(path, busy_timeout=busy_timeout)
    assert not path.exists()


@pytest.mark.parametrize(
    "busy_timeout", [float("inf"), 3_000_000, 1e9, 1e300, 10**400, numpy.int64(60), numpy.inf]
)
def test_a_long_busy_timeout_waits_for_a_lock_that_ends(path: Path, busy_timeout: Any) -> None:
    """SQLite's number of milliseconds would overflow, and it would not wait at all."""
    with SqliteRuntimeStore(path, busy_timeout=busy_timeout) as store:
        other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        other.execute("BEGIN IMMEDIATE")
        begun = threading.Event()

        def release() -> None:
            begun.wait()
            other.execute("COMMIT")

        thread = threading.Thread(target=release)
        thread.start()
        with store._database.read() as connection:
            assert connection.execute("PRAGMA busy_timeout").fetchone()[0] >= 60_000
        begun.set()
        store.save([Epoch().capture()])
        thread.join()
        other.close()


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


# --- the contents ---------------------------------------------------------------------------------


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


@pytest.fixture(params=[0o022, 0o000, 0o777])
def umask(request: pytest.FixtureRequest) -> Iterator[None]:
    before = os.umask(request.param)
    yield
    os.umask(before)


@pytest.mark.parametrize("exists", [True, False])
def test_the_file_is_its_users_alone_through_a_link_too(
    tmp_path: Path, umask: None, exists: bool
) -> None:
    """A link whose target does not exist yet, and one into another folder, where the log is
    made."""
    folder = tmp_path / "real"
    folder.mkdir()
    folder.chmod(0o700)
    link, real = tmp_path / "link.db", folder / "store.db"
    if exists:
        SqliteRuntimeStore(real).close()
    link.symlink_to(real)
    with SqliteRuntimeStore(link) as store:
        store.save([Epoch().capture()])
        modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in folder.iterdir()}
        assert modes == dict.fromkeys(("store.db", "store.db-wal", "store.db-shm"), 0o600)
    assert [p.name for p in folder.iterdir()] == ["store.db"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link.db", "real"]


def test_the_mode_of_a_file_that_was_there_is_its_users_choice(path: Path) -> None:
    path.touch()
    path.chmod(0o640)
    with SqliteRuntimeStore(path) as store:
        store.save([Epoch().capture()])
        modes = {stat.S_IMODE(p.stat().st_mode) for p in path.parent.iterdir()}
    assert modes == {0o640}


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


# --- migrations -----------------------------------------------------------------------------------


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


# --- files that are not a store -------------------------------------------------------------------


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


@pytest.mark.parametrize("kind", ["fifo", "loop", "nul", "device"])
def test_what_cannot_be_a_file_is_refused(path: Path, kind: str) -> None:
    chosen: str | Path = path
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "nul":
        chosen = f"{path}\0"
    else:
        chosen = "/dev/null"
    with pytest.raises(StoreUnusable):
        SqliteRuntimeStore(chosen)
    with pytest.raises(StoreUnusable):
        SqliteRuntimeStore(chosen, read_only=True)


def test_a_path_that_is_refused_has_no_file_afterwards(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Networked(database.OwnConnection):
        def execute(self, sql: str, *parameters: Any) -> sqlite3.Cursor:
            asked = "SELECT 'delete'" if "journal_mode" in sql else sql
            return super().execute(asked, *parameters)

    with monkeypatch.context() as patched:
        patched.setattr(database, "OwnConnection", Networked)
        with pytest.raises(StoreUnusable, match="write-ahead log"):
            SqliteRuntimeStore(path)
    assert list(path.parent.iterdir()) == []
    with SqliteRuntimeStore(path) as store:
        store.save([Epoch().capture()])


# --- read-only stores -----------------------------------------------------------------------------


@pytest.fixture
def kept(path: Path) -> Epoch:
    """An epoch in a store that is not open."""
    epoch = Epoch()
    with SqliteRuntimeStore(path) as store:
        store.save([epoch.capture(completions(1, 3))])
    return epoch


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_a_store_that_is_read_only_makes_and_changes_nothing(path: Path, kept: Epoch) -> None:
    path.chmod(0o444)
    path.parent.chmod(0o555)
    before = contents(path.parent)
    with SqliteRuntimeStore(path, read_only=True) as store:
        assert store.last_seq(kept.id) == 3
        assert len(list(store.history(kept.session_id))) == 3
        assert list(store.sessions()) == [kept.session_id]
        assert store.load(kept.session_id) is not None
        assert contents(path.parent) == before
        with pytest.raises(StoreWriteFailed, match="readonly"):
            store.save([kept.capture([completion(4)])])
        with pytest.raises(StoreWriteFailed, match="readonly"):
            store.remove(kept.session_id)
    assert contents(path.parent) == before
    path.parent.chmod(0o755)


def test_a_store_that_is_read_only_sees_what_others_write(path: Path, kept: Epoch) -> None:
    """Before there is a log, while there is one, and after it is removed."""
    with SqliteRuntimeStore(path, read_only=True) as reader:
        assert reader.last_seq(kept.id) == 3
        for seq in (4, 5):
            with SqliteRuntimeStore(path) as writer:
                writer.save([kept.capture([completion(seq)])])
                assert reader.last_seq(kept.id) == seq
            assert reader.last_seq(kept.id) == seq


def test_what_is_changed_while_it_is_read_without_locks_is_not_believed(
    path: Path, kept: Epoch
) -> None:
    def read(reader: SqliteRuntimeStore) -> None:
        with reader._database.read() as connection:
            connection.execute("SELECT count(*) FROM entries").fetchone()
            with SqliteRuntimeStore(path) as writer:
                writer.save([kept.capture([completion(4)])])

    with SqliteRuntimeStore(path, read_only=True) as reader:
        with pytest.raises(StoreUnusable, match="read it again"):
            read(reader)
        assert reader.last_seq(kept.id) == 4


def test_what_a_writer_that_was_killed_left_in_the_log_is_read(path: Path, tmp_path: Path) -> None:
    epoch, folder = Epoch(), tmp_path / "copy"
    folder.mkdir()
    with SqliteRuntimeStore(path) as store:
        store.save([epoch.capture(completions(1, 3))])
        for part in path.parent.glob("store.db*"):
            shutil.copy(part, folder)
    with SqliteRuntimeStore(folder / path.name, read_only=True) as copied:
        assert copied.last_seq(epoch.id) == 3


@pytest.mark.parametrize("kind", ["missing", "empty", "no database", "another's", "earlier"])
def test_what_is_no_store_is_refused_to_be_read_and_left_alone(
    path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "empty":
        path.touch()
    elif kind == "no database":
        path.write_bytes(b"not a database at all\n" * 100)
    elif kind == "another's":
        ask(path, "CREATE TABLE accounts (name)")
    elif kind == "earlier":
        SqliteRuntimeStore(path).close()
        later = (*store_schema.MIGRATIONS, ("ALTER TABLE epochs ADD COLUMN label TEXT",))
        monkeypatch.setattr(store_schema, "MIGRATIONS", later)
    before = contents(path.parent)
    why = "no such file|empty|not a database|another program's"
    with pytest.raises(StoreUnusable, match=why):
        SqliteRuntimeStore(path, read_only=True)
    assert contents(path.parent) == before


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
        assert list(sqlite.history(epoch.session_id)) == []
        assert sqlite.damaged == 1


def test_a_file_that_was_removed_is_noticed(path: Path) -> None:
    """A save to a file without a name would be lost although it succeeded."""
    epoch = Epoch()
    with SqliteRuntimeStore(path) as store:
        store.save([epoch.capture([completion(1)])])
        for part in path.parent.iterdir():
            part.unlink()
        with pytest.raises(StoreWriteFailed, match=r"store.db: the file was moved or removed"):
            store.save([epoch.capture([completion(2)])])
        # The next save goes to the file that the path names now. A reader must notice, too.
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
