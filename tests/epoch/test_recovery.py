"""A recovered epoch: the operations and entries that it keeps, and its next sequence."""

from __future__ import annotations

from typing import Final

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shmepoch import _native as at
from shmepoch.config import OpsLifecycleConfig
from shmepoch.epoch.completions import CompletionEntry, CompletionFeedGap
from shmepoch.epoch.cursors import EpochCursorSnapshot, EpochCursorState
from shmepoch.epoch.operations import (
    Aborted,
    Cancelled,
    Completed,
    Failed,
    OperationKind,
    OperationProgressUpdate,
    OperationStatus,
    Retired,
    Terminated,
)
from shmepoch.epoch.persisted import PersistedOpsSnapshot
from shmepoch.epoch.recovery import room_for
from shmepoch.errors import InvalidTransition, NotFound, RecordInvalid, RecoveryNeedsRoom
from shmepoch.ids import OperationId, RuntimeEpochId
from tests.epoch.conftest import MakeEpoch
from tests.epoch.deadline import UNHURRIED
from tests.epoch.implementations import Epoch
from tests.epoch.operations import PATHS, PEER, Registry, end, reach, result, spec, state, taken

CONFIG: Final = OpsLifecycleConfig(max_completed=3, max_operations=4)


def capture(epoch: Epoch) -> PersistedOpsSnapshot:
    return epoch.registry.capture_persistence_snapshot(epoch.segment.epoch_id, epoch.cursors)


def entry(seq: int, content: str = "done") -> CompletionEntry:
    id = OperationId.new()
    return CompletionEntry(
        seq=seq,
        operation_id=id,
        kind=OperationKind.BACKGROUND_TOOL_OP,
        display_name="work",
        terminal_outcome=Completed(result(id, content)),
        completed_at_ms=1,
    )


def stored(*entries: CompletionEntry, cursors: EpochCursorSnapshot) -> PersistedOpsSnapshot:
    return PersistedOpsSnapshot(epoch_id=RuntimeEpochId.new(), entries=entries, cursors=cursors)


def cursors_at(applied: int, observed: int = 0, injected: int = 0) -> EpochCursorSnapshot:
    return EpochCursorSnapshot(
        agent_applied_cursor=applied,
        runtime_observed_seq=observed,
        runtime_last_injected_seq=injected,
    )


def test_an_empty_epoch(epoch: Epoch) -> None:
    captured = capture(epoch)
    assert captured == PersistedOpsSnapshot(epoch_id=epoch.segment.epoch_id)
    assert PersistedOpsSnapshot.from_json(captured.to_json()) == captured
    recovered = Registry.from_recovered(captured)
    assert state(recovered) == state(Registry())
    recovered.check()
    assert recovered.completion_feed().list_since(end_seq(recovered) - 1).entries[0].seq == 1


def end_seq(registry: Registry) -> int:
    """The sequence that the next completion gets."""
    id = end(registry)
    (found,) = (e for e in registry.completion_feed().list_since(0).entries if e.operation_id == id)
    return found.seq


def test_everything_is_captured(epoch: Epoch) -> None:
    registry = epoch.registry
    ids = {status: reach(registry, status) for status in PATHS if status.is_terminal}
    ids |= {status: reach(registry, status) for status in PATHS if not status.is_terminal}
    registry.peer_ready(ids[OperationStatus.RUNNING], PEER)
    registry.report_progress(ids[OperationStatus.RUNNING], OperationProgressUpdate("half", 50.0))
    epoch.cursors.agent_applied_cursor.advance(2)
    epoch.cursors.runtime_observed_seq.advance(3)
    captured = capture(epoch)
    assert captured.epoch_id == epoch.segment.epoch_id
    assert {found.id: found for found in captured.operations} == {
        found.id: found for found in registry.list_operations()
    }
    assert [found.id for found in captured.operations] == list(ids.values())  # as registered
    assert [found.id for found in captured.specs] == [found.id for found in captured.operations]
    assert captured.entries == registry.completion_feed().list_since(0).entries
    assert captured.cursors == cursors_at(2, 3, 0)
    assert captured.last_seq == len(captured.entries)
    assert PersistedOpsSnapshot.from_json(captured.to_json()) == captured
    assert PersistedOpsSnapshot.from_json(captured.to_json().decode()) == captured


