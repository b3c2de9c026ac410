"""What is told of one epoch: who holds what, what runs, what has ended, and how full it is."""

from __future__ import annotations

import os
import pwd
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import pytest

from shmepoch import (
    AgentFactory,
    OperationId,
    RuntimeSessionAdapter,
    SessionId,
    SessionOwned,
    SessionRuntimeBindings,
    SqliteRuntimeStore,
)
from shmepoch import _native as at
from shmepoch._native import Epoch, is_locked
from shmepoch.epoch.operations import OperationProgressUpdate, OperationStatus
from shmepoch.memory.participants import Role
from shmepoch.memory.segment import SharedSegment
from shmepoch.monitoring import details
from shmepoch.monitoring.details import EpochDetails, Lock, Process, Use
from shmepoch.monitoring.epochs import EpochState
from tests.epoch.dying import attached
from tests.epoch.operations import end, reach
from tests.epoch.stepping import Stepped, steps
from tests.monitoring.looks import CONFIG, content, details_of, published, registry_of
from tests.processes.children import Channel, start
from tests.support import damage_record, eventually, held_writer, result, spec

HERE = Process(os.getpid(), False)


def test_the_file(namespace: str) -> None:
    with published(namespace) as segment:
        found = details_of(segment)
        assert found.path == str(segment.path)
        assert (found.owner_uid, found.mode) == (os.geteuid(), "0600")
        assert EpochDetails.from_json(found.to_json()) == found


