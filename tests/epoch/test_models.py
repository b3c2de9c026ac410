"""Random histories of a registry and of cursors, against models of plain Python."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Final, NamedTuple

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from shmepoch import _native as at
from shmepoch.config import OpsLifecycleConfig
from shmepoch.epoch.cursors import CursorCell, EpochCursorSnapshot
from shmepoch.epoch.operations import (
    Action,
    OperationKind,
    OperationProgressUpdate,
    OperationStatus,
    OperationTerminalOutcome,
    Terminated,
)
from shmepoch.epoch.waits import OperationCompletionWatch
from shmepoch.errors import (
    AlreadyPeerReady,
    AlreadyRegistered,
    EpochSealed,
    InvalidTransition,
    MaxConcurrentExceeded,
    NotFound,
    PeerNotExpected,
    ShmepochError,
)
from shmepoch.ids import OperationId
from tests.epoch.deadline import UNHURRIED
from tests.epoch.implementations import IMPLEMENTATIONS, Epoch
from tests.epoch.operations import PEER, Registry, size_of, spec
from tests.epoch.operations import result as result_of

CONFIG: Final = OpsLifecycleConfig(
    max_operations=5, max_completed=3, max_concurrent=4, feed_bytes=at.PAGE + 5 * 1024
)
IDS: Final = [OperationId.from_bytes(bytes([i]) * 16) for i in range(1, 9)]

SEVERAL: Final = st.lists(st.sampled_from(IDS), max_size=4)

LIVE: Final = {"provisioning", "running", "retiring"}
#: For each verb: the statuses that allow it, and the one it leads to (None: it stays).
MOVES: Final[dict[Action, tuple[set[str], str | None]]] = {
    Action.PROVISIONING_SUCCEEDED: ({"provisioning"}, "running"),
    Action.PROVISIONING_FAILED: ({"provisioning"}, "failed"),
    Action.ABORT_PROVISIONING: ({"provisioning"}, "aborted"),
    Action.PEER_READY: ({"running", "retiring"}, None),
    Action.REPORT_PROGRESS: ({"running", "retiring"}, None),
    Action.COMPLETE_OPERATION: ({"running", "retiring"}, "completed"),
    Action.FAIL_OPERATION: (LIVE, "failed"),
    Action.CANCEL_OPERATION: (LIVE, "cancelled"),
    Action.REQUEST_RETIRE: ({"running"}, "retiring"),
    Action.MARK_RETIRED: ({"running", "retiring"}, "retired"),
}


@dataclass(frozen=True)
class Operation:
    """The model's facts of one registration."""

    id: OperationId
    kind: OperationKind
    status: str = "provisioning"
    progress: tuple[OperationProgressUpdate, ...] = ()
    has_peer: bool = False
    watchers: int = 0
    seq: int = 0


class Ended(NamedTuple):
    """One entry of the model's feed, and the room that it takes."""

    id: OperationId
    outcome: OperationTerminalOutcome
    size: int


@dataclass
class Model:
    """Dictionaries and lists that behave like a registry."""

    registrations: dict[OperationId, Operation] = field(default_factory=dict)
    feed: list[Ended] = field(default_factory=list)
    dropped: int = 0
    collected: int = 0

    @property
    def floor(self) -> int:
        return max(self.dropped, self.collected, len(self.feed) - CONFIG.max_completed)

    def held(self) -> dict[OperationId, Operation]:
        return {
            id: operation
            for id, operation in self.registrations.items()
            if operation.status in LIVE or operation.seq > self.floor
        }

    def live(self) -> list[Operation]:
        return [found for found in self.registrations.values() if found.status in LIVE]

    def refusal(self, id: OperationId, action: Action) -> type[ShmepochError] | None:
        operation = self.held().get(id)
        if operation is None:
            return NotFound
        if action is Action.PEER_READY and operation.kind is OperationKind.BACKGROUND_TOOL_OP:
            return PeerNotExpected
        if operation.status not in MOVES[action][0]:
            return InvalidTransition
        if action is Action.PEER_READY and operation.has_peer:
            return AlreadyPeerReady
        return None

    def move(self, id: OperationId, action: Action, update: OperationProgressUpdate) -> None:
        found = self.registrations[id]
        self.registrations[id] = replace(
            found,
            status=MOVES[action][1] or found.status,
            progress=(*found.progress, update)
            if action is Action.REPORT_PROGRESS
            else found.progress,
            has_peer=found.has_peer or action is Action.PEER_READY,
        )

    def drop(self) -> None:
        """Drop entries by bytes: this feed keeps the newest that fit together."""
        while sum(ended.size for ended in self.feed[self.dropped :]) > CONFIG.feed_bytes:
            self.dropped += 1


