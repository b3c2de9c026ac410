"""Retention: how long a registry and its feed keep operations and entries."""

from __future__ import annotations

import pytest

from shmepoch import _native as at
from shmepoch.config import OpsLifecycleConfig
from shmepoch.epoch.completions import CompletionFeedGap
from shmepoch.epoch.operations import Action, Cancelled, Completed, OperationStatus, Terminated
from shmepoch.errors import NotFound
from shmepoch.ids import OperationId
from tests.epoch.conftest import MakeEpoch
from tests.epoch.operations import VERBS, Registry, end, reach, result, size_of


def held(registry: Registry) -> list[OperationId]:
    return [snapshot.id for snapshot in registry.list_operations()]


def test_the_oldest_terminal_operation_is_evicted_first(make_epoch: MakeEpoch) -> None:
    registry = make_epoch(max_completed=3).registry
    live = reach(registry, OperationStatus.RUNNING)
    ended: list[OperationId] = []
    for _ in range(8):
        ended.append(end(registry))
        assert held(registry) == [live, *ended[-3:]]
    for id in ended[:-3]:
        assert registry.snapshot(id) is None
    feed = registry.completion_feed()
    assert [entry.operation_id for entry in feed.list_since(0).entries] == ended


def test_by_default_256_are_retained(make_epoch: MakeEpoch) -> None:
    registry = make_epoch().registry
    ended = [end(registry) for _ in range(258)]
    assert set(held(registry)) == set(ended[2:])


@pytest.mark.parametrize("action", [a for a in Action if a is not Action.TERMINATE_OWNER])
def test_an_evicted_operation_is_unknown(make_epoch: MakeEpoch, action: Action) -> None:
    registry = make_epoch(max_completed=1).registry
    first = reach(registry, OperationStatus.COMPLETED)
    end(registry)
    with pytest.raises(NotFound):
        VERBS[action](registry, first)


def test_an_operation_that_lives_long_is_not_evicted(make_epoch: MakeEpoch) -> None:
    registry = make_epoch(max_completed=1, max_operations=2).registry
    live = reach(registry, OperationStatus.RETIRING)
    for _ in range(20):
        end(registry)
    registry.mark_retired(live)
    assert held(registry) == [live]


def test_operations_that_end_together_may_be_more_than_are_retained(
    make_epoch: MakeEpoch,
) -> None:
    registry = make_epoch(max_completed=2).registry
    ids = [reach(registry, OperationStatus.RUNNING) for _ in range(5)]
    registry.terminate_owner("owner ended")
    assert held(registry) == ids[3:]
    assert [id for id, _ in registry.collect_completed()] == ids[3:]
    assert len(registry.completion_feed().list_since(0).entries) == 5


def test_collecting_drains_in_the_order_of_completion(make_epoch: MakeEpoch) -> None:
    registry = make_epoch().registry
    ids = [reach(registry, OperationStatus.RUNNING) for _ in range(4)]
    assert registry.collect_completed() == []
    registry.complete_operation(ids[2], result(ids[2]))
    registry.cancel_operation(ids[0], "unwanted")
    before = registry.completion_feed().list_since(0)
    assert registry.collect_completed() == [
        (ids[2], Completed(result(ids[2]))),
        (ids[0], Cancelled("unwanted")),
    ]
    assert registry.collect_completed() == []
    assert set(held(registry)) == {ids[1], ids[3]}
    assert registry.completion_feed().list_since(0) == before
    with pytest.raises(NotFound):
        registry.request_retire(ids[0])
    registry.terminate_owner("owner ended")
    assert registry.collect_completed() == [
        (ids[1], Terminated("owner ended")),
        (ids[3], Terminated("owner ended")),
    ]


def test_only_what_is_retained_is_collected(make_epoch: MakeEpoch) -> None:
    registry = make_epoch(max_completed=2).registry
    ended = [end(registry) for _ in range(5)]
    assert [id for id, _ in registry.collect_completed()] == ended[3:]
    later = end(registry)
    assert held(registry) == [later]
    assert [id for id, _ in registry.collect_completed()] == [later]


