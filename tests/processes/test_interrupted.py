"""An exception of a signal handler, at any point, leaves no descriptor and no lock behind."""

from __future__ import annotations

import os
import pickle
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Final

import pytest

from shmepoch import (
    BindingsClosed,
    EpochSealed,
    OperationId,
    OperationProgressUpdate,
    OpsLifecycleConfig,
    RunId,
    RuntimeOpsLifecycleRegistry,
    RuntimeSessionAdapter,
    SessionId,
    SessionRuntimeBindings,
)
from shmepoch import _native as at
from shmepoch._native import is_locked
from shmepoch.memory.segment import SharedSegment
from tests.processes.children import Channel, start
from tests.processes.interrupting import EveryBytecode, Interrupt, interrupts
from tests.support import is_free, names_in, result, spec

SMALL: Final = OpsLifecycleConfig(max_completed=2, max_operations=4, feed_bytes=16 * 1024)
#: The lock bytes that tell other processes something.
LOCKS: Final = (at.WRITER_BYTE, at.RUNTIME_BYTE)


@pytest.fixture
def observer(bindings: SessionRuntimeBindings) -> Iterator[SharedSegment]:
    """The epoch as another process sees it."""
    segment = attached(bindings)
    yield segment
    segment.close()


def attached(bindings: SessionRuntimeBindings) -> SharedSegment:
    segment = bindings.shared_segment()
    return SharedSegment.attach(segment.namespace, segment.session_id)


@pytest.fixture
def token(namespace: str) -> Iterator[str]:
    """The token of an epoch that this process does not have attached: its runtime has left."""
    session_id = SessionId.new()
    with RuntimeSessionAdapter.ephemeral(namespace=namespace) as adapter:
        yield_token = adapter.prepare_bindings(session_id).to_token()
    yield yield_token
    with RuntimeSessionAdapter.ephemeral(namespace=namespace) as adapter:
        adapter.register_session(session_id)
        adapter.unregister_session(session_id)


def descriptors() -> list[str]:
    """The files in shared memory that this process has open."""
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            found.append(str(entry.readlink()))
    return [name for name in found if "/shmepoch." in name or "/dev/shm/#" in name]


def held(observer: SharedSegment) -> list[int]:
    """The bytes of the epoch that other attachments hold."""
    bytes_ = [*LOCKS, *range(at.PARTICIPANT_BYTE, at.PARTICIPANT_BYTE + 8)]
    return [byte for byte in bytes_ if is_locked(observer.fd, byte)]


# An interrupted callback of a weak reference can only be logged.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_attach(token: str) -> None:
    handle = SessionRuntimeBindings.from_token(token)
    segment = handle.shared_segment()
    observer = SharedSegment.attach(segment.namespace, segment.session_id)
    handle.close()
    before = descriptors()
    for interrupt in interrupts():
        interrupt.during(lambda: SessionRuntimeBindings.from_token(token))
        assert held(observer) == []
        assert descriptors() == before
    SessionRuntimeBindings.from_token(token).close()
    observer.close()


def test_leaving(token: str) -> None:
    before = descriptors()
    for interrupt in interrupts():
        bindings = SessionRuntimeBindings.from_token(token)
        bindings.ops_lifecycle.register_operation(spec(str(interrupt)))
        interrupt.during(bindings.close)
        bindings.close()
        assert descriptors() == before
    again = SessionRuntimeBindings.from_token(token)
    [me] = again.participants()
    assert me.is_self
    again.ops_lifecycle.check()
    again.close()


