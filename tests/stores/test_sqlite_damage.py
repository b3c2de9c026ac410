"""Damaged SQLite files: a damaged row is a named error, or is left out and named."""

from __future__ import annotations

import random
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from shmepoch.errors import ShmepochError, StoreError, StoreLoadFailed
from shmepoch.ids import SessionId
from shmepoch.runtime.adapter import RuntimeSessionAdapter
from shmepoch.stores import SqliteRuntimeStore
from tests.stores.samples import Epoch, completion, completions, ended, failed, running
from tests.support import empty_shared_memory, spec

#: Every column that is read, of every table.
COLUMNS = (
    *(("epochs", name) for name in ("epoch_id", "session_id", "sealed")),
    *(("epochs", f"{name}") for name in ("agent_applied_cursor", "runtime_observed_seq")),
    *(("entries", name) for name in ("seq", "operation_id", "status", "completed_at_ms")),
    *(("entries", name) for name in ("entry", "operation")),
    *(("operations", name) for name in ("operation_id", "operation")),
    *(("skipped", name) for name in ("after_seq", "through_seq")),
)

#: Contents of a column that no store put there.
VALUES: tuple[Any, ...] = (
    *(None, "", "x", "\0", b"", b"\xff\xfe", b"\xff" * 16),
    *(0, 1, -1, 2**63 - 1, -(2**63), 1.5, float("inf"), "7", "{}", "[]", "null", "[" * 5000),
)


@pytest.fixture
def sessions() -> list[SessionId]:
    return [SessionId.new() for _ in range(2)]


@pytest.fixture
def sound(tmp_path: Path, sessions: list[SessionId]) -> Path:
    """Two sessions, each with two epochs, completions, their operations, and running operations."""
    path = tmp_path / "sound.db"
    with SqliteRuntimeStore(path, synchronous="normal") as store:
        for session in sessions:
            store.save([Epoch(session).capture(completions(1, 3), sealed=True)])
            work, (made, entry) = spec("größer"), failed(4)
            epoch = Epoch(session)
            store.save(
                [
                    epoch.capture(
                        [*completions(1, 3), entry],
                        operations=[running(work, progress=3), ended(made, entry)],
                        specs=[work, made],
                        cursors=(2, 3, 1),
                    )
                ]
            )
    change(path, "INSERT INTO skipped SELECT key, ?, ? FROM epochs", (4 - 2**63, 9 - 2**63))
    return path


@pytest.fixture
def damaged(tmp_path: Path, sound: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copy(sound, tmp_path / "damaged.db"))


def change(path: Path, statement: str, parameters: tuple[Any, ...] = ()) -> bool:
    """Change the file as its owner; False if SQLite itself does not allow it."""
    connection = sqlite3.connect(path)
    try:
        connection.execute(statement, parameters)
        connection.commit()
    except (sqlite3.IntegrityError, OverflowError):
        return False
    finally:
        connection.close()
    return True


def mutate(path: Path, table: str, column: str, value: Any, number: int) -> bool:
    """Give a column of one row of a table another value."""
    row = f"(SELECT rowid FROM {table} ORDER BY rowid LIMIT 1 OFFSET {number})"
    if table == "skipped":
        return change(path, f"UPDATE skipped SET {column} = ?", (value,))
    return change(path, f"UPDATE {table} SET {column} = ? WHERE rowid = {row}", (value,))


def flip(path: Path, table: str, column: str, chance: random.Random) -> bool:
    """Flip one bit of a column of one row."""
    connection = sqlite3.connect(path)
    connection.text_factory = bytes
    rows = connection.execute(f"SELECT {column} FROM {table}").fetchall()
    connection.close()
    number = chance.randrange(len(rows))
    (value,) = rows[number]
    if isinstance(value, int):
        return mutate(path, table, column, value ^ 1 << chance.randrange(62), number)
    if not value:
        return False
    data = bytearray(value)
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    row = f"(SELECT rowid FROM {table} ORDER BY rowid LIMIT 1 OFFSET {number})"
    kind = "BLOB" if column == "operation_id" else "TEXT"
    statement = f"UPDATE {table} SET {column} = CAST(? AS {kind}) WHERE rowid = {row}"
    return change(path, statement, (bytes(data),))


