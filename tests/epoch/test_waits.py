"""Waiting for operations: watchers, and barriers over several."""

from __future__ import annotations

import asyncio
import linecache
import math
import os
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from decimal import Decimal
from fractions import Fraction
from types import FrameType
from typing import Any, Final

import numpy as np
import pytest

from shmepoch import _native as at
from shmepoch.epoch import waits as waits_module
from shmepoch.epoch.operations import (
    TRANSITIONS,
    Action,
    Cancelled,
    Completed,
    OperationStatus,
    Terminated,
    WaitAllResult,
)
from shmepoch.epoch.registry import RuntimeOpsLifecycleRegistry
from shmepoch.epoch.waits import OperationCompletionWatch
from shmepoch.errors import (
    AlreadyRegistered,
    DuplicateWaitOperation,
    EpochSealed,
    InvalidTransition,
    MaxConcurrentExceeded,
    NotFound,
    OutcomeDropped,
    StoreBehind,
    WaitAlreadyActive,
)
from shmepoch.ids import OperationId, RunId
from shmepoch.memory import waiting as waiting_module
from tests.epoch.conftest import MakeEpoch
from tests.epoch.deadline import DEADLINE_S, run
from tests.epoch.implementations import Epoch, shared
from tests.epoch.operations import (
    PATHS,
    VERBS,
    Registry,
    end,
    reach,
    result,
    spec,
    state,
    taken,
)
from tests.support import eventually, held_writer

#: A status from which each action ends an operation.
ENDINGS: Final = {
    action: OperationStatus.PROVISIONING
    if OperationStatus.RUNNING not in allowed
    else OperationStatus.RUNNING
    for action, (allowed, target) in TRANSITIONS.items()
    if target is not None and target.is_terminal
}


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as threads:
        yield threads


def running(registry: Registry) -> OperationId:
    return reach(registry, OperationStatus.RUNNING)


# --- watchers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [status for status in PATHS if status.is_terminal])
def test_a_watcher_of_what_has_ended_is_resolved_at_once(
    registry: Registry, status: OperationStatus
) -> None:
    id = reach(registry, status)
    watch = registry.register_watcher(id)
    assert watch.id == id
    assert watch.wait(0) == taken(registry, id).terminal_outcome
    assert run(_await(watch)) == watch.wait()
    assert taken(registry, id).watcher_count == 0


async def _await(watch: object) -> object:
    return await watch  # type: ignore[misc]


def test_every_watcher_gets_the_same_outcome(registry: Registry, pool: ThreadPoolExecutor) -> None:
    id = running(registry)
    watches = [registry.register_watcher(id) for _ in range(6)]
    assert taken(registry, id).watcher_count == 6
    waits = [pool.submit(watch.wait, DEADLINE_S) for watch in watches]
    registry.complete_operation(id, result(id))
    assert [wait.result(DEADLINE_S) for wait in waits] == [Completed(result(id))] * 6
    assert taken(registry, id).watcher_count == 0


def test_watchers_are_counted_while_they_watch(registry: Registry) -> None:
    id = running(registry)
    first = registry.register_watcher(id)
    with registry.register_watcher(id):
        assert taken(registry, id).watcher_count == 2
    assert taken(registry, id).watcher_count == 1
    first.close()
    first.close()
    assert taken(registry, id).watcher_count == 0
    other = running(registry)
    registry.register_watcher(id)
    assert [taken(registry, each).watcher_count for each in (id, other)] == [1, 0]


def test_a_watcher_that_is_closed_may_still_look(registry: Registry) -> None:
    id = running(registry)
    with registry.register_watcher(id) as watch:
        pass
    registry.cancel_operation(id)
    assert watch.wait(0) == Cancelled()


def test_nobody_watches_what_is_unknown(registry: Registry) -> None:
    with pytest.raises(NotFound):
        registry.register_watcher(OperationId.new())


@pytest.mark.parametrize("timeout", [0, 0.01, -1])
def test_a_watch_times_out_and_goes_on(registry: Registry, timeout: float) -> None:
    id = running(registry)
    watch = registry.register_watcher(id)
    with pytest.raises(TimeoutError):
        watch.wait(timeout)
    assert taken(registry, id).watcher_count == 1
    registry.mark_retired(id)
    assert watch.wait(0) == taken(registry, id).terminal_outcome


