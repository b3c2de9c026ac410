"""Supervision: it notices participants that are gone, and ends their operations."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
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
from shmepoch import _native as at
from shmepoch._native import try_lock
from shmepoch.config import OpsLifecycleConfig
from shmepoch.memory.layout import Layout
from shmepoch.memory.participants import Participant, Participants
from shmepoch.memory.segment import SharedSegment
from shmepoch.runtime import supervision
from shmepoch.runtime.supervision import EpochSupervisor, Supervisor
from tests.epoch.deadline import DEADLINE_S
from tests.support import eventually, held_writer, spec


class Worker:
    """Another attachment, equivalent to another process."""

    def __init__(self, bindings: SessionRuntimeBindings, role: Role = Role.WORKER) -> None:
        segment = bindings.shared_segment()
        self.segment = SharedSegment.attach(segment.namespace, segment.session_id)
        self.segment.join(role)
        self.registry = RuntimeOpsLifecycleRegistry(self.segment)

    def run(self, name: str = "work") -> OperationId:
        """Begin an operation."""
        id = OperationId.new()
        self.registry.register_operation(spec(name, id=id))
        self.registry.provisioning_succeeded(id)
        return id

    def leave(self) -> None:
        """Leave regularly."""
        self.segment.close()

    def die(self) -> None:
        """End like a killed process: only its locks are released."""
        self.segment._descriptor.close()


@pytest.fixture
def config() -> OpsLifecycleConfig:
    """The size of the epoch `alone`; a test may give it another."""
    return OpsLifecycleConfig()


@pytest.fixture
def alone(namespace: str, config: OpsLifecycleConfig) -> Iterator[SessionRuntimeBindings]:
    """Bindings of a runtime whose adapter does not poll by itself."""
    segment = SharedSegment.allocate(
        namespace,
        config,
        session_id=SessionId.new(),
        epoch_id=SessionRuntimeBindings.standalone(SessionId.new()).epoch_id,
    )
    segment.try_own()
    segment.join(Role.RUNTIME)
    segment.publish()
    bindings = SessionRuntimeBindings.of_segment(segment)
    yield bindings
    if segment.attached and segment.named:  # a change of one that is not raises EpochGone
        bindings.ops_lifecycle.check()
    segment.path.unlink(missing_ok=True)
    bindings.close()


@pytest.fixture
def worker(alone: SessionRuntimeBindings) -> Iterator[Callable[..., Worker]]:
    made: list[Worker] = []

    def make(role: Role = Role.WORKER) -> Worker:
        made.append(Worker(alone, role))
        return made[-1]

    yield make
    for one in made:
        if one.segment.attached:  # a dead one has closed its descriptor
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
    assert [supervisor.poll() for _ in range(3)] == [0, 0, 0]
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
    assert supervisor.poll() == 0
    doomed.die()
    assert supervisor.poll() == 2
    outcomes = ended(alone)
    assert list(outcomes) == ids
    for outcome in outcomes.values():
        assert isinstance(outcome, Terminated)
        assert f"ended without finishing it (worker process {os.getpid()})" in outcome.reason
    assert supervisor.poll() == 0
    assert len(alone.participants()) == 2


def test_many_dead_are_one_commit(
    alone: SessionRuntimeBindings, worker: Callable[..., Worker]
) -> None:
    workers = [worker(role) for role in (Role.WORKER, Role.AGENT, Role.OBSERVER)]
    ids = [one.run() for one in workers]
    for one in workers:
        one.die()
    assert EpochSupervisor(alone).poll() == 3
    outcomes = ended(alone)
    assert list(outcomes) == ids
    assert len(set(map(repr, outcomes.values()))) == 1
    for role in ("worker", "agent", "observer"):
        assert f"{role} process" in repr(outcomes[ids[0]])


#: The least room that a configuration may give a table of 120 operations.
TIGHT = OpsLifecycleConfig(
    max_operations=120, feed_bytes=at.PAGE + 240 * at.SPEC_LIMIT, max_participants=64
)


@pytest.mark.parametrize("config", [TIGHT], ids=["tight"])
def test_however_many_die_together_everything_ends(
    alone: SessionRuntimeBindings, worker: Callable[..., Worker]
) -> None:
    workers = [worker() for _ in range(60)]
    ids = [one.run("n" * 350) for one in workers for _ in range(2)]
    for one in workers:
        one.die()
    assert EpochSupervisor(alone).poll() == 120
    outcomes = ended(alone)
    assert list(outcomes) == ids
    for outcome in outcomes.values():
        assert isinstance(outcome, Terminated)
        assert outcome.reason.count("worker process") == 3
        assert "and 57 more" in outcome.reason
    assert len(alone.participants()) == 1


@pytest.mark.parametrize(
    ("dead", "running", "level", "told"),
    [
        (1, 0, logging.INFO, "worker process {pid} ended; operations terminated with that: 0"),
        (1, 1, logging.WARNING, "worker process {pid} ended; operations terminated with that: 1"),
        (4, 4, logging.WARNING, " and 1 more ended; operations terminated with that: 4"),
    ],
)
def test_an_end_is_told_as_what_is_known_of_it(
    alone: SessionRuntimeBindings,
    worker: Callable[..., Worker],
    caplog: pytest.LogCaptureFixture,
    dead: int,
    running: int,
    level: int,
    told: str,
) -> None:
    """A normal exit looks like a death, and needs no warning if no operation ran."""
    caplog.set_level(logging.INFO, "shmepoch")
    workers = [worker() for _ in range(dead)]
    for one in workers[:running]:
        one.run()
    for one in workers:
        one.die()
    EpochSupervisor(alone).poll()
    [record] = caplog.records
    assert record.levelno == level
    assert told.format(pid=os.getpid()) in record.getMessage()


def test_who_leaves_with_nothing_running_is_not_told(
    alone: SessionRuntimeBindings,
    worker: Callable[..., Worker],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "shmepoch")
    supervisor, one = EpochSupervisor(alone), worker()
    supervisor.poll()
    one.leave()
    supervisor.poll()
    assert caplog.records == []


def test_who_left_in_good_order_is_noticed_too(
    alone: SessionRuntimeBindings, worker: Callable[..., Worker]
) -> None:
    supervisor, one = EpochSupervisor(alone), worker()
    id = one.run()
    supervisor.poll()
    one.leave()
    assert supervisor.poll() == 1
    [(ended_id, outcome)] = ended(alone).items()
    assert ended_id == id
    assert outcome == Terminated("the process that ran it ended without finishing it (it left)")


def test_who_came_and_went_between_two_looks_is_noticed(
    alone: SessionRuntimeBindings, worker: Callable[..., Worker]
) -> None:
    supervisor = EpochSupervisor(alone)
    supervisor.poll()
    one = worker()
    id = one.run()
    one.leave()
    assert supervisor.poll() == 1
    assert list(ended(alone)) == [id]


def test_who_took_the_slot_of_the_dead_is_not_taken_for_it(
    alone: SessionRuntimeBindings, worker: Callable[..., Worker]
) -> None:
    supervisor, first = EpochSupervisor(alone), worker()
    supervisor.poll()
    before = first.run()
    first.die()
    second = worker()
    slots = [one.segment.participant & 0xFF for one in (first, second)]
    # A free slot is taken first. So take all others, to make the dead one's slot be reused.
    while slots[1] != slots[0]:
        second = worker()
        slots[1] = second.segment.participant & 0xFF
    after = second.run()
    assert supervisor.poll() == 1
    assert list(ended(alone)) == [before]
    operation = alone.ops_lifecycle.snapshot(after)
    assert operation is not None
    assert operation.status is OperationStatus.RUNNING


@pytest.mark.parametrize("bystander", [False, True])
@pytest.mark.parametrize("comes_late", [False, True])
def test_who_dies_during_a_poll_is_named(
    alone: SessionRuntimeBindings,
    worker: Callable[..., Worker],
    monkeypatch: pytest.MonkeyPatch,
    comes_late: bool,
    bystander: bool,
) -> None:
    supervisor = EpochSupervisor(alone)
    if bystander:
        worker()
    workers = [] if comes_late else [worker()]
    ids = [one.run() for one in workers]
    # Otherwise a poll would have nothing to do.
    other = worker()
    other.run()
    other.leave()
    listed = Participants.list

    def list_and_kill(participants: Participants, *, me: int = 0) -> list[Participant]:
        found = listed(participants, me=me)
        if comes_late:
            workers.append(worker())
            ids.append(workers[0].run())
        workers[0].die()
        monkeypatch.undo()
        return found

    monkeypatch.setattr(Participants, "list", list_and_kill)
    assert supervisor.poll() + supervisor.poll() == 2
    assert f"worker process {os.getpid()}" in str(ended(alone)[ids[0]])


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
    EpochSupervisor(alone).poll()
    assert watchers() == 1
    watches[-1].close()
    assert watchers() == 0


def test_a_look_at_nothing_new_takes_no_lock(
    alone: SessionRuntimeBindings, worker: Callable[..., Worker]
) -> None:
    worker().run()
    supervisor = EpochSupervisor(alone)
    supervisor.poll()
    with held_writer(alone.shared_segment()):  # a wait would last for ever
        assert supervisor.poll() == 0


def test_a_look_at_an_epoch_that_no_other_process_joined_is_one_load(
    alone: SessionRuntimeBindings,
    worker: Callable[..., Worker],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    supervisor = EpochSupervisor(alone)
    supervisor.poll()
    loads: list[int] = []
    memory = alone.shared_segment().memory

    class Watched:
        def load(self, offset: int) -> int:
            loads.append(offset)
            return memory.load(offset)

    monkeypatch.setattr(supervisor, "_memory", Watched())
    with monkeypatch.context() as patch:
        patch.setattr(supervisor, "bindings", None)
        assert supervisor.poll() == 0
    assert loads == [at.JOINED_AT]
    one = worker()
    id = one.run()
    one.die()
    assert supervisor.poll() == 1
    assert list(ended(alone)) == [id]


def test_who_is_about_to_join_is_not_overlooked(
    alone: SessionRuntimeBindings, worker: Callable[..., Worker]
) -> None:
    """It has increased `joined`, and was stopped before it was listed."""
    late = SharedSegment.attach(alone.shared_segment().namespace, alone.session_id)
    slot = 1
    assert try_lock(late.fd, at.PARTICIPANT_BYTE + slot, False)
    number = late.memory.fetch_add(at.JOINED_AT, 1) + 1
    supervisor = EpochSupervisor(alone)
    assert [supervisor.poll() for _ in range(2)] == [0, 0]
    late.memory.store(Layout.participant(slot), number << 8 | Role.WORKER.number)
    late.participant = number << 8 | slot
    id = OperationId.new()
    RuntimeOpsLifecycleRegistry(late).register_operation(spec(id=id))
    late._descriptor.close()
    assert supervisor.poll() == 1
    assert list(ended(alone)) == [id]


def test_a_look_waits_for_no_transition(
    alone: SessionRuntimeBindings, worker: Callable[..., Worker]
) -> None:
    stopped, doomed = worker(), worker()
    id = doomed.run()
    watch = alone.ops_lifecycle.register_watcher(id)
    doomed.die()
    supervisor = EpochSupervisor(alone)
    with ThreadPoolExecutor(1) as pool, held_writer(stopped.segment):
        assert pool.submit(supervisor.poll).result(DEADLINE_S) == 0
        pool.submit(supervisor.settle).result(DEADLINE_S)  # it gives up after a while
    assert ended(alone) == {}
    assert supervisor.poll() == 1
    assert watch.wait(DEADLINE_S) == ended(alone)[id]


def test_settling_waits_for_a_transition_that_ends(
    alone: SessionRuntimeBindings, worker: Callable[..., Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervision, "_SETTLE_S", DEADLINE_S)
    slow, doomed = worker(), worker()
    id = doomed.run()
    doomed.die()
    with ThreadPoolExecutor(1) as pool:
        with held_writer(slow.segment):
            settling = pool.submit(EpochSupervisor(alone).settle)
            with pytest.raises(TimeoutError):
                settling.result(0.05)
        settling.result(DEADLINE_S)
    assert list(ended(alone)) == [id]


def remove(path: Path) -> None:
    path.unlink()


def replace(path: Path) -> None:
    other = path.with_name(f"{path.name}.test")
    other.touch()
    other.rename(path)


def move(path: Path) -> None:
    path.rename(path.with_name(f"{path.name}.test"))


@pytest.mark.parametrize("lose", [remove, replace, move])
def test_an_epoch_whose_name_is_gone_is_lost(
    alone: SessionRuntimeBindings,
    caplog: pytest.LogCaptureFixture,
    lose: Callable[[Path], None],
) -> None:
    path = alone.shared_segment().path
    epoch = EpochSupervisor(alone)
    supervisor = Supervisor(lambda: [epoch])
    supervisor.start()
    lose(path)
    try:
        eventually(lambda: epoch.lost)
    finally:
        supervisor.stop()
        path.with_name(f"{path.name}.test").unlink(missing_ok=True)
    [record] = caplog.records
    assert record.levelno == logging.ERROR
    assert str(path) in record.getMessage()


def test_a_change_of_names_is_looked_at_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second change may have followed that the directory's time does not show."""
    folder = tmp_path / "shm"
    folder.mkdir()
    monkeypatch.setattr(supervision, "SHM_DIR", folder)
    names = supervision._Names()

    def looks() -> list[bool]:
        return [names.may_have_changed() for _ in range(4)]

    assert looks() == [True, True, False, False]
    os.utime(folder, ns=(7, 7))
    assert looks() == [True, True, False, False]
    folder.rmdir()
    assert looks() == [True, True, False, False]


