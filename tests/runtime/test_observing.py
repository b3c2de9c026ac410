"""Observing sessions from outside: observers read everything and change nothing."""

from __future__ import annotations

import asyncio
import copy
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias

import pytest

from shmepoch import (
    AgentFactory,
    BindingsClosed,
    BindingsNotTransferable,
    InMemoryRuntimeStore,
    NamespaceInvalid,
    ObserverReadOnly,
    OperationId,
    OpsLifecycleConfig,
    PersistenceChannel,
    Role,
    RunId,
    RuntimeOpsLifecycleRegistry,
    RuntimeSessionAdapter,
    SegmentForeign,
    SessionId,
    SessionNotFound,
    SessionOwned,
    SessionRuntimeBindings,
    list_sessions,
    observe_session,
    remove_unused,
)
from shmepoch._native import LOOP_BYTE, try_lock
from shmepoch.memory import removal
from shmepoch.memory.namespaces import segment_path
from tests.epoch.deadline import DEADLINE_S
from tests.epoch.operations import VERBS
from tests.processes.children import METHODS, Channel, start
from tests.runtime.completions import TOOL, end
from tests.support import names_in, spec


@pytest.fixture
def observer(bindings: SessionRuntimeBindings, namespace: str) -> Iterator[SessionRuntimeBindings]:
    """An observer of `bindings`, in the process of their runtime."""
    observer = observe_session(bindings.session_id)
    yield observer
    observer.close()


# --- reading ----------------------------------------------------------------------------------


def test_an_observer_reads_everything(
    bindings: SessionRuntimeBindings, observer: SessionRuntimeBindings
) -> None:
    id = OperationId.new()
    bindings.ops_lifecycle.register_operation(spec(id=id))
    end(bindings, TOOL)
    bindings.cursor_state.agent_applied_cursor.advance(1)
    assert (observer.session_id, observer.epoch_id) == (bindings.session_id, bindings.epoch_id)
    mine, theirs = observer.ops_lifecycle, bindings.ops_lifecycle
    assert mine.snapshot(id) == theirs.snapshot(id)
    assert mine.list_operations() == theirs.list_operations()
    assert mine.active_count() == 1
    assert mine.completion_feed().list_since(0) == theirs.completion_feed().list_since(0)
    assert observer.cursor_state.snapshot() == bindings.cursor_state.snapshot()
    assert observer.cursor_state.agent_applied_cursor.load() == 1
    assert list(observer.cursor_state.values) == [1, 0, 0]
    assert not observer.sealed
    assert observer.skipped == bindings.skipped
    assert [one.role for one in observer.participants()] == [Role.RUNTIME, Role.OBSERVER]
    assert observer.role is Role.OBSERVER


WAITS: dict[str, Callable[[SessionRuntimeBindings, OperationId], object]] = {
    "feed": lambda b, id: b.ops_lifecycle.completion_feed().wait_for_advance(0, DEADLINE_S),
    "awaited feed": lambda b, id: asyncio.run(_awaited(b)),
    "watch": lambda b, id: b.ops_lifecycle.register_watcher(id).wait(DEADLINE_S),
    "wait_all": lambda b, id: b.ops_lifecycle.wait_all(RunId.new(), [id], DEADLINE_S),
}


async def _awaited(bindings: SessionRuntimeBindings) -> int:
    return await bindings.ops_lifecycle.completion_feed().advanced(0)


@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS)
def test_an_observer_waits_like_others(
    bindings: SessionRuntimeBindings,
    observer: SessionRuntimeBindings,
    wait: Callable[[SessionRuntimeBindings, OperationId], object],
) -> None:
    id = OperationId.new()
    bindings.ops_lifecycle.register_operation(spec(id=id))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(wait, observer, id)
        bindings.ops_lifecycle.cancel_operation(id)
        assert waiting.result(DEADLINE_S)


def test_a_watch_of_an_observer_is_not_counted(
    bindings: SessionRuntimeBindings, observer: SessionRuntimeBindings
) -> None:
    id = OperationId.new()
    bindings.ops_lifecycle.register_operation(spec(id=id))

    def watchers() -> int:
        operation = bindings.ops_lifecycle.snapshot(id)
        assert operation is not None
        return operation.watcher_count

    with bindings.ops_lifecycle.register_watcher(id):
        with observer.ops_lifecycle.register_watcher(id):
            assert watchers() == 1
        assert watchers() == 1


