"""One SQLite file and this process's connections to it: two, whatever the number of threads."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Final, TypeAlias

from shmepoch.errors import StoreUnusable
from shmepoch.forking import Part, on_fork
from shmepoch.stores.schema import SchemaUnsupported, is_current, migrate

_RETRY_S: Final = 0.01

_FileId: TypeAlias = tuple[int, int]


class Database:
    """A connection that writes and one that reads, so that readers do not wait for a disk.

    STORE-3: SQLite forgets its locks across a fork but not that it had them, and a child that so
    much as closes an inherited connection, or opens the file beside one, can damage it. So there is
    none to inherit: a fork waits for running transactions and closes both connections first, and
    each process opens its own when it needs them.
    """

    def __init__(self, path: Path, *, busy_timeout: float, synchronous: str) -> None:
        self.path: Final = path
        self._busy_timeout = busy_timeout
        self._synchronous = synchronous
        self._writer = _Connection(self)
        self._reader = _Connection(self)
        self._closed = False
        _databases.add(self)

    @contextlib.contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """A transaction that is committed on a clean exit, and durable then."""
        with self._writer.transaction("BEGIN IMMEDIATE") as connection:
            yield connection

    @contextlib.contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """A transaction that sees one state of the file throughout."""
        with self._reader.transaction("BEGIN") as connection:
            yield connection

    def close(self) -> None:
        """Close both connections, once their transactions are over, for good."""
        self._closed = True
        for connection in (self._writer, self._reader):
            with connection.lock:
                connection.close()

    def connect(self) -> tuple[sqlite3.Connection, _FileId | None]:
        """Open the file, made or migrated if need be, and say which file that is.

        Raises `StoreUnusable`.
        """
        if self._closed:
            raise StoreUnusable(self.path, "it was closed")
        try:
            self._create()
            connection = sqlite3.connect(
                self.path,
                timeout=self._busy_timeout,
                isolation_level=None,
                check_same_thread=False,
            )
            try:
                self._prepare(connection)
            except BaseException:
                connection.close()
                raise
            return connection, _file_id(self.path)
        except (sqlite3.Error, SchemaUnsupported, OSError) as error:
            raise StoreUnusable(self.path, self._reason(error)) from error

    def explain(self, error: Exception) -> str:
        """Why something failed, for the text of an error."""
        return f"{self.path}: {self._reason(error)}"

    def _reason(self, error: Exception) -> str:
        if isinstance(error, StoreUnusable):
            return error.reason
        if isinstance(error, sqlite3.OperationalError) and _is_busy(error):
            return f"{error}, for longer than the busy_timeout of {self._busy_timeout} s"
        return str(error)

    def _create(self) -> None:
        # SQLite's own would be open to others. Never opened if it is there: to close a file again
        # gives up every lock that SQLite holds on it in this process.
        if not self.path.parent.is_dir():
            raise OSError(f"there is no folder {self.path.parent}; create it first")
        with contextlib.suppress(FileExistsError):
            os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_RDWR, 0o600))

    def _prepare(self, connection: sqlite3.Connection) -> None:
        connection.execute("BEGIN")  # another process may be making the schema
        current = is_current(connection)
        connection.execute("COMMIT")
        self._use_wal(connection)
        connection.execute(f"PRAGMA synchronous = {self._synchronous}")
        connection.execute("PRAGMA foreign_keys = ON")
        if not current:
            connection.execute("BEGIN IMMEDIATE")
            migrate(connection)
            connection.execute("COMMIT")

    def _use_wal(self, connection: sqlite3.Connection) -> None:
        deadline = time.monotonic() + self._busy_timeout
        while True:
            try:
                (mode,) = connection.execute("PRAGMA journal_mode = wal").fetchone()
                break
            except sqlite3.OperationalError as error:
                # Here SQLite does not always wait for the others by itself.
                if not _is_busy(error) or time.monotonic() >= deadline:
                    raise
                time.sleep(_RETRY_S)
        if mode != "wal":
            raise SchemaUnsupported(
                f"it cannot have a write-ahead log (its journal is {mode!r}); "
                "put it on a local file system"
            )


class _Connection:
    """A connection that is opened when it is needed, for one thread at a time."""

    def __init__(self, database: Database) -> None:
        self._database: Database = weakref.proxy(database)
        self._connection: sqlite3.Connection | None = None
        self._file: _FileId | None = None
        self.lock = threading.Lock()

    @contextlib.contextmanager
    def transaction(self, begin: str) -> Iterator[sqlite3.Connection]:
        with self.lock:
            connection = self._open()
            try:
                connection.execute(begin)
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                self._roll_back(connection)
                raise

    def _open(self) -> sqlite3.Connection:
        path = self._database.path
        if self._connection is None:
            self._connection, self._file = self._database.connect()
        elif _file_id(path) != self._file:
            # What is written to a file without a name is lost. The next call opens what is there.
            self.close()
            raise StoreUnusable(path, "the file was moved or removed while it was in use")
        return self._connection

    def _roll_back(self, connection: sqlite3.Connection) -> None:
        try:
            connection.rollback()
        except sqlite3.Error:
            self.close()  # so that the next call starts afresh

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _is_busy(error: sqlite3.OperationalError) -> bool:
    """Whether the only trouble is that somebody else has the file locked."""
    return error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def _file_id(path: Path) -> _FileId | None:
    """Which file a path names; None if it names none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


_databases: weakref.WeakSet[Database] = weakref.WeakSet()
_forking: list[Database] = []
_fork_lock = threading.Lock()


def _connections(databases: list[Database]) -> Iterator[_Connection]:
    for database in databases:
        yield from (database._writer, database._reader)


def _before_fork() -> None:
    _fork_lock.acquire()
    _forking[:] = _databases
    for connection in _connections(_forking):
        connection.lock.acquire()
        connection.close()


def _after_fork() -> None:
    for connection in _connections(_forking):
        connection.lock.release()
    _forking.clear()
    _fork_lock.release()


on_fork(
    Part.STORES,
    before=_before_fork,
    after_in_parent=_after_fork,
    after_in_child=_after_fork,
)
