"""Waiting until a store has the committed completions."""

from __future__ import annotations

import asyncio
import pickle
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy
import pytest

from shmepoch.config import OpsLifecycleConfig
from shmepoch.epoch.bindings import SessionRuntimeBindings
from shmepoch.epoch.operations import OperationStatus
from shmepoch.epoch.registry import RuntimeOpsLifecycleRegistry
from shmepoch.errors import ConfigInvalid, EpochSealed, StoreBehind
from shmepoch.ids import OperationId, SessionId
from shmepoch.runtime.adapter import RuntimeSessionAdapter
from shmepoch.stores import RuntimeStore
from tests.processes.children import METHODS, Channel, start
from tests.runtime.stores import WatchedStore
from tests.support import eventually, result, spec

FOR_EVER = 60.0


@pytest.fixture
def store() -> WatchedStore:
    return WatchedStore()


@pytest.fixture(params=[0, 60_000], ids=["writers do not wait", "writers wait"])
def owner(
    request: pytest.FixtureRequest, store: WatchedStore, namespace: str
) -> Iterator[RuntimeSessionAdapter]:
    config = OpsLifecycleConfig(store_wait_ms=request.param)
    with RuntimeSessionAdapter.persistent(store, namespace=namespace, config=config) as made:
        yield made
        store.gate.set()
        for session_id in list(made._sessions):
            made.unregister_session(session_id)


@pytest.fixture
def kept(owner: RuntimeSessionAdapter, store: WatchedStore) -> SessionRuntimeBindings:
    """Bindings of a session whose store takes nothing until its gate is opened."""
    bindings = owner.prepare_bindings(SessionId.new())
    eventually(lambda: store.load(bindings.session_id) is not None)
    store.gate.clear()
    return bindings


def begin(registry: RuntimeOpsLifecycleRegistry) -> OperationId:
    made = spec()
    registry.register_operation(made)
    registry.provisioning_succeeded(made.id)
    return made.id


def stored(store: RuntimeStore, bindings: SessionRuntimeBindings) -> list[OperationId]:
    return [entry.operation_id for entry in store.list_entries(bindings.epoch_id)]


def test_a_durable_completion_is_in_the_store_when_the_call_returns(
    store: WatchedStore, kept: SessionRuntimeBindings
) -> None:
    store.gate.set()
    for _ in range(5):
        id = begin(kept.ops_lifecycle)
        kept.ops_lifecycle.complete_operation(id, result(id), durable=True, timeout=FOR_EVER)
        assert stored(store, kept)[-1] == id


def test_it_holds_up_no_other_while_it_waits(
    store: WatchedStore, kept: SessionRuntimeBindings
) -> None:
    registry = kept.ops_lifecycle
    id, other = begin(registry), begin(registry)
    with ThreadPoolExecutor() as pool:
        call = pool.submit(
            registry.complete_operation, id, result(id), durable=True, timeout=FOR_EVER
        )
        eventually(lambda: registry.completion_feed().watermark() == 1)
        registry.complete_operation(other, result(other))
        registry.check()
        assert not call.done()
        assert stored(store, kept) == []
        store.gate.set()
        call.result(60)
    assert stored(store, kept)[0] == id


def test_a_store_that_does_not_have_it_in_time_is_said(
    store: WatchedStore, kept: SessionRuntimeBindings
) -> None:
    registry, feed = kept.ops_lifecycle, kept.ops_lifecycle.completion_feed()
    id = begin(registry)
    with pytest.raises(StoreBehind, match="completion, 1, stands and is not durable yet") as caught:
        registry.complete_operation(id, result(id), durable=True, timeout=0.01)
    error = pickle.loads(pickle.dumps(caught.value))
    assert (error.completed, error.awaited_seq, error.durable_seq, error.lag) == (True, 1, 0, 1)
    assert str(error) == str(caught.value)
    snapshot = registry.snapshot(id)
    assert snapshot is not None
    assert snapshot.status is OperationStatus.COMPLETED
    with pytest.raises(TimeoutError):
        feed.wait_durable(1, 0.01)
    store.gate.set()
    feed.wait_durable(1, FOR_EVER)
    assert stored(store, kept) == [id]


@pytest.mark.parametrize("timeout", [0, 0.01, numpy.float32(0.01)])
def test_nothing_persists_a_registry_that_stands_alone(timeout: Any) -> None:
    registry = RuntimeOpsLifecycleRegistry()
    id = begin(registry)
    with pytest.raises(StoreBehind) as caught:
        registry.complete_operation(id, result(id), durable=True, timeout=timeout)
    assert caught.value.completed
    assert registry.completion_feed().watermark() == 1


