"""Sessions after a restart of the machine, with a store in a real file."""

from __future__ import annotations

import contextlib
import itertools
import logging
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from shmepoch import (
    AgentBoundary,
    AgentFactory,
    CompletionEntry,
    CompletionFeedGap,
    Continuation,
    EpochCursorSnapshot,
    EpochGone,
    InMemoryRuntimeStore,
    OperationId,
    OperationStatus,
    OpsLifecycleConfig,
    PersistedOpsSnapshot,
    PersistenceChannel,
    RuntimeEpochId,
    RuntimeLoop,
    RuntimeSessionAdapter,
    SegmentExists,
    SessionId,
    SessionOwned,
    SessionRuntimeBindings,
    SqliteRuntimeStore,
    StoreConflict,
    StoreLoadFailed,
    StoreUnusable,
    StoreWriteFailed,
    Terminated,
)
from shmepoch import _native as at
from shmepoch._native import RECOVERY_SKIP
from shmepoch.memory.layout import Layout
from shmepoch.memory.namespaces import list_sessions
from shmepoch.memory.segment import SharedSegment
from shmepoch.runtime import durability
from shmepoch.stores import EpochCapture
from tests.runtime.completions import CHILD, TOOL, end
from tests.runtime.stores import WatchedStore
from tests.stores.samples import completion, completions
from tests.support import empty_shared_memory, eventually, result, spec

#: An epoch whose feed soon drops completions, and one that drops them only after they are stored.
CARELESS = OpsLifecycleConfig(max_completed=2, max_operations=4, feed_bytes=8 * 1024)
SMALL = msgspec.structs.replace(CARELESS, store_wait_ms=60_000)


class Machine:
    """One store file, and shared memory that a restart empties."""

    def __init__(self, path: Path, namespace: str) -> None:
        self.path = path
        self.namespace = namespace
        self.session_id = SessionId.new()
        self.store = self.opened()

    def opened(self) -> SqliteRuntimeStore:
        return SqliteRuntimeStore(self.path, synchronous="normal", busy_timeout=20)

    @contextlib.contextmanager
    def up(self, **options: Any) -> Iterator[RuntimeSessionAdapter]:
        """A runtime, until the machine restarts."""
        with RuntimeSessionAdapter.persistent(
            self.store, namespace=self.namespace, **options
        ) as adapter:
            yield adapter
        self.restart()

    @contextlib.contextmanager
    def session(self, **options: Any) -> Iterator[SessionRuntimeBindings]:
        """The one session of a runtime, until the machine restarts."""
        with self.up(**options) as adapter:
            bindings = adapter.prepare_bindings(self.session_id)
            yield bindings
            bindings.ops_lifecycle.check()

    def restart(self) -> None:
        empty_shared_memory(self.namespace)

    def change(self, statement: str) -> None:
        """Change the file, like a user of the sqlite3 tool or a bad disk."""
        with contextlib.closing(sqlite3.connect(self.path)) as connection:
            connection.execute(statement)
            connection.commit()

    def segments(self) -> list[SessionId]:
        """The sessions that have a segment."""
        return list(list_sessions(self.namespace))


@pytest.fixture
def machine(tmp_path: Path, namespace: str) -> Iterator[Machine]:
    machine = Machine(tmp_path / "store.db", namespace)
    yield machine
    machine.restart()
    machine.store.close()


def channel_of(adapter: RuntimeSessionAdapter) -> PersistenceChannel:
    assert adapter._durability is not None
    return adapter._durability.channel


def agent(bindings: SessionRuntimeBindings) -> AgentBoundary:
    return AgentFactory().build(bindings.session_id, SessionOwned(bindings))


def told(boundary: AgentBoundary) -> list[int | tuple[int, int]]:
    """The notices of one turn: the sequences of completions, and the bounds of gaps."""
    with boundary.drain() as notices:
        return [
            notice.seq
            if isinstance(notice, CompletionEntry)
            else (notice.after_seq, notice.dropped_through)
            for notice in notices
        ]


