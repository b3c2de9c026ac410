"""The last sign of life of an epoch: what shows it, and what does not (GC-1)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shmepoch import (
    OpsLifecycleConfig,
    Role,
    RuntimeEpochId,
    RuntimeSessionAdapter,
    SessionId,
    SessionRuntimeBindings,
    observe_session,
)
from shmepoch import _native as at
from shmepoch.memory.segment import ObservedSegment, SharedSegment
from shmepoch.monitoring import summarize
from tests.processes.children import Channel, start
from tests.runtime.completions import TOOL, end
from tests.support import damage_record

_OLD_S = 1_000_000_000
_OLD_MS = _OLD_S * 1000


@pytest.fixture
def segment(namespace: str) -> Iterator[SharedSegment]:
    """An open epoch without a runtime, whose file is old."""
    segment = SharedSegment.allocate(
        namespace,
        OpsLifecycleConfig(),
        session_id=SessionId.new(),
        epoch_id=RuntimeEpochId.new(),
    )
    segment.publish()
    age(segment.path)
    yield segment
    segment.unlink()
    segment.close()


def age(path: Path) -> None:
    os.utime(path, (_OLD_S, _OLD_S))


def alive_at_ms(segment: SharedSegment) -> int:
    summary = summarize(segment.namespace, segment.session_id)
    assert summary is not None
    return summary.alive_at_ms


def attach(segment: SharedSegment) -> SharedSegment:
    return SharedSegment.attach(segment.namespace, segment.session_id)


def test_a_participant_that_leaves_shows_it(segment: SharedSegment) -> None:
    other = attach(segment)
    other.join(Role.WORKER)
    age(segment.path)
    other.close()
    assert alive_at_ms(segment) > _OLD_MS
    age(segment.path)
    other.close()
    assert alive_at_ms(segment) == _OLD_MS, "it has left before"


def look(segment: SharedSegment) -> None:
    ObservedSegment.peek(segment.namespace, segment.session_id).close()


def observe(segment: SharedSegment) -> None:
    observe_session(segment.session_id, namespace=segment.namespace).close()


def attach_and_leave(segment: SharedSegment) -> None:
    attach(segment).close()


@pytest.mark.parametrize("act", [look, observe, attach_and_leave])
def test_to_be_looked_at_is_no_life(
    segment: SharedSegment, act: Callable[[SharedSegment], None]
) -> None:
    act(segment)
    assert alive_at_ms(segment) == _OLD_MS


def test_a_segment_that_lost_its_name_is_left_all_the_same(segment: SharedSegment) -> None:
    other = attach(segment)
    other.join(Role.WORKER)
    segment.unlink()
    other.close()


def be_killed(bindings: SessionRuntimeBindings, test: Channel, completes: bool) -> None:
    if completes:
        end(bindings, TOOL)
    test.say("attached")
    test.hear()


@pytest.mark.parametrize("completes", [False, True])
def test_what_a_killed_process_did_is_a_sign(
    adapter: RuntimeSessionAdapter, completes: bool
) -> None:
    """It joined, and it may have ended an operation: its file tells neither."""
    bindings = adapter.prepare_bindings(SessionId.new())
    with start(be_killed, bindings, completes, method="subprocess") as child:
        child.hear()
        child.kill()
    segment = bindings.shared_segment()
    joined = [one for one in segment.participants.list() if not one.alive]
    for one in segment.participants.list():
        segment.memory.store(
            at.PARTICIPANTS_AT + one.slot * at.PARTICIPANT_SIZE + at.PARTICIPANT_JOINED,
            _OLD_MS + 1 if completes else one.joined_at_ms,
        )
    age(segment.path)
    alive = alive_at_ms(segment)
    if completes:
        (entry,) = bindings.ops_lifecycle.completion_feed().list_since(0).entries
        assert alive == entry.completed_at_ms > _OLD_MS
    else:
        assert alive == max(one.joined_at_ms for one in (*joined, *segment.participants.list()))
    adapter.unregister_session(bindings.session_id)


def test_a_newest_operation_that_is_damaged_says_so(
    adapter: RuntimeSessionAdapter, namespace: str
) -> None:
    bindings = adapter.prepare_bindings(SessionId.new())
    (seq,) = end(bindings, TOOL)
    damage_record(bindings.shared_segment(), seq)
    summary = summarize(namespace, bindings.session_id)
    assert summary is not None
    assert summary.problem is not None
    assert f"feed[{seq}]" in summary.problem
    bindings.shared_segment().unlink()
    bindings.close()
