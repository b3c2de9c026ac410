"""`store_wait_ms`: writers wait for the store, and do not drop completions that it lacks."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from shmepoch import (
    ConfigInvalid,
    EpochSealed,
    InvalidTransition,
    OperationId,
    OperationProgressUpdate,
    OperationStatus,
    OpsLifecycleConfig,
    PersistenceChannel,
    RuntimeOpsLifecycleRegistry,
    RuntimeSessionAdapter,
    SessionId,
    SessionRuntimeBindings,
    StoreBehind,
    StoreWriteFailed,
)
from shmepoch import _native as at
from shmepoch._native import RECOVERY_SKIP
from shmepoch.runtime.supervision import EpochSupervisor
from tests.epoch.operations import size_of
from tests.runtime.stores import WatchedStore
from tests.support import eventually, result, spec

#: Far longer than any test.
PATIENT_MS = 600_000
#: A payload; the feed holds a dozen of them.
CONTENT = "x" * 500
SPAWN = multiprocessing.get_context("spawn")


def small(store_wait_ms: int) -> OpsLifecycleConfig:
    return OpsLifecycleConfig(
        max_completed=2, max_operations=4, feed_bytes=8192, store_wait_ms=store_wait_ms
    )


@pytest.fixture
def store() -> WatchedStore:
    return WatchedStore()


@pytest.fixture
def held_up(store: WatchedStore, namespace: str) -> Iterator[SessionRuntimeBindings]:
    """An epoch whose writers wait for ever, and whose store is blocked: its gate is shut."""
    yield from _epoch(store, namespace, PATIENT_MS)


@pytest.fixture
def impatient(store: WatchedStore, namespace: str) -> Iterator[SessionRuntimeBindings]:
    """The same, whose writers give up almost at once."""
    yield from _epoch(store, namespace, 1)


def _epoch(
    store: WatchedStore, namespace: str, store_wait_ms: int
) -> Iterator[SessionRuntimeBindings]:
    with RuntimeSessionAdapter.persistent(
        store, namespace=namespace, config=small(store_wait_ms)
    ) as adapter:
        bindings = adapter.prepare_bindings(SessionId.new())
        eventually(lambda: store.load(bindings.session_id))
        store.gate.clear()
        try:
            yield bindings
            bindings.ops_lifecycle.check()
        finally:
            store.failure = None
            store.gate.set()
            adapter.unregister_session(bindings.session_id)


def begin(bindings: SessionRuntimeBindings) -> OperationId:
    made = spec()
    bindings.ops_lifecycle.register_operation(made)
    bindings.ops_lifecycle.provisioning_succeeded(made.id)
    return made.id


def complete(bindings: SessionRuntimeBindings, id: OperationId) -> None:
    bindings.ops_lifecycle.complete_operation(id, result(id, CONTENT))


def fill(bindings: SessionRuntimeBindings) -> None:
    """Complete operations until one more does not fit."""
    registry, segment = bindings.ops_lifecycle, bindings._segment
    complete(bindings, begin(bindings))
    each = size_of(registry, registry.completion_feed().watermark())
    while segment.memory.load(at.HEAD_AT) + each <= segment.layout.feed_bytes:
        complete(bindings, begin(bindings))


def waiting(work: Future[None], bindings: SessionRuntimeBindings) -> bool:
    """Whether a waiter sleeps on the epoch's event."""
    assert not work.done(), work.result()
    return bindings.shared_segment().memory.load(at.EVENT_AT) >> 32 != 0


def test_a_full_feed_waits_for_the_store(
    store: WatchedStore, held_up: SessionRuntimeBindings
) -> None:
    fill(held_up)
    id, other = begin(held_up), begin(held_up)
    with ThreadPoolExecutor() as pool:
        work = pool.submit(complete, held_up, id)
        eventually(lambda: waiting(work, held_up))
        # A writer that needs no room goes on meanwhile.
        held_up.ops_lifecycle.report_progress(other, OperationProgressUpdate("half way"))
        assert held_up.cursor_state.agent_applied_cursor.advance(1)
        begin(held_up)
        held_up.ops_lifecycle.check()
        snapshot = held_up.ops_lifecycle.snapshot(id)
        assert snapshot is not None
        assert snapshot.status is OperationStatus.RUNNING
        store.gate.set()
        work.result(60)
    feed = held_up.ops_lifecycle.completion_feed()
    watermark = feed.watermark()
    assert eventually(lambda: feed.durable_through() == watermark)
    assert [e.seq for e in store.list_entries(held_up.epoch_id)] == list(range(1, watermark + 1))