def test_a_watch_ends_with_the_epoch(epoch: Epoch, pool: ThreadPoolExecutor) -> None:
    watch = epoch.registry.register_watcher(running(epoch.registry))
    wait = pool.submit(watch.wait, DEADLINE_S)
    epoch.seal()
    with pytest.raises(EpochSealed):
        wait.result(DEADLINE_S)
    watch.close()


def test_other_ends_do_not_resolve_a_watch(registry: Registry, pool: ThreadPoolExecutor) -> None:
    id = running(registry)
    wait = pool.submit(registry.register_watcher(id).wait, DEADLINE_S)
    for _ in range(20):
        end(registry)
    assert not wait.done()
    registry.complete_operation(id, result(id))
    assert wait.result(DEADLINE_S) == Completed(result(id))


def test_an_outcome_is_found_after_its_slot_has_passed_on(make_epoch: MakeEpoch) -> None:
    registry = make_epoch(max_completed=1, max_operations=2).registry
    id = running(registry)
    watch = registry.register_watcher(id)
    registry.complete_operation(id, result(id, "mine"))
    for _ in range(12):
        end(registry)
    assert registry.snapshot(id) is None
    assert watch.wait(0) == Completed(result(id, "mine"))


def turn_over(registry: Registry) -> None:
    """Run operations until nothing that ended before is in the feed or in the table."""
    feed = registry.completion_feed()
    watermark = feed.watermark()
    while feed.list_since(0).dropped_through < watermark:
        end(registry, "r" * 1500)


SMALL: Final = {"max_completed": 1, "max_operations": 9, "feed_bytes": 9 * 1024 + at.PAGE}


@pytest.mark.parametrize("size", [0, 1_000, 1_500, 1_520, 3_100, 9_000])
def test_a_watcher_gets_an_outcome_that_retention_has_dropped(
    make_epoch: MakeEpoch, size: int
) -> None:
    """Every watcher gets the whole outcome, however long it is."""
    registry = make_epoch(**SMALL).registry
    id = running(registry)
    watches = [registry.register_watcher(id) for _ in range(3)]
    registry.complete_operation(id, result(id, "r" * size))
    for watch in watches:
        for _ in range(2):
            turn_over(registry)
        assert registry.snapshot(id) is None
        with pytest.raises(NotFound):
            registry.cancel_operation(id)
        assert watch.wait(0) == Completed(result(id, "r" * size))
    registry.check()
    fill_the_table(registry)


def test_a_watcher_gets_an_outcome_that_was_dropped_for_the_number_of_entries(
    make_epoch: MakeEpoch,
) -> None:
    """The feed has room for their bytes, but not for their number."""
    registry = make_epoch(**SMALL | {"feed_bytes": 512 * 1024}).registry
    id = running(registry)
    watch = registry.register_watcher(id)
    registry.complete_operation(id, result(id))
    for _ in range(registry._segment.layout.entries + 1):
        end(registry)
    assert registry.completion_feed().list_since(0).dropped_through == 2
    assert watch.wait(0) == Completed(result(id))
    registry.check()


@pytest.mark.parametrize("action", [a for a in ENDINGS if a is not Action.TERMINATE_OWNER])
def test_whatever_the_outcome_is(make_epoch: MakeEpoch, action: Action) -> None:
    registry = make_epoch(**SMALL).registry
    id = reach(registry, ENDINGS[action])
    watch = registry.register_watcher(id)
    VERBS[action](registry, id)
    outcome = taken(registry, id).terminal_outcome
    turn_over(registry)
    assert run(_await(watch)) == outcome


def test_a_barrier_gets_outcomes_that_retention_has_dropped(
    make_epoch: MakeEpoch, pool: ThreadPoolExecutor
) -> None:
    registry = make_epoch(**SMALL).registry
    ids = [running(registry) for _ in range(3)]
    wait = pool.submit(registry.wait_all, RunId.new(), ids, DEADLINE_S)
    eventually(lambda: [taken(registry, id).watcher_count for id in ids] == [1, 1, 1])
    for id in reversed(ids):
        registry.complete_operation(id, result(id, str(id) * 50))
        turn_over(registry)
    assert [outcome for _, outcome in wait.result(DEADLINE_S).outcomes] == [
        Completed(result(id, str(id) * 50)) for id in ids
    ]
    fill_the_table(registry)