def test_what_a_store_has_already_is_left_out(epoch: Epoch) -> None:
    """Except live operations: no sequence shows their progress."""
    registry = epoch.registry
    live = reach(registry, OperationStatus.RUNNING)
    for _ in range(4):
        end(registry)
    everything = capture(epoch)
    for after in range(6):
        captured = registry.capture_persistence_snapshot(
            epoch.segment.epoch_id, epoch.cursors, after_seq=after
        )
        assert captured.entries == everything.entries[after:]
        ended = {entry.operation_id for entry in captured.entries}
        assert [found.id for found in captured.operations] == [
            found.id for found in everything.operations if found.id in {live, *ended}
        ]
        assert [made.id for made in captured.specs] == [found.id for found in captured.operations]


def test_the_ended_go_on_and_the_others_are_dropped(epoch: Epoch) -> None:
    registry = epoch.registry
    ids = [reach(registry, status) for status in PATHS if status.is_terminal]
    live = [reach(registry, status) for status in PATHS if not status.is_terminal]
    captured = capture(epoch)
    recovered = Registry.from_recovered(captured)
    recovered.check()
    kept = {found.id: found for found in recovered.list_operations()}
    assert kept == {id: taken(registry, id) for id in ids}
    for id in live:
        assert recovered.snapshot(id) is None
        with pytest.raises(NotFound):
            recovered.cancel_operation(id)
    assert recovered.active_count() == 0
    for id in ids:
        with pytest.raises(InvalidTransition):
            recovered.request_retire(id)
        assert recovered.register_watcher(id).wait(0) == kept[id].terminal_outcome
    assert recovered.completion_feed().list_since(0) == registry.completion_feed().list_since(0)
    assert end_seq(recovered) == captured.last_seq + 1
    assert [id for id, _ in recovered.collect_completed()][:-1] == ids


def test_recovery_may_be_repeated(epoch: Epoch) -> None:
    for status in PATHS:
        reach(epoch.registry, status)
    once = Registry.from_recovered(capture(epoch))
    captured = once.capture_persistence_snapshot(
        epoch.segment.epoch_id, EpochCursorState.from_recovered(0, 0, 0)
    )
    twice = Registry.from_recovered(PersistedOpsSnapshot.from_json(captured.to_json()))
    assert state(twice) == state(once)
    assert captured == twice.capture_persistence_snapshot(
        epoch.segment.epoch_id, EpochCursorState.new()
    )


def test_entries_are_kept_beyond_the_registry_s_retention(make_epoch: MakeEpoch) -> None:
    epoch = make_epoch(max_completed=3, max_operations=4)
    ended = [end(epoch.registry) for _ in range(10)]
    recovered = Registry.from_recovered(capture(epoch), CONFIG)
    recovered.check()
    feed = recovered.completion_feed().list_since(0)
    assert [found.operation_id for found in feed.entries] == ended
    assert [found.id for found in recovered.list_operations()] == ended[-3:]
    for _ in range(20):
        end(recovered)
        recovered.check()


