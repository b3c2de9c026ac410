"""An SQLite store with other processes, kills, locks, full disks and missing permissions."""

from __future__ import annotations

import contextlib
import gc
import json
import multiprocessing
import os
import random
import resource
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from shmepoch.errors import StoreConflict, StoreReadFailed, StoreUnusable, StoreWriteFailed
from shmepoch.ids import RuntimeEpochId, SessionId
from shmepoch.stores import SqliteRuntimeStore, database
from tests.stores.samples import Epoch, completion, completions
from tests.support import eventually, forked

SPAWN = multiprocessing.get_context("spawn")


def opened(path: Path, busy_timeout: float = 60.0) -> SqliteRuntimeStore:
    return SqliteRuntimeStore(path, busy_timeout=busy_timeout, synchronous="normal")


def require_sound(path: Path) -> None:
    connection = sqlite3.connect(path)
    try:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
    finally:
        connection.close()


# --- several processes ----------------------------------------------------------------------------


def append(path: Path, session: SessionId, epoch_id: RuntimeEpochId, through: int) -> None:
    """One process's work: save its own epoch, one completion with each call."""
    epoch = Epoch(session)
    epoch.id = epoch_id
    with opened(path) as store:
        for seq in range(1, through + 1):
            store.save([epoch.capture([completion(seq)], cursors=(seq, seq - 1, 0))])


