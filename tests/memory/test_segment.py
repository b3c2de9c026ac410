"""The life of a segment: made, named, attached, replaced, sealed, left, removed, listed."""

from __future__ import annotations

import errno
import gc
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from shmepoch import _native as at
from shmepoch._native import Descriptor, try_lock
from shmepoch.config import OpsLifecycleConfig
from shmepoch.errors import (
    BindingsClosed,
    EpochGone,
    EpochSealed,
    NamespaceInvalid,
    SegmentExists,
    SegmentInRemoval,
    WitnessMismatch,
)
from shmepoch.ids import RuntimeEpochId, SessionId
from shmepoch.memory import files
from shmepoch.memory.files import SHM_DIR
from shmepoch.memory.namespaces import list_sessions, resolve_namespace, segment_path
from shmepoch.memory.participants import Role
from shmepoch.memory.removal import remove_leftovers, remove_unused
from shmepoch.memory.segment import Segment, SharedSegment
from tests.support import eventually, held_writer, in_a_child, is_free, mappings, names_in

Allocate = Callable[..., SharedSegment]

SMALL = OpsLifecycleConfig(max_completed=2, max_operations=2, feed_bytes=8 * 1024)


@pytest.fixture
def allocate(namespace: str) -> Iterator[Allocate]:
    """Makes segments; closes and removes them at the end."""
    made: list[SharedSegment] = []

    def allocate(session_id: SessionId | None = None) -> SharedSegment:
        made.append(
            SharedSegment.allocate(
                namespace,
                SMALL,
                session_id=session_id or SessionId.new(),
                epoch_id=RuntimeEpochId.new(),
            )
        )
        return made[-1]

    yield allocate
    for segment in made:
        segment.path.unlink(missing_ok=True)
        segment.close()


@pytest.fixture
def segment(allocate: Allocate) -> SharedSegment:
    segment = allocate()
    segment.publish()
    return segment


@pytest.fixture
def attach(namespace: str, segment: SharedSegment) -> Iterator[Callable[[], SharedSegment]]:
    """Attaches to `segment` again, like another process."""
    made: list[SharedSegment] = []

    def attach() -> SharedSegment:
        made.append(SharedSegment.attach(namespace, segment.session_id))
        return made[-1]

    yield attach
    for one in made:
        one.close()


@pytest.fixture
def attach_large(namespace: str) -> Iterator[Callable[[], SharedSegment]]:
    """Attaches to a segment whose copy takes a moment."""
    session_id, made = SessionId.new(), list[SharedSegment]()
    large = OpsLifecycleConfig(feed_bytes=2**26)
    first = SharedSegment.allocate(
        namespace, large, session_id=session_id, epoch_id=RuntimeEpochId.new()
    )
    first.publish()

    def attach() -> SharedSegment:
        made.append(SharedSegment.attach(namespace, session_id))
        return made[-1]

    yield attach
    first.unlink()
    for one in (first, *made):
        one.close()


# --- made and named ---------------------------------------------------------------------------


def test_no_process_finds_a_segment_before_it_is_published(
    namespace: str, allocate: Allocate
) -> None:
    segment = allocate()
    assert list(list_sessions(namespace)) == []
    with pytest.raises(FileNotFoundError):
        SharedSegment.attach(namespace, segment.session_id)
    assert not remove_unused(namespace, segment.session_id)
    segment.publish()
    assert names_in(namespace) == [segment.name]
    assert segment.path == segment_path(namespace, segment.session_id)
    with pytest.raises(SegmentExists):
        segment.publish()


def test_a_segment_that_was_never_published_leaves_nothing(
    namespace: str, allocate: Allocate
) -> None:
    segment = allocate()
    assert len(names_in(namespace)) == 1
    segment.close()
    assert names_in(namespace) == []
    with pytest.raises(BindingsClosed):
        segment.publish()


def test_a_child_leaves_the_segment_that_its_parent_makes(
    namespace: str, allocate: Allocate
) -> None:
    segment = allocate()

    def child() -> None:
        with pytest.raises(ValueError, match="closed"):
            segment.publish()
        segment.close()

    in_a_child(child)
    segment.publish()
    assert names_in(namespace) == [segment.name]


