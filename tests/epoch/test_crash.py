"""A process may be killed at any instruction of any transition: memory has the old or the new
state.

A killed process leaves only the content of memory. So a child is stopped after each instruction of
a transition. Then each content is put back, and the test continues from it.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Final, NamedTuple, TypeAlias, cast

import pytest

from shmepoch import _native as at
from shmepoch._native import Epoch, Refused
from shmepoch.config import OpsLifecycleConfig
from shmepoch.epoch.cursors import EpochCursorState
from shmepoch.epoch.operations import (
    Completed,
    OperationLifecycleSnapshot,
    OperationPeerHandle,
    OperationProgressUpdate,
    OperationStatus,
    OperationTerminalOutcome,
    TrustedPeerSpec,
)
from shmepoch.errors import (
    AlreadyPeerReady,
    AlreadyRegistered,
    InvalidTransition,
    OutcomeDropped,
)
from shmepoch.ids import OperationId, RuntimeEpochId, SessionId
from shmepoch.memory.participants import Role
from shmepoch.memory.segment import SharedSegment
from tests.epoch.deadline import DEADLINE_S, run
from tests.epoch.dying import attached, survived
from tests.epoch.operations import CHILD, UPDATE, Registry, end, result, spec
from tests.epoch.stepping import (
    TRANSITIONS,
    Stepped,
    images,
    interleave,
    native_steps,
    steps,
)
from tests.support import eventually, is_free

CONFIG = OpsLifecycleConfig(max_operations=6, max_completed=3, feed_bytes=at.PAGE + 8 * 1024)

#: The participant slot of a child; this process has another.
CHILD_LANE: Final = 1

#: The operation that the survivor registers; compared states do not include it.
NEXT = "next"

IDS = [OperationId.from_bytes(bytes([i]) * 16) for i in range(1, 7)]


class Operation(NamedTuple):
    """The facts of an operation, without times."""

    id: OperationId
    status: OperationStatus
    outcome: OperationTerminalOutcome | None
    progress_count: int
    peer_ready: bool
    started: bool
    watchers: int


class State(NamedTuple):
    """An epoch as its readers see it, without times and `NEXT`."""

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
    """A transition, its first state, and the error of a repetition, if it has one."""

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
    """Every slot was used; some can be given back."""
    for _ in range(9):
        end(registry)
    running(registry, *IDS[1:4])
    registry.terminate_owner("before")


def turned_over_with_one(registry: Registry) -> None:
    turned_over(registry)
    running(registry, IDS[0], *IDS[4:])


def wrapped(registry: Registry) -> None:
    """A byte ring whose next entry goes around the end, over the oldest entries."""
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


def watched(registry: Registry) -> None:
    """An operation that the next participant to join watches; it is not the first of its epoch."""
    end(registry)
    running(registry, IDS[0])
    writer = registry._segment.writer
    assert writer is not None
    mine, writer.participant = writer.participant, CHILD_LANE
    registry.register_watcher(IDS[0])
    writer.participant = mine


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
    "complete what is watched": Case(
        watched,
        lambda r: r.complete_operation(IDS[0], result(IDS[0])),
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

#: Cases of each kind whose repair has something to undo.
REPAIRED: Final = (
    "register two in slots given back",
    "complete around the end of the ring",
    "terminate several in a turned over table",
)


class End(NamedTuple):
    """An end that is not visible in `State`, and a check that shows it."""

    case: Case
    is_done: Callable[[SharedSegment], bool]


def watched_and_ended(registry: Registry) -> None:
    """An ended operation that the next participant to join still watches."""
    watched(registry)
    registry.complete_operation(IDS[0], result(IDS[0]))


def is_slot_free(segment: SharedSegment) -> bool:
    """Whether the first slot was given back."""
    return segment.memory.load(segment.layout.fingerprint(0)) == 0


ENDS: dict[str, End] = {
    "seal": End(Case(ended, lambda r: r._segment.seal()), lambda segment: segment.sealed),
    "unwatch": End(
        Case(watched_and_ended, lambda r: r._epoch.watch_each(((0, 2),), False)), is_slot_free
    ),
    "forget the watchers of the dead": End(
        Case(
            watched_and_ended,
            lambda r: r.terminate_where(lambda _: False, "it died", dead=[CHILD_LANE]),
        ),
        is_slot_free,
    ),
}


class Survivor:
    """This process's attachment of an epoch, which can be reset to the start of a case."""

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
        self._image = self.image()
        self.before = State.of(self.registry)

    def image(self) -> bytes:
        """The content of the memory."""
        return os.pread(self.segment.fd, self.segment.layout.size, 0)

    def put_back(self, image: bytes | None = None) -> None:
        """Reset the memory to the start, or to `image`. Makes a new registry, since time has gone
        backwards for the old one."""
        image = image or self._image
        assert os.pwrite(self.segment.fd, image, 0) == len(image)
        self.registry = Registry(self.segment)

    def start(
        self,
        act: Callable[[Registry], object] | None = None,
        methods: frozenset[str] = TRANSITIONS,
    ) -> int:
        """Start a child that makes the case's transition, or calls `act`, and is stopped after each
        instruction. Returns its pid."""

        def stepped(segment: SharedSegment) -> None:
            segment.epoch = cast(Epoch, Stepped(segment.epoch, methods))
            (act or self.case.act)(Registry(segment))

        return attached(self.namespace, self.segment, stepped)

    def images(self, act: Callable[[Registry], object] | None = None) -> list[bytes]:
        """Every content of memory while a child makes the transition, or calls `act`."""
        return images(self.start(act), self.segment.fd, self.segment.layout.size)

    def close(self) -> None:
        self.segment.unlink()
        self.segment.close()