def test_what_was_collected_stays_collected(epoch: Epoch) -> None:
    ended = [end(epoch.registry) for _ in range(4)]
    epoch.registry.collect_completed()
    later = end(epoch.registry)
    recovered = Registry.from_recovered(capture(epoch))
    recovered.check()
    assert [found.id for found in recovered.list_operations()] == [later]
    assert [id for id, _ in recovered.collect_completed()] == [later]
    entries = recovered.completion_feed().list_since(0).entries
    assert [found.operation_id for found in entries] == [*ended, later]


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("ahead", [0, 1, 5, 2000])
def test_the_next_sequence_is_above_every_cursor(ahead: int, which: int) -> None:
    positions = [0, 0, 0]
    positions[which] = 3 + ahead
    snapshot = stored(*(entry(seq) for seq in (1, 2, 3)), cursors=cursors_at(*positions))
    assert snapshot.last_seq == 3 + ahead
    recovered = Registry.from_recovered(snapshot)
    recovered.check()
    feed = recovered.completion_feed()
    assert feed.watermark() == 3 + ahead
    assert feed.list_since(3).entries == ()
    found = feed.list_since(0)
    assert found.entries == snapshot.entries[found.dropped_through :]
    assert end_seq(recovered) == 4 + ahead
    recovered.check()


@pytest.mark.parametrize("position", [1, 1023, 1024, 1025, 10**6, 2**40, 2**62])
def test_cursors_alone(position: int) -> None:
    recovered = Registry.from_recovered(stored(cursors=cursors_at(position)))
    recovered.check()
    feed = recovered.completion_feed()
    assert feed.watermark() == position
    assert feed.list_since(0).entries == ()
    assert feed.wait_for_advance(position - 1, 0) == position
    with pytest.raises(TimeoutError):
        feed.wait_for_advance(position, 0)
    for turn in range(1, 6):
        assert end_seq(recovered) == position + turn
        recovered.check()


def test_cursors_of_zero_are_positions() -> None:
    recovered = Registry.from_recovered(stored(entry(1), cursors=cursors_at(0, 0, 0)))
    feed = recovered.completion_feed()
    assert [found.seq for found in feed.list_since(0).entries] == [1]
    assert feed.list_since(0).gap_after(0) is None


def test_a_feed_that_had_dropped_its_oldest() -> None:
    snapshot = stored(*(entry(seq) for seq in range(8, 12)), cursors=cursors_at(9))
    recovered = Registry.from_recovered(snapshot)
    recovered.check()
    batch = recovered.completion_feed().list_since(3)
    assert batch.entries == snapshot.entries
    assert batch.gap_after(3) == CompletionFeedGap(3, 7)
    assert end_seq(recovered) == 12


def test_more_entries_than_there_is_room_for() -> None:
    config = OpsLifecycleConfig(max_completed=3, max_operations=1, feed_bytes=at.PAGE + 1024)
    snapshot = stored(*(entry(seq, "c" * 700) for seq in range(1, 30)), cursors=cursors_at(0))
    recovered = Registry.from_recovered(snapshot, config)
    recovered.check()
    batch = recovered.completion_feed().list_since(0)
    assert 3 <= len(batch.entries) < 8
    assert batch.entries == snapshot.entries[-len(batch.entries) :]
    assert batch.dropped_through == 29 - len(batch.entries)
    for _ in range(10):
        end(recovered, "r" * 500)
        recovered.check()


def test_fewer_slots_than_operations_were_stored(make_epoch: MakeEpoch) -> None:
    epoch = make_epoch(max_completed=50)
    ended = [end(epoch.registry) for _ in range(30)]
    recovered = Registry.from_recovered(capture(epoch), CONFIG)
    recovered.check()
    assert [found.id for found in recovered.list_operations()] == ended[-3:]


def test_an_operation_without_its_spec(epoch: Epoch) -> None:
    id = end(epoch.registry)
    captured = msgspec.structs.replace(capture(epoch), specs=())
    recovered = Registry.from_recovered(captured)
    recovered.check()
    assert taken(recovered, id) == taken(epoch.registry, id)


def test_entries_without_their_operations() -> None:
    snapshot = stored(*(entry(seq) for seq in range(1, 6)), cursors=cursors_at(0))
    recovered = Registry.from_recovered(snapshot)
    recovered.check()
    assert recovered.list_operations() == []
    assert recovered.collect_completed() == []
    assert recovered.completion_feed().list_since(0).entries == snapshot.entries
    again = snapshot.entries[2].operation_id
    recovered.register_operation(spec(id=again))
    recovered.cancel_operation(again)
    recovered.check()


