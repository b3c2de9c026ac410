"""(e) Making, attaching and ending; tokens and pickles."""

from __future__ import annotations

import gc
import mmap
import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from multiprocessing.shared_memory import SharedMemory
from time import perf_counter
from typing import Final

import posix_ipc

from bench import floor
from bench.contestants import SHMEPOCH
from bench.harness import Contestant, Measure, Sample, goal
from bench.loops import calls
from bench.work import epoch
from shmepoch import (
    OpsLifecycleConfig,
    RuntimeEpochId,
    RuntimeSessionAdapter,
    SessionId,
    SessionRuntimeBindings,
)
from shmepoch.memory.segment import SharedSegment

_BARE: Final = "shm_open + mmap + close"
_UNCHECKED: Final = "checks nothing"
#: The steps of a segment's life, and the measure of each.
_STATIONS: Final = (
    "create and publish a segment",
    "attach a segment",
    "detach a segment",
    "seal and unlink a segment",
)
#: The times at which the steps of one life began, and at which the last ended.
Life = Callable[[], tuple[float, float, float, float, float]]


def measures(stack: ExitStack, count: int) -> Iterator[Measure]:
    """The group, for `count` calls in each sample."""
    bindings = epoch(stack)
    segment = bindings.shared_segment()
    bare = Contestant(_BARE, calls(partial(_attach_bare, f"/{segment.name}"), count), _UNCHECKED)
    program = floor.build(stack, "attach")
    in_c = Contestant(
        "the same in C", partial(floor.figure, program, f"/{segment.name}", count), "the floor"
    )
    attach = partial(_attach, segment.namespace, bindings.session_id)
    yield Measure(
        "attach and leave a segment",
        [
            Contestant(SHMEPOCH, calls(attach, count)),
            bare,
            Contestant(
                "multiprocessing.shared_memory",
                calls(partial(_attach_shared, _shared(stack, segment.layout.size)), count),
                "checks nothing; its tracker may remove it",
            ),
            in_c,
        ],
    )
    here = _Elsewhere(bindings.to_token())
    stack.callback(here.close)
    yield Measure(
        "attach and leave bindings by token",
        [Contestant(SHMEPOCH, here.sample(count)), bare, in_c],
    )
    yield Measure(
        "pickle and back, attached already",
        [Contestant(SHMEPOCH, calls(lambda: pickle.loads(pickle.dumps(bindings)), count))],
    )
    namespace, few = f"bench-{os.getpid()}-made", count // 10
    for index, station in enumerate(_STATIONS):
        yield Measure(
            station,
            [
                Contestant(SHMEPOCH, _station(partial(_live, namespace), index, few)),
                Contestant(
                    "posix_ipc + mmap",
                    _station(partial(_live_bare, segment.layout.size), index, few),
                    _UNCHECKED,
                ),
            ],
        )
    adapter = stack.enter_context(RuntimeSessionAdapter.ephemeral(namespace=namespace))
    yield Measure(
        "make a session", [Contestant(SHMEPOCH, _making(adapter, few)), goal("0.3 ms", 0.3e-3)]
    )
    yield Measure(
        "make and end a session", [Contestant(SHMEPOCH, calls(partial(_make, adapter), few))]
    )


def _attach(namespace: str, session_id: SessionId) -> None:
    SharedSegment.attach(namespace, session_id).close()


def _attach_bare(name: str) -> None:
    """Do the minimum of any attach."""
    memory = posix_ipc.SharedMemory(name)
    mmap.mmap(memory.fd, memory.size).close()
    memory.close_fd()


def _shared(stack: ExitStack, size: int) -> str:
    memory = SharedMemory(create=True, size=size)
    stack.callback(memory.unlink)
    stack.callback(memory.close)
    return memory.name


def _attach_shared(name: str) -> None:
    SharedMemory(name).close()


def _station(life: Life, index: int, count: int) -> Sample:
    """Seconds of one step, from `count` lives."""

    def sample() -> float:
        taken = 0.0
        for _ in range(count):
            times = life()
            taken += times[index + 1] - times[index]
        return taken / count

    return sample


def _live(namespace: str) -> tuple[float, float, float, float, float]:
    session_id, epoch_id = SessionId.new(), RuntimeEpochId.new()
    made = perf_counter()
    segment = SharedSegment.allocate(
        namespace, OpsLifecycleConfig(), session_id=session_id, epoch_id=epoch_id
    )
    segment.publish()
    published = perf_counter()
    other = SharedSegment.attach(namespace, session_id)
    attached = perf_counter()
    other.close()
    detached = perf_counter()
    segment.seal()
    segment.unlink()
    unlinked = perf_counter()
    segment.close()
    return made, published, attached, detached, unlinked


def _live_bare(size: int) -> tuple[float, float, float, float, float]:
    made = perf_counter()
    memory = posix_ipc.SharedMemory(None, posix_ipc.O_CREX, size=size)
    os.posix_fallocate(memory.fd, 0, size)  # else a full /dev/shm is a SIGBUS later
    first = mmap.mmap(memory.fd, size)
    published = perf_counter()
    other = posix_ipc.SharedMemory(memory.name)
    second = mmap.mmap(other.fd, other.size)
    attached = perf_counter()
    second.close()
    other.close_fd()
    detached = perf_counter()
    memory.unlink()
    unlinked = perf_counter()
    first.close()
    memory.close_fd()
    return made, published, attached, detached, unlinked


def _making(adapter: RuntimeSessionAdapter, count: int) -> Sample:
    """Seconds for one session; its end is not timed."""

    def sample() -> float:
        taken = 0.0
        for _ in range(count):
            session_id = SessionId.new()
            began = perf_counter()
            adapter.prepare_bindings(session_id)
            taken += perf_counter() - began
            adapter.unregister_session(session_id)
        return taken / count

    return sample


def _make(adapter: RuntimeSessionAdapter) -> None:
    session_id = SessionId.new()
    adapter.prepare_bindings(session_id)
    adapter.unregister_session(session_id)


class _Elsewhere:
    """Attaches in a forked child, since a process has one attachment of an epoch."""

    def __init__(self, token: str) -> None:
        self._token = token
        self._ask, theirs = os.pipe(), os.pipe()
        self._answer = theirs
        self._pid = os.fork()
        if self._pid == 0:
            self._serve()

    def _serve(self) -> None:
        os.close(self._ask[1])
        gc.disable()  # like the harness in its own process
        while text := os.read(self._ask[0], 64):
            gc.collect()
            seconds = calls(
                lambda: SessionRuntimeBindings.from_token(self._token).close(), int(text)
            )
            os.write(self._answer[1], repr(seconds()).encode())
        os._exit(0)

    def sample(self, count: int) -> Sample:
        """Let the child take a sample."""

        def sample() -> float:
            os.write(self._ask[1], str(count).encode())
            return float(os.read(self._answer[0], 64))

        return sample

    def close(self) -> None:
        os.close(self._ask[1])
        os.waitpid(self._pid, 0)