Survive: TypeAlias = Callable[[str | Case], Survivor]


@pytest.fixture
def survive(namespace: str) -> Iterator[Survive]:
    made: list[Survivor] = []

    def make(case: str | Case) -> Survivor:
        if isinstance(case, str):
            case = CASES[case] if case in CASES else ENDS[case].case
        made.append(Survivor(namespace, case))
        return made[-1]

    yield make
    for survivor in made:
        survivor.close()


def next_transition(registry: Registry) -> None:
    """The next transitions of another process: it registers an operation and ends it."""
    following = spec(NEXT)
    registry.register_operation(following)
    registry.check()
    registry.cancel_operation(following.id)


def check_again(survivor: Survivor, *, committed: bool) -> None:
    """Repeat the transition of the killed process in the survivor: it is refused if it was
    committed, and succeeds if not. Either way each operation ends once."""
    case, registry = survivor.case, survivor.registry
    if committed and case.again is not None:
        with pytest.raises(case.again):
            case.act(registry)
    else:
        case.act(registry)
    registry.check()
    ended = [id for id, _ in State.of(registry).entries]
    assert len(ended) == len(set(ended))


@pytest.mark.parametrize("name", CASES)
def test_killed_after_any_instruction(survive: Survive, name: str) -> None:
    survivor = survive(name)
    passed = survivor.images()
    after = reached(survivor, passed)
    seen = []
    for n, image in enumerate(passed):
        survivor.put_back(image)
        heal = Registry.check if n % 2 else next_transition
        seen.append(check_survivor(survivor, after, heal, n))
    assert seen == sorted(seen), "committed, then not, as it goes further"
    assert set(seen) == {False, True}


def reached(survivor: Survivor, passed: list[bytes]) -> State:
    """The state after a transition."""
    survivor.put_back(passed[-1])
    after = State.of(survivor.registry)
    assert after != survivor.before
    return after


def check_survivor(
    survivor: Survivor, after: State, heal: Callable[[Registry], object], n: int
) -> bool:
    """Whether the interrupted transition is committed. It must be committed completely, or not at
    all."""
    registry = survivor.registry
    found = State.of(registry)  # a reader's view, before any repair
    committed = found == after
    entries = len(found.entries)
    assert committed or found == survivor.before.without_oldest(entries), f"at content {n}"
    memory = survivor.segment.memory
    is_broken_off, repairs = memory.load(at.INTENT_AT) != 0, memory.load(at.REPAIRS_AT)
    heal(registry)
    assert memory.load(at.REPAIRS_AT) == repairs + is_broken_off
    registry.check()
    healed = State.of(registry)
    assert healed.entries == found.entries[len(found.entries) - len(healed.entries) :]
    assert healed.operations <= found.operations
    check_again(survivor, committed=committed)
    return committed


