"""A segment's name is gone while processes have it attached: they notice it within a second.

A cleaner of temporary files removes the name, or all of shared memory is emptied. Later commits to
that memory reach only the attached processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable
from typing import Final

import pytest

from shmepoch import (
    AgentFactory,
    EpochGone,
    EpochSealed,
    InMemoryRuntimeStore,
    OperationId,
    OperationProgressUpdate,
    RunId,
    RuntimeLoop,
    RuntimeSessionAdapter,
    SessionId,
    SessionOwned,
    SessionRuntimeBindings,
    ShmepochError,
)
from shmepoch.config import OpsLifecycleConfig
from shmepoch.epoch.feed import SegmentFeed
from shmepoch.ids import RuntimeEpochId
from shmepoch.memory import doorbells
from shmepoch.memory.doorbells import Doorbells
from shmepoch.memory.segment import SharedSegment
from tests.epoch.deadline import DEADLINE_S, run
from tests.processes.children import Channel, start
from tests.support import empty_shared_memory, eventually, held_writer, result, spec

#: A transition checks the name again half a second after the last check.
LOOK_S: Final = 0.6


@pytest.fixture
def doomed(adapter: RuntimeSessionAdapter) -> SessionRuntimeBindings:
    """Bindings of a session that `adapter` runs, whose name will be gone."""
    return adapter.prepare_bindings(SessionId.new())


def running(bindings: SessionRuntimeBindings) -> OperationId:
    """An operation that runs."""
    id = OperationId.new()
    bindings.ops_lifecycle.register_operation(spec(id=id))
    bindings.ops_lifecycle.provisioning_succeeded(id)
    return id


def until_refused(act: Callable[[], object]) -> ShmepochError:
    """Repeat this until it is refused; returns the error."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            act()
        except (EpochGone, EpochSealed) as error:
            return error
    raise AssertionError("it was never refused")


def complete(bindings: SessionRuntimeBindings) -> None:
    id = running(bindings)
    bindings.ops_lifecycle.complete_operation(id, result(id))


def wait_at_a_barrier(bindings: SessionRuntimeBindings, id: OperationId) -> None:
    with contextlib.suppress(TimeoutError):
        bindings.ops_lifecycle.wait_all(RunId.new(), [id], 0)


def many(bindings: SessionRuntimeBindings) -> None:
    registry = bindings.ops_lifecycle
    specs = [spec() for _ in range(3)]
    registry.register_operations(specs)
    registry.start_operations([one.id for one in specs])
    registry.complete_operations([result(one.id) for one in specs])


#: Ways to change an epoch.
CHANGES: Final[dict[str, Callable[[SessionRuntimeBindings, OperationId], object]]] = {
    "complete": lambda bindings, id: complete(bindings),
    "several": lambda bindings, id: many(bindings),
    "progress": lambda bindings, id: bindings.ops_lifecycle.report_progress(
        id, OperationProgressUpdate(message="on")
    ),
    "watch": lambda bindings, id: bindings.ops_lifecycle.register_watcher(id).close(),
    "barrier": wait_at_a_barrier,
    "collect": lambda bindings, id: bindings.ops_lifecycle.collect_completed(),
    "terminate": lambda bindings, id: bindings.ops_lifecycle.terminate_owner("all"),
    "check": lambda bindings, id: bindings.ops_lifecycle.check(),
    "look": lambda bindings, id: bindings.shared_segment().require_name(),
}