def test_an_awaited_barrier_does(make_epoch: MakeEpoch) -> None:
    registry = make_epoch(**SMALL).registry
    ids = [running(registry) for _ in range(3)]

    def end_all() -> None:
        for id in reversed(ids):
            registry.complete_operation(id, result(id, "r" * 2000))
            turn_over(registry)

    async def main() -> WaitAllResult:
        wait = asyncio.ensure_future(registry.all_ended(RunId.new(), ids))
        while taken(registry, ids[2]).watcher_count == 0:
            await asyncio.sleep(0.001)
        end_all()  # the event loop is blocked meanwhile
        return await wait

    assert [each for each, _ in run(main()).outcomes] == ids
    fill_the_table(registry)


def fill_the_table(registry: Registry) -> None:
    """Register as many operations as allowed; all slots are available for them."""
    turn_over(registry)
    table, layout = registry._table, registry._segment.layout
    ids = []
    for _ in range(9):
        ids.append(running(registry))
        column = registry._segment.memory.load_column(layout.fingerprints, layout.slots, at.WORD)
        assert sum(map(bool, column)) == len(list(table.live()))
    for id in ids:
        registry.cancel_operation(id)
    registry.check()


def test_what_is_closed_is_not_kept(make_epoch: MakeEpoch) -> None:
    registry = make_epoch(**SMALL).registry
    ids = [running(registry) for _ in range(4)]
    watches = [registry.register_watcher(id) for id in ids]
    watches[0].close()
    registry.cancel_operation(ids[0])
    registry.cancel_operation(ids[1])
    watches[1].close()
    registry.cancel_operation(ids[2], "r" * 1800)
    turn_over(registry)
    watches[2].close()
    for watch in watches[:3]:
        with pytest.raises(OutcomeDropped) as gone:
            watch.wait(0)
        assert gone.value.id == watch.id
    registry.cancel_operation(ids[3])
    assert watches[3].wait(0) == Cancelled()
    fill_the_table(registry)


def test_registrations_come_before_what_is_kept(make_epoch: MakeEpoch) -> None:
    """A process that never reads its outcomes delays no registration; the oldest go first."""
    registry = make_epoch(**SMALL).registry
    ids, watches = [], []
    for turn in range(30):
        ids.append(running(registry))
        watches.append(registry.register_watcher(ids[-1]))
        registry.cancel_operation(ids[-1], f"{turn}")
    turn_over(registry)
    outcomes = []
    for watch in watches:
        try:
            outcomes.append(watch.wait(0))
        except OutcomeDropped:
            assert not outcomes, "an older one was there"
    assert outcomes == [Cancelled(f"{turn}") for turn in range(30 - len(outcomes), 30)]
    assert len(outcomes) >= 8
    fill_the_table(registry)


def dropped_and_kept(registry: RuntimeOpsLifecycleRegistry) -> OperationCompletionWatch:
    """A watcher of an outcome that only its slot still holds."""
    id = running(registry)
    watch = registry.register_watcher(id)
    registry.cancel_operation(id, "r" * 3000)
    feed = registry.completion_feed()
    while feed.list_since(0).dropped_through < 1:
        end(registry, "x" * 1500)
        feed.mark_durable(feed.watermark())
    return watch


@pytest.mark.parametrize("twin", ["registered", "among them", "one too many"])
def test_a_refused_registration_takes_no_outcome_from_a_watcher(
    make_epoch: MakeEpoch, twin: str
) -> None:
    registry = make_epoch(max_operations=3, max_completed=1, feed_bytes=9 * 1024 + at.PAGE).registry
    watch = dropped_and_kept(registry)
    other, new = spec(), spec()
    registry.register_operation(other)
    batch = {
        "registered": [new, other],
        "among them": [new, new],
        "one too many": [new, spec(), spec()],
    }
    memory, length = registry._segment.memory, registry._segment.layout.size - at.PAGE
    before = memory.read(at.PAGE, length)
    with pytest.raises(
        MaxConcurrentExceeded if twin == "one too many" else AlreadyRegistered
    ) as refused:
        registry.register_operations(batch[twin])
    if isinstance(refused.value, AlreadyRegistered):
        assert refused.value.id == batch[twin][1].id
    assert memory.read(at.PAGE, length) == before
    assert watch.wait(0) == Cancelled("r" * 3000)


