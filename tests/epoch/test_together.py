"""Several operations that are registered, started or completed in one call: all, or none."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import pytest
from msgspec.structs import replace

from shmepoch import _native as at
from shmepoch.epoch.operations import Action, Completed, OperationKind, OperationStatus
from shmepoch.errors import (
    AlreadyRegistered,
    EpochSealed,
    InvalidTransition,
    MaxConcurrentExceeded,
    NotFound,
    PayloadTooLarge,
    RecordInvalid,
)
from shmepoch.ids import OperationId, RunId
from tests.epoch.conftest import MakeEpoch
from tests.epoch.deadline import DEADLINE_S
from tests.epoch.implementations import Epoch
from tests.epoch.operations import CHILD, UPDATE, Registry, reach, result, spec, state, taken

RUNNING: Final = OperationStatus.RUNNING


def registered(registry: Registry, count: int) -> list[OperationId]:
    specs = [spec(f"number {n}") for n in range(count)]
    registry.register_operations(specs)
    return [each.id for each in specs]


def running(registry: Registry, count: int) -> list[OperationId]:
    ids = registered(registry, count)
    registry.start_operations(ids)
    return ids


# --- effects ------------------------------------------------------------------------------------


def test_operations_live_together(registry: Registry) -> None:
    ids = registered(registry, 10)
    assert {taken(registry, id).status for id in ids} == {OperationStatus.PROVISIONING}
    assert [taken(registry, id).display_name for id in ids] == [f"number {n}" for n in range(10)]
    assert registry.active_count() == 10

    registry.start_operations(ids[:7])
    assert [taken(registry, id).status is RUNNING for id in ids] == [True] * 7 + [False] * 3
    for id in ids[:7]:
        found = taken(registry, id)
        assert found.started_at_ms is not None
        assert found.started_at_ms >= found.created_at_ms

    results = [result(id, f"of {id}") for id in reversed(ids[:7])]
    registry.complete_operations(results)
    entries = registry.completion_feed().list_since(0).entries
    assert [entry.terminal_outcome for entry in entries] == [Completed(one) for one in results]
    assert [entry.operation_id for entry in entries] == [one.id for one in results]
    assert [entry.seq for entry in entries] == list(range(1, 8))
    assert registry.active_count() == 3
    for one in results:
        assert taken(registry, one.id).terminal_outcome == Completed(one)


def test_the_order_is_that_of_the_call(registry: Registry) -> None:
    first, last = spec("z"), spec("a")
    registry.register_operations([first, last])
    registry.terminate_owner("over")
    entries = registry.completion_feed().list_since(0).entries
    assert [entry.operation_id for entry in entries] == [first.id, last.id]


def test_each_keeps_what_is_its_own(registry: Registry) -> None:
    child, tool = spec("child", kind=CHILD), spec("tool")
    registry.register_operations([child, tool])
    registry.start_operations([tool.id, child.id])
    registry.report_progress(tool.id, UPDATE)
    registry.request_retire(child.id)
    registry.complete_operations([result(child.id, "c"), result(tool.id, "t")])
    entries = registry.completion_feed().list_since(0).entries
    assert [(entry.kind, entry.display_name) for entry in entries] == [
        (CHILD, "child"),
        (OperationKind.BACKGROUND_TOOL_OP, "tool"),
    ]
    assert taken(registry, tool.id).last_progress == UPDATE
    started = [taken(registry, one.id).started_at_ms for one in (child, tool)]
    assert None not in started


def test_anything_that_can_be_gone_through_once(registry: Registry) -> None:
    specs = [spec() for _ in range(3)]
    registry.register_operations(each for each in specs)
    registry.start_operations({each.id: each for each in specs})
    registry.complete_operations(map(result, [each.id for each in specs]))
    assert registry.completion_feed().watermark() == 3


def test_none_at_all(registry: Registry) -> None:
    running(registry, 2)
    before = state(registry)
    registry.register_operations([])
    registry.start_operations([])
    registry.complete_operations([])
    assert state(registry) == before


def test_the_table_turns_over(make_epoch: MakeEpoch) -> None:
    registry = make_epoch(max_operations=6, max_completed=3, feed_bytes=at.PAGE + 24_576).registry
    ended: list[OperationId] = []
    for n in range(200):
        ids = running(registry, 1 + n % 6)
        registry.complete_operations([result(id, "x" * (n * 37 % 900)) for id in ids])
        registry.check()
        ended += ids
        assert {found.id for found in registry.list_operations()} == set(ended[-3:])
    batch = registry.completion_feed().list_since(0)
    assert [entry.operation_id for entry in batch.entries] == ended[batch.dropped_through :]
    assert batch.dropped_through > 0


def test_who_waits_gets_them_together(registry: Registry) -> None:
    ids = running(registry, 5)
    watch = registry.register_watcher(ids[3])
    feed = registry.completion_feed()
    with ThreadPoolExecutor() as pool:
        seen = pool.submit(feed.wait_for_advance, 0, DEADLINE_S)
        every = pool.submit(registry.wait_all, RunId.new(), ids, DEADLINE_S)
        registry.complete_operations([result(id) for id in ids])
        assert seen.result() == 5, "one commit: nobody sees a part of it"
        assert [outcome for _, outcome in every.result().outcomes] == [
            Completed(result(id)) for id in ids
        ]
    assert watch.wait(0) == Completed(result(ids[3]))


# --- refusals change nothing ----------------------------------------------------------------------


def refused(registry: Registry, error: type[Exception], act: Callable[[], None]) -> Any:
    before = state(registry)
    with pytest.raises(error) as raised:
        act()
    assert state(registry) == before
    return raised.value


def test_one_that_is_there_already(registry: Registry) -> None:
    there = reach(registry, RUNNING)
    specs = [spec(), spec(), spec(id=there)]
    error = refused(registry, AlreadyRegistered, lambda: registry.register_operations(specs))
    assert error.id == there
    registry.register_operations(specs[:2])


def test_one_that_is_registered_twice(registry: Registry) -> None:
    once, twice = spec(), spec()
    specs = [once, twice, replace(twice, display_name="again")]
    error = refused(registry, AlreadyRegistered, lambda: registry.register_operations(specs))
    assert error.id == twice.id


@pytest.mark.parametrize("setting", ["max_concurrent", "max_operations"])
def test_more_than_there_is_room_for(make_epoch: MakeEpoch, setting: str) -> None:
    sizes = {"max_operations": 5} if setting == "max_operations" else {"max_concurrent": 5}
    registry = make_epoch(**sizes).registry
    registered(registry, 2)
    error = refused(registry, MaxConcurrentExceeded, lambda: registered_four(registry))
    assert (error.limit, error.active, error.entering) == (5, 2, 4)
    assert "4 were to be registered together" in str(error)
    assert f"a larger {setting}" in str(error)
    registered(registry, 3)
    assert registry.active_count() == 5


def registered_four(registry: Registry) -> None:
    registered(registry, 4)


@pytest.mark.parametrize(
    ("broken", "error"),
    [
        (spec("n" * 500), PayloadTooLarge),
        (spec("\ud800"), RecordInvalid),
        ("work", RecordInvalid),
    ],
    ids=["too long", "no text", "no spec"],
)
def test_a_spec_that_cannot_be_held(
    registry: Registry, broken: Any, error: type[Exception]
) -> None:
    refused(registry, error, lambda: registry.register_operations([spec(), broken]))


@pytest.mark.parametrize("last", ["unknown", "running", "twice", "ended"])
def test_one_that_cannot_start(registry: Registry, last: str) -> None:
    ids = registered(registry, 3)
    wrong, error, status = {
        "unknown": (OperationId.new(), NotFound, None),
        "running": (reach(registry, RUNNING), InvalidTransition, RUNNING),
        "twice": (ids[0], InvalidTransition, RUNNING),
        "ended": (reach(registry, OperationStatus.FAILED), InvalidTransition, "failed"),
    }[last]
    raised = refused(registry, error, lambda: registry.start_operations([*ids, wrong]))
    assert raised.id == wrong
    if status is not None:
        assert (raised.status, raised.action) == (status, Action.PROVISIONING_SUCCEEDED)
    registry.start_operations(ids)


@pytest.mark.parametrize("last", ["unknown", "provisioning", "twice", "ended"])
def test_one_that_cannot_be_completed(registry: Registry, last: str) -> None:
    ids = running(registry, 3)
    provisioning = OperationStatus.PROVISIONING
    wrong, error, status = {
        "unknown": (OperationId.new(), NotFound, None),
        "provisioning": (reach(registry, provisioning), InvalidTransition, provisioning),
        "twice": (ids[0], InvalidTransition, "completed"),
        "ended": (reach(registry, OperationStatus.CANCELLED), InvalidTransition, "cancelled"),
    }[last]
    results = [result(id) for id in [*ids, wrong]]
    raised = refused(registry, error, lambda: registry.complete_operations(results))
    assert raised.id == wrong
    if status is not None:
        assert (raised.status, raised.action) == (status, Action.COMPLETE_OPERATION)
    registry.complete_operations(results[:3])


@pytest.mark.parametrize(
    "broken",
    [
        lambda id: result(id, "\ud800"),
        lambda id: replace(result(id), duration_ms=-1),
        lambda id: replace(result(id), id=str(id)),
        lambda id: str(id),
    ],
    ids=["no text", "no duration", "no id", "no result"],
)
def test_a_result_that_could_not_be_read_back(
    registry: Registry, broken: Callable[[OperationId], Any]
) -> None:
    one, other = running(registry, 2)
    results = [result(one), broken(other)]
    error = refused(registry, RecordInvalid, lambda: registry.complete_operations(results))
    assert error.kind in ("OperationResult", "Completed")


def test_they_fit_together_or_not_at_all(make_epoch: MakeEpoch) -> None:
    limit = at.PAGE + 4 * 2 * at.SPEC_LIMIT
    registry = make_epoch(max_operations=4, feed_bytes=limit).registry
    ids = running(registry, 4)

    def complete(size: int) -> None:
        registry.complete_operations([result(id, "x" * size) for id in ids])

    error = refused(registry, PayloadTooLarge, lambda: complete(limit // 4))
    assert error.limit == limit < error.size
    assert "the outcome of 4 operations together" in str(error)
    complete(limit // 4 - 300)
    assert len(registry.completion_feed().list_since(0).entries) == 4


def test_a_sealed_epoch_refuses_all_three(epoch: Epoch) -> None:
    registry = epoch.registry
    provisioning, ids = registered(registry, 2), running(registry, 2)
    epoch.seal()
    for act in (
        lambda: registered_four(registry),
        lambda: registry.start_operations(provisioning),
        lambda: registry.complete_operations([result(id) for id in ids]),
        lambda: registry.complete_operations([]),
    ):
        refused(registry, EpochSealed, act)
