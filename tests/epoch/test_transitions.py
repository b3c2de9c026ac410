"""The common first steps of all transitions, and their use of the clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeAlias

import pytest
from msgspec.structs import replace

from shmepoch import _native as at
from shmepoch.config import OpsLifecycleConfig
from shmepoch.epoch.registry import RuntimeOpsLifecycleRegistry
from shmepoch.errors import SegmentCorrupted
from shmepoch.ids import OperationId, RuntimeEpochId, SessionId
from shmepoch.memory.segment import Segment
from tests.epoch.operations import UPDATE, Registry, result, spec

CONFIG = OpsLifecycleConfig(max_operations=4, max_completed=3, feed_bytes=at.PAGE + 8 * 1024)
SPEC = spec()
SESSION, EPOCH = SessionId.new(), RuntimeEpochId.new()


def epoch() -> tuple[Segment, Registry]:
    segment = Segment.private(CONFIG, session_id=SESSION, epoch_id=EPOCH)
    return segment, RuntimeOpsLifecycleRegistry(segment)


def live(registry: Registry, n: int, moment: Callable[[int], None] = lambda _: None) -> None:
    """The life of the n-th operation; all paths through the native transitions, in turn."""
    moment(0)
    id = OperationId.from_bytes(n.to_bytes(16, "little"))
    registry.register_operation(replace(SPEC, id=id, display_name=f"number {n}" * (n % 7)))
    moment(n % 3)
    if n % 5 == 0:
        registry.cancel_operation(id, None)
        return
    registry.provisioning_succeeded(id)
    moment(n % 11)
    if n % 5 == 1:
        registry.fail_operation(id, "broke")
    else:
        registry.complete_operation(id, result(id, "x" * (n * 37 % 1200)))


def live_together(
    registry: Registry, n: int, moment: Callable[[int], None] = lambda _: None
) -> None:
    """The lives of up to four operations, in batches as far as possible."""
    moment(0)
    count = 1 + n % 4
    ids = [OperationId.from_bytes((8 * n + i).to_bytes(16, "little")) for i in range(count)]
    registry.register_operations(
        replace(SPEC, id=id, display_name=f"number {n}" * (i * n % 7)) for i, id in enumerate(ids)
    )
    moment(n % 3)
    if n % 5 == 0 and count > 1:
        registry.cancel_operation(ids.pop(), None)
    registry.start_operations(ids)
    moment(n % 11)
    ids.reverse()
    registry.complete_operations(result(id, "x" * (n * 37 % 700)) for id in ids)


Life: TypeAlias = Callable[[Registry, int, Callable[[int], None]], None]


@pytest.mark.parametrize("live", [live, live_together])
def test_the_table_and_both_rings_turn_over(live: Life) -> None:
    segment, registry = epoch()
    for n in range(1, 3_001):
        live(registry, n, lambda _: None)
        if n % 300 == 0:
            registry.check()
    assert segment.memory.load(at.DROPPED_AT) > 2_000


#: States that a killed writer, or a fault, leaves behind.
LEFT: dict[str, Callable[[Segment], None]] = {
    "nothing": lambda _: None,
    "an ending that was not committed": lambda s: s.memory.store(
        s.layout.slot(0) + at.SLOT_TERMINAL_SEQ, s.memory.load(at.WATERMARK_AT) + 1
    ),
    "a registration that was not committed": lambda s: s.memory.store(
        s.layout.slot(s.layout.slots - 1) + at.SLOT_BIRTH, s.memory.load(at.REGISTRATIONS_AT) + 1
    ),
}


@pytest.mark.parametrize("left", LEFT)
def test_what_was_left_behind_is_repaired_first(left: str) -> None:
    segment, registry = epoch()
    id, other = OperationId.new(), OperationId.new()
    several = spec(), spec()
    registry.register_operation(spec(id=id))
    acts: tuple[Callable[[], None], ...] = (
        lambda: registry.provisioning_succeeded(id),
        lambda: registry.register_operation(spec(id=other)),
        lambda: registry.complete_operation(id, result(id)),
        lambda: registry.register_operations([several[0], several[1]]),
        lambda: registry.start_operations([each.id for each in several]),
        lambda: registry.complete_operations([result(each.id) for each in several]),
    )
    for count, act in enumerate(acts, 1):
        LEFT[left](segment)
        segment.memory.store(at.INTENT_AT, 1)
        act()
        assert segment.memory.load(at.INTENT_AT) == 0
        assert segment.memory.load(at.REPAIRS_AT) == count
        registry.check()
    assert registry.completion_feed().watermark() == 3


@pytest.mark.parametrize(
    ("offset", "value"),
    [
        (at.WATERMARK_AT, 2**63),
        (at.DROPPED_AT, 2),
        (at.COLLECTED_AT, 2),
        (at.ORIGIN_AT, 2),
        (at.REGISTRATIONS_AT, 0),
        (at.REGISTRATIONS_AT, 99),
    ],
)
def test_words_that_contradict_each_other_stop_every_transition(offset: int, value: int) -> None:
    segment, registry = epoch()
    live(registry, 2)
    id = OperationId.new()
    registry.register_operation(spec(id=id))
    segment.memory.store(offset, value)
    before = segment.memory.read(0, segment.layout.size)
    acts: tuple[Callable[[], None], ...] = (
        lambda: registry.provisioning_succeeded(id),
        lambda: registry.register_operation(spec()),
        lambda: registry.fail_operation(id, "broke"),
        lambda: registry.register_operations([spec(), spec()]),
        lambda: registry.start_operations([id]),
        lambda: registry.complete_operations([result(id)]),
    )
    for act in acts:
        with pytest.raises(SegmentCorrupted):
            act()
    assert segment.memory.read(0, segment.layout.size) == before


def test_what_is_dropped_is_not_behind_the_whole_index() -> None:
    segment, registry = epoch()
    for n in range(segment.layout.entries + 1):
        live(registry, n)
    segment.memory.store(at.DROPPED_AT, 0)
    with pytest.raises(SegmentCorrupted) as found:
        registry.register_operation(spec())
    assert found.value.field == "dropped_through"


def test_none_starts_alone_though_the_clock_was_set_back(monkeypatch: pytest.MonkeyPatch) -> None:
    _, registry = epoch()
    specs = [spec(), spec()]
    for each, second in zip(specs, (1_000, 3_000), strict=True):
        monkeypatch.setattr(time, "time_ns", lambda ms=second * 1_000: ms * 1_000_000)
        registry.register_operation(each)
    monkeypatch.setattr(time, "time_ns", lambda: 2_000_000 * 1_000_000)
    registry.start_operations([each.id for each in specs])
    found = [registry.snapshot(each.id) for each in specs]
    assert [one and one.started_at_ms for one in found] == [2_000_000, 3_000_000]


def one_by_one(registry: Registry, id: OperationId) -> None:
    registry.provisioning_succeeded(id)
    registry.complete_operation(id, result(id))


def together(registry: Registry, id: OperationId) -> None:
    registry.start_operations([id])
    registry.complete_operations([result(id)])


@pytest.mark.parametrize("act", [one_by_one, together])
def test_a_clock_that_was_set_back_does_not_turn_time_round(
    act: Callable[[Registry, OperationId], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, registry = epoch()
    id = OperationId.new()
    later, earlier = 2_000_000_000_000_000_000, 1_000_000_000_000_000_000
    monkeypatch.setattr(time, "time_ns", lambda: later)
    registry.register_operation(spec(id=id))
    monkeypatch.setattr(time, "time_ns", lambda: earlier)
    act(registry, id)
    found = registry.snapshot(id)
    assert found is not None
    assert found.created_at_ms == found.started_at_ms == found.completed_at_ms


def test_what_changed_since_registration_is_kept() -> None:
    _, registry = epoch()
    id = OperationId.new()
    registry.register_operation(spec(id=id))
    registry.provisioning_succeeded(id)
    registry.report_progress(id, UPDATE)
    registry.complete_operation(id, result(id))
    found = registry.snapshot(id)
    assert found is not None
    assert (found.progress_count, found.last_progress) == (1, UPDATE)
