"""One SQLite file and this process's two connections to it, for any number of threads."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import stat
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

from shmepoch.errors import StoreUnusable
from shmepoch.forking import Part, on_fork
from shmepoch.stores.schema import SchemaUnsupported, is_current, migrate

_RETRY_S: Final = 0.01
#: SQLite counts milliseconds in 32 bits: about 24 days, used for no limit.
_LONGEST_BUSY_S: Final = 2_147_483.0


class Database:
    """A connection that writes and one that reads, so that readers do not wait for a disk.

    STORE-3: SQLite loses its locks in a forked child, but believes that it still has them. A child
    that only closes an inherited connection, or opens the file beside one, can damage the file. So
    a child must not inherit connections: a fork waits for running transactions and closes every
    connection first, and each process opens its own when it needs them. A fork cannot wait for a
    transaction of its own thread, which a signal handler interrupted. A child that is forked there
    does not touch the connection, and refuses to use the file.
    """

    def __init__(
        self,
        path: Path,
        *,
        busy_timeout: float | None,
        synchronous: str,
        read_only: bool = False,
    ) -> None:
        self._file = _File(path, busy_timeout, synchronous, read_only)
        self._writer, self._reader = _Connection(self._file), _Connection(self._file)
        # Not at exit, when other code may still use it.
        weakref.finalize(self, _abandon, self._writer, self._reader).atexit = False

    @contextlib.contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """A transaction. A clean exit commits it, and then it is durable."""
        with self._writer.transaction("BEGIN IMMEDIATE") as connection:
            yield connection

    @contextlib.contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """A transaction that sees one state of the file."""
        with self._reader.transaction("BEGIN") as connection:
            yield connection

    def close(self) -> None:
        """Close both connections for good, after their transactions."""
        self._file.closed = True
        for connection in (self._writer, self._reader):
            with connection.lock:
                if not connection.inside:
                    connection.close()

    def explain(self, error: Exception) -> str:
        """The reason of a failure, for the text of an error."""
        return f"{self._file.path}: {self._file.reason(error)}"


class _FileId(NamedTuple):
    """The file that a path names, and for a file that is read without locks, its state."""

    device: int
    inode: int
    state: tuple[int, int] | None = None


class OwnConnection(sqlite3.Connection):
    """A connection that a process which inherited it does not use, and does not even close."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        self._pid = os.getpid()
        super().__init__(*args, **settings)
        # Damaged text is noticed later, when it is decoded.
        self.text_factory = _text

    def execute(self, *args: Any) -> sqlite3.Cursor:
        self._require_mine()
        return super().execute(*args)

    def executemany(self, *args: Any) -> sqlite3.Cursor:
        self._require_mine()
        return super().executemany(*args)

    def rollback(self) -> None:
        self._require_mine()
        super().rollback()

    def close(self) -> None:
        if self._pid == os.getpid():
            super().close()
        else:
            _left_alone.append(self)  # keeps it from being collected, which would close it

    def _require_mine(self) -> None:
        if self._pid != os.getpid():
            raise sqlite3.ProgrammingError(_FORKED)


