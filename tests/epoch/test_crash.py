"""A process may be killed before any store of any transition: the old state stands, or the new."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain, count
from typing import Any, NamedTuple, TypeAlias

import pytest

from shmepoch.epoch.cursors import EpochCursorState
from shmepoch.epoch.operations import (
    OperationPeerHandle,
    OperationProgressUpdate,
    OperationStatus,
    OperationTerminalOutcome,
    TrustedPeerSpec,
)
from shmepoch.errors import AlreadyPeerReady, AlreadyRegistered, InvalidTransition
from shmepoch.ids import OperationId, RunId, RuntimeEpochId, SessionId
from shmepoch.memory import layout as at
from shmepoch.memory._native import Memory
from shmepoch.memory.layout import OpsLifecycleConfig
from shmepoch.memory.participants import Role
from shmepoch.memory.segment import SharedSegment
from tests.epoch.deadline import DEADLINE_S, run
from tests.epoch.dying import Death, attached, start, survived
from tests.epoch.operations import CHILD, UPDATE, Registry, end, result, spec
from tests.epoch.stepping import Stepped, images
from tests.support import eventually

CONFIG = OpsLifecycleConfig(max_operations=6, max_completed=3, feed_bytes=at.PAGE + 8 * 1024)

#: The operation that the survivor registers, and that no state that is compared includes.
NEXT = "next"

IDS = [OperationId.from_bytes(bytes([i]) * 16) for i in range(1, 7)]


class Operation(NamedTuple):
    """What of an operation does not depend on when something happened."""

    id: OperationId
    status: OperationStatus
    outcome: OperationTerminalOutcome | None
    progress_count: int
    peer_ready: bool
    started: bool
    watchers: int


class State(NamedTuple):
    """An epoch as its readers see it, apart from times and from `NEXT`."""

    operations: frozenset[Operation]
    entries: tuple[tuple[OperationId, OperationTerminalOutcome], ...]

    @classmethod
    def of(cls, registry: Registry) -> State:
        batch = registry.completion_feed().list_since(0)
        seqs = [entry.seq for entry in batch.entries]
        assert seqs == list(range(batch.dropped_through + 1, batch.watermark + 1))
        return cls(
            frozenset(
                Operation(
                    found.id,
                    found.status,
                    found.terminal_outcome,
                    found.progress_count,
                    found.peer_ready,
                    found.started_at_ms is not None,
                    found.watcher_count,
                )
                for found in registry.list_operations()
                if found.display_name != NEXT
            ),
            tuple(
                (entry.operation_id, entry.terminal_outcome)
                for entry in batch.entries
                if entry.display_name != NEXT
            ),
        )

    def without_oldest(self, kept: int) -> State:
        """The same after retention has dropped all but the newest entries."""
        dropped = {id for id, _ in self.entries[: len(self.entries) - kept]}
        return State(
            frozenset(found for found in self.operations if found.id not in dropped),
            self.entries[len(self.entries) - kept :],
        )


@dataclass(frozen=True)
class Case:
    """A transition, the state it starts from, and what doing it again raises, if it does."""

    prepare: Callable[[Registry], None]
    act: Callable[[Registry], object]
    again: type[Exception] | None = None


def provisioning(registry: Registry, *ids: OperationId) -> None:
    for id in ids:
        registry.register_operation(spec("w" * 40, kind=CHILD, id=id))


def running(registry: Registry, *ids: OperationId) -> None:
    provisioning(registry, *ids)
    for id in ids:
        registry.provisioning_succeeded(id)


def registering(registry: Registry, *ids: OperationId) -> None:
    registry.register_operations([spec(kind=CHILD, id=id) for id in ids])


def completing(registry: Registry, *ids: OperationId, size: int = 4) -> None:
    registry.complete_operations([result(id, "c" * size) for id in ids])


def turned_over(registry: Registry) -> None:
    """Slots to give back and none that was never used."""
    for _ in range(9):
        end(registry)
    running(registry, *IDS[1:4])
    registry.terminate_owner("before")


def turned_over_with_one(registry: Registry) -> None:
    turned_over(registry)
    running(registry, IDS[0], *IDS[4:])


def wrapped(registry: Registry) -> None:
    """A byte ring whose next entry is laid around its end, over the oldest ones."""
    running(registry, IDS[0])
    for _ in range(6):
        end(registry, "r" * 2200)


def wrapped_with_two(registry: Registry) -> None:
    wrapped(registry)
    running(registry, IDS[1])


def progressed(registry: Registry) -> None:
    running(registry, IDS[0])
    registry.report_progress(IDS[0], OperationProgressUpdate("before"))


def ended(registry: Registry) -> None:
    running(registry, *IDS[:3])
    registry.complete_operation(IDS[1], result(IDS[1]))
    registry.cancel_operation(IDS[0])


OTHER_PEER = OperationPeerHandle("n" * 100, TrustedPeerSpec("n" * 100, "p-2", "inproc://p-2"))

CASES = {
    "register": Case(
        lambda r: running(r, IDS[1]), lambda r: provisioning(r, IDS[0]), AlreadyRegistered
    ),
    "register in a slot given back": Case(
        turned_over, lambda r: provisioning(r, IDS[0]), AlreadyRegistered
    ),
    "register two": Case(
        lambda r: running(r, IDS[1]), lambda r: registering(r, IDS[2], IDS[0]), AlreadyRegistered
    ),
    "register two in slots given back": Case(
        turned_over, lambda r: registering(r, IDS[5], IDS[0]), AlreadyRegistered
    ),
    "start": Case(
        lambda r: provisioning(r, IDS[0]),
        lambda r: r.provisioning_succeeded(IDS[0]),
        InvalidTransition,
    ),
    "fail provisioning": Case(
        lambda r: provisioning(r, *IDS[:2]),
        lambda r: r.provisioning_failed(IDS[0], "no room"),
        InvalidTransition,
    ),
    "progress": Case(progressed, lambda r: r.report_progress(IDS[0], UPDATE)),
    "peer": Case(progressed, lambda r: r.peer_ready(IDS[0], OTHER_PEER), AlreadyPeerReady),
    "retire": Case(progressed, lambda r: r.request_retire(IDS[0]), InvalidTransition),
    "complete": Case(
        lambda r: running(r, *IDS[:2]),
        lambda r: r.complete_operation(IDS[0], result(IDS[0])),
        InvalidTransition,
    ),
    "complete after others": Case(
        turned_over_with_one,
        lambda r: r.complete_operation(IDS[0], result(IDS[0])),
        InvalidTransition,
    ),
    "complete around the end of the ring": Case(
        wrapped,
        lambda r: r.complete_operation(IDS[0], result(IDS[0], "c" * 1500)),
        InvalidTransition,
    ),
    "complete two": Case(
        lambda r: running(r, *IDS[:4]), lambda r: completing(r, IDS[2], IDS[0]), InvalidTransition
    ),
    "complete two around the end of the ring": Case(
        wrapped_with_two, lambda r: completing(r, *IDS[:2], size=700), InvalidTransition
    ),
    "terminate several": Case(
        lambda r: running(r, *IDS[:4]), lambda r: r.terminate_owner("owner ended")
    ),
    "terminate several in a turned over table": Case(
        turned_over_with_one,
        lambda r: r.terminate_owner("t" * 100),
    ),
    "collect": Case(ended, lambda r: r.collect_completed()),
    "watch": Case(lambda r: running(r, IDS[0]), lambda r: r.register_watcher(IDS[0])),
}


class Survivor:
    """This process's attachment of an epoch, which it can put back to where a case starts."""

    def __init__(self, namespace: str, case: Case) -> None:
        self.namespace = namespace
        self.segment = SharedSegment.allocate(
            namespace, CONFIG, session_id=SessionId.new(), epoch_id=RuntimeEpochId.new()
        )
        self.segment.join(Role.RUNTIME)
        self.segment.publish()
        self.case = case
        self.registry = Registry(self.segment)
        case.prepare(self.registry)
        self._image = os.pread(self.segment.fd, self.segment.layout.size, 0)
        self.before = State.of(self.registry)

    def put_back(self, image: bytes | None = None) -> None:
        """Start over; with a new registry, since time has gone backwards for the old one. Or go on
        where the memory was like `image`."""
        image = image or self._image
        assert os.pwrite(self.segment.fd, image, 0) == len(image)
        self.registry = Registry(self.segment)

    def start(self, death: Death) -> int:
        return start(self.namespace, self.segment, death, self.case.act)

    def close(self) -> None:
        self.segment.unlink()
        self.segment.close()