def test_an_observer_sees_a_sealed_epoch(namespace: str) -> None:
    with RuntimeSessionAdapter.ephemeral(namespace=namespace) as adapter:
        bindings = adapter.prepare_bindings(SessionId.new())
        end(bindings, TOOL)
        bindings.shared_segment().seal()
        observer = adapter.observe_session(bindings.session_id)
        assert observer.sealed
        assert observer.ops_lifecycle.completion_feed().watermark() == 1
        observer.close()
        adapter.unregister_session(bindings.session_id)


def test_an_observer_of_an_adapter_with_a_store_has_its_history(namespace: str) -> None:
    store = InMemoryRuntimeStore()
    with RuntimeSessionAdapter.persistent(store, namespace=namespace) as adapter:
        bindings = adapter.prepare_bindings(SessionId.new())
        observer = adapter.observe_session(bindings.session_id)
        assert observer.history is store
        observer.close()
        adapter.unregister_session(bindings.session_id)


# --- changing nothing -------------------------------------------------------------------------


Change: TypeAlias = Callable[[SessionRuntimeBindings, OperationId], object]

CHANGES: dict[str, Change] = {
    "register_operation": lambda b, id: b.ops_lifecycle.register_operation(spec()),
    "register_operations": lambda b, id: b.ops_lifecycle.register_operations([spec(), spec()]),
    "start_operations": lambda b, id: b.ops_lifecycle.start_operations([id]),
    "terminate_and_seal": lambda b, id: b.ops_lifecycle.terminate_and_seal("over"),
    "terminate_where": lambda b, id: b.ops_lifecycle.terminate_where(lambda _: True, "over"),
    "collect_completed": lambda b, id: b.ops_lifecycle.collect_completed(),
    "check": lambda b, id: b.ops_lifecycle.check(),
    "mark_durable": lambda b, id: b.ops_lifecycle.completion_feed().mark_durable(1),
    "advance": lambda b, id: b.cursor_state.runtime_observed_seq.advance(1),
    "advance back": lambda b, id: b.cursor_state.runtime_observed_seq.advance(0),
    "compare_and_swap": lambda b, id: b.cursor_state.agent_applied_cursor.compare_and_swap(0, 1),
    "seal": lambda b, id: b.shared_segment().seal(),
    "unlink": lambda b, id: b.shared_segment().unlink(),
    "try_own": lambda b, id: b.shared_segment().try_own(),
    "announce": lambda b, id: b.announce(Role.WORKER),
    "claim": lambda b, id: b.claim(LOOP_BYTE),
    "agent": lambda b, id: AgentFactory().build(b.session_id, SessionOwned(b)).drain().commit(),
}


def _verb(act: Callable[[RuntimeOpsLifecycleRegistry, OperationId], object]) -> Change:
    return lambda b, id: act(b.ops_lifecycle, id)


CHANGES |= {str(action): _verb(act) for action, act in VERBS.items()}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_an_observer_changes_nothing(
    bindings: SessionRuntimeBindings,
    observer: SessionRuntimeBindings,
    change: Callable[[SessionRuntimeBindings, OperationId], object],
) -> None:
    id = OperationId.new()
    bindings.ops_lifecycle.register_operation(spec(id=id))
    end(bindings, TOOL)
    before = bytes(memoryview(bindings.shared_segment().memory))
    with pytest.raises(ObserverReadOnly) as refused:
        change(observer, id)
    assert refused.value.epoch_id == bindings.epoch_id
    assert bytes(memoryview(bindings.shared_segment().memory)) == before
    assert bindings.shared_segment().named


@pytest.mark.parametrize("transfer", [pickle.dumps, SessionRuntimeBindings.to_token])
def test_an_observers_bindings_stay_in_their_process(
    observer: SessionRuntimeBindings, transfer: Callable[[SessionRuntimeBindings], object]
) -> None:
    with pytest.raises(BindingsNotTransferable, match="observer"):
        transfer(observer)
    assert observer.handle is None
    assert copy.deepcopy(observer) is observer