def first_use(bindings: SessionRuntimeBindings, interrupt: Interrupt) -> bool:
    """In a forked child: use the epoch, with an interrupt, and again; whether it was
    interrupted."""
    registry, id = bindings.ops_lifecycle, OperationId.new()
    interrupt.during(lambda: registry.register_operation(spec(id=id)))
    observer = attached(bindings)
    assert not is_locked(observer.fd, at.WRITER_BYTE)
    with suppress(Exception):  # the first try may have failed or not
        registry.register_operation(spec(id=id))
    registry.provisioning_succeeded(id)
    runners = {view.participant for view in registry._table.live() if view.spec.id == id}
    registry.complete_operation(id, result(id))
    [me] = [one for one in bindings.participants() if one.is_self]
    assert me.pid == os.getpid()
    assert runners == {me.key}

    mine = [one.slot for one in bindings.participants() if one.alive and one.pid == me.pid]
    assert mine == [me.slot], "it is one participant"
    registry.check()
    observer.close()
    bindings.close()
    assert descriptors() == []
    return interrupt.came


def test_the_first_use_after_a_fork(
    bindings: SessionRuntimeBindings, observer: SharedSegment
) -> None:
    before = held(observer)

    def use() -> bool:
        observer.close()
        return first_use(bindings, interrupt)

    for interrupt in interrupts():
        interrupt.came = in_a_child(use)
        assert held(observer) == before