@pytest.mark.parametrize("seqs", [(1, 1), (2, 1), (1, 2, 2), (5, 3)])
def test_entries_out_of_order_are_refused(seqs: tuple[int, ...]) -> None:
    with pytest.raises(RecordInvalid) as refused:
        Registry.from_recovered(stored(*map(entry, seqs), cursors=cursors_at(0)))
    assert "entries go from" in refused.value.reason


def test_sequences_at_the_end_of_their_range_are_refused() -> None:
    with pytest.raises(RecordInvalid, match=r"above 2\*\*63"):
        Registry.from_recovered(stored(entry(2**63 + 1), cursors=cursors_at(0)))


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("position", [2**62 + 1, 2**63, 2**63 + 1, 2**64 - 1])
def test_a_cursor_that_cannot_be_continued_from_counts_as_the_last_sequence(
    position: int, which: int, caplog: pytest.LogCaptureFixture
) -> None:
    positions = [1, 5, 2]
    positions[which] = position
    snapshot = stored(*map(entry, (1, 2, 3)), cursors=cursors_at(*positions))
    recovered = Registry.from_recovered(snapshot)
    last = 3  # that of the last completion
    positions[which] = last
    assert snapshot.recovered_cursors == cursors_at(*positions)
    assert snapshot.last_seq == max(last, *positions)
    assert str(position) in caplog.text
    assert end_seq(recovered) == snapshot.last_seq + 1
    assert recovered.check() == ()


def test_a_cursor_that_can_be_continued_from_stays(caplog: pytest.LogCaptureFixture) -> None:
    """Also above the limit, if the feed itself is that far."""
    last = 2**62 + 2000
    snapshot = stored(entry(last), cursors=cursors_at(2**62, last - 10, last))
    assert snapshot.recovered_cursors == snapshot.cursors
    assert end_seq(Registry.from_recovered(snapshot)) == last + 1
    assert not caplog.records


def test_no_store_is_given_a_cursor_that_it_cannot_be_continued_from(
    epoch: Epoch, caplog: pytest.LogCaptureFixture
) -> None:
    """It would keep that position for good, as the highest, and lose the consumer's real
    position."""
    end(epoch.registry)
    epoch.cursors.agent_applied_cursor.advance(2**64 - 1)
    epoch.cursors.runtime_observed_seq.advance(2**62)
    for _ in range(6):
        assert capture(epoch).cursors == cursors_at(1, 2**62)
    assert 1 <= len(caplog.records) <= 2, "once by each handle"
    assert str(2**64 - 1) in caplog.text


def test_cursors_beyond_the_feed_are_named(epoch: Epoch) -> None:
    end(epoch.registry)
    epoch.cursors.runtime_observed_seq.advance(1)
    assert epoch.registry.check() == ()
    epoch.cursors.runtime_observed_seq.advance(7)
    epoch.cursors.agent_applied_cursor.advance(2**64 - 1)
    agent, runtime = epoch.registry.check()
    assert (agent.cursor, agent.position, agent.watermark) == (
        "agent_applied_cursor",
        2**64 - 1,
        1,
    )
    assert (runtime.cursor, runtime.position) == ("runtime_observed_seq", 7)
    assert "runtime_observed_seq" in str(runtime)
    assert "reset" in str(runtime)


# --- rows that are not the history of one epoch -----------------------------------------------


def test_an_operation_that_ended_twice_is_refused() -> None:
    first, second = entry(1), entry(2)
    again = msgspec.structs.replace(second, operation_id=first.operation_id)
    with pytest.raises(RecordInvalid, match="ended twice") as refused:
        Registry.from_recovered(stored(first, again, cursors=cursors_at(0)))
    assert str(first.operation_id) in refused.value.reason


