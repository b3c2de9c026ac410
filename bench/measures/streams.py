"""(d) Records from writers to a reader: how many, and how soon they are seen."""

from __future__ import annotations

import asyncio
import multiprocessing
import sqlite3
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

from bench import cells
from bench.harness import Contestant, Measure, Sample, Skipped
from bench.measures.operations import operate
from bench.processes import together
from bench.servers import ServerMissing, nats, redis
from shmepoch import Completed, OpsLifecycleConfig

_CONTENT = "x" * 200
_BATCH = 100
_LATENCIES = 300
_PACE_S = 500e-6
#: Readers that lag behind by all records of a sample still find them.
_ROOM = OpsLifecycleConfig(max_completed=5_000, feed_bytes=16 * 1024 * 1024)

Write = Callable[[int], None]
#: Reads so many records.
Read = Callable[[int], None]


@dataclass(frozen=True)
class Stream:
    """A way to pass records on: `ends` makes, in the sample's process, what its children call."""

    name: str
    ends: Callable[[], tuple[Write, Read]]
    caveat: str = ""


def measures(stack: ExitStack, count: int) -> Iterator[Measure]:
    """The group, for so many records a sample."""
    streams = list(_streams(stack))
    for writers in (1, 4):
        yield Measure(
            f"completion stream, 200 B, {writers} to 1 reader",
            [
                one
                if isinstance(one, Skipped)
                else Contestant(one.name, _streamed(one, writers, count), one.caveat)
                for one in streams
                if not (writers > 1 and isinstance(one, Stream) and one.name.endswith("Pipe"))
            ],
        )
    yield Measure("from complete to seen", list(_latencies(stack)))


def _streamed(stream: Stream, writers: int, count: int) -> Sample:
    share = count // writers

    def sample() -> float:
        write, read = stream.ends()
        start = perf_counter() + 0.05

        def writing() -> float:
            sleep(max(0.0, start - perf_counter()))
            write(share)
            return start

        def reading() -> float:
            read(share * writers)
            return perf_counter()

        ended, *_ = together([reading, *[writing] * writers])
        return float(ended - start) / (share * writers)

    return sample


def _streams(stack: ExitStack) -> Iterator[Stream | Skipped]:
    yield Stream("shmepoch", partial(_shmepoch, stack.enter_context(ExitStack())))
    try:
        port = redis(stack)
        yield Stream("Redis stream, pipelined", partial(_redis, port, _BATCH), "raw bytes")
        yield Stream("Redis stream, one by one", partial(_redis, port, 1), "raw bytes")
    except ServerMissing as missing:
        yield Skipped("Redis stream, pipelined", str(missing))
    try:
        yield Stream("NATS JetStream, pipelined", partial(_nats, nats(stack)), "raw bytes")
    except ServerMissing as missing:
        yield Skipped("NATS JetStream, pipelined", str(missing))
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    for batch in (_BATCH, 1):
        yield Stream(
            f"SQLite, normal, {batch} a commit",
            partial(_sqlite, Path(folder), batch),
            "the reader polls",
        )
    yield Stream("multiprocessing.Queue", _queue, "one reader; keeps nothing")
    yield Stream("multiprocessing.Pipe", _pipe, "one reader and writer; keeps nothing")


def _shmepoch(stack: ExitStack) -> tuple[Write, Read]:
    stack.close()  # the epoch of the sample before
    bindings = cells.epoch(stack, _ROOM)
    registry, owner = bindings.ops_lifecycle, bindings.session_id

    def write(count: int) -> None:
        for _ in range(count):
            operate(registry, owner, _CONTENT)
        bindings.close()

    def read(count: int) -> None:
        feed = registry.completion_feed()
        seen = 0
        while seen < count:
            feed.wait_for_advance(seen)
            batch = feed.list_since(seen)
            if batch.gap_after(seen):
                raise RuntimeError("records were dropped before they were read")
            seen = batch.watermark
        bindings.close()

    return write, read


def _redis(port: int, batch: int) -> tuple[Write, Read]:
    from redis import Redis

    server: Any = Redis(port=port)
    server.delete("stream")
    server.close()  # each child connects for itself

    def write(count: int) -> None:
        for first in range(0, count, batch):
            pipeline = server.pipeline(transaction=False)
            for _ in range(min(batch, count - first)):
                pipeline.xadd("stream", {"record": _CONTENT})
            pipeline.execute()

    def read(count: int) -> None:
        seen, last = 0, b"0"
        while seen < count:
            for _, records in server.xread({"stream": last}, count=1000, block=5000):
                seen += len(records)
                last = records[-1][0]

    return write, read


