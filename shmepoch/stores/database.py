"""One SQLite file and this process's connections to it: two, whatever the number of threads."""

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
#: SQLite counts milliseconds in 32 bits: about 24 days, which stand for no limit.
_LONGEST_BUSY_S: Final = 2_147_483.0


class Database:
    """A connection that writes and one that reads, so that readers do not wait for a disk.

    STORE-3: SQLite forgets its locks across a fork but not that it had them, and a child that so
    much as closes an inherited connection, or opens the file beside one, can damage it. So there is
    none to inherit: a fork waits for running transactions and closes every connection first, and
    each process opens its own when it needs them. The one transaction that a fork cannot wait for
    is its own thread's, which a signal handler interrupted. A child that is forked there leaves the
    connection as it is, and the file to others.
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
        # At the end of the interpreter, others may still use it.
        weakref.finalize(self, _abandon, self._writer, self._reader).atexit = False

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
        self._file.closed = True
        for connection in (self._writer, self._reader):
            with connection.lock:
                if not connection.inside:
                    connection.close()

    def explain(self, error: Exception) -> str:
        """Why something failed, for the text of an error."""
        return f"{self._file.path}: {self._file.reason(error)}"


class _FileId(NamedTuple):
    """Which file a path names, and for one that is read without locks, in which state."""

    device: int
    inode: int
    state: tuple[int, int] | None = None


class OwnConnection(sqlite3.Connection):
    """A connection that is of no use in a process that inherited it, not even to be closed."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        self._pid = os.getpid()
        super().__init__(*args, **settings)
        # What is damaged is found where it is read as what it should be.
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
            _left_alone.append(self)  # to be collected would close it

    def _require_mine(self) -> None:
        if self._pid != os.getpid():
            raise sqlite3.ProgrammingError(_FORKED)


class _File:
    """What the path names, and how it is opened."""

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
        """Open the file, made or migrated if need be, and say which file that is.

        Raises `StoreUnusable`.
        """
        if self.closed:
            raise StoreUnusable(self.path, "it was closed")
        try:
            return self._connect()
        except (sqlite3.Error, SchemaUnsupported, OSError, ValueError) as error:
            raise StoreUnusable(self.path, self.reason(error)) from error

    def identify(self) -> _FileId | None:
        """Which file the path names; None if it names none."""
        try:
            found = self.path.stat()
        except OSError:
            return None
        state = (found.st_mtime_ns, found.st_size) if self._is_at_rest() else None
        return _FileId(found.st_dev, found.st_ino, state)

    def reason(self, error: Exception) -> str:
        """Why something failed, for people."""
        if isinstance(error, StoreUnusable):
            return error.reason
        if isinstance(error, sqlite3.OperationalError) and _is_busy(error):
            return f"{error}, for longer than the busy_timeout of {self._busy_timeout} s"
        return str(error)

    def _connect(self) -> tuple[sqlite3.Connection, _FileId]:
        # Where a link leads to: SQLite has its log beside that, and makes nothing that this did.
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
        """Whether it is only read, and no process has it open for writing. Then there is no log,
        and SQLite must not make one."""
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

    def __init__(self, file: _File) -> None:
        self.file: Final = file
        #: Held by the thread that uses it, and by one that forks. Signal handlers and finalizers
        #: run in the middle of a transaction, too, and must not wait for their own thread.
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
                if self.file.closed:  # meanwhile, by a signal handler or a finalizer
                    self.close()

    def _open(self) -> sqlite3.Connection:
        if self._connection is not None and self.file.identify() != self._found:
            self.close()
            if not self.file.read_only:
                # What is written to a file without a name is lost. The next call opens what is
                # there.
                raise StoreUnusable(
                    self.file.path, "the file was moved or removed while it was in use"
                )
        if self._connection is None:
            self._connection, self._found = self.file.connect()
        return self._connection

    def _require_unchanged(self) -> None:
        """What was read without locks is of one state only if no process has written meanwhile."""
        read_without_locks = self._found is not None and self._found.state is not None
        if read_without_locks and self.file.identify() != self._found:
            raise StoreUnusable(self.file.path, "it was changed while it was read; read it again")

    def _roll_back(self, connection: sqlite3.Connection) -> None:
        try:
            connection.rollback()
        except sqlite3.Error:
            self.close()  # so that the next call starts afresh

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()


def _text(data: bytes) -> str:
    return data.decode(errors="surrogateescape")


def _is_busy(error: sqlite3.OperationalError) -> bool:
    """Whether the only trouble is that another connection has the file locked."""
    # What Python's own module raises has no code of SQLite's.
    code: int = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_OK)
    return code & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def _make(path: Path) -> bool:
    """Make an empty file for this user alone; whether there was none.

    SQLite's own would be open to others. It is never opened here: to close a file gives up every
    lock that SQLite holds on it in this process.
    """
    if not path.parent.is_dir():
        raise OSError(f"there is no folder {path.parent}; create it first")
    try:
        os.mknod(path, stat.S_IFREG | 0o600)
    except FileExistsError:
        return False
    except OSError as error:  # which does not say where
        raise OSError(error.errno, error.strerror, str(path)) from error
    path.chmod(0o600)  # whatever the umask is
    return True


# --- fork -----------------------------------------------------------------------------------------

_FORKED: Final = (
    "this process was forked in the middle of its parent's call of the store, and cannot tell the "
    "locks of that from its own; use the store in the parent, or in a process that starts afresh"
)

#: All that may be open.
_connections: Final[set[_Connection]] = set()
#: Held by the thread that forks, and what it has taken beside this.
_forking: Final = threading.RLock()
_taken: Final[list[threading.RLock]] = []
#: What a child inherited open all the same: such files, and the connections that it never closes.
_inherited: Final[set[tuple[int, int]]] = set()
_left_alone: Final[list[sqlite3.Connection]] = []


def _abandon(*connections: _Connection) -> None:
    """Close what no store uses any more.

    The collector calls it, in any thread, so it waits for nothing. Only a fork can have the lock of
    such a connection, and that closes it.
    """
    for connection in connections:
        if connection.lock.acquire(blocking=False):
            try:
                connection.close()
                _connections.discard(connection)
            finally:
                connection.lock.release()


def _wait_for_forks() -> None:
    """Return once no other thread forks. A connection that was made too late for the fork to see
    it is not opened meanwhile."""
    # A fork waits for a transaction of this thread, whose signal handler this may be.
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
    """Leave alone what is open: this thread's own transaction, which goes on in the parent."""
    for connection in list(_connections):
        if connection.inside and (found := connection.file.identify()):
            _inherited.add(found[:2])
    _until_done(_let_go_on)


def _until_done(act: Callable[[], bool]) -> None:
    """Repeat `act` until it says that it is done, whatever a signal handler raises meanwhile.

    What a hook raises does not stop the fork.
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
            _taken.append(connection.lock)  # first: what is not owned is not given back
            connection.lock.acquire()
    for connection in list(_connections):
        if not connection.inside:
            connection.close()
    # Some may have been made since, or a signal handler may have forked and given all back.
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
    """Whether this thread has it, as `threading.Condition` asks."""
    return lock._is_owned()  # type: ignore[attr-defined, no-any-return]


on_fork(
    Part.STORES,
    before=_before_fork,
    after_in_parent=_after_fork_in_parent,
    after_in_child=_after_fork_in_child,
)
