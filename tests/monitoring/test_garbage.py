"""Files in shared memory: the rules by which they may go, and that nothing else goes (GC-2)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shmepoch import (
    OperationId,
    OpsLifecycleConfig,
    Role,
    RuntimeEpochId,
    RuntimeSessionAdapter,
    SessionId,
    SessionRuntimeBindings,
    SqliteRuntimeStore,
    observe_session,
)
from shmepoch import _native as at
from shmepoch._native import try_lock
from shmepoch.memory.doorbells import doorbells_path
from shmepoch.memory.files import SHM_DIR, NewFile
from shmepoch.memory.segment import SharedSegment
from shmepoch.monitoring import garbage
from shmepoch.monitoring.garbage import Found, Wanted, What
from tests.processes.children import Channel, start
from tests.runtime.completions import TOOL, end
from tests.support import held_writer, names_in, segments_in, spec

Make = Callable[..., SharedSegment]
_HOUR_S = 3600
_ALL = Wanted(older_than_ms=0, damaged=True)


@pytest.fixture
def make(namespace: str) -> Iterator[Make]:
    """Makes an epoch that this process has attached as nobody in particular."""
    made: list[SharedSegment] = []

    def make(config: OpsLifecycleConfig | None = None) -> SharedSegment:
        segment = SharedSegment.allocate(
            namespace,
            config or OpsLifecycleConfig(),
            session_id=SessionId.new(),
            epoch_id=RuntimeEpochId.new(),
        )
        segment.publish()
        made.append(segment)
        return segment

    yield make
    for segment in made:
        segment.close()
    for path in segments_in(namespace):
        path.unlink()


def only(namespace: str, wanted: Wanted | None = None) -> Found:
    (found,) = garbage.find(namespace, wanted or Wanted())
    return found


def age(path: Path, seconds: int = 2 * _HOUR_S) -> None:
    at_s = path.stat().st_mtime - seconds
    os.utime(path, (at_s, at_s))


def collect(namespace: str, wanted: Wanted | None = None) -> list[Found]:
    """Remove what is to be removed; what became of it."""
    wanted = wanted or Wanted()
    found = [one for one in garbage.find(namespace, wanted) if one.remove]
    return [garbage.remove(one, wanted) for one in found]


def test_what_its_runtime_has_ended_goes(namespace: str, make: Make) -> None:
    segment = make()
    segment.seal()
    assert only(namespace).what is What.IN_USE
    segment.close()
    found = only(namespace)
    assert (found.what, found.remove, found.session_id) == (What.SEALED, True, segment.session_id)
    assert found.bytes == segment.layout.size
    assert [one.removed for one in collect(namespace)] == [True]
    assert names_in(namespace) == []


def test_what_a_runtime_may_go_on_with_stays(namespace: str, make: Make) -> None:
    make().close()
    found = only(namespace)
    assert (found.what, found.remove) == (What.ABANDONED, False)
    assert found.hint == "--older-than"
    assert collect(namespace, Wanted(damaged=True)) == []


@pytest.mark.parametrize(("hours", "goes"), [(0, True), (1, True), (3, False)])
def test_an_age_is_that_of_the_last_sign_of_life(
    namespace: str, make: Make, hours: int, goes: bool
) -> None:
    segment = make()
    segment.close()
    age(segment.path)
    wanted = Wanted(older_than_ms=hours * _HOUR_S * 1000)
    found = only(namespace, wanted)
    assert (found.what, found.remove) == (What.ABANDONED, goes)
    assert found.why == "its last sign of life was 2h ago"
    assert found.alive_at_ms == segment_time_ms(segment.path)


def segment_time_ms(path: Path) -> int:
    return path.stat().st_mtime_ns // 10**6


def test_what_a_runtime_took_over_since_stays(namespace: str, make: Make) -> None:
    """It was old when it was looked at, and has been used and left since."""
    segment = make()
    segment.close()
    age(segment.path)
    wanted = Wanted(older_than_ms=_HOUR_S * 1000)
    (found,) = garbage.find(namespace, wanted)
    worker = SharedSegment.attach(namespace, segment.session_id)
    worker.join(Role.WORKER)
    during = garbage.remove(found, wanted)
    worker.close()
    after = garbage.remove(found, wanted)
    for one in (during, after):
        assert (one.remove, one.removed, one.problem) == (False, False, None)
    assert segment.path.exists()


def test_what_is_gone_already_is_no_failure(namespace: str, make: Make) -> None:
    segment = make()
    segment.seal()
    segment.close()
    (found,) = garbage.find(namespace, Wanted())
    segment.path.unlink()
    assert garbage.remove(found, Wanted()).problem is None


def test_a_clock_that_was_set_back_removes_nothing(namespace: str, make: Make) -> None:
    segment = make()
    segment.close()
    age(segment.path, -_HOUR_S)
    assert not only(namespace, _ALL).remove


@pytest.mark.parametrize("sealed", [False, True])
def test_whoever_has_it_attached_keeps_it(namespace: str, make: Make, sealed: bool) -> None:
    segment = make()
    if sealed:
        segment.seal()
    segment.close()
    observer = observe_session(segment.session_id, namespace=namespace)
    assert only(namespace, _ALL).what is What.IN_USE
    observer.close()
    assert only(namespace, _ALL).remove


def be_killed(_: None, test: Channel, namespace: str, session_id: SessionId) -> None:
    with RuntimeSessionAdapter.ephemeral(namespace=namespace) as adapter:
        bindings = adapter.prepare_bindings(session_id)
        id = OperationId.new()
        bindings.ops_lifecycle.register_operation(spec(id=id))
        test.say("runs")
        test.hear()


@pytest.mark.parametrize("stopped", [False, True])
def test_a_runtime_keeps_its_epoch_until_it_is_killed(namespace: str, stopped: bool) -> None:
    session_id = SessionId.new()
    with start(be_killed, None, namespace, session_id) as child:
        child.hear()
        (path,) = segments_in(namespace)
        age(path)
        if stopped:
            segment = SharedSegment.attach(namespace, session_id)
            with held_writer(segment):  # as a runtime does that was stopped in a transition
                segment.close()
                assert only(namespace, _ALL).what is What.IN_USE
        else:
            assert only(namespace, _ALL).what is What.IN_USE
        child.kill()
    # Its file is old, and its runtime joined just now.
    found = only(namespace, Wanted(older_than_ms=_HOUR_S * 1000))
    assert (found.what, found.remove) == (What.ABANDONED, False)
    assert "unfinished operations: 1" in found.why
    assert [one.removed for one in collect(namespace, _ALL)] == [True]


@pytest.mark.parametrize("waits", [False, True])
def test_what_a_store_is_known_to_lack_stays(namespace: str, make: Make, waits: bool) -> None:
    """The next runtime with that store takes it there."""
    segment = make(OpsLifecycleConfig(store_wait_ms=1000 if waits else 0))
    bindings = SessionRuntimeBindings.of_segment(segment)
    if not waits:
        end(bindings, TOOL)
        bindings.ops_lifecycle.completion_feed().mark_durable(1)
    end(bindings, TOOL, TOOL)
    segment.seal()
    bindings.close()
    found = only(namespace)
    assert (found.what, found.remove) == (What.SEALED, False)
    assert "completions that its store lacks: 2" in found.why
    assert only(namespace, Wanted(older_than_ms=0)).remove


def test_what_a_store_has_goes(namespace: str, tmp_path: Path) -> None:
    with (
        SqliteRuntimeStore(tmp_path / "store") as store,
        RuntimeSessionAdapter.persistent(store, namespace=namespace) as adapter,
    ):
        bindings = adapter.prepare_bindings(SessionId.new())
        (seq,) = end(bindings, TOOL)
        bindings.ops_lifecycle.completion_feed().wait_durable(seq, 60)
        bindings.shared_segment().seal()
    # The page of doorbells of this process may be there for a moment.
    (found,) = (one for one in garbage.find(namespace, Wanted()) if one.session_id is not None)
    assert (found.what, found.remove) == (What.SEALED, True)
    collect(namespace)


def damage(path: Path, offset: int, value: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(value.to_bytes(8, "little"))


def short(path: Path) -> None:
    os.truncate(path, 100)


def empty(path: Path) -> None:
    os.truncate(path, 0)


@pytest.mark.parametrize(
    ("harm", "why"),
    [
        (short, "file size is 100"),
        (empty, "file size is 0"),
        (lambda path: damage(path, at.MAGIC_AT, 1), "magic is 1"),
        (lambda path: damage(path, at.VERSION_AT, 2), "layout version 2, this release reads "),
        (lambda path: damage(path, at.STATE_AT, 7), "state is 7"),
        (lambda path: damage(path, at.PARTICIPANTS_AT, 0x1FF), "participants[0].role is 255"),
    ],
)
def test_what_cannot_be_read_goes_only_if_that_is_wanted(
    namespace: str, make: Make, harm: Callable[[Path], None], why: str
) -> None:
    segment = make()
    attached = SharedSegment.attach(namespace, segment.session_id)
    segment.close()
    harm(segment.path)
    assert only(namespace, _ALL).what is What.IN_USE
    attached._descriptor.close()
    found = only(namespace, Wanted(older_than_ms=0))
    assert (found.what, found.remove) == (What.DAMAGED, False)
    assert why in found.why
    assert found.hint == "--damaged"
    assert [one.removed for one in collect(namespace, Wanted(damaged=True))] == [True]


def test_what_is_being_made_stays_until_its_creator_is_gone(namespace: str, make: Make) -> None:
    segment = SharedSegment.allocate(
        namespace, None, session_id=SessionId.new(), epoch_id=RuntimeEpochId.new()
    )
    assert only(namespace, _ALL).what is What.IN_USE
    segment._descriptor.close()  # as a killed creator does
    found = only(namespace)
    assert (found.what, found.remove, found.session_id) == (What.LEFTOVER, True, None)
    assert [one.removed for one in collect(namespace)] == [True]
    segment._new = None
    segment.close()


def test_doorbells_stay_while_a_process_listens(namespace: str, make: Make) -> None:
    page = NewFile(doorbells_path(namespace), at.PAGE)
    page.publish()
    assert try_lock(page.fd, 0, True)
    assert only(namespace).what is What.IN_USE
    page.fd.close()
    found = only(namespace)
    assert (found.what, found.remove) == (What.DOORBELLS, True)
    assert [one.removed for one in collect(namespace)] == [True]


@pytest.mark.parametrize("place", ["segment", "doorbells", "leftover"])
@pytest.mark.parametrize("kind", ["open to others", "link", "directory", "pipe"])
def test_what_is_no_file_of_this_users_alone_stays(namespace: str, place: str, kind: str) -> None:
    path = {
        "segment": SHM_DIR / f"shmepoch.{namespace}.{'0' * 32}",
        "doorbells": doorbells_path(namespace),
        "leftover": SHM_DIR / f"shmepoch.{namespace}.{'0' * 32}.{'1' * 16}.new",
    }[place]
    try:
        if kind == "directory":
            path.mkdir()
        elif kind == "link":
            path.symlink_to("/etc/passwd")
        elif kind == "pipe":
            os.mkfifo(path, 0o600)
        else:
            path.touch(0o644)
            path.chmod(0o644)
        found = only(namespace, _ALL)
        assert (found.what, found.remove) == (What.UNSAFE, False)
        assert garbage.remove(found, _ALL).removed is False
    finally:
        if kind == "directory":
            path.rmdir()
        else:
            path.unlink()


def test_a_name_that_is_no_ones_stays(namespace: str) -> None:
    path = SHM_DIR / f"shmepoch.{namespace}.notes\n"
    path.touch(0o600)
    found = only(namespace, _ALL)
    path.unlink()
    assert (found.what, found.remove, found.name) == (What.UNKNOWN, False, path.name)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be several users")
def test_what_is_another_users_stays(namespace: str, make: Make) -> None:
    segment = make()
    segment.seal()
    segment.close()
    os.chown(segment.path, 65001, 65001)
    found = only(namespace, _ALL)
    assert (found.what, found.remove) == (What.OTHERS, False)
    assert garbage.remove(found, _ALL).problem is not None
    assert segment.path.exists()


def test_other_namespaces_are_looked_at_on_demand(namespace: str, make: Make) -> None:
    make().close()
    assert list(garbage.find(f"{namespace}x", _ALL)) == []
    assert namespace in [found.namespace for found in garbage.find(None, Wanted())]
