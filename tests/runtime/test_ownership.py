"""The ownership of sessions, when calls race, fail, are interrupted, or find unexpected states."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from shmepoch import (
    AdapterClosed,
    EpochGone,
    EpochSealed,
    InMemoryRuntimeStore,
    OperationId,
    OperationStatus,
    OpsLifecycleConfig,
    ParticipantsExhausted,
    PersistedOpsSnapshot,
    Role,
    RuntimeAlreadyActive,
    RuntimeEpochId,
    RuntimeOpsLifecycleRegistry,
    RuntimeSessionAdapter,
    SegmentCorrupted,
    SessionBusy,
    SessionId,
    SessionNotRegistered,
    SessionRuntimeBindings,
    SharedMemoryExhausted,
    ShmepochError,
    StoreLoadFailed,
    StoreWriteFailed,
    list_sessions,
    remove_unused,
)
from shmepoch import _native as at
from shmepoch._native import Epoch
from shmepoch.memory import segment as segments
from shmepoch.memory.files import NewFile
from shmepoch.memory.namespaces import segment_path
from shmepoch.memory.participants import Participants
from shmepoch.memory.segment import SharedSegment
from shmepoch.runtime import adapter as adapters
from shmepoch.runtime.durability import Durability
from shmepoch.runtime.opening import EpochOpener
from shmepoch.runtime.supervision import EpochSupervisor
from tests.epoch.deadline import DEADLINE_S
from tests.processes.children import Channel, start
from tests.runtime.completions import TOOL, end
from tests.runtime.stores import WatchedStore
from tests.support import eventually, held_writer, names_in, spec

# --- steps between which others may come ------------------------------------------------------


class Interleaved:
    """A native epoch; between its transitions another attachment does something."""

    def __init__(self, epoch: Epoch, act: Callable[[], object]) -> None:
        self._epoch = epoch
        self._act = act

    def __getattr__(self, name: str) -> Callable[..., object]:
        method: Callable[..., object] = getattr(self._epoch, name)

        def then_act(*args: object) -> object:
            answer = method(*args)
            with contextlib.suppress(EpochSealed):
                self._act()
            return answer

        return then_act


def test_nothing_is_registered_between_the_end_of_everything_and_of_the_epoch(
    adapter: RuntimeSessionAdapter, namespace: str
) -> None:
    session_id = SessionId.new()
    bindings = adapter.prepare_bindings(session_id)
    segment = bindings.shared_segment()
    worker = SharedSegment.attach(namespace, session_id)
    worker.join(Role.WORKER)
    registry = SessionRuntimeBindings(worker).ops_lifecycle
    registry.register_operation(spec())
    interleaved: Any = Interleaved(segment.epoch, lambda: registry.register_operation(spec()))
    segment.epoch = bindings.ops_lifecycle._epoch = interleaved
    adapter.unregister_session(session_id)
    assert segment.sealed
    assert registry.active_count() == 0
    worker.close()


def reset_and_close(adapter: RuntimeSessionAdapter, session_id: SessionId) -> None:
    adapter.reset_session(session_id)
    adapter.close()


def unregister_and_prepare(adapter: RuntimeSessionAdapter, session_id: SessionId) -> None:
    adapter.unregister_session(session_id)
    adapter.prepare_bindings(session_id)


def close_and_lose(adapter: RuntimeSessionAdapter, session_id: SessionId) -> None:
    """The epoch is open, but another program removes its name."""
    path = adapter.prepare_bindings(session_id).shared_segment().path
    adapter.close()
    path.unlink()


ENDS: dict[str, Callable[[RuntimeSessionAdapter, SessionId], object]] = {
    "reset": RuntimeSessionAdapter.reset_session,
    "reset and closed": reset_and_close,
    "unregistered and prepared": unregister_and_prepare,
    "unregistered": RuntimeSessionAdapter.unregister_session,
    "closed and lost": close_and_lose,
}


@pytest.mark.parametrize("act", ENDS.values(), ids=ENDS)
def test_a_segment_that_was_found_and_replaced_since_is_not_taken_over(
    adapter: RuntimeSessionAdapter,
    namespace: str,
    monkeypatch: pytest.MonkeyPatch,
    act: Callable[[RuntimeSessionAdapter, SessionId], object],
) -> None:
    session_id = SessionId.new()
    adapter.register_session(session_id)
    attach = SharedSegment.attach
    with RuntimeSessionAdapter.ephemeral(namespace=namespace) as second:

        def attach_and_be_late(namespace: str, session_id: SessionId) -> SharedSegment:
            found = attach(namespace, session_id)
            monkeypatch.undo()
            act(adapter, session_id)
            return found

        monkeypatch.setattr(SharedSegment, "attach", attach_and_be_late)
        if adapter_owns := act in (ENDS["reset"], ENDS["unregistered and prepared"]):
            with pytest.raises(RuntimeAlreadyActive):
                second.prepare_bindings(session_id)
        else:
            second.register_session(session_id)
        owner = adapter if adapter_owns else second
        bindings = owner.prepare_bindings(session_id)
        assert bindings.shared_segment().named
        assert not bindings.sealed
        assert names_in(namespace) == [bindings.shared_segment().name]
        owner.unregister_session(session_id)


@pytest.mark.parametrize("step", ["publish", "_make"])
def test_a_sealed_segment_is_replaced_by_one_only(
    namespace: str, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    session_id = SessionId.new()
    with RuntimeSessionAdapter.ephemeral(namespace=namespace) as first:
        first.prepare_bindings(session_id).shared_segment().seal()
    owner: Any = SharedSegment if step == "publish" else EpochOpener
    do = getattr(owner, step)
    with (
        RuntimeSessionAdapter.ephemeral(namespace=namespace) as second,
        RuntimeSessionAdapter.ephemeral(namespace=namespace) as third,
    ):

        def while_another_tries(*args: object, **kwargs: object) -> object:
            monkeypatch.undo()
            with pytest.raises(RuntimeAlreadyActive):
                third.prepare_bindings(session_id)
            return do(*args, **kwargs)

        monkeypatch.setattr(owner, step, while_another_tries)
        bindings = second.prepare_bindings(session_id)
        assert names_in(namespace) == [bindings.shared_segment().name]
        second.unregister_session(session_id)


@pytest.mark.parametrize("ends", [True, False])
def test_an_epoch_that_another_runtime_has_gone_on_with_is_not_recovered(
    namespace: str, monkeypatch: pytest.MonkeyPatch, ends: bool
) -> None:
    """After the epoch was loaded, and before its segment has the name, another runtime recovered it
    and ended it, or was lost in a crash of the machine."""
    session_id, store = SessionId.new(), InMemoryRuntimeStore()
    stored(session_id, namespace, store)
    restore = Durability.restore

    def restore_late(*args: Any) -> None:
        monkeypatch.undo()
        with RuntimeSessionAdapter.persistent(store, namespace=namespace) as first:
            bindings = works(first, session_id)
            if ends:
                first.unregister_session(session_id)
        before.append(bindings)
        if not ends:
            bindings.shared_segment().path.unlink()
        restore(*args)

    before: list[SessionRuntimeBindings] = []
    with RuntimeSessionAdapter.persistent(store, namespace=namespace) as second:
        monkeypatch.setattr(Durability, "restore", restore_late)
        bindings = works(second, session_id)
        assert (bindings.epoch_id != before[0].epoch_id) is ends
        last = before[0].ops_lifecycle.completion_feed().watermark()
        feed = bindings.ops_lifecycle.completion_feed()
        assert ends or feed.watermark() > last
        eventually(lambda: store.last_seq(bindings.epoch_id) == feed.watermark())
        second.unregister_session(session_id)
    assert files(namespace) == []


def test_an_epoch_that_another_runtime_has_reset_is_not_recovered(
    namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither epoch has a completion: only the identifier distinguishes it from the loaded one."""
    session_id, store = SessionId.new(), InMemoryRuntimeStore()
    with RuntimeSessionAdapter.persistent(store, namespace=namespace) as adapter:
        path = adapter.prepare_bindings(session_id).shared_segment().path
    path.unlink()
    restore = Durability.restore

    def restore_late(*args: Any) -> None:
        monkeypatch.undo()
        with RuntimeSessionAdapter.persistent(store, namespace=namespace) as first:
            first.register_session(session_id)
            after.append(first.reset_session(session_id).epoch_id)
        path.unlink()
        restore(*args)

    after: list[RuntimeEpochId] = []
    with RuntimeSessionAdapter.persistent(store, namespace=namespace) as second:
        monkeypatch.setattr(Durability, "restore", restore_late)
        assert [works(second, session_id).epoch_id] == after
        second.unregister_session(session_id)
    assert files(namespace) == []