def test_who_has_waited_long_enough_is_told(
    store: WatchedStore, impatient: SessionRuntimeBindings
) -> None:
    fill(impatient)
    feed, id = impatient.ops_lifecycle.completion_feed(), begin(impatient)
    watermark = feed.watermark()
    with pytest.raises(StoreBehind, match="store_wait_ms") as caught:
        complete(impatient, id)
    assert caught.value.epoch_id == impatient.epoch_id
    assert (caught.value.durable_seq, caught.value.lag) == (0, watermark)
    assert caught.value.awaited_seq == 1
    assert caught.value.waited_ms == 1
    assert isinstance(caught.value, TimeoutError)
    snapshot = impatient.ops_lifecycle.snapshot(id)
    assert snapshot is not None
    assert snapshot.status is OperationStatus.RUNNING
    assert (feed.watermark(), feed.list_since(0).dropped_through) == (watermark, 0)
    store.gate.set()
    eventually(lambda: feed.durable_through() == watermark)
    complete(impatient, id)
    assert feed.watermark() == watermark + 1


def test_several_wait_together(store: WatchedStore, held_up: SessionRuntimeBindings) -> None:
    fill(held_up)
    ids = [begin(held_up), begin(held_up)]
    registry, results = held_up.ops_lifecycle, [result(id, CONTENT) for id in ids]
    feed = registry.completion_feed()
    watermark = feed.watermark()
    with ThreadPoolExecutor() as pool:
        work = pool.submit(registry.complete_operations, results)
        eventually(lambda: waiting(work, held_up))
        assert feed.watermark() == watermark
        store.gate.set()
        work.result(60)
    entries = feed.list_since(watermark).entries
    assert [entry.operation_id for entry in entries] == ids
    stored = eventually(lambda: store.list_entries(held_up.epoch_id)[watermark:])
    assert [entry.operation_id for entry in stored] == ids


def test_no_more_is_unstored_than_a_recovery_leaves_out(
    store: WatchedStore, namespace: str
) -> None:
    """Otherwise a sequence could be used again after a reboot."""
    config = OpsLifecycleConfig(store_wait_ms=1)
    with RuntimeSessionAdapter.ephemeral(namespace=namespace, config=config) as adapter:
        bindings = adapter.prepare_bindings(SessionId.new())
        registry = bindings.ops_lifecycle
        for _ in range(RECOVERY_SKIP):
            made = spec()
            registry.register_operation(made)
            registry.fail_operation(made.id, "no")
        id = begin(bindings)
        with pytest.raises(StoreBehind) as caught:
            complete(bindings, id)
        assert (caught.value.awaited_seq, caught.value.lag) == (1, RECOVERY_SKIP)
        with PersistenceChannel(store) as channel:
            channel.follow(bindings)
            channel.flush()
        complete(bindings, id)
        adapter.unregister_session(bindings.session_id)


def test_a_store_that_fails_is_a_store_that_is_behind(
    store: WatchedStore, impatient: SessionRuntimeBindings
) -> None:
    store.failure = lambda: StoreWriteFailed("no room")
    store.gate.set()
    fill(impatient)
    id = begin(impatient)
    with pytest.raises(StoreBehind):
        complete(impatient, id)
    store.failure = None
    feed = impatient.ops_lifecycle.completion_feed()
    eventually(lambda: feed.durable_through() == feed.watermark())
    complete(impatient, id)


def test_a_waiting_writer_hears_of_the_epoch_s_end(held_up: SessionRuntimeBindings) -> None:
    fill(held_up)
    id = begin(held_up)
    with ThreadPoolExecutor() as pool:
        work = pool.submit(complete, held_up, id)
        eventually(lambda: waiting(work, held_up))
        held_up.shared_segment().seal()
        with pytest.raises(EpochSealed):
            work.result(60)


def test_who_ends_it_first_while_others_wait_for_room_has_ended_it(
    store: WatchedStore, held_up: SessionRuntimeBindings
) -> None:
    fill(held_up)
    id = begin(held_up)
    with ThreadPoolExecutor() as pool:
        racing = [pool.submit(complete, held_up, id) for _ in range(3)]
        eventually(lambda: waiting(racing[0], held_up))
        store.gate.set()
        outcomes = [work.exception(60) for work in racing]
    assert sum(outcome is None for outcome in outcomes) == 1
    assert sum(isinstance(outcome, InvalidTransition) for outcome in outcomes) == 2
    entries = held_up.ops_lifecycle.completion_feed().list_since(0).entries
    assert [entry.operation_id for entry in entries].count(id) == 1


