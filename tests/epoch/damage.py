"""A damaged epoch: the possible contents of a word, and every call that may read it."""

from __future__ import annotations

import argparse
import logging
import mmap
import os
import random
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from typing import Final

from shmepoch import _native as at
from shmepoch.config import OpsLifecycleConfig
from shmepoch.epoch.cursors import EpochCursorState
from shmepoch.epoch.operations import OperationProgressUpdate, OperationStatus
from shmepoch.epoch.persisted import PersistedOpsSnapshot
from shmepoch.errors import SegmentCorrupted, ShmepochError
from shmepoch.ids import OperationId, RunId
from shmepoch.memory.layout import Layout
from shmepoch.memory.segment import Segment, SharedSegment
from tests.epoch.operations import Registry, end, reach, result, spec

CONFIG: Final = OpsLifecycleConfig(
    max_operations=4, max_completed=2, feed_bytes=at.PAGE + 4 * 1024, max_participants=2
)

#: Contents of a word that no writer put there.
WORDS: Final = (1, 2, 7, 2**16, 2**31, 2**32 - 1, 2**32 + 1, 2**48, 2**63 - 1, 2**63, 2**64 - 1)

#: More seconds of processor time than any call needs: a child that uses them is in an endless loop.
PROCESSOR_LIMIT_S: Final = 5


def fill(registry: Registry) -> list[OperationId]:
    """Put something in every part of an epoch; returns its operations."""
    for turn in range(5):
        end(registry, "r" * 900 * turn)
    for status in (OperationStatus.PROVISIONING, OperationStatus.RUNNING, OperationStatus.RETIRING):
        reach(registry, status)
    return [operation.id for operation in registry.list_operations()]


def kept_outcome(registry: Registry) -> Callable[[], object]:
    """A call that reads an outcome that the feed has dropped and a watcher waits for."""
    id = OperationId.new()
    registry.register_operation(spec(id=id))
    registry.register_watcher(id)
    pending = registry.locate(id)
    registry.cancel_operation(id, "r" * 1800)
    for _ in range(4):
        end(registry, "r" * 2500)
    assert registry.completion_feed().list_since(0).gap_after(5)
    return partial(registry.outcome_at, id, pending.place, 0)


def calls(segment: Segment, known: list[OperationId]) -> Iterator[Callable[[], object]]:
    """Every public call that reads an epoch, then every call that changes it."""
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
        lambda: store(registry.capture_persistence_snapshot(segment.epoch_id, cursors)),
        registry.check,
    )
    if isinstance(segment, SharedSegment):
        yield partial(segment.participants.list, me=segment.participant)
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


def store(snapshot: PersistedOpsSnapshot) -> None:
    """Act like a store: take signed 64-bit numbers only, and read the record back."""
    for operation in snapshot.operations:
        times = operation.created_at_ms, operation.started_at_ms or 0, operation.elapsed_ms or 0
        assert max(times) < 2**63
    assert PersistedOpsSnapshot.from_json(snapshot.to_json()) == snapshot


def watch(registry: Registry, id: OperationId) -> None:
    with registry.register_watcher(id) as watching:
        watching.wait(0)


def make_calls(made: Iterable[Callable[[], object]]) -> int:
    """Make the calls; returns how many raised `SegmentCorrupted`."""
    corrupted = 0
    for call in made:
        try:
            call()
        except SegmentCorrupted as error:
            corrupted += bool(error.field)
        except (ShmepochError, TimeoutError):
            pass  # such as NotFound: the call did not notice the damage, or does not depend on it
    return corrupted


def in_a_child(act: Callable[[], int], where: Callable[[], str] = str) -> int:
    """Call `act` in a forked process, and return its result; fail if it raises, dies or does not
    end.

    `where` says how far it got.
    """
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
    assert answer.startswith("ok "), f"{where()}: {answer or f'ended with status {status}'}"
    return int(answer.removeprefix("ok "))


def every_word(layout: Layout) -> dict[str, Iterable[int]]:
    """The offsets of the used words, in each part of an epoch."""
    slots = range(layout.slots_at, layout.slots_at + layout.slots * layout.slot_size, at.WORD)
    index = range(layout.index, layout.index + layout.entries * at.WORD, at.WORD)
    return {
        "header": range(at.STATE_AT, at.HEADER_SIZE, at.WORD),
        "cursors": range(at.CURSORS_AT, at.WATERMARK_AT, at.LINE),
        "control": range(at.WATERMARK_AT, at.PARTICIPANTS_AT, at.WORD),
        "participants": range(at.PARTICIPANTS_AT, at.PARTICIPANTS_AT + 64, at.WORD),
        "fingerprints": range(layout.fingerprints, layout.fingerprints + layout.slots * 8, at.WORD),
        "retained": range(layout.retained, layout.index, at.WORD),
        "slots": [w for w in slots if (w - layout.slots_at) % layout.slot_size < at.SLOT_SPEC],
        "contents": slots,
        "index": index[:10],
        "index end": index[-2:],
        "records": range(layout.records, layout.records + layout.feed_bytes, at.WORD),
    }


def hostile(rng: random.Random, word: int) -> int:
    """A new content for a word: zero, an extreme, or nearly the old one."""
    near = (word ^ 1 << rng.randrange(64), word + 1, word - 1, -word, word << 32)
    return rng.choice((0, *WORDS, 2**32, 2**62, 2**64 - 2, rng.getrandbits(64), *near)) % 2**64


def mutate(seed: int, rounds: int) -> int:
    """Overwrite words of an epoch at random, `rounds` times, and make every call each time; returns
    how many calls raised `SegmentCorrupted`. A call must return or raise an error of the library
    within a few seconds; a failure says how to repeat it."""
    note = mmap.mmap(-1, mmap.PAGESIZE)

    def act() -> int:
        rng, corrupted = random.Random(seed), 0
        segment = Segment.private(CONFIG)
        memory, known = segment.memory, fill(Registry(segment))
        look = kept_outcome(Registry(segment))
        image, parts = bytes(memoryview(memory)), every_word(segment.layout)
        for _ in range(rounds):
            memory.write(0, image)
            for _ in range(rng.choice((1, 1, 1, 2, 4))):
                offset = rng.choice(list(parts[rng.choice(list(parts))]))
                value = hostile(rng, memory.load(offset))
                memory.store(offset, value)
                note.write(f"seed {seed}: {value:#x} at {offset}\n".encode())
            signal.setitimer(signal.ITIMER_PROF, PROCESSOR_LIMIT_S)
            corrupted += make_calls(chain([look], calls(segment, known), [look]))
            note[:] = bytes(len(note))
            note.seek(0)
        return corrupted

    return in_a_child(act, lambda: bytes(note).rstrip(b"\0").decode())


def main() -> None:
    parser = argparse.ArgumentParser(prog="tools/mutate", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0, help="of the first hundred epochs")
    options = parser.parse_args()
    logging.disable()
    deadline, seed, corrupted = time.monotonic() + options.seconds, options.seed, 0
    while time.monotonic() < deadline:
        corrupted += mutate(seed, 100)
        seed += 1
    epochs = 100 * (seed - options.seed)
    print(f"{epochs} damaged epochs: {corrupted} calls said so, and none failed in another way")


if __name__ == "__main__":
    main()
