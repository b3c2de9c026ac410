"""Reading real epochs again and again, of processes that come, go, are stopped and are killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from shmepoch import RuntimeSessionAdapter, SessionId, SessionRuntimeBindings
from shmepoch import _native as at
from shmepoch.cli.watch import reading
from shmepoch.cli.watch.page import Page
from shmepoch.cli.watch.reading import EpochReader, Place, Reader, Seen
from shmepoch.cli.watch.text import Line, plain
from shmepoch.memory.namespaces import segment_path
from shmepoch.memory.segment import SharedSegment
from shmepoch.monitoring.epochs import EpochState
from tests.processes.children import Channel, start
from tests.runtime.completions import TOOL, drop_through, end
from tests.support import damage_record, held_writer, spec


@pytest.fixture
def reader(namespace: str) -> Iterator[Reader]:
    reader = Reader(namespace)
    yield reader
    reader.close()


@contextmanager
def reading_one(bindings: SessionRuntimeBindings, namespace: str) -> Iterator[EpochReader]:
    reader = EpochReader((namespace, bindings.session_id))
    try:
        yield reader
    finally:
        reader.close()


def segment_of(bindings: SessionRuntimeBindings) -> SharedSegment:
    segment = bindings._segment
    assert isinstance(segment, SharedSegment)
    return segment


def look(reader: EpochReader, after_seq: int = 0, most: int = 100) -> Seen:
    seen = reader.read(after_seq, most)
    assert seen is not None
    return seen


def text(lines: list[Line]) -> str:
    return "\n".join(map(plain, lines))


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_epochs_that_come_and_go(
    adapter: RuntimeSessionAdapter, bindings: SessionRuntimeBindings, reader: Reader
) -> None:
    """Each is opened once, and closed when its name is gone."""
    assert [one.session_id for one in reader.summaries()] == [bindings.session_id]
    opened = descriptors()
    another = adapter.prepare_bindings(SessionId.new())
    assert {one.session_id for one in reader.summaries()} == {
        bindings.session_id,
        another.session_id,
    }
    reader.summaries()
    adapter.unregister_session(another.session_id)
    assert len(reader.summaries()) == 1
    assert descriptors() == opened


def test_a_session_that_has_another_epoch(adapter: RuntimeSessionAdapter, reader: Reader) -> None:
    """The name is looked at each time, and not only what was opened by it."""
    bindings = adapter.prepare_bindings(SessionId.new())
    end(bindings, TOOL)
    (before,) = reader.summaries()
    adapter.unregister_session(bindings.session_id)
    again = adapter.prepare_bindings(bindings.session_id)
    (after,) = reader.summaries()
    assert (before.watermark, after.watermark) == (1, 0)
    assert after.epoch_id == again.epoch_id != before.epoch_id
    adapter.unregister_session(again.session_id)


def test_more_epochs_than_are_kept_open(
    adapter: RuntimeSessionAdapter, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "_MOST_OPEN", 2)
    made = [adapter.prepare_bindings(SessionId.new()) for _ in range(5)]
    before = descriptors()
    assert len(reader.summaries()) == 5
    assert len(reader.summaries()) == 5
    assert descriptors() == before + 2
    for one in made:
        adapter.unregister_session(one.session_id)


def test_an_epoch_that_becomes_damaged(
    adapter: RuntimeSessionAdapter, bindings: SessionRuntimeBindings, reader: Reader
) -> None:
    """The others are read, and so is this one once it is well."""
    another = adapter.prepare_bindings(SessionId.new())
    reader.summaries()
    memory = segment_of(bindings).memory
    role = at.PARTICIPANTS_AT + 9 * at.PARTICIPANT_SIZE
    memory.store(role, 255)
    states = {one.session_id: one.state for one in reader.summaries()}
    memory.store(role, 0)
    assert states == {
        bindings.session_id: EpochState.DAMAGED,
        another.session_id: EpochState.OPEN,
    }
    assert {one.state for one in reader.summaries()} == {EpochState.OPEN}
    adapter.unregister_session(another.session_id)


def test_a_segment_that_is_none(
    bindings: SessionRuntimeBindings, reader: Reader, namespace: str
) -> None:
    path = segment_path(namespace, SessionId.new())
    path.write_bytes(b"not a segment")
    path.chmod(0o600)
    found = {one.state: one for one in reader.summaries()}
    path.unlink()
    assert set(found) == {EpochState.OPEN, EpochState.DAMAGED}
    assert "13" in (found[EpochState.DAMAGED].problem or "")


def test_what_a_page_is_given(bindings: SessionRuntimeBindings, namespace: str) -> None:
    registry = bindings.ops_lifecycle
    for _ in range(5):
        end(bindings, TOOL)
    registry.register_operation(spec("still there"))
    with reading_one(bindings, namespace) as reader:
        seen = look(reader, after_seq=1, most=3)
        assert seen.place is Place.NAMED
        assert seen.batch is not None
        assert [entry.seq for entry in seen.batch.entries] == [3, 4, 5]
        assert [one.spec.display_name for one in seen.operations] == ["still there"]
        assert [one.role for one in seen.participants] == ["runtime"]
        assert 0 < seen.feed_bytes < 5000
        assert look(reader, after_seq=5).batch is None


def test_a_feed_that_dropped_some(bindings: SessionRuntimeBindings, namespace: str) -> None:
    """What takes the room is what is retained."""
    drop_through(bindings, 100)
    with reading_one(bindings, namespace) as reader:
        seen = look(reader)
    assert seen.summary.dropped_through > 0
    assert seen.config is not None
    assert 0.8 < seen.feed_bytes / seen.config.feed_bytes <= 1
    page = Page((namespace, bindings.session_id))
    page.update(seen, 0.0, 0)
    assert f"{seen.summary.watermark:,}" in text(page.feed(80, 3))


def test_an_epoch_that_is_sealed_and_removed(
    adapter: RuntimeSessionAdapter, namespace: str
) -> None:
    bindings = adapter.prepare_bindings(SessionId.new())
    end(bindings, TOOL)
    with reading_one(bindings, namespace) as reader:
        assert look(reader).summary.state is EpochState.OPEN
        adapter.unregister_session(bindings.session_id)
        seen = look(reader)
        assert (seen.place, seen.summary.state) == (Place.REMOVED, EpochState.SEALED)
        assert seen.batch is not None
        assert [entry.seq for entry in seen.batch.entries] == [1]
        again = adapter.prepare_bindings(bindings.session_id)
        assert look(reader).place is Place.REPLACED
    assert again.session_id == bindings.session_id
    adapter.unregister_session(again.session_id)
    with reading_one(bindings, namespace) as reader:
        assert reader.read(0, 100) is None


def test_a_page_of_what_is_damaged(adapter: RuntimeSessionAdapter, namespace: str) -> None:
    """From the start on, and only in a record: then the rest is shown all the same."""
    bindings = adapter.prepare_bindings(SessionId.new())
    end(bindings, TOOL)
    damage_record(segment_of(bindings), 1)
    with reading_one(bindings, namespace) as reader:
        seen = look(reader)
        assert seen.summary.state is EpochState.DAMAGED
        assert seen.summary.watermark == 1
        assert seen.problem is not None
        assert "feed" in seen.problem
    adapter.unregister_session(bindings.session_id)
    session_id = SessionId.new()
    path = segment_path(namespace, session_id)
    path.write_bytes(bytes(100))
    path.chmod(0o600)
    reader = EpochReader((namespace, session_id))
    seen = look(reader)
    reader.close()
    path.unlink()
    assert seen.summary.state is EpochState.DAMAGED


def test_a_writer_that_is_stopped(bindings: SessionRuntimeBindings, namespace: str) -> None:
    """It holds up nobody who looks; after a while that it is stopped is to be seen."""
    page = Page((namespace, bindings.session_id))
    with reading_one(bindings, namespace) as reader:
        with held_writer(segment_of(bindings)):
            page.update(look(reader), 0.0, 0)
            assert "writer at work" in text(page.room(80))
            page.update(look(reader), 60.0, 60_000)
            assert "writer lock held for 1m00s" in text(page.room(80))
        page.update(look(reader), 61.0, 61_000)
        assert "writer lock free" in text(page.room(80))


def stay(bindings: SessionRuntimeBindings, test: Channel) -> None:
    """A worker that is there until it is killed."""
    test.say("here")
    signal.pause()


def test_a_participant_that_dies(bindings: SessionRuntimeBindings, namespace: str) -> None:
    """It is marked for a while, and then gone."""
    page = Page((namespace, bindings.session_id))
    with reading_one(bindings, namespace) as reader:
        page.update(look(reader), 0.0, 0)
        with start(stay, bindings, method="subprocess") as worker:
            assert worker.hear() == "here"
            page.update(look(reader), 1.0, 1000)
            assert f"+ worker      pid {worker.pid}" in text(page.participants(80, 10))
            worker.kill()
        page.update(look(reader), 2.0, 2000)
        assert f"✗ worker      pid {worker.pid}" in text(page.participants(80, 10))
        segment = segment_of(bindings)
        found = segment.participants.list(me=segment.participant)
        (dead,) = (one for one in found if not one.alive)
        segment.participants.clear(dead)
        page.update(look(reader), 3.0, 3000)
        assert "gone for 0s, it had died" in text(page.participants(80, 10))
        page.update(look(reader), 60.0, 60_000)
        assert len(page.participants(80, 10)) == 1
