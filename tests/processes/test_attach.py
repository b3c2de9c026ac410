"""Bindings that go to another process, by pickle or as a token, attach there to the same epoch."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import pytest

from shmepoch import (
    AgentFactory,
    BindingsClosed,
    EpochCursorSnapshot,
    EpochGone,
    EpochSealed,
    OperationId,
    OperationStatus,
    Participant,
    Role,
    RuntimeEpochId,
    RuntimeSessionAdapter,
    SessionId,
    SessionOwned,
    SessionRuntimeBindings,
)
from tests.processes.children import METHODS, Channel, start
from tests.support import eventually, result, spec


class Seen(NamedTuple):
    """The facts that a child found in its bindings."""

    pid: int
    session_id: SessionId
    epoch_id: RuntimeEpochId
    cursors: EpochCursorSnapshot
    names: list[str]
    myself: list[Participant]
    others: list[Participant]
    resolved_to_the_same: bool


def look_and_work(bindings: SessionRuntimeBindings, test: Channel, id: OperationId) -> Seen:
    """Send what is visible, and leave a running operation and a cursor behind."""
    registry = bindings.ops_lifecycle
    registry.register_operation(spec("the child's", id=id))
    registry.provisioning_succeeded(id)
    bindings.cursor_state.runtime_observed_seq.advance(7)
    participants = bindings.participants()
    test.say(
        Seen(
            pid=os.getpid(),
            session_id=bindings.session_id,
            epoch_id=bindings.epoch_id,
            cursors=bindings.cursor_state.snapshot(),
            names=[operation.display_name for operation in registry.list_operations()],
            myself=[participant for participant in participants if participant.is_self],
            others=[participant for participant in participants if not participant.is_self],
            resolved_to_the_same=SessionRuntimeBindings.from_token(bindings.to_token()) is bindings
            and pickle.loads(pickle.dumps(bindings)) is bindings,
        )
    )
    test.hear()
    registry.complete_operation(id, result(id))
    return None  # type: ignore[return-value]


@pytest.mark.parametrize("method", METHODS)
def test_a_child_attaches_to_the_same_epoch(bindings: SessionRuntimeBindings, method: str) -> None:
    mine, id = OperationId.new(), OperationId.new()
    bindings.ops_lifecycle.register_operation(spec("the parent's", id=mine))
    bindings.cursor_state.agent_applied_cursor.advance(5)
    with start(look_and_work, bindings, id, method=method) as child:
        seen = child.hear()
        assert seen.pid == child.pid
        assert (seen.session_id, seen.epoch_id) == (bindings.session_id, bindings.epoch_id)
        assert seen.cursors == EpochCursorSnapshot(agent_applied_cursor=5, runtime_observed_seq=7)
        assert seen.names == ["the child's", "the parent's"]
        assert seen.resolved_to_the_same
        # It is a separate participant, beside its parent, and both see each other alive.
        assert [(one.pid, one.alive) for one in seen.myself] == [(child.pid, True)]
        assert [(one.pid, one.alive) for one in seen.others] == [(os.getpid(), True)]
        found = {one.pid: one for one in bindings.participants()}
        assert found[child.pid].alive
        assert found[child.pid].role is Role.WORKER
        assert found[os.getpid()].is_self
        # Its changes are visible here.
        assert bindings.cursor_state.runtime_observed_seq.load() == 7
        started = bindings.ops_lifecycle.snapshot(id)
        assert started is not None
        assert started.status is OperationStatus.RUNNING
        watch = bindings.ops_lifecycle.register_watcher(id)
        child.say("end it")
        outcome = watch.wait(60)
        child.result()
    [entry] = bindings.ops_lifecycle.completion_feed().list_since(0).entries
    assert (entry.operation_id, entry.terminal_outcome) == (id, outcome)
    # It has left, or was found dead: only the runtime remains.
    eventually(lambda: [one.pid for one in bindings.participants()] == [os.getpid()])


def epoch_of(bindings: SessionRuntimeBindings) -> RuntimeEpochId:
    """Read the epoch's id in a pool's worker, which got the bindings as an argument."""
    return bindings.epoch_id


def test_bindings_are_arguments_and_results_of_a_pool(bindings: SessionRuntimeBindings) -> None:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        assert set(pool.map(epoch_of, [bindings] * 4)) == {bindings.epoch_id}
        assert pool.submit(_same, bindings).result() is bindings


def _same(bindings: SessionRuntimeBindings) -> SessionRuntimeBindings:
    return bindings


def attach_to(bindings: None, test: Channel, token: str) -> str:
    """Attach by a token that came as an argument."""
    return str(SessionRuntimeBindings.from_token(token).epoch_id)


@pytest.mark.parametrize("method", METHODS)
def test_the_errors_of_an_attach_arrive_whole(adapter: RuntimeSessionAdapter, method: str) -> None:
    session_id = SessionId.new()
    bindings = adapter.prepare_bindings(session_id)
    token, epoch_id, name = bindings.to_token(), bindings.epoch_id, bindings.shared_segment().name
    adapter.reset_session(session_id)
    with start(attach_to, None, token, method=method) as child, pytest.raises(EpochSealed) as old:
        child.result()
    assert old.value.epoch_id == epoch_id
    adapter.unregister_session(session_id)
    with start(attach_to, None, token, method=method) as child, pytest.raises(EpochGone) as gone:
        child.result()
    assert (gone.value.session_id, gone.value.epoch_id) == (session_id, epoch_id)
    assert gone.value.name == name
    assert "RemoveIPC" in str(gone.value)


# --- from a pickle --------------------------------------------------------------------------------


def look_before_use(bindings: SessionRuntimeBindings, test: Channel) -> None:
    """Read everything that needs no attachment; then the first use, in many threads at once."""
    again = pickle.loads(pickle.dumps(bindings))
    test.say(
        (
            bindings.session_id,
            bindings.epoch_id,
            bindings.handle,
            bindings.to_token(),
            repr(bindings),
            again is bindings and again == bindings and hash(again) == hash(bindings),
        )
    )
    test.hear()
    barrier, registries = threading.Barrier(8), []

    def use() -> None:
        barrier.wait()
        registries.append(bindings.ops_lifecycle)
        bindings.ops_lifecycle.register_operation(spec())

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    test.say((len({id(one) for one in registries}), bindings.role))
    test.hear()


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_bindings_out_of_a_pickle_attach_on_their_first_use(
    bindings: SessionRuntimeBindings, method: str
) -> None:
    with start(look_before_use, bindings, method=method) as child:
        session_id, epoch_id, handle, token, text, same = child.hear()
        assert (session_id, epoch_id) == (bindings.session_id, bindings.epoch_id)
        assert (handle, token) == (bindings.handle, bindings.to_token())
        assert str(epoch_id) in text
        assert "not attached" in text
        assert same
        assert [one.pid for one in bindings.participants()] == [os.getpid()]
        child.say("use")
        assert child.hear() == (1, Role.WORKER)
        assert sorted(one.pid for one in bindings.participants()) == sorted(
            [os.getpid(), child.pid]
        )
        child.say("end")
        child.result()
    assert len(bindings.ops_lifecycle.list_operations()) == 8


class Reset(NamedTuple):
    """A session's bindings before it was reset, and after."""

    old: SessionRuntimeBindings
    fresh: SessionRuntimeBindings


