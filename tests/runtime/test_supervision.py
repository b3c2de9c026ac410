"""Supervision: who is gone is noticed, and what it ran is ended."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import cast

import pytest

from shmepoch import (
    OperationId,
    OperationStatus,
    Role,
    RuntimeOpsLifecycleRegistry,
    SessionId,
    SessionRuntimeBindings,
    ShmepochError,
    Terminated,
)
from shmepoch.memory import layout as at
from shmepoch.memory.segment import SharedSegment
from shmepoch.runtime.supervision import EpochSupervisor, Supervisor
from tests.support import eventually, spec


class Worker:
    """Another attachment, as good as another process."""

    def __init__(self, bindings: SessionRuntimeBindings, role: Role = Role.WORKER) -> None:
        segment = bindings.shared_segment()
        self.segment = SharedSegment.attach(segment.namespace, segment.session_id)
        self.segment.join(role)
        self.registry = RuntimeOpsLifecycleRegistry(self.segment)

    def run(self) -> OperationId:
        """Begin an operation."""
        id = OperationId.new()
        self.registry.register_operation(spec(id=id))
        self.registry.provisioning_succeeded(id)
        return id

    def leave(self) -> None:
        """End in good order."""
        self.segment.close()

    def die(self) -> None:
        """End as a killed process does: its locks go, and nothing else."""
        self.segment._descriptor.close()


@pytest.fixture
def alone(namespace: str) -> Iterator[SessionRuntimeBindings]:
    """Bindings of a runtime whose adapter does not look by itself."""
    segment = SharedSegment.allocate(
        namespace,
        at.OpsLifecycleConfig(),
        session_id=SessionId.new(),
        epoch_id=SessionRuntimeBindings.standalone(SessionId.new()).epoch_id,
    )
    segment.try_own()
    segment.join(Role.RUNTIME)
    segment.publish()
    bindings = SessionRuntimeBindings.of_segment(segment)
    yield bindings
    if segment.attached:
        bindings.ops_lifecycle.check()
    segment.path.unlink()
    bindings.close()


@pytest.fixture
def worker(alone: SessionRuntimeBindings) -> Iterator[Callable[..., Worker]]:
    made: list[Worker] = []

    def make(role: Role = Role.WORKER) -> Worker:
        made.append(Worker(alone, role))
        return made[-1]

    yield make
    for one in made:
        if one.segment.attached:  # one that died took its descriptor along
            one.segment.close()


def ended(bindings: SessionRuntimeBindings) -> dict[OperationId, object]:
    """The operations that ended, and how."""
    entries = bindings.ops_lifecycle.completion_feed().list_since(0).entries
    return {entry.operation_id: entry.terminal_outcome for entry in entries}


def test_who_lives_is_left_alone(
    alone: SessionRuntimeBindings, worker: Callable[..., Worker]
) -> None:
    mine = OperationId.new()
    alone.ops_lifecycle.register_operation(spec(id=mine))
    worker().run()
    supervisor = EpochSupervisor(alone)
    assert [supervisor.look() for _ in range(3)] == [0, 0, 0]
    assert ended(alone) == {}


def test_what_the_dead_ran_is_ended_with_a_reason(
    alone: SessionRuntimeBindings, worker: Callable[..., Worker]
) -> None:
    doomed, survivor = worker(), worker()
    ids = [doomed.run(), doomed.run()]
    survivor.run()
    mine = OperationId.new()
    alone.ops_lifecycle.register_operation(spec(id=mine))
    supervisor = EpochSupervisor(alone)
    assert supervisor.look() == 0
    doomed.die()
    assert supervisor.look() == 2
    outcomes = ended(alone)
    assert list(outcomes) == ids
    for outcome in outcomes.values():
        assert isinstance(outcome, Terminated)
        assert "worker process" in outcome.reason
    assert supervisor.look() == 0
    assert len(alone.participants()) == 2


def test_many_dead_are_one_commit(
    alone: SessionRuntimeBindings, worker: Callable[..., Worker]
) -> None:
    workers = [worker(role) for role in (Role.WORKER, Role.AGENT, Role.OBSERVER)]
    ids = [one.run() for one in workers]
    for one in workers:
        one.die()
    assert EpochSupervisor(alone).look() == 3
    outcomes = ended(alone)
    assert list(outcomes) == ids
    assert len(set(map(repr, outcomes.values()))) == 1
    for role in ("worker", "agent", "observer"):
        assert f"{role} process" in repr(outcomes[ids[0]])


def test_who_left_in_good_order_is_noticed_too(
    alone: SessionRuntimeBindings, worker: Callable[..., Worker]
) -> None:
    supervisor, one = EpochSupervisor(alone), worker()
    id = one.run()
    supervisor.look()
    one.leave()
    assert supervisor.look() == 1
    assert list(ended(alone)) == [id]


def test_who_came_and_went_between_two_looks_is_noticed(
    alone: SessionRuntimeBindings, worker: Callable[..., Worker]
) -> None:
    supervisor = EpochSupervisor(alone)
    supervisor.look()
    one = worker()
    id = one.run()
    one.leave()
    assert supervisor.look() == 1
    assert list(ended(alone)) == [id]


def test_who_took_the_slot_of_the_dead_is_not_taken_for_it(
    alone: SessionRuntimeBindings, worker: Callable[..., Worker]
) -> None:
    supervisor, first = EpochSupervisor(alone), worker()
    supervisor.look()
    before = first.run()
    first.die()
    second = worker()
    slots = [one.segment.participant & 0xFF for one in (first, second)]
    # A free slot is taken first, so have all others taken for the reuse of a dead one's.
    while slots[1] != slots[0]:
        second = worker()
        slots[1] = second.segment.participant & 0xFF
    after = second.run()
    assert supervisor.look() == 1
    assert list(ended(alone)) == [before]
    operation = alone.ops_lifecycle.snapshot(after)
    assert operation is not None
    assert operation.status is OperationStatus.RUNNING


def test_the_dead_watch_nothing(
    alone: SessionRuntimeBindings, worker: Callable[..., Worker]
) -> None:
    id = OperationId.new()
    alone.ops_lifecycle.register_operation(spec(id=id))
    dying, living = worker(), worker()
    watches = [one.registry.register_watcher(id) for one in (dying, dying, living)]

    def watchers() -> int:
        operation = alone.ops_lifecycle.snapshot(id)
        assert operation is not None
        return operation.watcher_count

    assert watchers() == 3
    dying.die()
    EpochSupervisor(alone).look()
    assert watchers() == 1
    watches[-1].close()
    assert watchers() == 0


def test_a_look_at_nothing_new_takes_no_lock(
    alone: SessionRuntimeBindings, worker: Callable[..., Worker]
) -> None:
    worker().run()
    supervisor = EpochSupervisor(alone)
    supervisor.look()
    with alone.shared_segment().writer:  # it would wait for ever
        assert supervisor.look() == 0


def test_a_transition_that_killed_its_writer_is_repaired(
    alone: SessionRuntimeBindings, worker: Callable[..., Worker]
) -> None:
    doomed = worker()
    id = doomed.run()
    doomed.segment.writer.__enter__()
    doomed.segment.memory.store(at.INTENT_AT, 1)
    doomed.die()
    assert EpochSupervisor(alone).look() == 1
    assert list(ended(alone)) == [id]
    alone.ops_lifecycle.check()


# --- the thread -------------------------------------------------------------------------------


def test_an_epoch_that_ended_does_not_hold_up_the_others(
    alone: SessionRuntimeBindings, worker: Callable[..., Worker], bindings: SessionRuntimeBindings
) -> None:
    sealed = Worker(bindings)
    sealed.run()
    doomed = worker()
    id = doomed.run()
    supervisor = Supervisor(lambda: [EpochSupervisor(bindings), EpochSupervisor(alone)])
    bindings.shared_segment().seal()
    supervisor.start()
    sealed.die()
    doomed.die()
    eventually(lambda: list(ended(alone)) == [id])
    supervisor.stop()
    sealed.segment.close()


def test_bindings_that_were_closed_are_left_alone(
    alone: SessionRuntimeBindings, worker: Callable[..., Worker]
) -> None:
    worker()
    supervisor = EpochSupervisor(alone)
    alone.close()  # by an unregister, after the supervisor was given the list of epochs
    with contextlib.suppress(ShmepochError):
        assert supervisor.look() == 0


class Broken:
    """An epoch of which nobody thought that its supervision could fail this way."""

    def look(self) -> int:
        raise OSError("not expected")


def test_an_unexpected_error_does_not_end_the_supervision_of_the_others(
    alone: SessionRuntimeBindings,
    worker: Callable[..., Worker],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    doomed = worker()
    id = doomed.run()
    supervisor = Supervisor(lambda: [cast(EpochSupervisor, Broken()), EpochSupervisor(alone)])
    supervisor.start()
    doomed.die()
    try:
        eventually(lambda: list(ended(alone)) == [id], within=5)
    finally:
        supervisor.stop()
