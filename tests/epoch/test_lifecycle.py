"""The lifecycle of an operation: the effect of each verb, and none of a refused one."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from itertools import permutations
from typing import Final

import pytest

from shmepoch.epoch.completions import CompletionEntry
from shmepoch.epoch.operations import (
    TRANSITIONS,
    Aborted,
    Action,
    Cancelled,
    Completed,
    Failed,
    OperationKind,
    OperationLifecycleSnapshot,
    OperationPeerHandle,
    OperationProgressUpdate,
    OperationSpec,
    OperationStatus,
    OperationTerminalOutcome,
    Retired,
    Terminated,
)
from shmepoch.errors import (
    AlreadyPeerReady,
    EpochSealed,
    InvalidTransition,
    NotFound,
    PeerNotExpected,
    WriterBusy,
)
from shmepoch.ids import OperationId, SessionId
from tests.epoch.conftest import MakeEpoch
from tests.epoch.deadline import DEADLINE_S
from tests.epoch.implementations import Epoch, shared
from tests.epoch.operations import (
    CHILD,
    PATHS,
    PEER,
    UPDATE,
    VERBS,
    Registry,
    end,
    reach,
    result,
    spec,
    state,
    taken,
)
from tests.support import held_writer

#: The table of semantics.md again: the statuses in which each verb is allowed.
ALLOWED: Final[dict[Action, set[str]]] = {
    Action.PROVISIONING_SUCCEEDED: {"provisioning"},
    Action.PROVISIONING_FAILED: {"provisioning"},
    Action.ABORT_PROVISIONING: {"provisioning"},
    Action.PEER_READY: {"running", "retiring"},
    Action.REPORT_PROGRESS: {"running", "retiring"},
    Action.COMPLETE_OPERATION: {"running", "retiring"},
    Action.FAIL_OPERATION: {"provisioning", "running", "retiring"},
    Action.CANCEL_OPERATION: {"provisioning", "running", "retiring"},
    Action.REQUEST_RETIRE: {"running"},
    Action.MARK_RETIRED: {"running", "retiring"},
    Action.TERMINATE_OWNER: {"provisioning", "running", "retiring"},
}

OUTCOMES: Final[dict[Action, tuple[OperationStatus, OperationTerminalOutcome | None]]] = {
    Action.PROVISIONING_FAILED: (OperationStatus.FAILED, Failed("no room")),
    Action.ABORT_PROVISIONING: (OperationStatus.ABORTED, Aborted("not needed")),
    Action.COMPLETE_OPERATION: (OperationStatus.COMPLETED, None),
    Action.FAIL_OPERATION: (OperationStatus.FAILED, Failed("broke")),
    Action.CANCEL_OPERATION: (OperationStatus.CANCELLED, Cancelled("unwanted")),
    Action.MARK_RETIRED: (OperationStatus.RETIRED, Retired()),
    Action.TERMINATE_OWNER: (OperationStatus.TERMINATED, Terminated("owner ended")),
}

#: The actions that do not end an operation, and their target status.
STEPS: Final[dict[Action, OperationStatus | None]] = {
    Action.PROVISIONING_SUCCEEDED: OperationStatus.RUNNING,
    Action.PEER_READY: None,
    Action.REPORT_PROGRESS: None,
    Action.REQUEST_RETIRE: OperationStatus.RETIRING,
}

EVERY_CASE = [(action, status) for action in Action for status in PATHS]


def test_the_table_is_that_of_the_semantics() -> None:
    assert {action: set(allowed) for action, (allowed, _) in TRANSITIONS.items()} == ALLOWED
    targets = {action: target for action, (_, target) in TRANSITIONS.items()}
    assert targets == STEPS | {action: status for action, (status, _) in OUTCOMES.items()}


@pytest.mark.parametrize(("action", "status"), EVERY_CASE)
def test_every_action_in_every_status(
    registry: Registry, action: Action, status: OperationStatus
) -> None:
    id = reach(registry, status)
    before = state(registry)
    if status not in ALLOWED[action]:
        if action is Action.TERMINATE_OWNER:  # it ends all that have not ended: none
            VERBS[action](registry, id)
        else:
            with pytest.raises(InvalidTransition) as refused:
                VERBS[action](registry, id)
            error = refused.value
            assert (error.id, error.status, error.action) == (id, status, action)
            assert str(error) == f"operation {id} is {status}, which does not allow {action}"
        assert state(registry) == before
        return
    VERBS[action](registry, id)
    after = taken(registry, id)
    batch = registry.completion_feed().list_since(0)
    if action in STEPS:
        assert after.status == (STEPS[action] or status)
        assert after.terminal_outcome is None
        assert batch == before[1]
        return
    ended, outcome = OUTCOMES[action]
    assert after.status == ended
    assert after.terminal_outcome == (outcome or Completed(result(id)))
    assert batch.watermark == 1
    assert [(entry.seq, entry.operation_id) for entry in batch.entries] == [(1, id)]


@pytest.mark.parametrize("action", [a for a in Action if a is not Action.TERMINATE_OWNER])
def test_an_unknown_operation(registry: Registry, action: Action) -> None:
    id, before = OperationId.new(), state(registry)
    with pytest.raises(NotFound) as refused:
        VERBS[action](registry, id)
    assert refused.value.id == id
    assert str(id) in str(refused.value)
    assert isinstance(refused.value, LookupError)
    assert state(registry) == before


@pytest.mark.parametrize("action", Action)
def test_a_sealed_epoch(epoch: Epoch, action: Action) -> None:
    id = reach(epoch.registry, OperationStatus.RUNNING)
    before = state(epoch.registry)
    epoch.seal()
    with pytest.raises(EpochSealed) as refused:
        VERBS[action](epoch.registry, id)
    assert refused.value.epoch_id == epoch.segment.epoch_id
    with pytest.raises(EpochSealed):
        epoch.registry.register_operation(spec())
    with pytest.raises(EpochSealed):
        epoch.registry.collect_completed()
    with pytest.raises(EpochSealed):
        epoch.registry.register_watcher(id)
    assert state(epoch.registry) == before


def test_a_new_operation(registry: Registry) -> None:
    asked = OperationSpec(
        id=OperationId.new(),
        kind=CHILD,
        display_name="search",
        source_label="test",
        child_session_id=SessionId.new(),
        expect_peer_channel=True,
    )
    before = time.time_ns() // 1_000_000
    registry.register_operation(asked)
    snapshot = taken(registry, asked.id)
    assert before <= snapshot.created_at_ms <= time.time_ns() // 1_000_000
    assert snapshot == OperationLifecycleSnapshot(
        id=asked.id,
        kind=CHILD,
        display_name="search",
        status=OperationStatus.PROVISIONING,
        child_session_id=asked.child_session_id,
        created_at_ms=snapshot.created_at_ms,
    )


def test_an_entry_says_what_ended(registry: Registry) -> None:
    id = OperationId.new()
    registry.register_operation(spec("fetch", id=id))
    registry.provisioning_succeeded(id)
    registry.complete_operation(id, result(id, "42"))
    (entry,) = registry.completion_feed().list_since(0).entries
    assert entry == CompletionEntry(
        seq=1,
        operation_id=id,
        kind=OperationKind.BACKGROUND_TOOL_OP,
        display_name="fetch",
        terminal_outcome=Completed(result(id, "42")),
        completed_at_ms=taken(registry, id).completed_at_ms or -1,
    )


@pytest.mark.parametrize("verb", ["abort_provisioning", "cancel_operation"])
def test_a_reason_may_be_left_out(registry: Registry, verb: str) -> None:
    id = reach(registry, OperationStatus.PROVISIONING)
    getattr(registry, verb)(id)
    outcome = taken(registry, id).terminal_outcome
    assert isinstance(outcome, Aborted | Cancelled)
    assert outcome.reason is None


def test_a_peer_is_handed_over_once(registry: Registry) -> None:
    id = reach(registry, OperationStatus.RUNNING)
    assert not taken(registry, id).peer_ready
    registry.peer_ready(id, PEER)
    assert taken(registry, id).peer_ready
    assert taken(registry, id).peer_handle == PEER
    before = state(registry)
    with pytest.raises(AlreadyPeerReady) as refused:
        registry.peer_ready(id, OperationPeerHandle("other", PEER.trusted_peer))
    assert refused.value.id == id
    assert state(registry) == before


@pytest.mark.parametrize("status", PATHS)
def test_a_tool_has_no_peer_whatever_its_status(
    registry: Registry, status: OperationStatus
) -> None:
    id = OperationId.new()
    registry.register_operation(spec(id=id))
    for action in PATHS[status]:
        VERBS[action](registry, id)
    before = state(registry)
    with pytest.raises(PeerNotExpected) as refused:
        registry.peer_ready(id, PEER)
    assert refused.value.id == id
    assert "mob_member_child" in str(refused.value)
    assert state(registry) == before


def test_a_peer_that_was_handed_over_outlives_the_operation(registry: Registry) -> None:
    id = reach(registry, OperationStatus.RUNNING)
    registry.peer_ready(id, PEER)
    registry.mark_retired(id)
    assert taken(registry, id).peer_handle == PEER
    with pytest.raises(InvalidTransition):
        registry.peer_ready(id, PEER)


def test_progress_is_counted_and_the_last_is_kept(registry: Registry) -> None:
    id = reach(registry, OperationStatus.RUNNING)
    for count in range(1, 6):
        update = OperationProgressUpdate(f"step {count}", 20.0 * count)
        registry.report_progress(id, update)
        assert taken(registry, id).progress_count == count
        assert taken(registry, id).last_progress == update
    registry.request_retire(id)
    registry.report_progress(id, OperationProgressUpdate("winding down"))
    registry.peer_ready(id, PEER)
    registry.mark_retired(id)
    after = taken(registry, id)
    assert (after.progress_count, after.peer_ready) == (6, True)
    assert after.last_progress == OperationProgressUpdate("winding down")


def test_an_owner_ends_with_everything_it_ran(registry: Registry) -> None:
    statuses = list(PATHS)
    ids = [reach(registry, status) for status in statuses if status.is_terminal]
    ended = registry.completion_feed().watermark()
    live = [
        reach(registry, status) for status in statuses * 2 if not status.is_terminal
    ]  # in the order of registration, not of name or status
    registry.terminate_owner("owner ended")
    batch = registry.completion_feed().list_since(ended)
    assert [entry.operation_id for entry in batch.entries] == live
    assert [entry.seq for entry in batch.entries] == list(range(ended + 1, ended + 1 + len(live)))
    assert {entry.terminal_outcome for entry in batch.entries} == {Terminated("owner ended")}
    assert all(taken(registry, id).status is OperationStatus.TERMINATED for id in live)
    assert all(taken(registry, id).status is not OperationStatus.RUNNING for id in ids)
    assert registry.active_count() == 0
    registry.terminate_owner("again")
    assert registry.completion_feed().list_since(ended) == batch


def test_an_epoch_ends_with_everything_that_ran_in_it(epoch: Epoch) -> None:
    registry = epoch.registry
    live = [reach(registry, status) for status in PATHS if not status.is_terminal]
    ended = registry.completion_feed().watermark()
    registry.terminate_and_seal("over")
    entries = registry.completion_feed().list_since(ended).entries
    assert [entry.operation_id for entry in entries] == live
    assert {entry.terminal_outcome for entry in entries} == {Terminated("over")}
    assert epoch.segment.sealed
    for change in (registry.terminate_and_seal, registry.terminate_owner):
        with pytest.raises(EpochSealed):
            change("again")


def test_who_waits_hears_of_the_end_of_an_epoch_in_which_nothing_ran(epoch: Epoch) -> None:
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(epoch.registry.completion_feed().wait_for_advance, 0, DEADLINE_S)
        epoch.registry.terminate_and_seal("over")
        with pytest.raises(EpochSealed):
            waiting.result()


def test_who_does_not_wait_is_told_that_a_transition_is_in_progress(namespace: str) -> None:
    with shared(namespace, None) as epoch:
        registry, id = epoch.registry, OperationId.new()
        registry.register_operation(spec(id=id))
        with held_writer(epoch.shared_segment()), pytest.raises(WriterBusy):
            registry.terminate_where(lambda _: True, "gone")
        assert taken(registry, id).status is OperationStatus.PROVISIONING
        assert registry.terminate_where(lambda _: True, "gone") == 1


def test_operations_are_listed_by_display_name(registry: Registry) -> None:
    names = ["delta", "alpha", "", "charlie", "bravo", "alpha", "Ωmega"]
    for name in names:
        registry.register_operation(spec(name))
    assert [found.display_name for found in registry.list_operations()] == sorted(names)


def test_an_operation_nobody_registered_has_no_snapshot(registry: Registry) -> None:
    assert registry.snapshot(OperationId.new()) is None


HOUR: Final = 3_600_000
CENTURY: Final = 100 * 365 * 24 * HOUR


class Clock:
    """A wall clock that a test sets, in milliseconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_ms = 1_000_000
        monkeypatch.setattr(time, "time_ns", lambda: self.now_ms * 1_000_000)