def test_an_observer_and_the_runtime_of_a_process_have_attachments_of_their_own(
    adapter: RuntimeSessionAdapter,
    bindings: SessionRuntimeBindings,
    observer: SessionRuntimeBindings,
) -> None:
    assert observer is not bindings
    assert SessionRuntimeBindings.from_token(bindings.to_token()) is bindings
    assert adapter.prepare_bindings(bindings.session_id) is bindings
    again = observe_session(bindings.session_id)
    assert again is not observer
    again.close()
    with pytest.raises(BindingsClosed):
        again.ops_lifecycle.register_operation(spec())
    assert observer.ops_lifecycle.active_count() == 0
    end(bindings, TOOL)


def test_an_observer_that_came_first_is_not_handed_out(namespace: str) -> None:
    session_id = SessionId.new()
    with RuntimeSessionAdapter.ephemeral(namespace=namespace) as first:
        token = first.prepare_bindings(session_id).to_token()
    observer = observe_session(session_id)
    worker = SessionRuntimeBindings.from_token(token)
    assert worker is not observer
    with RuntimeSessionAdapter.ephemeral(namespace=namespace) as second:
        assert second.prepare_bindings(session_id) is worker, "looking keeps no runtime from it"
        end(worker, TOOL)
        assert observer.ops_lifecycle.completion_feed().watermark() == 1
        second.unregister_session(session_id)
    observer.close()


def test_an_observer_needs_no_participants_slot(namespace: str) -> None:
    config = OpsLifecycleConfig(max_participants=2)
    with RuntimeSessionAdapter.ephemeral(namespace=namespace, config=config) as adapter:
        bindings = adapter.prepare_bindings(SessionId.new())
        observers = [observe_session(bindings.session_id) for _ in range(3)]
        roles = [one.role for one in bindings.participants()]
        assert roles == [Role.RUNTIME, Role.OBSERVER]
        for observer in observers:
            assert observer.ops_lifecycle.active_count() == 0
            observer.close()
        assert [one.role for one in bindings.participants()] == [Role.RUNTIME]
        adapter.unregister_session(bindings.session_id)


def test_an_observer_leaves_the_dead_to_the_supervisor(namespace: str) -> None:
    config = OpsLifecycleConfig(max_participants=1)
    with RuntimeSessionAdapter.ephemeral(namespace=namespace, config=config) as adapter:
        bindings = adapter.prepare_bindings(SessionId.new())
        segment = bindings.shared_segment()
        died = segment.participant
        segment._descriptor.close()
        with observe_on(bindings.session_id) as observer:
            [one] = observer.participants()
            assert (one.key, one.alive) == (died, False)
    assert remove_unused(bindings.session_id)


class observe_on:
    def __init__(self, session_id: SessionId) -> None:
        self.bindings = observe_session(session_id)

    def __enter__(self) -> SessionRuntimeBindings:
        return self.bindings

    def __exit__(self, *exc: object) -> None:
        self.bindings.close()


def look(
    bindings: None, test: Channel, session_id: SessionId, namespace: str
) -> tuple[int, list[Role]]:
    # By name: a fork server has the environment of the test that started it.
    observer = observe_session(session_id, namespace=namespace)
    with pytest.raises(ObserverReadOnly):
        observer.ops_lifecycle.register_operation(spec())
    roles = [one.role for one in observer.participants()]
    watermark = observer.ops_lifecycle.completion_feed().watermark()
    observer.close()
    return watermark, roles


@pytest.mark.parametrize("method", METHODS)
def test_an_observer_in_another_process(
    bindings: SessionRuntimeBindings, namespace: str, method: str
) -> None:
    end(bindings, TOOL)
    with start(look, None, bindings.session_id, namespace, method=method) as child:
        assert child.result() == (1, [Role.RUNTIME, Role.OBSERVER])


def look_on(observer: SessionRuntimeBindings, test: Channel) -> list[Role]:
    for change in (
        lambda: observer.ops_lifecycle.register_operation(spec()),
        lambda: observer.cursor_state.agent_applied_cursor.advance(1),
    ):
        with pytest.raises(ObserverReadOnly):
            change()
    return [one.role for one in observer.participants()]


def test_an_observer_is_one_in_a_forked_child_too(
    bindings: SessionRuntimeBindings, observer: SessionRuntimeBindings
) -> None:
    with start(look_on, observer) as child:
        assert child.result() == [Role.RUNTIME, Role.OBSERVER, Role.OBSERVER]