def begin(bindings: SessionRuntimeBindings, name: str = "work") -> OperationId:
    made = spec(name)
    bindings.ops_lifecycle.register_operation(made)
    bindings.ops_lifecycle.provisioning_succeeded(made.id)
    return made.id


# --- recovered state ------------------------------------------------------------------------------


def test_an_epoch_goes_on(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "shmepoch")
    with machine.session() as before:
        id = begin(before)
        before.ops_lifecycle.complete_operation(id, result(id))
        end(before, CHILD)
        before.cursor_state.agent_applied_cursor.advance(1)
        before.cursor_state.runtime_observed_seq.advance(2)
        entries = before.ops_lifecycle.completion_feed().list_since(0).entries
        operations = before.ops_lifecycle.list_operations()
    caplog.clear()
    with machine.session() as after:
        assert after is not before
        assert after.epoch_id == before.epoch_id
        assert after.ops_lifecycle.completion_feed().list_since(0).entries == entries
        assert after.ops_lifecycle.list_operations() == operations
        assert after.cursor_state.snapshot() == EpochCursorSnapshot(
            agent_applied_cursor=1, runtime_observed_seq=2
        )
        assert f"epoch {before.epoch_id} from the store, through 2" in caplog.text


def test_a_token_of_before_the_restart_is_of_no_use_while_the_epoch_is_gone(
    machine: Machine,
) -> None:
    with machine.session() as bindings:
        token = bindings.to_token()
    with pytest.raises(EpochGone):
        SessionRuntimeBindings.from_token(token)


def test_it_may_go_on_in_another_size(machine: Machine) -> None:
    with machine.session() as bindings:
        seqs = end(bindings, *[TOOL] * 60, reason="x" * 300)
    with machine.session(config=SMALL) as bindings:
        assert bindings.ops_lifecycle.completion_feed().list_since(0).dropped_through > 0
        assert told(agent(bindings)) == seqs
    with machine.session() as bindings:
        assert told(agent(bindings)) == []


def test_no_more_is_loaded_than_an_epoch_can_hold(namespace: str) -> None:
    class Counting(InMemoryRuntimeStore):
        asked: list[int | None] = []  # noqa: RUF012

        def load(
            self, session_id: SessionId, *, max_entries: int | None = None
        ) -> PersistedOpsSnapshot | None:
            self.asked.append(max_entries)
            return super().load(session_id, max_entries=max_entries)

    store, session_id, epoch_id = Counting(), SessionId.new(), RuntimeEpochId.new()
    stored = PersistedOpsSnapshot(epoch_id=epoch_id, entries=tuple(completions(1, 5000)))
    store.save([EpochCapture(session_id=session_id, snapshot=stored)])
    with RuntimeSessionAdapter.persistent(store, namespace=namespace, config=SMALL) as adapter:
        bindings = adapter.prepare_bindings(session_id)
        assert store.asked == [Layout(SMALL).entries, 1]  # and a check that the epoch is unchanged
        assert told(agent(bindings)) == list(range(1, 5001))
        adapter.unregister_session(session_id)


# --- cursors --------------------------------------------------------------------------------------


def test_cursors_of_zero_are_positions(machine: Machine) -> None:
    """Completions that the agent had not seen are delivered after the restart, and wake it."""
    with machine.session() as bindings:
        seqs = end(bindings, TOOL, TOOL)
    with machine.session() as bindings:
        assert bindings.cursor_state.snapshot() == EpochCursorSnapshot()
        injected: list[Continuation] = []

        def inject(continuation: Continuation) -> bool:
            injected.append(continuation)
            assert told(agent(bindings)) == seqs
            return True

        loop = RuntimeLoop(bindings, inject=inject, quiescent=lambda: True)
        loop.start()
        try:
            eventually(lambda: injected)
        finally:
            loop.stop()
        assert len(injected) == 1