@contextmanager
def in_the_child() -> Iterator[None]:
    """The end of a forked child: 1 if this raises, else 0."""
    try:
        signal.alarm(60)
        yield
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def in_a_child(act: Callable[[], bool]) -> bool:
    """The answer of a forked child, which must succeed."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        with in_the_child():
            os.write(writer, b"%d" % act())
    os.close(writer)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    with open(reader, "rb") as said:
        return said.read() == b"1"


# --- handlers that use the library ----------------------------------------------------------------


def unpickled(token: str) -> SessionRuntimeBindings:
    """Bindings that have attached on their first use."""
    bindings = SessionRuntimeBindings._unpickle(token)
    bindings.ops_lifecycle.active_count()
    return bindings


@pytest.mark.parametrize("attach", [SessionRuntimeBindings.from_token, unpickled])
def test_a_handler_attaches_in_the_middle_of_an_attach(
    token: str, attach: Callable[[str], SessionRuntimeBindings]
) -> None:
    before = descriptors()
    inner: list[tuple[SessionRuntimeBindings, RuntimeOpsLifecycleRegistry]] = []

    def attach_within() -> None:
        made = attach(token)
        inner.append((made, made.ops_lifecycle))

    for interrupt in interrupts(attach_within):
        outer: list[SessionRuntimeBindings] = []
        interrupt.during(lambda: outer.append(attach(token)))  # noqa: B023
        if interrupt.came:
            made, registry = inner.pop()
            assert made is outer[0]
            assert registry is made.ops_lifecycle
        assert pickle.loads(pickle.dumps(outer[0])) is outer[0]
        [me] = [one for one in outer[0].participants() if one.alive]
        assert me.is_self
        outer[0].ops_lifecycle.register_operation(spec())
        outer[0].ops_lifecycle.terminate_owner("done")
        outer[0].close()
        assert descriptors() == before


def first_uses(bindings: SessionRuntimeBindings, interrupt: Interrupt) -> bool:
    """In a forked child: use the epoch, with a handler that also uses it; whether the handler
    ran."""
    registry = bindings.ops_lifecycle
    interrupt.during(lambda: registry.register_operation(spec("outer")))
    [me] = [one for one in bindings.participants() if one.is_self]
    mine = [one.slot for one in bindings.participants() if one.alive and one.pid == os.getpid()]
    assert mine == [me.slot]
    assert {view.participant for view in registry._table.live()} == {me.key}
    names = [one.display_name for one in registry.list_operations()]
    assert "outer" in names
    registry.check()
    registry.terminate_owner("done")
    registry.collect_completed()
    bindings.close()
    assert descriptors() == []
    return interrupt.came


def test_a_handler_uses_the_epoch_in_the_middle_of_its_first_use(
    bindings: SessionRuntimeBindings,
) -> None:
    def use() -> None:
        bindings.ops_lifecycle.register_operation(spec("inner"))

    for interrupt in interrupts(use):
        interrupt.came = in_a_child(lambda: first_uses(bindings, interrupt))  # noqa: B023
        bindings.ops_lifecycle.check()


VERBS: Final[dict[str, Callable[[SessionRuntimeBindings, OperationId], object]]] = {
    "complete": lambda bindings, id: bindings.ops_lifecycle.complete_operation(id, result(id)),
    "retire": lambda bindings, id: bindings.ops_lifecycle.request_retire(id),
    "terminate": lambda bindings, id: bindings.ops_lifecycle.terminate_owner("all"),
    "watch": lambda bindings, id: bindings.ops_lifecycle.register_watcher(id),
}
#: Only these verbs: a fork at each point takes long.
FORKED: Final = ("complete", "watch")


@pytest.mark.parametrize("name", VERBS)
def test_a_handler_leaves_the_epoch_in_the_middle_of_a_verb(token: str, name: str) -> None:
    before = descriptors()
    kept: list[SessionRuntimeBindings] = []

    def leave() -> None:
        kept[0].close()

    for interrupt in interrupts(leave, least=2):
        bindings = SessionRuntimeBindings.from_token(token)
        kept[:] = [bindings]
        observer, id = attached(bindings), OperationId.new()
        bindings.ops_lifecycle.register_operation(spec(id=id))
        bindings.ops_lifecycle.provisioning_succeeded(id)
        with suppress(BindingsClosed):
            interrupt.during(lambda: VERBS[name](bindings, id))  # noqa: B023
        bindings.close()
        assert held(observer) == []
        RuntimeOpsLifecycleRegistry(observer).check()
        observer.close()
        assert descriptors() == before


@pytest.mark.parametrize("name", FORKED)
def test_a_handler_forks_in_the_middle_of_a_verb(token: str, name: str) -> None:
    """The child maps the memory again, uses the epoch, and leaves it; its parent goes on."""
    bindings = SessionRuntimeBindings.from_token(token)
    registry = bindings.ops_lifecycle
    children: list[int] = []

    def fork() -> None:
        pid = os.fork()
        if pid == 0:
            with in_the_child():
                registry.register_operation(spec("the child's"))
                bindings.close()
        children.append(pid)

    for interrupt in interrupts(fork, least=2):
        id = OperationId.new()
        registry.register_operation(spec(id=id))
        registry.provisioning_succeeded(id)
        interrupt.during(lambda: VERBS[name](bindings, id))  # noqa: B023
        for pid in children:
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        names = [one.display_name for one in registry.list_operations()]
        assert names.count("the child's") == len(children), "it was lost"
        children.clear()
        registry.check()
        registry.terminate_owner("done")
        registry.collect_completed()
    bindings.close()


@pytest.mark.parametrize("name", FORKED)
def test_a_child_goes_on_with_a_transition_of_private_memory(name: str) -> None:
    """The child has a copy of the memory, and completes the transition there."""
    parent = os.getpid()

    def fork() -> None:
        pid = os.fork()
        if pid:
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0

    for interrupt in interrupts(fork, least=2):
        bindings = SessionRuntimeBindings.standalone(SessionId.new(), SMALL)
        id = OperationId.new()
        bindings.ops_lifecycle.register_operation(spec(id=id))
        bindings.ops_lifecycle.provisioning_succeeded(id)
        try:
            interrupt.during(lambda: VERBS[name](bindings, id))  # noqa: B023
            bindings.ops_lifecycle.register_operation(spec())
            bindings.ops_lifecycle.check()
        except BaseException:
            if os.getpid() != parent:
                os._exit(1)
            raise
        if os.getpid() != parent:
            os._exit(0)


def test_preparing_and_resetting(namespace: str) -> None:
    """Each call is interrupted, at any point of its work."""
    before = descriptors()
    session_id = SessionId.new()
    for interrupt in interrupts():
        with RuntimeSessionAdapter.ephemeral(namespace=namespace) as adapter:
            interrupt.during(lambda: adapter.prepare_bindings(session_id))
        assert descriptors() == before
    for interrupt in interrupts():
        with RuntimeSessionAdapter.ephemeral(namespace=namespace) as adapter:
            adapter.register_session(session_id)
            with suppress(EpochSealed):
                interrupt.during(lambda: adapter.reset_session(session_id))
        assert descriptors() == before
    with RuntimeSessionAdapter.ephemeral(namespace=namespace) as adapter:
        adapter.register_session(session_id)
        adapter.unregister_session(session_id)
    assert names_in(namespace) == []


# --- every bytecode -------------------------------------------------------------------------------


def answer(bindings: SessionRuntimeBindings, test: Channel) -> None:
    """Use the epoch, as another process, on each request."""
    while test.hear():
        id = OperationId.new()
        bindings.ops_lifecycle.register_operation(spec("another's", id=id))
        bindings.ops_lifecycle.cancel_operation(id)
        bindings.ops_lifecycle.check()
        test.say("done")


def wait_all(registry: RuntimeOpsLifecycleRegistry, id: OperationId) -> None:
    """Wait at the barrier of another handle: a traced frame may keep its turn for a while."""
    RuntimeOpsLifecycleRegistry(registry._segment).wait_all(RunId.new(), [id], 0)


EVERY_VERB: Final[dict[str, Callable[[RuntimeOpsLifecycleRegistry, OperationId], object]]] = {
    "register_operation": lambda r, id: r.register_operation(spec()),
    "register_operations": lambda r, id: r.register_operations([spec(), spec()]),
    "provisioning_succeeded": lambda r, id: r.provisioning_succeeded(id),
    "provisioning_failed": lambda r, id: r.provisioning_failed(id, "no room"),
    "report_progress": lambda r, id: r.report_progress(id, OperationProgressUpdate("on", 5)),
    "request_retire": lambda r, id: r.request_retire(id),
    "complete_operation": lambda r, id: r.complete_operation(id, result(id)),
    "complete_operations": lambda r, id: r.complete_operations([result(id)]),
    "terminate_owner": lambda r, id: r.terminate_owner("all"),
    "collect_completed": lambda r, id: r.collect_completed(),
    "register_watcher": lambda r, id: r.register_watcher(id).close(),
    "wait_all": wait_all,
    "snapshot": lambda r, id: r.snapshot(id),
    "list_operations": lambda r, id: r.list_operations(),
    "list_since": lambda r, id: r.completion_feed().list_since(0),
}
#: The verbs of operations that are still in provisioning.
_PROVISIONING: Final = ("provisioning_succeeded", "provisioning_failed")


@pytest.fixture
def small(namespace: str) -> Iterator[SessionRuntimeBindings]:
    """Bindings of a small epoch, so that reading all of it has few bytecodes."""
    config = OpsLifecycleConfig(
        max_completed=1, max_operations=4, feed_bytes=at.PAGE + 4096, max_participants=4
    )
    with RuntimeSessionAdapter.ephemeral(namespace=namespace, config=config) as adapter:
        bindings = adapter.prepare_bindings(SessionId.new())
        yield bindings
        adapter.unregister_session(bindings.session_id)


@pytest.mark.parametrize("verb", EVERY_VERB)
def test_an_exception_at_every_bytecode(small: SessionRuntimeBindings, verb: str) -> None:
    """No bytecode runs under the writer lock: after an exception at any point, another process can
    use the epoch at once."""
    registry, act, observer = small.ops_lifecycle, EVERY_VERB[verb], attached(small)
    with start(answer, small) as other:
        for point in count():
            id = OperationId.new()
            registry.register_operation(spec(id=id))
            if verb not in _PROVISIONING:
                registry.provisioning_succeeded(id)
            with (
                EveryBytecode(point, lambda: is_free(observer)) as bytecode,
                suppress(TimeoutError),
            ):
                act(registry, id)
            assert bytecode.free, "a bytecode ran under the lock"
            registry.terminate_owner("r" * 1500)  # and drop everything in the feed with it
            if point % 10 == 0 or not bytecode.came:
                other.say(True)
                assert other.hear() == "done"
            if not bytecode.came:
                break
        other.say(False)
        other.result()
    observer.close()
    assert point > 20