# --- one session does not delay another -------------------------------------------------------


class Slow(WatchedStore):
    """A store in which the load of one session blocks until it is released."""

    def __init__(self, session_id: SessionId) -> None:
        super().__init__()
        self.session_id = session_id
        self.loading = threading.Event()
        self.go_on = threading.Event()

    def load(
        self, session_id: SessionId, *, max_entries: int | None = None
    ) -> PersistedOpsSnapshot | None:
        if session_id == self.session_id:
            self.loading.set()
            assert self.go_on.wait(DEADLINE_S)
        return super().load(session_id, max_entries=max_entries)


@contextlib.contextmanager
def busy(
    namespace: str, verb: str
) -> Iterator[tuple[RuntimeSessionAdapter, SessionId, Callable[[], None]]]:
    """An adapter with a call about a session that is blocked in the store, and the way to continue
    it."""
    session_id = SessionId.new()
    store = Slow(session_id)
    with (
        RuntimeSessionAdapter.persistent(store, namespace=namespace) as adapter,
        ThreadPoolExecutor(1) as pool,
    ):
        if verb != "prepare_bindings":
            store.go_on.set()
            end(adapter.prepare_bindings(session_id), TOOL)
            store.gate.clear()
        call = pool.submit(getattr(adapter, verb), session_id)
        if verb == "prepare_bindings":
            assert store.loading.wait(DEADLINE_S)
        else:
            path = segment_path(namespace, session_id)
            eventually(lambda: path.read_bytes()[at.STATE_AT])

        def go_on() -> None:
            store.go_on.set()
            store.gate.set()
            call.result(DEADLINE_S)

        yield adapter, session_id, go_on
        go_on()
        if adapter.contains_session(session_id):
            adapter.unregister_session(session_id)


