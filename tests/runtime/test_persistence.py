"""The persistence channel: what it makes durable and when, and its reaction to failures."""

from __future__ import annotations

import math
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from shmepoch import _native as at
from shmepoch.config import OpsLifecycleConfig
from shmepoch.epoch import feed
from shmepoch.epoch.bindings import SessionRuntimeBindings
from shmepoch.epoch.completions import CompletionBatch, CompletionEntry, CompletionFeedGap
from shmepoch.epoch.feed import SegmentFeed
from shmepoch.epoch.operations import OperationProgressUpdate, OperationStatus
from shmepoch.epoch.persisted import PersistedOpsSnapshot
from shmepoch.errors import (
    ChannelClosed,
    ConfigInvalid,
    SegmentCorrupted,
    StoreConflict,
    StoreWriteFailed,
)
from shmepoch.ids import OperationId, SessionId
from shmepoch.runtime import persistence
from shmepoch.runtime.adapter import RuntimeSessionAdapter
from shmepoch.runtime.followed import Followed
from shmepoch.runtime.persistence import PersistenceChannel
from shmepoch.stores import (
    EpochCapture,
    InMemoryRuntimeStore,
    RuntimeStore,
    SqliteRuntimeStore,
)
from tests.runtime.stores import WatchedStore
from tests.stores.samples import completion
from tests.support import damage_record, eventually, result, spec

#: How many completions a test makes if no completion may be dropped.
RETAINED: Final = 5000

#: Far longer than any test: only a flush, or many completions, cause a save.
NEVER = 3600.0
SMALL = OpsLifecycleConfig(max_completed=1, max_operations=1, feed_bytes=8192)


@pytest.fixture
def store() -> WatchedStore:
    return WatchedStore()


@pytest.fixture
def adapter() -> Iterator[RuntimeSessionAdapter]:
    with RuntimeSessionAdapter.ephemeral() as made:
        yield made
        for session_id in list(made._sessions):
            made.unregister_session(session_id)


@pytest.fixture
def bindings(adapter: RuntimeSessionAdapter) -> SessionRuntimeBindings:
    return adapter.prepare_bindings(SessionId.new())


def begin(bindings: SessionRuntimeBindings, name: str = "work") -> OperationId:
    made = spec(name)
    bindings.ops_lifecycle.register_operation(made)
    bindings.ops_lifecycle.provisioning_succeeded(made.id)
    return made.id


def complete(bindings: SessionRuntimeBindings, count: int = 1, content: str = "done") -> None:
    for _ in range(count):
        id = begin(bindings)
        bindings.ops_lifecycle.complete_operation(id, result(id, content))


def stored_seqs(store: RuntimeStore, bindings: SessionRuntimeBindings) -> list[int]:
    return [entry.seq for entry in store.list_entries(bindings.epoch_id)]


def recorded(store: RuntimeStore, bindings: SessionRuntimeBindings) -> bool:
    return store.load(bindings.session_id) is not None


# --- what becomes durable -------------------------------------------------------------------------


def test_a_completion_becomes_durable_unasked(
    store: WatchedStore, bindings: SessionRuntimeBindings
) -> None:
    with PersistenceChannel(store) as channel:
        channel.follow(bindings)
        for seq in (1, 2, 3):
            complete(bindings)
            eventually(lambda seq=seq: store.last_seq(bindings.epoch_id) == seq)  # type: ignore[misc]


def test_an_epoch_is_recorded_before_anything_happens_in_it(
    store: WatchedStore, bindings: SessionRuntimeBindings
) -> None:
    with PersistenceChannel(store) as channel:
        channel.follow(bindings)
        eventually(lambda: recorded(store, bindings))