def calls(
    store: SqliteRuntimeStore, sessions: list[SessionId], epochs: list[Epoch]
) -> Iterator[Callable[[], object]]:
    yield lambda: list(store.sessions())
    yield lambda: list(store.overview())
    for session in sessions:
        yield lambda session=session: store.load(session)  # type: ignore[misc]
        yield lambda session=session: store.load(session, max_entries=1)  # type: ignore[misc]
        yield lambda session=session: list(store.history(session))  # type: ignore[misc]
    for epoch in epochs:
        yield lambda epoch=epoch: store.last_seq(epoch.id)  # type: ignore[misc]
        yield lambda epoch=epoch: store.list_entries(epoch.id)  # type: ignore[misc]
        yield lambda epoch=epoch: store.list_skipped(epoch.id)  # type: ignore[misc]
        yield lambda epoch=epoch: store.save([epoch.capture([completion(4)])])  # type: ignore[misc]
        yield lambda epoch=epoch: store.save([epoch.capture(cursors=(1, 1, 1))])  # type: ignore[misc]
    yield lambda: store.save([Epoch(sessions[0]).capture([completion(1)])])
    yield lambda: store.remove(sessions[0])


def epochs_of(path: Path, sessions: list[SessionId]) -> list[Epoch]:
    found = []
    with SqliteRuntimeStore(path, read_only=True) as store:
        for session in sessions:
            epoch = Epoch(session)
            snapshot = store.load(session)
            assert snapshot is not None
            epoch.id = snapshot.epoch_id
            found.append(epoch)
    return found


def require_named(path: Path, sessions: list[SessionId], epochs: list[Epoch]) -> None:
    """Fail unless every call returns, or raises an error of the store."""
    try:
        store = SqliteRuntimeStore(path, synchronous="normal")
    except StoreError:
        return
    with store:
        for call in calls(store, sessions, epochs):
            try:
                call()
            except StoreError as error:
                assert str(error)


@pytest.mark.parametrize(("table", "column"), COLUMNS)
def test_a_column_may_hold_anything(
    tmp_path: Path, sound: Path, sessions: list[SessionId], table: str, column: str
) -> None:
    epochs, path = epochs_of(sound, sessions), tmp_path / "damaged.db"
    for number, value in enumerate(VALUES):
        shutil.copy(sound, path)
        if mutate(path, table, column, value, number % 4):
            require_named(path, sessions, epochs)
        path.unlink()


@pytest.mark.parametrize("seed", range(6))
def test_any_bit_may_be_another(
    tmp_path: Path, sound: Path, sessions: list[SessionId], seed: int
) -> None:
    chance, epochs, path = random.Random(seed), epochs_of(sound, sessions), tmp_path / "damaged.db"
    for _ in range(60):
        shutil.copy(sound, path)
        if flip(path, *chance.choice(COLUMNS), chance):
            require_named(path, sessions, epochs)
        path.unlink()


@pytest.mark.parametrize("seed", range(4))
def test_any_byte_of_the_file_may_be_another(
    tmp_path: Path, sound: Path, sessions: list[SessionId], seed: int
) -> None:
    chance, epochs, path = random.Random(seed), epochs_of(sound, sessions), tmp_path / "damaged.db"
    image = sound.read_bytes()
    for _ in range(60):
        data = bytearray(image)
        for _ in range(chance.choice((1, 1, 20))):
            data[chance.randrange(len(data))] = chance.randrange(256)
        path.write_bytes(data)
        require_named(path, sessions, epochs)
        for part in tmp_path.glob("damaged.db*"):
            part.unlink()


def test_a_damaged_row_is_left_out_of_the_history_and_named(
    damaged: Path, sessions: list[SessionId], caplog: pytest.LogCaptureFixture
) -> None:
    bad = "UPDATE entries SET entry = CAST(? AS TEXT) WHERE rowid IN (2, 6)"
    assert change(damaged, bad, (b'{"seq":\xff}',))
    with SqliteRuntimeStore(damaged) as store:
        whole = [item.entry.seq for item in store.history(sessions[1])]
        assert whole == [1, 2, 3, 1, 2, 3, 4]
        assert store.damaged == 0
        items = list(store.history(sessions[0]))
        assert [item.entry.seq for item in items] == [1, 3, 1, 2, 4]
        assert store.damaged == 2
        for seq, epoch_id in ((2, items[0].epoch_id), (3, items[-1].epoch_id)):
            assert f"completion {seq} of epoch {epoch_id} is damaged and left out" in caplog.text
        # An agent is told of it as a gap.
        assert [e.seq for e in store.list_entries(items[-1].epoch_id)] == [1, 2, 4]
        with pytest.raises(StoreLoadFailed):
            store.load(sessions[0])


