"""The promises of every kind of store."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import numpy
import pytest

from shmepoch.epoch.cursors import EpochCursorSnapshot
from shmepoch.epoch.operations import (
    Aborted,
    Cancelled,
    Failed,
    OperationStatus,
    Retired,
    Terminated,
)
from shmepoch.epoch.persisted import PersistedOpsSnapshot
from shmepoch.errors import StoreConflict, StoreLoadFailed, StoreReadFailed, StoreWriteFailed
from shmepoch.ids import RuntimeEpochId, SessionId
from shmepoch.stores import EpochCapture, EpochOverview, RuntimeStore, SessionOverview
from tests.stores.samples import T0, Epoch, completion, completions, ended, failed, running
from tests.support import spec

HIGHEST = 2**64 - 1


def loaded(store: RuntimeStore, epoch: Epoch) -> PersistedOpsSnapshot:
    snapshot = store.load(epoch.session_id)
    assert snapshot is not None
    assert snapshot.epoch_id == epoch.id
    return snapshot


def cursors(applied: int, observed: int, injected: int) -> EpochCursorSnapshot:
    return EpochCursorSnapshot(
        agent_applied_cursor=applied,
        runtime_observed_seq=observed,
        runtime_last_injected_seq=injected,
    )


def test_it_is_a_runtime_store(store: RuntimeStore) -> None:
    assert isinstance(store, RuntimeStore)


# --- saving and loading ---------------------------------------------------------------------------


def test_an_unknown_session_has_no_epoch(store: RuntimeStore) -> None:
    assert store.load(SessionId.new()) is None
    assert store.last_seq(RuntimeEpochId.new()) == 0
    assert store.list_entries(RuntimeEpochId.new()) == []
    assert list(store.history(SessionId.new())) == []
    assert list(store.sessions()) == []


def test_an_epoch_without_completions_is_an_epoch(store: RuntimeStore) -> None:
    epoch = Epoch()
    store.save([epoch.capture()])
    assert loaded(store, epoch) == PersistedOpsSnapshot(epoch_id=epoch.id)
    assert list(store.sessions()) == [epoch.session_id]


def test_a_whole_capture_comes_back_as_it_was(store: RuntimeStore) -> None:
    epoch = Epoch()
    first, entry = failed(1)
    second = spec("half way", id=None)
    capture = epoch.capture(
        [entry],
        operations=[ended(first, entry), running(second, progress=4)],
        specs=[first, second],
        cursors=(1, 0, 1),
    )
    store.save([capture])
    assert loaded(store, epoch) == capture.snapshot
    assert PersistedOpsSnapshot.from_json(loaded(store, epoch).to_json()) == capture.snapshot


@pytest.mark.parametrize(
    "outcome",
    [Failed("ü\0\n'\"; DROP TABLE"), Aborted(), Cancelled("late"), Retired(), Terminated("gone")],
)
def test_every_outcome_is_kept(store: RuntimeStore, outcome: Terminated) -> None:
    epoch = Epoch()
    entry = completion(1, outcome=outcome)
    store.save([epoch.capture([entry])])
    assert loaded(store, epoch).entries == (entry,)


def test_completions_are_appended_by_later_captures(store: RuntimeStore) -> None:
    epoch = Epoch()
    entries = completions(1, 9)
    for end in (3, 4, 9):
        store.save([epoch.capture(entries[:end])])
        assert loaded(store, epoch).entries == tuple(entries[:end])
        assert store.last_seq(epoch.id) == end


def test_completions_are_in_order_however_they_arrive(store: RuntimeStore) -> None:
    epoch = Epoch()
    entries = completions(1, 9)
    store.save([epoch.capture(entries[6:])])
    store.save([epoch.capture(entries[2:4])])
    store.save([epoch.capture(entries[:6])])
    assert loaded(store, epoch).entries == tuple(entries)


def test_loading_takes_the_newest_completions(store: RuntimeStore) -> None:
    epoch = Epoch()
    made = [failed(seq) for seq in range(1, 8)]
    entries = [entry for _, entry in made]
    operations = [ended(spec, entry) for spec, entry in made]
    store.save([epoch.capture(entries, operations=operations, specs=[s for s, _ in made])])
    for count in (0, 1, 3, 7, 8):
        snapshot = store.load(epoch.session_id, max_entries=count)
        assert snapshot is not None
        kept = min(count, 7)
        assert snapshot.entries == tuple(entries[7 - kept :])
        assert snapshot.operations == tuple(operations[7 - kept :])


def test_one_save_takes_many_epochs(store: RuntimeStore) -> None:
    epochs = [Epoch() for _ in range(20)]
    store.save([epoch.capture(completions(1, n)) for n, epoch in enumerate(epochs)])
    assert [store.last_seq(epoch.id) for epoch in epochs] == list(range(20))
    assert list(store.sessions()) == sorted(epoch.session_id for epoch in epochs)


def test_saving_nothing_is_nothing(store: RuntimeStore) -> None:
    store.save([])
    assert list(store.sessions()) == []


# --- STORE-1: it only grows -----------------------------------------------------------------------


def test_saving_the_same_again_changes_nothing(store: RuntimeStore) -> None:
    epoch = Epoch()
    first, entry = failed(1)
    live = spec()
    capture = epoch.capture(
        [entry], operations=[ended(first, entry), running(live)], specs=[first, live]
    )
    store.save([capture])
    store.save([capture, capture])
    assert loaded(store, epoch) == capture.snapshot


@pytest.mark.parametrize(
    "order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]
)
def test_cursors_only_grow(store: RuntimeStore, order: tuple[int, ...]) -> None:
    epoch = Epoch()
    seen = [(3, 9, 0), (5, 2, 1), (4, 4, HIGHEST)]
    for index in order:
        store.save([epoch.capture(cursors=seen[index])])
    assert loaded(store, epoch).cursors == cursors(5, 9, HIGHEST)


@pytest.mark.parametrize("value", [0, 1, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**63 + 1, HIGHEST])
def test_positions_are_unsigned_64_bit(store: RuntimeStore, value: int) -> None:
    epoch = Epoch()
    store.save([epoch.capture(cursors=(value, max(0, value - 1), 0))])
    assert loaded(store, epoch).cursors == cursors(value, max(0, value - 1), 0)
    store.save([epoch.capture(cursors=(0, value, value))])
    assert loaded(store, epoch).cursors == cursors(value, value, value)


def test_what_recoveries_left_out_only_grows(store: RuntimeStore) -> None:
    epoch = Epoch()
    assert store.list_skipped(epoch.id) == []
    for offered, expected in (
        ([(3, 1027)], [(3, 1027)]),
        ([(3, 5)], [(3, 1027)]),
        ([(3, 2051)], [(3, 2051)]),
        ([], [(3, 2051)]),
        ([(2**63, HIGHEST), (2060, 3084)], [(3, 2051), (2060, 3084), (2**63, HIGHEST)]),
    ):
        snapshot = PersistedOpsSnapshot(epoch_id=epoch.id, skipped=tuple(offered))
        store.save([EpochCapture(session_id=epoch.session_id, snapshot=snapshot)])
        assert store.list_skipped(epoch.id) == expected
        assert loaded(store, epoch).skipped == tuple(expected)
        assert loaded(store, epoch).last_seq == expected[-1][1]
    beyond = PersistedOpsSnapshot(epoch_id=epoch.id, skipped=((0, 2**64),))
    with pytest.raises(OverflowError, match="skipped"):
        EpochCapture(session_id=epoch.session_id, snapshot=beyond)
    other = Epoch()
    store.save([other.capture()])
    assert store.list_skipped(other.id) == []


def test_sequences_sort_as_unsigned_numbers(store: RuntimeStore) -> None:
    epoch = Epoch()
    seqs = [1, 2**63 - 1, 2**63, 2**63 + 1, HIGHEST]
    entries = [completion(seq, at_ms=T0) for seq in seqs]
    store.save([epoch.capture(entries[::-1])])
    assert loaded(store, epoch).entries == tuple(entries)
    assert store.last_seq(epoch.id) == HIGHEST
    assert store.list_entries(epoch.id, 2**63 - 1, 2**63 + 1) == entries[2:4]


@pytest.mark.parametrize("value", [-1, 2**64])
def test_other_positions_are_refused(value: int) -> None:
    with pytest.raises(OverflowError, match=str(value)):
        Epoch().capture(cursors=(0, value, 0))
    with pytest.raises(OverflowError, match=str(value)):
        Epoch().capture([completion(value)])
    with pytest.raises(OverflowError, match="seq is 0; it must be 1 to"):
        Epoch().capture([completion(0)])


def test_another_completion_under_the_same_sequence_is_refused(store: RuntimeStore) -> None:
    epoch, other = Epoch(), Epoch()
    stored, offered = completion(2, content="one"), completion(2, content="two")
    store.save([epoch.capture([completion(1), stored])])
    with pytest.raises(StoreConflict, match="completion 2") as caught:
        store.save([other.capture(), epoch.capture([offered, completion(3)], cursors=(3, 3, 3))])
    error = caught.value
    assert (error.epoch_id, error.stored, error.offered) == (epoch.id, stored, offered)
    assert str(stored.operation_id) in str(error)
    assert str(offered.operation_id) in str(error)
    # The call saved nothing, and the store still works.
    assert store.load(other.session_id) is None
    assert loaded(store, epoch).cursors == cursors(0, 0, 0)
    store.save([epoch.capture([stored, completion(3)])])
    assert store.last_seq(epoch.id) == 3


def test_the_same_operation_with_another_result_is_another_completion(store: RuntimeStore) -> None:
    epoch = Epoch()
    stored = completion(1, content="one")
    store.save([epoch.capture([stored])])
    with pytest.raises(StoreConflict, match=r"'one'.*'two'"):
        store.save([epoch.capture([completion(1, id=stored.operation_id, content="two")])])


def test_two_completions_of_one_sequence_in_one_call_are_refused(store: RuntimeStore) -> None:
    epoch = Epoch()
    with pytest.raises(StoreConflict):
        store.save([epoch.capture([completion(1, content="a")]), epoch.capture([completion(1)])])
    assert list(store.sessions()) == []


def test_a_long_conflict_has_a_readable_text(store: RuntimeStore) -> None:
    epoch = Epoch()
    store.save([epoch.capture([completion(1, content="x" * 100_000)])])
    with pytest.raises(StoreConflict) as caught:
        store.save([epoch.capture([completion(1, content="y" * 100_000)])])
    assert len(str(caught.value)) < 2_000


def test_an_epoch_belongs_to_one_session(store: RuntimeStore) -> None:
    epoch, other = Epoch(), Epoch()
    store.save([epoch.capture()])
    other.id = epoch.id
    with pytest.raises(StoreConflict, match="the session") as caught:
        store.save([other.capture()])
    assert caught.value.stored == epoch.session_id
    assert caught.value.offered == other.session_id


# --- operations -----------------------------------------------------------------------------------


def test_the_last_word_on_a_running_operation_is_kept(store: RuntimeStore) -> None:
    epoch, work = Epoch(), spec()
    for progress in (0, 1, 5):
        store.save([epoch.capture(operations=[running(work, progress=progress)], specs=[work])])
    snapshot = loaded(store, epoch)
    assert snapshot.operations == (running(work, progress=5),)
    assert snapshot.specs == (work,)


def test_running_operations_keep_the_order_of_their_registration(store: RuntimeStore) -> None:
    epoch = Epoch()
    specs = [spec(f"work {n}") for n in range(6)]
    random.Random(3).shuffle(specs)
    store.save([epoch.capture(operations=[running(s) for s in specs[:4]], specs=specs)])
    # The first reports progress, the second ends, two are new.
    entry = completion(1, id=specs[1].id)
    live = [running(specs[0], progress=1), *(running(s) for s in specs[2:])]
    store.save([epoch.capture([entry], operations=live, specs=specs)])
    ids = [operation.id for operation in loaded(store, epoch).operations]
    assert ids == [specs[1].id, specs[0].id, *(s.id for s in specs[2:])]


def test_a_completion_ends_an_operation_that_was_stored_while_it_ran(store: RuntimeStore) -> None:
    epoch, work = Epoch(), spec()
    store.save([epoch.capture(operations=[running(work, progress=2)], specs=[work])])
    entry = completion(1, id=work.id, at_ms=T0 + 500)
    store.save([epoch.capture([entry])])
    (operation,) = loaded(store, epoch).operations
    assert operation.status is OperationStatus.COMPLETED
    assert operation.terminal_outcome == entry.terminal_outcome
    assert operation.completed_at_ms == entry.completed_at_ms
    assert operation.elapsed_ms == 500
    assert operation.watcher_count == 0
    assert operation.progress_count == 2
    assert loaded(store, epoch).specs == (work,)


def test_an_operation_seen_running_and_completed_at_once_has_ended(store: RuntimeStore) -> None:
    """A capture reads the operations before the completions, and one may end between the two."""
    epoch, work = Epoch(), spec()
    entry = completion(1, id=work.id)
    store.save([epoch.capture([entry], operations=[running(work)], specs=[work])])
    assert [o.status for o in loaded(store, epoch).operations] == [OperationStatus.COMPLETED]


def test_a_late_capture_does_not_bring_an_operation_back(store: RuntimeStore) -> None:
    epoch, work = Epoch(), spec()
    entry = completion(1, id=work.id)
    store.save([epoch.capture([entry], operations=[ended(work, entry)], specs=[work])])
    store.save([epoch.capture(operations=[running(work)], specs=[work])])
    assert loaded(store, epoch).operations == (ended(work, entry),)


def test_a_completion_of_which_nothing_else_is_known_is_kept(store: RuntimeStore) -> None:
    epoch, entry = Epoch(), completion(1)
    store.save([epoch.capture([entry])])
    assert loaded(store, epoch) == PersistedOpsSnapshot(epoch_id=epoch.id, entries=(entry,))


# --- STORE-2: one current epoch -------------------------------------------------------------------


def test_a_new_epoch_is_the_current_one(store: RuntimeStore) -> None:
    old = Epoch()
    new = Epoch(old.session_id)
    store.save([old.capture(completions(1, 3), cursors=(3, 3, 3))])
    store.save([new.capture()])
    assert loaded(store, new) == PersistedOpsSnapshot(epoch_id=new.id)
    assert list(store.sessions()) == [old.session_id]


def test_an_old_epoch_never_becomes_current_again(store: RuntimeStore) -> None:
    old = Epoch()
    new = Epoch(old.session_id)
    store.save([old.capture(completions(1, 3))])
    store.save([new.capture()])
    store.save([old.capture(completions(4, 4), cursors=(4, 4, 4))])
    assert loaded(store, new).entries == ()
    assert store.last_seq(old.id) == 4
    store.save([new.capture(sealed=True)])
    assert store.load(old.session_id) is None


def test_the_order_of_recording_decides_and_not_the_clock(store: RuntimeStore) -> None:
    new = Epoch()
    old = Epoch(new.session_id)  # it has the later identifier
    store.save([old.capture()])
    store.save([new.capture()])
    assert loaded(store, new).epoch_id < old.id


def test_one_save_rotates(store: RuntimeStore) -> None:
    old = Epoch()
    new = Epoch(old.session_id)
    store.save([old.capture(), old.capture(sealed=True), new.capture([completion(1)])])
    assert loaded(store, new).last_seq == 1


def test_a_sealed_epoch_is_not_loaded_and_stays_sealed(store: RuntimeStore) -> None:
    epoch = Epoch()
    entries = completions(1, 2)
    store.save([epoch.capture(entries)])
    store.save([epoch.capture(sealed=True)])
    store.save([epoch.capture()])
    assert store.load(epoch.session_id) is None
    assert store.list_entries(epoch.id) == entries
    assert list(store.sessions()) == [epoch.session_id]


def test_an_epoch_first_heard_of_when_it_had_ended_replaces_nothing(store: RuntimeStore) -> None:
    late = Epoch()
    current = Epoch(late.session_id)
    store.save([current.capture()])
    store.save([late.capture([completion(1)], sealed=True)])
    assert loaded(store, current).entries == ()
    assert store.last_seq(late.id) == 1


# --- history --------------------------------------------------------------------------------------


def test_completions_are_listed_between_two_positions(store: RuntimeStore) -> None:
    epoch, other = Epoch(), Epoch()
    entries = completions(1, 30)
    store.save([epoch.capture(entries), other.capture(completions(1, 30))])
    assert store.list_entries(epoch.id) == entries
    assert store.list_entries(epoch.id, 0, 30) == entries
    assert store.list_entries(epoch.id, 10, 12) == entries[10:12]
    assert store.list_entries(epoch.id, 10, 10) == []
    assert store.list_entries(epoch.id, 12, 10) == []
    assert store.list_entries(epoch.id, 28) == entries[28:]
    assert store.list_entries(epoch.id, 5, 30, limit=3) == entries[5:8]
    assert store.list_entries(epoch.id, 5, 30, limit=0) == []


def test_missing_completions_are_missing_from_the_list(store: RuntimeStore) -> None:
    epoch = Epoch()
    store.save([epoch.capture([*completions(1, 3), *completions(8, 9)])])
    assert [entry.seq for entry in store.list_entries(epoch.id, 1, 8)] == [2, 3, 8]


def test_history_spans_the_epochs_of_a_session(store: RuntimeStore) -> None:
    old, other = Epoch(), Epoch()
    new = Epoch(old.session_id)
    first, second = completions(1, 3), completions(1, 2)
    store.save([old.capture(first), other.capture(completions(1, 5))])
    store.save([new.capture(second)])
    assert [(item.epoch_id, item.entry) for item in store.history(old.session_id)] == [
        *((old.id, entry) for entry in first),
        *((new.id, entry) for entry in second),
    ]


def test_history_is_filtered_by_status_and_time(store: RuntimeStore) -> None:
    epoch = Epoch()
    entries = [
        completion(seq, outcome=Failed("no") if seq % 3 == 0 else None) for seq in range(1, 13)
    ]
    store.save([epoch.capture(entries)])

    def seqs(
        statuses: Sequence[OperationStatus] | None = None,
        from_ms: int | None = None,
        until_ms: int | None = None,
    ) -> list[int]:
        found = store.history(
            epoch.session_id, statuses=statuses, from_ms=from_ms, until_ms=until_ms
        )
        return [item.entry.seq for item in found]

    assert seqs([OperationStatus.FAILED]) == [3, 6, 9, 12]
    assert seqs([OperationStatus.FAILED, OperationStatus.COMPLETED]) == list(range(1, 13))
    assert seqs([OperationStatus.RETIRED]) == seqs([]) == []
    assert seqs(from_ms=T0 + 11) == [11, 12]
    assert seqs(until_ms=T0 + 3) == [1, 2]
    assert seqs(from_ms=T0 + 3, until_ms=T0 + 5) == [3, 4]
    assert seqs([OperationStatus.FAILED], from_ms=T0 + 4, until_ms=T0 + 9) == [6]


def test_a_long_history_is_whole(store: RuntimeStore) -> None:
    epoch = Epoch()
    entries = completions(1, 2500)
    store.save([epoch.capture(entries)])
    assert [item.entry for item in store.history(epoch.session_id)] == entries


def test_many_sessions_are_listed(store: RuntimeStore) -> None:
    epochs = [Epoch() for _ in range(2100)]
    store.save([epoch.capture() for epoch in epochs])
    assert list(store.sessions()) == sorted(epoch.session_id for epoch in epochs)


def test_sessions_are_summed_up_with_their_epochs(store: RuntimeStore) -> None:
    first, bare = Epoch(), Epoch()
    second = Epoch(first.session_id)
    entries = [
        completion(1, at_ms=T0 + 9),
        completion(2, at_ms=T0 - 3, outcome=Failed("no")),
        completion(3, at_ms=T0 + 5),
    ]
    store.save([first.capture(entries), bare.capture()])
    works = [spec(), spec()]
    late = completion(1, id=works[0].id)
    store.save([second.capture(operations=[running(work) for work in works], specs=works)])
    store.save([second.capture([late])])
    expected = [
        SessionOverview(
            session_id=first.session_id,
            epochs=(
                EpochOverview(
                    epoch_id=first.id,
                    sealed=True,
                    ended={OperationStatus.COMPLETED: 2, OperationStatus.FAILED: 1},
                    unfinished=0,
                    first_at_ms=T0 - 3,
                    last_at_ms=T0 + 9,
                ),
                EpochOverview(
                    epoch_id=second.id,
                    sealed=False,
                    ended={OperationStatus.COMPLETED: 1},
                    unfinished=1,
                    first_at_ms=late.completed_at_ms,
                    last_at_ms=late.completed_at_ms,
                ),
            ),
        ),
        SessionOverview(
            session_id=bare.session_id,
            epochs=(EpochOverview(epoch_id=bare.id, sealed=False, ended={}, unfinished=0),),
        ),
    ]
    assert list(store.overview()) == sorted(expected, key=lambda one: one.session_id)


# --- removal and the end --------------------------------------------------------------------------


def test_a_removed_session_is_forgotten(store: RuntimeStore) -> None:
    old, other = Epoch(), Epoch()
    new = Epoch(old.session_id)
    work = spec()
    store.save([old.capture(completions(1, 3)), other.capture(completions(1, 3))])
    store.save([new.capture(operations=[running(work)], specs=[work])])
    store.remove(old.session_id)
    store.remove(old.session_id)
    assert store.load(old.session_id) is None
    assert store.list_entries(old.id) == []
    assert list(store.history(old.session_id)) == []
    assert list(store.sessions()) == [other.session_id]
    assert len(loaded(store, other).entries) == 3
    # Its name may be used again.
    again = Epoch(old.session_id)
    store.save([again.capture()])
    assert loaded(store, again).operations == ()


def test_a_closed_store_takes_and_gives_nothing(store: RuntimeStore) -> None:
    epoch = Epoch()
    store.save([epoch.capture([completion(1)])])
    store.close()
    store.close()
    with pytest.raises(StoreWriteFailed, match="closed"):
        store.save([epoch.capture()])
    with pytest.raises(StoreWriteFailed, match="closed"):
        store.remove(epoch.session_id)
    with pytest.raises(StoreLoadFailed, match="closed") as caught:
        store.load(epoch.session_id)
    assert caught.value.session_id == epoch.session_id
    for read in (
        lambda: store.last_seq(epoch.id),
        lambda: store.list_entries(epoch.id),
        lambda: list(store.sessions()),
        lambda: list(store.history(epoch.session_id)),
        lambda: list(store.overview()),
    ):
        with pytest.raises(StoreReadFailed, match="closed"):
            read()


# --- threads --------------------------------------------------------------------------------------


def test_threads_save_and_read_side_by_side(store: RuntimeStore) -> None:
    epochs = [Epoch() for _ in range(4)]
    failures: list[BaseException] = []

    def work(epoch: Epoch) -> None:
        try:
            for seq in range(1, 41):
                store.save([epoch.capture([completion(seq)], cursors=(seq, seq, seq))])
                snapshot = store.load(epoch.session_id)
                assert snapshot is not None
                assert [entry.seq for entry in snapshot.entries] == list(range(1, seq + 1))
                assert store.last_seq(epoch.id) == seq
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(epoch,)) for epoch in epochs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert [store.last_seq(epoch.id) for epoch in epochs] == [40] * 4


# --- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [numpy.int64, numpy.uint64, numpy.uint8])
def test_numpys_integers_are_positions_limits_and_times(
    store: RuntimeStore, number: Callable[[int], Any]
) -> None:
    epoch = Epoch()
    store.save([epoch.capture([completion(seq, at_ms=seq) for seq in range(1, 6)])])
    found = store.list_entries(epoch.id, number(1), number(4), number(2))
    assert [entry.seq for entry in found] == [2, 3]
    snapshot = store.load(epoch.session_id, max_entries=number(2))
    assert snapshot is not None
    assert [entry.seq for entry in snapshot.entries] == [4, 5]
    items = store.history(epoch.session_id, from_ms=number(2), until_ms=number(4))
    assert [item.entry.seq for item in items] == [2, 3]


# --- entered again --------------------------------------------------------------------------------


class Interrupted(tuple[EpochCapture, ...]):
    """Captures; reading them is interrupted, as by a signal handler or a finalizer."""

    __slots__ = ()
    acts: ClassVar[list[Callable[[], object]]] = []

    def __iter__(self) -> Iterator[EpochCapture]:
        for capture in super().__iter__():
            while self.acts:
                self.acts.pop()()
            yield capture


@pytest.mark.parametrize("verb", ["save", "remove", "read", "close"])
def test_it_may_be_used_in_the_middle_of_a_save(store: RuntimeStore, verb: str) -> None:
    first, other, old = Epoch(), Epoch(), Epoch()
    store.save([old.capture([completion(1)])])
    act: dict[str, Callable[[], object]] = {
        "save": lambda: store.save([other.capture([completion(1)])]),
        "remove": lambda: store.remove(old.session_id),
        "read": lambda: (store.load(old.session_id), list(store.history(old.session_id))),
        "close": store.close,
    }
    Interrupted.acts.append(act[verb])
    captures = Interrupted([first.capture([completion(1)]), first.capture([completion(2)])])
    if verb == "close":
        with pytest.raises(StoreWriteFailed):
            store.save(captures)
        return
    store.save(captures)
    assert store.last_seq(first.id) == 2
    assert store.last_seq(other.id) == (1 if verb == "save" else 0)
    assert store.last_seq(old.id) == (0 if verb == "remove" else 1)