def leave_running(bindings: SessionRuntimeBindings, test: Channel, id: OperationId) -> None:
    bindings.ops_lifecycle.register_operation(spec(id=id))
    test.say("running")
    test.hear()


@pytest.mark.parametrize("verb", ["prepare_bindings", "reset_session", "unregister_session"])
def test_a_store_that_does_not_come_back_holds_up_its_session_only(
    namespace: str, verb: str
) -> None:
    other, id = SessionId.new(), OperationId.new()
    with busy(namespace, verb) as (adapter, session_id, go_on), ThreadPoolExecutor(1) as pool:

        def at_once(call: Callable[..., Any], *args: object) -> Any:
            return pool.submit(call, *args).result(5)

        assert not at_once(adapter.contains_session, other)
        assert at_once(adapter.contains_session, session_id) is (verb != "prepare_bindings")
        bindings = at_once(adapter.prepare_bindings, other)
        assert at_once(adapter.contains_session, other)
        assert at_once(adapter.ops_lifecycle_registry, other) is bindings.ops_lifecycle
        with start(leave_running, bindings, id) as child:
            child.hear()
            child.kill()
        at_once(bindings.ops_lifecycle.completion_feed().wait_for_advance, 0, DEADLINE_S)
        go_on()
        adapter.unregister_session(other)


def stand_still(bindings: SessionRuntimeBindings, test: Channel) -> None:
    with held_writer(bindings.shared_segment()):
        test.say("inside")
        os.kill(os.getpid(), signal.SIGSTOP)
    test.hear()


@pytest.mark.parametrize("verb", ["reset_session", "unregister_session"])
def test_a_stopped_worker_holds_up_its_session_only(
    namespace: str, verb: str, caplog: pytest.LogCaptureFixture
) -> None:
    first, second, third, id = SessionId.new(), SessionId.new(), SessionId.new(), OperationId.new()
    with (
        RuntimeSessionAdapter.ephemeral(namespace=namespace) as adapter,
        ThreadPoolExecutor(2) as pool,
        start(stand_still, adapter.prepare_bindings(first)) as stopped,
    ):
        stopped.hear()
        eventually(stopped.stopped)
        held_up = pool.submit(getattr(adapter, verb), first)
        bindings = pool.submit(adapter.prepare_bindings, second).result(5)
        with start(leave_running, adapter.prepare_bindings(first), OperationId.new()) as dead:
            dead.kill()  # before the continuation: the supervisor polls this session, too
        with start(leave_running, bindings, id) as child:
            child.hear()
            child.kill()
        bindings.ops_lifecycle.completion_feed().wait_for_advance(0, DEADLINE_S)
        pool.submit(adapter.prepare_bindings, third).result(5)
        pool.submit(adapter.close).result(10)
        assert f"session {first}: given up later" in caplog.text
        assert not held_up.done()
        stopped.signal(signal.SIGCONT)
        stopped.kill()
        if verb == "reset_session":
            with pytest.raises(AdapterClosed):
                held_up.result(DEADLINE_S)
        else:  # only its removal was left
            held_up.result(DEADLINE_S)
    with RuntimeSessionAdapter.ephemeral(namespace=namespace) as adapter:
        for session_id in (first, second, third):
            adapter.prepare_bindings(session_id).ops_lifecycle.check()
            adapter.unregister_session(session_id)


def test_a_child_that_was_forked_meanwhile_is_told_at_once(namespace: str) -> None:
    with busy(namespace, "prepare_bindings") as (adapter, session_id, go_on):
        with start(refused, None, adapter, session_id) as child:
            assert child.result() == 4
        go_on()