def test_a_name_that_is_no_text_is_left_out(damaged: Path, sessions: list[SessionId]) -> None:
    epoch = "UPDATE epochs SET epoch_id = CAST(? AS TEXT) WHERE key = 1"
    assert change(damaged, epoch, (b"\xff",))
    session = "UPDATE epochs SET session_id = CAST(? AS TEXT) WHERE session_id = ?"
    assert change(damaged, session, (b"\xff", str(sessions[1])))
    with SqliteRuntimeStore(damaged) as store:
        assert list(store.sessions()) == [sessions[0]]
        assert store.damaged == 1
        assert [item.entry.seq for item in store.history(sessions[0])] == [1, 2, 3, 4]
        assert store.damaged == 2


def test_what_is_damaged_is_left_out_of_the_sum(damaged: Path, sessions: list[SessionId]) -> None:
    assert change(damaged, "UPDATE epochs SET epoch_id = CAST(? AS TEXT) WHERE key = 1", (b"\xff",))
    assert change(damaged, "UPDATE entries SET status = 'x' WHERE rowid = 4", ())
    assert change(damaged, "UPDATE entries SET completed_at_ms = 'x' WHERE rowid = 8", ())
    with SqliteRuntimeStore(damaged) as store:
        found = {one.session_id: one.epochs for one in store.overview()}
        assert set(found) == set(sessions)
        assert [sum(epoch.ended.values()) for epoch in found[sessions[0]]] == [3]
        assert store.damaged == 3


def test_a_row_of_another_completion_is_left_out(damaged: Path, sessions: list[SessionId]) -> None:
    assert change(damaged, "UPDATE entries SET seq = ? WHERE rowid = 7", (9 - 2**63,))
    with SqliteRuntimeStore(damaged) as store:
        assert [item.entry.seq for item in store.history(sessions[0])] == [1, 2, 3, 1, 2, 3]
        assert store.damaged == 1


@pytest.mark.parametrize(
    ("row", "value"),
    [
        ("entries SET seq = ? WHERE rowid = 7", 9 - 2**63),
        ("entries SET operation_id = ? WHERE rowid = 6", bytes(16)),
        ("operations SET operation_id = ? WHERE rowid = 1", bytes(16)),
    ],
)
def test_a_row_that_is_about_another_is_not_loaded(
    damaged: Path, sessions: list[SessionId], row: str, value: Any
) -> None:
    assert change(damaged, f"UPDATE {row}", (value,))
    with SqliteRuntimeStore(damaged) as store:
        with pytest.raises(StoreLoadFailed, match="is about"):
            store.load(sessions[0])
        assert store.load(sessions[1]) is not None


@pytest.mark.parametrize(("table", "column"), COLUMNS)
def test_a_damaged_session_can_be_rotated_and_no_other_is_touched(
    tmp_path: Path,
    sound: Path,
    sessions: list[SessionId],
    namespace: str,
    table: str,
    column: str,
) -> None:
    epochs, path = epochs_of(sound, sessions), tmp_path / "damaged.db"
    last = {"epochs": 3, "entries": 13, "operations": 1, "skipped": 0}[table]  # of the second
    for value in (b"\xff", "x", 2**62, -1):
        shutil.copy(sound, path)
        changed = mutate(path, table, column, value, last)
        with SqliteRuntimeStore(path, synchronous="normal") as store:
            kwargs = {"namespace": namespace, "rotate_if_unloadable": True}
            with RuntimeSessionAdapter.persistent(store, **kwargs) as adapter:  # type: ignore[arg-type]
                for session in sessions:
                    bindings = adapter.prepare_bindings(session)
                    bindings.ops_lifecycle.check()
                if changed and table != "skipped":
                    first = adapter.prepare_bindings(sessions[0])
                    assert first.epoch_id == epochs[0].id
            empty_shared_memory(namespace)
        for part in tmp_path.glob("damaged.db*"):
            part.unlink()


@pytest.mark.parametrize(
    ("table", "column", "value"),
    [("entries", "entry", b"\xff"), ("operations", "operation", "{"), ("epochs", "epoch_id", "x")],
)
def test_what_cannot_be_loaded_is_refused_until_it_is_rotated(
    damaged: Path, sessions: list[SessionId], namespace: str, table: str, column: str, value: Any
) -> None:
    last = {"epochs": 1, "entries": 6, "operations": 0}[table]
    assert mutate(damaged, table, column, value, last)
    with SqliteRuntimeStore(damaged, synchronous="normal") as store:
        with RuntimeSessionAdapter.persistent(store, namespace=namespace) as adapter:
            with pytest.raises(StoreLoadFailed) as caught:
                adapter.prepare_bindings(sessions[0])
            assert isinstance(caught.value, ShmepochError)
        with RuntimeSessionAdapter.persistent(
            store, namespace=namespace, rotate_if_unloadable=True
        ) as adapter:
            adapter.prepare_bindings(sessions[0])
            adapter.unregister_session(sessions[0])
