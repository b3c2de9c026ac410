"""(h) The processor time of idle waits."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from time import perf_counter, process_time

from bench.contestants import SHMEPOCH
from bench.harness import Contestant, Measure, Sample
from bench.work import epoch

_EPOCHS = 20
_WAITS = 1_000


def measures(stack: ExitStack, count: int) -> Iterator[Measure]:
    """The group, watched for `count` tenths of a second."""
    feeds = [epoch(stack).ops_lifecycle.completion_feed() for _ in range(_EPOCHS)]
    seconds = count / 10

    def advanced(index: int) -> Awaitable[object]:
        return feeds[index % _EPOCHS].advanced(0)

    def nothing(index: int) -> Awaitable[object]:
        return asyncio.get_running_loop().create_future()

    yield Measure(
        "processor while 1,000 coroutines wait",
        [
            Contestant(SHMEPOCH, _idle(advanced, seconds)),
            Contestant("asyncio alone", _idle(nothing, seconds), "1,000 futures of its own"),
        ],
        "%",
    )


def _idle(wait: Callable[[int], Awaitable[object]], seconds: float) -> Sample:
    async def watched() -> float:
        waits = [asyncio.ensure_future(wait(index)) for index in range(_WAITS)]
        await asyncio.sleep(0.1)  # until all of them have begun to wait
        began, used = perf_counter(), process_time()
        await asyncio.sleep(seconds)
        share = (process_time() - used) / (perf_counter() - began)
        for one in waits:
            one.cancel()
        await asyncio.gather(*waits, return_exceptions=True)
        return share * 100

    return lambda: asyncio.run(watched())