def refused(
    bindings: None, test: Channel, adapter: RuntimeSessionAdapter, session_id: SessionId
) -> int:
    calls = 0
    for id in (session_id, SessionId.new()):
        for call in (adapter.prepare_bindings, adapter.unregister_session):
            with pytest.raises(AdapterClosed):
                call(id)
            calls += 1
    adapter.close()
    return calls


# --- calls that fail --------------------------------------------------------------------------


Reason: TypeAlias = Callable[[pytest.MonkeyPatch], None]


def refuse(owner: Any, name: str, make: Callable[[], BaseException]) -> Reason:
    """Make `name` raise temporarily."""

    def fail(*_: object, **__: object) -> Any:
        raise make()

    return lambda patch: patch.setattr(owner, name, fail)


def no_thread() -> RuntimeError:
    return RuntimeError("can't start new thread")


def no_write() -> StoreWriteFailed:
    return StoreWriteFailed("the disk is full")


REASONS: dict[str, Reason] = {
    "no room": refuse(segments, "NewFile", lambda: SharedMemoryExhausted(1, 0, "/dev/shm")),
    "no participant slot": refuse(Participants, "join", lambda: ParticipantsExhausted(1, "full")),
    "no supervision": refuse(RuntimeSessionAdapter, "_supervise", no_thread),
    "no name": refuse(NewFile, "publish", lambda: OSError(28, "no space left")),
    "no look": refuse(EpochSupervisor, "settle", lambda: SegmentCorrupted("x", "x", 0, 1)),
    "no channel": refuse(Durability, "follow", no_thread),
    "no load": refuse(
        InMemoryRuntimeStore, "load", lambda: StoreLoadFailed(SessionId.new(), "locked")
    ),
    "no recovery": refuse(Durability, "restore", no_write),
    "no bindings": refuse(SessionRuntimeBindings, "__init__", MemoryError),
    "interrupted": refuse(adapters, "EpochSupervisor", KeyboardInterrupt),
}


def nothing(session_id: SessionId, namespace: str, store: InMemoryRuntimeStore) -> None:
    """The session has never existed."""


def left(session_id: SessionId, namespace: str, store: InMemoryRuntimeStore) -> None:
    """It has a live epoch without a runtime."""
    with RuntimeSessionAdapter.ephemeral(namespace=namespace) as adapter:
        end(adapter.prepare_bindings(session_id), TOOL)


def left_sealed(session_id: SessionId, namespace: str, store: InMemoryRuntimeStore) -> None:
    """Its runtime was killed in a reset."""
    with RuntimeSessionAdapter.ephemeral(namespace=namespace) as adapter:
        adapter.prepare_bindings(session_id).shared_segment().seal()


def stored(session_id: SessionId, namespace: str, store: InMemoryRuntimeStore) -> None:
    """The machine has restarted."""
    with RuntimeSessionAdapter.persistent(store, namespace=namespace) as adapter:
        end(adapter.prepare_bindings(session_id), TOOL)
    segment_path(namespace, session_id).unlink()


def descriptors() -> int:
    """How many descriptors of segments this process has, named or not."""
    gc.collect()
    found = 0
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            in_shm = os.readlink(link).startswith("/dev/shm/")
            found += in_shm and link.stat().st_size > at.PAGE  # the file of doorbells is a page
    return found


def files(namespace: str) -> list[str]:
    """The names of segments, and of files that will replace one."""
    return [name for name in names_in(namespace) if not name.endswith(".doorbells")]


def works(adapter: RuntimeSessionAdapter, session_id: SessionId) -> SessionRuntimeBindings:
    bindings = adapter.prepare_bindings(session_id)
    assert adapter.contains_session(session_id)
    assert not bindings.sealed
    assert bindings.shared_segment().named
    assert bindings.role is Role.RUNTIME
    end(bindings, TOOL)
    bindings.ops_lifecycle.check()
    return bindings


@pytest.mark.parametrize("reason", REASONS.values(), ids=REASONS)
@pytest.mark.parametrize("before", [nothing, left, left_sealed, stored])
def test_after_preparing_failed_everything_is_as_it_was(
    namespace: str,
    monkeypatch: pytest.MonkeyPatch,
    before: Callable[[SessionId, str, InMemoryRuntimeStore], None],
    reason: Reason,
) -> None:
    session_id, store = SessionId.new(), InMemoryRuntimeStore()
    before(session_id, namespace, store)
    with (
        RuntimeSessionAdapter.persistent(store, namespace=namespace) as adapter,
        RuntimeSessionAdapter.persistent(store, namespace=namespace) as other,
    ):
        elsewhere = adapter.prepare_bindings(SessionId.new())
        other.prepare_bindings(again := SessionId.new())
        other.unregister_session(again)
        open_before = descriptors()
        kept: BaseException | None = None
        with monkeypatch.context() as patch:
            reason(patch)
            try:
                adapter.prepare_bindings(session_id)
            except BaseException as error:
                kept = error  # like a logger or a test runner
        if kept is not None:
            assert not adapter.contains_session(session_id)
            assert descriptors() == open_before
            works(other, session_id)
            other.unregister_session(session_id)
        works(adapter, session_id)
        assert adapter.prepare_bindings(elsewhere.session_id) is elsewhere
        for id in (session_id, elsewhere.session_id):
            adapter.unregister_session(id)
    assert files(namespace) == []


