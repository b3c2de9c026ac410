"""A segment that holds anything at all: every call ends, and with an error that names a field.

The header is checked when a segment is attached; what lies behind it changes all the time, and is
checked when it is used.
"""

from __future__ import annotations

import os
import random
import signal
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Final

import pytest

from shmepoch.epoch.cursors import EpochCursorState
from shmepoch.epoch.operations import OperationProgressUpdate, OperationStatus
from shmepoch.errors import SegmentCorrupted, ShmepochError
from shmepoch.ids import OperationId, RunId, RuntimeEpochId, SessionId
from shmepoch.memory import layout as at
from shmepoch.memory.layout import OpsLifecycleConfig
from shmepoch.memory.participants import Role
from shmepoch.memory.segment import SharedSegment
from tests.epoch.operations import Registry, end, reach, result, spec

CONFIG: Final = OpsLifecycleConfig(
    max_operations=4, max_completed=2, feed_bytes=at.PAGE + 4 * 1024, max_participants=2
)

#: What a word may hold that no writer put there.
WORDS: Final = (1, 2, 7, 2**16, 2**31, 2**32 - 1, 2**32 + 1, 2**48, 2**63 - 1, 2**63, 2**64 - 1)

#: Seconds of processor time that no call needs; a child that takes them was in an endless loop.
PROCESSOR_LIMIT_S: Final = 5


@dataclass
class Subject:
    """An epoch with something in every part of it, to be overwritten and put back."""

    segment: SharedSegment
    known: list[OperationId]
    image: bytes

    def put_back(self) -> None:
        assert os.pwrite(self.segment.fd, self.image, 0) == len(self.image)

    def use_up(self) -> int:
        """Attach in a child and make every call; how many raised `SegmentCorrupted` there."""
        return in_a_child(lambda: use_up(self.segment.namespace, self.segment, self.known))


@pytest.fixture
def subject(namespace: str) -> Iterator[Subject]:
    segment = SharedSegment.allocate(
        namespace, CONFIG, session_id=SessionId.new(), epoch_id=RuntimeEpochId.new()
    )
    segment.join(Role.RUNTIME)
    segment.publish()
    registry = Registry(segment)
    for turn in range(5):
        end(registry, "r" * 900 * turn)
    for status in (OperationStatus.PROVISIONING, OperationStatus.RUNNING, OperationStatus.RETIRING):
        reach(registry, status)
    known = [operation.id for operation in registry.list_operations()]
    yield Subject(segment, known, os.pread(segment.fd, segment.layout.size, 0))
    segment.unlink()
    segment.close()


def calls(segment: SharedSegment, known: list[OperationId]) -> Iterator[Callable[[], object]]:
    """Every public look at an epoch, then every way to change it."""
    registry, cursors = Registry(segment), EpochCursorState(segment)
    feed = registry.completion_feed()
    yield from (
        feed.watermark,
        lambda: feed.list_since(0),
        lambda: feed.list_since(4),
        lambda: feed.wait_for_advance(0, 0),
        cursors.snapshot,
        registry.active_count,
        registry.list_operations,
        lambda: registry.capture_persistence_snapshot(segment.epoch_id, cursors),
        lambda: segment.participants.list(me=segment.participant),
        registry.check,
    )
    for id in known:
        yield from (
            partial(registry.snapshot, id),
            partial(watch, registry, id),
            partial(registry.report_progress, id, OperationProgressUpdate("on")),
            partial(registry.request_retire, id),
            partial(registry.wait_all, RunId.new(), [id], 0),
            partial(registry.complete_operation, id, result(id)),
        )
    yield from (
        lambda: registry.register_operation(spec()),
        lambda: cursors.agent_applied_cursor.advance(5),
        registry.collect_completed,
        lambda: registry.terminate_owner("ended"),
        lambda: end(registry),
        lambda: feed.list_since(0),
        registry.check,
    )


def watch(registry: Registry, id: OperationId) -> None:
    with registry.register_watcher(id) as watching:
        watching.wait(0)


def use_up(namespace: str, segment: SharedSegment, known: list[OperationId]) -> int:
    mine = SharedSegment.attach(namespace, segment.session_id)
    corrupted = 0
    join: Callable[[], object] = partial(mine.join, Role.WORKER)
    for call in chain([join], calls(mine, known)):
        try:
            call()
        except SegmentCorrupted as error:
            corrupted += bool(error.field)
        except (ShmepochError, TimeoutError):
            pass  # such as NotFound: the call could not tell, or it does not matter to it
    return corrupted