def test_supervision_waits_for_no_store(
    store: WatchedStore, held_up: SessionRuntimeBindings
) -> None:
    registry = held_up.ops_lifecycle
    fill(held_up)
    begin(held_up)
    with pytest.raises(StoreBehind) as caught:
        registry.terminate_where(lambda _: True, "r" * 600)
    assert caught.value.waited_ms == 0


def test_what_runs_in_a_dead_process_is_ended_once_there_is_room(
    store: WatchedStore, held_up: SessionRuntimeBindings
) -> None:
    fill(held_up)
    child = SPAWN.Process(target=_begin_in_another_process, args=(held_up.to_token(),))
    child.start()
    child.join()
    assert child.exitcode == 0
    assert held_up.ops_lifecycle.active_count() == 4
    assert EpochSupervisor(held_up).poll() == 0
    store.gate.set()
    eventually(lambda: held_up.ops_lifecycle.active_count() == 0)


def _begin_in_another_process(token: str) -> None:
    bindings = SessionRuntimeBindings.from_token(token)
    for _ in range(4):
        made = spec("n" * 300)
        bindings.ops_lifecycle.register_operation(made)


def _complete_in_another_process(token: str, count: int) -> None:
    bindings = SessionRuntimeBindings.from_token(token)
    for _ in range(count):
        complete(bindings, begin(bindings))


def test_processes_wait_and_nothing_is_missed(store: WatchedStore, namespace: str) -> None:
    with (
        RuntimeSessionAdapter.ephemeral(namespace=namespace, config=small(PATIENT_MS)) as adapter,
        PersistenceChannel(store, max_delay=0) as channel,
    ):
        bindings = adapter.prepare_bindings(SessionId.new())
        channel.follow(bindings)
        writers = [
            SPAWN.Process(target=_complete_in_another_process, args=(bindings.to_token(), 200))
            for _ in range(3)
        ]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
            assert writer.exitcode == 0
        channel.flush()
        assert channel.status().missed == 0
        assert [e.seq for e in store.list_entries(bindings.epoch_id)] == list(range(1, 601))
        bindings.ops_lifecycle.check()
        adapter.unregister_session(bindings.session_id)


def test_a_full_feed_that_was_recovered_is_in_the_store_already(
    store: WatchedStore, namespace: str
) -> None:
    session_id = SessionId.new()
    for _ in range(2):
        with RuntimeSessionAdapter.persistent(
            store, namespace=namespace, config=small(PATIENT_MS)
        ) as adapter:
            bindings = adapter.prepare_bindings(session_id)
            for _ in range(20):
                complete(bindings, begin(bindings))
            for _ in range(4):
                begin(bindings)
            adapter._durability.channel.flush()  # type: ignore[union-attr]
            bindings.shared_segment().unlink()
    with RuntimeSessionAdapter.persistent(
        store, namespace=namespace, config=small(PATIENT_MS)
    ) as adapter:
        adapter.prepare_bindings(session_id)
        adapter.unregister_session(session_id)


def test_private_memory_waits_for_whoever_stores_it() -> None:
    bindings = SessionRuntimeBindings.standalone(SessionId.new(), small(1))
    fill(bindings)
    id = begin(bindings)
    with pytest.raises(StoreBehind):
        complete(bindings, id)
    store = WatchedStore()
    with PersistenceChannel(store) as channel:
        channel.follow(bindings)
        channel.flush()
    complete(bindings, id)


def test_without_it_nobody_waits() -> None:
    registry = RuntimeOpsLifecycleRegistry.with_config(small(0))
    for _ in range(50):
        made = spec()
        registry.register_operation(made)
        registry.fail_operation(made.id, CONTENT)
    assert registry.completion_feed().list_since(0).dropped_through > 0


@pytest.mark.parametrize("store_wait_ms", [-1, 3_600_001, 0.5, None, True])
def test_a_wait_is_a_number_of_milliseconds(store_wait_ms: object) -> None:
    with pytest.raises(ConfigInvalid, match="store_wait_ms"):
        OpsLifecycleConfig(store_wait_ms=store_wait_ms)  # type: ignore[arg-type]
