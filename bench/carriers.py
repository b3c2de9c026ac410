"""Ways to pass records from writers to a reader in other processes."""

from __future__ import annotations

import asyncio
import ctypes
import multiprocessing
import sqlite3
import tempfile
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import sleep
from typing import Any, Final

import iceoryx2
import msgspec

from bench.contestants import BATCH, SHMEPOCH, TOGETHER
from bench.harness import Skipped
from bench.iceoryx import Place
from bench.servers import ServerMissing, nats, redis
from bench.work import epoch, operate, operate_together
from shmepoch import OpsLifecycleConfig

#: How long a reader that must poll sleeps between two polls.
_POLL_S: Final = 500e-6
_MOST_WRITERS: Final = 4
#: Room for all records of a sample, so that a slow reader still finds them.
_ROOM: Final = OpsLifecycleConfig(max_completed=1_000, feed_bytes=16 * 1024 * 1024)
#: The same, for writers that each have a batch in progress.
_ROOM_TOGETHER: Final = msgspec.structs.replace(_ROOM, max_operations=_MOST_WRITERS * BATCH)
#: The same for iceoryx2: its writers wait when so many records have not been read.
_QUEUED: Final = 1_000

#: Writes, or reads, so many records.
Pass = Callable[[int], None]
#: Connects, in the process that uses it.
End = Callable[[], AbstractContextManager[Pass]]


@dataclass(frozen=True)
class Carrier:
    """A way to pass records on: `ends` makes a writer's end and the reader's end, for a content."""

    name: str
    ends: Callable[[str], tuple[End, End]]
    caveat: str = ""
    writers: int = _MOST_WRITERS


def carriers(stack: ExitStack) -> Iterator[Carrier | Skipped]:
    """All carriers that are available here; their servers end with `stack`."""
    at_once = f"seen {BATCH} at a time"
    yield Carrier(SHMEPOCH, partial(_shmepoch, stack.enter_context(ExitStack()), 1))
    together = partial(_shmepoch, stack.enter_context(ExitStack()), BATCH)
    yield Carrier(TOGETHER, together, at_once)
    try:
        port = redis(stack)
        yield Carrier("Redis stream, pipelined", partial(_redis, port, BATCH), at_once)
        yield Carrier("Redis stream, one by one", partial(_redis, port, 1))
    except ServerMissing as missing:
        yield Skipped("Redis stream, pipelined", str(missing))
    try:
        yield Carrier("NATS JetStream, pipelined", partial(_nats, nats(stack)), at_once)
    except ServerMissing as missing:
        yield Skipped("NATS JetStream, pipelined", str(missing))
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    for synchronous, batch in (("normal", BATCH), ("full", BATCH), ("normal", 1)):
        yield Carrier(
            f"SQLite, {synchronous}, {batch} a commit",
            partial(_sqlite, folder, synchronous, batch),
            "the reader polls" if batch == 1 else f"the reader polls; {at_once}",
        )
    places = stack.enter_context(ExitStack())
    unkept = "keeps nothing for readers who come later"
    yield Carrier("iceoryx2, with events", partial(_iceoryx, places, True), unkept)
    yield Carrier(
        "iceoryx2, polled", partial(_iceoryx, places, False), f"the reader spins; {unkept}"
    )
    yield Carrier("multiprocessing.Queue", _queue, "one reader; keeps nothing")
    yield Carrier("multiprocessing.Pipe", _pipe, "one reader and writer; keeps nothing", 1)


def _inherited(run: Pass) -> End:
    """An end that was opened before the fork."""
    return lambda: nullcontext(run)


def _shmepoch(stack: ExitStack, batch: int, content: str) -> tuple[End, End]:
    stack.close()  # the epoch of the last sample
    bindings = epoch(stack, _ROOM if batch == 1 else _ROOM_TOGETHER)

    def write(count: int) -> None:
        if batch == 1:
            for _ in range(count):
                operate(bindings, content)
        else:
            for first in range(0, count, batch):
                operate_together(bindings, content, min(batch, count - first))

    def read(count: int) -> None:
        feed = bindings.ops_lifecycle.completion_feed()
        seen = 0
        while seen < count:
            feed.wait_for_advance(seen)
            batch = feed.list_since(seen)
            if batch.gap_after(seen):
                raise RuntimeError("records were dropped before they were read")
            seen = batch.watermark

    @contextmanager
    def attached(run: Pass) -> Iterator[Pass]:
        bindings.shared_segment().ensure_attached()
        yield run
        bindings.close()

    return partial(attached, write), partial(attached, read)


def _redis(port: int, batch: int, content: str) -> tuple[End, End]:
    from redis import Redis

    @contextmanager
    def connected(run: Callable[[Any, int], None]) -> Iterator[Pass]:
        server: Any = Redis(port=port)
        server.ping()
        yield partial(run, server)
        server.close()

    def write(server: Any, count: int) -> None:
        for first in range(0, count, batch):
            pipeline = server.pipeline(transaction=False)
            for _ in range(min(batch, count - first)):
                pipeline.xadd("stream", {"record": content})
            pipeline.execute()

    def read(server: Any, count: int) -> None:
        seen, last = 0, b"0"
        while seen < count:
            for _, records in server.xread({"stream": last}, count=1000, block=5000):
                seen += len(records)
                last = records[-1][0]

    with closing(Redis(port=port)) as server:
        server.delete("stream")
    return partial(connected, write), partial(connected, read)