def test_a_user_without_a_name(namespace: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(uid)

    with published(namespace) as segment:
        monkeypatch.setattr(pwd, "getpwuid", unknown)
        found = details_of(segment)
        assert (found.owner_uid, found.owner) == (os.geteuid(), None)


def serve(_: SessionRuntimeBindings | None, test: Channel, namespace: str) -> None:
    """A runtime whose process hosts the agent."""
    adapter = RuntimeSessionAdapter.ephemeral(namespace=namespace)
    bindings = adapter.prepare_bindings(SessionId.new())
    registry, id = bindings.ops_lifecycle, OperationId.new()
    registry.register_operation(spec("index", id=id))
    registry.provisioning_succeeded(id)
    registry.report_progress(id, OperationProgressUpdate("half", 50.0))
    agent = AgentFactory().build(bindings.session_id, SessionOwned(bindings))
    test.say(bindings.session_id)
    test.hear()
    agent.close()


def test_who_holds_what(namespace: str) -> None:
    with start(serve, None, namespace) as runtime:
        segment = SharedSegment.attach(namespace, runtime.hear())
        found, there = details_of(segment), Process(runtime.pid, False)
        assert found.state is EpochState.OPEN
        assert found.processes == tuple(sorted((HERE, there), key=lambda one: one.pid))
        assert found.locks == {Lock.RUNTIME: (there,), Lock.AGENT: (there,)}
        [one] = found.attached
        assert (one.role, one.pid, one.alive, one.slot) == (Role.RUNTIME, runtime.pid, True, 0)
        assert (one.process, one.holds) == (there, (Lock.RUNTIME, Lock.AGENT))
        [operation] = found.unfinished
        assert (operation.display_name, operation.source_label) == ("index", "test")
        assert operation.status is OperationStatus.RUNNING
        assert operation.runner == one
        assert (operation.progress_count, operation.progress) == (
            1,
            OperationProgressUpdate("half", 50.0),
        )

        runtime.signal(signal.SIGSTOP)
        eventually(runtime.stopped)
        [one] = details_of(segment).attached
        assert one.process == Process(runtime.pid, True)

        runtime.kill()
        found = details_of(segment)
        assert (found.state, found.locks, found.processes) == (EpochState.ABANDONED, {}, (HERE,))
        [dead] = found.attached
        assert (dead.alive, dead.pid, dead.process, dead.holds) == (False, runtime.pid, None, ())
        assert [operation.runner for operation in found.unfinished] == [dead]
        segment.unlink()
        segment.close()


def test_a_runner_that_has_left(namespace: str) -> None:
    with published(namespace) as segment:
        segment.join(Role.WORKER)
        registry_of(segment).register_operation(spec())
        segment.participants.leave(segment.participant)
        [operation] = details_of(segment).unfinished
        assert operation.runner is None
        assert operation.status is OperationStatus.PROVISIONING


def test_a_clock_that_was_set_back(namespace: str) -> None:
    with published(namespace) as segment:
        registry_of(segment).register_operation(spec())
        segment.memory.store(segment.layout.slot(0) + at.SLOT_CREATED_MS, 2**60)
        [operation] = details_of(segment).unfinished
        assert (operation.created_at_ms, operation.elapsed_ms) == (2**60, 0)


def test_a_writer_lock_that_another_attachment_holds(namespace: str) -> None:
    with published(namespace) as segment:
        assert details_of(segment).locks == {}
        with held_writer(segment):
            assert details_of(segment).locks == {Lock.WRITER: (HERE,)}


def test_a_holder_that_is_not_visible(namespace: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with published(namespace) as segment, held_writer(segment):
        segment.join(Role.WORKER)
        monkeypatch.setattr(details, "holders", lambda _: [])
        found = details_of(segment)
        assert (found.locks, found.processes) == ({Lock.WRITER: ()}, ())
        [one] = found.attached
        assert (one.alive, one.process, one.holds) == (True, None, ())


@contextmanager
def stopped_in_a_transition(segment: SharedSegment) -> Iterator[int]:
    """The pid of a process that stands still in the middle of one; it is killed in the end."""

    def complete(mine: SharedSegment) -> None:
        registry = registry_of(mine)
        id = OperationId.new()
        registry.register_operation(spec(id=id))
        registry.provisioning_succeeded(id)
        mine.epoch = cast(Epoch, Stepped(mine.epoch))
        registry_of(mine).complete_operation(id, result(id))

    pid = attached(segment.namespace, segment, complete)
    for _ in steps(pid):
        if segment.memory.load(at.INTENT_AT) and is_locked(segment.fd, at.WRITER_BYTE):
            yield pid
            break


def test_a_writer_that_is_stopped_and_killed_in_a_transition(namespace: str) -> None:
    with published(namespace) as segment:
        with stopped_in_a_transition(segment) as pid:
            before = content(segment)
            found = details_of(segment)
            assert content(segment) == before
            assert found.locks == {Lock.WRITER: (Process(pid, True),)}
            assert not found.broken_off, "its writer is at work still"
            assert [one.status for one in found.unfinished] == [OperationStatus.RUNNING]
            assert [(one.process, one.holds) for one in found.attached] == [
                (Process(pid, True), (Lock.WRITER,))
            ]
        found = details_of(segment)
        assert (found.locks, found.broken_off) == ({}, True)
        assert (found.state, found.problem) == (EpochState.ABANDONED, None)
        end(registry_of(segment))
        assert not details_of(segment).broken_off, "the next writer has repaired it"


def test_what_has_ended(namespace: str) -> None:
    with published(namespace) as segment:
        registry = registry_of(segment)
        for status in (OperationStatus.FAILED, OperationStatus.COMPLETED, OperationStatus.ABORTED):
            reach(registry, status)
        found = details_of(segment, entries=2)
        assert [entry.seq for entry in found.entries] == [2, 3]
        assert found.retained == {OperationStatus.COMPLETED: 1, OperationStatus.ABORTED: 1}
        assert details_of(segment, entries=0).entries == ()
        assert [entry.seq for entry in details_of(segment).entries] == [1, 2, 3]


def test_how_full_it_is(namespace: str) -> None:
    with published(namespace) as segment:
        registry, layout = registry_of(segment), segment.layout
        empty = details_of(segment).use
        assert empty == {
            "participants": Use(0, CONFIG.max_participants),
            "operations": Use(0, CONFIG.max_operations),
            "feed_bytes": Use(0, CONFIG.feed_bytes),
            "feed_entries": Use(0, layout.entries),
            "retained": Use(0, CONFIG.max_completed),
        }
        segment.join(Role.WORKER)
        registry.register_operation(spec())
        end(registry, "r" * 800)
        one = details_of(segment).use
        assert (one["participants"].used, one["operations"].used) == (1, 1)
        assert (one["feed_entries"].used, one["retained"].used) == (1, 1)
        assert 800 < one["feed_bytes"].used < 1200
        for _ in range(40):
            end(registry, "r" * 800)
        full = details_of(segment)
        assert full.dropped_through > 0
        assert full.use["feed_entries"].used == full.watermark - full.dropped_through
        assert full.use["retained"].used == 2
        record = one["feed_bytes"].used
        assert CONFIG.feed_bytes - record < full.use["feed_bytes"].used <= CONFIG.feed_bytes
        assert full.use["feed_bytes"].used % record == 0


def test_what_a_recovery_skipped(namespace: str, tmp_path: os.PathLike[str]) -> None:
    path, session_id = os.path.join(tmp_path, "store"), SessionId.new()
    with (
        SqliteRuntimeStore(path) as store,
        RuntimeSessionAdapter.persistent(store, namespace=namespace) as adapter,
    ):
        bindings = adapter.prepare_bindings(session_id)
        for _ in range(3):
            end(registry_of(bindings.shared_segment()))
        bindings.shared_segment().path.unlink()
    with (
        SqliteRuntimeStore(path) as store,
        RuntimeSessionAdapter.persistent(store, namespace=namespace) as adapter,
    ):
        segment = adapter.prepare_bindings(session_id).shared_segment()
        end(registry_of(segment))
        found = details_of(segment, entries=3)
        adapter.unregister_session(session_id)
    assert found.skipped_after == 3 < found.skipped_through < found.watermark
    assert [entry.seq for entry in found.entries] == [2, 3, found.watermark]
    assert found.retained == {OperationStatus.CANCELLED: 4}
    assert set(found.lags.values()) == {4}  # what was skipped is no completion


def test_the_rest_of_a_damaged_epoch_is_told(namespace: str) -> None:
    with published(namespace) as segment:
        segment.join(Role.WORKER)
        registry = registry_of(segment)
        registry.register_operations([spec("one"), spec("two"), spec("three")])
        reach(registry, OperationStatus.FAILED)
        segment.memory.store(segment.layout.slot(1) + at.SLOT_SPEC, 2**64 - 1)
        found = details_of(segment)
        assert found.state is EpochState.DAMAGED
        assert "slot[1]" in str(found.problem)
        assert {one.display_name for one in found.unfinished} < {"one", "two", "three"}
        assert len(found.unfinished) == 2
        assert [one.pid for one in found.attached] == [os.getpid()]
        assert [entry.seq for entry in found.entries] == [1]
        assert found.epoch_id == segment.epoch_id


def test_a_damaged_entry(namespace: str) -> None:
    with published(namespace) as segment:
        registry = registry_of(segment)
        for _ in range(2):
            end(registry)
        damage_record(segment, 1)
        found = details_of(segment)
        assert (found.state, found.entries) == (EpochState.DAMAGED, ())
        assert "feed[1]" in str(found.problem)
        assert found.epoch_id == segment.epoch_id


def test_who_has_an_epoch_attached_that_cannot_be_read(namespace: str) -> None:
    with published(namespace) as segment:
        segment.join(Role.WORKER)
        segment.memory.store(at.MAGIC_AT, 0)
        found = details_of(segment)
        assert (found.state, found.processes) == (EpochState.DAMAGED, (HERE,))
        assert (found.attached, found.use, found.epoch_id) == ((), {}, None)