def test_processes_make_and_fill_one_file_together(path: Path) -> None:
    epochs = [Epoch() for _ in range(6)]
    workers = [
        SPAWN.Process(target=append, args=(path, epoch.session_id, epoch.id, 60))
        for epoch in epochs
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * len(workers)
    with opened(path) as store:
        for epoch in epochs:
            snapshot = store.load(epoch.session_id)
            assert snapshot is not None
            assert [entry.seq for entry in snapshot.entries] == list(range(1, 61))
            assert snapshot.cursors.agent_applied_cursor == 60
    require_sound(path)


def test_a_file_is_made_once_however_many_make_it(tmp_path: Path) -> None:
    """Creating it switches the journal and makes the schema; neither step may fail in another
    process."""
    failures: list[BaseException] = []

    def make(path: Path, ready: threading.Barrier) -> None:
        ready.wait()
        try:
            with opened(path) as store:
                store.save([Epoch().capture()])
        except BaseException as error:
            failures.append(error)

    for round in range(20):
        path, ready = tmp_path / f"{round}.db", threading.Barrier(6)
        threads = [threading.Thread(target=make, args=(path, ready)) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        with opened(path) as store:
            assert len(list(store.sessions())) == 6


def test_a_file_that_somebody_reads_while_it_is_made_is_waited_for(path: Path) -> None:
    reader = sqlite3.connect(path, isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM sqlite_master").fetchall()
    with pytest.raises(StoreUnusable, match="locked, for longer"):
        opened(path, busy_timeout=0.01)
    made: list[str] = []

    def make() -> None:
        with opened(path) as store:
            made.append(str(store.path))

    thread = threading.Thread(target=make)
    thread.start()
    thread.join(0.05)
    reader.execute("COMMIT")
    thread.join()
    reader.close()
    assert made == [str(path)]


def test_a_switch_of_the_journal_that_gives_up_at_once_is_tried_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This happens about once in two hundred times when eight processes create a file together."""
    refusals = [1, 2, 3]

    class Hasty(database.OwnConnection):
        def execute(self, sql: str, *parameters: Any) -> sqlite3.Cursor:
            if "journal_mode" in sql and refusals:
                refusals.pop()
                error = sqlite3.OperationalError("database is locked")
                error.sqlite_errorcode = sqlite3.SQLITE_BUSY
                raise error
            return super().execute(sql, *parameters)

    monkeypatch.setattr(database, "OwnConnection", Hasty)
    with pytest.raises(StoreUnusable, match="locked, for longer"):
        opened(path, busy_timeout=0)
    with opened(path) as store:
        assert list(store.sessions()) == []
    assert refusals == []


def merge(path: Path, session: SessionId, epoch_id: RuntimeEpochId, start: Any) -> None:
    """Save the same epoch as the other processes, in another order."""
    epoch = Epoch(session)
    epoch.id = epoch_id
    with opened(path) as store:
        entries = store.list_entries(epoch_id)
        order = list(range(1, 101))
        random.Random(os.getpid()).shuffle(order)
        start.wait()
        for cursor in order:
            store.save([epoch.capture(entries[: cursor % 7], cursors=(cursor, cursor, 0))])


def test_one_epoch_saved_by_several_only_grows(path: Path) -> None:
    epoch = Epoch()
    with opened(path) as store:
        store.save([epoch.capture(completions(1, 7))])
        start = SPAWN.Event()
        workers = [
            SPAWN.Process(target=merge, args=(path, epoch.session_id, epoch.id, start))
            for _ in range(3)
        ]
        for worker in workers:
            worker.start()
        start.set()
        highest = 0
        while any(worker.is_alive() for worker in workers):
            snapshot = store.load(epoch.session_id)
            assert snapshot is not None
            assert snapshot.cursors.agent_applied_cursor >= highest
            assert snapshot.cursors.agent_applied_cursor == snapshot.cursors.runtime_observed_seq
            highest = snapshot.cursors.agent_applied_cursor
        for worker in workers:
            worker.join()
        assert [worker.exitcode for worker in workers] == [0] * 3
        snapshot = store.load(epoch.session_id)
        assert snapshot is not None
        assert snapshot.cursors.agent_applied_cursor == 100
        assert len(snapshot.entries) == 7


# --- fork -----------------------------------------------------------------------------------------


def test_a_forked_child_uses_the_store_of_its_parent(sqlite: SqliteRuntimeStore) -> None:
    mine, theirs = Epoch(), Epoch()
    sqlite.save([mine.capture([completion(1)])])

    def child() -> None:
        assert sqlite.last_seq(mine.id) == 1
        sqlite.save([theirs.capture(completions(1, 2))])

    assert forked(child) == 0
    assert sqlite.last_seq(theirs.id) == 2
    sqlite.save([mine.capture([completion(2)])])
    assert sqlite.last_seq(mine.id) == 2


def test_no_connection_is_inherited(sqlite: SqliteRuntimeStore) -> None:
    sqlite.save([Epoch().capture()])

    def child() -> None:
        for link in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # the listing's own
                assert "store.db" not in str(link.readlink())

    assert forked(child) == 0


def test_forks_in_the_middle_of_saves_lose_nothing(sqlite: SqliteRuntimeStore) -> None:
    """Two threads save while a third forks; the children save, too, and live on afterwards."""
    epochs = [Epoch(), Epoch()]
    stop = threading.Event()
    counts = [0, 0]

    def work(index: int) -> None:
        while not stop.is_set():
            seq = counts[index] + 1
            sqlite.save([epochs[index].capture([completion(seq)])])
            counts[index] = seq

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    children = [Epoch() for _ in range(20)]
    try:
        for child in children:

            def save(child: Epoch = child) -> None:
                for seq in range(1, 6):
                    sqlite.save([child.capture([completion(seq)])])
                sqlite.close()

            assert forked(save) == 0
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert min(counts) > 0
    for epoch, count in zip([*epochs, *children], [*counts, *[5] * 20], strict=True):
        assert sqlite.last_seq(epoch.id) == len(sqlite.list_entries(epoch.id)) == count
    require_sound(sqlite.path)


def descriptors_of(pid: int, path: Path) -> list[str]:
    """The descriptors of a store's files that a process has open."""
    found = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed since
            found.append(str(link.readlink()))
    return [target for target in found if target.startswith(str(path))]


@pytest.mark.parametrize("closing", [True, False], ids=["closed", "collected"])
def test_no_connection_is_inherited_while_another_thread_opens_stores(
    path: Path, closing: bool
) -> None:
    """Also no connection that is being closed because its store is no longer used."""
    opened(path).close()
    stop, made = threading.Event(), threading.Event()

    def open_stores() -> None:
        while not stop.is_set():
            store = opened(path)
            made.set()
            if closing:
                store.close()

    threads = [threading.Thread(target=open_stores) for _ in range(2)]
    for thread in threads:
        thread.start()
    made.wait()
    inherited = []
    try:
        for _ in range(30):
            pid = os.fork()
            if pid == 0:
                signal.pause()
            inherited += descriptors_of(pid, path)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert inherited == []


class Interrupt(Exception):
    """The exception of a signal handler."""


def running_in_main() -> str:
    """The function that the main thread is in."""
    main = threading.main_thread().ident
    assert main is not None
    return sys._current_frames()[main].f_code.co_name


@contextlib.contextmanager
def handling(act: Callable[[], object]) -> Iterator[None]:
    """Call `act` when SIGUSR1 comes."""
    before = signal.signal(signal.SIGUSR1, lambda *_: act())
    yield
    signal.signal(signal.SIGUSR1, before)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_fork_that_is_interrupted_leaves_no_lock(sqlite: SqliteRuntimeStore) -> None:
    """The fork waits for a transaction of another thread, and cannot be stopped."""
    epoch, inside, go_on = Epoch(), threading.Event(), threading.Event()
    forked_while_it_ran: list[bool] = []

    def transact() -> None:
        with sqlite._database.write():
            inside.set()
            go_on.wait()
            forked_while_it_ran.append(bool(children))

    def interrupt() -> None:
        eventually(lambda: running_in_main() == "_stop_others")
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.01)
        go_on.set()

    children: list[int] = []
    raised: list[Interrupt] = []

    def give_up() -> None:
        raised.append(Interrupt())
        raise raised[-1]

    threads = [threading.Thread(target=transact), threading.Thread(target=interrupt)]
    with handling(give_up):
        threads[0].start()
        inside.wait()
        threads[1].start()
        with contextlib.suppress(Interrupt):
            children.append(forked(lambda: sqlite.save([Epoch().capture()])))
        for thread in threads:
            thread.join()
    assert raised
    assert forked_while_it_ran == [False]
    assert children == [0]
    sqlite.save([epoch.capture([completion(1)])])
    assert forked(lambda: sqlite.save([Epoch().capture()])) == 0
    assert len(list(sqlite.sessions())) == 3


def test_a_fork_that_is_interrupted_at_its_end_leaves_no_lock(
    sqlite: SqliteRuntimeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_go_on, interrupts = database._let_go_on, [Interrupt()]

    def interrupted() -> bool:
        if interrupts:
            raise interrupts.pop()
        return let_go_on()

    monkeypatch.setattr(database, "_let_go_on", interrupted)
    assert forked(lambda: sqlite.save([Epoch().capture()])) == 0
    assert not interrupts
    assert not database._taken
    assert not database._is_owned(database._forking)


class Interrupted(database.OwnConnection):
    """A connection that a signal interrupts in the middle of a transaction."""

    def executemany(self, *args: Any) -> sqlite3.Cursor:
        cursor = super().executemany(*args)
        if signal.getsignal(signal.SIGUSR1) is not signal.SIG_DFL:
            os.kill(os.getpid(), signal.SIGUSR1)
        return cursor


def test_a_handler_that_forks_in_the_middle_of_a_transaction(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The transaction belongs to the parent. Neither process waits for ever. The child must not use
    the file: its SQLite believes that it has the parent's locks."""
    epoch, other, children = Epoch(), Epoch(), list[int]()
    monkeypatch.setattr(database, "OwnConnection", Interrupted)
    store = opened(path)
    elsewhere = opened(path.with_name("other.db"))

    def fork() -> None:
        if children:
            return
        children.append(os.fork())
        if children[0] == 0:
            for use in (store.save, opened(path.with_name("another.db")).save):
                with contextlib.suppress(StoreWriteFailed):
                    use([other.capture()])
            with pytest.raises(StoreUnusable, match="forked in the middle"):
                opened(path)
            with pytest.raises(StoreReadFailed, match="forked in the middle"):
                store.last_seq(epoch.id)
            elsewhere.save([other.capture()])  # a file that it has not inherited

    with handling(fork):
        try:
            store.save([epoch.capture(completions(1, 3))])
            assert children != [0]
        except BaseException as error:
            if children != [0]:
                raise
            as_expected = isinstance(error, StoreWriteFailed) and "forked in" in error.reason
            not_closed = len(database._left_alone) == 1
            os._exit(0 if as_expected and not_closed else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1]) == 0
    store.save([epoch.capture([completion(4)])])
    assert store.last_seq(epoch.id) == 4
    assert list(store.sessions()) == [epoch.session_id]
    assert list(elsewhere.sessions()) == [other.session_id]
    store.close()
    elsewhere.close()
    require_sound(path)


def test_a_handler_may_use_the_store_in_the_middle_of_a_transaction(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write is refused at once; the handler may read, and may close the store."""
    epoch, heard = Epoch(), list[str]()
    monkeypatch.setattr(database, "OwnConnection", Interrupted)
    store = opened(path)

    def use() -> None:
        if not heard:
            with pytest.raises(StoreWriteFailed, match="signal handler") as caught:
                store.save([Epoch().capture()])
            heard.append(caught.value.reason)
            assert store.last_seq(epoch.id) == 0
            store.close()

    with handling(use):
        store.save([epoch.capture(completions(1, 3))])
    assert len(heard) == 1
    with pytest.raises(StoreWriteFailed, match="it was closed"):
        store.save([epoch.capture()])
    gc.collect()  # the traceback has the cursor
    assert descriptors_of(os.getpid(), path) == []
    with opened(path) as again:
        assert again.last_seq(epoch.id) == 3


# --- killed ---------------------------------------------------------------------------------------


def die_at(path: Path, statement: str, occurrence: int, captures: Sequence[Any]) -> None:
    """Save, and die by SIGKILL when the given statement is run for the nth time."""
    seen = 0

    def look(text: str) -> None:
        nonlocal seen
        seen += statement in text
        if seen == occurrence:
            os.kill(os.getpid(), signal.SIGKILL)

    store = opened(path)
    with store._database.write() as connection:
        connection.set_trace_callback(look)
    store.save(captures)


@pytest.mark.parametrize(
    ("statement", "occurrence"),
    [
        ("BEGIN IMMEDIATE", 1),
        ("INSERT INTO epochs", 1),
        ("INSERT INTO entries", 1),
        ("INSERT INTO entries", 4),
        ("INSERT INTO entries", 6),
        ("DELETE FROM operations", 2),
        ("COMMIT", 1),
    ],
)
def test_killed_within_a_transaction_nothing_of_it_is_seen(
    path: Path, statement: str, occurrence: int
) -> None:
    before, first, second = Epoch(), Epoch(), Epoch()
    with opened(path) as store:
        store.save([before.capture(completions(1, 2), cursors=(2, 2, 2))])
    captures = [first.capture(completions(1, 3)), second.capture(completions(1, 3))]
    code = forked(lambda: die_at(path, statement, occurrence, captures))
    assert code == -signal.SIGKILL
    with opened(path, busy_timeout=0) as store:
        assert list(store.sessions()) == [before.session_id]
        store.save(captures)
        assert store.last_seq(second.id) == 3
    require_sound(path)


SAVING = """
import sys
from shmepoch.ids import RuntimeEpochId, SessionId
from shmepoch.stores import SqliteRuntimeStore, database
from tests.stores.samples import Epoch, completion

epoch = Epoch(SessionId.parse(sys.argv[2]))
epoch.id = RuntimeEpochId.parse(sys.argv[3])
store = SqliteRuntimeStore(sys.argv[1])
seq = store.last_seq(epoch.id)
while True:
    entries = [completion(seq + n) for n in range(1, 8)]
    seq += 7
    store.save([epoch.capture(entries, cursors=(seq, seq, seq))])
    print(seq, flush=True)
"""


def test_killed_at_any_moment_it_keeps_what_it_promised(path: Path) -> None:
    epoch, acknowledged = Epoch(), 0
    moments = random.Random(7)
    for _ in range(8):
        writer = subprocess.Popen(
            [sys.executable, "-c", SAVING, str(path), str(epoch.session_id), str(epoch.id)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert writer.stdout is not None
        for _ in range(moments.randint(1, 12)):
            acknowledged = int(writer.stdout.readline())
        writer.kill()
        rest = writer.stdout.read().splitlines()
        writer.wait()
        writer.stdout.close()
        if rest:
            acknowledged = int(rest[-1])
        with opened(path, busy_timeout=0) as store:
            snapshot = store.load(epoch.session_id)
        assert snapshot is not None
        last = len(snapshot.entries)
        assert [entry.seq for entry in snapshot.entries] == list(range(1, last + 1))
        assert last in (acknowledged, acknowledged + 7)
        assert snapshot.cursors.agent_applied_cursor == last
        require_sound(path)


# --- locked ---------------------------------------------------------------------------------------


@pytest.fixture
def locked(sqlite: SqliteRuntimeStore) -> Iterator[sqlite3.Connection]:
    """Another connection that has the file locked for writing."""
    other = sqlite3.connect(sqlite.path, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    yield other
    other.close()


def test_a_locked_file_is_an_error_that_says_how_long_it_waited(
    sqlite: SqliteRuntimeStore, locked: sqlite3.Connection
) -> None:
    epoch = Epoch()
    with opened(sqlite.path, busy_timeout=0.05) as store:
        with pytest.raises(StoreWriteFailed, match=r"locked, for longer.*busy_timeout of 0.05 s"):
            store.save([epoch.capture([completion(1)])])
        assert store.load(epoch.session_id) is None  # readers do not wait for writers
        locked.execute("ROLLBACK")
        store.save([epoch.capture([completion(1)])])
        assert store.last_seq(epoch.id) == 1


def test_a_lock_that_ends_in_time_is_waited_for(
    sqlite: SqliteRuntimeStore, locked: sqlite3.Connection
) -> None:
    epoch, begun = Epoch(), threading.Event()

    def save() -> None:
        begun.set()
        sqlite.save([epoch.capture([completion(1)])])

    thread = threading.Thread(target=save)
    thread.start()
    begun.wait()
    locked.execute("COMMIT")
    thread.join()
    assert sqlite.last_seq(epoch.id) == 1


def test_a_conflict_leaves_no_lock(sqlite: SqliteRuntimeStore) -> None:
    epoch = Epoch()
    sqlite.save([epoch.capture([completion(1)])])
    with pytest.raises(StoreConflict):
        sqlite.save([epoch.capture([completion(1)])])
    with opened(sqlite.path, busy_timeout=0) as other:
        other.save([epoch.capture([completion(2)])])


# --- no room --------------------------------------------------------------------------------------

#: Saves until the store refuses. Then prints what was saved, whether the store can be read, and
#: whether it saves again when there is room.
FILLING = """
import json, sys
from shmepoch.errors import StoreWriteFailed
from shmepoch.stores import SqliteRuntimeStore, database
from tests.stores.samples import Epoch, completion

def fill(path, limit, lift):
    store = SqliteRuntimeStore(path)
    epoch = Epoch()
    limit()
    taken = 0
    try:
        while True:
            store.save([epoch.capture([completion(taken + 1, content="x" * 20_000)])])
            taken += 1
    except StoreWriteFailed as error:
        reason, cause = error.reason, type(error.__cause__).__name__
    read = store.last_seq(epoch.id)
    lift()
    store.save([epoch.capture([completion(taken + 1)])])
    print(json.dumps({
        "taken": taken, "reason": reason, "cause": cause, "read": read,
        "then": store.last_seq(epoch.id), "epoch": str(epoch.id),
    }))
"""

BY_RLIMIT = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
room = lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
fill(sys.argv[1], lambda: room(400_000), lambda: room(resource.RLIM_INFINITY))
"""

BY_DISK = """
import os
ballast = os.path.dirname(sys.argv[1]) + "/ballast"
open(ballast, "wb").write(b"x" * 200_000)
fill(sys.argv[1], lambda: None, lambda: os.unlink(ballast))
"""


def filled(path: Path, how: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", FILLING + how, str(path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def require_whole(path: Path, told: dict[str, Any]) -> None:
    assert told["taken"] > 3
    assert told["read"] == told["taken"]
    assert told["then"] == told["taken"] + 1
    assert told["cause"] == "OperationalError"
    assert str(path) in told["reason"]
    with opened(path) as store:
        entries = store.list_entries(RuntimeEpochId.parse(told["epoch"]))
        assert [entry.seq for entry in entries] == list(range(1, told["taken"] + 2))
    require_sound(path)


@pytest.mark.skipif(
    resource.getrlimit(resource.RLIMIT_FSIZE)[1] != resource.RLIM_INFINITY,
    reason="the limit on file sizes cannot be lifted again here",
)
def test_a_file_that_may_not_grow_loses_nothing(path: Path) -> None:
    require_whole(path, filled(path, BY_RLIMIT))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_loses_nothing(small_disk: Path) -> None:
    path = small_disk / "store.db"
    told = filled(path, BY_DISK)
    assert "full" in told["reason"]
    require_whole(path, told)


# --- no permission --------------------------------------------------------------------------------


def unprivileged(work: Callable[[], object]) -> int:
    """Run `work` in a child that permissions apply to, even if the tests run as root."""

    def as_nobody() -> None:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
        work()

    return forked(as_nobody)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that another user can access, unlike pytest's own."""
    with tempfile.TemporaryDirectory(prefix="shmepoch-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


def test_a_read_only_folder_is_an_error(open_folder: Path) -> None:
    open_folder.chmod(0o555)

    def work() -> None:
        with pytest.raises(StoreUnusable, match=r"Permission denied.*store.db"):
            SqliteRuntimeStore(open_folder / "store.db")

    assert unprivileged(work) == 0


def test_a_store_in_a_folder_made_read_only_is_an_error_or_works(open_folder: Path) -> None:
    path = open_folder / "store.db"
    epoch = Epoch()
    with opened(path) as store:
        store.save([epoch.capture([completion(1)])])
    path.chmod(0o666)
    open_folder.chmod(0o555)

    def work() -> None:
        with pytest.raises(StoreUnusable, match=r"unable to open|readonly"):
            SqliteRuntimeStore(path)

    assert unprivileged(work) == 0
    with opened(path) as store:
        assert store.last_seq(epoch.id) == 1


def test_a_read_only_file_can_be_read_and_says_so_when_written(open_folder: Path) -> None:
    path = open_folder / "store.db"
    epoch = Epoch()
    with opened(path) as store:
        store.save([epoch.capture([completion(1)])])
    path.chmod(0o444)
    open_folder.chmod(0o777)

    def work() -> None:
        store = SqliteRuntimeStore(path)
        assert store.last_seq(epoch.id) == 1
        with pytest.raises(StoreWriteFailed, match="readonly database"):
            store.save([epoch.capture([completion(2)])])

    assert unprivileged(work) == 0


def test_somebody_elses_file_is_an_error(open_folder: Path) -> None:
    path = open_folder / "store.db"
    with opened(path):
        pass
    open_folder.chmod(0o777)
    path.chmod(0o000)

    def work() -> None:
        with pytest.raises(StoreUnusable, match="unable to open"):
            SqliteRuntimeStore(path)

    assert unprivileged(work) == 0


def test_an_error_arrives_whole_from_another_process(tmp_path: Path) -> None:
    path = tmp_path / "none" / "store.db"
    with SPAWN.Pool(1) as pool, pytest.raises(StoreUnusable, match="no folder") as caught:
        pool.apply(SqliteRuntimeStore, (path,))
    assert caught.value.path == path