class RegistryMachine(RuleBasedStateMachine):
    """Every verb in any order, on a small epoch whose slots and ring are reused all the time."""

    implementation: str
    namespace: str

    def __init__(self) -> None:
        super().__init__()
        self.exit = ExitStack()
        self.model = Model()
        self.watches: list[tuple[OperationId, OperationCompletionWatch, int]] = []
        #: Whether an operation has ever been watched.
        self.watched = False

    @initialize()
    def open(self) -> None:
        self.epoch: Epoch = self.exit.enter_context(
            IMPLEMENTATIONS[self.implementation](self.namespace, CONFIG)
        )
        self.registry: Registry = self.epoch.registry

    def teardown(self) -> None:
        with self.exit:
            self.registry.check()

    @rule(id=st.sampled_from(IDS), kind=st.sampled_from(OperationKind))
    def register(self, id: OperationId, kind: OperationKind) -> None:
        if id in self.model.held():
            with pytest.raises(AlreadyRegistered):
                self.registry.register_operation(spec(str(id), kind=kind, id=id))
        elif len(self.model.live()) >= 4:
            with pytest.raises(MaxConcurrentExceeded):
                self.registry.register_operation(spec(str(id), kind=kind, id=id))
        else:
            self.registry.register_operation(spec(str(id), kind=kind, id=id))
            self.model.registrations.pop(id, None)  # so that the order stays that of registration
            self.model.registrations[id] = Operation(id, kind)

    @rule(ids=SEVERAL)
    def register_together(self, ids: list[OperationId]) -> None:
        specs = [spec(str(id), id=id) for id in ids]
        if len(set(ids)) < len(ids) or set(ids) & set(self.model.held()):
            with pytest.raises(AlreadyRegistered):
                self.registry.register_operations(specs)
        elif len(self.model.live()) + len(ids) > 4:
            with pytest.raises(MaxConcurrentExceeded):
                self.registry.register_operations(specs)
        else:
            self.registry.register_operations(specs)
            for id in ids:
                self.model.registrations.pop(id, None)
                self.model.registrations[id] = Operation(id, OperationKind.BACKGROUND_TOOL_OP)

    @rule(ids=SEVERAL, ends=st.booleans(), size=st.sampled_from([0, 7, 1500]))
    def move_together(self, ids: list[OperationId], ends: bool, size: int) -> None:
        action = Action.COMPLETE_OPERATION if ends else Action.PROVISIONING_SUCCEEDED
        refusals = [refusal for id in ids if (refusal := self.model.refusal(id, action))]
        if len(set(ids)) < len(ids):
            refusals.append(InvalidTransition)

        def act() -> None:
            if ends:
                self.registry.complete_operations([result_of(id, "x" * size) for id in ids])
            else:
                self.registry.start_operations(ids)

        if refusals:
            with pytest.raises(tuple(refusals)):
                act()
            return
        act()
        for id in ids:
            self.model.move(id, action, OperationProgressUpdate("none"))
        if ends:
            self.record(ids)

    @rule(
        id=st.sampled_from(IDS),
        action=st.sampled_from(list(MOVES)),
        size=st.sampled_from([0, 1, 7, 100, 1500, 4000]),
    )
    def move(self, id: OperationId, action: Action, size: int) -> None:
        update = OperationProgressUpdate("p" * min(size, 100), float(min(size, 100)))
        refusal = self.model.refusal(id, action)
        if refusal is not None:
            with pytest.raises(refusal):
                self.ask(id, action, size, update)
            return
        self.ask(id, action, size, update)
        self.model.move(id, action, update)
        if self.model.registrations[id].status not in LIVE:
            self.record([id])

    def ask(
        self, id: OperationId, action: Action, size: int, update: OperationProgressUpdate
    ) -> None:
        registry, text = self.registry, "x" * size
        match action:
            case Action.PEER_READY:
                registry.peer_ready(id, PEER)
            case Action.REPORT_PROGRESS:
                registry.report_progress(id, update)
            case Action.COMPLETE_OPERATION:
                registry.complete_operation(id, result_of(id, text))
            case Action.PROVISIONING_FAILED:
                registry.provisioning_failed(id, text)
            case Action.ABORT_PROVISIONING:
                registry.abort_provisioning(id, text)
            case Action.FAIL_OPERATION:
                registry.fail_operation(id, text)
            case Action.CANCEL_OPERATION:
                registry.cancel_operation(id, text)
            case Action.MARK_RETIRED:
                registry.mark_retired(id)
            case Action.REQUEST_RETIRE:
                registry.request_retire(id)
            case Action.PROVISIONING_SUCCEEDED:
                registry.provisioning_succeeded(id)

    def record(self, ids: list[OperationId]) -> None:
        """Append the operations that have just ended to the model's feed."""
        before = len(self.model.feed)
        batch = self.registry.completion_feed().list_since(before)
        assert [entry.operation_id for entry in batch.entries] == ids
        for entry in batch.entries:
            status = self.model.registrations[entry.operation_id].status
            assert entry.terminal_outcome.__struct_config__.tag == status
            size = size_of(self.registry, entry.seq)
            self.model.feed.append(Ended(entry.operation_id, entry.terminal_outcome, size))
            self.model.registrations[entry.operation_id] = replace(
                self.model.registrations[entry.operation_id], seq=len(self.model.feed), watchers=0
            )
        self.model.drop()

    @rule(reason=st.sampled_from(["", "ended", "e" * 500]))
    def terminate_owner(self, reason: str) -> None:
        self.registry.terminate_owner(reason)
        live = [operation.id for operation in self.model.live()]
        for id in live:
            self.model.registrations[id] = replace(
                self.model.registrations[id], status="terminated"
            )
        before = len(self.model.feed)
        self.record(live)
        assert {ended.outcome for ended in self.model.feed[before:]} <= {Terminated(reason)}

    @rule()
    def collect(self) -> None:
        assert self.registry.collect_completed() == [
            (ended.id, ended.outcome) for ended in self.model.feed[self.model.floor :]
        ]
        self.model.collected = len(self.model.feed)

    @rule(id=st.sampled_from(IDS))
    def watch(self, id: OperationId) -> None:
        operation = self.model.held().get(id)
        if operation is None:
            with pytest.raises(NotFound):
                self.registry.register_watcher(id)
            return
        watch = self.registry.register_watcher(id)
        if operation.status in LIVE:
            self.model.registrations[id] = replace(operation, watchers=operation.watchers + 1)
            self.watches.append((id, watch, len(self.model.feed)))
            self.watched = True
        else:
            assert watch.wait(0) == self.model.feed[operation.seq - 1].outcome

    @precondition(lambda self: self.watches)
    @rule(data=st.data())
    def look_at_a_watch(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.watches) - 1))
        id, watch, since = self.watches[index]
        seq = next(
            (
                seq
                for seq in range(since + 1, len(self.model.feed) + 1)
                if self.model.feed[seq - 1].id == id
            ),
            None,
        )
        if seq is None:
            with pytest.raises(TimeoutError):
                watch.wait(0)
        elif seq > self.model.dropped:
            assert watch.wait(0) == self.model.feed[seq - 1].outcome
            del self.watches[index]

    @precondition(lambda self: self.watches)
    @rule(data=st.data())
    def close_a_watch(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.watches) - 1))
        id, watch, since = self.watches.pop(index)
        watch.close()
        if id not in [ended.id for ended in self.model.feed[since:]]:
            found = self.model.registrations[id]
            self.model.registrations[id] = replace(found, watchers=found.watchers - 1)

    @rule()
    def check(self) -> None:
        self.registry.check()

    @invariant()
    def operations_agree(self) -> None:
        if not hasattr(self, "registry"):
            return
        expected = self.model.held()
        listed = {found.id: found for found in self.registry.list_operations()}
        assert set(listed) == set(expected)
        for id, operation in expected.items():
            found = listed[id]
            assert found == self.registry.snapshot(id)
            assert found.status == OperationStatus(operation.status)
            assert found.kind == operation.kind
            assert found.progress_count == len(operation.progress)
            assert found.last_progress == (operation.progress or (None,))[-1]
            assert found.peer_ready == operation.has_peer
            assert found.watcher_count == operation.watchers
            ended = operation.seq and self.model.feed[operation.seq - 1].outcome
            assert found.terminal_outcome == (ended or None)
        assert self.registry.active_count() == len(self.model.live())

    @invariant()
    def feeds_agree(self) -> None:
        if not hasattr(self, "registry"):
            return
        batch = self.registry.completion_feed().list_since(0)
        assert batch.watermark == len(self.model.feed)
        if self.watched:  # kept records are passed over, so more entries are dropped
            assert batch.dropped_through >= self.model.dropped
            self.model.dropped = batch.dropped_through
        assert batch.dropped_through == self.model.dropped
        kept = self.model.feed[self.model.dropped :]
        assert [entry.seq for entry in batch.entries] == list(
            range(self.model.dropped + 1, len(self.model.feed) + 1)
        )
        assert [(entry.operation_id, entry.terminal_outcome) for entry in batch.entries] == [
            (ended.id, ended.outcome) for ended in kept
        ]


