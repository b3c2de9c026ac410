"""The session adapter: it makes epochs, finds them again, and ends them."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import threading
from collections.abc import Callable
from typing import Any

import pytest

from shmepoch import (
    AdapterClosed,
    BindingsClosed,
    EpochCursorSnapshot,
    EpochGone,
    EpochSealed,
    NamespaceInvalid,
    OperationId,
    OpsLifecycleConfig,
    Role,
    RunId,
    RuntimeAlreadyActive,
    RuntimeSessionAdapter,
    SessionId,
    SessionNotRegistered,
    SessionRuntimeBindings,
    Terminated,
)
from shmepoch.memory.namespaces import list_sessions, segment_path
from shmepoch.memory.segment import SharedSegment
from tests.processes.children import Channel, start
from tests.runtime.completions import TOOL, end
from tests.support import eventually, names_in, spec

# --- preparing --------------------------------------------------------------------------------


def test_preparing_is_idempotent(adapter: RuntimeSessionAdapter) -> None:
    session_id = SessionId.new()
    assert not adapter.contains_session(session_id)
    first = adapter.prepare_bindings(session_id)
    assert adapter.contains_session(session_id)
    adapter.register_session(session_id)
    assert adapter.prepare_bindings(session_id) is first
    assert adapter.ops_lifecycle_registry(session_id) is first.ops_lifecycle
    assert first.session_id == session_id
    assert first.role is Role.RUNTIME
    adapter.unregister_session(session_id)


def test_preparing_after_registering_is_the_same(adapter: RuntimeSessionAdapter) -> None:
    session_id = SessionId.new()
    adapter.register_session(session_id)
    adapter.register_session(session_id)
    registry = adapter.ops_lifecycle_registry(session_id)
    end(adapter.prepare_bindings(session_id), TOOL)
    assert registry.completion_feed().watermark() == 1
    assert adapter.prepare_bindings(session_id).ops_lifecycle is registry
    adapter.unregister_session(session_id)


def test_threads_that_prepare_at_once_get_the_same(adapter: RuntimeSessionAdapter) -> None:
    session_id, barrier = SessionId.new(), threading.Barrier(8)
    got: list[SessionRuntimeBindings] = []

    def prepare() -> None:
        barrier.wait()
        got.append(adapter.prepare_bindings(session_id))

    threads = [threading.Thread(target=prepare) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 8
    assert len(set(map(id, got))) == 1
    adapter.unregister_session(session_id)


def test_sessions_have_nothing_in_common(adapter: RuntimeSessionAdapter) -> None:
    first, second = (adapter.prepare_bindings(SessionId.new()) for _ in range(2))
    end(first, TOOL)
    first.cursor_state.agent_applied_cursor.advance(9)
    assert first.epoch_id != second.epoch_id
    assert second.ops_lifecycle.list_operations() == []
    assert second.ops_lifecycle.completion_feed().watermark() == 0
    assert second.cursor_state.snapshot() == EpochCursorSnapshot()
    for bindings in (first, second):
        adapter.unregister_session(bindings.session_id)


def test_an_epoch_has_the_size_that_was_asked_for(namespace: str) -> None:
    config = OpsLifecycleConfig(max_completed=3, max_operations=5, feed_bytes=16 * 1024)
    with RuntimeSessionAdapter.ephemeral(namespace=namespace, config=config) as adapter:
        bindings = adapter.prepare_bindings(SessionId.new())
        segment = bindings.shared_segment()
        assert segment.layout.config == config
        assert segment.path.stat().st_size == segment.layout.size
        adapter.unregister_session(bindings.session_id)


def test_namespaces_keep_deployments_apart(namespace: str) -> None:
    session_id, other = SessionId.new(), f"{namespace}-other"
    with (
        RuntimeSessionAdapter.ephemeral(namespace=namespace) as first,
        RuntimeSessionAdapter.ephemeral(namespace=other) as second,
    ):
        bindings = first.prepare_bindings(session_id)
        others = second.prepare_bindings(session_id)
        assert bindings.epoch_id != others.epoch_id
        assert list(list_sessions(namespace)) == list(list_sessions(other)) == [session_id]
        first.unregister_session(session_id)
        assert list(list_sessions(other)) == [session_id]
        second.unregister_session(session_id)


def test_the_environment_names_the_namespace(
    namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHMEPOCH_NAMESPACE", namespace)
    with RuntimeSessionAdapter.ephemeral() as adapter:
        bindings = adapter.prepare_bindings(SessionId.new())
        assert bindings.handle is not None
        assert bindings.handle.namespace == namespace
        adapter.unregister_session(bindings.session_id)
    monkeypatch.setenv("SHMEPOCH_NAMESPACE", "not a word")
    with pytest.raises(NamespaceInvalid, match="SHMEPOCH_NAMESPACE"):
        RuntimeSessionAdapter.ephemeral()


# --- reset ------------------------------------------------------------------------------------


def waits(bindings: SessionRuntimeBindings) -> dict[str, Callable[[], object]]:
    """Every way to wait for an epoch."""
    registry = bindings.ops_lifecycle
    feed, id = registry.completion_feed(), OperationId.new()
    registry.register_operation(spec(id=id))
    watch = registry.register_watcher(id)
    awaited = registry.register_watcher(id)

    async def await_(something: Any) -> object:
        return await something

    return {
        "wait_for_advance": lambda: feed.wait_for_advance(0, 60),
        "advanced": lambda: asyncio.run(await_(feed.advanced(0))),
        "watch": lambda: watch.wait(60),
        "awaited watch": lambda: asyncio.run(await_(awaited)),
        "wait_all": lambda: registry.wait_all(RunId.new(), [id], 60),
    }


def test_a_reset_wakes_everybody_who_waits(adapter: RuntimeSessionAdapter) -> None:
    session_id = SessionId.new()
    old = adapter.prepare_bindings(session_id)
    woken: dict[str, object] = {}

    def wait(name: str, wait: Callable[[], object]) -> None:
        try:
            woken[name] = wait()
        except EpochSealed as error:
            woken[name] = error.epoch_id

    ways = waits(old)
    threads = [threading.Thread(target=wait, args=way) for way in ways.items()]
    for thread in threads:
        thread.start()
    new = adapter.reset_session(session_id)
    for thread in threads:
        thread.join(60)
    assert woken == dict.fromkeys(ways, old.epoch_id)
    assert new.epoch_id != old.epoch_id
    adapter.unregister_session(session_id)


def wait_in_another_process(bindings: SessionRuntimeBindings, test: Channel) -> None:
    bindings.participants()
    test.say("waiting")
    bindings.ops_lifecycle.completion_feed().wait_for_advance(0, 60)


def test_a_reset_wakes_other_processes(adapter: RuntimeSessionAdapter) -> None:
    session_id = SessionId.new()
    old = adapter.prepare_bindings(session_id)
    with start(wait_in_another_process, old) as child:
        assert child.hear() == "waiting"
        adapter.reset_session(session_id)
        with pytest.raises(EpochSealed) as sealed:
            child.result()
    assert sealed.value.epoch_id == old.epoch_id
    adapter.unregister_session(session_id)


def test_after_a_reset_everything_is_fresh(adapter: RuntimeSessionAdapter, namespace: str) -> None:
    session_id = SessionId.new()
    old = adapter.prepare_bindings(session_id)
    end(old, TOOL)
    old.cursor_state.agent_applied_cursor.advance(1)
    new = adapter.reset_session(session_id)
    assert adapter.prepare_bindings(session_id) is new
    assert adapter.ops_lifecycle_registry(session_id) is new.ops_lifecycle
    assert new.cursor_state.snapshot() == EpochCursorSnapshot()
    assert new.ops_lifecycle.list_operations() == []
    assert end(new, TOOL) == [1]
    # The old epoch can be read, and refuses changes.
    assert old.sealed
    assert old.ops_lifecycle.completion_feed().list_since(0).watermark == 1
    assert old.cursor_state.snapshot().agent_applied_cursor == 1
    for change in (
        lambda: old.cursor_state.agent_applied_cursor.advance(2),
        lambda: old.cursor_state.agent_applied_cursor.compare_and_swap(1, 2),
        lambda: old.ops_lifecycle.register_operation(spec()),
        lambda: old.ops_lifecycle.terminate_owner("late"),
        lambda: SessionRuntimeBindings.from_token(old.to_token()),
    ):
        with pytest.raises(EpochSealed):
            change()
    assert names_in(namespace) == [new.shared_segment().name]
    adapter.unregister_session(session_id)


# --- unregister -------------------------------------------------------------------------------


def test_unregistering_ends_what_runs_and_removes_the_segment(
    adapter: RuntimeSessionAdapter, namespace: str
) -> None:
    session_id = SessionId.new()
    bindings = adapter.prepare_bindings(session_id)
    ids = [OperationId.new() for _ in range(3)]
    for id in ids:
        bindings.ops_lifecycle.register_operation(spec(id=id))
    bindings.ops_lifecycle.provisioning_succeeded(ids[1])
    adapter.unregister_session(session_id)
    batch = bindings.ops_lifecycle.completion_feed().list_since(0)
    assert [entry.operation_id for entry in batch.entries] == ids
    assert all(isinstance(entry.terminal_outcome, Terminated) for entry in batch.entries)
    assert bindings.sealed
    assert names_in(namespace) == []
    assert not adapter.contains_session(session_id)
    with pytest.raises((EpochGone, EpochSealed)):
        SessionRuntimeBindings.from_token(bindings.to_token())


def test_a_session_that_is_not_registered_is_named(adapter: RuntimeSessionAdapter) -> None:
    session_id = SessionId.new()
    for call in (
        adapter.reset_session,
        adapter.unregister_session,
        adapter.ops_lifecycle_registry,
    ):
        with pytest.raises(SessionNotRegistered) as missing:
            call(session_id)
        assert missing.value.session_id == session_id


def test_a_session_comes_back_as_a_new_epoch(adapter: RuntimeSessionAdapter) -> None:
    session_id = SessionId.new()
    first = adapter.prepare_bindings(session_id).epoch_id
    adapter.unregister_session(session_id)
    assert adapter.prepare_bindings(session_id).epoch_id != first
    adapter.unregister_session(session_id)


def test_a_session_that_was_reset_while_somebody_held_the_old_epoch(
    adapter: RuntimeSessionAdapter, namespace: str
) -> None:
    """Removing the old epoch's attachment does not touch the new one's name."""
    session_id = SessionId.new()
    adapter.register_session(session_id)
    held = SharedSegment.attach(namespace, session_id)
    new = adapter.reset_session(session_id)
    held.unlink()
    assert names_in(namespace) == [new.shared_segment().name]
    held.close()
    adapter.unregister_session(session_id)


# --- closing ----------------------------------------------------------------------------------


def test_closing_leaves_the_segments_for_the_next_adapter(namespace: str) -> None:
    session_id = SessionId.new()
    with RuntimeSessionAdapter.ephemeral(namespace=namespace) as first:
        bindings = first.prepare_bindings(session_id)
        token = bindings.to_token()
        end(bindings, TOOL)
        bindings.cursor_state.agent_applied_cursor.advance(1)
    assert names_in(namespace) == [segment_path(namespace, session_id).name]
    with pytest.raises(BindingsClosed):
        bindings.ops_lifecycle.register_operation(spec())
    with RuntimeSessionAdapter.ephemeral(namespace=namespace) as second:
        again = second.prepare_bindings(session_id)
        assert again.to_token() == token
        assert again.cursor_state.snapshot() == EpochCursorSnapshot(agent_applied_cursor=1)
        assert again.ops_lifecycle.completion_feed().watermark() == 1
        assert [one.is_self for one in again.participants()] == [True]
        second.unregister_session(session_id)


def test_a_closed_adapter_says_so(adapter: RuntimeSessionAdapter) -> None:
    adapter.close()
    adapter.close()
    for call in (
        adapter.prepare_bindings,
        adapter.register_session,
        adapter.reset_session,
        adapter.unregister_session,
        adapter.ops_lifecycle_registry,
    ):
        with pytest.raises(AdapterClosed):
            call(SessionId.new())
    assert not adapter.contains_session(SessionId.new())


def test_an_adapter_without_sessions_starts_nothing(namespace: str) -> None:
    threads = threading.active_count()
    with RuntimeSessionAdapter.ephemeral(namespace=namespace):
        assert threading.active_count() == threads
        assert names_in(namespace) == []


def test_closing_waits_for_what_is_in_progress(namespace: str) -> None:
    """A close that races with preparing leaves no thread and no lock behind."""
    for _ in range(20):
        adapter = RuntimeSessionAdapter.ephemeral(namespace=namespace)
        session_id, barrier = SessionId.new(), threading.Barrier(2)

        def prepare(
            adapter: RuntimeSessionAdapter, session_id: SessionId, barrier: threading.Barrier
        ) -> None:
            barrier.wait()
            with contextlib.suppress(AdapterClosed):
                adapter.prepare_bindings(session_id)

        thread = threading.Thread(target=prepare, args=(adapter, session_id, barrier))
        thread.start()
        barrier.wait()
        adapter.close()
        thread.join()
        with RuntimeSessionAdapter.ephemeral(namespace=namespace) as other:
            other.prepare_bindings(session_id)  # the runtime's lock was released
            other.unregister_session(session_id)


# --- finding existing epochs ------------------------------------------------------------------


def test_two_adapters_of_a_process_are_not_both_the_runtime(
    adapter: RuntimeSessionAdapter, bindings: SessionRuntimeBindings, namespace: str
) -> None:
    with (
        RuntimeSessionAdapter.ephemeral(namespace=namespace) as second,
        pytest.raises(RuntimeAlreadyActive) as active,
    ):
        second.prepare_bindings(bindings.session_id)
    assert (active.value.session_id, active.value.pid) == (bindings.session_id, os.getpid())
    # The refusal did not affect the first.
    assert bindings.role is Role.RUNTIME
    end(bindings, TOOL)


def test_a_sealed_segment_that_was_left_is_replaced(namespace: str) -> None:
    session_id = SessionId.new()
    with RuntimeSessionAdapter.ephemeral(namespace=namespace) as first:
        old = first.prepare_bindings(session_id)
        old.shared_segment().seal()  # and nothing else: as if it had been killed in a reset
    with RuntimeSessionAdapter.ephemeral(namespace=namespace) as second:
        new = second.prepare_bindings(session_id)
        assert new.epoch_id != old.epoch_id
        assert not new.sealed
        assert end(new, TOOL) == [1]
        assert names_in(namespace) == [new.shared_segment().name]
        second.unregister_session(session_id)


def test_a_worker_in_the_same_process_becomes_the_runtime(namespace: str) -> None:
    session_id = SessionId.new()
    with RuntimeSessionAdapter.ephemeral(namespace=namespace) as first:
        token = first.prepare_bindings(session_id).to_token()
    worker = SessionRuntimeBindings.from_token(token)
    assert [one.role for one in worker.participants()] == [Role.WORKER]
    with RuntimeSessionAdapter.ephemeral(namespace=namespace) as second:
        assert second.prepare_bindings(session_id) is worker
        assert worker.role is Role.RUNTIME
        assert [one.role for one in worker.participants()] == [Role.RUNTIME]
        second.unregister_session(session_id)


def test_what_ran_in_a_killed_runtime_is_ended_before_anybody_gets_the_bindings(
    namespace: str,
) -> None:
    session_id, id = SessionId.new(), OperationId.new()
    first = RuntimeSessionAdapter.ephemeral(namespace=namespace)
    bindings = first.prepare_bindings(session_id)
    bindings.ops_lifecycle.register_operation(spec(id=id))
    first.close()
    with RuntimeSessionAdapter.ephemeral(namespace=namespace) as second:
        again = second.prepare_bindings(session_id)
        [entry] = again.ops_lifecycle.completion_feed().list_since(0).entries
        assert entry.operation_id == id
        assert isinstance(entry.terminal_outcome, Terminated)
        second.unregister_session(session_id)


# --- supervising ------------------------------------------------------------------------------


def leave_running(bindings: SessionRuntimeBindings, test: Channel, id: OperationId) -> None:
    bindings.ops_lifecycle.register_operation(spec(id=id))
    test.say("running")
    test.hear()


def test_deaths_are_noticed_in_every_session(adapter: RuntimeSessionAdapter) -> None:
    sessions = [adapter.prepare_bindings(SessionId.new()) for _ in range(3)]
    for turn, bindings in enumerate(sessions):
        if turn == 1:
            adapter.reset_session(sessions[0].session_id)
        id = OperationId.new()
        with start(leave_running, bindings, id) as child:
            child.hear()
            child.kill()
        feed = bindings.ops_lifecycle.completion_feed()
        eventually(functools.partial(feed.wait_for_advance, 0, 60))
    for bindings in sessions:
        adapter.unregister_session(bindings.session_id)