def test_notices_that_were_not_committed_come_again_and_the_others_do_not(machine: Machine) -> None:
    with machine.session() as bindings:
        end(bindings, TOOL, TOOL)
        boundary = agent(bindings)
        assert told(boundary) == [1, 2]
        end(bindings, TOOL)
        assert [n.seq for n in boundary.drain() if isinstance(n, CompletionEntry)] == [3]
    with machine.session() as bindings:
        assert told(agent(bindings)) == [3]


@pytest.mark.parametrize("ahead", ["agent_applied_cursor", "runtime_observed_seq"])
def test_the_next_sequence_is_above_every_cursor(machine: Machine, ahead: str) -> None:
    """If a feed continued below a cursor, its completions would be taken for old ones."""
    stored = PersistedOpsSnapshot(
        epoch_id=RuntimeEpochId.new(),
        entries=tuple(completions(1, 3)),
        cursors=EpochCursorSnapshot(**{ahead: 5000}),
    )
    machine.store.save([EpochCapture(session_id=machine.session_id, snapshot=stored)])
    with machine.session() as bindings:
        (seq,) = end(bindings, TOOL)
        assert seq > 5000
        assert told(agent(bindings))[-1] == seq


@pytest.mark.parametrize("cursor", EpochCursorSnapshot.__struct_fields__)
@pytest.mark.parametrize("position", [2**62 + 1, 2**63, 2**64 - 1])
def test_a_session_goes_on_wherever_its_cursors_stood(
    machine: Machine, cursor: str, position: int
) -> None:
    """A running epoch may store such a cursor, or an earlier release may have stored it."""
    with machine.session() as bindings:
        end(bindings, TOOL)
        getattr(bindings.cursor_state, cursor).advance(position)
        end(bindings, TOOL)
        epoch_id = bindings.epoch_id
    stored = PersistedOpsSnapshot(
        epoch_id=epoch_id, cursors=EpochCursorSnapshot(**{cursor: position})
    )
    for _ in range(2):
        with machine.session() as bindings:
            assert bindings.epoch_id == epoch_id
            assert bindings.ops_lifecycle.check() == ()
            (seq,) = end(bindings, TOOL)
            assert told(agent(bindings))[-1] == seq
        machine.store.save([EpochCapture(session_id=machine.session_id, snapshot=stored)])


def test_an_epoch_that_is_larger_than_the_adapter_s_is_recovered_whole(machine: Machine) -> None:
    large = OpsLifecycleConfig(max_operations=60, max_completed=40)
    small = OpsLifecycleConfig(max_operations=2, max_completed=3, feed_bytes=at.PAGE + 2 * 1024)
    with machine.session(config=large) as bindings:
        running = [begin(bindings, f"running {turn}") for turn in range(50)]
        largest = begin(bindings)
        bindings.ops_lifecycle.complete_operation(largest, result(largest, "c" * 20_000))
    with machine.session(config=small) as bindings:
        notices = agent(bindings).drain().notices
        entries = [notice for notice in notices if isinstance(notice, CompletionEntry)]
        assert [entry.operation_id for entry in entries] == [largest, *running]
        assert len(entries) == len(notices)
        end(bindings, TOOL)


def test_what_is_no_history_of_one_epoch_is_not_loadable(machine: Machine) -> None:
    """There is a way out, and the error names it."""
    first, second = completions(1, 2)
    again = msgspec.structs.replace(second, operation_id=first.operation_id)
    stored = PersistedOpsSnapshot(epoch_id=RuntimeEpochId.new(), entries=(first, again))
    machine.store.save([EpochCapture(session_id=machine.session_id, snapshot=stored)])
    with machine.up() as adapter, pytest.raises(StoreLoadFailed, match="ended twice"):
        adapter.prepare_bindings(machine.session_id)
    assert machine.segments() == []
    with machine.session(rotate_if_unloadable=True) as bindings:
        assert bindings.epoch_id != stored.epoch_id