@pytest.fixture
def survive(namespace: str) -> Iterator[Callable[[str], Survivor]]:
    made: list[Survivor] = []

    def make(name: str) -> Survivor:
        made.append(Survivor(namespace, CASES[name]))
        return made[-1]

    yield make
    for survivor in made:
        survivor.close()


Survive: TypeAlias = Callable[[str], Survivor]


def next_transition(registry: Registry) -> None:
    """What another process does next: two transitions of an operation of its own."""
    following = spec(NEXT)
    registry.register_operation(following)
    registry.check()
    registry.cancel_operation(following.id)


def check_again(survivor: Survivor, *, committed: bool) -> None:
    """The transition of the killed process, tried by the survivor: it is refused if it was made,
    and succeeds if it was not; either way each operation ends once."""
    case, registry = survivor.case, survivor.registry
    if committed and case.again is not None:
        with pytest.raises(case.again):
            case.act(registry)
    else:
        case.act(registry)
    registry.check()
    ended = [id for id, _ in State.of(registry).entries]
    assert len(ended) == len(set(ended))


@pytest.mark.parametrize("heal", [next_transition, Registry.check])
@pytest.mark.parametrize("name", CASES)
def test_killed_before_any_store(
    survive: Survive, name: str, heal: Callable[[Registry], None]
) -> None:
    survivor = survive(name)
    assert survived(survivor.start(Death(0)))
    after = State.of(survivor.registry)
    assert after != survivor.before
    seen = []
    for n in count(1):
        survivor.put_back()
        lived = survived(survivor.start(Death(n)))
        seen.append(check_survivor(survivor, after, heal, n))
        if lived:
            break
    assert seen == sorted(seen), "committed, then not, as it goes further"
    assert set(seen) == {False, True}


