"""Readers of the feed, while writers go round its rings as fast as they can."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from shmepoch import (
    EpochSealed,
    OperationId,
    OpsLifecycleConfig,
    RuntimeSessionAdapter,
    SessionId,
    SessionRuntimeBindings,
)
from tests.processes.children import Channel, start
from tests.processes.workloads import is_whole, obeys_the_feed, sealed_text, text_of
from tests.support import spec

LAST = 4_000


@pytest.fixture
def small(namespace: str) -> Iterator[SessionRuntimeBindings]:
    """An epoch whose byte ring holds only a few entries."""
    config = OpsLifecycleConfig(max_completed=2, max_operations=4, feed_bytes=8 * 1024)
    with RuntimeSessionAdapter.ephemeral(namespace=namespace, config=config) as adapter:
        bindings = adapter.prepare_bindings(SessionId.new())
        yield bindings
        bindings.ops_lifecycle.check()
        adapter.unregister_session(bindings.session_id)


def write(bindings: SessionRuntimeBindings, test: Channel, seed: int) -> None:
    """End operations with texts of all lengths until the feed is at `LAST`."""
    random_ = random.Random(seed)
    registry = bindings.ops_lifecycle
    feed = registry.completion_feed()
    while feed.watermark() < LAST:
        id = OperationId.new()
        registry.register_operation(spec(id=id))
        registry.cancel_operation(id, sealed_text(random_, random_.choice([4, 40, 800])))


def read(bindings: SessionRuntimeBindings, test: Channel, seed: int) -> tuple[int, int]:
    """Read from all positions until the feed is at `LAST`; returns the numbers of entries and
    gaps."""
    random_ = random.Random(seed)
    feed = bindings.ops_lifecycle.completion_feed()
    entries = gaps = watermark = 0
    while watermark < LAST:
        after = max(0, watermark - random_.randrange(40))
        batch = feed.list_since(after)
        obeys_the_feed(batch, after)
        assert batch.watermark >= watermark
        assert all(is_whole(text_of(entry)) for entry in batch.entries), "half of an entry"
        watermark = batch.watermark
        entries += len(batch.entries)
        gaps += batch.gap_after(after) is not None
    return entries, gaps


def test_readers_never_see_half_of_an_entry_or_a_hole(small: SessionRuntimeBindings) -> None:
    with ExitStack() as stack:
        readers = [stack.enter_context(start(read, small, seed)) for seed in range(2)]
        writers = [stack.enter_context(start(write, small, seed)) for seed in range(2)]
        for writer in writers:
            writer.result()
        said = [reader.result() for reader in readers]
    batch = small.ops_lifecycle.completion_feed().list_since(0)
    assert batch.watermark >= LAST
    assert batch.dropped_through > LAST - 200, "the rings were not gone round"
    assert all(entries for entries, _ in said)


def follow(bindings: SessionRuntimeBindings, test: Channel) -> list[int]:
    """Wait for each advance and read the new entries, until the epoch is sealed."""
    feed = bindings.ops_lifecycle.completion_feed()
    position = 0
    seen: list[int] = []
    test.say("following")
    while True:
        try:
            feed.wait_for_advance(position, 60)
        except EpochSealed:
            return seen
        batch = feed.list_since(position)
        obeys_the_feed(batch, position)
        seen += [entry.seq for entry in batch.entries]
        position = batch.watermark


def test_who_follows_misses_only_what_was_dropped(bindings: SessionRuntimeBindings) -> None:
    registry = bindings.ops_lifecycle
    with ExitStack() as stack:
        followers = [stack.enter_context(start(follow, bindings)) for _ in range(3)]
        for follower in followers:
            follower.hear()
        for _ in range(600):
            id = OperationId.new()
            registry.register_operation(spec(id=id))
            registry.cancel_operation(id)
        bindings.shared_segment().seal()
        for follower in followers:
            assert follower.result() == list(range(1, 601))
