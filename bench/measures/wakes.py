"""(c) Waking another process and being woken by it."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from time import perf_counter
from typing import Final

import posix_ipc

from bench import floor
from bench.harness import Contestant, Measure, Skipped
from bench.processes import APART, TOGETHER, together
from bench.servers import ServerMissing, redis
from shmepoch import RuntimeEpochId, SessionId
from shmepoch.memory import layout as at
from shmepoch.memory.segment import SharedSegment

#: Long enough for any wait to have gone to sleep: longer than the longest spin.
_PAUSE_S: Final = 150e-6

Signal = Callable[[int], object]
#: Makes what one process sends and receives with, and what the other answers and hears with.
Signals = Callable[[], tuple[Signal, Signal, Signal, Signal]]
#: Its name, its signals or why it has none, and its caveat.
Peer = tuple[str, Signals | str, str]


def measures(stack: ExitStack, count: int) -> Iterator[Measure]:
    """The group, for so many round trips a sample."""
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
            ],
        )
    yield Measure(
        "wake round trip, one core",
        [
            *_sampled(peers, TOGETHER, count),
            _floor("futexes in C", program, "futex", TOGETHER, count),
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
    for name, signals, caveat in peers:
        if isinstance(signals, str):
            yield Skipped(name, signals)
        else:
            yield Contestant(name, partial(round_trips, signals, cpus, count, pause), caveat)


def round_trips(
    signals: Signals, cpus: tuple[int, int], count: int, pause: float = 0
) -> Sequence[float]:
    """Seconds of each round trip; both processes pause before they signal, net of the pause."""
    send, receive, answer, hear = signals()

    def asking() -> list[float]:
        times = []
        for turn in range(1, count + 1):
            _spin(pause)
            began = perf_counter()
            send(turn)
            receive(turn)
            times.append(perf_counter() - began - pause)
        return times

    def answering() -> None:
        for turn in range(1, count + 1):
            hear(turn)
            if pause:
                _spin(pause)
            answer(turn)

    times: list[float] = together([asking, answering], cpus)[0]
    return times[count // 10 :]  # the first ones find nobody waiting yet


def _spin(seconds: float) -> None:
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
    return one, other


def _tell(segment: SharedSegment) -> Signal:
    """What a commit does after its entry is written: store the watermark, wake who sleeps."""
    store, notify = segment.memory.store, segment.waiters.notify

    def tell(turn: int) -> None:
        store(at.WATERMARK_AT, turn)
        notify()

    return tell


def _hear(segment: SharedSegment) -> Signal:
    wait = segment.waiters.wait_above
    return lambda turn: wait(turn - 1, None)


def shmepoch() -> tuple[Signal, Signal, Signal, Signal]:
    """Through two epochs, one each way."""
    one, other = _segments()
    return _tell(one), _hear(other), _tell(other), _hear(one)


def _pipe() -> tuple[Signal, Signal, Signal, Signal]:
    near, far = multiprocessing.Pipe()
    return (
        lambda _: near.send_bytes(b"x"),
        lambda _: near.recv_bytes(),
        lambda _: far.send_bytes(b"x"),
        lambda _: far.recv_bytes(),
    )


def _queue() -> tuple[Signal, Signal, Signal, Signal]:
    there: SimpleQueue[int] = multiprocessing.SimpleQueue()
    back: SimpleQueue[int] = multiprocessing.SimpleQueue()
    return there.put, lambda _: back.get(), back.put, lambda _: there.get()


def _semaphores() -> tuple[Signal, Signal, Signal, Signal]:
    def made() -> posix_ipc.Semaphore:
        semaphore = posix_ipc.Semaphore(None, posix_ipc.O_CREX, initial_value=0)
        semaphore.unlink()
        return semaphore

    there, back = made(), made()
    return (
        lambda _: there.release(),
        lambda _: back.acquire(),
        lambda _: back.release(),
        lambda _: there.acquire(),
    )


def _redis(port: int) -> tuple[Signal, Signal, Signal, Signal]:
    from redis import Redis

    there, back = Redis(port=port), Redis(port=port)  # each connects in the process that uses it
    return (
        lambda turn: there.rpush("there", turn),
        lambda _: there.blpop(["back"]),
        lambda turn: back.rpush("back", turn),
        lambda _: back.blpop(["there"]),
    )


def _peers(stack: ExitStack) -> Iterator[Peer]:
    yield "shmepoch", shmepoch, ""
    yield "multiprocessing.Pipe", _pipe, ""
    yield "multiprocessing.SimpleQueue", _queue, ""
    yield "posix_ipc.Semaphore", _semaphores, ""
    try:
        yield "Redis list", partial(_redis, redis(stack)), "a server between"
    except (ServerMissing, ImportError) as missing:
        yield "Redis list", str(missing), ""