def test_no_sequence_comes_again_as_something_else(machine: Machine) -> None:
    """Completions that were committed and never stored may have been seen."""
    seen: list[int] = []
    for _ in range(4):
        with machine.up() as adapter:
            bindings = adapter.prepare_bindings(machine.session_id)
            seen += end(bindings, TOOL)
            channel_of(adapter).flush()
            channel_of(adapter).unfollow(bindings)
            seen += end(bindings, *[TOOL] * 40)
    assert len(set(seen)) == len(seen)
    assert seen == sorted(seen)


def test_not_even_after_restarts_in_which_nothing_was_stored(machine: Machine) -> None:
    with machine.session():
        pass
    seen: list[int] = []
    for _ in range(3):
        with machine.up() as adapter:
            bindings = adapter.prepare_bindings(machine.session_id)
            channel_of(adapter).flush()
            channel_of(adapter).unfollow(bindings)
            seen += end(bindings, *[TOOL] * 3)
    assert len(set(seen)) == 9


# --- operations that were running -----------------------------------------------------------------


def test_what_was_running_ends_as_terminated(machine: Machine) -> None:
    with machine.session() as bindings:
        running = begin(bindings, "running")
        retiring = begin(bindings, "retiring")
        bindings.ops_lifecycle.request_retire(retiring)
        waiting = spec("provisioning")
        bindings.ops_lifecycle.register_operation(waiting)
        end(bindings, TOOL)
    ids = [running, retiring, waiting.id]
    with machine.session() as bindings:
        assert bindings.ops_lifecycle.active_count() == 0
        notices = agent(bindings).drain().notices
        entries = [notice for notice in notices if isinstance(notice, CompletionEntry)]
        assert len(entries) == len(notices)
        assert [entry.seq for entry in entries[:1]] == [1]
        assert [entry.operation_id for entry in entries[1:]] == ids
        assert [entry.display_name for entry in entries[1:]] == [
            "running",
            "retiring",
            "provisioning",
        ]
        for id in ids:
            snapshot = bindings.ops_lifecycle.snapshot(id)
            assert snapshot is not None
            assert snapshot.status is OperationStatus.TERMINATED
            assert isinstance(snapshot.terminal_outcome, Terminated)
            assert "the runtime restarted" in snapshot.terminal_outcome.reason
        last = entries[-1].seq
    with machine.session() as bindings:  # the agent is told once, and it is stored
        assert bindings.ops_lifecycle.completion_feed().list_since(last).entries == ()
        assert machine.store.last_seq(bindings.epoch_id) == last


def test_or_is_dropped_if_that_is_asked_for(machine: Machine) -> None:
    with machine.session() as bindings:
        id = begin(bindings)
    with machine.session(terminate_unfinished=False) as bindings:
        assert bindings.ops_lifecycle.snapshot(id) is None
        assert bindings.ops_lifecycle.list_operations() == []
        assert told(agent(bindings)) == []


# --- a store that does not load -------------------------------------------------------------------


def damage(machine: Machine) -> None:
    machine.change("UPDATE epochs SET agent_applied_cursor = 'what?'")


def test_a_failed_load_is_not_an_empty_store(machine: Machine) -> None:
    with machine.session() as bindings:
        end(bindings, TOOL)
    damage(machine)
    with machine.up() as adapter:
        for _ in range(2):
            with pytest.raises(StoreLoadFailed, match="not an empty store") as caught:
                adapter.register_session(machine.session_id)
        assert caught.value.session_id == machine.session_id
        assert not adapter.contains_session(machine.session_id)
        assert machine.segments() == [], "nothing was started"
        # Other sessions are not affected.
        adapter.register_session(SessionId.new())
    assert machine.store.last_seq(bindings.epoch_id) == 1


