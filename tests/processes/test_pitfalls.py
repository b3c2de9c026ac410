"""How systems like this one have failed their users: each failure provoked, and not happening."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import os
import random
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from itertools import product
from typing import Any

import pytest

from shmepoch import (
    AgentFactory,
    BindingsMismatch,
    Continuation,
    EpochCursorSnapshot,
    EpochGone,
    OperationId,
    OpsLifecycleConfig,
    ParticipantsExhausted,
    PersistedOpsSnapshot,
    RuntimeEpochId,
    RuntimeLoop,
    RuntimeOpsLifecycleRegistry,
    RuntimeSessionAdapter,
    SegmentCorrupted,
    SessionId,
    SessionOwned,
    SessionRuntimeBindings,
    SharedMemoryExhausted,
    ShmepochError,
    Terminated,
    WitnessMismatch,
)
from shmepoch import _native as at
from shmepoch.epoch.handle import EpochHandle
from shmepoch.memory.files import SHM_DIR
from shmepoch.memory.namespaces import list_sessions, segment_path
from shmepoch.memory.removal import remove_unused
from shmepoch.memory.segment import SharedSegment
from tests.processes.children import METHODS, Channel, Child, start
from tests.processes.private_shm import NoPrivateMounts, mount_private_shm
from tests.support import eventually, held_writer, names_in, result, spec


def end(registry: RuntimeOpsLifecycleRegistry, reason: str = "ended") -> OperationId:
    """The id of a fresh operation that has ended."""
    id = OperationId.new()
    registry.register_operation(spec(id=id))
    registry.cancel_operation(id, reason)
    return id


def held_here() -> list[str]:
    """The files in shared memory that this process has open."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
    return [name for name in found if name.startswith(str(SHM_DIR))]


def mapped_here() -> list[str]:
    """The files in shared memory that this process has mapped."""
    with open("/proc/self/maps") as maps:
        return [line.split()[-1] for line in maps if str(SHM_DIR) in line]


# --- segments that disappear ------------------------------------------------------------------


def attach_and_end(bindings: SessionRuntimeBindings, test: Channel, how: str) -> None:
    """Use the epoch, and end in one of the ways in which processes end."""
    bindings.ops_lifecycle.completion_feed().list_since(0)
    end(bindings.ops_lifecycle)
    match how:
        case "return":
            return
        case "exit":
            sys.exit(0)
        case "abrupt":
            os._exit(0)
        case "close":
            bindings.close()
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("how", ["return", "exit", "abrupt", "close", "kill"])
@pytest.mark.parametrize("method", METHODS)
def test_a_process_that_attached_and_ended_does_not_remove_the_segment(
    bindings: SessionRuntimeBindings, method: str, how: str
) -> None:
    """A process that was only attached unlinked the segment of all when it exited."""
    with start(attach_and_end, bindings, how, method=method) as child:
        child.join()
    assert bindings.shared_segment().path.exists()
    with start(attach_and_end, bindings, "return", method="spawn") as child:
        child.result()
    assert bindings.ops_lifecycle.completion_feed().watermark() == 2


def fail_to_map(bindings: None, test: Channel, token: str) -> None:
    """Attach without enough address space for the mapping, and then with it."""
    with open("/proc/self/statm") as statm:
        in_use = int(statm.read().split()[0]) * resource.getpagesize()
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (in_use + 16 * 2**20, most))
    with pytest.raises(OSError) as failed:
        SessionRuntimeBindings.from_token(token)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    assert failed.value.errno == errno.ENOMEM
    assert held_here() == mapped_here() == []
    end(SessionRuntimeBindings.from_token(token).ops_lifecycle)


def test_an_attach_whose_mapping_fails_leaves_no_trace(namespace: str) -> None:
    """An attach that had no memory for the mapping unlinked the owner's live segment."""
    config = OpsLifecycleConfig(feed_bytes=64 * 2**20)
    with RuntimeSessionAdapter.ephemeral(namespace=namespace, config=config) as adapter:
        bindings = adapter.prepare_bindings(SessionId.new())
        before = bindings.shared_segment().participants.joined()
        with start(fail_to_map, None, bindings.to_token(), method="spawn") as child:
            child.result()
        assert bindings.shared_segment().participants.joined() == before + 1
        assert bindings.ops_lifecycle.completion_feed().watermark() == 1
        adapter.unregister_session(bindings.session_id)


