"""An attach is refused unless the file is this user's whole segment of this release.

Each fault has its own error, and the file does not change: a failed attach leaves no trace.
"""

from __future__ import annotations

import os
import signal
import stat
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest

from shmepoch import _native as at
from shmepoch._native import is_locked
from shmepoch.config import OpsLifecycleConfig
from shmepoch.epoch.cursors import EpochCursorState
from shmepoch.errors import (
    EpochSealed,
    LayoutUnsupported,
    NamespaceInvalid,
    SegmentCorrupted,
    SegmentExists,
    SegmentForeign,
    SharedMemoryExhausted,
    WitnessMismatch,
)
from shmepoch.ids import RuntimeEpochId, SessionId
from shmepoch.memory import files
from shmepoch.memory.namespaces import list_sessions, resolve_namespace, segment_path
from shmepoch.memory.participants import Role
from shmepoch.memory.removal import remove_unused
from shmepoch.memory.segment import SharedSegment
from tests.epoch.operations import Registry, end
from tests.support import held_writer

WORDS: Final = (0, 1, 2**31, 2**32, 2**63, 2**64 - 1)


@pytest.fixture
def segment(namespace: str) -> Iterator[SharedSegment]:
    made = SharedSegment.allocate(
        namespace, OpsLifecycleConfig(), session_id=SessionId.new(), epoch_id=RuntimeEpochId.new()
    )
    made.publish()
    made.join(Role.RUNTIME)
    end(Registry(made))
    yield made
    made.unlink()
    made.close()


@pytest.fixture
def path(namespace: str) -> Iterator[Path]:
    """The path of a session's segment."""
    found = segment_path(namespace, SessionId.new())
    yield found
    if found.is_dir() and not found.is_symlink():
        found.rmdir()
    else:
        found.unlink(missing_ok=True)


def session_of(path: Path) -> SessionId:
    return SessionId.from_bytes(bytes.fromhex(path.name.rpartition(".")[2]))


def trace(path: Path) -> tuple[object, ...]:
    """Everything of a file that an attach could change."""
    found = path.lstat()
    content = path.read_bytes() if stat.S_ISREG(found.st_mode) else None
    return found.st_ino, found.st_mode, found.st_size, found.st_nlink, found.st_mtime_ns, content


def refused(namespace: str, path: Path) -> Exception:
    """The error of an attach that has changed neither the file nor this process's descriptors."""
    before, held = trace(path), os.listdir("/proc/self/fd")
    with pytest.raises(Exception) as error:  # the caller checks it
        SharedSegment.attach(namespace, session_of(path))
    assert trace(path) == before
    assert os.listdir("/proc/self/fd") == held
    assert path.name in str(error.value)
    return error.value


# --- files of others ------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o000, 0o400, 0o640, 0o604, 0o666, 0o700, 0o4600])
def test_a_file_that_others_may_open(namespace: str, segment: SharedSegment, mode: int) -> None:
    segment.path.chmod(mode)
    if os.geteuid() == 0 or mode & 0o600 == 0o600:
        error = refused(namespace, segment.path)
        assert isinstance(error, SegmentForeign)
        assert isinstance(error, PermissionError)
        assert (error.field, error.expected, error.actual) == ("mode", "0o600", oct(mode))
    segment.path.chmod(0o600)
    SharedSegment.attach(namespace, segment.session_id).close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_file_of_another_user(namespace: str, segment: SharedSegment) -> None:
    os.chown(segment.path, 12345, -1)
    error = refused(namespace, segment.path)
    assert isinstance(error, SegmentForeign)
    assert (error.field, error.expected, error.actual) == ("owner", 0, 12345)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes another user")
def test_a_file_that_this_user_cannot_open(namespace: str, segment: SharedSegment) -> None:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setuid(12345)
            try:
                SharedSegment.attach(namespace, segment.session_id)
            except SegmentForeign as error:
                code = (
                    0 if (error.field, error.expected, error.actual) == ("owner", 12345, 0) else 2
                )
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_symbolic_link(namespace: str, segment: SharedSegment, path: Path) -> None:
    path.symlink_to(segment.path)
    error = refused(namespace, path)
    assert isinstance(error, SegmentForeign)
    assert (error.field, error.actual) == ("type", "symbolic link")
    path.unlink()
    path.symlink_to(path.with_name("nowhere"))
    assert isinstance(refused(namespace, path), SegmentForeign)


