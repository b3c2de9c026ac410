"""(c) Waking another process and being woken by it."""

from __future__ import annotations

import asyncio
import atexit
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from time import perf_counter
from typing import Any, Final

import posix_ipc

from bench import floor
from bench.contestants import SHMEPOCH
from bench.harness import Contestant, Measure, Skipped
from bench.iceoryx import Place
from bench.loops import calls
from bench.processes import APART, TOGETHER, meeting, together
from bench.servers import ServerMissing, nats, redis
from shmepoch import RuntimeEpochId, SessionId
from shmepoch import _native as at
from shmepoch.memory.segment import SharedSegment

#: Long enough that any wait sleeps: longer than the longest spin.
_PAUSE_S: Final = 150e-6

Signal = Callable[[int], object]
#: Opens, in the process that uses them, a function that signals and one that waits.
Side = Callable[[], AbstractContextManager[tuple[Signal, Signal]]]
#: Makes the side that asks and the side that answers.
Signals = Callable[[], tuple[Side, Side]]
#: Makes this number of round trips on these processors, with this pause before each signal.
Trips = Callable[[tuple[int, int], int, float], Sequence[float]]
#: Its name, its trips or the reason why it has none, and its caveat.
Peer = tuple[str, Trips | str, str]


def measures(stack: ExitStack, count: int) -> Iterator[Measure]:
    """The group, for `count` round trips in each sample."""
    program = floor.build(stack, "pingpong")
    peers = list(_peers(stack))
    if APART != TOGETHER:
        yield Measure(
            "wake round trip, separate cores",
            [
                *_sampled(peers, APART, count),
                _floor("futexes in C", program, "futex", APART, count),
                _floor("spinning in C", program, "spin", APART, count),
            ],
        )
        few = max(100, count // 5)
        yield Measure(
            "wake round trip, separate cores, asleep",
            [
                *_sampled(peers, APART, few, _PAUSE_S),
                _floor("futexes in C", program, "futex", APART, few, _PAUSE_S),
                _floor("futexes in C, timed", program, "timed", APART, few, _PAUSE_S),
            ],
        )
    yield Measure("signal while nobody waits", list(_unheard(stack, count)))
    yield Measure(
        "wake round trip, one core",
        [
            *_sampled(peers, TOGETHER, count),
            _floor("futexes in C", program, "futex", TOGETHER, count),
            _floor("futexes in C, timed", program, "timed", TOGETHER, count),
        ],
    )


def _floor(
    name: str, program: Path, how: str, cpus: tuple[int, int], count: int, pause: float = 0
) -> Contestant:
    nanoseconds = round(pause * 1e9)
    return Contestant(
        name, partial(floor.seconds, program, how, *cpus, count, nanoseconds), "the floor"
    )


def _sampled(
    peers: Sequence[Peer], cpus: tuple[int, int], count: int, pause: float = 0
) -> Iterator[Contestant | Skipped]:
    for name, trips, caveat in peers:
        if isinstance(trips, str):
            yield Skipped(name, trips)
        else:
            yield Contestant(name, partial(trips, cpus, count, pause), caveat)


def round_trips(
    signals: Signals, cpus: tuple[int, int], count: int, pause: float = 0
) -> Sequence[float]:
    """Seconds of each round trip; both processes pause before they signal."""
    near, far = signals()
    meet = meeting(2)

    def asking() -> _Log:
        log = _Log()
        with near() as (send, receive):
            meet()
            for turn in range(1, count + 1):
                _spin(pause)
                log.begin()
                send(turn)
                receive(turn)
                log.end()
            meet()
        return log

    def answering() -> _Log:
        log = _Log()
        with far() as (answer, hear):
            meet()
            for turn in range(1, count + 1):
                log.begin()
                hear(turn)
                log.end()
                _spin(pause)
                answer(turn)
            meet()
        return log

    asked, answered = together([asking, answering], cpus)
    return _net(asked, answered, pause)


class _Log:
    """The duration of each wait, and the number of voluntary context switches in it."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.sleeps: list[int] = []

    def begin(self) -> None:
        self._sleeps = getrusage(RUSAGE_SELF).ru_nvcsw
        self._began = perf_counter()

    def end(self) -> None:
        self.seconds.append(perf_counter() - self._began)
        self.sleeps.append(getrusage(RUSAGE_SELF).ru_nvcsw - self._sleeps)


def _net(asked: _Log, answered: _Log, pause: float) -> Sequence[float]:
    """The round trips. For sleepers only those in which both slept, without the pause of the
    answer.

    A process that gets no processor for a while finds the signal already there, and does not sleep.
    """
    trips = list(zip(asked.seconds, asked.sleeps, answered.sleeps, strict=True))
    trips = trips[len(trips) // 10 :]  # at first the other process does not wait yet
    if not pause:
        return [seconds for seconds, _, _ in trips]
    slept = [seconds - pause for seconds, near, far in trips if near and far]
    if len(slept) < len(trips) // 10:
        raise RuntimeError(f"both slept in {len(slept)} of {len(trips)} round trips only")
    return slept


def _spin(seconds: float) -> None:
    if seconds:
        until = perf_counter() + seconds
        while perf_counter() < until:
            pass


def _segments() -> tuple[SharedSegment, SharedSegment]:
    """Two epochs without a name: each process wakes the other through one, and waits for one."""
    one, other = (
        SharedSegment.allocate(
            "bench", None, session_id=SessionId.new(), epoch_id=RuntimeEpochId.new()
        )
        for _ in range(2)
    )
    for segment in one, other:
        atexit.register(segment.close)
    return one, other


def _tell(segment: SharedSegment) -> Signal:
    """The steps of a commit after its entry is written: store the watermark, wake sleepers."""
    store, notify = segment.memory.store, segment.waiters.notify

    def tell(turn: int) -> None:
        store(at.WATERMARK_AT, turn)
        notify()

    return tell


def _hear(segment: SharedSegment) -> Signal:
    wait = segment.waiters.wait_above
    return lambda turn: wait(turn - 1, None)


def _inherited(signal: Signal, wait: Signal) -> Side:
    """A side that was opened before the fork."""
    return lambda: nullcontext((signal, wait))


def shmepoch() -> tuple[Side, Side]:
    """Signals through two epochs, one for each direction."""
    one, other = _segments()
    return _inherited(_tell(one), _hear(other)), _inherited(_tell(other), _hear(one))


def _pipe() -> tuple[Side, Side]:
    near, far = multiprocessing.Pipe()
    return (
        _inherited(lambda _: near.send_bytes(b"x"), lambda _: near.recv_bytes()),
        _inherited(lambda _: far.send_bytes(b"x"), lambda _: far.recv_bytes()),
    )


def _queue() -> tuple[Side, Side]:
    there: SimpleQueue[int] = multiprocessing.SimpleQueue()
    back: SimpleQueue[int] = multiprocessing.SimpleQueue()
    return (
        _inherited(there.put, lambda _: back.get()),
        _inherited(back.put, lambda _: there.get()),
    )


def _semaphore() -> posix_ipc.Semaphore:
    semaphore = posix_ipc.Semaphore(None, posix_ipc.O_CREX, initial_value=0)
    semaphore.unlink()
    return semaphore


def _semaphores() -> tuple[Side, Side]:
    there, back = _semaphore(), _semaphore()
    return (
        _inherited(lambda _: there.release(), lambda _: back.acquire()),
        _inherited(lambda _: back.release(), lambda _: there.acquire()),
    )


def _iceoryx(stack: ExitStack) -> tuple[Side, Side]:
    stack.close()  # the leftovers of the last sample
    place = Place(stack)

    @contextmanager
    def side(out: str, back: str) -> Iterator[tuple[Signal, Signal]]:
        notifier = place.service(out).event().open_or_create().notifier_builder().create()
        listener = place.service(back).event().open_or_create().listener_builder().create()
        yield lambda _: notifier.notify(), lambda _: listener.blocking_wait()
        notifier.delete()
        listener.delete()

    return partial(side, "there", "back"), partial(side, "back", "there")


def _redis(port: int) -> tuple[Side, Side]:
    from redis import Redis

    @contextmanager
    def side(out: str, back: str) -> Iterator[tuple[Signal, Signal]]:
        server: Any = Redis(port=port)
        server.ping()
        yield lambda turn: server.rpush(out, turn), lambda _: server.blpop([back])
        server.close()

    return partial(side, "there", "back"), partial(side, "back", "there")


def _nats_trips(port: int, cpus: tuple[int, int], count: int, pause: float) -> Sequence[float]:
    """Requests and replies. The client uses coroutines, and waits in their event loop."""
    import nats

    meet = meeting(2)
    url = f"nats://127.0.0.1:{port}"

    async def asking() -> _Log:
        log = _Log()
        connection = await nats.connect(url)
        meet()
        for _ in range(count):
            _spin(pause)
            log.begin()
            await connection.request("there", b"x", timeout=10)
            log.end()
        await connection.close()
        return log

    async def answering() -> _Log:
        log = _Log()
        connection = await nats.connect(url)
        requests = await connection.subscribe("there")
        await connection.flush()
        meet()
        for _ in range(count):
            log.begin()
            request = await requests.next_msg(timeout=10)
            log.end()
            _spin(pause)
            await request.respond(b"x")
        await connection.flush()
        await connection.close()
        return log

    jobs = [lambda: asyncio.run(asking()), lambda: asyncio.run(answering())]
    asked, answered = together(jobs, cpus)
    return _net(asked, answered, pause)


def _peers(stack: ExitStack) -> Iterator[Peer]:
    yield SHMEPOCH, partial(round_trips, shmepoch), ""
    yield "multiprocessing.Pipe", partial(round_trips, _pipe), ""
    yield "multiprocessing.SimpleQueue", partial(round_trips, _queue), ""
    yield "posix_ipc.Semaphore", partial(round_trips, _semaphores), ""
    places = stack.enter_context(ExitStack())
    yield "iceoryx2 event", partial(round_trips, partial(_iceoryx, places)), ""
    try:
        trips = partial(round_trips, partial(_redis, redis(stack)))
        yield "Redis list", trips, "a server between"
    except ServerMissing as missing:
        yield "Redis list", str(missing), ""
    try:
        yield "NATS request", partial(_nats_trips, nats(stack)), "a server between"
    except ServerMissing as missing:
        yield "NATS request", str(missing), ""


def _unheard(stack: ExitStack, count: int) -> Iterator[Contestant]:
    one, other = _segments()
    stack.callback(one.close)
    stack.callback(other.close)
    yield Contestant(SHMEPOCH, calls(one.waiters.notify, count))
    semaphore = _semaphore()
    stack.callback(semaphore.close)
    yield Contestant("posix_ipc.Semaphore", calls(semaphore.release, count))
