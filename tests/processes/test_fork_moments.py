"""A child is forked while another thread of its parent is at each moment inside the library.

The thread does not exist in the child. Its locks stay locked there, and its new descriptors stay
open. Here a process stops one of its threads at such a moment, forks a child, goes on, and is
killed.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from typing import Any, Final, NamedTuple

import pytest

from shmepoch import (
    AdapterClosed,
    OperationId,
    RunId,
    RuntimeSessionAdapter,
    SessionId,
    SessionRuntimeBindings,
    Terminated,
    WaitAlreadyActive,
)
from shmepoch.memory import doorbells, segment
from shmepoch.memory.participants import Participants
from shmepoch.runtime.supervision import Supervisor
from tests.epoch.deadline import run
from tests.processes.children import Channel, start
from tests.support import eventually, result, spec


class Moment(NamedTuple):
    """A function before which a thread is stopped, and the call that leads there."""

    owner: Any
    name: str
    act: Callable[[RuntimeSessionAdapter, SessionRuntimeBindings], object]


def take_over(adapter: RuntimeSessionAdapter, mine: SessionRuntimeBindings) -> None:
    """Prepare a session that has a segment already."""
    with RuntimeSessionAdapter.ephemeral() as before:
        before.register_session(there := SessionId.new())
    started(adapter.prepare_bindings(there))


def create(adapter: RuntimeSessionAdapter, mine: SessionRuntimeBindings) -> None:
    started(adapter.prepare_bindings(SessionId.new()))


def reset(adapter: RuntimeSessionAdapter, mine: SessionRuntimeBindings) -> None:
    started(adapter.reset_session(mine.session_id))


def end(adapter: RuntimeSessionAdapter, mine: SessionRuntimeBindings) -> None:
    session_id = SessionId.new()
    adapter.register_session(session_id)
    adapter.unregister_session(session_id)


async def wait_and_complete(mine: SessionRuntimeBindings, id: OperationId) -> None:
    registry = mine.ops_lifecycle
    waiting = asyncio.ensure_future(registry.all_ended(RunId.new(), [id]))
    await asyncio.sleep(0)
    registry.complete_operation(id, result(id))
    await waiting


def started(bindings: SessionRuntimeBindings) -> OperationId:
    """Start an operation in the epoch."""
    id = OperationId.new()
    bindings.ops_lifecycle.register_operation(spec("the parent's", id=id))
    bindings.ops_lifecycle.provisioning_succeeded(id)
    return id


MOMENTS: Final = {
    "opened to attach": Moment(segment, "read_header", take_over),
    "opened and mapped to attach": Moment(segment.SharedSegment, "__init__", take_over),
    "opened to create": Moment(segment, "write_header", create),
    "created": Moment(segment.SharedSegment, "publish", create),
    "joining": Moment(Participants, "_lock_slot", create),
    "joined": Moment(segment.SharedSegment, "try_own", take_over),
    "replacing": Moment(segment.SharedSegment, "publish", reset),
    "sealing": Moment(segment.SharedSegment, "seal", reset),
    "leaving": Moment(Participants, "leave", end),
}


@contextmanager
def stopped_at(moment: Moment, *arguments: Any) -> Iterator[None]:
    """Keep a thread of this process at the moment until the end of the block; then it finishes."""
    there, go_on = threading.Event(), threading.Event()
    original = getattr(moment.owner, moment.name)
    failed: list[BaseException] = []

    def stopping(*args: Any, **kwargs: Any) -> Any:
        if threading.current_thread() is thread and not there.is_set():
            there.set()
            go_on.wait(60)
        return original(*args, **kwargs)

    def act() -> None:
        try:
            moment.act(*arguments)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=act)
    setattr(moment.owner, moment.name, stopping)
    thread.start()
    assert there.wait(60)
    try:
        yield
    finally:
        go_on.set()
        thread.join(60)
        setattr(moment.owner, moment.name, original)
    assert not failed, failed


def descriptors() -> list[str]:
    """The files of shmepoch that this process has open."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
    return [target for target in found if target.startswith("/dev/shm/") and "pym-" not in target]