def test_a_channel_does_not_follow_an_observer(observer: SessionRuntimeBindings) -> None:
    store = InMemoryRuntimeStore()
    with PersistenceChannel(store) as channel, pytest.raises(ObserverReadOnly):
        channel.follow(observer)
    assert list(store.sessions()) == []


# --- finding and removing ---------------------------------------------------------------------


def test_a_session_without_an_epoch_is_named(namespace: str) -> None:
    session_id = SessionId.new()
    with pytest.raises(SessionNotFound) as missing:
        observe_session(session_id)
    assert (missing.value.session_id, missing.value.namespace) == (session_id, namespace)
    assert isinstance(pickle.loads(pickle.dumps(missing.value)), SessionNotFound)


def test_sessions_are_listed_by_namespace(namespace: str) -> None:
    other = f"{namespace}-other"
    assert list_sessions() == []
    with (
        RuntimeSessionAdapter.ephemeral(namespace=namespace) as first,
        RuntimeSessionAdapter.ephemeral(namespace=other) as second,
    ):
        sessions = [first.prepare_bindings(SessionId.new()).session_id for _ in range(3)]
        elsewhere = second.prepare_bindings(SessionId.new()).session_id
        assert list_sessions() == list_sessions(namespace=namespace) == sessions
        assert list_sessions(namespace=other) == [elsewhere]
        observe_session(elsewhere, namespace=other).close()
        with pytest.raises(SessionNotFound):
            observe_session(elsewhere)
        second.unregister_session(elsewhere)
        for session_id in sessions:
            first.unregister_session(session_id)


@pytest.mark.parametrize(
    "call",
    [observe_session, remove_unused, lambda _, namespace: list_sessions(namespace=namespace)],
)
def test_a_namespace_is_a_word(call: Callable[..., object]) -> None:
    with pytest.raises(NamespaceInvalid):
        call(SessionId.new(), namespace="../etc")


def test_what_no_process_uses_is_removed_and_nothing_else(namespace: str) -> None:
    session_id = SessionId.new()
    assert not remove_unused(session_id)
    with RuntimeSessionAdapter.ephemeral(namespace=namespace) as adapter:
        adapter.register_session(session_id)
        assert not remove_unused(session_id)
        observer = observe_session(session_id)
    assert not remove_unused(session_id), "an observer looks at it"
    observer.close()
    assert remove_unused(session_id)
    assert names_in(namespace) == []


def test_a_damaged_segment_is_removed_too(namespace: str) -> None:
    session_id = SessionId.new()
    with RuntimeSessionAdapter.ephemeral(namespace=namespace) as adapter:
        adapter.register_session(session_id)
    segment_path(namespace, session_id).write_bytes(b"none of ours")
    assert remove_unused(session_id)
    assert list_sessions() == []


def test_a_name_that_is_another_files_by_now_is_left_alone(
    namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the check and before the removal, the unused segment was moved away and another was
    made."""
    session_id = SessionId.new()
    with RuntimeSessionAdapter.ephemeral(namespace=namespace) as adapter:
        adapter.register_session(session_id)
    path = segment_path(namespace, session_id)

    def lock_too_late(fd: int, byte: int, shared: bool) -> bool:
        path.rename(path.with_name("moved"))
        path.touch(0o600)
        monkeypatch.undo()
        return try_lock(fd, byte, shared)

    monkeypatch.setattr(removal, "try_lock", lock_too_late)
    assert not remove_unused(session_id, namespace=namespace)
    assert path.exists()
    path.unlink()
    path.with_name("moved").unlink()


def test_what_is_not_this_users_is_not_looked_at(namespace: str) -> None:
    session_id = SessionId.new()
    path = segment_path(namespace, session_id)
    path.touch(0o644)
    with pytest.raises(SegmentForeign):
        observe_session(session_id)
    with pytest.raises(SegmentForeign):
        remove_unused(session_id)
    path.unlink()


def test_a_failed_observation_leaves_nothing(
    bindings: SessionRuntimeBindings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(SessionRuntimeBindings, "__init__", fail)
        with pytest.raises(MemoryError):
            observe_session(bindings.session_id)
    assert [one.role for one in bindings.participants()] == [Role.RUNTIME]