def test_a_second_segment_of_a_session_is_refused_the_name(
    segment: SharedSegment, allocate: Allocate, attach: Callable[[], SharedSegment]
) -> None:
    second = allocate(segment.session_id)
    with pytest.raises(SegmentExists) as taken:
        second.publish()
    assert taken.value.name == segment.name
    assert attach().epoch_id == segment.epoch_id


def test_replacing_is_one_step(
    namespace: str,
    segment: SharedSegment,
    allocate: Allocate,
    attach: Callable[[], SharedSegment],
) -> None:
    old = attach()
    segment.seal()
    second = allocate(segment.session_id)
    second.publish(replace=True)
    assert names_in(namespace) == [segment.name]
    assert attach().epoch_id == second.epoch_id
    # An attachment keeps its epoch, and does not remove another segment.
    assert old.epoch_id == segment.epoch_id
    old.unlink()
    segment.unlink()
    assert names_in(namespace) == [segment.name]
    second.unlink()
    assert names_in(namespace) == []


def test_the_name_is_never_missing_while_it_is_replaced(
    namespace: str, segment: SharedSegment, allocate: Allocate
) -> None:
    stop = threading.Event()
    failures: list[Exception] = []

    def attach_all_the_time() -> None:
        while not stop.is_set():
            try:
                SharedSegment.attach(namespace, segment.session_id).close()
            except Exception as error:
                failures.append(error)

    thread = threading.Thread(target=attach_all_the_time)
    thread.start()
    for _ in range(50):
        allocate(segment.session_id).publish(replace=True)
    stop.set()
    thread.join()
    assert failures == []


def test_leftovers_are_removed_and_nothing_else(
    namespace: str, segment: SharedSegment, allocate: Allocate
) -> None:
    made = allocate()
    path = SHM_DIR / f"{segment.name}.{'0' * 16}.new"
    others = [
        path.with_name(f"{segment.name}.new"),
        path.with_name(f"x{path.name}"),
        path.with_name(path.name.replace(namespace, f"{namespace}x")),
    ]
    directory = path.with_name(f"{segment.name}.{'1' * 16}.new")
    wide = path.with_name(f"{segment.name}.{'2' * 16}.new")
    try:
        for file in (path, wide, *others):
            file.touch(mode=0o600)
        wide.chmod(0o644)
        directory.mkdir()
        assert list(list_sessions(namespace)) == [segment.session_id]
        remove_leftovers(namespace)
        assert not path.exists()
        assert all(file.exists() for file in (directory, wide, *others))
        made.publish()
        segment.attach(namespace, segment.session_id).close()
    finally:
        directory.rmdir()
        for file in (path, wide, *others):
            file.unlink(missing_ok=True)