@pytest.mark.parametrize("reason", REASONS.values(), ids=REASONS)
def test_a_worker_goes_on_after_its_process_failed_to_become_the_runtime(
    namespace: str, monkeypatch: pytest.MonkeyPatch, reason: Reason
) -> None:
    session_id, store = SessionId.new(), InMemoryRuntimeStore()
    with RuntimeSessionAdapter.persistent(store, namespace=namespace) as first:
        token = first.prepare_bindings(session_id).to_token()
        worker = SharedSegment.attach(namespace, session_id)
    bindings = SessionRuntimeBindings.from_token(token)
    worker.close()
    id = OperationId.new()
    bindings.ops_lifecycle.register_operation(spec(id=id))
    with RuntimeSessionAdapter.persistent(store, namespace=namespace) as adapter:
        with monkeypatch.context() as patch:
            reason(patch)
            with contextlib.suppress(ShmepochError, RuntimeError, KeyboardInterrupt, MemoryError):
                adapter.prepare_bindings(session_id)
        if not adapter.contains_session(session_id):
            assert bindings.role is Role.WORKER
            bindings.ops_lifecycle.provisioning_succeeded(id)
        assert works(adapter, session_id) is bindings
        assert bindings.ops_lifecycle.active_count() == 1
        adapter.unregister_session(session_id)


@pytest.mark.parametrize("reason", REASONS.values(), ids=REASONS)
@pytest.mark.parametrize("then", ["prepare_bindings", "reset_session", "unregister_session"])
def test_after_a_reset_failed_the_session_goes_on(
    namespace: str,
    monkeypatch: pytest.MonkeyPatch,
    reason: Reason,
    then: str,
) -> None:
    session_id, store = SessionId.new(), InMemoryRuntimeStore()
    with RuntimeSessionAdapter.persistent(store, namespace=namespace) as adapter:
        old = works(adapter, session_id)
        open_before = descriptors()
        with monkeypatch.context() as patch:
            reason(patch)
            with contextlib.suppress(
                ShmepochError, RuntimeError, OSError, KeyboardInterrupt, MemoryError
            ):
                adapter.reset_session(session_id)
        assert old.sealed
        assert descriptors() == open_before
        getattr(adapter, then)(session_id)
        assert works(adapter, session_id).epoch_id != old.epoch_id
        assert list_sessions() == [session_id]
        assert len(files(namespace)) == 1
        adapter.unregister_session(session_id)


