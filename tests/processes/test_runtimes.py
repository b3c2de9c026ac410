"""The runtime itself is killed: the next one continues its sessions."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from shmepoch import (
    CompletionEntry,
    EpochCursorSnapshot,
    EpochSealed,
    OperationId,
    OperationStatus,
    Role,
    RuntimeAlreadyActive,
    RuntimeSessionAdapter,
    SessionId,
    SessionRuntimeBindings,
    Terminated,
    list_sessions,
)
from shmepoch._native import rename_new
from shmepoch.memory import files
from shmepoch.memory import segment as segments
from shmepoch.memory.segment import SharedSegment
from tests.processes.children import Channel, start
from tests.processes.workloads import obeys_the_feed, one_entry_each, work_for_ever
from tests.support import eventually, names_in, spec


def run_session(
    bindings: None, test: Channel, namespace: str, session_id: SessionId, ids: list[OperationId]
) -> None:
    """A runtime: registers operations, moves cursors, and lives until killed."""
    adapter = RuntimeSessionAdapter.ephemeral(namespace=namespace)
    mine = adapter.prepare_bindings(session_id)
    for id in ids:
        mine.ops_lifecycle.register_operation(spec(id=id))
    if ids:
        mine.ops_lifecycle.cancel_operation(ids[0], "by the first runtime")
        mine.cursor_state.runtime_observed_seq.advance(1)
    test.say(mine.to_token())
    test.hear()


def test_the_next_runtime_goes_on_where_a_killed_one_was(namespace: str) -> None:
    session_id, ids = SessionId.new(), [OperationId.new(), OperationId.new()]
    with start(run_session, None, namespace, session_id, ids) as first:
        token = first.hear()
        first.kill()
    with RuntimeSessionAdapter.ephemeral(namespace=namespace) as adapter:
        bindings = adapter.prepare_bindings(session_id)
        assert SessionRuntimeBindings.from_token(token) is bindings
        assert bindings.cursor_state.snapshot() == EpochCursorSnapshot(runtime_observed_seq=1)
        entries = bindings.ops_lifecycle.completion_feed().list_since(0).entries
        # The killed runtime's own operations were ended before the adapter returned the bindings.
        assert [entry.operation_id for entry in entries] == ids
        assert isinstance(entries[1].terminal_outcome, Terminated)
        assert "runtime process" in entries[1].terminal_outcome.reason
        [me] = bindings.participants()
        assert (me.pid, me.role) == (os.getpid(), Role.RUNTIME)
        bindings.ops_lifecycle.check()
        adapter.unregister_session(session_id)


def test_a_second_runtime_is_told_who_the_first_is(namespace: str) -> None:
    session_id = SessionId.new()
    with (
        start(run_session, None, namespace, session_id, [], method="spawn") as first,
        RuntimeSessionAdapter.ephemeral(namespace=namespace) as adapter,
    ):
        token = first.hear()
        for attached_before in (False, True):
            if attached_before:
                worker = SessionRuntimeBindings.from_token(token)
            with pytest.raises(RuntimeAlreadyActive) as refused:
                adapter.prepare_bindings(session_id)
            assert (refused.value.session_id, refused.value.pid) == (session_id, first.pid)
            assert str(first.pid) in str(refused.value)
        # The refusal affected neither the worker nor its runtime.
        worker.ops_lifecycle.register_operation(spec())
        roles = {one.pid: one.role for one in worker.participants()}
        assert roles == {first.pid: Role.RUNTIME, os.getpid(): Role.WORKER}
        first.kill()
        assert adapter.prepare_bindings(session_id) is worker
        assert worker.role is Role.RUNTIME
        adapter.unregister_session(session_id)


def test_two_that_start_at_once_are_one_runtime_and_one_refused(namespace: str) -> None:
    session_id = SessionId.new()
    with ExitStack() as stack:
        children = [
            stack.enter_context(start(run_session, None, namespace, session_id, []))
            for _ in range(6)
        ]
        tokens, refused = [], []
        for child in children:
            try:
                tokens.append(child.hear())
                winner = child
            except RuntimeAlreadyActive as error:
                refused.append(error.pid)
        assert len(tokens) == 1
        assert refused == [winner.pid] * 5
    with RuntimeSessionAdapter.ephemeral(namespace=namespace) as adapter:
        adapter.register_session(session_id)
        adapter.unregister_session(session_id)


def test_workers_do_not_notice_that_their_runtime_was_replaced(namespace: str) -> None:
    session_id = SessionId.new()
    with start(run_session, None, namespace, session_id, []) as first:
        token = first.hear()
        worker = SessionRuntimeBindings.from_token(token)
        id = OperationId.new()
        worker.ops_lifecycle.register_operation(spec(id=id))
        first.kill()
    worker.ops_lifecycle.provisioning_succeeded(id)  # the session has no runtime now
    with start(run_session, None, namespace, session_id, []) as second:
        assert second.hear() == token
        operation = worker.ops_lifecycle.snapshot(id)
        assert operation is not None
        assert operation.status is OperationStatus.RUNNING
        worker.ops_lifecycle.cancel_operation(id)
        second.kill()
    worker.ops_lifecycle.check()
    worker.shared_segment().unlink()
    worker.close()


@pytest.mark.parametrize("seed", range(2))
def test_runtimes_killed_at_random_while_workers_work(namespace: str, seed: int) -> None:
    random_ = random.Random(seed)
    session_id = SessionId.new()
    with ExitStack() as stack:
        watched: SessionRuntimeBindings | None = None
        entries: list[CompletionEntry] = []
        for turn in range(6):
            with start(run_session, None, namespace, session_id, [], method="fork") as runtime:
                token = runtime.hear()
                if watched is None:
                    watched = SessionRuntimeBindings.from_token(token)
                    feed = watched.ops_lifecycle.completion_feed()
                    position = 0
                assert token == watched.to_token()
                worker = stack.enter_context(start(work_for_ever, watched, seed * 100 + turn))
                assert worker.hear() == "working"
                feed.wait_for_advance(feed.watermark() + random_.randrange(80), 60)
                if turn % 2:
                    worker.kill()
                runtime.kill()
            batch = feed.list_since(position)
            obeys_the_feed(batch, position)
            entries += batch.entries
            position = batch.watermark
    assert watched is not None
    with RuntimeSessionAdapter.ephemeral(namespace=namespace) as adapter:
        assert adapter.prepare_bindings(session_id) is watched
        registry = watched.ops_lifecycle
        eventually(lambda: registry.active_count() == 0)
        registry.check()
        one_entry_each([*entries, *feed.list_since(position).entries])
        adapter.unregister_session(session_id)


# --- killed in the middle of a change of epochs -----------------------------------------------


def killed_in(
    bindings: None,
    test: Channel,
    namespace: str,
    session_id: SessionId,
    method: str,
    act: Callable[[RuntimeSessionAdapter], object],
) -> None:
    """A runtime that is killed when it calls `method` of its segment or its file."""
    adapter = RuntimeSessionAdapter.ephemeral(namespace=namespace)
    test.say(adapter.prepare_bindings(session_id).to_token())

    def die(*args: object, **kwargs: object) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(os if method == "replace" else SharedSegment, method, die)
    act(adapter)


@pytest.mark.parametrize("at", ["publish", "replace"])
def test_killed_in_a_reset(namespace: str, at: str) -> None:
    session_id = SessionId.new()
    act: Any = lambda adapter: adapter.reset_session(session_id)  # noqa: E731
    with start(killed_in, None, namespace, session_id, at, act) as first:
        old = first.hear()
        assert first.join() == -signal.SIGKILL
    with RuntimeSessionAdapter.ephemeral(namespace=namespace) as adapter:
        bindings = adapter.prepare_bindings(session_id)
        assert not bindings.sealed
        with pytest.raises(EpochSealed):
            SessionRuntimeBindings.from_token(old)
        assert len(names_in(namespace)) == 1
        adapter.unregister_session(session_id)
    assert names_in(namespace) == []


def test_killed_in_an_unregister(namespace: str) -> None:
    session_id = SessionId.new()
    act: Any = lambda adapter: adapter.unregister_session(session_id)  # noqa: E731
    with start(killed_in, None, namespace, session_id, "unlink", act) as first:
        old = first.hear()
        assert first.join() == -signal.SIGKILL
    with RuntimeSessionAdapter.ephemeral(namespace=namespace) as adapter:
        assert adapter.prepare_bindings(session_id).to_token() != old
        adapter.unregister_session(session_id)


def killed_while_making(
    bindings: None, test: Channel, namespace: str, session_id: SessionId, owner: Any, step: str
) -> None:
    """A runtime that is killed before its new segment has a name."""

    def die(*args: object, **kwargs: object) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, step, die)
    RuntimeSessionAdapter.ephemeral(namespace=namespace).prepare_bindings(session_id)


@pytest.mark.parametrize(
    ("owner", "step"),
    [
        (files, "try_lock"),
        (files, "is_same"),
        (os, "posix_fallocate"),
        (segments, "write_header"),
        (files, "rename_new"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_killed_while_making_an_epoch(namespace: str, owner: Any, step: str) -> None:
    session_id = SessionId.new()
    with start(
        killed_while_making, None, namespace, session_id, owner, step, method="fork"
    ) as child:
        assert child.join() == -signal.SIGKILL
    assert len(names_in(namespace)) == 1
    assert list_sessions(namespace=namespace) == []
    with RuntimeSessionAdapter.ephemeral(namespace=namespace):
        assert names_in(namespace) == []


def make_and_stand_still(bindings: None, test: Channel, namespace: str) -> bool:
    """A runtime that is stopped before its new segment has a name; returns whether it got the
    name."""

    def stand_still(*paths: Path) -> None:
        signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
        rename_new(*paths)

    setattr(files, "rename_new", stand_still)  # noqa: B010
    with RuntimeSessionAdapter.ephemeral(namespace=namespace) as adapter:
        segment = adapter.prepare_bindings(SessionId.new()).shared_segment()
        named = names_in(namespace) == [segment.name]
        adapter.unregister_session(segment.session_id)
    return named


def test_what_a_live_runtime_makes_is_no_leftover(namespace: str) -> None:
    with start(make_and_stand_still, None, namespace, method="fork") as child:
        eventually(child.stopped)
        with RuntimeSessionAdapter.ephemeral(namespace=namespace):
            assert len(names_in(namespace)) == 1
        child.signal(signal.SIGCONT)
        assert child.result()