class _File:
    """The file of a path, and the way to open it."""

    def __init__(
        self, path: Path, busy_timeout: float | None, synchronous: str, read_only: bool
    ) -> None:
        self.path: Final = path
        self.read_only: Final = read_only
        self.closed = False
        self._busy_timeout = (
            _LONGEST_BUSY_S if busy_timeout is None else min(busy_timeout, _LONGEST_BUSY_S)
        )
        self._synchronous = synchronous

    def connect(self) -> tuple[sqlite3.Connection, _FileId]:
        """Open the file, and make or migrate it if necessary. Returns also which file it is.

        Raises `StoreUnusable`.
        """
        if self.closed:
            raise StoreUnusable(self.path, "it was closed")
        try:
            return self._connect()
        except (sqlite3.Error, SchemaUnsupported, OSError, ValueError) as error:
            raise StoreUnusable(self.path, self.reason(error)) from error

    def identify(self) -> _FileId | None:
        """The file that the path names; None if there is none."""
        try:
            found = self.path.stat()
        except OSError:
            return None
        state = (found.st_mtime_ns, found.st_size) if self._is_at_rest() else None
        return _FileId(found.st_dev, found.st_ino, state)

    def reason(self, error: Exception) -> str:
        """The reason of a failure, for people."""
        if isinstance(error, StoreUnusable):
            return error.reason
        if isinstance(error, sqlite3.OperationalError) and _is_busy(error):
            return f"{error}, for longer than the busy_timeout of {self._busy_timeout} s"
        return str(error)

    def _connect(self) -> tuple[sqlite3.Connection, _FileId]:
        # The target of a link: SQLite has its log beside the target, and creates no file there
        # itself.
        real = Path(os.path.realpath(self.path))
        made = not self.read_only and _make(real)
        found = self.identify()
        if found is None:
            raise OSError("there is no such file")
        if not stat.S_ISREG(real.stat().st_mode):
            raise OSError("it is not a file")
        if found[:2] in _inherited:
            raise OSError(_FORKED)
        connection = None
        try:
            connection = sqlite3.connect(
                f"{real.as_uri()}?{self._mode(found)}",
                uri=True,
                timeout=self._busy_timeout,
                isolation_level=None,
                check_same_thread=False,
                factory=OwnConnection,
            )
            self._prepare(connection)
        except BaseException:
            if connection is not None:
                connection.close()
            if made and real.stat().st_size == 0:
                real.unlink()
            raise
        return connection, found

    def _mode(self, found: _FileId) -> str:
        if not self.read_only:
            return "mode=rw"
        return "mode=ro" if found.state is None else "mode=ro&immutable=1"

    def _is_at_rest(self) -> bool:
        """Whether the store is read-only and no process has the file open for writing. Then there
        is no log, and SQLite must not make one."""
        return self.read_only and not os.path.exists(f"{os.path.realpath(self.path)}-wal")

    def _prepare(self, connection: sqlite3.Connection) -> None:
        connection.execute("BEGIN")  # another process may be making the schema
        current = is_current(connection)
        connection.execute("COMMIT")
        if self.read_only:
            if not current:
                raise SchemaUnsupported(
                    "it is empty, or of an earlier release, and was opened for reading only; "
                    "name the store, or open it for writing once"
                )
            return
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
                # For this statement SQLite does not always wait by itself.
                if not _is_busy(error) or time.monotonic() >= deadline:
                    raise
                time.sleep(_RETRY_S)
        if mode != "wal":
            raise SchemaUnsupported(
                f"it cannot have a write-ahead log (its journal is {mode!r}); "
                "put it on a local file system"
            )


class _Connection:
    """A connection that is opened on demand, for one thread at a time."""

    def __init__(self, file: _File) -> None:
        self.file: Final = file
        #: Held by the thread that uses it, and by a thread that forks. Reentrant: a signal handler
        #: or finalizer in the middle of a transaction must not wait for its own thread.
        self.lock: Final = threading.RLock()
        #: Whether it is being opened or used. Under `lock`.
        self.inside = False
        self._connection: sqlite3.Connection | None = None
        self._found: _FileId | None = None
        _connections.add(self)

    @contextlib.contextmanager
    def transaction(self, begin: str) -> Iterator[sqlite3.Connection]:
        if self._connection is None:
            _wait_for_forks()
        with self.lock:
            if self.inside:
                raise StoreUnusable(
                    self.file.path,
                    "this thread is in the middle of a call of this store, which a signal handler "
                    "or a finalizer interrupted; make the call once that is over",
                )
            self.inside = True
            try:
                connection = self._open()
                try:
                    connection.execute(begin)
                    yield connection
                    connection.execute("COMMIT")
                    self._require_unchanged()
                except BaseException:
                    self._roll_back(connection)
                    raise
            finally:
                self.inside = False
                if self.file.closed:  # by a signal handler or a finalizer meanwhile
                    self.close()

    def _open(self) -> sqlite3.Connection:
        if self._connection is not None and self.file.identify() != self._found:
            self.close()
            if not self.file.read_only:
                # Anything written to a file without a name is lost. The next call opens the path
                # again.
                raise StoreUnusable(
                    self.file.path, "the file was moved or removed while it was in use"
                )
        if self._connection is None:
            self._connection, self._found = self.file.connect()
        return self._connection

    def _require_unchanged(self) -> None:
        """Raise `StoreUnusable` if a process has written while the file was read without locks."""
        read_without_locks = self._found is not None and self._found.state is not None
        if read_without_locks and self.file.identify() != self._found:
            raise StoreUnusable(self.file.path, "it was changed while it was read; read it again")

    def _roll_back(self, connection: sqlite3.Connection) -> None:
        try:
            connection.rollback()
        except sqlite3.Error:
            self.close()  # so that the next call opens a new one

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()