def test_an_epoch_that_was_sealed_may_lose_its_name(alone: SessionRuntimeBindings) -> None:
    epoch = EpochSupervisor(alone)
    epoch.check_name()
    alone.shared_segment().seal()
    alone.shared_segment().unlink()
    epoch.check_name()
    assert not epoch.lost


def test_a_transition_that_killed_its_writer_is_repaired(
    alone: SessionRuntimeBindings, worker: Callable[..., Worker]
) -> None:
    doomed = worker()
    id = doomed.run()
    doomed.segment.memory.store(at.INTENT_AT, 1)
    doomed.die()
    assert EpochSupervisor(alone).poll() == 1
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
    alone.close()  # by an unregister, after the supervisor got the list of epochs
    with contextlib.suppress(ShmepochError):
        assert supervisor.poll() == 0


def test_each_epoch_shows_that_it_lives_once_in_many_polls(
    alone: SessionRuntimeBindings,
    bindings: SessionRuntimeBindings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(supervision, "_INTERVAL_S", 0.001)
    monkeypatch.setattr(supervision, "_LIFE_EVERY", 50)
    epochs = [EpochSupervisor(alone), EpochSupervisor(bindings)]
    paths = [epoch.bindings.shared_segment().path for epoch in epochs]
    for path in paths:
        os.utime(path, (0, 0))
    # One that is gone holds up none.
    paths[0].rename(moved := paths[0].with_name(f"{paths[0].name}.moved"))
    supervisor = Supervisor(lambda: epochs)
    supervisor.start()
    try:
        eventually(lambda: paths[1].stat().st_mtime > 0)
        moved.rename(paths[0])
        eventually(lambda: paths[0].stat().st_mtime > 0)
    finally:
        supervisor.stop()


class Broken:
    """An epoch whose supervision fails with an unexpected error."""

    looks = 0
    life_turn = -1

    def __init__(self, bindings: SessionRuntimeBindings) -> None:
        self.bindings = bindings

    def check_name(self) -> None:
        pass

    def poll(self) -> int:
        self.looks += 1
        raise OSError("not expected")


def test_an_unexpected_error_does_not_end_the_supervision_of_the_others(
    alone: SessionRuntimeBindings,
    worker: Callable[..., Worker],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    doomed, broken = worker(), Broken(alone)
    id = doomed.run()
    supervisor = Supervisor(lambda: [cast(EpochSupervisor, broken), EpochSupervisor(alone)])
    supervisor.start()
    doomed.die()
    try:
        eventually(lambda: list(ended(alone)) == [id] and broken.looks >= 3)
    finally:
        supervisor.stop()
    assert caplog.text.count("an epoch cannot be supervised") == 1, "it is told once"