@pytest.mark.parametrize("held", [False, True])
def test_a_creator_whose_file_is_taken_for_a_leftover_makes_another(
    namespace: str, allocate: Allocate, held: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A removal may come, or be in progress, before the creator has locked the file."""
    with ExitStack() as stack:

        def try_lock_late(fd: Descriptor, byte: int, shared: bool) -> bool:
            monkeypatch.setattr(files, "try_lock", try_lock)
            if held:
                [name] = names_in(namespace)
                other = files.open_owned(SHM_DIR / name)
                stack.callback(other.close)
                assert try_lock(other, byte, False)
                stack.callback(os.unlink, SHM_DIR / name)
            else:
                remove_leftovers(namespace)
            return try_lock(fd, byte, shared)

        monkeypatch.setattr(files, "try_lock", try_lock_late)
        segment = allocate()
    remove_leftovers(namespace)
    segment.publish()
    assert names_in(namespace) == [segment.name]


def test_a_creator_on_a_kernel_without_locks_leaves_nothing(
    namespace: str, allocate: Allocate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gVisor refuses locks of open file descriptions."""

    def refuse(fd: Descriptor, byte: int, shared: bool) -> bool:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(files, "try_lock", refuse)
    with pytest.raises(OSError, match="Invalid argument"):
        allocate()
    assert names_in(namespace) == []


def test_private_memory_is_a_segment_too() -> None:
    session_id, epoch_id = SessionId.new(), RuntimeEpochId.new()
    segment = Segment.private(SMALL, session_id=session_id, epoch_id=epoch_id)
    assert (segment.session_id, segment.epoch_id) == (session_id, epoch_id)
    assert segment.layout.config == SMALL
    assert segment.participant == 0
    assert not segment.sealed
    segment.seal()
    assert segment.sealed
    assert isinstance(segment.closed_error(), EpochSealed)


def test_a_refused_attach_holds_nothing_while_its_error_is_kept(segment: SharedSegment) -> None:
    with pytest.raises(WitnessMismatch) as refused:
        SharedSegment.attach_epoch(
            segment.namespace, segment.session_id, segment.epoch_id, bytes(16)
        )
    segment.close()
    assert remove_unused(segment.namespace, segment.session_id)
    assert refused.tb is not None


# --- attached ---------------------------------------------------------------------------------


def test_all_attachments_are_of_one_memory(
    segment: SharedSegment, attach: Callable[[], SharedSegment]
) -> None:
    other = attach()
    assert (other.session_id, other.epoch_id) == (segment.session_id, segment.epoch_id)
    assert other.witness == segment.witness
    assert other.layout.config == SMALL
    segment.memory.store(at.CURSORS_AT, 2**64 - 1)
    assert other.memory.load(at.CURSORS_AT) == 2**64 - 1


def test_attached_step_by_step(
    segment: SharedSegment, attach: Callable[[], SharedSegment], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slow path, as after a temporary failure of the fast one."""

    class Declining:
        open = Descriptor.open

        @staticmethod
        def open_held(*args: object) -> None:
            return None

    monkeypatch.setattr(files, "Descriptor", Declining)
    other = attach()
    segment.memory.store(at.CURSORS_AT, 5)
    assert other.memory.load(at.CURSORS_AT) == 5
    assert len(other.memory) == len(segment.memory)
    assert not remove_unused(segment.namespace, segment.session_id)
    segment.close()
    assert not remove_unused(segment.namespace, segment.session_id)
    other.close()
    assert remove_unused(segment.namespace, segment.session_id)


def test_a_handle_names_one_epoch(segment: SharedSegment, allocate: Allocate) -> None:
    facts = segment.namespace, segment.session_id
    SharedSegment.attach_epoch(*facts, segment.epoch_id, segment.witness).close()
    with pytest.raises(WitnessMismatch):
        SharedSegment.attach_epoch(*facts, segment.epoch_id, bytes(16))
    with pytest.raises(EpochSealed) as sealed:
        SharedSegment.attach_epoch(*facts, other := RuntimeEpochId.new(), segment.witness)
    assert sealed.value.epoch_id == other
    segment.seal()
    with pytest.raises(EpochSealed):
        SharedSegment.attach_epoch(*facts, segment.epoch_id, segment.witness)
    segment.unlink()
    with pytest.raises(EpochGone) as gone:
        SharedSegment.attach_epoch(*facts, segment.epoch_id, segment.witness)
    assert (gone.value.session_id, gone.value.name) == (segment.session_id, segment.name)
    assert not remove_unused(*facts)


def test_every_segment_has_a_key_of_its_own(allocate: Allocate) -> None:
    keys = {allocate().witness for _ in range(10)}
    assert len(keys) == 10
    assert bytes(16) not in keys


def test_one_attachment_is_the_runtime(
    segment: SharedSegment, attach: Callable[[], SharedSegment]
) -> None:
    first, second = attach(), attach()
    assert not second.owned
    assert first.try_own()
    assert second.owned
    assert not second.try_own()
    first.close()
    assert not second.owned
    assert second.try_own()


# --- sealed -----------------------------------------------------------------------------------


def test_sealing_is_seen_everywhere_and_for_good(
    segment: SharedSegment, attach: Callable[[], SharedSegment]
) -> None:
    other = attach()
    other.seal()
    assert segment.sealed
    segment.seal()
    assert other.sealed
    assert attach().sealed  # to read it, or to replace it


def test_sealing_waits_for_a_transition(
    segment: SharedSegment, attach: Callable[[], SharedSegment]
) -> None:
    other, inside = attach(), threading.Event()

    def seal() -> None:
        inside.set()
        other.seal()

    sealer = threading.Thread(target=seal)
    with held_writer(segment):
        sealer.start()
        inside.wait()
        assert not segment.sealed
    sealer.join()
    assert segment.sealed


# --- left -------------------------------------------------------------------------------------


def test_who_has_left_can_look_and_not_write(segment: SharedSegment) -> None:
    segment.join(Role.WORKER)
    segment.memory.store(at.CURSORS_AT, 5)
    segment.close()
    segment.close()
    assert segment.memory.load(at.CURSORS_AT) == 5
    assert segment.participant == 0
    with pytest.raises(BindingsClosed) as closed:
        segment.seal()
    assert closed.value.epoch_id == segment.epoch_id


def test_who_has_left_a_sealed_epoch_is_told_that_it_ended(segment: SharedSegment) -> None:
    segment.seal()
    segment.close()
    with pytest.raises(EpochSealed):
        segment.seal()


def test_leaving_gives_up_every_lock_and_descriptor(
    namespace: str, segment: SharedSegment, attach: Callable[[], SharedSegment]
) -> None:
    other = attach()
    other.join(Role.WORKER)
    assert other.try_own()
    fd = other.fd
    other.close()
    with pytest.raises(OSError):
        os.fstat(fd)
    assert not segment.owned
    assert segment.participants.list() == []
    segment.close()
    assert remove_unused(namespace, segment.session_id)


def test_what_is_forgotten_is_left(
    namespace: str, segment: SharedSegment, attach: Callable[[], SharedSegment]
) -> None:
    """The garbage collector closes an attachment that was not closed."""
    other = SharedSegment.attach(namespace, segment.session_id)
    other.join(Role.WORKER)
    del other
    gc.collect()
    assert [one.alive for one in segment.participants.list()] == [False]


def test_closing_frees_the_threads_that_wait_for_another_process(
    segment: SharedSegment, attach: Callable[[], SharedSegment]
) -> None:
    """The other process is stopped in a transition. A thread of a closed segment gets the lock
    neither then nor later."""
    other = attach()
    other.join(Role.WORKER)
    with ThreadPoolExecutor(3) as pool, held_writer(segment):
        waiting = [pool.submit(other.seal) for _ in range(3)]
        assert not is_free(segment)
        other.close()
        assert not is_free(segment), "it is not theirs to give up"
        for each in waiting:
            with pytest.raises(BindingsClosed):
                each.result(60)
    assert not segment.sealed
    assert segment.participants.list() == []
    assert is_free(segment)


def test_closing_lets_no_thread_change_anything_any_more(
    segment: SharedSegment, attach: Callable[[], SharedSegment]
) -> None:
    """If the descriptor were closed under a writer, a second writer could get the lock."""
    other = attach()
    other.join(Role.WORKER)

    def collect(number: int) -> None:
        while True:
            other.epoch.collect(0, 0)
            begun.add(number)

    begun: set[int] = set()
    fd = other.fd
    with ThreadPoolExecutor(3) as pool:
        writers = [pool.submit(collect, number) for number in range(3)]
        eventually(lambda: len(begun) == 3)
        other.close()
        with pytest.raises(OSError):
            os.fstat(fd)
        assert is_free(segment)
        for each in writers:
            with pytest.raises(BindingsClosed):
                each.result(60)
    assert segment.participants.list() == []


def test_closing_while_a_thread_is_inside_waits_for_it(
    attach_large: Callable[[], SharedSegment],
) -> None:
    segment, other = attach_large(), attach_large()
    with ThreadPoolExecutor(1) as pool:
        with held_writer(segment):
            copying = pool.submit(other.epoch.copy)
        eventually(lambda: copying.done() or not is_free(segment))
        other.close()
        assert is_free(segment)
        segment.memory.store(segment.layout.size - at.WORD, 1)
        copied = copying.result(60)
    assert copied.load(segment.layout.size - at.WORD) == 0, "it was still inside"


def test_closing_in_a_signal_handler_in_the_middle_of_a_wait(
    segment: SharedSegment, attach: Callable[[], SharedSegment]
) -> None:
    """It does not wait for the interrupted call, which is refused."""
    other = attach()
    other.join(Role.WORKER)
    before = signal.signal(signal.SIGALRM, lambda *_: other.close())
    try:
        with held_writer(segment):
            signal.setitimer(signal.ITIMER_REAL, 0.01)
            with pytest.raises(BindingsClosed):
                other.seal()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert not other.attached
    assert not segment.sealed
    assert segment.participants.list() == []


def test_closing_again_and_by_several_threads(
    segment: SharedSegment, attach: Callable[[], SharedSegment]
) -> None:
    for _ in range(20):
        other = attach()
        other.join(Role.WORKER)
        with ThreadPoolExecutor(3) as pool:
            for closed in [pool.submit(other.close) for _ in range(3)]:
                closed.result(60)
        assert not other.attached
        assert segment.participants.list() == []


# --- removed ----------------------------------------------------------------------------------


def test_what_anybody_has_attached_is_not_removed(
    namespace: str, segment: SharedSegment, attach: Callable[[], SharedSegment]
) -> None:
    other = attach()
    assert not remove_unused(namespace, segment.session_id)
    segment.close()
    assert not remove_unused(namespace, segment.session_id)
    other.close()
    assert remove_unused(namespace, segment.session_id)
    assert not remove_unused(namespace, segment.session_id)
    assert names_in(namespace) == []


def test_attaching_what_a_stopped_process_removes_is_refused(
    namespace: str, segment: SharedSegment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_REMOVAL_S", 0.05)
    segment.close()
    remover = files.open_owned(segment.path)
    try:
        assert try_lock(remover, at.PRESENCE_BYTE, False)
        with pytest.raises(SegmentInRemoval, match=f"{segment.name}.*continue that process") as e:
            SharedSegment.attach(namespace, segment.session_id)
        assert (e.value.name, e.value.waited_s) == (segment.name, 0.05)
        assert str(pickle.loads(pickle.dumps(e.value))) == str(e.value)
    finally:
        remover.close()  # like its death
    SharedSegment.attach(namespace, segment.session_id).close()
    assert remove_unused(namespace, segment.session_id)


def test_removing_what_is_not_there_does_nothing(segment: SharedSegment) -> None:
    segment.unlink()
    segment.unlink()
    assert not segment.path.exists()


# --- listed -----------------------------------------------------------------------------------


def test_the_sessions_of_a_namespace_are_listed(namespace: str, allocate: Allocate) -> None:
    assert list(list_sessions(namespace)) == []
    made = [allocate() for _ in range(3)]
    for segment in made:
        segment.publish()
    others = [f"{namespace}.doorbells", f"{namespace}-x.{'0' * 32}", f"{namespace}.{'0' * 31}"]
    paths = [SHM_DIR / f"shmepoch.{name}" for name in others]
    for path in paths:
        path.touch()
    assert set(list_sessions(namespace)) == {segment.session_id for segment in made}
    for path in paths:
        path.unlink()


@pytest.mark.parametrize("name", ["a", "A-b_9", "x" * 64])
def test_a_namespace_is_a_short_plain_word(name: str) -> None:
    assert resolve_namespace(name) == name


@pytest.mark.parametrize("name", ["", "x" * 65, "a.b", "a/b", "..", "a b", "é", "a\n", "a\0"])
def test_what_is_no_namespace_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NamespaceInvalid) as invalid:
        resolve_namespace(name)
    assert (invalid.value.namespace, invalid.value.limit) == (name, 64)
    assert repr(name) in str(invalid.value)


def test_the_longest_namespace_has_segments(
    monkeypatch: pytest.MonkeyPatch, namespace: str
) -> None:
    longest = namespace.ljust(64, "x")
    segment = SharedSegment.allocate(
        longest, SMALL, session_id=SessionId.new(), epoch_id=RuntimeEpochId.new()
    )
    segment.publish()
    assert list(list_sessions(longest)) == [segment.session_id]
    assert list(list_sessions(namespace)) == []
    segment.unlink()
    segment.close()


def test_an_attachment_that_is_let_go_of_leaves_at_once(segment: SharedSegment) -> None:
    gc.collect()
    gc.disable()
    try:
        mapped = mappings(segment)
        other = SharedSegment.attach(segment.namespace, segment.session_id)
        assert other.try_own()
        assert mappings(segment) == mapped + 1
        del other
        assert not segment.owned
        assert mappings(segment) == mapped
    finally:
        gc.enable()