def test_a_directory(namespace: str, path: Path) -> None:
    path.mkdir(mode=0o600)
    error = refused(namespace, path)
    assert isinstance(error, SegmentForeign)
    assert error.field == "type"


@pytest.mark.parametrize("kind", [stat.S_IFIFO, stat.S_IFSOCK])
def test_a_special_file(namespace: str, path: Path, kind: int) -> None:
    os.mknod(path, kind | 0o600)
    error = refused(namespace, path)
    assert isinstance(error, SegmentForeign)
    assert error.field == "type"


# --- files that are not segments ------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 8, 255, at.PAGE - 1])
def test_a_file_below_a_page(namespace: str, path: Path, size: int) -> None:
    path.touch(0o600)
    os.truncate(path, size)
    error = refused(namespace, path)
    assert isinstance(error, SegmentCorrupted)
    assert (error.field, error.actual) == ("file size", size)


@pytest.mark.parametrize("content", [b"\x00", b"\xff", b"shmepocX"])
def test_a_file_of_something_else(namespace: str, path: Path, content: bytes) -> None:
    path.touch(0o600)
    path.write_bytes(content * (2 * at.PAGE // len(content)))
    error = refused(namespace, path)
    assert isinstance(error, SegmentCorrupted)
    assert (error.field, error.expected) == ("magic", at.MAGIC)


@pytest.mark.parametrize("change", [-at.PAGE, -8, -1, 1, 8, at.PAGE])
def test_a_file_that_was_cut_or_grew(namespace: str, segment: SharedSegment, change: int) -> None:
    size = segment.layout.size
    os.truncate(segment.path, size + change)
    error = refused(namespace, segment.path)
    assert isinstance(error, SegmentCorrupted)
    assert (error.field, error.expected, error.actual) == ("size", size + change, size)
    os.truncate(segment.path, size)
    SharedSegment.attach(namespace, segment.session_id).close()


# --- headers --------------------------------------------------------------------------------------


def rewrite(path: Path, offset: int, data: bytes) -> None:
    with open(path, "r+b", buffering=0) as file:
        file.seek(offset)
        file.write(data)


def word(value: int) -> bytes:
    return struct.pack("=Q", value)


@pytest.mark.parametrize(
    ("offset", "fields"),
    [
        (at.MAGIC_AT, {"magic"}),
        (at.SIZE_AT, {"size"}),
        (at.STATE_AT, {"state"}),
        (
            at.CAPACITIES_AT,
            {"max_completed", "feed_bytes", "size of its capacities", "checksum of its capacities"},
        ),
        (at.CAPACITIES_AT + 8, {"max_concurrent"}),
        pytest.param(
            at.CAPACITIES_AT + 16,
            {
                "max_operations",
                "feed_bytes",
                "size of its capacities",
                "checksum of its capacities",
            },
        ),
        pytest.param(
            at.CAPACITIES_AT + 24,
            {"feed_bytes", "size of its capacities", "checksum of its capacities"},
        ),
        pytest.param(
            at.CAPACITIES_AT + 32,
            {"max_participants", "size of its capacities", "checksum of its capacities"},
        ),
        (at.CAPACITIES_AT + 40, {"store_wait_ms", "checksum of its capacities"}),
    ],
)
def test_a_header_word(
    namespace: str, segment: SharedSegment, offset: int, fields: set[str]
) -> None:
    original = segment.memory.load(offset)
    found = set()
    for value in {*WORDS, original ^ 1, original ^ 2**40, original + 8} - {original}:
        harmless = {at.STATE_AT: {0, 1}, at.CAPACITIES_AT + 8: set(range(129))}.get(offset, set())
        if value not in harmless:
            rewrite(segment.path, offset, word(value))
            error = refused(namespace, segment.path)
            assert isinstance(error, SegmentCorrupted)
            assert error.name == segment.name
            found.add(error.field)
    assert found <= fields
    rewrite(segment.path, offset, word(original))
    SharedSegment.attach(namespace, segment.session_id).close()


@pytest.mark.parametrize("version", [0, at.VERSION - 1, at.VERSION + 1, 2**32, 2**64 - 1])
def test_another_release(namespace: str, segment: SharedSegment, version: int) -> None:
    rewrite(segment.path, at.VERSION_AT, word(version))
    error = refused(namespace, segment.path)
    assert isinstance(error, LayoutUnsupported)
    assert (error.expected, error.actual) == (at.VERSION, version)
    assert "same release" in str(error)


def test_another_session(namespace: str, segment: SharedSegment, path: Path) -> None:
    os.link(segment.path, path)
    error = refused(namespace, path)
    assert isinstance(error, SegmentCorrupted)
    assert error.field == "session_id"
    assert error.actual == segment.session_id.bytes


@pytest.mark.parametrize("bit", range(8))
def test_any_byte_of_the_names_and_the_key(
    namespace: str, segment: SharedSegment, bit: int
) -> None:
    kinds: dict[int, type[Exception]] = {
        at.EPOCH_ID_AT: EpochSealed,
        at.SESSION_ID_AT: SegmentCorrupted,
        at.WITNESS_AT: WitnessMismatch,
    }
    for begin, kind in kinds.items():
        for offset in range(begin, begin + at.ID_SIZE):
            original = segment.memory.read(begin, at.ID_SIZE)
            changed = bytearray(original)
            changed[offset - begin] ^= 1 << bit
            rewrite(segment.path, begin, bytes(changed))
            with pytest.raises(kind):
                SharedSegment.attach_epoch(
                    namespace, segment.session_id, segment.epoch_id, segment.witness
                )
            rewrite(segment.path, begin, original)
    SharedSegment.attach(namespace, segment.session_id).close()


# --- names ----------------------------------------------------------------------------------------


def test_a_segment_that_is_not_there(namespace: str) -> None:
    with pytest.raises(FileNotFoundError):
        SharedSegment.attach(namespace, SessionId.new())


def test_a_name_is_taken_once(namespace: str, segment: SharedSegment) -> None:
    before = trace(segment.path)
    second = SharedSegment.allocate(
        namespace,
        OpsLifecycleConfig(),
        session_id=segment.session_id,
        epoch_id=RuntimeEpochId.new(),
    )
    with pytest.raises(SegmentExists) as taken:
        second.publish()
    assert taken.value.name == segment.name
    second.unlink()  # not its own
    assert trace(segment.path) == before
    second.publish(replace=True)
    found = SharedSegment.attach(namespace, segment.session_id)
    assert found.epoch_id == second.epoch_id
    found.close()
    segment.unlink()
    assert second.path.exists()
    second.unlink()
    assert not second.path.exists()
    second.close()
    assert not list(files.SHM_DIR.glob(f"{segment.name}*"))


def test_nobody_finds_what_has_no_name_yet(namespace: str) -> None:
    made = SharedSegment.allocate(
        namespace, None, session_id=SessionId.new(), epoch_id=RuntimeEpochId.new()
    )
    assert list(list_sessions(namespace)) == []
    assert not made.path.exists()
    made.publish()
    assert list(list_sessions(namespace)) == [made.session_id]
    assert stat.S_IMODE(made.path.stat().st_mode) == 0o600
    made.unlink()
    made.close()


def test_the_mode_is_kept_from_the_umask(namespace: str) -> None:
    before = os.umask(0o777)
    try:
        made = SharedSegment.allocate(
            namespace, None, session_id=SessionId.new(), epoch_id=RuntimeEpochId.new()
        )
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.fstat(made.fd).st_mode) == 0o600
    made.close()


def test_all_of_a_segment_is_reserved(segment: SharedSegment) -> None:
    assert segment.path.stat().st_blocks * 512 >= segment.layout.size


def test_no_room(namespace: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, offset: int, length: int) -> None:
        raise OSError(28, "No space left on device")

    held = os.listdir("/proc/self/fd")
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(SharedMemoryExhausted) as refused:
        SharedSegment.allocate(
            namespace,
            OpsLifecycleConfig(),
            session_id=SessionId.new(),
            epoch_id=RuntimeEpochId.new(),
        )
    assert refused.value.need > 2**18
    assert refused.value.room > 0
    assert "shm-size" in str(refused.value)
    assert os.listdir("/proc/self/fd") == held
    assert list(list_sessions(namespace)) == []


@pytest.mark.parametrize(
    "name", ["", " ", ".", "..", "a/b", "a.b", "n" * 65, "\u00e9", "a\n", "\x00"]
)
def test_a_namespace_is_a_plain_word(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for resolve in _ways_to_name(name, monkeypatch):
        with pytest.raises(NamespaceInvalid) as refused:
            resolve()
        assert (refused.value.namespace, refused.value.limit) == (name, 64)
        assert "SHMEPOCH_NAMESPACE" in str(refused.value)


def _ways_to_name(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], str]]:
    yield lambda: resolve_namespace(name)
    if "\x00" not in name:
        monkeypatch.setenv("SHMEPOCH_NAMESPACE", name)
        yield lambda: resolve_namespace(None)


