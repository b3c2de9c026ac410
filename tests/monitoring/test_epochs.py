"""An epoch is summed up whatever has become of it and of its processes, and left as it is."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from functools import partial
from typing import cast

import pytest

from shmepoch import (
    AgentFactory,
    OperationId,
    RuntimeSessionAdapter,
    SessionId,
    SessionOwned,
    SessionRuntimeBindings,
)
from shmepoch import _native as at
from shmepoch._native import Epoch, is_locked
from shmepoch.epoch.cursors import EpochCursorSnapshot
from shmepoch.epoch.operations import OperationStatus
from shmepoch.errors import SegmentForeign
from shmepoch.memory.clock import wall_ms
from shmepoch.memory.participants import Role
from shmepoch.memory.removal import remove_unused
from shmepoch.memory.segment import ObservedSegment, SharedSegment
from shmepoch.monitoring import epochs
from shmepoch.monitoring.epochs import EpochState, EpochSummary, of_segment, summaries
from tests.epoch.damage import every_word, fill, hostile
from tests.epoch.operations import reach
from tests.epoch.stepping import Stepped, steps
from tests.monitoring.looks import (
    LOOKS,
    Look,
    content,
    published,
    registry_of,
    summary_of,
)
from tests.processes.children import Channel, start
from tests.runtime.completions import TOOL, end
from tests.support import spec

each_look = pytest.mark.parametrize("look", LOOKS)


def test_an_epoch_at_work(bindings: SessionRuntimeBindings, namespace: str) -> None:
    end(bindings, TOOL, TOOL, TOOL)
    registry, cursors = bindings.ops_lifecycle, bindings.cursor_state
    registry.register_operation(spec())
    registry.register_operation(spec(id=(id := OperationId.new())))
    registry.provisioning_succeeded(id)
    cursors.agent_applied_cursor.advance(2)
    cursors.runtime_observed_seq.advance(3)
    bindings.shared_segment().cell(at.DURABLE_AT).advance(1)
    with AgentFactory().build(bindings.session_id, SessionOwned(bindings)):
        [summary] = summaries(namespace)
    registry.terminate_owner("done")
    assert (summary.namespace, summary.session_id) == (namespace, bindings.session_id)
    assert summary.epoch_id == bindings.epoch_id
    assert (summary.state, summary.problem) == (EpochState.OPEN, None)
    assert summary.created_at_ms <= summary.alive_at_ms <= wall_ms()
    assert summary.bytes == os.fstat(bindings.shared_segment().fd).st_size
    assert summary.participants == {Role.RUNTIME: 1}
    assert summary.dead == 0
    assert summary.operations == {OperationStatus.PROVISIONING: 1, OperationStatus.RUNNING: 1}
    assert (summary.ended, summary.watermark) == (3, 3)
    assert (summary.dropped_through, summary.durable_through) == (0, 1)
    assert summary.cursors == EpochCursorSnapshot(2, 3, 0)
    assert summary.lags == {
        "agent_applied_cursor": 1,
        "runtime_observed_seq": 0,
        "runtime_last_injected_seq": 3,
    }
    assert EpochSummary.from_json(summary.to_json()) == summary


def test_an_operation_that_is_kept_for_its_watchers_has_ended(namespace: str) -> None:
    with published(namespace) as segment:
        registry = registry_of(segment)
        registry.register_operation(spec(id=(id := OperationId.new())))
        with registry.register_watcher(id):
            registry.cancel_operation(id, "unwanted")
            registry.register_operation(spec())
            summary = summary_of(segment)
            assert summary.operations == {OperationStatus.PROVISIONING: 1}
            assert summary.ended == 1


def test_a_cursor_ahead_of_the_watermark_has_no_lag(namespace: str) -> None:
    with published(namespace) as segment:
        segment.cell(at.CURSORS_AT).advance(7)
        assert summary_of(segment).cursors.agent_applied_cursor == 7
        assert set(summary_of(segment).lags.values()) == {0}


def attach(
    _: SessionRuntimeBindings | None, test: Channel, args: tuple[str, SessionId, Role]
) -> None:
    namespace, session_id, role = args
    segment = SharedSegment.attach(namespace, session_id)
    segment.join(role)
    test.say("attached")
    test.hear()


def test_every_role_is_counted(namespace: str) -> None:
    with published(namespace) as segment:
        arguments = [(namespace, segment.session_id, role) for role in (Role.WORKER, Role.AGENT)]
        with (
            start(attach, None, arguments[0]) as one,
            start(attach, None, arguments[0]) as two,
            start(attach, None, arguments[1]) as three,
        ):
            assert [child.hear() for child in (one, two, three)] == ["attached"] * 3
            assert summary_of(segment).participants == {Role.AGENT: 1, Role.WORKER: 2}
            assert summary_of(segment).state is EpochState.OPEN
            two.kill()
            assert summary_of(segment).participants == {Role.AGENT: 1, Role.WORKER: 1}
            assert summary_of(segment).dead == 1


def own(_: SessionRuntimeBindings | None, test: Channel, namespace: str) -> None:
    adapter = RuntimeSessionAdapter.ephemeral(namespace=namespace)
    bindings = adapter.prepare_bindings(SessionId.new())
    end(bindings, TOOL)
    bindings.ops_lifecycle.register_operation(spec())
    test.say(bindings.session_id)
    test.hear()


def test_an_epoch_whose_processes_are_all_dead(namespace: str) -> None:
    with start(own, None, namespace) as runtime:
        session_id = runtime.hear()
        assert [summary.state for summary in summaries(namespace)] == [EpochState.OPEN]
        runtime.kill()
    [summary] = summaries(namespace)
    assert (summary.state, summary.participants, summary.dead) == (EpochState.ABANDONED, {}, 1)
    assert summary.operations == {OperationStatus.PROVISIONING: 1}
    assert (summary.ended, summary.watermark) == (1, 1)
    assert remove_unused(namespace, session_id)


def test_an_epoch_that_only_observers_have_attached_is_abandoned(namespace: str) -> None:
    with (
        published(namespace) as segment,
        start(observe, None, namespace, segment.session_id) as observer,
    ):
        assert observer.hear() == "attached"
        assert summary_of(segment).participants == {Role.OBSERVER: 1}
        assert summary_of(segment).state is EpochState.ABANDONED


def observe(
    _: SessionRuntimeBindings | None, test: Channel, namespace: str, session_id: SessionId
) -> None:
    segment = ObservedSegment.attach(namespace, session_id)
    segment.join(Role.OBSERVER)
    test.say("attached")
    test.hear()


@each_look
def test_an_epoch_that_is_sealed(namespace: str, look: Look) -> None:
    with published(namespace) as segment:
        segment.join(Role.RUNTIME)
        segment.seal()
        found = look(namespace, segment.session_id)
        assert found is not None
        assert (found.state, found.problem) == (EpochState.SEALED, None)
        assert found.participants == {Role.RUNTIME: 1}


@each_look
def test_memory_that_has_cursors_only(namespace: str, look: Look) -> None:
    with published(namespace, None) as segment:
        segment.cell(at.CURSORS_AT).advance(7)
        found = look(namespace, segment.session_id)
        assert found is not None
        assert (found.state, found.problem) == (EpochState.ABANDONED, None)
        assert (found.operations, found.ended, found.watermark) == ({}, 0, 0)
        assert found.cursors == EpochCursorSnapshot(7, 0, 0)


@each_look
def test_an_epoch_that_is_not_there(namespace: str, look: Look) -> None:
    assert look(namespace, SessionId.new()) is None


def test_an_epoch_that_is_removed_after_it_was_listed(
    namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with published(namespace) as segment:
        listed = [(namespace, SessionId.new()), (namespace, segment.session_id)]
        monkeypatch.setattr(epochs, "list_segments", lambda _: iter(listed))
        assert [summary.session_id for summary in summaries(namespace)] == [segment.session_id]


@each_look
def test_an_epoch_that_is_removed_once_it_was_refused(
    namespace: str, look: Look, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise SegmentForeign("gone", "mode", "0o600", "0o644")

    monkeypatch.setattr(ObservedSegment, "peek", refuse)
    assert look(namespace, SessionId.new()) is None


def spoil_word(offset: int, value: int, segment: SharedSegment) -> None:
    segment.memory.store(offset, value)


def spoil_size(segment: SharedSegment) -> None:
    os.ftruncate(segment.fd, at.PAGE // 2)


def spoil_mode(segment: SharedSegment) -> None:
    os.fchmod(segment.fd, 0o644)


def spoil_slot(segment: SharedSegment) -> None:
    word = segment.layout.slot(0) + at.SLOT_CREATED_MS
    segment.memory.store(word, 2**64 - 1)


def spoil_role(segment: SharedSegment) -> None:
    segment.memory.store(segment.layout.participant(1), 1 << 8 | 77)


@each_look
@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (partial(spoil_word, at.MAGIC_AT, 1), "magic is 1"),
        (partial(spoil_word, at.CHECKSUM_AT, 1), "checksum of its capacities"),
        (partial(spoil_word, at.STATE_AT, 9), "state is 9"),
        (partial(spoil_word, at.VERSION_AT, 99), "layout version 99"),
        (partial(spoil_word, at.WATERMARK_AT, 2**64 - 1), "watermark is"),
        (spoil_size, "file size is 2048"),
        (spoil_mode, "its mode is 0o644"),
        (spoil_slot, "slot[0]"),
        (spoil_role, "participants[1].role is 77"),
    ],
)
def test_an_epoch_that_is_damaged(
    namespace: str, look: Look, spoil: Callable[[SharedSegment], None], problem: str
) -> None:
    with published(namespace) as segment:
        registry_of(segment).register_operation(spec())
        size = os.fstat(segment.fd).st_size
        spoil(segment)
        found = look(namespace, segment.session_id)
        os.ftruncate(segment.fd, size)
        os.fchmod(segment.fd, 0o600)
        assert found is not None
        assert found.state is EpochState.DAMAGED
        assert problem in (found.problem or "")
        assert found.bytes in (size, at.PAGE // 2)
        assert type(found).from_json(found.to_json()) == found


@pytest.mark.parametrize("kind", ["directory", "link", "pipe"])
@each_look
def test_what_is_no_regular_file(namespace: str, look: Look, kind: str) -> None:
    with published(namespace) as segment:
        path = segment.path
        os.rename(path, f"{path}.away")
        try:
            if kind == "directory":
                path.mkdir()
            elif kind == "link":
                path.symlink_to(f"{path}.away")
            else:
                os.mkfifo(path)
            found = look(namespace, segment.session_id)
            assert found is not None
            assert found.state is EpochState.DAMAGED
            assert "type" in (found.problem or "")
        finally:
            path.rmdir() if kind == "directory" else path.unlink()
            os.rename(f"{path}.away", path)


def test_a_damaged_epoch_does_not_hide_the_others(namespace: str) -> None:
    with published(namespace) as one, published(namespace) as other:
        one.memory.store(at.MAGIC_AT, 0)
        states = {summary.session_id: summary.state for summary in summaries(namespace)}
    assert states == {
        one.session_id: EpochState.DAMAGED,
        other.session_id: EpochState.ABANDONED,
    }


def test_only_of_the_namespace_that_is_asked_for(namespace: str) -> None:
    with published(namespace) as one, published(f"{namespace}-2") as other:
        assert [summary.session_id for summary in summaries(namespace)] == [one.session_id]
        every = {(summary.namespace, summary.session_id) for summary in summaries()}
        assert every >= {(one.namespace, one.session_id), (other.namespace, other.session_id)}


@each_look
def test_at_every_step_of_a_transition(namespace: str, look: Look) -> None:
    """MONITOR-1: also while its writer stands still in the middle, and holds the writer lock."""
    with published(namespace) as segment:
        registry, ids = registry_of(segment), [OperationId.new() for _ in range(3)]
        registry.register_operations([spec(id=id) for id in ids])
        pid = os.fork()
        if pid == 0:
            mine = SharedSegment.attach(namespace, segment.session_id)
            mine.epoch = cast(Epoch, Stepped(mine.epoch))
            registry_of(mine).terminate_owner("ended")
            os._exit(0)
        seen, held, last = set(), 0, b""
        for _ in steps(pid):
            image = content(segment)
            if image == last:
                continue
            found = look(namespace, segment.session_id)
            assert found is not None
            assert found.state is not EpochState.DAMAGED, found.problem
            assert content(segment) == image
            seen.add((found.watermark, sum(found.operations.values()), found.ended))
            held += is_locked(segment.fd, at.WRITER_BYTE)
            last = image
        assert seen == {(0, 3, 0), (3, 0, 3)}
        assert held > 10


@each_look
def test_a_look_changes_nothing(namespace: str, look: Look) -> None:
    with published(namespace) as segment:
        segment.join(Role.WORKER)
        fill(registry_of(segment))
        before = content(segment), os.fstat(segment.fd)
        look(namespace, segment.session_id)
        after = content(segment), os.fstat(segment.fd)
        assert before[0] == after[0]
        assert (before[1].st_mtime_ns, before[1].st_ctime_ns) == (
            after[1].st_mtime_ns,
            after[1].st_ctime_ns,
        )


def test_a_look_keeps_no_process_from_removing_the_segment(namespace: str) -> None:
    with published(namespace) as segment:
        session_id = segment.session_id
        segment.close()
        peeked = ObservedSegment.peek(namespace, session_id)
        try:
            assert of_segment(peeked).participants == {}
            locks = (at.WRITER_BYTE, at.RUNTIME_BYTE, at.PRESENCE_BYTE, at.PARTICIPANT_BYTE)
            with open(segment.path, "rb") as other:
                assert not any(is_locked(other, byte) for byte in locks)
            assert remove_unused(namespace, session_id)
            assert of_segment(peeked).state is EpochState.ABANDONED
        finally:
            peeked.close()


def test_the_last_sign_of_life(namespace: str) -> None:
    with published(namespace) as segment:
        os.utime(segment.path, (1, 1))
        assert summary_of(segment).alive_at_ms == 1000
        before = wall_ms()
        segment.join(Role.WORKER)
        joined = summary_of(segment).alive_at_ms
        assert before <= joined <= wall_ms()
        reach(registry_of(segment), OperationStatus.COMPLETED)
        segment.participants.leave(segment.participant)
        os.utime(segment.path, (1, 1))  # the first write to a page of a mapping sets it
        ended = summary_of(segment).alive_at_ms
        [entry] = registry_of(segment).completion_feed().list_since(0).entries
        assert joined <= ended == entry.completed_at_ms <= wall_ms()
        later_s = ended // 1000 + 60
        os.utime(segment.path, (later_s, later_s))
        assert summary_of(segment).alive_at_ms == later_s * 1000


@pytest.mark.parametrize("seed", range(8))
@each_look
def test_of_an_epoch_with_any_damage_something_is_said(
    namespace: str, look: Look, seed: int
) -> None:
    with published(namespace) as segment:
        segment.join(Role.WORKER)
        fill(registry_of(segment))
        memory, rng = segment.memory, random.Random(seed)
        image, parts = bytes(memoryview(memory)), every_word(segment.layout)
        damaged = 0
        signal.alarm(60)  # no look takes a thousandth of it
        for _ in range(100):
            memory.write(0, image)
            for _ in range(rng.choice((1, 1, 2, 4))):
                offset = rng.choice(list(parts[rng.choice(list(parts))]))
                memory.store(offset, hostile(rng, memory.load(offset)))
            found = look(namespace, segment.session_id)
            assert found is not None
            found.to_json()
            damaged += found.state is EpochState.DAMAGED
        signal.alarm(0)
        memory.write(0, image)
        assert damaged > 0
