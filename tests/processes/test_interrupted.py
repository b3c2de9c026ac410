"""What a signal handler raises, wherever it does, leaves no descriptor and no lock behind."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

import pytest

from shmepoch import (
    EpochSealed,
    OperationId,
    RuntimeSessionAdapter,
    SessionId,
    SessionRuntimeBindings,
)
from shmepoch.memory import layout as at
from shmepoch.memory._native import is_locked
from shmepoch.memory.segment import SharedSegment
from tests.processes.interrupting import Interrupt, interrupts
from tests.support import names_in, result, spec

#: The lock bytes that say something of others.
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
    """Of an epoch that this process has nothing of: its runtime has left."""
    session_id = SessionId.new()
    with RuntimeSessionAdapter.ephemeral(namespace=namespace) as adapter:
        yield_token = adapter.prepare_bindings(session_id).to_token()
    yield yield_token
    with RuntimeSessionAdapter.ephemeral(namespace=namespace) as adapter:
        adapter.register_session(session_id)
        adapter.unregister_session(session_id)


def descriptors() -> list[str]:
    """What this process has open in shared memory."""
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            found.append(str(entry.readlink()))
    return [name for name in found if "/shmepoch." in name or "/dev/shm/#" in name]


def held(observer: SharedSegment) -> list[int]:
    """The bytes of the epoch that another attachment than this holds."""
    bytes_ = [*LOCKS, *range(at.PARTICIPANT_BYTE, at.PARTICIPANT_BYTE + 8)]
    return [byte for byte in bytes_ if is_locked(observer.fd, byte)]


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
    """In a forked child: use the epoch, interrupted, and again; whether it was interrupted."""
    registry, id = bindings.ops_lifecycle, OperationId.new()
    interrupt.during(lambda: registry.register_operation(spec(id=id)))
    observer = attached(bindings)
    assert not is_locked(observer.fd, at.WRITER_BYTE)
    with suppress(Exception):  # whatever became of the first try
        registry.register_operation(spec(id=id))
    registry.provisioning_succeeded(id)
    registry.complete_operation(id, result(id))
    [me] = [one for one in bindings.participants() if one.is_self]
    assert me.pid == os.getpid()
    runs = {slot.participant for slot in registry._table.held() if slot.id == id.bytes}
    assert runs == {me.key}
    mine = [one.slot for one in bindings.participants() if one.alive and one.pid == me.pid]
    assert mine == [me.slot], "it is one participant"
    registry.check()
    observer.close()
    bindings.close()
    assert descriptors() == []
    return interrupt.raised


def test_the_first_use_after_a_fork(
    bindings: SessionRuntimeBindings, observer: SharedSegment
) -> None:
    before = held(observer)
    for interrupt in interrupts():
        pid = os.fork()
        if pid == 0:
            code = 2
            try:
                signal.alarm(60)
                observer.close()
                code = int(first_use(bindings, interrupt))
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code in (0, 1)
        interrupt.raised = bool(code)
        assert held(observer) == before


def test_preparing_and_resetting(namespace: str) -> None:
    """Each interrupted, with all that they make and replace."""
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