NAMES: Final = ("agent_applied_cursor", "runtime_observed_seq", "runtime_last_injected_seq")
WORDS: Final = st.one_of(
    st.integers(0, 20), st.integers(0, 2**64 - 1), st.sampled_from([2**63, 2**64 - 2, 2**64 - 1])
)


class CursorMachine(RuleBasedStateMachine):
    """Advances and swaps of three cursors, in any order, until the epoch is sealed."""

    implementation: str
    namespace: str

    def __init__(self) -> None:
        super().__init__()
        self.exit = ExitStack()
        self.positions = dict.fromkeys(NAMES, 0)
        self.sealed = False

    @initialize()
    def open(self) -> None:
        self.epoch = self.exit.enter_context(
            IMPLEMENTATIONS[self.implementation](self.namespace, None)
        )

    def teardown(self) -> None:
        with self.exit:
            self.epoch.registry.check()

    def cell(self, name: str) -> CursorCell:
        found: CursorCell = getattr(self.epoch.cursors, name)
        return found

    @rule(name=st.sampled_from(NAMES), value=WORDS)
    def advance(self, name: str, value: int) -> None:
        if self.sealed:
            with pytest.raises(EpochSealed):
                self.cell(name).advance(value)
            return
        assert self.cell(name).advance(value) is (value > self.positions[name])
        self.positions[name] = max(value, self.positions[name])

    @rule(name=st.sampled_from(NAMES), new=WORDS, data=st.data())
    def swap(self, name: str, new: int, data: st.DataObject) -> None:
        expected = data.draw(st.one_of(st.just(self.positions[name]), WORDS))
        if new < expected:
            with pytest.raises(ValueError, match="back from"):
                self.cell(name).compare_and_swap(expected, new)
        elif self.sealed:
            with pytest.raises(EpochSealed):
                self.cell(name).compare_and_swap(expected, new)
        else:
            swapped = expected == self.positions[name]
            assert self.cell(name).compare_and_swap(expected, new) is swapped
            if swapped:
                self.positions[name] = new

    @precondition(lambda self: not self.sealed)
    @rule(likely=st.integers(0, 9))
    def seal(self, likely: int) -> None:
        if likely == 0:
            self.epoch.seal()
            self.sealed = True

    @invariant()
    def positions_agree(self) -> None:
        if not hasattr(self, "epoch"):
            return
        assert self.epoch.cursors.snapshot() == EpochCursorSnapshot(**self.positions)
        assert self.epoch.cursors.values.tolist() == list(self.positions.values())
        assert [self.cell(name).load() for name in NAMES] == list(self.positions.values())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("machine", [RegistryMachine, CursorMachine])
def test_histories(
    machine: type[RegistryMachine | CursorMachine], implementation: str, namespace: str
) -> None:
    """Any number of histories: `--hypothesis-seed` and profiles choose them."""
    machine.implementation, machine.namespace = implementation, namespace
    run_state_machine_as_test(
        machine, settings=settings(UNHURRIED, max_examples=50, stateful_step_count=50)
    )
