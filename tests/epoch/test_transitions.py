"""The native transitions: the same stores as word by word, and only where all is in order."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeAlias

import pytest
from msgspec.structs import replace

from shmepoch.epoch.registry import RuntimeOpsLifecycleRegistry
from shmepoch.errors import SegmentCorrupted
from shmepoch.ids import OperationId, RuntimeEpochId, SessionId
from shmepoch.memory import layout as at
from shmepoch.memory.layout import OpsLifecycleConfig
from shmepoch.memory.segment import Segment
from tests.epoch.implementations import StandIn
from tests.epoch.operations import UPDATE, Registry, end, result, spec

CONFIG = OpsLifecycleConfig(max_operations=4, max_completed=3, feed_bytes=at.PAGE + 8 * 1024)
SPEC = spec()
SESSION, EPOCH = SessionId.new(), RuntimeEpochId.new()


def epoch() -> tuple[Segment, Registry]:
    segment = Segment.private(CONFIG, session_id=SESSION, epoch_id=EPOCH)
    return segment, RuntimeOpsLifecycleRegistry(segment)


def without_a_word_by_word(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise AssertionError("not the native transition")

    for name in ("_enter", "_change", "_require_all", "_end_all"):
        monkeypatch.setattr(registry, name, refused)


def live(registry: Registry, n: int, moment: Callable[[int], None] = lambda _: None) -> None:
    """The n-th operation's life: every way through the native transitions, in turn."""
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
    """The lives of up to four operations, together as far as they go."""
    moment(0)
    count = 1 + n % 4
    ids = [OperationId.from_bytes((8 * n + i).to_bytes(16, "little")) for i in range(count)]
    registry.register_operations(
        replace(SPEC, id=id, display_name=f"number {n}" * (i * n % 7)) for i, id in enumerate(ids)
    )
    moment(n % 3)
    if n % 5 == 0 and count > 1:
        registry.cancel_operation(ids.pop(), None)
    registry.provisionings_succeeded(ids)
    moment(n % 11)
    ids.reverse()
    registry.complete_operations(result(id, "x" * (n * 37 % 700)) for id in ids)


Life: TypeAlias = Callable[[Registry, int, Callable[[int], None]], None]


@pytest.mark.parametrize("live", [live, live_together])
def test_both_leave_the_same_memory(live: Life, monkeypatch: pytest.MonkeyPatch) -> None:
    """Byte for byte, over several rounds of the table, the index ring and the byte ring."""
    now = begun = 1_700_000_000_000_000_000
    monkeypatch.setattr(time, "time_ns", lambda: now)
    monkeypatch.setattr(time, "monotonic_ns", lambda: now)

    def moment(ms: int) -> None:
        nonlocal now
        now = begun + ms * 1_000_000

    (native, one), (plain, other) = epoch(), epoch()
    stand_in: Any = StandIn(other._memory)
    other._memory = stand_in
    without_a_word_by_word(one, monkeypatch)
    for offset in (at.WITNESS_AT, at.WITNESS_AT + at.WORD, at.CREATED_AT):
        plain.memory.store(offset, native.memory.load(offset))
    size = native.layout.size
    for n in range(1, 5_001):
        begun += 100_000_000
        live(one, n, moment)
        live(other, n, moment)
        if n < 100 or n % 100 == 0:
            assert native.memory.read(0, size) == plain.memory.read(0, size), f"after {n}"
    assert native.memory.load(at.DROPPED_AT) > 3_000
    one.check()


@pytest.mark.parametrize("live", [live, live_together])
def test_the_common_case_is_native(live: Life, monkeypatch: pytest.MonkeyPatch) -> None:
    _, registry = epoch()
    without_a_word_by_word(registry, monkeypatch)
    for n in range(1, 50):
        live(registry, n, lambda _: None)
    registry.check()


#: What a writer that was killed, or a fault, leaves behind.
LEFT: dict[str, Callable[[Segment], None]] = {
    "nothing": lambda _: None,
    "an ending that was not committed": lambda s: s.memory.store(
        s.layout.slot(0) + at.SLOT_TERMINAL_SEQ, 1
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
        lambda: registry.provisionings_succeeded([each.id for each in several]),
        lambda: registry.complete_operations([result(each.id) for each in several]),
    )
    for act in acts:
        LEFT[left](segment)
        segment.memory.store(at.INTENT_AT, 1)
        act()
        assert segment.memory.load(at.INTENT_AT) == 0
        registry.check()
    assert registry.completion_feed().watermark() == 3


@pytest.mark.parametrize(
    ("offset", "value"),
    [
        (at.WATERMARK_AT, 2**63),
        (at.DROPPED_AT, 2),
        (at.COLLECTED_AT, 2),
        (at.RECLAIMED_AT, 2),
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
        lambda: registry.provisionings_succeeded([id]),
        lambda: registry.complete_operations([result(id)]),
    )
    for act in acts:
        with pytest.raises(SegmentCorrupted):
            act()
    assert segment.memory.read(0, segment.layout.size) == before


def test_none_starts_alone_though_the_clock_was_set_back(monkeypatch: pytest.MonkeyPatch) -> None:
    _, registry = epoch()
    specs = [spec(), spec()]
    for each, second in zip(specs, (1_000, 3_000), strict=True):
        monkeypatch.setattr(time, "time_ns", lambda ms=second * 1_000: ms * 1_000_000)
        registry.register_operation(each)
    monkeypatch.setattr(time, "time_ns", lambda: 2_000_000 * 1_000_000)
    registry.provisionings_succeeded([each.id for each in specs])
    found = [registry.snapshot(each.id) for each in specs]
    assert [one and one.started_at_ms for one in found] == [2_000_000, 3_000_000]


def one_by_one(registry: Registry, id: OperationId) -> None:
    registry.provisioning_succeeded(id)
    registry.complete_operation(id, result(id))


def together(registry: Registry, id: OperationId) -> None:
    registry.provisionings_succeeded([id])
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


class Interrupting(StandIn):
    """A memory that is interrupted before it commits a registration, once."""

    _interrupted = False

    def store(self, offset: int, value: int) -> None:
        if offset == at.REGISTRATIONS_AT and not self._interrupted:
            self._interrupted = True
            raise KeyboardInterrupt
        self._memory.store(offset, value)


def test_a_registration_that_was_interrupted_is_not_remembered() -> None:
    """Its number goes to the next one, which is another operation."""
    segment, registry = epoch()
    interrupting: Any = Interrupting(segment.memory)
    registry._memory = interrupting
    with pytest.raises(KeyboardInterrupt):
        registry.register_operation(spec("first"))
    second = spec("second")
    RuntimeOpsLifecycleRegistry(segment).register_operation(second)
    found = registry.snapshot(second.id)
    assert found is not None
    assert found.display_name == "second"


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


class Overtaken(StandIn):
    """Between its first look at a counter and the next, an operation is registered and ends."""

    def __init__(self, segment: Segment) -> None:
        super().__init__(segment.memory)
        self._others = [RuntimeOpsLifecycleRegistry(segment)]

    def load(self, offset: int) -> int:
        value = self._memory.load(offset)
        if offset == at.REGISTRATIONS_AT and self._others:
            end(self._others.pop())
        return value


def test_operations_are_counted_at_one_moment() -> None:
    segment, registry = epoch()
    registry.register_operation(spec())
    overtaken: Any = Overtaken(segment)
    registry._memory = registry._table._memory = overtaken
    assert registry.active_count() == 1