@pytest.fixture
def reset(adapter: RuntimeSessionAdapter) -> Iterator[Reset]:
    old = adapter.prepare_bindings(SessionId.new())
    yield Reset(old, adapter.reset_session(old.session_id))
    adapter.unregister_session(old.session_id)


def use_twice(bindings: SessionRuntimeBindings, test: Channel) -> str:
    """Use bindings of an ended epoch, and then bindings that were closed before their first use."""
    for _ in range(2):
        for use in (
            lambda: bindings.ops_lifecycle,
            lambda: bindings.cursor_state,
            lambda: bindings.sealed,
            bindings.participants,
            bindings.shared_segment,
            lambda: bindings.announce(Role.AGENT),
            lambda: AgentFactory().build(bindings.session_id, SessionOwned(bindings)),
        ):
            with pytest.raises(EpochSealed):
                use()
    token = bindings.to_token()
    bindings.close()
    bindings.close()
    with pytest.raises(BindingsClosed):
        bindings.ops_lifecycle.active_count()
    return token


def test_the_first_use_raises_what_an_attach_does(reset: Reset) -> None:
    with start(use_twice, reset.old, method="spawn") as child:
        assert child.result() == reset.old.to_token()
    here = pickle.loads(pickle.dumps(reset.old))  # the old ones were closed with their epoch
    with pytest.raises(EpochSealed):
        here.ops_lifecycle.active_count()


def count_active(bindings: SessionRuntimeBindings) -> int:
    return bindings.ops_lifecycle.active_count()


POOLS = ("fork", "spawn", "forkserver")


@pytest.mark.parametrize("method", POOLS)
def test_stale_bindings_fail_their_task_and_not_the_pool(reset: Reset, method: str) -> None:
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(1, mp_context=context) as executor:
        tasks = [executor.submit(count_active, each) for each in reset]
        with pytest.raises(EpochSealed) as sealed:
            tasks[0].result(60)
        assert sealed.value.epoch_id == reset.old.epoch_id
        assert tasks[1].result(60) == 0
    with context.Pool(1) as pool:
        results = [pool.apply_async(count_active, (each,)) for each in reset]
        with pytest.raises(EpochSealed):
            results[0].get(20)
        assert results[1].get(20) == 0


def take_from(queue: multiprocessing.Queue[object], answers: multiprocessing.Queue[object]) -> None:
    """Use each of the bindings from a queue; those behind stale ones arrive, too."""
    while isinstance(bindings := queue.get(), SessionRuntimeBindings):
        try:
            answers.put(bindings.ops_lifecycle.active_count())
        except (EpochSealed, EpochGone) as error:
            answers.put(type(error))


@pytest.mark.parametrize("method", POOLS)
def test_stale_bindings_in_a_queue(
    adapter: RuntimeSessionAdapter, reset: Reset, method: str
) -> None:
    gone = adapter.prepare_bindings(SessionId.new())
    adapter.unregister_session(gone.session_id)
    context: Any = multiprocessing.get_context(method)
    queue, answers = context.Queue(), context.Queue()
    taker = context.Process(target=take_from, args=(queue, answers))
    taker.start()
    for one in (reset.old, gone, reset.fresh, None):
        queue.put(one)
    assert [answers.get(timeout=60) for _ in range(3)] == [EpochSealed, EpochGone, 0]
    taker.join()
    for each in (queue, answers):
        each.close()
        each.join_thread()