def _nats(port: int, content: str) -> tuple[End, End]:
    import nats
    from nats.js.api import AckPolicy, ConsumerConfig
    from nats.js.errors import NotFoundError

    record = content.encode()

    @contextmanager
    def connected(
        opened: Callable[[Any], Coroutine[Any, Any, Callable[[int], Coroutine[Any, Any, None]]]],
    ) -> Iterator[Pass]:
        with asyncio.Runner() as runner:
            connection = runner.run(nats.connect(f"nats://127.0.0.1:{port}"))
            run = runner.run(opened(connection.jetstream()))
            yield lambda count: runner.run(run(count))
            runner.run(connection.close())

    async def writer(stream: Any) -> Callable[[int], Coroutine[Any, Any, None]]:
        async def write(count: int) -> None:
            for first in range(0, count, BATCH):
                these = range(min(BATCH, count - first))
                await asyncio.gather(*(stream.publish("records", record) for _ in these))

        return write

    async def reader(stream: Any) -> Callable[[int], Coroutine[Any, Any, None]]:
        subscription = await stream.pull_subscribe(
            "records", config=ConsumerConfig(ack_policy=AckPolicy.NONE)
        )

        async def read(count: int) -> None:
            seen = 0
            while seen < count:
                seen += len(await subscription.fetch(min(BATCH, count - seen), timeout=30))

        return read

    async def renewed() -> None:
        connection = await nats.connect(f"nats://127.0.0.1:{port}")
        stream: Any = connection.jetstream()
        try:
            await stream.purge_stream("records")
        except NotFoundError:
            await stream.add_stream(name="records", subjects=["records"], storage="memory")
        await connection.close()

    asyncio.run(renewed())
    return partial(connected, writer), partial(connected, reader)


def _sqlite(folder: Path, synchronous: str, batch: int, content: str) -> tuple[End, End]:
    path = folder / f"{synchronous}.db"
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("CREATE TABLE IF NOT EXISTS records (seq INTEGER PRIMARY KEY, content)")
        database.execute("DELETE FROM records")
        database.commit()

    @contextmanager
    def connected(run: Callable[[sqlite3.Connection, int], None]) -> Iterator[Pass]:
        with closing(sqlite3.connect(path, isolation_level=None, timeout=60)) as database:
            database.execute(f"PRAGMA synchronous = {synchronous}")
            yield partial(run, database)

    def write(database: sqlite3.Connection, count: int) -> None:
        for first in range(0, count, batch):
            rows = [(content,)] * min(batch, count - first)
            database.execute("BEGIN IMMEDIATE")
            database.executemany("INSERT INTO records (content) VALUES (?)", rows)
            database.execute("COMMIT")

    def read(database: sqlite3.Connection, count: int) -> None:
        seen = last = 0
        while seen < count:
            rows = database.execute(
                "SELECT seq, content FROM records WHERE seq > ? ORDER BY seq", (last,)
            ).fetchall()
            if rows:
                seen += len(rows)
                last = rows[-1][0]
            else:
                sleep(_POLL_S)

    return partial(connected, write), partial(connected, read)


def _iceoryx(stack: ExitStack, events: bool, content: str) -> tuple[End, End]:
    stack.close()  # the leftovers of the last sample
    place, record = Place(stack), content.encode()

    def records() -> Any:
        return (
            place.service("records")
            .publish_subscribe(iceoryx2.Slice[ctypes.c_uint8])
            .max_publishers(_MOST_WRITERS)
            .subscriber_max_buffer_size(_QUEUED)
            .enable_safe_overflow(False)
            .open_or_create()
        )

    def news() -> Any:
        return place.service("news").event().max_notifiers(_MOST_WRITERS).open_or_create()

    @contextmanager
    def writer() -> Iterator[Pass]:
        builder = records().publisher_builder().initial_max_slice_len(len(record))
        publisher = builder.backpressure_strategy(
            iceoryx2.BackpressureStrategy.RetryUntilDelivered
        ).create()
        notifier = news().notifier_builder().create()

        def write(count: int) -> None:
            for _ in range(count):
                sample = publisher.loan_slice_uninit(len(record))
                ctypes.memmove(sample.payload_ptr, record, len(record))
                sample.assume_init().send()
                if events:
                    notifier.notify()

        yield write
        notifier.delete()
        publisher.delete()

    @contextmanager
    def reader() -> Iterator[Pass]:
        subscriber = records().subscriber_builder().create()
        listener = news().listener_builder().create()

        def read(count: int) -> None:
            seen = 0
            while seen < count:
                if events:
                    listener.blocking_wait()
                while (sample := subscriber.receive()) is not None:
                    ctypes.string_at(sample.payload_ptr, len(record))
                    sample.delete()
                    seen += 1

        yield read
        listener.delete()
        subscriber.delete()

    return writer, reader


def _queue(content: str) -> tuple[End, End]:
    queue: multiprocessing.Queue[str] = multiprocessing.Queue()

    def write(count: int) -> None:
        for _ in range(count):
            queue.put(content)
        queue.close()
        queue.join_thread()

    def read(count: int) -> None:
        for _ in range(count):
            queue.get()

    return _inherited(write), _inherited(read)


def _pipe(content: str) -> tuple[End, End]:
    receiver, sender = multiprocessing.Pipe(duplex=False)
    record = content.encode()

    def write(count: int) -> None:
        for _ in range(count):
            sender.send_bytes(record)

    def read(count: int) -> None:
        for _ in range(count):
            receiver.recv_bytes()

    return _inherited(write), _inherited(read)