def test_an_epoch_that_is_followed_is_looked_at_at_once(
    store: WatchedStore, adapter: RuntimeSessionAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(persistence, "_POLL_S", NEVER)
    first, second = (adapter.prepare_bindings(SessionId.new()) for _ in range(2))
    with PersistenceChannel(store) as channel:
        for bindings in (first, second):
            channel.follow(bindings)
            eventually(lambda bindings=bindings: recorded(store, bindings))  # type: ignore[misc]


def test_a_cursor_becomes_durable_unasked(
    store: WatchedStore, bindings: SessionRuntimeBindings
) -> None:
    def cursor() -> int:
        snapshot = store.load(bindings.session_id)
        return snapshot.cursors.agent_applied_cursor if snapshot else 0

    complete(bindings, 5)
    with PersistenceChannel(store) as channel:
        channel.follow(bindings)
        for position in (2, 5):
            bindings.cursor_state.agent_applied_cursor.advance(position)
            eventually(lambda position=position: cursor() == position)  # type: ignore[misc]


def test_an_operation_that_begins_becomes_durable_unasked(
    store: WatchedStore, bindings: SessionRuntimeBindings
) -> None:
    def running() -> list[OperationId]:
        snapshot = store.load(bindings.session_id)
        return [operation.id for operation in snapshot.operations] if snapshot else []

    with PersistenceChannel(store) as channel:
        channel.follow(bindings)
        eventually(lambda: recorded(store, bindings))
        ids = [begin(bindings)]
        eventually(lambda: running() == ids)
        ids.append(begin(bindings))
        eventually(lambda: running() == ids)


def test_a_flush_makes_everything_durable(
    store: WatchedStore, bindings: SessionRuntimeBindings
) -> None:
    registry = bindings.ops_lifecycle
    with PersistenceChannel(store, max_delay=NEVER) as channel:
        channel.follow(bindings)
        complete(bindings, 3)
        id = begin(bindings, "still running")
        bindings.cursor_state.runtime_observed_seq.advance(2)
        channel.flush()
        held = registry.capture_persistence_snapshot(bindings.epoch_id, bindings.cursor_state)
        assert store.load(bindings.session_id) == held
        registry.report_progress(id, OperationProgressUpdate("half way", 50))
        channel.flush()
        held = registry.capture_persistence_snapshot(bindings.epoch_id, bindings.cursor_state)
        assert store.load(bindings.session_id) == held
        registry.fail_operation(id, "no")
        channel.flush()
        held = registry.capture_persistence_snapshot(bindings.epoch_id, bindings.cursor_state)
        assert store.load(bindings.session_id) == held


def test_closing_makes_everything_durable(
    store: WatchedStore, bindings: SessionRuntimeBindings
) -> None:
    with PersistenceChannel(store, max_delay=NEVER) as channel:
        channel.follow(bindings)
        eventually(lambda: recorded(store, bindings))
        complete(bindings, 3)
    assert stored_seqs(store, bindings) == [1, 2, 3]
    assert channel.status().lag == 0


def test_a_standalone_epoch_can_be_followed(store: WatchedStore) -> None:
    bindings = SessionRuntimeBindings.standalone(SessionId.new())
    with PersistenceChannel(store) as channel:
        channel.follow(bindings)
        eventually(lambda: recorded(store, bindings))
        complete(bindings, 2)
        eventually(lambda: stored_seqs(store, bindings) == [1, 2])


def test_it_goes_on_where_the_store_is(
    store: WatchedStore, bindings: SessionRuntimeBindings
) -> None:
    for round in range(1, 4):
        complete(bindings, 2)
        with PersistenceChannel(store) as channel:
            channel.follow(bindings)
            channel.flush()
        assert channel.status().entries == 2
        assert stored_seqs(store, bindings) == list(range(1, 2 * round + 1))


def test_two_channels_may_follow_the_same_epoch(
    store: WatchedStore, bindings: SessionRuntimeBindings
) -> None:
    with PersistenceChannel(store) as one, PersistenceChannel(store) as other:
        one.follow(bindings)
        other.follow(bindings)
        complete(bindings, 50)
        one.flush()
        other.flush()
        assert (one.status().lag, other.status().lag) == (0, 0)
    assert stored_seqs(store, bindings) == list(range(1, 51))


def test_the_end_of_an_epoch_is_stored(
    store: WatchedStore, adapter: RuntimeSessionAdapter, bindings: SessionRuntimeBindings
) -> None:
    with PersistenceChannel(store) as channel:
        channel.follow(bindings)
        complete(bindings, 2)
        begin(bindings)
        adapter.unregister_session(bindings.session_id)
        eventually(lambda: store.last_seq(bindings.epoch_id) == 3)
        eventually(lambda: not recorded(store, bindings))
        assert channel.status().lag == 0


def test_a_reset_session_has_its_new_epoch_in_the_store(
    store: WatchedStore, adapter: RuntimeSessionAdapter, bindings: SessionRuntimeBindings
) -> None:
    with PersistenceChannel(store, max_delay=NEVER) as channel:
        channel.follow(bindings)
        complete(bindings, 2)
        new = adapter.reset_session(bindings.session_id)
        channel.follow(new)
        channel.flush()
    snapshot = store.load(bindings.session_id)
    assert snapshot is not None
    assert (snapshot.epoch_id, snapshot.last_seq) == (new.epoch_id, 0)
    assert stored_seqs(store, bindings) == [1, 2]


# --- when -----------------------------------------------------------------------------------------


def test_many_epochs_share_a_transaction(
    store: WatchedStore, adapter: RuntimeSessionAdapter
) -> None:
    epochs = [adapter.prepare_bindings(SessionId.new()) for _ in range(5)]
    with PersistenceChannel(store, max_delay=NEVER, max_entries=20) as channel:
        for bindings in epochs:
            channel.follow(bindings)
        channel.flush()
        for bindings in epochs:
            complete(bindings, 4)
        eventually(store.saved_entries)
        assert store.saved_entries() == [20]
        channel.flush()
    assert store.saved_entries() == [20]


def test_fewer_completions_than_are_pressed_for_wait_for_the_delay(
    store: WatchedStore, bindings: SessionRuntimeBindings
) -> None:
    with PersistenceChannel(store, max_delay=NEVER, max_entries=10) as channel:
        channel.follow(bindings)
        channel.flush()
        saves = len(store.saves)
        complete(bindings, 9)
        time.sleep(0.2)  # the absence of a save cannot be waited for
        assert len(store.saves) == saves
        complete(bindings)
        eventually(store.saved_entries)
    assert store.saved_entries()[0] == 10


def test_completions_within_the_delay_share_a_transaction(
    store: WatchedStore, bindings: SessionRuntimeBindings
) -> None:
    with PersistenceChannel(store, max_delay=1.0, max_entries=10_000) as channel:
        channel.follow(bindings)
        channel.flush()
        complete(bindings, 10)
        eventually(store.saved_entries)
    assert store.saved_entries()[0] == 10


def test_changes_that_wake_no_thread_are_polled_for_soon_after_a_save(
    store: WatchedStore, bindings: SessionRuntimeBindings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(persistence, "_POLL_S", NEVER)
    with PersistenceChannel(store) as channel:
        channel.follow(bindings)
        complete(bindings)
        eventually(lambda: stored_seqs(store, bindings) == [1])
        saves = len(store.saves)
        bindings.cursor_state.agent_applied_cursor.advance(1)
        eventually(lambda: len(store.saves) > saves)


def test_and_seldom_once_nothing_happens(
    store: WatchedStore, bindings: SessionRuntimeBindings, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks, is_due = [], Followed.is_due

    def counted(self: Followed, *, thoroughly: bool) -> bool:
        looks.append(time.monotonic())
        return is_due(self, thoroughly=thoroughly)

    with PersistenceChannel(store) as channel:
        channel.follow(bindings)
        complete(bindings)
        channel.flush()
        time.sleep(2.2)  # longer than any interval of the channel
        monkeypatch.setattr(Followed, "is_due", counted)
        eventually(lambda: len(looks) >= 3)
        assert looks[-1] - looks[0] > 1.5


def test_a_flush_does_not_wait_for_the_next_look(
    store: WatchedStore, bindings: SessionRuntimeBindings, monkeypatch: pytest.MonkeyPatch
) -> None:
    for pause in ("_POLL_S", "_WARM_POLL_S"):
        monkeypatch.setattr(persistence, pause, NEVER)
    with PersistenceChannel(store) as channel:
        channel.follow(bindings)
        eventually(lambda: recorded(store, bindings))
        for _ in range(3):
            begin(bindings)
            channel.flush(20)


def test_nothing_is_saved_while_nothing_happens(
    store: WatchedStore, bindings: SessionRuntimeBindings
) -> None:
    with PersistenceChannel(store) as channel:
        channel.follow(bindings)
        complete(bindings)
        begin(bindings)
        channel.flush()
        attempts = store.attempts
        time.sleep(1.5)  # longer than the interval of polls
        assert store.attempts == attempts


IDLE = """
import time
from shmepoch import RuntimeSessionAdapter, SessionId
from shmepoch.runtime.persistence import PersistenceChannel
from shmepoch.stores import InMemoryRuntimeStore

with RuntimeSessionAdapter.ephemeral() as adapter, PersistenceChannel(InMemoryRuntimeStore()) as c:
    sessions = [SessionId.new() for _ in range(100)]
    for session in sessions:
        c.follow(adapter.prepare_bindings(session))
    adapter._supervisor.stop()
    c.flush()
    time.sleep(1.1)
    began = time.process_time()
    time.sleep(3)
    used = time.process_time() - began
    for session in sessions:
        adapter.unregister_session(session)
print(used)
"""


def test_an_idle_channel_uses_next_to_no_processor() -> None:
    done = subprocess.run([sys.executable, "-c", IDLE], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.15  # of three seconds, with a hundred epochs


def test_a_sealed_epoch_makes_no_more_work(
    store: WatchedStore,
    adapter: RuntimeSessionAdapter,
    bindings: SessionRuntimeBindings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks, is_due = [], Followed.is_due

    def counted(self: Followed, *, thoroughly: bool) -> bool:
        looks.append(self)
        return is_due(self, thoroughly=thoroughly)

    with PersistenceChannel(store, max_delay=0) as channel:
        channel.follow(bindings)
        adapter.unregister_session(bindings.session_id)
        channel.flush()
        attempts = store.attempts
        monkeypatch.setattr(Followed, "is_due", counted)
        time.sleep(1.2)
        assert store.attempts == attempts
        assert 0 < len(looks) < 100  # a wait that returns at once would make thousands


# --- PERSIST-1: the order -------------------------------------------------------------------------


def test_no_cursor_is_stored_without_what_is_below_it() -> None:
    """An agent applies every completion at once, while a channel saves without pause."""
    large = OpsLifecycleConfig(feed_bytes=2**20)  # nothing is dropped before it is stored
    bindings = SessionRuntimeBindings.standalone(SessionId.new(), large)
    cursor = bindings.cursor_state.agent_applied_cursor
    wrong: list[str] = []

    class Auditor(InMemoryRuntimeStore):
        highest = 0

        def save(self, captures: Any) -> None:
            for capture in captures:
                snapshot: Any = capture.snapshot
                self.highest = max([self.highest, *(entry.seq for entry in snapshot.entries)])
                if snapshot.cursors.agent_applied_cursor > self.highest:
                    wrong.append(f"cursor {snapshot.cursors} above entry {self.highest}")
            super().save(captures)
            loaded = self.load(bindings.session_id)
            assert loaded is not None
            ended = {entry.operation_id for entry in loaded.entries}
            wrong.extend(
                f"operation {operation.id} has ended and is {operation.status}"
                for operation in loaded.operations
                if not operation.status.is_terminal and operation.id in ended
            )

    store = Auditor()
    with PersistenceChannel(store, max_delay=0) as channel:
        channel.follow(bindings)
        for seq in range(1, 1501):
            complete(bindings)
            cursor.advance(seq)
        channel.flush()
    assert wrong == []
    assert stored_seqs(store, bindings) == list(range(1, 1501))


def test_the_cursors_are_read_first(
    store: WatchedStore, bindings: SessionRuntimeBindings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between any two of the reads, an operation completes and the agent applies it."""
    with PersistenceChannel(store, max_delay=NEVER) as channel:
        channel.follow(bindings)
        channel.flush()
        whole = SegmentFeed.list_since

        def late(self: SegmentFeed, after_seq: int) -> CompletionBatch:
            monkeypatch.undo()
            complete(bindings)
            batch = whole(self, after_seq)
            bindings.cursor_state.agent_applied_cursor.advance(batch.watermark)
            return batch

        begin(bindings)
        monkeypatch.setattr(SegmentFeed, "list_since", late)
        channel.flush()
        first = next(save for save in store.saves if save[0].snapshot.entries)
        assert [entry.seq for entry in first[0].snapshot.entries] == [1]
        assert first[0].snapshot.cursors.agent_applied_cursor == 0


def test_each_completion_is_decoded_once_on_its_way_to_the_store(
    store: WatchedStore, bindings: SessionRuntimeBindings, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[int] = []
    decoder = feed._entries_decoder

    class Counting:
        def decode(self, data: bytes) -> tuple[CompletionEntry, ...]:
            entries = decoder.decode(data)
            decoded.extend(entry.seq for entry in entries)
            return entries

    complete(bindings, 30)
    monkeypatch.setattr(feed, "_entries_decoder", Counting())
    with PersistenceChannel(store) as channel:
        channel.follow(bindings)
        channel.flush()
    assert decoded == list(range(1, 31))
    assert stored_seqs(store, bindings) == decoded


# --- completions that retention dropped -----------------------------------------------------------


def test_what_was_dropped_before_it_was_read_is_said(
    store: WatchedStore, adapter: RuntimeSessionAdapter, caplog: pytest.LogCaptureFixture
) -> None:
    adapter._opener._config = SMALL
    bindings = adapter.prepare_bindings(SessionId.new())
    with PersistenceChannel(store, max_delay=0) as channel:
        channel.follow(bindings)
        complete(bindings, 2)
        channel.flush()
        store.gate.clear()
        attempts = store.attempts
        complete(bindings)
        eventually(lambda: store.attempts > attempts)  # it has read the third, and is blocked
        complete(bindings, 400)
        dropped = bindings.ops_lifecycle.completion_feed().list_since(0).dropped_through
        assert 3 < dropped < 403
        store.gate.set()
        channel.flush()
        (epoch,) = channel.status().epochs
        assert epoch.last_gap == CompletionFeedGap(3, dropped)
        assert epoch.missed == channel.status().missed == dropped - 3
        assert epoch.lag == 0
        assert stored_seqs(store, bindings) == [1, 2, 3, *range(dropped + 1, 404)]
        assert f"completions 4 to {dropped} were dropped before they were stored" in caplog.text
        complete(bindings)
        channel.flush()
        assert channel.status().missed == dropped - 3


def test_a_recovered_epoch_misses_nothing(namespace: str, tmp_path: Path) -> None:
    """Recovery skips sequences, and no completion has one of them."""
    session = SessionId.new()
    with SqliteRuntimeStore(tmp_path / "store.db", synchronous="normal") as store:
        for round in range(1, 4):
            with RuntimeSessionAdapter.persistent(store, config=SMALL) as adapter:
                bindings = adapter.prepare_bindings(session)
                complete(bindings, 3)
                channel = _channel_of(adapter)
                channel.flush()
                assert (channel.status().missed, channel.status().lag) == (0, 0)
                assert len(store.list_entries(bindings.epoch_id)) == 3 * round
                bindings.shared_segment().unlink()  # the machine restarts


def test_what_recovery_skipped_is_not_counted_as_missed(namespace: str, tmp_path: Path) -> None:
    session = SessionId.new()
    with SqliteRuntimeStore(tmp_path / "store.db", synchronous="normal") as store:
        with RuntimeSessionAdapter.persistent(store, config=SMALL) as adapter:
            bindings = adapter.prepare_bindings(session)
            complete(bindings, 3)
            _channel_of(adapter).flush()
            bindings.shared_segment().unlink()
        with RuntimeSessionAdapter.persistent(store, config=SMALL) as adapter:
            bindings = adapter.prepare_bindings(session)
            after, through = bindings.skipped
            assert after == 3
            _channel_of(adapter).unfollow(bindings)
            complete(bindings, 400)
            dropped = bindings.ops_lifecycle.completion_feed().list_since(0).dropped_through
            assert dropped > through
            with PersistenceChannel(store) as channel:
                channel.follow(bindings)
                channel.flush()
                assert channel.status().epochs[0].last_gap == CompletionFeedGap(through, dropped)
            bindings.shared_segment().unlink()


def _channel_of(adapter: RuntimeSessionAdapter) -> PersistenceChannel:
    assert adapter._durability is not None
    return adapter._durability.channel


def test_how_far_the_store_has_come_is_seen_by_every_process(
    store: WatchedStore, bindings: SessionRuntimeBindings
) -> None:
    memory = bindings.shared_segment().memory
    with PersistenceChannel(store, max_delay=NEVER) as channel:
        channel.follow(bindings)
        complete(bindings, 3)
        channel.flush()
        assert memory.load(at.DURABLE_AT) == 3
        complete(bindings)
        assert memory.load(at.DURABLE_AT) == 3
        bindings.ops_lifecycle.check()


# --- stores that fail -----------------------------------------------------------------------------


@pytest.mark.parametrize("failure", [StoreWriteFailed("the disk is full"), OSError("is full")])
def test_a_store_that_fails_is_tried_again(
    store: WatchedStore,
    bindings: SessionRuntimeBindings,
    caplog: pytest.LogCaptureFixture,
    failure: Exception,
) -> None:
    with PersistenceChannel(store) as channel:
        channel.follow(bindings)
        complete(bindings)
        channel.flush()
        store.failure = lambda: failure
        complete(bindings, 2)
        eventually(lambda: channel.status().failing)
        status = channel.status()
        assert status.last_error is not None
        assert "is full" in status.last_error
        assert (status.lag, status.epochs[0].durable_seq) == (2, 1)
        complete(bindings, 2)  # the epoch goes on
        eventually(lambda: channel.status().failures >= 3)
        assert caplog.text.count("nothing is stored until the store works again") == 1
        store.failure = None
        eventually(lambda: not channel.status().failing)
        assert stored_seqs(store, bindings) == [1, 2, 3, 4, 5]
        assert channel.status().missed == 0
        assert channel.status().last_error is not None  # the error remains visible


def test_pauses_grow_while_the_store_fails(
    store: WatchedStore, adapter: RuntimeSessionAdapter
) -> None:
    epochs = [adapter.prepare_bindings(SessionId.new()) for _ in range(40)]
    with PersistenceChannel(store) as channel:
        for bindings in epochs:
            channel.follow(bindings)
        channel.flush()
        store.failure = lambda: StoreWriteFailed("no")
        began = time.monotonic()
        for bindings in epochs:
            complete(bindings)  # new completions do not make it try earlier
            time.sleep(0.02)
        failures = channel.status().failures
        # n failures take 2**(n - 1) - 1 first pauses; one more may come before the clock is read.
        assert 0 < failures <= 2 + math.log2(1 + (time.monotonic() - began) / 0.05)
        store.failure = None
        channel.flush()


def test_pauses_are_short_again_once_the_store_has_worked(
    store: WatchedStore, bindings: SessionRuntimeBindings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(persistence, "_FIRST_RETRY_S", 0.01)
    monkeypatch.setattr(persistence, "_LAST_RETRY_S", NEVER)
    with PersistenceChannel(store) as channel:
        channel.follow(bindings)
        for failures in (7, 14):  # the fourteenth pause would take a minute and more
            store.failure = lambda: StoreWriteFailed("no")
            complete(bindings)
            eventually(lambda failures=failures: channel.status().failures >= failures)  # type: ignore[misc]
            store.failure = None
            channel.flush()


def test_a_flush_of_a_store_that_fails_says_why(
    store: WatchedStore, bindings: SessionRuntimeBindings
) -> None:
    failure = StoreWriteFailed("the disk is full")
    with PersistenceChannel(store) as channel:
        channel.follow(bindings)
        store.failure = lambda: failure
        complete(bindings)
        with pytest.raises(
            StoreWriteFailed, match=r"the disk is full \(flush waited 0.05 s\); it"
        ) as caught:
            channel.flush(0.05)
        assert caught.value.__cause__ is failure
        store.failure = None
        channel.flush()  # does not wait for the next try
        assert stored_seqs(store, bindings) == [1]


def test_a_flush_of_a_store_that_is_slow_times_out(
    store: WatchedStore, bindings: SessionRuntimeBindings
) -> None:
    with PersistenceChannel(store) as channel:
        channel.follow(bindings)
        channel.flush()
        store.gate.clear()
        complete(bindings)
        with pytest.raises(TimeoutError, match=r"within 0\.05 s"):
            channel.flush(0.05)
        store.gate.set()
        channel.flush()
        assert stored_seqs(store, bindings) == [1]


def test_closing_while_the_store_fails_says_what_is_not_stored(
    store: WatchedStore, bindings: SessionRuntimeBindings, caplog: pytest.LogCaptureFixture
) -> None:
    with PersistenceChannel(store, max_delay=NEVER) as channel:
        channel.follow(bindings)
        channel.flush()
        store.failure = lambda: StoreWriteFailed("no")
        complete(bindings, 3)
    assert "closed while the store fails; 3 completions are in shared memory only" in caplog.text
    # They are still in shared memory, and the next channel stores them.
    store.failure = None
    with PersistenceChannel(store) as channel:
        channel.follow(bindings)
    assert stored_seqs(store, bindings) == [1, 2, 3]


def test_a_store_that_was_replaced_gets_what_the_feed_has(
    bindings: SessionRuntimeBindings, tmp_path: Path
) -> None:
    path = tmp_path / "store.db"
    with (
        SqliteRuntimeStore(path, synchronous="normal") as store,
        PersistenceChannel(store) as channel,
    ):
        channel.follow(bindings)
        id = begin(bindings)
        complete(bindings, 3)
        channel.flush()
        for part in tmp_path.glob("store.db*"):
            part.unlink()
        complete(bindings)
        channel.flush()
        assert channel.status().failures > 0
        snapshot = store.load(bindings.session_id)
        assert snapshot is not None
        assert [entry.seq for entry in snapshot.entries] == [1, 2, 3, 4]
        running = [o.id for o in snapshot.operations if o.status is OperationStatus.RUNNING]
        assert running == [id]


# --- epochs that cannot be stored -----------------------------------------------------------------


def test_an_epoch_that_contradicts_the_store_does_not_hold_up_the_others(
    store: WatchedStore, adapter: RuntimeSessionAdapter, caplog: pytest.LogCaptureFixture
) -> None:
    good, bad = (adapter.prepare_bindings(SessionId.new()) for _ in range(2))
    with PersistenceChannel(store, max_delay=NEVER) as channel:
        channel.follow(good)
        channel.follow(bad)
        complete(bad)
        channel.flush()
        another = PersistedOpsSnapshot(epoch_id=bad.epoch_id, entries=(completion(2),))
        store.save([EpochCapture(session_id=bad.session_id, snapshot=another)])
        complete(good, 2)
        complete(bad, 2)
        with pytest.raises(StoreConflict, match="completion 2"):
            channel.flush()
        assert stored_seqs(store, good) == [1, 2]
        assert not channel.status().failing
        errors = {epoch.epoch_id: epoch.error for epoch in channel.status().epochs}
        assert errors[good.epoch_id] is None
        assert "completion 2" in str(errors[bad.epoch_id])
        assert caplog.text.count("cannot be stored any more") == 1
        complete(good)
        complete(bad)
        with pytest.raises(StoreConflict):
            channel.flush()
        assert stored_seqs(store, good) == [1, 2, 3]
        channel.flush(bindings=good)
        with pytest.raises(StoreConflict):
            channel.flush(bindings=bad)
        channel.unfollow(bad)
        channel.flush()


def test_an_epoch_that_is_damaged_does_not_hold_up_the_others(
    store: WatchedStore, adapter: RuntimeSessionAdapter
) -> None:
    good, bad = (adapter.prepare_bindings(SessionId.new()) for _ in range(2))
    with PersistenceChannel(store, max_delay=NEVER) as channel:
        channel.follow(good)
        channel.follow(bad)
        channel.flush()
        complete(good)
        complete(bad, 2)
        segment = bad.shared_segment()
        damage_record(segment, 1)
        with pytest.raises(SegmentCorrupted):
            channel.flush()
        assert stored_seqs(store, good) == [1]
        assert [epoch.error is None for epoch in channel.status().epochs] == [True, False]


# --- following, closing, forking ------------------------------------------------------------------


def test_following_twice_is_following_once(
    store: WatchedStore, bindings: SessionRuntimeBindings
) -> None:
    with PersistenceChannel(store) as channel:
        channel.follow(bindings)
        channel.follow(bindings)
        assert len(channel.status().epochs) == 1


def test_nothing_is_written_of_an_epoch_that_is_not_followed_any_more(
    store: WatchedStore, adapter: RuntimeSessionAdapter
) -> None:
    one, other = (adapter.prepare_bindings(SessionId.new()) for _ in range(2))
    with PersistenceChannel(store, max_delay=0) as channel:
        channel.follow(one)
        channel.follow(other)
        for _ in range(20):
            complete(one)
        channel.unfollow(one)
        channel.unfollow(one)
        store.remove(one.session_id)
        complete(one)
        complete(other)
        channel.flush()
        assert stored_seqs(store, one) == []
        assert not recorded(store, one)
        assert stored_seqs(store, other) == [1]
        channel.follow(one)
        channel.flush()
        assert len(stored_seqs(store, one)) == 21


def test_nothing_waits_for_an_epoch_that_is_not_followed_any_more(
    store: WatchedStore, adapter: RuntimeSessionAdapter
) -> None:
    one, other = (adapter.prepare_bindings(SessionId.new()) for _ in range(2))
    with PersistenceChannel(store) as channel:
        channel.follow(one)
        channel.follow(other)
        channel.flush()
        waiting = channel._epochs[one.epoch_id].waiting
        assert waiting is not None
        channel.unfollow(one)
        eventually(waiting.cancelled)


def test_unfollowing_waits_for_what_is_being_written(
    store: WatchedStore, bindings: SessionRuntimeBindings
) -> None:
    with PersistenceChannel(store) as channel:
        channel.follow(bindings)
        channel.flush()
        store.gate.clear()
        attempts = store.attempts
        complete(bindings)
        eventually(lambda: store.attempts > attempts)
        over = threading.Event()

        def unfollow() -> None:
            channel.unfollow(bindings)
            over.set()

        thread = threading.Thread(target=unfollow)
        thread.start()
        assert not over.wait(0.1)
        store.gate.set()
        thread.join()
    assert stored_seqs(store, bindings) == [1]


def test_what_is_not_followed_any_more_when_its_turn_comes_is_not_written(
    store: WatchedStore, bindings: SessionRuntimeBindings, monkeypatch: pytest.MonkeyPatch
) -> None:
    looking, go_on = threading.Event(), threading.Event()
    with PersistenceChannel(store, max_delay=0) as channel:
        channel.follow(bindings)
        channel.flush()
        is_due = Followed.is_due

        def slow(self: Followed, *, thoroughly: bool) -> bool:
            looking.set()
            go_on.wait()
            return is_due(self, thoroughly=thoroughly)

        monkeypatch.setattr(Followed, "is_due", slow)
        complete(bindings)
        looking.wait()
        channel.unfollow(bindings)
        go_on.set()
        channel.flush()
    assert stored_seqs(store, bindings) == []


def test_a_closed_channel_takes_nothing(
    store: WatchedStore, bindings: SessionRuntimeBindings
) -> None:
    channel = PersistenceChannel(store)
    channel.flush()  # nothing is followed, so everything is durable
    channel.follow(bindings)
    channel.close()
    channel.close()
    with pytest.raises(ChannelClosed):
        channel.follow(bindings)
    with pytest.raises(ChannelClosed):
        channel.flush()
    channel.unfollow(bindings)
    assert channel.status().flushes > 0


@pytest.mark.parametrize("max_delay", [-0.1, float("nan"), float("inf"), "1", None])
def test_a_delay_is_a_number_of_seconds(store: WatchedStore, max_delay: Any) -> None:
    with pytest.raises(ConfigInvalid, match="max_delay"):
        PersistenceChannel(store, max_delay=max_delay)


@pytest.mark.parametrize("max_entries", [0, -1, 1.5, True, None])
def test_a_number_of_entries_is_at_least_one(store: WatchedStore, max_entries: Any) -> None:
    with pytest.raises(ConfigInvalid, match="max_entries"):
        PersistenceChannel(store, max_entries=max_entries)


def test_a_forked_child_leaves_the_channel_to_its_parent(
    bindings: SessionRuntimeBindings, tmp_path: Path
) -> None:
    with (
        SqliteRuntimeStore(tmp_path / "store.db", synchronous="normal") as store,
        PersistenceChannel(store, max_delay=0) as channel,
    ):
        channel.follow(bindings)
        for _ in range(10):
            complete(bindings, 3)
            pid = os.fork()
            if pid == 0:
                try:
                    for use in (channel.flush, channel.status, lambda: channel.follow(bindings)):
                        with pytest.raises(ChannelClosed):
                            use()
                    channel.close()
                    assert store.last_seq(bindings.epoch_id) >= 0
                except BaseException:
                    os._exit(1)
                os._exit(0)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        channel.flush()
        assert stored_seqs(store, bindings) == list(range(1, 31))


# --- killed anywhere ------------------------------------------------------------------------------


def persist(path: str, token: str, ready: Any) -> None:
    """A process that only persists."""
    bindings = SessionRuntimeBindings.from_token(token)
    with SqliteRuntimeStore(path) as store, PersistenceChannel(store, max_delay=0.002) as channel:
        channel.follow(bindings)
        channel.flush()
        ready.set()
        signal.pause()


def work(token: str, stop: Any) -> None:
    """A worker that ends operations until it is told to stop, or the feed is about to drop some."""
    bindings = SessionRuntimeBindings.from_token(token)
    feed = bindings.ops_lifecycle.completion_feed()
    while not stop.is_set() and feed.watermark() < RETAINED:
        complete(bindings)
        time.sleep(0.001)
    bindings.close()


def test_killed_anywhere_it_loses_and_repeats_nothing(
    adapter: RuntimeSessionAdapter, tmp_path: Path
) -> None:
    """Persisting processes are killed one after another while two workers go on. Each has stored
    complete transactions, and the last one stores everything."""
    adapter._opener._config = OpsLifecycleConfig(max_completed=RETAINED, feed_bytes=8 * 1024 * 1024)
    bindings = adapter.prepare_bindings(SessionId.new())
    feed = bindings.ops_lifecycle.completion_feed()
    path, token = tmp_path / "store.db", bindings.to_token()
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    workers = [context.Process(target=work, args=(token, stop)) for _ in range(2)]
    for worker in workers:
        worker.start()
    moments = random.Random(11)
    before = 0
    for _ in range(6):
        ready = context.Event()
        persister = context.Process(target=persist, args=(str(path), token, ready))
        persister.start()
        assert ready.wait(30)
        time.sleep(moments.uniform(0, 0.15))
        persister.kill()
        persister.join()
        with SqliteRuntimeStore(path, busy_timeout=0) as store:
            snapshot = store.load(bindings.session_id)
        assert snapshot is not None
        last = snapshot.entries[-1].seq if snapshot.entries else 0
        assert [entry.seq for entry in snapshot.entries] == list(range(1, last + 1))
        assert snapshot.entries == feed.list_since(0).entries[:last]
        assert last >= before
        before = last
    stop.set()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    with SqliteRuntimeStore(path) as store, PersistenceChannel(store) as channel:
        channel.follow(bindings)
        channel.flush()
        batch = feed.list_since(0)
        assert batch.dropped_through == 0
        assert tuple(store.list_entries(bindings.epoch_id)) == batch.entries
        assert channel.status().missed == 0
    bindings.ops_lifecycle.check()