def test_a_feed_keeps_1024_entries_at_least(make_epoch: MakeEpoch) -> None:
    registry = make_epoch(max_completed=1, max_operations=1, feed_bytes=2**19).registry
    kept = at.MIN_FEED_ENTRIES + at.RECOVERY_SKIP
    assert kept >= 1024
    ended = [end(registry) for _ in range(kept)]
    feed = registry.completion_feed()
    assert feed.list_since(0).dropped_through == 0
    assert [entry.operation_id for entry in feed.list_since(0).entries] == ended
    ended += [end(registry) for _ in range(3)]
    batch = feed.list_since(0)
    assert batch.dropped_through == 3
    assert [entry.operation_id for entry in batch.entries] == ended[3:]
    assert batch.gap_after(0) == CompletionFeedGap(0, 3)
    assert batch.gap_after(2) == CompletionFeedGap(2, 3)
    assert batch.gap_after(3) is None


def test_a_feed_of_the_default_size_keeps_1024_short_entries(make_epoch: MakeEpoch) -> None:
    registry = make_epoch().registry
    for _ in range(1024):
        end(registry)
    assert len(registry.completion_feed().list_since(0).entries) == 1024


def test_a_feed_keeps_four_times_what_the_registry_does() -> None:
    registry = Registry.with_config(
        OpsLifecycleConfig(max_completed=300, max_operations=1, feed_bytes=2**20)
    )
    kept = 4 * 300 + at.RECOVERY_SKIP
    for _ in range(kept + 1):
        end(registry)
    batch = registry.completion_feed().list_since(0)
    assert (len(batch.entries), batch.dropped_through) == (kept, 1)
    registry.check()


def test_a_feed_keeps_what_its_bytes_hold(make_epoch: MakeEpoch) -> None:
    budget = at.PAGE + 2 * at.SPEC_LIMIT
    registry = make_epoch(max_operations=1, feed_bytes=budget).registry
    feed = registry.completion_feed()
    sizes: dict[int, int] = {}
    for turn in range(100):
        end(registry, "r" * (turn * 37 % 900))
        sizes[turn + 1] = size_of(registry, turn + 1)
        batch = feed.list_since(0)
        kept = [entry.seq for entry in batch.entries]
        assert kept == list(range(batch.dropped_through + 1, batch.watermark + 1))
        assert sum(sizes[seq] for seq in kept) <= budget
        if batch.dropped_through:  # and not one less than they hold
            assert sizes[batch.dropped_through] + sum(sizes[seq] for seq in kept) > budget
        registry.check()
    assert batch.dropped_through > 0


def test_entries_that_fill_the_ring_exactly_are_all_kept(make_epoch: MakeEpoch) -> None:
    budget = at.PAGE + 2 * at.SPEC_LIMIT
    registry = make_epoch(max_operations=1, feed_bytes=budget).registry
    feed = registry.completion_feed()
    end(registry, "r" * 304)
    around = size_of(registry, 1) - 304
    half = "r" * (budget // 2 - around)
    for _ in range(5):
        end(registry, half)
        end(registry, half)
        batch = feed.list_since(0)
        assert [size_of(registry, entry.seq) for entry in batch.entries] == [budget // 2] * 2
        registry.check()
    end(registry, half[:-8])
    assert len(feed.list_since(0).entries) == 2


def test_what_the_feed_dropped_is_not_retained_either(make_epoch: MakeEpoch) -> None:
    registry = make_epoch(max_operations=1, feed_bytes=at.PAGE + 2 * at.SPEC_LIMIT).registry
    ended = [end(registry, "r" * 2000) for _ in range(4)]
    batch = registry.completion_feed().list_since(0)
    kept = [entry.operation_id for entry in batch.entries]
    assert kept == ended[batch.dropped_through :]
    assert 0 < len(kept) < 4
    assert held(registry) == kept
    assert [id for id, _ in registry.collect_completed()] == kept
