"""The completion feed: its sequence, its batches, and waiting for it to advance."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shmepoch.epoch.completions import CompletionBatch, CompletionFeed, CompletionFeedGap
from shmepoch.epoch.feed import SegmentFeed
from shmepoch.errors import EpochSealed
from tests.epoch.conftest import MakeEpoch
from tests.epoch.deadline import DEADLINE_S, run
from tests.epoch.implementations import Epoch
from tests.epoch.operations import Registry, end
from tests.support import eventually


def test_a_feed_keeps_the_protocol(feed: SegmentFeed) -> None:
    assert isinstance(feed, CompletionFeed)


def test_an_empty_feed(feed: SegmentFeed) -> None:
    assert feed.watermark() == 0
    assert feed.list_since(0) == CompletionBatch(entries=(), watermark=0, dropped_through=0)
    assert feed.list_since(0).gap_after(0) is None


def test_sequences_start_at_one_and_have_no_holes(registry: Registry) -> None:
    feed = registry.completion_feed()
    ids = [end(registry) for _ in range(5)]
    assert feed.watermark() == 5
    for after in range(7):
        batch = feed.list_since(after)
        assert (batch.watermark, batch.dropped_through) == (5, 0)
        assert [entry.seq for entry in batch.entries] == list(range(after + 1, 6))
        assert [entry.operation_id for entry in batch.entries] == ids[after:]


def test_a_position_ahead_of_the_feed(registry: Registry) -> None:
    end(registry)
    batch = registry.completion_feed().list_since(2**64 - 1)
    assert batch == CompletionBatch(entries=(), watermark=1)


def test_a_position_below_zero(feed: SegmentFeed) -> None:
    with pytest.raises(OverflowError, match="not -1"):
        feed.list_since(-1)
    with pytest.raises(OverflowError):
        feed.wait_for_advance(-1, 0)


def test_a_gap_says_what_is_missing() -> None:
    batch = CompletionBatch(entries=(), watermark=9, dropped_through=7)
    assert batch.gap_after(2) == CompletionFeedGap(after_seq=2, dropped_through=7)
    assert CompletionFeedGap(2, 7).missing == 5
    assert batch.gap_after(7) is None
    assert batch.gap_after(8) is None


def test_readers_never_see_a_hole_while_writers_append(make_epoch: MakeEpoch) -> None:
    """FEED-1, with a writer that goes round the ring: an entry is in the batch, or was dropped."""
    registry = make_epoch(max_operations=1, max_completed=1, feed_bytes=5120 + 1024).registry
    feed = registry.completion_feed()
    turns, done = 400, threading.Event()

    def write() -> None:
        for turn in range(turns):
            end(registry, "r" * (turn * 131 % 1500))
        done.set()

    def read(start: int) -> int:
        seen = 0
        while not done.is_set() or seen < turns:
            after = max(0, seen - start)
            batch = feed.list_since(after)
            first = max(after, batch.dropped_through) + 1
            assert [entry.seq for entry in batch.entries] == list(range(first, batch.watermark + 1))
            assert batch.watermark >= seen
            for entry in batch.entries:
                reason = getattr(entry.terminal_outcome, "reason", None)
                assert reason == "r" * ((entry.seq - 1) * 131 % 1500)
            seen = batch.watermark
        return seen

    with ThreadPoolExecutor(4) as pool:
        readers = [pool.submit(read, start) for start in (0, 3, 10_000)]
        pool.submit(write).result(DEADLINE_S)
        assert [reader.result(DEADLINE_S) for reader in readers] == [turns] * 3


def test_a_wait_that_is_over_returns_at_once(registry: Registry) -> None:
    feed = registry.completion_feed()
    for _ in range(3):
        end(registry)
    assert feed.wait_for_advance(0, 0) == 3
    assert feed.wait_for_advance(2) == 3
    assert run(feed.advanced(2)) == 3


@pytest.mark.parametrize("timeout", [0, 0.01, -1])
def test_a_wait_times_out(registry: Registry, timeout: float) -> None:
    end(registry)
    with pytest.raises(TimeoutError, match="not above 1 within"):
        registry.completion_feed().wait_for_advance(1, timeout)


def test_every_wait_of_many_threads_ends(registry: Registry) -> None:
    feed = registry.completion_feed()
    with ThreadPoolExecutor(8) as pool:
        waits = [pool.submit(feed.wait_for_advance, i % 2, DEADLINE_S) for i in range(8)]
        for _ in range(2):
            end(registry)
        assert {wait.result(DEADLINE_S) for wait in waits} <= {1, 2}
        assert all(wait.result() > i % 2 for i, wait in enumerate(waits))


def test_no_wake_up_is_lost_however_append_and_wait_interleave(registry: Registry) -> None:
    """Two threads in lockstep: each round's append and wait start together, in either order."""
    feed, rounds = registry.completion_feed(), 400
    together = threading.Barrier(2, timeout=DEADLINE_S)

    def append() -> None:
        for _ in range(rounds):
            together.wait()
            end(registry)

    with ThreadPoolExecutor(1) as pool:
        writer = pool.submit(append)
        for seq in range(rounds):
            together.wait()
            assert feed.wait_for_advance(seq, DEADLINE_S) == seq + 1
        writer.result(DEADLINE_S)