@pytest.mark.parametrize("timeout", [None, float("inf"), 10**30, numpy.int64(60)])
def test_a_timeout_may_be_no_limit(
    store: WatchedStore, kept: SessionRuntimeBindings, timeout: Any
) -> None:
    registry = kept.ops_lifecycle
    id = begin(registry)
    releasing = threading.Timer(0.05, store.gate.set)
    releasing.start()
    registry.complete_operation(id, result(id), durable=True, timeout=timeout)
    releasing.join()
    assert stored(store, kept) == [id]


def test_what_is_no_timeout_is_refused_before_anything_changes(
    kept: SessionRuntimeBindings,
) -> None:
    registry = kept.ops_lifecycle
    id = begin(registry)
    with pytest.raises(ConfigInvalid, match="timeout"):
        registry.complete_operation(id, result(id), durable=True, timeout=float("nan"))
    assert registry.completion_feed().watermark() == 0


def test_the_end_of_the_epoch_is_not_waited_through(
    kept: SessionRuntimeBindings, store: WatchedStore
) -> None:
    registry, feed = kept.ops_lifecycle, kept.ops_lifecycle.completion_feed()
    id = begin(registry)
    with ThreadPoolExecutor() as pool:
        call = pool.submit(registry.complete_operation, id, result(id), durable=True, timeout=None)
        alone = pool.submit(feed.wait_durable, 1)
        eventually(lambda: feed.watermark() == 1)
        kept.shared_segment().seal()
        with pytest.raises(StoreBehind) as caught:
            call.result(60)
        assert caught.value.completed
        with pytest.raises(EpochSealed):
            alone.result(60)


# --- the awaitable form ---------------------------------------------------------------------------


def test_it_can_be_awaited(store: WatchedStore, kept: SessionRuntimeBindings) -> None:
    registry, feed = kept.ops_lifecycle, kept.ops_lifecycle.completion_feed()

    async def wait() -> None:
        await feed.durable(0)
        id = begin(registry)
        registry.complete_operation(id, result(id))
        waiting = asyncio.create_task(feed.durable(1))
        given_up = asyncio.create_task(feed.durable(1))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(given_up, 0.05)
        assert not waiting.done()
        store.gate.set()
        await waiting
        assert stored(store, kept) == [id]

    asyncio.run(wait())


def test_an_await_ends_with_the_epoch(kept: SessionRuntimeBindings) -> None:
    async def wait() -> None:
        waiting = asyncio.create_task(kept.ops_lifecycle.completion_feed().durable(1))
        await asyncio.sleep(0)
        kept.shared_segment().seal()
        with pytest.raises(EpochSealed):
            await waiting

    asyncio.run(wait())


@pytest.mark.parametrize("seq", [-1, 2**64])
def test_what_is_no_position_is_refused(seq: int) -> None:
    feed = RuntimeOpsLifecycleRegistry().completion_feed()
    with pytest.raises(OverflowError):
        feed.wait_durable(seq, 0)
    with pytest.raises(OverflowError):
        asyncio.run(feed.durable(seq))


# --- other processes ------------------------------------------------------------------------------


def complete_durably(bindings: SessionRuntimeBindings, test: Channel) -> str:
    """A worker that returns after its completion is durable."""
    registry = bindings.ops_lifecycle
    id = begin(registry)
    test.say("begun")
    registry.complete_operation(id, result(id), durable=True, timeout=FOR_EVER)
    return str(id)


@pytest.mark.parametrize("method", METHODS)
def test_a_worker_of_another_process_waits_for_the_runtimes_store(
    namespace: str, method: str
) -> None:
    store = WatchedStore()
    with RuntimeSessionAdapter.persistent(store, namespace=namespace) as adapter:
        bindings = adapter.prepare_bindings(SessionId.new())
        eventually(lambda: store.load(bindings.session_id) is not None)
        store.gate.clear()
        with start(complete_durably, bindings, method=method) as child:
            assert child.hear() == "begun"
            eventually(lambda: bindings.ops_lifecycle.completion_feed().watermark() == 1)
            assert child.silent
            store.gate.set()
            id = child.result()
            assert [str(one) for one in stored(store, bindings)] == [id]
        adapter.unregister_session(bindings.session_id)
