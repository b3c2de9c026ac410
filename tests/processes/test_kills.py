"""Processes killed in the middle of their work: the others go on, and nothing is lost."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from contextlib import ExitStack

import pytest

from shmepoch import (
    AgentFactory,
    Completed,
    CompletionEntry,
    Continuation,
    EpochCursorSnapshot,
    OperationId,
    OperationKind,
    OperationStatus,
    Role,
    RunId,
    RuntimeLoop,
    RuntimeSessionAdapter,
    SessionId,
    SessionOwned,
    SessionRuntimeBindings,
    Terminated,
)
from tests.processes.children import METHODS, Channel, Child, start, wait_until
from tests.processes.workloads import obeys_the_feed, one_entry_each, work_for_ever
from tests.support import eventually, held_writer, result, spec


def beyond(bindings: SessionRuntimeBindings, position: int) -> None:
    """Wait until the feed is above `position`."""
    bindings.ops_lifecycle.completion_feed().wait_for_advance(position, 60)


@pytest.mark.parametrize("seed", range(3))
def test_workers_killed_at_random_leave_a_sound_epoch(
    bindings: SessionRuntimeBindings, seed: int
) -> None:
    random_ = random.Random(seed)
    registry = bindings.ops_lifecycle
    feed = registry.completion_feed()
    position = 0
    kept: list[CompletionEntry] = []
    with ExitStack() as stack:

        def worker(number: int) -> Child:
            child = stack.enter_context(start(work_for_ever, bindings, seed * 1000 + number))
            assert child.hear() == "working"
            return child

        workers = [worker(number) for number in range(4)]
        for kill in range(12):
            beyond(bindings, feed.watermark() + random_.randrange(1, 60))
            workers.pop(random_.randrange(len(workers))).kill()
            batch = feed.list_since(position)
            obeys_the_feed(batch, position)
            kept += batch.entries
            position = batch.watermark
            registry.check()
            workers.append(worker(4 + kill))
        before = feed.watermark()
        beyond(bindings, before + 20)  # the last ones go on
        for child in workers:
            assert child.silent, child.hear()
            child.kill()
    # The runtime has ended all running operations and cleared the dead.
    eventually(lambda: registry.active_count() == 0)
    eventually(lambda: [one.pid for one in bindings.participants()] == [os.getpid()])
    batch = feed.list_since(position)
    obeys_the_feed(batch, position)
    one_entry_each([*kept, *batch.entries])


def run_some(bindings: SessionRuntimeBindings, test: Channel, ids: list[OperationId]) -> None:
    """Run operations, one of each kind of life, until killed."""
    registry = bindings.ops_lifecycle
    for id in ids:
        registry.register_operation(spec(id=id))
    for id in ids[1:]:
        registry.provisioning_succeeded(id)
    registry.request_retire(ids[2])
    test.say("running")
    test.hear()


@pytest.mark.parametrize("method", ["fork", "subprocess"])
def test_what_a_killed_worker_ran_is_terminated_in_the_feed(
    bindings: SessionRuntimeBindings, method: str
) -> None:
    registry = bindings.ops_lifecycle
    mine = OperationId.new()
    registry.register_operation(spec("the runtime's", id=mine))
    ids, others = [[OperationId.new() for _ in range(3)] for _ in range(2)]
    with (
        start(run_some, bindings, ids, method=method) as doomed,
        start(run_some, bindings, others, method=method) as survivor,
    ):
        for child in doomed, survivor:
            assert child.hear() == "running"
        watch = registry.register_watcher(ids[1])
        doomed.kill()
        outcome = watch.wait(60)
        assert isinstance(outcome, Terminated)
        assert f"worker process {doomed.pid}" in outcome.reason
        # One commit for all of them, in the order of their registration, and no others.
        batch = registry.completion_feed().list_since(0)
        assert [entry.operation_id for entry in batch.entries] == ids
        assert {entry.terminal_outcome for entry in batch.entries} == {outcome}
        for id in (mine, *others):
            operation = registry.snapshot(id)
            assert operation is not None
            assert not operation.status.is_terminal
        eventually(lambda: doomed.pid not in {one.pid for one in bindings.participants()})


def leave_running(bindings: SessionRuntimeBindings, test: Channel, id: OperationId) -> None:
    """Leave regularly, but with an operation running."""
    bindings.ops_lifecycle.register_operation(spec(id=id))
    bindings.ops_lifecycle.provisioning_succeeded(id)
    bindings.close()


def test_what_somebody_ran_who_left_is_terminated(bindings: SessionRuntimeBindings) -> None:
    id = OperationId.new()
    with start(leave_running, bindings, id) as child:
        child.result()
        eventually(lambda: bindings.ops_lifecycle.active_count() == 0)
    [entry] = bindings.ops_lifecycle.completion_feed().list_since(0).entries
    assert isinstance(entry.terminal_outcome, Terminated)


def watch_many(bindings: SessionRuntimeBindings, test: Channel, id: OperationId) -> None:
    """Watch an operation, several times, until killed."""
    watches = [bindings.ops_lifecycle.register_watcher(id) for _ in range(3)]
    test.say(len(watches))
    test.hear()


def test_a_killed_watcher_does_not_count(bindings: SessionRuntimeBindings) -> None:
    registry = bindings.ops_lifecycle
    id = OperationId.new()
    registry.register_operation(spec(id=id))

    def watchers() -> int:
        operation = registry.snapshot(id)
        assert operation is not None
        return operation.watcher_count

    with registry.register_watcher(id), start(watch_many, bindings, id) as child:
        child.hear()
        assert watchers() == 4
        child.kill()
        eventually(lambda: watchers() == 1)
    assert watchers() == 0


def watch_and_stop(
    bindings: SessionRuntimeBindings, test: Channel, ids: list[OperationId], way: str
) -> None:
    """Watch operations, be stopped until the test continues it, and send how they ended."""
    registry = bindings.ops_lifecycle
    if way == "watch":
        watches = [registry.register_watcher(id) for id in ids]
        os.kill(os.getpid(), signal.SIGSTOP)
        test.say([watch.wait(60) for watch in watches])
    elif way == "barrier":
        test.say([outcome for _, outcome in registry.wait_all(RunId.new(), ids, 60).outcomes])
    else:
        ended = asyncio.run(registry.all_ended(RunId.new(), ids))
        test.say([outcome for _, outcome in ended.outcomes])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("way", ["watch", "barrier", "awaited barrier"])
def test_a_stopped_watcher_gets_what_the_feed_has_dropped_since(
    bindings: SessionRuntimeBindings, method: str, way: str
) -> None:
    registry = bindings.ops_lifecycle
    ids = [OperationId.new() for _ in range(3)]
    registry.register_operations([spec(id=id) for id in ids])
    registry.start_operations(ids)
    with start(watch_and_stop, bindings, ids, way, method=method) as child:
        eventually(lambda: all(one.watcher_count == 1 for one in registry.list_operations()))
        if way != "watch":
            child.signal(signal.SIGSTOP)
        eventually(child.stopped)
        registry.complete_operations([result(id, "r" * 3_000) for id in ids])
        feed = registry.completion_feed()
        while feed.list_since(0).dropped_through < len(ids):
            others = [OperationId.new() for _ in range(100)]
            registry.register_operations([spec(id=id) for id in others])
            registry.start_operations(others)
            registry.complete_operations([result(id, "r" * 500) for id in others])
        child.signal(signal.SIGCONT)
        assert child.hear() == [Completed(result(id, "r" * 3_000)) for id in ids]
    registry.check()


# --- agents -----------------------------------------------------------------------------------


def tell(bindings: SessionRuntimeBindings, test: Channel) -> None:
    """An agent that sends its notices before it commits, and is killed at any moment."""
    boundary = AgentFactory().build(bindings.session_id, SessionOwned(bindings))
    feed = bindings.ops_lifecycle.completion_feed()
    test.say("built")
    while True:
        with boundary.drain() as notices:
            test.say([notice.seq for notice in notices])  # type: ignore[union-attr]
        feed.wait_for_advance(notices.watermark, 60)


@pytest.mark.parametrize("seed", range(2))
def test_agents_killed_at_random_are_told_of_everything(
    bindings: SessionRuntimeBindings, seed: int
) -> None:
    random_ = random.Random(seed)
    registry, cursor = bindings.ops_lifecycle, bindings.cursor_state.agent_applied_cursor
    due, told = set(), []

    def work(count: int) -> None:
        for _ in range(count):
            id = OperationId.new()
            kind = random_.choice(list(OperationKind))
            registry.register_operation(spec(kind=kind, id=id))
            registry.cancel_operation(id)
            if kind is OperationKind.BACKGROUND_TOOL_OP:
                due.add(registry.completion_feed().watermark())

    def reaches(position: int) -> None:
        eventually(lambda: cursor.load() >= position)

    def take(child: Child) -> None:
        try:
            while not child.silent:
                told.append(child.hear())
        except EOFError:
            pass  # killed, and all its messages received

    for _ in range(8):
        with start(tell, bindings) as child:
            assert child.hear() == "built"
            for _ in range(random_.randrange(1, 4)):
                work(random_.randrange(1, 15))
                watermark = registry.completion_feed().watermark()
                reaches(random_.randint(cursor.load(), watermark))
            child.kill()
            take(child)
            said = {seq for seqs in told for seq in seqs}
            assert {seq for seq in due if seq <= cursor.load()} <= said, "lost"
    with start(tell, bindings) as child:
        assert child.hear() == "built"
        watermark = registry.completion_feed().watermark()
        eventually(lambda: cursor.load() == watermark)
        child.kill()
        take(child)
    assert {seq for seqs in told for seq in seqs} == due


def test_an_agent_announces_itself(bindings: SessionRuntimeBindings) -> None:
    with start(tell, bindings, method="spawn") as child:
        child.hear()
        found = {one.pid: one.role for one in bindings.participants()}
        assert found == {os.getpid(): Role.RUNTIME, child.pid: Role.AGENT}
        child.kill()


def accept(bindings: None, test: Channel, namespace: str, session_id: SessionId) -> None:
    """A runtime whose session accepts a continuation, and that is killed before the turn comes."""
    with RuntimeSessionAdapter.ephemeral(namespace=namespace) as adapter:
        mine = adapter.prepare_bindings(session_id)
        id = OperationId.new()
        mine.ops_lifecycle.register_operation(spec(id=id))
        mine.ops_lifecycle.cancel_operation(id)
        with RuntimeLoop(mine, inject=lambda _: True, quiescent=lambda: True):
            wait_until(lambda: mine.cursor_state.runtime_observed_seq.load() == 1)
            test.say("accepted")
            test.hear()


def test_a_wake_that_a_killed_runtime_had_injected_comes_again(
    adapter: RuntimeSessionAdapter, namespace: str
) -> None:
    session_id = SessionId.new()
    with start(accept, None, namespace, session_id, method="spawn") as child:
        assert child.hear() == "accepted"
        child.kill()
    bindings = adapter.prepare_bindings(session_id)
    assert bindings.cursor_state.snapshot() == EpochCursorSnapshot(
        runtime_observed_seq=1, runtime_last_injected_seq=1
    )
    boundary = AgentFactory().build(session_id, SessionOwned(bindings))
    told: list[int] = []

    def inject(continuation: Continuation) -> bool:
        with boundary.drain() as notices:
            told.extend(notice.seq for notice in notices)  # type: ignore[union-attr]
        return True

    with RuntimeLoop(bindings, inject=inject, quiescent=lambda: True):
        eventually(lambda: told)
    assert told == [1]
    boundary.close()
    adapter.unregister_session(session_id)


# --- stopped ----------------------------------------------------------------------------------


def stop_in_a_transition(bindings: SessionRuntimeBindings, test: Channel) -> None:
    """Take the writer lock, stop, and go on with the transition when continued."""
    with held_writer(bindings.shared_segment()):
        os.kill(os.getpid(), signal.SIGSTOP)
    bindings.ops_lifecycle.register_operation(spec("after the stop"))
    test.say("went on")
    test.hear()


def transition(bindings: SessionRuntimeBindings, test: Channel, id: OperationId) -> None:
    """Make a transition, which waits for the writer lock."""
    test.say("now")
    bindings.ops_lifecycle.register_operation(spec("behind it", id=id))
    test.say("done")
    test.hear()


@pytest.mark.parametrize("then", ["killed", "continued"])
def test_a_writer_stopped_in_a_transition_holds_up_transitions_only(
    adapter: RuntimeSessionAdapter, bindings: SessionRuntimeBindings, then: str
) -> None:
    registry, cursors = bindings.ops_lifecycle, bindings.cursor_state
    id, blocked = OperationId.new(), OperationId.new()
    registry.register_operation(spec("before", id=id))
    registry.cancel_operation(id, "before")
    with (
        start(stop_in_a_transition, bindings) as writer,
        start(look_at_everything, bindings) as reader,
    ):
        eventually(writer.stopped)
        with start(transition, bindings, blocked) as waiting:
            assert waiting.hear() == "now"
            # Cursors, snapshots, lists, and waits, here and in another process.
            reader.say("look")
            assert reader.hear() == ([id], 1)
            assert cursors.agent_applied_cursor.load() == 1
            operation = registry.snapshot(id)
            assert operation is not None
            assert operation.status is OperationStatus.CANCELLED
            assert registry.completion_feed().wait_for_advance(0, 60) == 1
            with pytest.raises(TimeoutError):
                registry.completion_feed().wait_for_advance(1, 0.01)
            assert writer.stopped()
            assert waiting.silent, "two are inside a transition"
            assert registry.snapshot(blocked) is None
            if then == "killed":
                writer.kill()
            else:
                writer.signal(signal.SIGCONT)
                assert writer.hear() == "went on"
            assert waiting.hear() == "done"
            assert registry.snapshot(blocked) is not None
            registry.check()


def look_at_everything(bindings: SessionRuntimeBindings, test: Channel) -> None:
    """Read everything, on each request."""
    test.hear()
    feed = bindings.ops_lifecycle.completion_feed()
    bindings.cursor_state.agent_applied_cursor.advance(feed.watermark())
    bindings.cursor_state.snapshot()
    ids = [operation.id for operation in bindings.ops_lifecycle.list_operations()]
    test.say((ids, feed.list_since(0).watermark))


def finish(bindings: SessionRuntimeBindings, test: Channel, id: OperationId) -> None:
    """Run an operation to its end, with a stop in its middle."""
    registry = bindings.ops_lifecycle
    registry.register_operation(spec(id=id))
    registry.provisioning_succeeded(id)
    test.say("running")
    os.kill(os.getpid(), signal.SIGSTOP)
    registry.complete_operation(id, result(id))


def test_a_stopped_worker_is_not_taken_for_dead(bindings: SessionRuntimeBindings) -> None:
    id = OperationId.new()
    with start(finish, bindings, id) as child:
        assert child.hear() == "running"
        eventually(child.stopped)
        # A second worker's death is noticed, so the supervisor has polled both.
        ids = [OperationId.new() for _ in range(3)]
        with start(run_some, bindings, ids) as doomed:
            doomed.hear()
            doomed.kill()
        bindings.ops_lifecycle.register_watcher(ids[0]).wait(60)
        operation = bindings.ops_lifecycle.snapshot(id)
        assert operation is not None
        assert operation.status is OperationStatus.RUNNING
        child.signal(signal.SIGCONT)
        child.result()
    operation = bindings.ops_lifecycle.snapshot(id)
    assert operation is not None
    assert operation.status is OperationStatus.COMPLETED