def test_waits_on_an_epoch_end_with_it(epoch: Epoch) -> None:
    feed = epoch.registry.completion_feed()
    end(epoch.registry)
    with ThreadPoolExecutor(3) as pool:
        waits = [pool.submit(feed.wait_for_advance, 1, DEADLINE_S) for _ in range(3)]
        epoch.seal()
        for wait in waits:
            with pytest.raises(EpochSealed) as ended:
                wait.result(DEADLINE_S)
            assert ended.value.epoch_id == epoch.segment.epoch_id


def test_what_was_committed_before_the_end_is_still_delivered(epoch: Epoch) -> None:
    feed = epoch.registry.completion_feed()
    end(epoch.registry)
    epoch.seal()
    assert feed.wait_for_advance(0) == 1
    assert run(feed.advanced(0)) == 1
    assert len(feed.list_since(0).entries) == 1
    with pytest.raises(EpochSealed):
        feed.wait_for_advance(1)
    with pytest.raises(EpochSealed):
        run(feed.advanced(1))


def test_coroutines_hear_of_commits_and_of_the_end(epoch: Epoch) -> None:
    feed, registry = epoch.registry.completion_feed(), epoch.registry

    async def listen() -> None:
        loop = asyncio.get_running_loop()
        waits = [asyncio.ensure_future(feed.advanced(seq)) for seq in (0, 0, 1, 1, 2)]
        await asyncio.sleep(0)
        assert not any(wait.done() for wait in waits)
        await loop.run_in_executor(None, end, registry)
        assert [await wait for wait in waits[:2]] == [1, 1]
        end(registry)  # in the loop's own thread
        assert [await wait for wait in waits[2:4]] == [2, 2]
        await loop.run_in_executor(None, epoch.seal)
        with pytest.raises(EpochSealed):
            await waits[4]

    run(listen())


def test_a_cancelled_coroutine_leaves_nothing_behind(epoch: Epoch) -> None:
    feed = epoch.registry.completion_feed()

    async def give_up() -> int:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(feed.advanced(0), 0.01)
        wait = asyncio.ensure_future(feed.advanced(0))
        await asyncio.sleep(0)
        wait.cancel()
        with pytest.raises(asyncio.CancelledError):
            await wait
        again = asyncio.ensure_future(feed.advanced(0))
        await asyncio.sleep(0)
        end(epoch.registry)
        return await again

    assert run(give_up()) == 1


def test_a_loop_that_was_closed_under_a_wait_is_no_harm(epoch: Epoch) -> None:
    feed = epoch.registry.completion_feed()
    loop = asyncio.new_event_loop()
    wait = loop.create_task(feed.advanced(0))
    loop.run_until_complete(asyncio.sleep(0))
    wait.cancel()
    with pytest.raises(asyncio.CancelledError):
        loop.run_until_complete(wait)
    loop.close()
    end(epoch.registry)
    assert run(feed.advanced(0)) == 1


def test_many_coroutines_over_many_rounds(registry: Registry) -> None:
    feed, rounds, followers = registry.completion_feed(), 50, 20

    async def follow() -> list[int]:
        seen, found = 0, []
        while seen < rounds:
            seen = await feed.advanced(seen)
            found.append(seen)
        return found

    async def all_of_them() -> list[list[int]]:
        tasks = [asyncio.ensure_future(follow()) for _ in range(followers)]
        loop = asyncio.get_running_loop()
        for _ in range(rounds):
            await loop.run_in_executor(None, end, registry)
        return await asyncio.gather(*tasks)

    for found in run(all_of_them()):
        assert found == sorted(set(found))
        assert found[-1] == rounds


def test_a_waiting_loop_goes_on_with_other_work(registry: Registry) -> None:
    async def main() -> int:
        wait = asyncio.ensure_future(registry.completion_feed().advanced(0))
        for _ in range(1000):
            await asyncio.sleep(0)
        assert not wait.done()
        end(registry)
        return await wait

    assert run(main()) == 1


def test_a_sleeping_wait_is_woken(registry: Registry) -> None:
    """A commit wakes it after it has stopped spinning and sleeps in its futex."""
    feed, asleep = registry.completion_feed(), threading.Event()

    def wait() -> int:
        asleep.set()
        return feed.wait_for_advance(0, DEADLINE_S)

    thread_result: list[int] = []
    thread = threading.Thread(target=lambda: thread_result.append(wait()))
    thread.start()
    assert asleep.wait(DEADLINE_S)
    stat = Path(f"/proc/self/task/{thread.native_id}/stat")
    eventually(lambda: stat.read_text().rpartition(")")[2].split()[0] == "S")
    end(registry)
    thread.join(DEADLINE_S)
    assert thread_result == [1]