def fail_to_attach(bindings: None, test: Channel, handle: EpochHandle) -> None:
    """Make an attach that fails."""
    try:
        SessionRuntimeBindings.attach(handle)
    except ShmepochError as error:
        raised = error.with_traceback(None)  # its frames would keep the mapping
        raised.__context__ = None
    assert held_here() == []
    gc.collect()
    assert mapped_here() == []
    raise raised


@pytest.mark.parametrize("why", ["witness", "full", "corrupted"])
def test_an_attach_that_is_refused_leaves_no_trace(namespace: str, why: str) -> None:
    """A failed attach of any kind: nothing stays open, and the segment is as it was."""
    config = OpsLifecycleConfig(max_participants=1)
    with RuntimeSessionAdapter.ephemeral(namespace=namespace, config=config) as adapter:
        bindings = adapter.prepare_bindings(SessionId.new())
        memory, handle = bindings.shared_segment().memory, bindings.handle
        assert handle is not None
        error: type[Exception] = ParticipantsExhausted
        magic = memory.load(at.MAGIC_AT)
        if why == "witness":
            error = WitnessMismatch
            handle = EpochHandle(
                namespace=handle.namespace,
                session_id=handle.session_id,
                epoch_id=handle.epoch_id,
                witness=bytes(16),
            )
        elif why == "corrupted":
            error = SegmentCorrupted
            memory.store(at.MAGIC_AT, 0)
        participants, path = bindings.participants(), bindings.shared_segment().path
        with start(fail_to_attach, None, handle, method="spawn") as child, pytest.raises(error):
            child.result()
        memory.store(at.MAGIC_AT, magic)
        assert bindings.participants() == participants
        assert bindings.shared_segment().participants.joined() == 1
        assert path.exists()
        bindings.ops_lifecycle.check()
        adapter.unregister_session(bindings.session_id)


def test_a_segment_that_systemd_removed_is_named(
    adapter: RuntimeSessionAdapter, bindings: SessionRuntimeBindings
) -> None:
    """Segments disappeared when the user's last login ended (RemoveIPC=yes)."""
    token, path = bindings.to_token(), bindings.shared_segment().path
    kept = path.with_name(f"{path.name}.kept")
    path.rename(kept)  # other processes no longer see it
    with start(attach_by, None, token, method="spawn") as child, pytest.raises(EpochGone) as gone:
        child.result()
    assert (gone.value.session_id, gone.value.name) == (bindings.session_id, path.name)
    assert "RemoveIPC" in str(gone.value)
    end(bindings.ops_lifecycle)  # an attached process goes on
    eventually(lambda: not adapter.contains_session(bindings.session_id))
    kept.rename(path)
    assert adapter.prepare_bindings(bindings.session_id) is bindings


def attach_by(bindings: None, test: Channel, token: str) -> None:
    SessionRuntimeBindings.from_token(token)


# --- a full /dev/shm --------------------------------------------------------------------------

_SMALL = OpsLifecycleConfig(max_completed=4, max_operations=4, feed_bytes=16 * 1024)
_ROOM = 128 * 1024


def in_a_small_shm(bindings: None, test: Channel, namespace: str) -> str:
    """Make epochs in a /dev/shm that is too small for one, and that another one fills."""
    try:
        mount_private_shm(_ROOM)
    except NoPrivateMounts as error:
        return str(error)
    session_id = SessionId.new()
    with RuntimeSessionAdapter.ephemeral(namespace=namespace) as adapter:
        with pytest.raises(SharedMemoryExhausted) as exhausted:
            adapter.prepare_bindings(session_id)
        assert exhausted.value.need > 2 * _ROOM
        assert exhausted.value.room == _ROOM
        for fact in (exhausted.value.need, exhausted.value.room, "shm-size", "OpsLifecycleConfig"):
            assert str(fact) in str(exhausted.value)
        assert os.listdir(SHM_DIR) == held_here() == mapped_here() == []
        assert not adapter.contains_session(session_id)
    with RuntimeSessionAdapter.ephemeral(namespace=namespace, config=_SMALL) as adapter:
        mine = adapter.prepare_bindings(session_id)
        # Another file takes all remaining room; the epoch has all its pages all the same.
        filler = os.open(SHM_DIR / "filler", os.O_CREAT | os.O_WRONLY)
        os.posix_fallocate(filler, 0, os.statvfs(SHM_DIR).f_bavail * os.statvfs(SHM_DIR).f_frsize)
        assert os.statvfs(SHM_DIR).f_bavail == 0
        for _ in range(400):  # round the byte ring, many times
            end(mine.ops_lifecycle, "x" * 500)
        mine.ops_lifecycle.check()
        adapter.unregister_session(session_id)
    return ""