def test_the_epoch_is_rotated_only_on_request(
    machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    with machine.session() as old:
        end(old, TOOL)
    damage(machine)
    with machine.session(rotate_if_unloadable=True) as new:
        assert new.epoch_id != old.epoch_id
        assert told(agent(new)) == []
        assert "not loadable, so its epoch is rotated" in caplog.text
        end(new, TOOL)
    with machine.session() as again:
        assert again.epoch_id == new.epoch_id
    epochs = {found.epoch_id for found in machine.store.history(machine.session_id)}
    assert epochs == {old.epoch_id, new.epoch_id}, "its history stays"


def test_a_file_that_is_no_store_any_more(machine: Machine) -> None:
    with machine.session() as bindings:
        end(bindings, *[TOOL] * 3)
    machine.store.close()
    size = machine.path.stat().st_size
    machine.path.write_bytes(b"\xa5" * size)
    with pytest.raises(StoreUnusable, match="not a database"):
        machine.opened()
    assert machine.path.read_bytes() == b"\xa5" * size, "what may be mended is not touched"
    machine.path.unlink()


def test_a_store_that_cannot_reserve_what_is_skipped_starts_nothing(namespace: str) -> None:
    store, session_id = WatchedStore(), SessionId.new()
    stored = PersistedOpsSnapshot(epoch_id=RuntimeEpochId.new(), entries=(completion(1),))
    store.save([EpochCapture(session_id=session_id, snapshot=stored)])
    with RuntimeSessionAdapter.persistent(store, namespace=namespace) as adapter:
        store.failure = lambda: StoreWriteFailed("the disk is full")
        with pytest.raises(StoreWriteFailed, match="disk is full"):
            adapter.register_session(session_id)
        assert list(list_sessions(namespace)) == []
        store.failure = None
        assert adapter.prepare_bindings(session_id).epoch_id == stored.epoch_id
        adapter.unregister_session(session_id)


# --- the source of an epoch -----------------------------------------------------------------------


def test_a_live_segment_goes_before_the_store(
    machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "shmepoch")
    with RuntimeSessionAdapter.persistent(machine.store, namespace=machine.namespace) as adapter:
        bindings = adapter.prepare_bindings(machine.session_id)
        end(bindings, TOOL)
        channel_of(adapter).flush()
        channel_of(adapter).unfollow(bindings)
        end(bindings, TOOL)  # so that the store is behind
    damage(machine)  # and the store could not be loaded
    caplog.clear()
    with machine.session() as after:
        assert after.epoch_id == bindings.epoch_id
        assert told(agent(after)) == [1, 2]
        assert f"live epoch {bindings.epoch_id}" in caplog.text


def test_what_was_running_in_a_live_segment_goes_on_being_stored(machine: Machine) -> None:
    for number in (1, 2, 3):
        with RuntimeSessionAdapter.persistent(
            machine.store, namespace=machine.namespace
        ) as adapter:
            bindings = adapter.prepare_bindings(machine.session_id)
            end(bindings, TOOL)
        assert machine.store.last_seq(bindings.epoch_id) == number


def test_a_session_that_the_store_does_not_know_gets_a_new_epoch(
    machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "shmepoch")
    with machine.session() as bindings:
        assert f"new epoch {bindings.epoch_id}, the store has none" in caplog.text


def test_a_runtime_that_was_faster_is_named(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a runtime finds no segment, another runtime may publish one before it."""
    with machine.session():
        pass
    with machine.up() as adapter:
        published = SharedSegment.publish

        def slow(segment: SharedSegment, *, replace: bool = False) -> None:
            monkeypatch.setattr(SharedSegment, "publish", published)
            with RuntimeSessionAdapter.persistent(
                machine.store, namespace=machine.namespace
            ) as faster:
                faster.register_session(machine.session_id)
            with pytest.raises(SegmentExists):
                published(segment, replace=replace)
            raise SegmentExists(segment.name)

        monkeypatch.setattr(SharedSegment, "publish", slow)
        bindings = adapter.prepare_bindings(machine.session_id)
        bindings.ops_lifecycle.check()


# --- the agent that was away ----------------------------------------------------------------------


def test_an_agent_that_was_away_misses_nothing(machine: Machine) -> None:
    seqs: list[int] = []
    for _ in range(4):
        with machine.session(config=SMALL) as bindings:
            seqs += end(bindings, *[TOOL] * 60, reason="x" * 300)
            assert bindings.ops_lifecycle.completion_feed().list_since(0).dropped_through > 0
    with machine.session(config=SMALL) as bindings:
        boundary = agent(bindings)
        assert told(boundary) == seqs
        assert told(boundary) == []


def test_what_two_recoveries_left_out_is_no_gap(machine: Machine) -> None:
    seqs: list[int] = []
    for _ in range(3):
        with machine.session(config=SMALL) as bindings:
            seqs += end(bindings, TOOL)
    with machine.session(config=SMALL) as bindings:
        seqs += end(bindings, *[TOOL] * 60, reason="x" * 300)
        dropped = bindings.ops_lifecycle.completion_feed().list_since(0).dropped_through
        assert dropped > seqs[2] > 2 * RECOVERY_SKIP
        assert told(agent(bindings)) == seqs
    assert machine.store.list_skipped(bindings.epoch_id)[:2] == [
        (seqs[0], seqs[1] - 1),
        (seqs[1], seqs[2] - 1),
    ]


def test_what_was_never_stored_is_a_gap_and_what_was_left_out_is_not(machine: Machine) -> None:
    with machine.session(config=SMALL) as bindings:
        first = end(bindings, TOOL)
    with machine.up(config=CARELESS) as adapter:
        bindings = adapter.prepare_bindings(machine.session_id)
        second = end(bindings, TOOL)
        channel = channel_of(adapter)
        channel.flush()
        channel.unfollow(bindings)
        end(bindings, *[TOOL] * 100, reason="x" * 300)
        batch = bindings.ops_lifecycle.completion_feed().list_since(0)
        channel.follow(bindings)
        channel.flush()
        assert channel.status().missed == batch.dropped_through - second[-1]
        gap = channel.status().epochs[0].last_gap
        assert gap == CompletionFeedGap(second[-1], batch.dropped_through)
    with machine.session(config=SMALL) as bindings:
        end(bindings, *[CHILD] * 60, reason="x" * 300)
        kept = [entry.seq for entry in batch.entries]
        assert told(agent(bindings)) == [
            (second[-1], batch.dropped_through),
            *first,
            *second,
            *kept,
        ]


def test_an_agent_without_the_store_is_shown_the_gap(machine: Machine) -> None:
    with machine.session(config=SMALL) as bindings:
        end(bindings, *[TOOL] * 60, reason="x" * 300)
        bindings.history = None  # as in another process
        dropped = bindings.ops_lifecycle.completion_feed().list_since(0).dropped_through
        with agent(bindings) as boundary, boundary.drain() as notices:
            assert next(iter(notices)) == CompletionFeedGap(0, dropped)
        bindings.cursor_state.runtime_observed_seq.advance(1)
        boundary = AgentFactory(machine.store).build(bindings.session_id, SessionOwned(bindings))
        assert told(boundary) == []


# --- reset and unregister -------------------------------------------------------------------------


def test_a_reset_is_durable(machine: Machine) -> None:
    with machine.up() as adapter:
        old = adapter.prepare_bindings(machine.session_id)
        end(old, TOOL)
        old.cursor_state.agent_applied_cursor.advance(1)
        begin(old)
        new = adapter.reset_session(machine.session_id)
        channel_of(adapter).flush()
    with machine.session() as after:
        assert after.epoch_id == new.epoch_id
        assert after.cursor_state.snapshot() == EpochCursorSnapshot()
        assert after.ops_lifecycle.list_operations() == []
        assert told(agent(after)) == []
    history = list(machine.store.history(machine.session_id))
    assert [(found.epoch_id, found.entry.seq) for found in history] == [(old.epoch_id, 1)]


def test_a_restart_right_after_the_seal_starts_a_new_epoch(machine: Machine) -> None:
    """The runtime was killed between sealing an epoch and opening the next."""
    with machine.session() as old:
        end(old, TOOL)
        old.shared_segment().seal()
    with machine.session() as new:
        assert new.epoch_id != old.epoch_id
    assert machine.store.last_seq(old.epoch_id) == 1


def test_a_sealed_segment_that_was_left_is_stored_before_it_is_replaced(machine: Machine) -> None:
    with RuntimeSessionAdapter.persistent(machine.store, namespace=machine.namespace) as adapter:
        old = adapter.prepare_bindings(machine.session_id)
        channel_of(adapter).flush()
        channel_of(adapter).unfollow(old)
        end(old, TOOL)
        old.shared_segment().seal()
    with machine.session() as new:
        assert new.epoch_id != old.epoch_id
        assert machine.store.last_seq(old.epoch_id) == 1


def test_an_unregistered_session_is_over(machine: Machine) -> None:
    with machine.up() as adapter:
        old = adapter.prepare_bindings(machine.session_id)
        id = begin(old)
        adapter.unregister_session(machine.session_id)
        assert machine.segments() == []
        assert machine.store.load(machine.session_id) is None
        (found,) = machine.store.history(machine.session_id)
        assert found.entry.operation_id == id
        assert isinstance(found.entry.terminal_outcome, Terminated)
        assert adapter.prepare_bindings(machine.session_id).epoch_id != old.epoch_id


@pytest.mark.parametrize("verb", ["reset_session", "unregister_session"])
def test_an_end_that_the_store_does_not_take_may_be_tried_again(
    verb: str, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(durability, "_END_TIMEOUT_S", 0.1)
    store, session_id = WatchedStore(), SessionId.new()
    with RuntimeSessionAdapter.persistent(store, namespace=namespace) as adapter:
        bindings = adapter.prepare_bindings(session_id)
        eventually(lambda: store.load(session_id))
        end(bindings, TOOL)
        store.failure = lambda: StoreWriteFailed("the disk is full")
        for _ in range(2):
            with pytest.raises(StoreWriteFailed, match="disk is full"):
                getattr(adapter, verb)(session_id)
            assert bindings.sealed
            assert bindings.shared_segment().path.exists()
            with pytest.raises(StoreWriteFailed):  # it starts no new epoch
                adapter.prepare_bindings(session_id)
        store.failure = None
        getattr(adapter, verb)(session_id)
        assert store.last_seq(bindings.epoch_id) == 1
        if verb == "reset_session":
            assert adapter.prepare_bindings(session_id).epoch_id != bindings.epoch_id
            adapter.unregister_session(session_id)


@pytest.mark.parametrize("verb", ["reset_session", "unregister_session"])
def test_an_epoch_that_cannot_be_stored_holds_up_no_other_session(
    verb: str, namespace: str
) -> None:
    store, good, bad = WatchedStore(), SessionId.new(), SessionId.new()
    with RuntimeSessionAdapter.persistent(store, namespace=namespace) as adapter:
        bindings = adapter.prepare_bindings(bad)
        adapter.register_session(good)
        channel_of(adapter).flush()
        other = PersistedOpsSnapshot(epoch_id=bindings.epoch_id, entries=(completion(1),))
        store.save([EpochCapture(session_id=bad, snapshot=other)])
        end(bindings, TOOL)
        eventually(lambda: [e.error for e in channel_of(adapter).status().epochs if e.error])
        getattr(adapter, verb)(good)
        with pytest.raises(StoreConflict):
            getattr(adapter, verb)(bad)
        bindings.shared_segment().unlink()
        if adapter.contains_session(good):
            adapter.unregister_session(good)


# --- again and again ------------------------------------------------------------------------------


def test_recovering_again_and_again_changes_nothing(machine: Machine) -> None:
    with machine.session() as bindings:
        seqs = end(bindings, TOOL, TOOL)
        bindings.cursor_state.runtime_observed_seq.advance(2)
        cursors = bindings.cursor_state.snapshot()
    watermarks = [seqs[-1]]
    for _ in range(5):
        with machine.session() as bindings:
            assert bindings.cursor_state.snapshot() == cursors
            assert [notice.seq for notice in agent(bindings).drain()] == seqs  # type: ignore[union-attr]
            watermarks.append(bindings.ops_lifecycle.completion_feed().watermark())
    assert all(before < after for before, after in itertools.pairwise(watermarks))