def check_survivor(
    survivor: Survivor, after: State, heal: Callable[[Registry], None], n: int
) -> bool:
    """Whether the transition that was broken off is found committed; it is, or never was."""
    registry = survivor.registry
    found = State.of(registry)  # what a reader sees, before anybody has repaired anything
    committed = found == after
    entries = len(found.entries)
    assert committed or found == survivor.before.without_oldest(entries), f"at store {n}"
    heal(registry)
    registry.check()
    healed = State.of(registry)
    assert healed.entries == found.entries[len(found.entries) - len(healed.entries) :]
    assert healed.operations <= found.operations
    check_again(survivor, committed=committed)
    return committed


@pytest.mark.parametrize(
    "name",
    [
        "register",
        "register in a slot given back",
        "register two",
        "register two in slots given back",
        "start",
        "fail provisioning",
        "complete",
        "complete after others",
        "complete around the end of the ring",
        "complete two",
        "complete two around the end of the ring",
    ],
)
def test_killed_after_any_instruction_of_a_native_transition(survive: Survive, name: str) -> None:
    """As if it had been killed there: what it goes through is put back, one by one."""
    survivor = survive(name)

    def act(segment: SharedSegment) -> None:
        registry: Any = Registry(segment)
        registry._begin = None  # what goes word by word would need it
        registry._common._native = Stepped(registry._common._native)
        survivor.case.act(registry)

    segment = survivor.segment
    passed = images(attached(survivor.namespace, segment, act), segment.fd, segment.layout.size)
    survivor.put_back(passed[-1])
    after = State.of(survivor.registry)
    assert after != survivor.before
    seen = []
    for n, image in enumerate(passed):
        survivor.put_back(image)
        seen.append(check_survivor(survivor, after, next_transition, n))
    assert seen == sorted(seen), "committed, then not, as it goes further"
    assert set(seen) == {False, True}