def test_a_thread_that_was_not_to_be_had_is_asked_for_again(
    namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    session_id = SessionId.new()
    with RuntimeSessionAdapter.ephemeral(namespace=namespace) as adapter:
        with monkeypatch.context() as patch:
            refuse(threading.Thread, "start", no_thread)(patch)
            for _ in range(2):
                with pytest.raises(RuntimeError, match="new thread"):
                    adapter.prepare_bindings(session_id)
        assert files(namespace) == []
        bindings, id = works(adapter, session_id), OperationId.new()
        with start(leave_running, bindings, id) as child:
            child.hear()
            child.kill()
        bindings.ops_lifecycle.completion_feed().wait_for_advance(1, DEADLINE_S)
        adapter.unregister_session(session_id)


def test_an_adapter_without_a_thread_can_be_closed(
    namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RuntimeSessionAdapter.ephemeral(namespace=namespace) as adapter:
        refuse(threading.Thread, "start", no_thread)(monkeypatch)
        with pytest.raises(RuntimeError, match="new thread"):
            adapter.prepare_bindings(SessionId.new())


def test_a_full_epoch_is_taken_over_once_a_participant_has_left(namespace: str) -> None:
    session_id, config = SessionId.new(), OpsLifecycleConfig(max_participants=1)
    with RuntimeSessionAdapter.ephemeral(namespace=namespace, config=config) as first:
        first.register_session(session_id)
    held = SharedSegment.attach(namespace, session_id)
    held.join(Role.WORKER)
    with (
        RuntimeSessionAdapter.ephemeral(namespace=namespace) as second,
        RuntimeSessionAdapter.ephemeral(namespace=namespace) as third,
    ):
        with pytest.raises(ParticipantsExhausted):
            second.prepare_bindings(session_id)
        held.close()
        works(third, session_id)
        third.close()
        works(second, session_id)
        second.unregister_session(session_id)


# --- calls from signal handlers ---------------------------------------------------------------


@contextlib.contextmanager
def interrupted_at(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, handler: Callable[[], object]
) -> Iterator[list[object]]:
    """Send a signal once, when `name` is called; yields the results or errors of its handler."""
    done: list[object] = []
    real, comes = getattr(owner, name), [True]

    def handle(*_: object) -> None:
        try:
            done.append(handler())
        except Exception as error:
            done.append(type(error))

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if comes:
            comes.clear()
            signal.raise_signal(signal.SIGUSR1)
        return real(*args, **kwargs)

    before = signal.signal(signal.SIGUSR1, handle)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, interrupted)
            yield done
    finally:
        signal.signal(signal.SIGUSR1, before)


#: A step of each call, before and after its epoch has changed.
STEPS = {
    "a fresh session, early": ("prepare_bindings", SharedSegment, "allocate"),
    "a fresh session, late": ("prepare_bindings", Durability, "follow"),
    "unregistering, early": (
        "unregister_session",
        RuntimeOpsLifecycleRegistry,
        "terminate_and_seal",
    ),
    "unregistering, in the store": ("unregister_session", Durability, "end"),
    "unregistering, late": ("unregister_session", SharedSegment, "unlink"),
    "resetting, early": ("reset_session", SharedSegment, "seal"),
    "resetting, in the store": ("reset_session", Durability, "end"),
    "resetting, late": ("reset_session", SharedSegment, "publish"),
}


@pytest.mark.parametrize(("verb", "owner", "name"), STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("persistent", [False, True])
def test_a_signal_handler_closes_the_adapter(
    namespace: str,
    monkeypatch: pytest.MonkeyPatch,
    verb: str,
    owner: Any,
    name: str,
    persistent: bool,
) -> None:
    session_id, store = SessionId.new(), InMemoryRuntimeStore()
    adapter = (
        RuntimeSessionAdapter.persistent(store, namespace=namespace)
        if persistent
        else RuntimeSessionAdapter.ephemeral(namespace=namespace)
    )
    other = adapter.prepare_bindings(SessionId.new())
    if verb != "prepare_bindings":
        adapter.register_session(session_id)
    with (
        interrupted_at(monkeypatch, owner, name, adapter.close) as done,
        contextlib.suppress(AdapterClosed),
    ):
        getattr(adapter, verb)(session_id)
    assert done == [None] or (owner is Durability and not persistent)
    assert not (done and adapter._sessions), "the call gives its session up"
    adapter.close()
    assert not adapter.contains_session(session_id)
    assert not other.shared_segment().attached
    with RuntimeSessionAdapter.persistent(store, namespace=namespace) as second:
        for id in (session_id, other.session_id):
            works(second, id)
            second.unregister_session(id)


@pytest.mark.parametrize(("verb", "owner", "name"), STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("inner", ["prepare_bindings", "reset_session", "unregister_session"])
def test_a_signal_handler_is_refused_in_a_call_about_the_same_session(
    namespace: str, monkeypatch: pytest.MonkeyPatch, verb: str, owner: Any, name: str, inner: str
) -> None:
    session_id = SessionId.new()
    with RuntimeSessionAdapter.persistent(InMemoryRuntimeStore(), namespace=namespace) as adapter:
        old = None if verb == "prepare_bindings" else adapter.prepare_bindings(session_id)
        call = getattr(adapter, inner)
        with interrupted_at(monkeypatch, owner, name, lambda: call(session_id)) as done:
            getattr(adapter, verb)(session_id)
        assert done in ([SessionBusy], [old])  # the epoch had not ended yet
        works(adapter, session_id)
        adapter.unregister_session(session_id)


def test_a_signal_handler_may_use_another_session(
    adapter: RuntimeSessionAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    session_id, other = SessionId.new(), SessionId.new()
    adapter.register_session(session_id)

    def handler() -> None:
        works(adapter, other)
        adapter.reset_session(other)
        adapter.unregister_session(other)

    with interrupted_at(monkeypatch, SharedSegment, "unlink", handler) as done:
        adapter.unregister_session(session_id)
    assert done == [None]


def test_a_close_that_was_interrupted_gives_up_the_sessions_all_the_same(
    namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    session_id = SessionId.new()
    adapter = RuntimeSessionAdapter.persistent(InMemoryRuntimeStore(), namespace=namespace)
    adapter.register_session(session_id)
    with monkeypatch.context() as patch:
        refuse(Durability, "close", KeyboardInterrupt)(patch)
        with pytest.raises(KeyboardInterrupt):
            adapter.close()
    with RuntimeSessionAdapter.ephemeral(namespace=namespace) as second:
        works(second, session_id)
        second.unregister_session(session_id)
    adapter.close()


# --- bindings that their own process closed ---------------------------------------------------


@pytest.mark.parametrize("durable", [False, True])
def test_a_session_whose_bindings_were_closed_is_owned_again(namespace: str, durable: bool) -> None:
    """A worker in the runtime's process has the same bindings as the runtime, and may close
    them."""
    session_id, store = SessionId.new(), InMemoryRuntimeStore()
    with adapter_of(namespace, store if durable else None) as adapter:
        closed = adapter.prepare_bindings(session_id)
        end(closed, TOOL)
        running = spec()
        closed.ops_lifecycle.register_operation(running)
        SessionRuntimeBindings.from_token(closed.to_token()).close()
        assert not adapter.contains_session(session_id)
        for call in (
            adapter.reset_session,
            adapter.unregister_session,
            adapter.ops_lifecycle_registry,
        ):
            with pytest.raises(SessionNotRegistered):
                call(session_id)
        again = works(adapter, session_id)
        assert again is not closed
        assert again.epoch_id == closed.epoch_id
        found = again.ops_lifecycle.snapshot(running.id)
        assert found is not None
        assert found.status is OperationStatus.TERMINATED
        if durable:
            again.ops_lifecycle.completion_feed().wait_durable(3, timeout=DEADLINE_S)
        assert adapter.reset_session(session_id).epoch_id != closed.epoch_id
        adapter.unregister_session(session_id)
    assert not files(namespace)


@pytest.mark.parametrize("end_of_epoch", ["reset_session", "unregister_session"])
def test_an_epoch_that_was_sealed_and_closed_is_finished(
    namespace: str, end_of_epoch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    session_id, store = SessionId.new(), InMemoryRuntimeStore()
    with adapter_of(namespace, store) as adapter:
        closed = adapter.prepare_bindings(session_id)
        with monkeypatch.context() as patch:
            patch.setattr(Durability, "end", refuse_to_end)
            with pytest.raises(StoreWriteFailed):
                getattr(adapter, end_of_epoch)(session_id)
        assert closed.sealed
        closed.close()
        again = works(adapter, session_id)
        assert again.epoch_id != closed.epoch_id
        adapter.unregister_session(session_id)
    assert not files(namespace)


def refuse_to_end(*_: object) -> None:
    raise no_write()


def adapter_of(namespace: str, store: InMemoryRuntimeStore | None) -> RuntimeSessionAdapter:
    if store is None:
        return RuntimeSessionAdapter.ephemeral(namespace=namespace)
    return RuntimeSessionAdapter.persistent(store, namespace=namespace)


# --- files changed by other programs ----------------------------------------------------------


def test_a_session_whose_name_is_gone_is_opened_anew(
    adapter: RuntimeSessionAdapter, caplog: pytest.LogCaptureFixture
) -> None:
    session_id = SessionId.new()
    old = adapter.prepare_bindings(session_id)
    old.shared_segment().path.unlink()
    eventually(lambda: not adapter.contains_session(session_id))
    assert caplog.text.count("is gone or another file") == 1
    with pytest.raises(SessionNotRegistered):
        adapter.unregister_session(session_id)
    new = works(adapter, session_id)
    assert new is not old
    assert new.epoch_id != old.epoch_id
    assert SessionRuntimeBindings.from_token(new.to_token()) is new
    adapter.unregister_session(session_id)
    old.close()


def test_a_session_whose_name_is_gone_goes_on_from_its_store(namespace: str) -> None:
    session_id, store = SessionId.new(), InMemoryRuntimeStore()
    with RuntimeSessionAdapter.persistent(store, namespace=namespace) as adapter:
        old = adapter.prepare_bindings(session_id)
        end(old, TOOL)
        eventually(lambda: store.last_seq(old.epoch_id) == 1)
        old.shared_segment().path.unlink()
        eventually(lambda: not adapter.contains_session(session_id))
        new = works(adapter, session_id)
        assert new is not old
        assert new.epoch_id == old.epoch_id
        last = new.ops_lifecycle.completion_feed().watermark()
        assert last > at.RECOVERY_SKIP
        eventually(lambda: store.last_seq(new.epoch_id) == last)
        adapter.unregister_session(session_id)
    old.close()


def test_a_session_that_a_worker_of_this_process_has_lost_is_recovered(namespace: str) -> None:
    """Its bindings belong to the lost segment, but have the id of the recovered epoch."""
    session_id, store = SessionId.new(), InMemoryRuntimeStore()
    with RuntimeSessionAdapter.persistent(store, namespace=namespace) as first:
        token = first.prepare_bindings(session_id).to_token()
        end(first.prepare_bindings(session_id), TOOL)
        held = SharedSegment.attach(namespace, session_id)
    worker = SessionRuntimeBindings.from_token(token)
    held.close()
    worker.shared_segment().path.unlink()
    with RuntimeSessionAdapter.persistent(store, namespace=namespace) as second:
        bindings = works(second, session_id)
        assert bindings is not worker
        assert bindings.epoch_id == worker.epoch_id
        second.unregister_session(session_id)
    worker.close()


def damage_header(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(at.CAPACITIES_AT)
        file.write(b"\xff" * 8)


def damage_words(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(at.REGISTRATIONS_AT)
        file.write(b"\xff" * 8)


def damage_participants(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(at.PARTICIPANTS_AT + 4 * at.PARTICIPANT_SIZE)
        file.write(b"\xff" * 8)


def empty(path: Path) -> None:
    path.write_bytes(b"")


DAMAGES = [damage_header, damage_words, damage_participants, empty]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("way_out", ["rotate", "rotate, no store", "remove_unused"])
def test_a_damaged_segment_can_be_left_behind(
    namespace: str, damage: Callable[[Path], None], way_out: str
) -> None:
    session_id, store = SessionId.new(), InMemoryRuntimeStore()
    with RuntimeSessionAdapter.persistent(store, namespace=namespace) as adapter:
        old = adapter.prepare_bindings(session_id)
        end(old, TOOL)
    damage(segment_path(namespace, session_id))
    with (
        RuntimeSessionAdapter.persistent(store, namespace=namespace) as adapter,
        pytest.raises(SegmentCorrupted) as refused,
    ):
        adapter.prepare_bindings(session_id)
    assert "remove_unused" in str(refused.value)
    assert "rotate_if_unloadable=True" in str(refused.value)
    if way_out == "remove_unused":
        assert remove_unused(session_id)
        adapter = RuntimeSessionAdapter.persistent(store, namespace=namespace)
    elif way_out == "rotate":
        adapter = RuntimeSessionAdapter.persistent(
            store, namespace=namespace, rotate_if_unloadable=True
        )
    else:
        adapter = RuntimeSessionAdapter.ephemeral(namespace=namespace, rotate_if_unloadable=True)
    with adapter:
        bindings = works(adapter, session_id)
        assert (bindings.epoch_id == old.epoch_id) is (way_out != "rotate, no store")
        adapter.unregister_session(session_id)


@pytest.mark.parametrize("damage", [damage_header, damage_words, damage_participants])
def test_a_damaged_segment_of_a_live_runtime_is_left_alone(
    adapter: RuntimeSessionAdapter, namespace: str, damage: Callable[[Path], None]
) -> None:
    bindings = adapter.prepare_bindings(SessionId.new())
    path, whole = bindings.shared_segment().path, bindings.shared_segment().path.read_bytes()
    damage(path)
    with (
        RuntimeSessionAdapter.ephemeral(namespace=namespace, rotate_if_unloadable=True) as second,
        pytest.raises((SegmentCorrupted, RuntimeAlreadyActive)),
    ):
        second.prepare_bindings(bindings.session_id)
    assert bindings.shared_segment().named
    path.write_bytes(whole)
    adapter.unregister_session(bindings.session_id)


@pytest.mark.parametrize("verb", ["reset_session", "unregister_session"])
@pytest.mark.parametrize("persistent", [False, True])
def test_an_epoch_that_was_damaged_under_its_runtime_can_be_ended(
    namespace: str, verb: str, persistent: bool
) -> None:
    session_id, store = SessionId.new(), InMemoryRuntimeStore()
    adapter = (
        RuntimeSessionAdapter.persistent(store, namespace=namespace)
        if persistent
        else RuntimeSessionAdapter.ephemeral(namespace=namespace)
    )
    with adapter:
        old = works(adapter, session_id)
        damage_words(old.shared_segment().path)
        getattr(adapter, verb)(session_id)
        assert old.sealed
        assert works(adapter, session_id).epoch_id != old.epoch_id
        adapter.unregister_session(session_id)
    assert files(namespace) == []


def test_who_is_attached_to_a_segment_that_was_left_behind_is_told(namespace: str) -> None:
    session_id = SessionId.new()
    with RuntimeSessionAdapter.ephemeral(namespace=namespace) as first:
        token = first.prepare_bindings(session_id).to_token()
        held = SharedSegment.attach(namespace, session_id)
    damage_header(segment_path(namespace, session_id))
    with RuntimeSessionAdapter.ephemeral(namespace=namespace, rotate_if_unloadable=True) as second:
        works(second, session_id)
        with pytest.raises((EpochGone, EpochSealed)):
            SessionRuntimeBindings.from_token(token)
        second.unregister_session(session_id)
    held.close()