def test_an_end_that_the_store_is_behind_takes_no_outcome_from_a_watcher(
    make_epoch: MakeEpoch,
) -> None:
    registry = make_epoch(
        max_operations=4, max_completed=2, feed_bytes=8 * 1024 + at.PAGE, store_wait_ms=1
    ).registry
    watch, id = dropped_and_kept(registry), running(registry)
    end(registry, "x" * 1500)
    mark = registry.completion_feed().watermark()
    with pytest.raises(StoreBehind):
        registry.cancel_operation(id, "y" * 11_000)
    assert registry.completion_feed().watermark() == mark
    assert watch.wait(0) == Cancelled("r" * 3000)


def test_where_there_is_no_other_room_the_oldest_outcome_gives_way(make_epoch: MakeEpoch) -> None:
    """Three kept outcomes leave no room for another record; two do."""
    registry = make_epoch(**SMALL).registry
    ids = [running(registry) for _ in range(3)]
    oldest, *others = [registry.register_watcher(id) for id in ids]
    for turn, id in enumerate(ids):
        registry.cancel_operation(id, f"{turn}" * 4000)
    turn_over(registry)
    with pytest.raises(OutcomeDropped):
        oldest.wait(0)
    for turn, watch in enumerate(others, 1):
        assert watch.wait(0) == Cancelled(f"{turn}" * 4000)


def test_an_outcome_without_room_is_said_to_be_dropped(make_epoch: MakeEpoch) -> None:
    """There are more than the memory of an epoch holds: their watchers are told at once that it
    ended."""
    registry = make_epoch(**SMALL).registry
    ids = [running(registry) for _ in range(4)]
    watches = [registry.register_watcher(id) for id in ids]
    for id in ids:
        registry.cancel_operation(id, "r" * 6000)
    turn_over(registry)
    dropped = []
    for watch in watches:
        try:
            assert watch.wait(0) == Cancelled("r" * 6000)
        except OutcomeDropped as error:
            assert "ended" in str(error)
            assert pickle.loads(pickle.dumps(error)).id == watch.id
            dropped.append(watch)
    assert dropped
    with pytest.raises(OutcomeDropped):
        run(_await(dropped[0]))


def forget_watchers(registry: RuntimeOpsLifecycleRegistry, participant: int) -> None:
    registry.terminate_where(lambda _: False, "it died", dead=[participant])


def test_what_a_dead_participant_watched_is_given_back(make_epoch: MakeEpoch) -> None:
    epoch = make_epoch(**SMALL)
    registry, id = epoch.registry, running(epoch.registry)
    registry.register_watcher(id)
    registry.cancel_operation(id, "r" * 4000)
    turn_over(registry)
    for participant in {registry.participant for _ in range(2)}:  # one or two attachments
        forget_watchers(registry, participant)
    fill_the_table(registry)


def test_what_a_dead_participant_ran_and_watched_is_given_back(make_epoch: MakeEpoch) -> None:
    """The call that ends it also frees its slot: no live process watches the operation."""
    registry = make_epoch(**SMALL).registry
    id = running(registry)
    watch = registry.register_watcher(id)
    dead = {registry.participant for _ in range(2)}  # one or two attachments
    assert registry.terminate_where(lambda _: True, "it died", dead=dead) == 1
    layout = registry._segment.layout
    column = registry._segment.memory.load_column(layout.fingerprints, layout.slots, at.WORD)
    assert not any(column)
    assert watch.wait(0) == Terminated("it died")


def test_an_id_that_was_used_again_is_another_operation(registry: Registry) -> None:
    id = running(registry)
    first = registry.register_watcher(id)
    registry.complete_operation(id, result(id, "first"))
    registry.collect_completed()
    registry.register_operation(spec(id=id))
    second = registry.register_watcher(id)
    assert first.wait(0) == Completed(result(id, "first"))
    registry.cancel_operation(id, "second")
    assert second.wait(0) == Cancelled("second")


def test_watches_are_awaited(registry: Registry) -> None:
    ids = [running(registry) for _ in range(3)]

    async def main() -> list[object]:
        watches = [registry.register_watcher(id) for id in ids]
        waits = [asyncio.ensure_future(_await(watch)) for watch in watches]
        await asyncio.sleep(0)
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, registry.cancel_operation, ids[1])
        assert await waits[1] == Cancelled()
        assert not waits[0].done()
        waits[2].cancel()
        await loop.run_in_executor(None, registry.terminate_owner, "owner ended")
        with pytest.raises(asyncio.CancelledError):
            await waits[2]
        return [await waits[0], await watches[0], await watches[2]]

    assert run(main()) == [Terminated("owner ended")] * 3