def test_a_full_shm_is_an_error_at_creation_and_never_later(namespace: str) -> None:
    """Pages were allocated lazily, and a full /dev/shm killed a worker long after its start."""
    with start(in_a_small_shm, None, namespace, method="spawn") as child:
        not_possible = child.result()
    if not_possible:
        pytest.skip(f"no private mounts: {not_possible}")


# --- idle -------------------------------------------------------------------------------------

_IDLE_S = 1.0


def processor_share(wait: Callable[[], object]) -> float:
    """The share of a processor that this process used while it waited."""
    before, begin = time.process_time(), time.monotonic()
    wait()
    return (time.process_time() - before) / (time.monotonic() - begin)


def idle(bindings: SessionRuntimeBindings, test: Channel, how: str, namespace: str) -> float:
    """The processor time of an idle wait, as a share of its duration."""
    bindings.ops_lifecycle.register_operation(spec())  # attaches
    feed = bindings.ops_lifecycle.completion_feed()

    def in_a_thread() -> None:
        with contextlib.suppress(TimeoutError):
            feed.wait_for_advance(0, _IDLE_S)

    def in_threads() -> None:
        threads = [threading.Thread(target=in_a_thread) for _ in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    async def in_coroutines() -> None:
        waits = [asyncio.ensure_future(feed.advanced(0)) for _ in range(50)]
        await asyncio.wait(waits, timeout=_IDLE_S)
        for wait in waits:
            wait.cancel()

    def as_a_runtime() -> None:
        with RuntimeSessionAdapter.ephemeral(namespace=namespace) as adapter:
            session_ids = [SessionId.new() for _ in range(4)]
            for session_id in session_ids:
                adapter.register_session(session_id)
            in_a_thread()
            for session_id in session_ids:
                adapter.unregister_session(session_id)

    def as_a_loop() -> None:
        # A completion is owed, and the session is busy: the loop waits until it is quiescent.
        mine = SessionRuntimeBindings.standalone(SessionId.new())
        end(mine.ops_lifecycle)
        with RuntimeLoop(mine, inject=lambda _: True, quiescent=lambda: False):
            in_a_thread()

    return processor_share(
        {
            "thread": in_a_thread,
            "threads": in_threads,
            "coroutines": lambda: asyncio.run(in_coroutines()),
            "runtime": as_a_runtime,
            "loop": as_a_loop,
        }[how]
    )


@pytest.mark.parametrize("how", ["thread", "threads", "coroutines", "runtime", "loop"])
def test_who_waits_for_nothing_uses_no_processor(
    bindings: SessionRuntimeBindings, namespace: str, how: str
) -> None:
    """An idle waiter used a whole core."""
    with start(idle, bindings, how, namespace) as child:
        assert child.result() < 0.25


# --- after a kill -----------------------------------------------------------------------------


def run_and_die(
    bindings: None, test: Channel, namespace: str, session_id: SessionId, transition: str, when: str
) -> None:
    """A runtime that kills itself in a transition, after it has prepared everything and before it
    commits."""
    adapter = RuntimeSessionAdapter.ephemeral(namespace=namespace)
    mine = adapter.prepare_bindings(session_id)
    registry = mine.ops_lifecycle
    id = end(registry)
    test.say(registry.completion_feed().watermark())

    native: Any = registry._epoch

    class Dying:
        """Kills the process before or after the commit of a transition."""

        def __getattr__(self, name: str) -> Any:
            def die(*args: object) -> None:
                if when == "after":
                    getattr(native, name)(*args)
                os.kill(os.getpid(), signal.SIGKILL)

            return die if name == transition else getattr(native, name)

    dying: Any = Dying()
    registry._epoch = dying
    end(registry, str(id))


def test_what_a_kill_leaves_behind_does_not_stop_the_next_start(namespace: str) -> None:
    """After kill -9 the leftover state made the next start fail until it was removed by hand."""
    session_id, watermark = SessionId.new(), 0
    for transition, when in product(("register", "end"), ("before", "after")):
        with start(run_and_die, None, namespace, session_id, transition, when) as child:
            said = child.hear()
            assert said > watermark
            watermark = said
            assert child.join() == -signal.SIGKILL
    with RuntimeSessionAdapter.ephemeral(namespace=namespace) as adapter:
        bindings = adapter.prepare_bindings(session_id)
        bindings.ops_lifecycle.check()
        assert bindings.ops_lifecycle.completion_feed().watermark() >= watermark
        end(bindings.ops_lifecycle)
        adapter.unregister_session(session_id)


def hold_the_writer_lock(bindings: SessionRuntimeBindings, test: Channel) -> None:
    """Die while holding the writer lock."""
    with held_writer(bindings.shared_segment()):
        test.say("inside")
        test.hear()


def end_one(bindings: SessionRuntimeBindings, test: Channel) -> None:
    test.say("now")
    end(bindings.ops_lifecycle)


def test_a_death_inside_the_lock_does_not_stop_the_others(
    bindings: SessionRuntimeBindings,
) -> None:
    """A process died inside a shared mutex and took the service down."""
    with start(hold_the_writer_lock, bindings) as holder, ExitStack() as stack:
        assert holder.hear() == "inside"
        others = [stack.enter_context(start(end_one, bindings)) for _ in range(3)]
        for other in others:
            assert other.hear() == "now"
        assert all(other.silent for other in others)
        holder.kill()
        for other in others:
            other.result()
    assert bindings.ops_lifecycle.completion_feed().watermark() == 3


def consume(bindings: SessionRuntimeBindings, test: Channel) -> None:
    """Only watch, await and read, in threads and coroutines, until killed."""
    feed = bindings.ops_lifecycle.completion_feed()
    [operation] = bindings.ops_lifecycle.list_operations()
    watch = bindings.ops_lifecycle.register_watcher(operation.id)
    threading.Thread(target=watch.wait, daemon=True).start()

    async def wait() -> None:
        waits = [asyncio.ensure_future(feed.advanced(0)) for _ in range(3)]
        await asyncio.sleep(0)
        test.say("consuming")
        await asyncio.gather(*waits)

    asyncio.run(wait())


@pytest.mark.parametrize("method", ["fork", "subprocess"])
def test_nothing_remains_of_consumers_that_died(namespace: str, method: str) -> None:
    """Leftovers of processes that only read were never removed."""
    with RuntimeSessionAdapter.ephemeral(namespace=namespace) as adapter:
        bindings = adapter.prepare_bindings(SessionId.new())
        id = OperationId.new()
        bindings.ops_lifecycle.register_operation(spec(id=id))
        for _ in range(3):
            with start(consume, bindings, method=method) as child:
                assert child.hear() == "consuming"
                child.kill()

        def watchers() -> int:
            operation = bindings.ops_lifecycle.snapshot(id)
            assert operation is not None
            return operation.watcher_count

        eventually(lambda: [one.pid for one in bindings.participants()] == [os.getpid()])
        eventually(lambda: watchers() == 0)
        adapter.unregister_session(bindings.session_id)
    assert names_in(namespace) == []


# --- cleaning up while others work ------------------------------------------------------------


def come_and_go(bindings: None, test: Channel, namespace: str, seed: int) -> int:
    """Make epochs, attach to them while they are held, and leave them; returns how many."""
    random_ = random.Random(seed)
    session_ids = [SessionId.new() for _ in range(3)]
    rounds = 0
    while test.silent:
        session_id = random_.choice(session_ids)
        with RuntimeSessionAdapter.ephemeral(namespace=namespace, config=_SMALL) as adapter:
            mine = adapter.prepare_bindings(session_id)
            path = segment_path(namespace, session_id)
            for _ in range(random_.randrange(5)):
                again = SharedSegment.attach(namespace, session_id)
                assert again.epoch_id == mine.epoch_id, "a held segment was removed"
                again.close()
                assert path.exists()
            end(mine.ops_lifecycle)
            if random_.random() < 0.3:
                adapter.reset_session(session_id)
                assert path.exists()
        rounds += 1
    return rounds


def visit(bindings: None, test: Channel, token: str) -> int:
    """Attach to an epoch that is always held, and leave it, again and again."""
    handle = EpochHandle.from_token(token)
    rounds = 0
    while test.silent:
        SharedSegment.attach(handle.namespace, handle.session_id).close()
        mine = SessionRuntimeBindings.attach(handle)
        mine.close()
        rounds += 1
    return rounds


def clean_up(bindings: None, test: Channel, namespace: str) -> int:
    """Remove segments that no process holds; returns how many."""
    removed = 0
    while test.silent:
        for session_id in list_sessions(namespace):
            removed += remove_unused(namespace, session_id)
    return removed


def test_cleaning_up_never_removes_what_is_held_and_fails_no_attach(namespace: str) -> None:
    """Cleaning up dead nodes raced with opening: live services were reported corrupt."""
    with RuntimeSessionAdapter.ephemeral(namespace=namespace) as adapter, ExitStack() as stack:
        held = adapter.prepare_bindings(SessionId.new())
        children = [
            stack.enter_context(start(clean_up, None, namespace)),
            stack.enter_context(start(clean_up, None, namespace)),
            stack.enter_context(start(visit, None, held.to_token())),
            stack.enter_context(start(come_and_go, None, namespace, 1)),
            stack.enter_context(start(come_and_go, None, namespace, 2)),
        ]
        begin = held.shared_segment().participants.joined()
        eventually(lambda: held.shared_segment().participants.joined() > begin + 1000, within=60)
        for child in children:
            child.say("stop")
        done = [child.result() for child in children]
        assert sum(done[:2]) > 0, "nothing was cleaned up"
        assert min(done[2:]) > 0
        held.ops_lifecycle.check()
        adapter.unregister_session(held.session_id)
    for session_id in list(list_sessions(namespace)):
        assert remove_unused(namespace, session_id)
    assert names_in(namespace) == []


# --- who owns what ----------------------------------------------------------------------------


def complete(bindings: SessionRuntimeBindings, test: Channel, id: OperationId) -> None:
    bindings.ops_lifecycle.complete_operation(id, result(id))


def test_a_build_uses_the_registry_that_it_is_given(bindings: SessionRuntimeBindings) -> None:
    """Each side made its own registry, and completions arrived on the one without a watcher."""
    boundary = AgentFactory().build(bindings.session_id, SessionOwned(bindings))
    assert boundary.bindings.ops_lifecycle is bindings.ops_lifecycle
    id = OperationId.new()
    bindings.ops_lifecycle.register_operation(spec(id=id))
    bindings.ops_lifecycle.provisioning_succeeded(id)
    with start(complete, bindings, id, method="spawn") as worker:
        worker.result()
    [entry] = boundary.drain()
    assert getattr(entry, "operation_id", None) == id
    other = SessionId.new()
    with pytest.raises(BindingsMismatch) as mismatch:
        AgentFactory().build(other, SessionOwned(bindings))
    assert (mismatch.value.expected, mismatch.value.actual) == (other, bindings.session_id)


def test_a_cursor_of_zero_is_a_position(bindings: SessionRuntimeBindings) -> None:
    """A zero was read as "nothing recovered", and owed completions never woke the agent."""
    ids = [end(bindings.ops_lifecycle) for _ in range(3)]
    boundary = AgentFactory().build(bindings.session_id, SessionOwned(bindings))
    assert [getattr(entry, "operation_id", None) for entry in boundary.drain()] == ids
    injected = []

    def inject(continuation: Continuation) -> bool:
        injected.append(continuation.watermark)
        boundary.drain().commit()
        return True

    with RuntimeLoop(bindings, inject=inject, quiescent=lambda: True):
        eventually(lambda: bindings.cursor_state.runtime_observed_seq.load() == 3)
    assert injected == [3]


def test_a_refused_continuation_advances_nothing(bindings: SessionRuntimeBindings) -> None:
    """A refused continuation still advanced the observed cursor."""
    end(bindings.ops_lifecycle)
    seen: list[EpochCursorSnapshot] = []

    def inject(continuation: Continuation) -> bool:
        seen.append(bindings.cursor_state.snapshot())
        if len(seen) == 2:
            raise RuntimeError("not now")
        return len(seen) == 3 and bindings.cursor_state.agent_applied_cursor.advance(1)

    with RuntimeLoop(bindings, inject=inject, quiescent=lambda: True):
        eventually(lambda: bindings.cursor_state.runtime_observed_seq.load() == 1)
    assert seen == [EpochCursorSnapshot()] * 3
    assert bindings.cursor_state.runtime_last_injected_seq.load() == 1


@pytest.mark.parametrize(
    "cursor", ["agent_applied_cursor", "runtime_observed_seq", "runtime_last_injected_seq"]
)
def test_a_recovered_feed_goes_on_above_every_cursor(cursor: str) -> None:
    """After recovery the feed restarted below a cursor: new completions were taken for old."""
    registry = RuntimeOpsLifecycleRegistry()
    end(registry)
    kept = registry.completion_feed().list_since(0).entries
    recovered = RuntimeOpsLifecycleRegistry.from_recovered(
        PersistedOpsSnapshot(
            epoch_id=RuntimeEpochId.new(),
            entries=kept,
            cursors=EpochCursorSnapshot(**{cursor: 40}),
        )
    )
    id = end(recovered)
    batch = recovered.completion_feed().list_since(40)
    assert [entry.operation_id for entry in batch.entries] == [id]
    assert batch.entries[0].seq > 40
    recovered.check()


# --- processes and threads --------------------------------------------------------------------


def identity(bindings: SessionRuntimeBindings, test: Channel) -> None:
    """Use an inherited handle in a forked child; then send the child's identity."""
    assert held_here() == []
    bindings.ops_lifecycle.register_operation(spec())
    test.say([one.pid for one in bindings.participants() if one.is_self])
    test.hear()


def test_a_forked_child_is_not_its_parent(bindings: SessionRuntimeBindings) -> None:
    """A forked child used its parent's locks and identity."""
    with start(identity, bindings, method="fork") as child:
        assert child.hear() == [child.pid]
        child.kill()
        eventually(lambda: bindings.ops_lifecycle.active_count() == 0)
    [entry] = bindings.ops_lifecycle.completion_feed().list_since(0).entries
    assert isinstance(entry.terminal_outcome, Terminated)
    [me] = bindings.participants()
    assert (me.pid, me.alive) == (os.getpid(), True)


def test_threads_of_one_process_exclude_each_other(bindings: SessionRuntimeBindings) -> None:
    """Two threads of one process passed a lock that only excluded processes."""
    registry, barrier = bindings.ops_lifecycle, threading.Barrier(4)

    def work() -> None:
        barrier.wait()
        for _ in range(200):
            end(registry)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert registry.completion_feed().watermark() == 800
    registry.check()


# --- counters that wrap -----------------------------------------------------------------------


def follow(bindings: SessionRuntimeBindings, test: Channel, first: int, count: int) -> list[int]:
    """Wait for each of the next completions; returns the watermark after each."""
    feed = bindings.ops_lifecycle.completion_feed()
    test.say("waiting")
    seen = []
    for position in range(first, first + count):
        seen.append(feed.wait_for_advance(position, 60))
        test.say(position + 1)
    return seen


def lead(bindings: SessionRuntimeBindings, follower: Child, first: int, count: int) -> None:
    """End an operation each time that the follower waits for the next."""
    assert follower.hear() == "waiting"
    for position in range(first + 1, first + count + 1):
        end(bindings.ops_lifecycle)
        assert follower.hear() == position
    assert follower.result() == list(range(first + 1, first + count + 1))


def test_a_waiter_sees_the_count_of_events_wrap(bindings: SessionRuntimeBindings) -> None:
    """The low half of a counter wrapped and a waiter slept through it: the futex word."""
    bindings.shared_segment().memory.store(at.EVENT_AT, 2**32 - 3)
    with start(follow, bindings, 0, 6) as follower:
        lead(bindings, follower, 0, 6)
    # The count has wrapped, and the flag beside it did not change.
    assert bindings.shared_segment().memory.load(at.EVENT_AT) % 2**32 < 100


def test_a_waiter_sees_the_low_half_of_the_watermark_wrap(namespace: str) -> None:
    """The low half of a counter wrapped and a waiter slept through it: the watermark."""
    first = 2**32 - 3
    segment = SharedSegment.allocate(
        namespace, _SMALL, session_id=SessionId.new(), epoch_id=RuntimeEpochId.new()
    )
    bindings = SessionRuntimeBindings.of_segment(segment)
    bindings.ops_lifecycle.restore(
        PersistedOpsSnapshot(
            epoch_id=segment.epoch_id, cursors=EpochCursorSnapshot(runtime_observed_seq=first)
        )
    )
    assert bindings.ops_lifecycle.completion_feed().watermark() == first
    segment.publish()
    with start(follow, bindings, first, 6) as follower:
        lead(bindings, follower, first, 6)
    bindings.ops_lifecycle.check()
    segment.unlink()
    bindings.close()
