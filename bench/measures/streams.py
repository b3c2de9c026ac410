"""(d) Records from writers to a reader: the rate, and the delay until they are seen."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from functools import partial
from time import perf_counter, sleep
from typing import Any, Final

from bench.carriers import Carrier, carriers
from bench.contestants import SHMEPOCH
from bench.harness import Contestant, Measure, Sample, Skipped
from bench.processes import meeting, together
from bench.servers import ServerMissing, redis
from bench.work import epoch, operate
from shmepoch import Completed

#: The bytes of a record, their name, the writers, and a divisor for the records in a sample.
_STREAMS: Final = (
    (200, "200 B", 1, 1),
    (200, "200 B", 4, 1),
    (4096, "4 KiB", 1, 4),
    (65536, "64 KiB", 1, 20),
)
_LATENCIES: Final = 300
_PACE_S: Final = 500e-6


def measures(stack: ExitStack, count: int) -> Iterator[Measure]:
    """The group, for `count` records in each sample."""
    every = list(carriers(stack))
    for size, label, writers, fewer in _STREAMS:
        yield Measure(
            f"completion stream, {label}, {writers} to 1 reader",
            [
                one
                if isinstance(one, Skipped)
                else Contestant(
                    one.name, _streamed(one, "x" * size, writers, count // fewer), one.caveat
                )
                for one in every
                if isinstance(one, Skipped) or writers <= one.writers
            ],
        )
    yield Measure("from complete to seen", list(_latencies(stack)))


def _streamed(carrier: Carrier, content: str, writers: int, count: int) -> Sample:
    """Seconds for one record, from when the first writer began until the reader had the last."""
    share = count // writers

    def sample() -> float:
        writer, reader = carrier.ends(content)
        meet = meeting(1 + writers)

        def writing() -> float:
            with writer() as write:
                meet()
                began = perf_counter()
                write(share)
                meet()
            return began

        def reading() -> float:
            with reader() as read:
                meet()
                read(share * writers)
                ended = perf_counter()
                meet()
            return ended

        ended, *began = together([reading, *[writing] * writers])
        return float(ended - min(began)) / (share * writers)

    return sample


def _latencies(stack: ExitStack) -> Iterator[Contestant | Skipped]:
    yield Contestant(SHMEPOCH, partial(_shmepoch_latency, stack.enter_context(ExitStack())))
    try:
        yield Contestant("Redis stream", partial(_redis_latency, redis(stack)), "a server between")
    except ServerMissing as missing:
        yield Skipped("Redis stream", str(missing))
    yield Contestant("multiprocessing.Pipe", _pipe_latency, "one reader; keeps nothing")


def _paced(
    write: Callable[[str], object],
    read: Callable[[], Sequence[str]],
    leave: Callable[[], None] = lambda: None,
) -> Sequence[float]:
    """Seconds that each record took; its content is the time, and there is a pause before each."""
    meet = meeting(2)

    def writing() -> None:
        meet()
        for _ in range(_LATENCIES):
            sleep(_PACE_S)
            write(repr(perf_counter()))
        leave()

    def reading() -> list[float]:
        times: list[float] = []
        meet()
        while len(times) < _LATENCIES:
            records = read()
            now = perf_counter()
            times += [now - float(record) for record in records]
        leave()
        return times

    taken: list[float] = together([reading, writing])[0]
    return taken


def _shmepoch_latency(stack: ExitStack) -> Sequence[float]:
    stack.close()
    bindings = epoch(stack)
    feed, seen = bindings.ops_lifecycle.completion_feed(), 0

    def read() -> Sequence[str]:
        nonlocal seen
        feed.wait_for_advance(seen)
        batch = feed.list_since(seen)
        seen = batch.watermark
        outcomes = [entry.terminal_outcome for entry in batch.entries]
        return [one.result.content for one in outcomes if isinstance(one, Completed)]

    return _paced(lambda record: operate(bindings, record), read, bindings.close)


def _redis_latency(port: int) -> Sequence[float]:
    from redis import Redis

    with closing(Redis(port=port)) as setting_up:
        setting_up.delete("paced")
    server: Any = Redis(port=port)  # each child makes its own connection
    last = b"0"

    def read() -> Sequence[str]:
        nonlocal last
        ((_, records),) = server.xread({"paced": last}, block=5000)
        last = records[-1][0]
        return [fields[b"record"].decode() for _, fields in records]

    return _paced(lambda record: server.xadd("paced", {"record": record}), read)


def _pipe_latency() -> Sequence[float]:
    receiver, sender = multiprocessing.Pipe(duplex=False)
    return _paced(
        lambda record: sender.send_bytes(record.encode()), lambda: [receiver.recv_bytes().decode()]
    )