def in_a_child(act: Callable[[], int]) -> int:
    """What `act` returns in a forked process; fails if it raises, dies or does not end there."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            signal.signal(signal.SIGPROF, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_PROF, PROCESSOR_LIMIT_S)
            text = f"ok {act()}"
        except BaseException:
            text = traceback.format_exc()[-3000:]
        finally:
            os.write(write, text.encode())
            os._exit(0)
    os.close(write)
    with open(read) as pipe:
        answer = pipe.read()
    _, status = os.waitpid(pid, 0)
    assert answer.startswith("ok "), answer or f"ended with status {status}"
    return int(answer.removeprefix("ok "))


def test_nothing_is_found_wrong_with_what_is_right(subject: Subject) -> None:
    assert subject.use_up() == 0


def test_what_is_wrong_is_found(subject: Subject) -> None:
    """A word of each part, such that no call can do without it."""
    layout = subject.segment.layout
    for offset in (at.DROPPED_AT, layout.slot(0) + at.SLOT_SPEC, layout.ring[0] + 4 * 24 + 8):
        subject.put_back()
        subject.segment.memory.store(offset, 2**40 + 1)
        with pytest.raises(SegmentCorrupted) as found:
            Registry(subject.segment).check()
        error = found.value
        assert error.name == subject.segment.name
        assert error.field in str(error)
        assert repr(error.actual) in str(error)


CONTROL: Final = {
    "agent_applied": at.CURSORS_AT,
    "runtime_observed": at.CURSORS_AT + at.LINE,
    "runtime_injected": at.CURSORS_AT + 2 * at.LINE,
    "watermark": at.WATERMARK_AT,
    "event": at.EVENT_AT,
    "bells": at.BELLS_AT,
    "dropped_through": at.DROPPED_AT,
    "intent": at.INTENT_AT,
    "registrations": at.REGISTRATIONS_AT,
    "collected_through": at.COLLECTED_AT,
    "reclaimed_through": at.RECLAIMED_AT,
    "joined": at.JOINED_AT,
    "durable_seq": at.DURABLE_AT,
    "origin": at.ORIGIN_AT,
}


@pytest.mark.parametrize("name", list(CONTROL))
def test_a_word_of_the_control_lines(subject: Subject, name: str) -> None:
    for value in (0, *WORDS):
        subject.put_back()
        subject.segment.memory.store(CONTROL[name], value)
        subject.use_up()


@pytest.mark.parametrize("word", [*range(0, 104, 8), 512, 1024, 1536])
def test_a_word_of_a_slot(subject: Subject, word: int) -> None:
    for slot in range(subject.segment.layout.slots):
        for value in (0, *WORDS[slot % 2 :: 2]):
            subject.put_back()
            subject.segment.memory.store(subject.segment.layout.slot(slot) + word, value)
            subject.use_up()


@pytest.mark.parametrize("part", ["participants", "fingerprints", "index", "bytes"])
def test_a_word_of_every_other_part(subject: Subject, part: str) -> None:
    layout = subject.segment.layout
    index, _, data, size = layout.ring
    offsets = {
        "participants": range(at.PARTICIPANTS_AT, at.PARTICIPANTS_AT + 64, at.WORD),
        "fingerprints": range(layout.fingerprints, layout.fingerprints + 48, at.WORD),
        "index": range(index, index + 8 * at.INDEX_SIZE, at.WORD),
        "bytes": range(data, data + size, 50 * at.WORD),
    }
    for turn, offset in enumerate(offsets[part]):
        for value in (0, *WORDS[turn % 3 :: 3]):
            subject.put_back()
            subject.segment.memory.store(offset, value)
            subject.use_up()


@pytest.mark.parametrize("seed", range(6))
def test_garbage(subject: Subject, seed: int) -> None:
    """Bytes at random over parts of everything behind the control lines."""
    rng, layout = random.Random(seed), subject.segment.layout
    for _ in range(20):
        subject.put_back()
        for _ in range(rng.choice((1, 3, 30))):
            begin = rng.randrange(at.PARTICIPANTS_AT + 2 * at.PARTICIPANT_SIZE, layout.size)
            length = min(rng.choice((1, 8, 100, 4000)), layout.size - begin)
            os.pwrite(subject.segment.fd, rng.randbytes(length), begin)
        subject.use_up()
