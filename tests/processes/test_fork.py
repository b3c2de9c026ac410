"""Forked children: they do not hold their parent's locks or identity, and attach as themselves."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import subprocess
import sys
import threading
from functools import partial
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

import pytest

from shmepoch import (
    AdapterClosed,
    AgentFactory,
    EpochGone,
    EpochSealed,
    OperationId,
    OperationStatus,
    Role,
    RuntimeAlreadyActive,
    RuntimeOpsLifecycleRegistry,
    RuntimeSessionAdapter,
    SessionId,
    SessionOwned,
    SessionRuntimeBindings,
    Terminated,
)
from shmepoch.epoch import registry
from shmepoch.epoch.reading import OperationReader
from shmepoch.memory.removal import remove_unused
from shmepoch.memory.segment import SharedSegment
from tests.processes.children import Channel, start
from tests.support import eventually, forked, held_writer, spec


def register(bindings: SessionRuntimeBindings, test: Channel, id: OperationId) -> list[int]:
    """Register an operation; returns the processes that are attached then."""
    bindings.ops_lifecycle.register_operation(spec("the child's", id=id))
    return [one.pid for one in bindings.participants()]


def test_a_child_forked_in_the_middle_of_a_first_use_does_not_wait_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The other thread exists in the parent only, and never completes the first use in the
    child."""
    entered, go_on = threading.Event(), threading.Event()

    def made_slowly(*args: Any) -> OperationReader:
        entered.set()
        go_on.wait(60)
        return OperationReader(*args)

    monkeypatch.setattr(registry, "OperationReader", made_slowly)
    first = threading.Thread(target=RuntimeOpsLifecycleRegistry().list_operations)
    first.start()
    assert entered.wait(60)

    def use_first() -> None:
        registry.OperationReader = OperationReader  # type: ignore[attr-defined]
        RuntimeOpsLifecycleRegistry().list_operations()

    code = forked(use_first)
    go_on.set()
    first.join()
    assert code == 0