def change(bindings: SessionRuntimeBindings, test: Channel, name: str) -> ShmepochError:
    """Change the epoch, be told that its name is gone, and change it until that is refused."""
    id = running(bindings)
    CHANGES[name](bindings, id)
    test.say("changed")
    test.hear()
    return until_refused(lambda: CHANGES[name](bindings, id))


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_refused(namespace: str, name: str) -> None:
    """In a process without other notification: its runtime was killed."""
    session_id = SessionId.new()
    with RuntimeSessionAdapter.ephemeral(namespace=namespace) as adapter:
        token = adapter.prepare_bindings(session_id).to_token()
    bindings = SessionRuntimeBindings.from_token(token)
    with start(change, bindings, name) as child:
        assert child.hear() == "changed"
        empty_shared_memory(namespace)
        child.say("gone")
        refused = child.result()
    assert isinstance(refused, EpochGone)
    assert (refused.session_id, refused.epoch_id) == (session_id, bindings.epoch_id)
    # The shared memory says that the epoch is gone: from now on everything is refused.
    assert not bindings.sealed
    assert bindings.ended
    for refuse in (
        lambda: bindings.ops_lifecycle.register_operation(spec()),
        lambda: bindings.cursor_state.agent_applied_cursor.advance(1),
        lambda: bindings.ops_lifecycle.completion_feed().wait_for_advance(2**63, 20),
        lambda: bindings.shared_segment().seal(),
        lambda: AgentFactory().build(session_id, SessionOwned(bindings)),
        lambda: SessionRuntimeBindings.from_token(token),
    ):
        with pytest.raises(EpochGone):
            refuse()
    bindings.ops_lifecycle.list_operations()
    bindings.close()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_those_that_wait_come_free(
    doomed: SessionRuntimeBindings, namespace: str, method: str
) -> None:
    """Threads, coroutines and loops, here and elsewhere, while the runtime lives."""
    id = running(doomed)
    feed = doomed.ops_lifecycle.completion_feed()
    watch = doomed.ops_lifecycle.register_watcher(id)
    found: list[BaseException] = []

    def note(act: Callable[[], object]) -> None:
        try:
            act()
        except BaseException as error:
            found.append(error)

    waits = (
        lambda: feed.wait_for_advance(feed.watermark(), 60),
        lambda: watch.wait(60),
        lambda: doomed.ops_lifecycle.wait_all(RunId.new(), [id], 60),
        lambda: run(advanced(feed)),
    )
    threads = [threading.Thread(target=note, args=[wait]) for wait in waits]
    loop = RuntimeLoop(doomed, inject=lambda _: True, quiescent=lambda: True).start()
    for thread in threads:
        thread.start()
    with start(wait_here, doomed, method=method) as child:
        assert child.hear() == "waiting"
        empty_shared_memory(namespace)
        with pytest.raises(EpochGone):
            child.result()
    for thread in threads:
        thread.join(60)
    assert [type(error) for error in found] == [EpochGone] * len(waits)
    loop.stop()