@pytest.mark.parametrize("name", CASES)
def test_stopped_before_some_stores(survive: Survive, name: str) -> None:
    """Readers and cursors go on beside a stopped writer; other writers go on after it."""
    survivor = survive(name)
    assert survived(survivor.start(Death(0)))
    after = State.of(survivor.registry)
    cursors = EpochCursorState(survivor.segment)
    for n in chain(range(1, 6), range(6, 400, 13)):
        survivor.put_back()
        registry = survivor.registry
        pid = survivor.start(Death(n, by=signal.SIGSTOP))
        if not stopped(pid):
            break
        with ThreadPoolExecutor(1) as pool:
            try:
                writer = pool.submit(next_transition, registry)
                found = State.of(registry)
                entries = len(found.entries)
                assert found == after or found == survivor.before.without_oldest(entries)
                assert cursors.agent_applied_cursor.advance(n)
                assert cursors.snapshot().agent_applied_cursor == n
                if entries:
                    assert registry.completion_feed().wait_for_advance(0, 0) >= entries
                captured = registry.capture_persistence_snapshot(survivor.segment.epoch_id, cursors)
                assert captured.cursors.agent_applied_cursor == n
            finally:
                os.kill(pid, signal.SIGCONT)
            assert survived(pid)
            writer.result(DEADLINE_S)
        registry.check()
        assert State.of(registry).operations <= after.operations
        check_again(survivor, committed=True)
    else:
        pytest.fail("the transition never ended")


def test_registrations_that_were_undone_take_no_room(survive: Survive) -> None:
    """A writer is killed in a registration, over and over: its slot is given back each time."""
    survivor = survive("register")
    n = next(n for n in count(1) if is_half_registered(survivor, n))
    registry = survivor.registry
    for _ in range(survivor.segment.layout.slots + 1):
        assert not survived(survivor.start(Death(n)))
        registry.check()
    for _ in range(CONFIG.max_operations - 1):
        registry.register_operation(spec())
    registry.check()


def is_half_registered(survivor: Survivor, n: int) -> bool:
    """Have the writer killed before its n-th store; whether a slot is then taken that holds
    nothing."""
    layout = survivor.segment.layout
    survivor.put_back()
    assert not survived(survivor.start(Death(n)))
    taken = survivor.segment.memory.load_column(layout.fingerprints, layout.slots, at.WORD)
    half = sum(map(bool, taken)) > len(survivor.registry.list_operations())
    survivor.put_back()
    return half


def stopped(pid: int) -> bool:
    """Whether a process has stopped itself, rather than ended."""
    _, status = os.waitpid(pid, os.WUNTRACED)
    if os.WIFSTOPPED(status):
        return True
    assert os.waitstatus_to_exitcode(status) == 0
    return False


@pytest.mark.parametrize("kind", ["wake", "exchange"])
def test_sleepers_are_woken_though_the_writer_died_before_it_woke_them(
    survive: Survive, kind: str
) -> None:
    survivor = survive("complete")
    feed = survivor.registry.completion_feed()

    async def follow() -> int:
        return await feed.advanced(0)

    with ThreadPoolExecutor(2) as pool:
        thread = pool.submit(feed.wait_for_advance, 0, DEADLINE_S)
        coroutine = pool.submit(run, follow())
        eventually(lambda: survivor.segment.memory.load(at.BELLS_AT))
        assert not survived(survivor.start(Death(1, kind=kind)))
        assert thread.result(DEADLINE_S) == 1
        assert coroutine.result(DEADLINE_S) == 1
    survivor.registry.check()