def test_where_a_namespace_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHMEPOCH_NAMESPACE", "from-environment")
    assert resolve_namespace(None) == "from-environment"
    assert resolve_namespace("given_1") == "given_1"
    monkeypatch.delenv("SHMEPOCH_NAMESPACE")
    assert resolve_namespace(None) == "default"


# --- removal --------------------------------------------------------------------------------------


def test_what_is_in_use_is_not_removed(namespace: str, segment: SharedSegment) -> None:
    assert not remove_unused(namespace, segment.session_id)
    other = SharedSegment.attach(namespace, segment.session_id)
    segment.close()
    assert not remove_unused(namespace, segment.session_id)
    other.close()
    assert remove_unused(namespace, segment.session_id)
    assert not remove_unused(namespace, segment.session_id)
    assert not segment.path.exists()


def test_who_has_left_holds_nothing(namespace: str, segment: SharedSegment) -> None:
    """Not even while its cursors are still in use: they keep only the mapping."""
    other = SharedSegment.attach(namespace, segment.session_id)
    assert other.try_own()
    assert segment.owned
    cursors = EpochCursorState(other)
    other.close()
    try:
        assert not segment.owned
        assert segment.try_own()
    finally:
        assert cursors.snapshot().agent_applied_cursor == 0


def test_a_forked_child_does_not_keep_its_parent_s_locks(
    namespace: str, segment: SharedSegment
) -> None:
    read, write = os.pipe()
    go_on, end_of_child = os.pipe()
    parent = os.fork()
    if parent == 0:
        try:
            mine = SharedSegment.attach(namespace, segment.session_id)
            mine.try_own()
            mine.join(Role.WORKER)
            with held_writer(mine):  # it is killed in a transition
                if os.fork() == 0:
                    os.close(end_of_child)
                    os.write(write, b"child")
                    os.read(go_on, 1)  # until this test is over
                    os._exit(0)
                signal.pause()
        finally:
            os._exit(1)
    assert os.read(read, 5) == b"child"
    assert segment.owned
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    try:
        assert not segment.owned
        assert [found.alive for found in segment.participants.list(me=segment.participant)] == [
            True,
            False,
        ]
        assert not is_locked(segment.fd, at.WRITER_BYTE)
    finally:
        for fd in (go_on, end_of_child, read, write):
            os.close(fd)


def test_memory_outlives_its_name(namespace: str, segment: SharedSegment) -> None:
    segment.unlink()
    end(Registry(segment))
    assert Registry(segment).completion_feed().watermark() == 2
    with pytest.raises(FileNotFoundError):
        SharedSegment.attach(namespace, segment.session_id)