def _nats(port: int) -> tuple[Write, Read]:
    import nats
    from nats.js.api import AckPolicy, ConsumerConfig
    from nats.js.errors import NotFoundError

    async def connected(job: Callable[[Any], Any]) -> None:
        connection = await nats.connect(f"nats://127.0.0.1:{port}")
        await job(connection.jetstream())
        await connection.close()

    async def renewed(stream: Any) -> None:
        try:
            await stream.purge_stream("records")
        except NotFoundError:
            await stream.add_stream(name="records", subjects=["records"], storage="memory")

    def write(count: int) -> None:
        async def writing(stream: Any) -> None:
            for first in range(0, count, _BATCH):
                these = range(min(_BATCH, count - first))
                await asyncio.gather(*(stream.publish("records", _CONTENT.encode()) for _ in these))

        asyncio.run(connected(writing))

    def read(count: int) -> None:
        async def reading(stream: Any) -> None:
            subscription = await stream.pull_subscribe(
                "records", config=ConsumerConfig(ack_policy=AckPolicy.NONE)
            )
            seen = 0
            while seen < count:
                seen += len(await subscription.fetch(min(_BATCH, count - seen), timeout=30))

        asyncio.run(connected(reading))

    asyncio.run(connected(renewed))
    return write, read


def _sqlite(folder: Path, batch: int) -> tuple[Write, Read]:
    path = folder / "stream.db"
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("CREATE TABLE IF NOT EXISTS records (seq INTEGER PRIMARY KEY, content)")
        database.execute("DELETE FROM records")
        database.commit()

    def write(count: int) -> None:
        with closing(sqlite3.connect(path, isolation_level=None, timeout=60)) as database:
            database.execute("PRAGMA synchronous = normal")
            for first in range(0, count, batch):
                rows = [(_CONTENT,)] * min(batch, count - first)
                database.execute("BEGIN IMMEDIATE")
                database.executemany("INSERT INTO records (content) VALUES (?)", rows)
                database.execute("COMMIT")

    def read(count: int) -> None:
        with closing(sqlite3.connect(path, timeout=60)) as database:
            seen = last = 0
            while seen < count:
                rows = database.execute(
                    "SELECT seq, content FROM records WHERE seq > ? ORDER BY seq", (last,)
                ).fetchall()
                if rows:
                    seen += len(rows)
                    last = rows[-1][0]
                else:
                    sleep(_PACE_S)

    return write, read


def _queue() -> tuple[Write, Read]:
    queue: multiprocessing.Queue[str] = multiprocessing.Queue()

    def write(count: int) -> None:
        for _ in range(count):
            queue.put(_CONTENT)
        queue.close()
        queue.join_thread()

    def read(count: int) -> None:
        for _ in range(count):
            queue.get()

    return write, read


def _pipe() -> tuple[Write, Read]:
    receiver, sender = multiprocessing.Pipe(duplex=False)
    content = _CONTENT.encode()

    def write(count: int) -> None:
        for _ in range(count):
            sender.send_bytes(content)

    def read(count: int) -> None:
        for _ in range(count):
            receiver.recv_bytes()

    return write, read


def _latencies(stack: ExitStack) -> Iterator[Contestant | Skipped]:
    yield Contestant("shmepoch", partial(_shmepoch_latency, stack.enter_context(ExitStack())))
    try:
        yield Contestant("Redis stream", partial(_redis_latency, redis(stack)), "a server between")
    except ServerMissing as missing:
        yield Skipped("Redis stream", str(missing))
    yield Contestant("multiprocessing.Pipe", _pipe_latency, "one reader; keeps nothing")


def _paced(write: Callable[[str], object], read: Callable[[], Sequence[str]]) -> Sequence[float]:
    """Seconds that each record took, written with a pause before it: its content is the time."""

    def writing() -> None:
        sleep(0.05)
        for _ in range(_LATENCIES):
            sleep(_PACE_S)
            write(repr(perf_counter()))

    def reading() -> list[float]:
        times: list[float] = []
        while len(times) < _LATENCIES:
            records = read()
            now = perf_counter()
            times += [now - float(record) for record in records]
        return times

    taken: list[float] = together([reading, writing])[0]
    return taken


def _shmepoch_latency(stack: ExitStack) -> Sequence[float]:
    stack.close()
    bindings = cells.epoch(stack)
    registry, owner = bindings.ops_lifecycle, bindings.session_id
    feed, seen = registry.completion_feed(), 0

    def read() -> Sequence[str]:
        nonlocal seen
        feed.wait_for_advance(seen)
        batch = feed.list_since(seen)
        seen = batch.watermark
        outcomes = [entry.terminal_outcome for entry in batch.entries]
        return [one.result.content for one in outcomes if isinstance(one, Completed)]

    return _paced(lambda record: operate(registry, owner, record), read)


def _redis_latency(port: int) -> Sequence[float]:
    from redis import Redis

    server: Any = Redis(port=port)
    server.delete("paced")
    server.close()
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