def test_of_many_that_race_to_end_an_operation_one_does(
    registry: Registry, pool: ThreadPoolExecutor
) -> None:
    line = threading.Barrier(8, timeout=DEADLINE_S)

    def race(racer: tuple[int, OperationId]) -> InvalidTransition | None:
        turn, op = racer
        line.wait()
        try:
            registry.cancel_operation(op, f"racer {turn}")
        except InvalidTransition as late:
            return late
        return None

    for rounds in range(1, 21):
        id = running(registry)
        watch = registry.register_watcher(id)
        late = [error for error in pool.map(race, [(turn, id) for turn in range(8)]) if error]
        assert [(error.id, error.status) for error in late] == [(id, "cancelled")] * 7
        batch = registry.completion_feed().list_since(rounds - 1)
        assert [entry.operation_id for entry in batch.entries] == [id]
        assert watch.wait(0) == batch.entries[0].terminal_outcome


# --- barriers -------------------------------------------------------------------------------------


def check_satisfied(
    registry: Registry, found: WaitAllResult, run_id: RunId, ids: list[OperationId]
) -> None:
    assert [id for id, _ in found.outcomes] == ids
    for id, outcome in found.outcomes:
        assert outcome == taken(registry, id).terminal_outcome
    assert (found.satisfied.run_id, found.satisfied.operation_ids) == (run_id, tuple(ids))


def test_a_barrier_over_nothing(registry: Registry) -> None:
    run_id = RunId.new()
    check_satisfied(registry, registry.wait_all(run_id, [], 0), run_id, [])
    check_satisfied(registry, run(registry.all_ended(run_id, [])), run_id, [])


def test_a_barrier_over_what_has_ended(registry: Registry) -> None:
    ids = [reach(registry, status) for status in PATHS if status.is_terminal][::-1]
    run_id = RunId.new()
    first = registry.wait_all(run_id, ids, 0)
    check_satisfied(registry, first, run_id, ids)
    second = run(registry.all_ended(run_id, tuple(ids)))
    check_satisfied(registry, second, run_id, ids)
    assert first.satisfied.wait_request_id != second.satisfied.wait_request_id


def test_a_barrier_waits_for_all_and_answers_in_the_order_asked(
    registry: Registry, pool: ThreadPoolExecutor
) -> None:
    ids, run_id = [running(registry) for _ in range(5)], RunId.new()
    wait = pool.submit(registry.wait_all, run_id, ids, DEADLINE_S)
    for id in (ids[3], ids[0], ids[4], ids[1]):
        registry.complete_operation(id, result(id, str(id)))
    assert not wait.done()
    registry.fail_operation(ids[2], "broke")
    check_satisfied(registry, wait.result(DEADLINE_S), run_id, ids)


def test_an_operation_is_named_once(registry: Registry) -> None:
    id, other = running(registry), running(registry)
    for ids in ([id, other, id], [id, id]):
        with pytest.raises(DuplicateWaitOperation) as refused:
            registry.wait_all(RunId.new(), ids, 0)
        assert refused.value.id == id
        assert isinstance(refused.value, ValueError)
        with pytest.raises(DuplicateWaitOperation):
            run(registry.all_ended(RunId.new(), ids))


def test_a_barrier_over_what_is_unknown(registry: Registry) -> None:
    unknown = OperationId.new()
    before = state(registry)
    with pytest.raises(NotFound) as refused:
        registry.wait_all(RunId.new(), [running_or_ended(registry), unknown], 0)
    assert refused.value.id == unknown
    with pytest.raises(NotFound):
        run(registry.all_ended(RunId.new(), [unknown]))
    assert len(state(registry)[0]) == len(before[0]) + 1


def running_or_ended(registry: Registry) -> OperationId:
    return reach(registry, OperationStatus.FAILED)