def test_a_child_forked_in_the_middle_of_an_attach_does_not_wait_for_it(
    bindings: SessionRuntimeBindings, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    session_id = SessionId.new()
    with RuntimeSessionAdapter.ephemeral(namespace=namespace) as other:
        token = other.prepare_bindings(session_id).to_token()
    entered, go_on = threading.Event(), threading.Event()
    attach_epoch = SharedSegment.attach_epoch

    def attached_slowly(*args: Any) -> SharedSegment:
        entered.set()
        go_on.wait(60)
        return attach_epoch(*args)

    monkeypatch.setattr(SharedSegment, "attach_epoch", attached_slowly)
    first = threading.Thread(target=lambda: SessionRuntimeBindings.from_token(token).close())
    first.start()
    assert entered.wait(60)

    def attach() -> None:
        go_on.set()  # the child's event: its parent still waits
        assert SessionRuntimeBindings.from_token(bindings.to_token()) is bindings
        SessionRuntimeBindings.from_token(token).close()

    code = forked(attach)
    go_on.set()
    first.join()
    assert remove_unused(namespace, session_id)
    assert code == 0


# --- attaching again --------------------------------------------------------------------------


def look_first(bindings: SessionRuntimeBindings, test: Channel) -> None:
    """Read without a transition: that needs no attachment."""
    test.say(bindings.cursor_state.snapshot().agent_applied_cursor)
    test.hear()
    bindings.ops_lifecycle.register_operation(spec("the child's"))
    test.say("attached")
    test.hear()


def test_a_forked_child_attaches_on_its_first_use(bindings: SessionRuntimeBindings) -> None:
    bindings.cursor_state.agent_applied_cursor.advance(3)
    with start(look_first, bindings) as child:
        assert child.hear() == 3
        assert [one.pid for one in bindings.participants()] == [os.getpid()]
        child.say("register")
        assert child.hear() == "attached"
        found = {one.pid: (one.role, one.alive) for one in bindings.participants()}
        assert found == {os.getpid(): (Role.RUNTIME, True), child.pid: (Role.WORKER, True)}
        assert bindings.shared_segment().owned is False  # it asks about other attachments


def attach_in_threads(bindings: SessionRuntimeBindings, test: Channel) -> int:
    """Use the inherited bindings first in many threads at once; returns how often this process is
    listed."""
    barrier = threading.Barrier(8)

    def act() -> None:
        barrier.wait()
        bindings.ops_lifecycle.register_operation(spec())

    threads = [threading.Thread(target=act) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [one.pid for one in bindings.participants()].count(os.getpid())


def test_many_threads_of_a_forked_child_attach_once(bindings: SessionRuntimeBindings) -> None:
    with start(attach_in_threads, bindings) as child:
        assert child.result() == 1
    assert len(bindings.ops_lifecycle.list_operations()) == 8


def test_an_agent_forked_from_the_runtime_is_seen_as_one(
    bindings: SessionRuntimeBindings,
) -> None:
    def agent(bindings: SessionRuntimeBindings, test: Channel) -> None:
        AgentFactory().build(bindings.session_id, SessionOwned(bindings))
        test.say(bindings.role)
        test.hear()

    with start(agent, bindings) as child:
        assert child.hear() is Role.AGENT
        found = {one.pid: one.role for one in bindings.participants()}
        assert found == {os.getpid(): Role.RUNTIME, child.pid: Role.AGENT}


def use(bindings: SessionRuntimeBindings, test: Channel) -> None:
    """Use the bindings when told to."""
    test.hear()
    bindings.ops_lifecycle.register_operation(spec())


def test_a_child_forked_before_its_parents_epoch_ended_is_told_so(
    adapter: RuntimeSessionAdapter,
) -> None:
    session_id = SessionId.new()
    bindings = adapter.prepare_bindings(session_id)
    with start(use, bindings) as replaced, start(use, bindings) as removed:
        adapter.reset_session(session_id)
        replaced.say("use")
        with pytest.raises(EpochSealed):
            replaced.result()
        adapter.unregister_session(session_id)
        removed.say("use")
        with pytest.raises((EpochGone, EpochSealed)):
            removed.result()


def test_a_child_lives_on_when_its_parent_has_left(bindings: SessionRuntimeBindings) -> None:
    def leave(bindings: SessionRuntimeBindings, test: Channel) -> None:
        with start(use, bindings) as grandchild:
            bindings.close()
            grandchild.say("use")
            grandchild.result()

    with start(leave, bindings, method="fork") as child:
        child.result()
    assert len(bindings.ops_lifecycle.list_operations()) == 1


def forks(bindings: SessionRuntimeBindings, test: Channel, generations: int) -> list[int]:
    """Register an operation, and let a child do the same; returns the processes that did."""
    pids = []
    if generations:
        with start(forks, bindings, generations - 1) as child:
            bindings.ops_lifecycle.register_operation(spec(str(generations)))
            pids = child.result()
    bindings.ops_lifecycle.register_operation(spec("last"))
    mine = [one.pid for one in bindings.participants() if one.is_self]
    return [*mine, *pids]


def test_generations_of_forks_each_are_themselves(bindings: SessionRuntimeBindings) -> None:
    with start(forks, bindings, 3) as child:
        pids = child.result()
    assert len(pids) == len(set(pids)) == 4
    assert os.getpid() not in pids


# --- locks ------------------------------------------------------------------------------------


def live_in(connection: Connection) -> None:
    """A grandchild of the test that acts on each message, until the connection ends."""
    try:
        while True:
            act = connection.recv()
            connection.send(act())
    except EOFError:
        os._exit(0)


class Told:
    """The message for the grandchild: use the inherited bindings."""

    bindings: SessionRuntimeBindings

    def __call__(self) -> list[int]:
        Told.bindings.ops_lifecycle.register_operation(spec("the grandchild's"))
        return [one.pid for one in Told.bindings.participants() if one.is_self]


def run_and_fork(
    bindings: SessionRuntimeBindings, test: Channel, connection: Connection, id: OperationId
) -> None:
    """Run an operation, hold the writer lock, and fork a child that outlives this process."""
    Told.bindings = bindings
    registry = bindings.ops_lifecycle
    registry.register_operation(spec(id=id))
    registry.provisioning_succeeded(id)
    held_writer(bindings.shared_segment()).__enter__()
    pid = os.fork()
    if pid == 0:
        test.connection.close()
        live_in(connection)
    connection.close()
    test.say(pid)
    test.hear()


@pytest.mark.parametrize("method", ["fork", "spawn"])  # the one attaches again, the other attaches
def test_the_death_of_a_parent_is_noticed_while_its_forked_child_lives(
    bindings: SessionRuntimeBindings, method: str
) -> None:
    registry, id = bindings.ops_lifecycle, OperationId.new()
    ours, theirs = Pipe()
    with ours, start(run_and_fork, bindings, theirs, id, method=method) as parent:
        theirs.close()
        grandchild = parent.hear()
        parent.kill()
        outcome = registry.register_watcher(id).wait(60)
        assert isinstance(outcome, Terminated)
        assert str(parent.pid) in outcome.reason
        eventually(lambda: [one.pid for one in bindings.participants()] == [os.getpid()])
        # The grandchild attaches as a new participant, and dies as that one.
        ours.send(Told())
        assert ours.recv() == [grandchild]
        assert registry.active_count() == 1
        os.kill(grandchild, signal.SIGKILL)
        eventually(lambda: registry.active_count() == 0)


def test_a_transition_in_progress_in_the_parent_is_waited_for(
    bindings: SessionRuntimeBindings,
) -> None:
    id = OperationId.new()
    segment = bindings.shared_segment()
    with held_writer(segment):
        child = start(register, bindings, id)
        # It was forked inside the parent's transition, and must wait for its end: it attaches, and
        # then sleeps between its attempts to take the lock.
        eventually(lambda: child.pid in [one.pid for one in bindings.participants()])
        stat = Path(f"/proc/{child.pid}/stat")
        eventually(lambda: stat.read_text().rpartition(")")[2].split()[0] == "S")
        assert child.silent
    with child:
        assert child.pid in child.result()
    assert bindings.ops_lifecycle.snapshot(id) is not None


def test_what_a_process_starts_by_exec_holds_nothing(bindings: SessionRuntimeBindings) -> None:
    """Descriptors are closed on exec, even if the starter closes none."""

    def run_and_exec(bindings: SessionRuntimeBindings, test: Channel, id: OperationId) -> None:
        bindings.ops_lifecycle.register_operation(spec(id=id))
        command = [sys.executable, "-c", "input()"]
        started = subprocess.Popen(command, stdin=subprocess.PIPE, close_fds=False)
        test.say(started.pid)
        test.hear()

    id = OperationId.new()
    with start(run_and_exec, bindings, id) as parent:
        started = parent.hear()
        assert not [name for name in descriptors(started) if name.startswith("/dev/shm/shmepoch")]
        os.kill(started, signal.SIGSTOP)  # it must outlive its parent, whose pipe it reads
        parent.kill()
        outcome = bindings.ops_lifecycle.register_watcher(id).wait(60)
        assert isinstance(outcome, Terminated)
        os.kill(started, signal.SIGKILL)


def descriptors(pid: int) -> list[str]:
    """The open files of a process."""
    found = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        try:
            found.append(os.readlink(f"/proc/{pid}/fd/{fd}"))
        except FileNotFoundError:
            continue
    return found


def is_alone(bindings: SessionRuntimeBindings) -> bool:
    """Whether only this process is attached."""
    return [one.pid for one in bindings.participants()] == [os.getpid()]


def fork_without_descriptors(bindings: SessionRuntimeBindings, test: Channel, token: str) -> None:
    """Fork a child that cannot open files at first, and then can. It sends whether it is listed as
    itself."""
    both = bindings, SessionRuntimeBindings.from_token(token)
    for each in both:
        each.announce(Role.AGENT)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, most))
    pid = os.fork()
    if pid:
        _, status = os.waitpid(pid, 0)
        os._exit(os.waitstatus_to_exitcode(status))
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    for each in both:
        each.cursor_state.agent_applied_cursor.advance(5)
    test.say(
        [one.pid == os.getpid() for each in both for one in each.participants() if one.is_self]
    )
    os._exit(0)


