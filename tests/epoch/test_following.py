"""A feed that is followed: every completion once and in order, gaps in their place, and an end."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from shmepoch import (
    ArgumentInvalid,
    CompletionEntry,
    CompletionFeed,
    CompletionFeedGap,
    EpochGone,
    EpochSealed,
    RuntimeEpochId,
    SessionId,
    SessionRuntimeBindings,
)
from shmepoch.config import OpsLifecycleConfig
from shmepoch.epoch.following import FeedFollower

Item = CompletionEntry | CompletionFeedGap
Collect = Callable[[FeedFollower, Callable[[Item], object]], None]


def end(bindings: SessionRuntimeBindings, content: str = "done") -> None:
    with bindings.operation("work") as operation:
        operation.complete(content)


def collect(follower: FeedFollower, tell: Callable[[Item], object]) -> None:
    for item in follower:
        tell(item)


async def collect_async(follower: FeedFollower, tell: Callable[[Item], object]) -> None:
    async for item in follower:
        tell(item)


@pytest.fixture(params=["for", "async for"])
def collecting(request: pytest.FixtureRequest) -> Collect:
    """Both loops: each tells of every item until the feed ends."""
    if request.param == "for":
        return collect
    return lambda follower, tell: asyncio.run(collect_async(follower, tell))


@pytest.fixture
def bindings() -> SessionRuntimeBindings:
    config = OpsLifecycleConfig(max_operations=2, max_completed=2, feed_bytes=6144)
    return SessionRuntimeBindings.standalone(SessionId.new(), config)


def seqs(items: list[Item]) -> list[int]:
    return [item.seq for item in items if isinstance(item, CompletionEntry)]


def test_what_there_is_and_what_comes(
    bindings: SessionRuntimeBindings, collecting: Collect
) -> None:
    feed = bindings.ops_lifecycle.completion_feed()
    for _ in range(3):
        end(bindings)
    told: list[Item] = []
    heard = threading.Condition()

    def tell(item: Item) -> None:
        with heard:
            told.append(item)
            heard.notify()

    thread = threading.Thread(target=collecting, args=(feed.follow(1), tell))
    thread.start()
    with heard:
        assert heard.wait_for(lambda: len(told) == 2, timeout=20)
    end(bindings)
    with heard:
        assert heard.wait_for(lambda: len(told) == 3, timeout=20)
    bindings._segment.seal()
    thread.join(20)
    assert not thread.is_alive()
    assert seqs(told) == [2, 3, 4]


def test_the_last_completions_of_a_sealed_epoch(
    bindings: SessionRuntimeBindings, collecting: Collect
) -> None:
    end(bindings)
    bindings._segment.seal()
    told: list[Item] = []
    follower = bindings.ops_lifecycle.completion_feed().follow()
    collecting(follower, told.append)
    assert seqs(told) == [1]
    collecting(follower, told.append)
    assert seqs(told) == [1, 1]


class SealedAtOnce:
    """A feed whose epoch is sealed by the commit that it is waited for."""

    def __init__(self, feed: CompletionFeed) -> None:
        self.list_since = feed.list_since

    def wait_for_advance(self, after_seq: int, timeout: float | None = None) -> int:
        raise EpochSealed(RuntimeEpochId.new())

    async def advanced(self, after_seq: int) -> int:
        raise EpochSealed(RuntimeEpochId.new())


def test_completions_that_were_committed_with_the_sealing(
    bindings: SessionRuntimeBindings, collecting: Collect
) -> None:
    end(bindings)
    told: list[Item] = []
    feed: Any = SealedAtOnce(bindings.ops_lifecycle.completion_feed())
    collecting(FeedFollower(feed, 0), told.append)
    assert seqs(told) == [1]


def test_a_gap_comes_in_its_place(bindings: SessionRuntimeBindings, collecting: Collect) -> None:
    feed = bindings.ops_lifecycle.completion_feed()
    told: list[Item] = []

    def tell(item: Item) -> None:
        told.append(item)
        if len(told) == 1:
            while feed.list_since(1).dropped_through < 2:
                end(bindings, "x" * 500)
            bindings._segment.seal()

    end(bindings)
    collecting(feed.follow(), tell)
    gap = told[1]
    assert isinstance(gap, CompletionFeedGap)
    assert gap.after_seq == 1
    assert seqs(told) == [1, *range(gap.dropped_through + 1, feed.watermark() + 1)]


def test_an_epoch_that_is_gone_is_no_good_end(
    bindings: SessionRuntimeBindings, collecting: Collect, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shmepoch import _native as at

    bindings._segment.memory.store(at.STATE_AT, at.GONE)
    with pytest.raises(EpochGone):
        collecting(bindings.ops_lifecycle.completion_feed().follow(), lambda _: None)


def test_a_position_is_a_number(bindings: SessionRuntimeBindings) -> None:
    with pytest.raises(ArgumentInvalid):
        bindings.ops_lifecycle.completion_feed().follow("1")  # type: ignore[arg-type]