def test_an_entry_of_sequence_0_is_refused() -> None:
    snapshot = stored(entry(0), cursors=cursors_at(0))
    with pytest.raises(RecordInvalid, match="sequence 0"):
        Registry.from_recovered(snapshot)
    with pytest.raises(RecordInvalid, match=r"entries\[0\]\.seq"):
        PersistedOpsSnapshot.from_json(snapshot.to_json())


@pytest.mark.parametrize("field", ["operations", "specs"])
def test_an_operation_that_is_there_twice_is_refused(epoch: Epoch, field: str) -> None:
    end(epoch.registry)
    captured = capture(epoch)
    twice = msgspec.structs.replace(captured, **{field: getattr(captured, field) * 2})
    with pytest.raises(RecordInvalid, match=f"among its {field} twice"):
        Registry.from_recovered(twice)


def test_a_skipped_range_that_runs_backwards_is_refused() -> None:
    snapshot = PersistedOpsSnapshot(epoch_id=RuntimeEpochId.new(), skipped=((5, 3),))
    with pytest.raises(RecordInvalid, match="skipped"):
        Registry.from_recovered(snapshot)


CURSORS: Final = '{"agent_applied_cursor":%s,"runtime_observed_seq":0,%s}'
REST: Final = '"runtime_last_injected_seq":0'


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("{}", "agent_applied_cursor"),
        (CURSORS % (0, '"other":0'), "runtime_last_injected_seq"),
        *((CURSORS % (bad, REST), "agent_applied_cursor") for bad in (-1, 2**64, 1.0, 2**70)),
        *((CURSORS % (bad, REST), "agent_applied_cursor") for bad in ("true", "null", '"1"')),
    ],
)
def test_json_of_cursors_is_read_strictly(text: str, field: str) -> None:
    """A cursor that is missing or not valid is never read as a position."""
    with pytest.raises(RecordInvalid) as refused:
        EpochCursorSnapshot.from_json(text)
    assert refused.value.kind == "EpochCursorSnapshot"
    assert field in refused.value.reason
    whole = f'{{"epoch_id":"{RuntimeEpochId.new()}","cursors":{text}}}'
    with pytest.raises(RecordInvalid) as refused:
        PersistedOpsSnapshot.from_json(whole)
    assert refused.value.kind == "PersistedOpsSnapshot"
    assert field in refused.value.reason


def test_json_without_cursors_is_refused() -> None:
    with pytest.raises(RecordInvalid, match="cursors"):
        PersistedOpsSnapshot.from_json(f'{{"epoch_id":"{RuntimeEpochId.new()}"}}')


@pytest.mark.parametrize("position", [0, 2**63, 2**64 - 1])
def test_json_of_cursors_has_the_whole_range(position: int) -> None:
    cursors = cursors_at(position, 1, position)
    assert EpochCursorSnapshot.from_json(cursors.to_json()) == cursors


# --- room ----------------------------------------------------------------------------------------


def test_a_completion_that_is_larger_than_the_feed_makes_it_larger() -> None:
    """It is in the feed, and the later ones too."""
    small = OpsLifecycleConfig(max_completed=3, max_operations=1, feed_bytes=at.PAGE + 1024)
    snapshot = stored(entry(1), entry(2, "c" * 20_000), entry(3), cursors=cursors_at(0))
    recovered = Registry.from_recovered(snapshot, small)
    recovered.check()
    kept = recovered.completion_feed().list_since(0)
    assert kept.entries[-1].seq == 3
    alone = stored(entry(2, "c" * 20_000), cursors=cursors_at(0))
    recovered = Registry.from_recovered(alone, small)
    assert recovered.completion_feed().list_since(0).entries == alone.entries
    recovered.check()