@pytest.mark.parametrize("name", REPAIRED)
def test_killed_in_the_repair_of_what_was_broken_off(survive: Survive, name: str) -> None:
    """A second process is killed at any instruction of its repair: a third one finds the same."""
    survivor = survive(name)
    passed = survivor.images()
    after = reached(survivor, passed)
    broken_off = [image for image in passed if word_of(image, at.INTENT_AT)]
    some = broken_off[:: max(1, len(broken_off) // 10)]
    contents = {again for image in some for again in repaired(survivor, image)}
    assert len(contents) > len(some)
    for n, image in enumerate(contents):
        survivor.put_back(image)
        check_survivor(survivor, after, next_transition, n)
        assert survivor.segment.memory.load(at.REPAIRS_AT) in (1, 2), "never missed"


def repaired(survivor: Survivor, image: bytes) -> list[bytes]:
    def repair(registry: Registry) -> None:
        with pytest.raises(Refused):  # the refusal comes after the repair
            registry._epoch.collect(2**63, 0)

    survivor.put_back(image)
    return survivor.images(repair)


def word_of(image: bytes, offset: int) -> int:
    return int.from_bytes(image[offset : offset + at.WORD], sys.byteorder)


@pytest.mark.parametrize("name", ENDS)
def test_killed_after_any_instruction_of_an_end(survive: Survive, name: str) -> None:
    """The end of the epoch, or of a watch: it changes nothing else."""
    survivor = survive(name)
    seen = []
    for image in survivor.images():
        survivor.put_back(image)
        assert State.of(survivor.registry) == survivor.before
        seen.append(ENDS[name].is_done(survivor.segment))
        survivor.registry.check()
    assert seen == sorted(seen)
    assert set(seen) == {False, True}


def test_an_epoch_that_is_sealed_has_no_operation_left(survive: Survive) -> None:
    """A process killed between the two commits leaves an open epoch in which every operation has
    ended."""
    survivor = survive(
        Case(lambda r: running(r, *IDS[:2]), lambda r: r.terminate_and_seal("it is over"))
    )
    seen = []
    for image in survivor.images():
        survivor.put_back(image)
        seen.append((survivor.segment.sealed, survivor.registry.active_count()))
    assert seen == sorted(seen, key=lambda found: (found[0], -found[1]))
    assert set(seen) == {(False, 2), (False, 0), (True, 0)}


@pytest.mark.parametrize("name", ["unwatch", "forget the watchers of the dead"])
def test_a_slot_that_nobody_watches_is_given_back(survive: Survive, name: str) -> None:
    """The next writer gives it back at the latest, wherever the process was killed that stopped
    watching."""
    survivor = survive(name)
    watchers = survivor.segment.layout.slot(0) + at.SLOT_WATCHERS
    for image in survivor.images():
        survivor.put_back(image)
        survivor.registry.check()
        assert is_slot_free(survivor.segment) is (word_of(image, watchers) == 0)


def test_a_watcher_gets_what_a_killed_writer_had_committed(survive: Survive) -> None:
    """Even if the feed has dropped it since: the words that keep an outcome are written before the
    commit."""
    survivor = survive("complete what is watched")
    for image in survivor.images():
        survivor.put_back(image)
        registry = survivor.registry
        if registry.completion_feed().watermark() == 1:
            survivor.case.act(registry)
        for _ in range(8):
            end(registry, "r" * 2200)
        assert registry.completion_feed().list_since(0).dropped_through > 1
        assert registry.outcome_at(IDS[0], (0, 2), 1) == Completed(result(IDS[0]))


@pytest.mark.parametrize("name", CASES)
def test_stopped_after_some_instructions(survive: Survive, name: str) -> None:
    """Readers and cursors go on beside a stopped writer; other writers go on after it."""
    survivor = survive(name)
    count = sum(1 for _ in steps(survivor.start()))
    after = State.of(survivor.registry)
    cursors = EpochCursorState(survivor.segment)
    survivor.put_back()
    registry = survivor.registry
    held = 0
    with ThreadPoolExecutor(1) as pool:
        writer = None
        for n, _ in enumerate(steps(survivor.start())):
            if n % (count // 8) or is_free(survivor.segment):
                continue
            held += 1
            writer = writer or pool.submit(next_transition, registry)
            found = State.of(registry)
            entries = len(found.entries)
            assert found == after or found == survivor.before.without_oldest(entries)
            assert cursors.agent_applied_cursor.advance(n)
            assert cursors.snapshot().agent_applied_cursor == n
            if entries:
                assert registry.completion_feed().wait_for_advance(0, 0) >= entries
            captured = registry.capture_persistence_snapshot(survivor.segment.epoch_id, cursors)
            assert captured.cursors.agent_applied_cursor == n
        assert held
        assert writer is not None
        writer.result(DEADLINE_S)
    registry.check()
    assert State.of(registry).operations <= after.operations
    check_again(survivor, committed=True)


def test_registrations_that_were_undone_take_no_room(survive: Survive) -> None:
    """Writers are killed in registrations again and again: the slot is given back each time."""
    survivor = survive("register")
    registry, layout = survivor.registry, survivor.segment.layout

    def taken() -> int:
        column = survivor.segment.memory.load_column(layout.fingerprints, layout.slots, at.WORD)
        return sum(map(bool, column))

    before = taken()
    for _ in range(layout.slots + 1):
        for _ in steps(survivor.start()):
            if taken() > before and survivor.segment.memory.load(at.INTENT_AT):
                break
        assert taken() > before
        registry.check()
        survivor.registry.register_operation(following := spec(NEXT))
        registry.cancel_operation(following.id)
        assert taken() == before
    for _ in range(CONFIG.max_operations - 1):
        registry.register_operation(spec())
    registry.check()


def test_an_ending_that_was_undone_takes_no_room(survive: Survive) -> None:
    """Writers are killed in endings again and again: the next record begins at the same place."""
    survivor = survive("complete around the end of the ring")
    passed = survivor.images()
    watermark, head = (word_of(passed[0], offset) for offset in (at.WATERMARK_AT, at.HEAD_AT))
    for image in passed:
        survivor.put_back(image)
        survivor.registry.check()
        moved = survivor.segment.memory.load(at.HEAD_AT) > head
        assert moved is (survivor.segment.memory.load(at.WATERMARK_AT) > watermark)


def test_sleepers_are_woken_though_the_writer_died_before_it_woke_them(survive: Survive) -> None:
    survivor = survive("complete")
    feed = survivor.registry.completion_feed()

    async def follow() -> int:
        return await feed.advanced(0)

    def die_before_waking(segment: SharedSegment) -> None:
        def die() -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        segment.waiters.notify = die  # type: ignore[method-assign]
        survivor.case.act(Registry(segment))

    with ThreadPoolExecutor(2) as pool:
        thread = pool.submit(feed.wait_for_advance, 0, DEADLINE_S)
        coroutine = pool.submit(run, follow())
        eventually(lambda: survivor.segment.memory.load(at.DOORBELLS_AT))
        assert not survived(attached(survivor.namespace, survivor.segment, die_before_waking))
        assert thread.result(DEADLINE_S) == 1
        assert coroutine.result(DEADLINE_S) == 1
    survivor.registry.check()


#: The calls of readers, by name.
LOOKS: dict[str, Callable[[Registry, OperationId], object]] = {
    "snapshot": lambda r, op: r.snapshot(op),
    "feed": lambda r, op: r.completion_feed().list_since(r.completion_feed().watermark() - 1),
    "outcome": lambda r, op: r.outcome_at(op, (0, 1), 0),
}
READS: Final = frozenset(("find", "slot", "record", "list_since", "outcome"))
#: At how many points of a read something happens.
POINTS: Final = 14


def some(steps: list[int], count: int) -> list[int]:
    """`count` of the steps, evenly spaced."""
    return steps[:: max(1, len(steps) // count)]


@pytest.mark.parametrize("look", LOOKS)
def test_a_reader_is_not_misled_by_what_happens_meanwhile(survive: Survive, look: str) -> None:
    """Its slot passes to another operation, or its record is overwritten, between any two
    instructions of a read: the result is whole, and from one moment."""
    survivor = survive("complete around the end of the ring")
    id = IDS[0]

    def act(reader: Registry) -> None:
        with suppress(OutcomeDropped):
            found = LOOKS[look](reader, id)
            if isinstance(found, OperationLifecycleSnapshot):
                assert found.status.is_terminal == (found.terminal_outcome is not None)

    def turn_over() -> None:
        survivor.registry.complete_operation(id, result(id, "c" * 700))
        for _ in range(4):
            end(survivor.registry, "r" * 2200)

    for step in some(native_steps(survivor.start(act, READS)), 2 * POINTS):
        survivor.put_back()
        interleave(survivor.start(act, READS), step, turn_over)
        survivor.registry.check()


#: The ways to find the first operation.
SEARCHES: dict[str, Callable[[Registry], list[OperationLifecycleSnapshot | None]]] = {
    "snapshot": lambda r: [r.snapshot(IDS[0])],
    "list": lambda r: [found for found in r.list_operations() if found.id == IDS[0]],
}


@pytest.mark.parametrize("search", SEARCHES)
def test_a_reader_is_not_misled_by_what_was_undone(survive: Survive, search: str) -> None:
    """The sequence of an uncommitted ending is used for the next committed one."""
    survivor = survive("complete")
    other = IDS[1]
    half_ended = next(
        image
        for image in survivor.images()
        if word_of(image, survivor.segment.layout.slot(0) + at.SLOT_TERMINAL_SEQ)
    )
    survivor.put_back(half_ended)
    assert survivor.segment.memory.load(at.WATERMARK_AT) == 0

    def act(reader: Registry) -> None:
        [found] = SEARCHES[search](reader)
        assert found is not None
        assert found.status is OperationStatus.RUNNING

    for step in some(native_steps(survivor.start(act, READS)), 3 * POINTS):
        survivor.put_back(half_ended)
        cancel = partial(survivor.registry.cancel_operation, other, "another")
        interleave(survivor.start(act, READS), step, cancel)


def pass_on(registry: Registry) -> None:
    """End an operation, and register another one in its slot."""
    registry.complete_operation(IDS[0], result(IDS[0]))
    registry.register_operation(spec("another", id=IDS[1]))


def test_a_reader_is_not_misled_by_a_slot_that_is_being_filled(survive: Survive) -> None:
    """Also if the writer is killed then: only the slot's word shows that the slot passes on."""
    survivor = survive(Case(lambda r: running(r, IDS[0]), pass_on))
    passed, slot = survivor.images(), survivor.segment.layout.slot(0)
    before = [image for image in passed if word_of(image, slot + at.SLOT_BIRTH) == 1]
    spec_at = slice(slot + at.SLOT_SPEC, slot + at.SLOT_DETAIL)
    filled = [image for image in passed if b"another" in image[spec_at]]

    def act(reader: Registry) -> None:
        found = reader._table.slot(0)
        assert found is None or found.id == IDS[found.birth - 1].bytes
        assert found is None or (b"another" in found.head) is (found.birth == 2)

    survivor.put_back()
    for n, step in enumerate(some(native_steps(survivor.start(act, READS)), 4 * POINTS)):
        survivor.put_back(before[-(n % 2)])  # the first, or the last before the new operation
        fill = partial(survivor.put_back, filled[n // 2 % len(filled)])
        interleave(survivor.start(act, READS), step, fill)


def test_an_operation_that_ends_while_it_is_looked_for_is_found(survive: Survive) -> None:
    """At every moment it is in its slot, or in the record that ended it."""
    survivor = survive("complete")

    def act(reader: Registry) -> None:
        assert reader.snapshot(IDS[0]) is not None

    for step in some(native_steps(survivor.start(act, READS)), 4 * POINTS):
        survivor.put_back()
        interleave(survivor.start(act, READS), step, partial(survivor.case.act, survivor.registry))


def test_a_feed_that_goes_round_as_its_reading_begins_is_not_corrupt(survive: Survive) -> None:
    """Then `dropped_through` is above the watermark that was read before."""
    survivor = survive("complete around the end of the ring")
    for _ in range(8):
        end(survivor.registry, "r" * 2200)
    gone_round = survivor.image()

    def act(reader: Registry) -> None:
        assert reader.completion_feed().list_since(0).watermark

    survivor.put_back()
    # After it has parsed its arguments, and before it reads a record.
    for step in native_steps(survivor.start(act, READS))[6 * POINTS : 15 * POINTS]:
        survivor.put_back()
        interleave(survivor.start(act, READS), step, partial(survivor.put_back, gone_round))


def test_operations_are_counted_at_one_moment(survive: Survive) -> None:
    """Another one is registered and ends between two instructions of the count."""
    survivor = survive("complete")
    methods = frozenset(("active",))

    def act(reader: Registry) -> None:
        assert reader.active_count() == 2

    for step in native_steps(survivor.start(act, methods)):
        survivor.put_back()
        interleave(survivor.start(act, methods), step, partial(end, survivor.registry))