def use_everything(adapter: RuntimeSessionAdapter, token: str) -> str:
    """In the forked child: check that each call returns at once; returns the faults."""
    try:
        assert descriptors() == []
        adapter.close()
        assert not adapter.contains_session(SessionId.new())
        for call in (
            adapter.register_session,
            adapter.prepare_bindings,
            adapter.ops_lifecycle_registry,
            adapter.reset_session,
            adapter.unregister_session,
        ):
            with pytest.raises(AdapterClosed):
                call(SessionId.new())
        with closing(SessionRuntimeBindings.from_token(token)) as attached:
            id = started(attached)
            run(wait_and_complete(attached, id))
    except BaseException:
        return traceback.format_exc()
    return ""


def live_through(bindings: SessionRuntimeBindings, test: Channel, name: str) -> None:
    """Stop a thread at the moment, fork a child that lives on, and be killed as the runtime."""
    adapter = RuntimeSessionAdapter.ephemeral()
    mine = adapter.prepare_bindings(SessionId.new())
    started(mine)
    token = bindings.to_token()
    with stopped_at(MOMENTS[name], adapter, mine):
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(30)
            test.say(use_everything(adapter, token))
            test.connection.close()
            while True:
                signal.pause()
    owned = list(adapter._sessions)
    test.say((child, owned))
    test.hear()


@pytest.mark.parametrize("name", MOMENTS)
def test_a_child_waits_for_nothing_and_holds_nothing_of_its_parent(
    bindings: SessionRuntimeBindings, adapter: RuntimeSessionAdapter, name: str
) -> None:
    with start(live_through, bindings, name) as parent:
        said = [parent.hear(), parent.hear()]
        wrong = [each for each in said if isinstance(each, str)]
        [(child, owned)] = [each for each in said if not isinstance(each, str)]
        try:
            assert wrong == [""]
            parent.kill()
            for session_id in owned:  # their runtime is dead, though its child lives
                registry = adapter.prepare_bindings(session_id).ops_lifecycle
                assert registry.active_count() == 0
                outcomes = [one.terminal_outcome for one in registry.list_operations()]
                assert any(isinstance(outcome, Terminated) for outcome in outcomes)
                adapter.unregister_session(session_id)
        finally:
            os.kill(child, signal.SIGKILL)
    eventually(lambda: no_doorbells_in(adapter._namespace))  # of the child, which was killed


def no_doorbells_in(namespace: str) -> bool:
    """Whether the page of the killed processes is gone."""
    doorbells.remove_unused_doorbells(namespace)
    return not doorbells.doorbells_path(namespace).exists()


def close_there(bindings: None, test: Channel, adapter: RuntimeSessionAdapter) -> None:
    adapter.close()


def test_closing_in_a_child_does_not_wait_for_a_supervision_that_begins(
    bindings: SessionRuntimeBindings, namespace: str
) -> None:
    moment = Moment(Supervisor, "start", create)
    with RuntimeSessionAdapter.ephemeral(namespace=namespace) as adapter:
        with stopped_at(moment, adapter, bindings), start(close_there, None, adapter) as child:
            child.result()
        for session_id in list(adapter._sessions):
            adapter.unregister_session(session_id)


# --- barriers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False])
def test_a_barrier_of_another_thread_of_the_parent_is_not_the_childs(
    bindings: SessionRuntimeBindings, shared: bool
) -> None:
    used = bindings if shared else SessionRuntimeBindings.standalone(SessionId.new())
    registry = used.ops_lifecycle
    id = started(used)
    thread = threading.Thread(target=registry.wait_all, args=(RunId.new(), [id], 60))
    thread.start()
    with pytest.raises(WaitAlreadyActive):
        eventually(lambda: registry.wait_all(RunId.new(), [], 0) is None)

    def wait_in_the_child(bindings: SessionRuntimeBindings, test: Channel) -> None:
        for _ in range(2):
            registry.wait_all(RunId.new(), [], 0)
            run(registry.all_ended(RunId.new(), []))

    with start(wait_in_the_child, None) as child:
        child.result()
    with pytest.raises(WaitAlreadyActive):
        registry.wait_all(RunId.new(), [], 0)
    registry.complete_operation(id, result(id))
    thread.join(60)
    registry.wait_all(RunId.new(), [id], 0)