def test_room_is_made_for_what_had_not_ended(epoch: Epoch) -> None:
    running = [reach(epoch.registry, OperationStatus.RUNNING) for _ in range(40)]
    end(epoch.registry)
    captured = capture(epoch)
    small = OpsLifecycleConfig(max_completed=2, max_operations=3, feed_bytes=at.PAGE + 3 * 1024)
    assert room_for(captured, small, unfinished=False) == small
    needed = room_for(captured, small, unfinished=True)
    assert (needed.max_operations, needed.max_completed) == (40, 2)
    recovered = Registry.with_config(needed)
    recovered.restore(captured, unfinished=True)
    assert recovered.active_count() == 40
    recovered.terminate_owner("the machine restarted")
    recovered.check()
    ended = [entry.operation_id for entry in recovered.completion_feed().list_since(1).entries]
    assert ended == running


def test_too_little_room_is_refused_before_anything_is_made(epoch: Epoch) -> None:
    for _ in range(5):
        reach(epoch.registry, OperationStatus.RUNNING)
    captured = capture(epoch)
    recovered = Registry.with_config(CONFIG)
    with pytest.raises(RecoveryNeedsRoom) as refused:
        recovered.restore(captured, unfinished=True)
    error = refused.value
    assert (error.setting, error.needed, error.given) == ("max_operations", 5, 4)
    assert "max_operations must be at least 5" in str(error)
    assert state(recovered) == state(Registry.with_config(CONFIG))
    small = OpsLifecycleConfig(max_operations=1, feed_bytes=at.PAGE + 1024)
    recovered = Registry.with_config(small)
    large = stored(entry(1, "c" * 9_000), cursors=cursors_at(0))
    with pytest.raises(RecoveryNeedsRoom) as refused:
        recovered.restore(large)
    assert refused.value.setting == "feed_bytes"
    assert refused.value.needed > 9_000
    assert recovered.completion_feed().watermark() == 0


def test_it_goes_on_as_the_same_epoch(epoch: Epoch) -> None:
    captured = capture(epoch)
    assert Registry.from_recovered(captured)._segment.epoch_id == epoch.segment.epoch_id


OUTCOMES: Final = st.one_of(
    st.builds(Completed, st.builds(result, st.builds(OperationId.new), st.text(max_size=20))),
    st.builds(Failed, st.text(max_size=20)),
    st.builds(Aborted, st.none() | st.text(max_size=20)),
    st.builds(Cancelled, st.none() | st.text(max_size=20)),
    st.just(Retired()),
    st.builds(Terminated, st.text(max_size=20)),
)
POSITIONS: Final = st.integers(0, 40) | st.integers(0, 3000)


@UNHURRIED
@given(
    seqs=st.lists(st.integers(1, 3000), unique=True, max_size=20).map(sorted),
    outcomes=st.lists(OUTCOMES, min_size=20, max_size=20),
    positions=st.tuples(POSITIONS, POSITIONS, POSITIONS),
)
def test_any_stored_feed(
    seqs: list[int], outcomes: list[Completed], positions: tuple[int, int, int]
) -> None:
    """Also with holes: a sequence that no completion has is not a gap. As many entries as fit are
    kept."""
    entries = [
        msgspec.structs.replace(entry(seq), terminal_outcome=outcome)
        for seq, outcome in zip(seqs, outcomes, strict=False)
    ]
    snapshot = stored(*entries, cursors=cursors_at(*positions))
    assert PersistedOpsSnapshot.from_json(snapshot.to_json()) == snapshot
    recovered = Registry.from_recovered(snapshot, CONFIG)
    recovered.check()
    capacity = recovered._segment.layout.entries
    batch = recovered.completion_feed().list_since(0)
    last = max([*seqs, *positions, 0])
    assert batch.watermark == last
    assert batch.entries == tuple(found for found in entries if found.seq > last - capacity)
    if batch.entries:
        assert batch.dropped_through == batch.entries[0].seq - 1
    assert end_seq(recovered) == last + 1
    recovered.check()