def test_a_barrier_does_not_wait_for_a_writer_longer_than_it_may(namespace: str) -> None:
    """The writer was stopped in a transition; the event loop goes on meanwhile."""
    with shared(namespace, None) as epoch:
        registry, id = epoch.registry, running(epoch.registry)
        held = ExitStack()

        async def goes_on() -> WaitAllResult:
            wait = asyncio.ensure_future(registry.all_ended(RunId.new(), [id]))
            for _ in range(20):
                await asyncio.sleep(0.001)
            assert not wait.done()
            held.close()
            await asyncio.to_thread(registry.cancel_operation, id)
            return await wait

        with held:
            held.enter_context(held_writer(epoch.shared_segment()))
            for timeout in (0, 0.01):
                with pytest.raises(TimeoutError):
                    registry.wait_all(RunId.new(), [id], timeout)
            assert [each for each, _ in run(goes_on()).outcomes] == [id]


def test_one_barrier_at_a_time(registry: Registry, pool: ThreadPoolExecutor) -> None:
    id = running(registry)
    wait = pool.submit(registry.wait_all, RunId.new(), [id], DEADLINE_S)

    def refused() -> bool:
        try:
            registry.wait_all(RunId.new(), [], 0)
        except WaitAlreadyActive:
            return True
        return False

    eventually(refused)
    with pytest.raises(WaitAlreadyActive):
        run(registry.all_ended(RunId.new(), []))
    assert not wait.done()
    registry.mark_retired(id)
    assert len(wait.result(DEADLINE_S).outcomes) == 1
    assert registry.wait_all(RunId.new(), [id], 0).outcomes


@pytest.mark.parametrize("timeout", [0, 0.01, -1])
def test_a_barrier_that_timed_out_is_free(registry: Registry, timeout: float) -> None:
    id = running(registry)
    for _ in range(2):
        with pytest.raises(TimeoutError):
            registry.wait_all(RunId.new(), [id], timeout)
    registry.mark_retired(id)
    assert registry.wait_all(RunId.new(), [id], 0).outcomes


def test_whatever_a_barrier_raises_frees_it(registry: Registry) -> None:
    id = running(registry)
    for ids in ([OperationId.new()], [id, id]):
        with pytest.raises((NotFound, DuplicateWaitOperation)):
            registry.wait_all(RunId.new(), ids, 0)
    registry.mark_retired(id)
    assert registry.wait_all(RunId.new(), [id], 0).outcomes


def test_a_cancelled_barrier_is_free(registry: Registry) -> None:
    id = running(registry)

    async def main() -> WaitAllResult:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(registry.all_ended(RunId.new(), [id]), 0.01)
        wait = asyncio.ensure_future(registry.all_ended(RunId.new(), [id]))
        await asyncio.sleep(0)
        with pytest.raises(WaitAlreadyActive):
            await registry.all_ended(RunId.new(), [])
        wait.cancel()
        with pytest.raises(asyncio.CancelledError):
            await wait
        again = asyncio.ensure_future(registry.all_ended(RunId.new(), [id]))
        await asyncio.sleep(0)
        registry.mark_retired(id)
        return await again

    assert [each for each, _ in run(main()).outcomes] == [id]


def test_a_barrier_ends_with_the_epoch(epoch: Epoch, pool: ThreadPoolExecutor) -> None:
    id = running(epoch.registry)
    wait = pool.submit(epoch.registry.wait_all, RunId.new(), [id], DEADLINE_S)
    epoch.seal()
    with pytest.raises(EpochSealed):
        wait.result(DEADLINE_S)
    with pytest.raises(EpochSealed):
        epoch.registry.wait_all(RunId.new(), [id])
    assert epoch.registry.wait_all(RunId.new(), [], 0).outcomes == ()


def test_a_barrier_is_met_though_the_table_turned_over(
    make_epoch: MakeEpoch, pool: ThreadPoolExecutor
) -> None:
    registry = make_epoch(max_completed=1, max_operations=3).registry
    ids = [running(registry) for _ in range(2)]
    wait = pool.submit(registry.wait_all, RunId.new(), ids, DEADLINE_S)
    eventually(lambda: busy(registry))
    registry.complete_operation(ids[1], result(ids[1]))
    for _ in range(10):
        end(registry)
    registry.complete_operation(ids[0], result(ids[0]))
    assert [outcome for _, outcome in wait.result(DEADLINE_S).outcomes] == [
        Completed(result(id)) for id in ids
    ]


def busy(registry: Registry) -> bool:
    try:
        registry.wait_all(RunId.new(), [], 0)
    except WaitAlreadyActive:
        return True
    return False


# --- timeouts -------------------------------------------------------------------------------------

