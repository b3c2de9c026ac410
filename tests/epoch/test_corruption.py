"""A segment with any content: every call ends, and an error names a field.

The header is checked at the attach. The rest changes all the time, and is checked when it is used.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Final

import pytest

from shmepoch import _native as at
from shmepoch.epoch.cursors import EpochCursorState
from shmepoch.epoch.operations import OperationProgressUpdate, OperationStatus
from shmepoch.errors import SegmentCorrupted
from shmepoch.ids import OperationId, RuntimeEpochId, SessionId
from shmepoch.memory.participants import Role
from shmepoch.memory.segment import Segment, SharedSegment
from tests.epoch.damage import (
    CONFIG,
    WORDS,
    calls,
    fill,
    in_a_child,
    make_calls,
    mutate,
)
from tests.epoch.operations import Registry, reach, result, spec


@dataclass
class Subject:
    """An epoch with something in every part of it, to be overwritten and put back."""

    segment: SharedSegment
    known: list[OperationId]
    image: bytes

    def put_back(self) -> None:
        assert os.pwrite(self.segment.fd, self.image, 0) == len(self.image)

    def use_up(self) -> int:
        """Attach in a child and make every call; returns how many raised `SegmentCorrupted`."""
        return in_a_child(lambda: use_up(self.segment.namespace, self.segment, self.known))


@pytest.fixture
def subject(namespace: str) -> Iterator[Subject]:
    segment = SharedSegment.allocate(
        namespace, CONFIG, session_id=SessionId.new(), epoch_id=RuntimeEpochId.new()
    )
    segment.join(Role.RUNTIME)
    segment.publish()
    known = fill(Registry(segment))
    yield Subject(segment, known, os.pread(segment.fd, segment.layout.size, 0))
    segment.unlink()
    segment.close()


def use_up(namespace: str, segment: SharedSegment, known: list[OperationId]) -> int:
    mine = SharedSegment.attach(namespace, segment.session_id)
    join: Callable[[], object] = partial(mine.join, Role.WORKER)
    return make_calls(chain([join], calls(mine, known)))


def test_nothing_is_found_wrong_with_what_is_right(subject: Subject) -> None:
    assert subject.use_up() == 0


def test_what_is_wrong_is_found(subject: Subject) -> None:
    """One word of each part, which some call must read."""
    layout = subject.segment.layout
    last = subject.segment.memory.load(at.WATERMARK_AT)
    for offset in (at.DROPPED_AT, layout.slot(0) + at.SLOT_SPEC, layout.index_word(last)):
        subject.put_back()
        subject.segment.memory.store(offset, 2**40 + 1)
        with pytest.raises(SegmentCorrupted) as found:
            Registry(subject.segment).check()
        error = found.value
        assert error.name == subject.segment.name
        assert error.field in str(error)
        assert repr(error.actual) in str(error)


def words_of_a_slot() -> dict[str, tuple[int, int]]:
    """The name of each fault, with the word and its wrong content."""
    return {
        "word's spare bits": (at.SLOT_WORD, 2**16 + 6),
        "birth": (at.SLOT_BIRTH, 2**63),
        "terminal_seq": (at.SLOT_TERMINAL_SEQ, 2**64 - 1),
        "participant's slot": (at.SLOT_PARTICIPANT, 2**8 + 2),
        "created_at_ms": (at.SLOT_CREATED_MS, 2**63),
        "created_mono_ns": (at.SLOT_CREATED_MONO, 2**63 + 1),
        "started": (at.SLOT_STARTED, 2**64 - 1),
        "spec_length": (at.SLOT_SPEC_LENGTHS, 2**63),
        "detail_length[0]": (at.SLOT_DETAIL_LENGTH, at.DETAIL_LIMIT + 1),
        "detail_length[1]": (at.SLOT_DETAIL_LENGTH + at.WORD, 2**63),
    }


@pytest.mark.parametrize("field", words_of_a_slot())
def test_a_word_of_a_slot_that_is_out_of_bounds_is_named(field: str) -> None:
    """By every reader: of one operation, of all, for a store, in a transition, in an audit."""
    segment = Segment.private(CONFIG)
    registry, memory = Registry(segment), segment.memory
    [*_, id] = fill(registry)
    offset, value = words_of_a_slot()[field]
    [slot] = [view.slot for view in registry._table.live() if view.spec.id == id]
    memory.store(segment.layout.slot(slot) + offset, value)
    readers: list[Callable[[], object]] = [
        registry.list_operations,
        partial(registry.capture_persistence_snapshot, segment.epoch_id, EpochCursorState(segment)),
        partial(registry.terminate_owner, "ended"),
        registry.check,
        partial(registry.snapshot, id),
        partial(registry.complete_operation, id, result(id)),
        partial(registry.report_progress, id, OperationProgressUpdate("on")),
    ]
    for read in readers:
        with pytest.raises(SegmentCorrupted) as found:
            read()
        assert found.value.field == f"slot[{slot}].{field}"


def test_an_id_that_is_not_that_of_its_fingerprint_is_found() -> None:
    segment = Segment.private(CONFIG)
    registry = Registry(segment)
    fill(registry)
    segment.memory.store(segment.layout.slot(0) + at.SLOT_ID + at.WORD, 7)
    with pytest.raises(SegmentCorrupted) as found:
        registry.check()
    assert found.value.field == "slot[0].fingerprint"


@pytest.mark.parametrize("field", words_of_a_slot())
def test_a_transition_that_finds_such_a_word_changes_nothing(field: str) -> None:
    """For every status of the operation: each transition checks the whole slot first."""
    acts: tuple[tuple[OperationStatus, Callable[[Registry, OperationId], object]], ...] = (
        (OperationStatus.PROVISIONING, Registry.provisioning_succeeded),
        (OperationStatus.PROVISIONING, lambda r, id: r.register_operation(spec(id=id))),
        (OperationStatus.RUNNING, partial(Registry.fail_operation, error="broke")),
        (OperationStatus.RUNNING, lambda r, _: r.terminate_owner("ended")),
        (OperationStatus.RUNNING, Registry.request_retire),
        (OperationStatus.RETIRING, Registry.register_watcher),
    )
    for status, act in acts:
        segment = Segment.private(CONFIG)
        registry, memory = Registry(segment), segment.memory
        id = reach(registry, status)
        slot, _ = registry.locate(id).place
        offset, value = words_of_a_slot()[field]
        at_word = segment.layout.slot(slot) + offset
        # Beyond its bound, and the status as it was.
        memory.store(at_word, memory.load(at_word) | (4 if offset == at.SLOT_WORD else value))
        before = bytes(memoryview(memory))
        with pytest.raises(SegmentCorrupted) as found:
            act(registry, id)
        assert found.value.field == f"slot[{slot}].{field}"
        assert bytes(memoryview(memory)) == before


def test_a_skipped_range_that_is_wrong_is_named() -> None:
    """Every search through retained sequences depends on that range."""
    for after, through in ((1, 0), (2**63, 0), (2**63 - 1, 4), (0, 6), (0, 2**64 - 1)):
        segment = Segment.private(CONFIG)
        registry = Registry(segment)
        fill(registry)
        segment.memory.store(at.SKIPPED_AT, after)
        segment.memory.store(at.SKIPPED_AT + at.WORD, through)
        readers: list[Callable[[], object]] = [
            registry.list_operations,
            registry.active_count,
            partial(registry.register_operation, spec()),
            registry.check,
        ]
        for read in readers:
            with pytest.raises(SegmentCorrupted) as found:
                read()
            assert found.value.field == "skipped_through"


def test_a_table_that_looks_full_is_not_written_beyond() -> None:
    segment = Segment.private(CONFIG)
    registry, layout = Registry(segment), segment.layout
    for slot in range(layout.slots):
        segment.memory.store(layout.fingerprint(slot), 1)
    before = bytes(memoryview(segment.memory))
    with pytest.raises(SegmentCorrupted) as found:
        registry.register_operation(spec())
    assert found.value.field == "free slots"
    assert bytes(memoryview(segment.memory)) == before


CONTROL: Final = {
    "agent_applied": at.CURSORS_AT,
    "runtime_observed": at.CURSORS_AT + at.LINE,
    "runtime_injected": at.CURSORS_AT + 2 * at.LINE,
    "watermark": at.WATERMARK_AT,
    "event": at.EVENT_AT,
    "doorbells": at.DOORBELLS_AT,
    "dropped_through": at.DROPPED_AT,
    "intent": at.INTENT_AT,
    "registrations": at.REGISTRATIONS_AT,
    "collected_through": at.COLLECTED_AT,
    "kept": at.KEPT_AT,
    "head": at.HEAD_AT,
    "joined": at.JOINED_AT,
    "durable_seq": at.DURABLE_AT,
    "repairs": at.REPAIRS_AT,
    "origin": at.ORIGIN_AT,
    "skipped_after": at.SKIPPED_AT,
    "skipped_through": at.SKIPPED_AT + at.WORD,
}


@pytest.mark.parametrize("name", list(CONTROL))
def test_a_word_of_the_control_lines(subject: Subject, name: str) -> None:
    for value in (0, *WORDS):
        subject.put_back()
        subject.segment.memory.store(CONTROL[name], value)
        subject.use_up()


@pytest.mark.parametrize(
    "word", [*range(0, 104, 8), at.SLOT_SPEC, at.SLOT_DETAIL, at.SLOT_WATCHERS]
)
def test_a_word_of_a_slot(subject: Subject, word: int) -> None:
    for slot in range(subject.segment.layout.slots):
        for value in (0, *WORDS[slot % 2 :: 2]):
            subject.put_back()
            subject.segment.memory.store(subject.segment.layout.slot(slot) + word, value)
            subject.use_up()


@pytest.mark.parametrize("part", ["participants", "fingerprints", "index", "records"])
def test_a_word_of_every_other_part(subject: Subject, part: str) -> None:
    layout = subject.segment.layout
    records = layout.records
    offsets = {
        "participants": range(at.PARTICIPANTS_AT, at.PARTICIPANTS_AT + 64, at.WORD),
        "fingerprints": range(layout.fingerprints, layout.fingerprints + 48, at.WORD),
        "index": range(layout.index, layout.index + 8 * at.WORD, at.WORD),
        "records": range(records, records + layout.feed_bytes, 50 * at.WORD),
    }
    for turn, offset in enumerate(offsets[part]):
        for value in (0, *WORDS[turn % 3 :: 3]):
            subject.put_back()
            subject.segment.memory.store(offset, value)
            subject.use_up()


@pytest.mark.parametrize("seed", range(6))
def test_garbage(subject: Subject, seed: int) -> None:
    """Random bytes over parts of the memory behind the control lines."""
    rng, layout = random.Random(seed), subject.segment.layout
    for _ in range(20):
        subject.put_back()
        for _ in range(rng.choice((1, 3, 30))):
            begin = rng.randrange(at.PARTICIPANTS_AT + 2 * at.PARTICIPANT_SIZE, layout.size)
            length = min(rng.choice((1, 8, 100, 4000)), layout.size - begin)
            os.pwrite(subject.segment.fd, rng.randbytes(length), begin)
        subject.use_up()


@pytest.mark.parametrize("seed", range(4))
def test_any_word_holds_anything(seed: int) -> None:
    assert mutate(seed, 120) > 0