def test_a_child_that_can_open_nothing_is_no_impersonator(
    adapter: RuntimeSessionAdapter, bindings: SessionRuntimeBindings
) -> None:
    other = adapter.prepare_bindings(SessionId.new())
    with start(fork_without_descriptors, bindings, other.to_token()) as child:
        assert child.hear() == [True, True]
        child.join()
    for each in (bindings, other):
        assert each.cursor_state.agent_applied_cursor.load() == 5
        eventually(partial(is_alone, each))
    adapter.unregister_session(other.session_id)


# --- the parent, unharmed ---------------------------------------------------------------------


def fork_close_and_exit(bindings: SessionRuntimeBindings, test: Channel) -> None:
    """Close inherited bindings, before and after a use."""
    bindings.close()


def test_a_child_that_closes_leaves_its_parent_attached(
    bindings: SessionRuntimeBindings,
) -> None:
    with start(fork_close_and_exit, bindings) as child:
        child.result()
    [me] = bindings.participants()
    assert (me.pid, me.alive, me.is_self) == (os.getpid(), True, True)
    bindings.ops_lifecycle.register_operation(spec())
    namespace, session_id = bindings.shared_segment().namespace, bindings.session_id
    with start(be_the_runtime, None, namespace, session_id, method="spawn") as child:
        with pytest.raises(RuntimeAlreadyActive) as refused:
            child.result()
        assert refused.value.pid == os.getpid()