class Between:
    """A memory that lets something happen right before one of its loads of a word."""

    def __init__(
        self, memory: Memory, offset: int, skip: int, happen: Callable[[], object]
    ) -> None:
        self._memory = memory
        self._offset = offset
        self._left = skip + 1
        self._happen = happen

    def __getattr__(self, name: str) -> Any:
        return getattr(self._memory, name)

    def load(self, offset: int) -> int:
        if offset == self._offset:
            self._left -= 1
            if self._left == 0:
                self._happen()
        return self._memory.load(offset)


LOOKS: dict[str, Callable[[Registry, OperationId], object]] = {
    "snapshot": lambda r, op: r.snapshot(op),
    "list": lambda r, op: r.list_operations(),
    "wait": lambda r, op: r.wait_all(RunId.new(), [op], 0),
    "capture": lambda r, op: r.capture_persistence_snapshot(
        RuntimeEpochId.new(), EpochCursorState.new()
    ),
}


@pytest.mark.parametrize("look", LOOKS)
def test_a_reader_is_not_misled_by_what_was_undone(survive: Survive, look: str) -> None:
    """The sequence of an ending that was not committed goes to the next one that is."""
    survivor = survive("complete")
    ended, other = IDS[:2]
    n = next(n for n in count(1) if is_half_ended(survivor, ended, n))
    for skip in range(10):
        survivor.put_back()
        assert is_half_ended(survivor, ended, n)
        memory: Any = Between(
            survivor.segment.memory,
            at.WATERMARK_AT,
            skip,
            partial(cancel_if_possible, survivor.registry, other),
        )
        reader = Registry(survivor.segment)
        reader._memory = reader._table._memory = reader._feed._memory = memory
        with suppress(TimeoutError):
            found = LOOKS[look](reader, ended)
            assert look != "wait", f"{found} after {skip} loads"
            listed = getattr(found, "operations", found if isinstance(found, list) else [found])
            statuses = {operation.id: operation.status for operation in listed}
            assert statuses[ended] is OperationStatus.RUNNING, f"after {skip} loads"


def cancel_if_possible(registry: Registry, id: OperationId) -> None:
    """End an operation, unless the reader is in a transition itself: then no other one happens."""
    with suppress(RuntimeError):
        registry.cancel_operation(id, "another")


def is_half_ended(survivor: Survivor, id: OperationId, n: int) -> bool:
    """Have the writer killed before its n-th store; whether the operation's slot then names a
    sequence that was not committed."""
    survivor.put_back()
    assert not survived(survivor.start(Death(n)))
    watermark = survivor.registry.completion_feed().watermark()
    slot = survivor.registry.locate(id).number
    return survivor.registry._table._raw(slot).terminal_seq > watermark


def test_a_reader_is_not_misled_by_a_registration_that_was_undone(survive: Survive) -> None:
    """Its number goes to the next registration, which may be in another slot."""
    survivor = survive("register in a slot given back")
    survivor.case.act(survivor.registry)
    registrations = survivor.segment.memory.load(at.REGISTRATIONS_AT)
    for n in count(1):
        survivor.put_back()
        assert not survived(survivor.start(Death(n)))
        slots = [survivor.registry._table._raw(i) for i in range(survivor.segment.layout.slots)]
        if any(slot.birth == registrations and slot.word & 3 for slot in slots):
            break
    following = spec(NEXT)

    def take_another_slot() -> None:
        """As the next writer does when it can give a lower slot back than the dead one had."""
        registry = survivor.registry
        registry.check()
        registry.collect_completed()
        registry.register_operation(following)

    memory: Any = Between(survivor.segment.memory, at.REGISTRATIONS_AT, 0, take_another_slot)
    reader = Registry(survivor.segment)
    reader._memory = reader._table._memory = reader._feed._memory = memory
    assert reader.snapshot(IDS[0]) is None
    assert [found.id for found in reader.list_operations()] == [following.id]