@pytest.mark.parametrize(
    ("created", "started", "completed"),
    [
        *permutations((1, 5, 9)),
        *permutations((0, HOUR, CENTURY)),
        *permutations((HOUR, CENTURY, 2**63 - 1)),
    ],
)
def test_times_never_go_back_with_the_wall_clock(
    registry: Registry,
    monkeypatch: pytest.MonkeyPatch,
    created: int,
    started: int,
    completed: int,
) -> None:
    clock, id = Clock(monkeypatch), OperationId.new()
    clock.now_ms = created
    registry.register_operation(spec(id=id))
    clock.now_ms = started
    registry.provisioning_succeeded(id)
    clock.now_ms = completed
    registry.complete_operation(id, result(id))
    after = taken(registry, id)
    assert after.created_at_ms == created
    assert after.started_at_ms == max(created, started)
    assert after.completed_at_ms == max(created, started, completed)
    assert after.elapsed_ms is not None
    assert after.elapsed_ms >= 0  # monotonic: the wall clock has no part in it


@pytest.mark.parametrize("now_ms", [-1, -CENTURY, -(2**63), 2**63, 2**70])
def test_a_clock_that_shows_no_time_of_ours(
    make_epoch: MakeEpoch, monkeypatch: pytest.MonkeyPatch, now_ms: int
) -> None:
    """Before 1970, or beyond the range of a store: it counts as the nearest valid time."""
    clock, id = Clock(monkeypatch), OperationId.new()
    clock.now_ms = now_ms
    registry = make_epoch().registry
    registry.register_operation(spec(id=id))
    registry.provisioning_succeeded(id)
    registry.report_progress(id, UPDATE)
    registry.complete_operation(id, result(id))
    live = [OperationId.new(), OperationId.new()]
    registry.register_operations([spec(id=id) for id in live])
    registry.start_operations(live)
    registry.complete_operations([result(id) for id in live])
    nearest = min(max(now_ms, 0), 2**63 - 1)
    for each in registry.list_operations():
        assert (each.created_at_ms, each.started_at_ms) == (nearest, nearest)
        assert each.completed_at_ms == nearest
    clock.now_ms = HOUR
    end(registry)
    registry.check()


def test_the_end_of_what_never_started_is_not_before_its_creation(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, id = Clock(monkeypatch), OperationId.new()
    registry.register_operation(spec(id=id))
    clock.now_ms -= 500
    registry.provisioning_failed(id, "no room")
    after = taken(registry, id)
    assert (after.started_at_ms, after.completed_at_ms) == (None, after.created_at_ms)