def _text(data: bytes) -> str:
    return data.decode(errors="surrogateescape")


def _is_busy(error: sqlite3.OperationalError) -> bool:
    """Whether the error is only that another connection has the file locked."""
    # An error of Python's own module has no SQLite error code.
    code: int = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_OK)
    return code & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def _make(path: Path) -> bool:
    """Create an empty file for this user alone; false if there was a file.

    A file that SQLite creates would be open to others. It is not opened here: closing a file
    releases every lock that SQLite holds on it in this process.
    """
    if not path.parent.is_dir():
        raise OSError(f"there is no folder {path.parent}; create it first")
    try:
        os.mknod(path, stat.S_IFREG | 0o600)
    except FileExistsError:
        return False
    except OSError as error:  # the error has no path
        raise OSError(error.errno, error.strerror, str(path)) from error
    path.chmod(0o600)  # whatever the umask is
    return True


# --- fork -----------------------------------------------------------------------------------------

_FORKED: Final = (
    "this process was forked in the middle of its parent's call of the store, and cannot tell the "
    "locks of that from its own; use the store in the parent, or in a process that starts afresh"
)

#: All connections that may be open.
_connections: Final[set[_Connection]] = set()
#: Held by the thread that forks; the list has the other locks that it has taken.
_forking: Final = threading.RLock()
_taken: Final[list[threading.RLock]] = []
#: Files that were open in spite of this when a child was forked, and the connections to them, which
#: it never closes.
_inherited: Final[set[tuple[int, int]]] = set()
_left_alone: Final[list[sqlite3.Connection]] = []


def _abandon(*connections: _Connection) -> None:
    """Close connections that no store uses any longer.

    The garbage collector calls it, in any thread, so it must not wait. Only a fork can hold the
    lock of such a connection, and the fork closes it.
    """
    for connection in connections:
        if connection.lock.acquire(blocking=False):
            try:
                connection.close()
                _connections.discard(connection)
            finally:
                connection.lock.release()


def _wait_for_forks() -> None:
    """Wait until no other thread forks, so that a connection that the fork did not see is not
    opened meanwhile."""
    # If this is a signal handler in a transaction, a fork may be waiting for that transaction.
    if not any(c.inside and _is_owned(c.lock) for c in list(_connections)):
        with _forking:
            pass


def _before_fork() -> None:
    """Wait for the transactions of other threads, and close every connection."""
    _until_done(_stop_others)


def _after_fork_in_parent() -> None:
    """Let the other threads go on."""
    _until_done(_let_go_on)


def _after_fork_in_child() -> None:
    """Do not touch the open connection of this thread's own transaction, which goes on in the
    parent."""
    for connection in list(_connections):
        if connection.inside and (found := connection.file.identify()):
            _inherited.add(found[:2])
    _until_done(_let_go_on)


def _until_done(act: Callable[[], bool]) -> None:
    """Repeat `act` until it returns True, whatever a signal handler raises meanwhile.

    An error of a hook does not stop the fork.
    """
    interrupt: BaseException | None = None
    done = False
    while not done:
        try:
            done = act()
        except BaseException as error:
            interrupt = interrupt or error
    if interrupt is not None:
        raise interrupt


def _stop_others() -> bool:
    while not _is_owned(_forking):
        _forking.acquire()
    for connection in list(_connections):
        if not _is_owned(connection.lock):
            _taken.append(connection.lock)  # first: a lock that is not owned is not released later
            connection.lock.acquire()
    for connection in list(_connections):
        if not connection.inside:
            connection.close()
    # New connections may exist, or a signal handler may have forked and released all locks.
    return all(_is_owned(lock) for lock in (_forking, *(c.lock for c in list(_connections))))


def _let_go_on() -> bool:
    while _taken:
        if _is_owned(_taken[-1]):
            _taken[-1].release()
        _taken.pop()
    while _is_owned(_forking):
        _forking.release()
    return True


def _is_owned(lock: threading.RLock) -> bool:
    """Whether this thread has the lock; `threading.Condition` asks in the same way."""
    return lock._is_owned()  # type: ignore[attr-defined, no-any-return]


on_fork(
    Part.STORES,
    before=_before_fork,
    after_in_parent=_after_fork_in_parent,
    after_in_child=_after_fork_in_child,
)