def be_the_runtime(bindings: None, test: Channel, namespace: str, session_id: SessionId) -> None:
    """Try to become the runtime of a session."""
    with RuntimeSessionAdapter.ephemeral(namespace=namespace) as adapter:
        adapter.register_session(session_id)


def test_an_adapter_belongs_to_the_process_that_made_it(
    adapter: RuntimeSessionAdapter, bindings: SessionRuntimeBindings
) -> None:
    def use_and_close(bindings: SessionRuntimeBindings, test: Channel) -> None:
        with pytest.raises(AdapterClosed):
            adapter.prepare_bindings(bindings.session_id)
        with pytest.raises(AdapterClosed):
            adapter.unregister_session(bindings.session_id)
        adapter.close()

    with start(use_and_close, bindings) as child:
        child.result()
    assert adapter.prepare_bindings(bindings.session_id) is bindings
    assert bindings.shared_segment().path.exists()


def test_a_fork_while_threads_and_coroutines_wait(bindings: SessionRuntimeBindings) -> None:
    registry = bindings.ops_lifecycle
    feed = registry.completion_feed()
    id, run = OperationId.new(), []
    registry.register_operation(spec(id=id))
    watches = [registry.register_watcher(id) for _ in range(4)]
    threads = [threading.Thread(target=lambda w=w: run.append(w.wait(60))) for w in watches[:2]]

    def in_the_child(bindings: SessionRuntimeBindings, test: Channel) -> str:
        async def wait() -> None:
            await bindings.ops_lifecycle.completion_feed().advanced(0)

        async def both() -> None:
            waiting = asyncio.ensure_future(wait())
            await asyncio.sleep(0)
            test.say("waiting")
            await asyncio.wait_for(waiting, 60)

        asyncio.run(both())
        return str(threading.active_count())

    async def wait_here() -> None:
        waiting = [asyncio.ensure_future(feed.advanced(0)) for _ in range(3)]
        awaited = [asyncio.ensure_future(_outcome(watch)) for watch in watches[2:]]
        await asyncio.sleep(0)
        with start(in_the_child, bindings) as child:
            assert child.hear() == "waiting"
            registry.cancel_operation(id, "everybody")
            await asyncio.wait_for(asyncio.gather(*waiting, *awaited), 60)
            child.result()

    for thread in threads:
        thread.start()
    asyncio.run(wait_here())
    for thread in threads:
        thread.join()
    operation = registry.snapshot(id)
    assert operation is not None
    assert operation.status is OperationStatus.CANCELLED
    assert run == [operation.terminal_outcome] * 2


async def _outcome(watch: object) -> object:
    return await watch  # type: ignore[misc]