def test_who_notices_it_wakes_those_that_wait(
    doomed: SessionRuntimeBindings, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They do not have to poll by themselves."""
    monkeypatch.setattr(doorbells, "_RECHECK_NS", 10 * round(DEADLINE_S * 1e9))
    listening = Doorbells.of(namespace)

    async def wait() -> None:
        waiting = asyncio.ensure_future(advanced(doomed.ops_lifecycle.completion_feed()))
        await asyncio.sleep(0)
        eventually(lambda: listening._fd is not None)
        doomed.shared_segment().path.unlink()
        with pytest.raises(EpochGone):
            doomed.shared_segment().require_name()
        with pytest.raises(EpochGone):
            await waiting

    try:
        run(wait())
    finally:
        listening.stop()


async def advanced(feed: SegmentFeed) -> None:
    await feed.advanced(feed.watermark())


def wait_here(bindings: SessionRuntimeBindings, test: Channel) -> None:
    feed = bindings.ops_lifecycle.completion_feed()

    async def wait() -> None:
        waiting = asyncio.ensure_future(advanced(feed))
        await asyncio.sleep(0)
        test.say("waiting")
        await waiting

    run(wait())


def keep_changing(change: Callable[[], object]) -> None:
    """Repeat a change for longer than the interval of name checks."""
    end = time.monotonic() + LOOK_S
    while time.monotonic() < end:
        change()


def test_the_end_of_an_epoch_is_not_its_loss(
    adapter: RuntimeSessionAdapter, doomed: SessionRuntimeBindings
) -> None:
    """The process that ends an epoch removes its name, too."""
    segment = doomed.shared_segment()
    other = SharedSegment.attach_epoch(
        segment.namespace, segment.session_id, segment.epoch_id, segment.witness
    )
    fresh = adapter.reset_session(doomed.session_id)

    def enter() -> None:
        with held_writer(other):
            assert other.sealed

    keep_changing(enter)
    with pytest.raises(EpochSealed):
        raise other.closed_error()
    other.require_name()
    other.close()
    keep_changing(lambda: complete(fresh))
    adapter.unregister_session(doomed.session_id)
    with pytest.raises(EpochSealed):
        complete(fresh)


def test_a_segment_that_has_no_name_yet_is_not_gone(namespace: str) -> None:
    """Such as during a recovery."""
    segment = SharedSegment.allocate(
        namespace,
        OpsLifecycleConfig(),
        session_id=SessionId.new(),
        epoch_id=RuntimeEpochId.new(),
    )
    bindings = SessionRuntimeBindings.of_segment(segment)
    bindings.announce(bindings.role or pytest.fail("it is shared"))
    keep_changing(lambda: complete(bindings))
    segment.publish()
    complete(bindings)
    segment.path.unlink()
    assert isinstance(until_refused(lambda: complete(bindings)), EpochGone)
    bindings.close()


def test_its_runtime_can_be_rid_of_it(
    adapter: RuntimeSessionAdapter, doomed: SessionRuntimeBindings, namespace: str
) -> None:
    running(doomed)
    empty_shared_memory(namespace)
    adapter.unregister_session(doomed.session_id)
    fresh = adapter.prepare_bindings(doomed.session_id)
    assert fresh.epoch_id != doomed.epoch_id
    complete(fresh)
    adapter.unregister_session(doomed.session_id)


def test_other_epochs_are_looked_after_all_the_same(
    adapter: RuntimeSessionAdapter, bindings: SessionRuntimeBindings, doomed: SessionRuntimeBindings
) -> None:
    doomed.shared_segment().path.unlink()
    eventually(lambda: doomed.ended)
    with start(be_killed, bindings) as child:
        id = child.hear()
        child.kill()
    bindings.ops_lifecycle.register_watcher(id).wait(60)


def be_killed(bindings: SessionRuntimeBindings, test: Channel) -> None:
    test.say(running(bindings))
    test.hear()


# --- recovered in other memory --------------------------------------------------------------------


@pytest.fixture
def store() -> InMemoryRuntimeStore:
    return InMemoryRuntimeStore()


def leave_to_the_store(namespace: str, store: InMemoryRuntimeStore, session_id: SessionId) -> str:
    """Run a session in which an operation completes; returns the token of its epoch."""
    with RuntimeSessionAdapter.persistent(store, namespace=namespace) as adapter:
        bindings = adapter.prepare_bindings(session_id)
        complete(bindings)
        return bindings.to_token()


def test_bindings_of_the_old_memory_are_not_those_of_the_recovered_epoch(
    namespace: str, store: InMemoryRuntimeStore
) -> None:
    session_id = SessionId.new()
    token = leave_to_the_store(namespace, store, session_id)
    old = SessionRuntimeBindings.from_token(token)
    empty_shared_memory(namespace)
    with RuntimeSessionAdapter.persistent(store, namespace=namespace) as adapter:
        new = adapter.prepare_bindings(session_id)
        assert new.epoch_id == old.epoch_id
        assert new is not old
        assert new.shared_segment().path.exists()
        assert SessionRuntimeBindings.from_token(new.to_token()) is new
        with pytest.raises(EpochGone):
            SessionRuntimeBindings.from_token(token)
        with start(complete_there, new, method="spawn") as child:
            id = child.result()
        assert new.ops_lifecycle.snapshot(id) is not None
        assert isinstance(until_refused(lambda: complete(old)), EpochGone)
        old.close()
        assert SessionRuntimeBindings.from_token(new.to_token()) is new
        complete(new)
        adapter.unregister_session(session_id)


def complete_there(bindings: SessionRuntimeBindings, test: Channel) -> OperationId:
    id = running(bindings)
    bindings.ops_lifecycle.complete_operation(id, result(id))
    return id


def use_when_told(bindings: SessionRuntimeBindings, test: Channel) -> None:
    test.say("here")
    test.hear()
    complete(bindings)


def test_a_child_that_was_forked_before_does_not_attach_to_the_recovered_epoch(
    namespace: str, store: InMemoryRuntimeStore
) -> None:
    """It still has the old memory, and would write there under the locks of the new one."""
    session_id = SessionId.new()
    old = SessionRuntimeBindings.from_token(leave_to_the_store(namespace, store, session_id))
    with start(use_when_told, old) as child:
        assert child.hear() == "here"
        empty_shared_memory(namespace)
        with RuntimeSessionAdapter.persistent(store, namespace=namespace) as adapter:
            new = adapter.prepare_bindings(session_id)
            child.say("use")
            with pytest.raises(EpochGone):
                child.result()
            assert len(new.participants()) == 1
            adapter.unregister_session(session_id)
    old.close()