WAITS: dict[str, Callable[[Registry, OperationId, Any], object]] = {
    "watch": lambda registry, id, timeout: registry.register_watcher(id).wait(timeout),
    "wait_all": lambda registry, id, timeout: registry.wait_all(RunId.new(), [id], timeout),
    "feed": lambda registry, _, timeout: registry.completion_feed().wait_for_advance(
        registry.completion_feed().watermark(), timeout
    ),
}
every_wait = pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS)


@every_wait
@pytest.mark.parametrize("ended", [False, True])
def test_a_timeout_that_is_no_time_is_refused(
    registry: Registry, wait: Callable[[Registry, OperationId, Any], object], ended: bool
) -> None:
    id = running(registry)
    if ended:
        registry.complete_operation(id, result(id))
    for nan in (math.nan, np.float64("nan"), Decimal("nan")):
        with pytest.raises(ValueError, match="nan"):
            wait(registry, id, nan)
    for no_number in ("5", b"5", 1j, [], object()):
        with pytest.raises(TypeError, match="number of seconds"):
            wait(registry, id, no_number)


@every_wait
def test_numbers_of_every_kind_are_timeouts(
    registry: Registry, wait: Callable[[Registry, OperationId, Any], object]
) -> None:
    id = running(registry)
    for timeout in (
        *(0, -1, -math.inf, -(10**400), True, 0.001),
        *(np.int64(0), np.uint8(0), np.float64(0.001), np.float32(0.001), np.float64(-np.inf)),
        *(Decimal("0.001"), Fraction(1, 1000)),
    ):
        with pytest.raises(TimeoutError):
            wait(registry, id, timeout)


@every_wait
@pytest.mark.parametrize(
    "timeout", [math.inf, np.inf, 1e9, 1e18, 1e300, 10**30, 10**400, np.float64(1e300), None]
)
def test_a_very_long_timeout_is_no_limit(
    registry: Registry,
    pool: ThreadPoolExecutor,
    wait: Callable[[Registry, OperationId, Any], object],
    timeout: Any,
) -> None:
    id = running(registry)
    waiting = pool.submit(wait, registry, id, timeout)
    with pytest.raises(TimeoutError):
        waiting.result(0.01)
    registry.complete_operation(id, result(id))
    waiting.result(DEADLINE_S)


# --- interrupted ----------------------------------------------------------------------------------


class Interrupted(Exception):
    pass


def interrupt_at(line: int) -> Callable[..., Any]:
    """A trace function that raises at the n-th line of the modules that wait, as a signal handler
    may. It does not raise at the store that ends a turn: no handler runs before that."""
    files = {waits_module.__file__, waiting_module.__file__}
    left = line

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal left
        if frame.f_code.co_filename not in files:
            return None
        ends = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
        if event == "line" and ends != "turn.ended = True":
            left -= 1
            if left == 0:
                raise Interrupted
        return trace

    return trace


@pytest.mark.parametrize("call", ["wait_all", "all_ended"])
def test_a_barrier_that_is_interrupted_at_any_line_is_free_again(
    registry: Registry, call: str
) -> None:
    id = running(registry)

    def wait() -> object:
        if call == "all_ended":
            return run(registry.all_ended(RunId.new(), [id]))
        return registry.wait_all(RunId.new(), [id], DEADLINE_S)

    def interrupted(line: int) -> bool:
        sys.settrace(interrupt_at(line))
        try:
            wait()
        except Interrupted:
            return True
        finally:
            sys.settrace(None)
        return False

    registry.complete_operation(id, result(id))
    line = 1
    while interrupted(line):
        wait()
        line += 1
    assert line > 10


def test_a_child_that_is_forked_beside_a_barrier_has_one_of_its_own(
    registry: Registry, pool: ThreadPoolExecutor
) -> None:
    id = running(registry)
    waiting = pool.submit(registry.wait_all, RunId.new(), [id], DEADLINE_S)
    eventually(lambda: barrier_is_taken(registry))
    pid = os.fork()
    if pid == 0:
        try:
            registry.wait_all(RunId.new(), [], 1)
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert barrier_is_taken(registry)
    registry.complete_operation(id, result(id))
    waiting.result(DEADLINE_S)


def barrier_is_taken(registry: Registry) -> bool:
    try:
        registry.wait_all(RunId.new(), [])
    except WaitAlreadyActive:
        return True
    return False
