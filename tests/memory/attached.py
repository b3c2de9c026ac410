"""Attachments of one epoch's file, and threads that wait for its writer lock."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Final, TypeVar

from shmepoch._native import (
    Descriptor,
    Epoch,
    Memory,
    Refused,
    WriterLock,
    is_locked,
    try_lock,
    unlock,
)
from tests.memory.private import LIVE, TEMPLATE, Id, Room, head
from tests.support import eventually

T = TypeVar("T")

ROOM: Final = Room(max_completed=8, max_operations=8, feed_bytes=4096)
#: The byte that is locked: not the default byte of a lock.
BYTE: Final = 7


class Retired(Exception):
    pass


def attachment(fd: int) -> Descriptor:
    """Another description of a file, which need not have a name."""
    return Descriptor.open(f"/proc/self/fd/{fd}", os.O_RDWR)


class Attached:
    """One attachment of a file: as good as another process."""

    def __init__(self, fd: int, room: Room = ROOM, attend: Callable[[], object] | None = None):
        self.descriptor: Final = attachment(fd)
        self.memory: Final = Memory(self.descriptor, room.parts["size"])
        self.lock: Final = WriterLock(self.descriptor, byte=BYTE, attend=attend)
        self.epoch: Final = Epoch(self.memory, self.lock, *room)

    def turn(self, number: int) -> None:
        """Register an operation and end it."""
        id = Id.of(number)
        self.epoch.register(((id, head(id), b""),), 1, 1)
        self.epoch.end(((id, b"outcome"),), LIVE, 1, 1, False)

    def outcomes(self) -> int:
        """How many operations have ended; checks that each ended once, in the order of the feed."""
        assert self.epoch.active() == 0
        registrations, watermark, *_ = self.epoch.words()
        assert registrations == watermark
        _, dropped, data = self.epoch.list_since(0, TEMPLATE)
        assert data is not None
        assert int.from_bytes(data[1:5], "big") == watermark - dropped
        return watermark

    def is_busy(self) -> bool:
        """Whether it would have to wait for the lock."""
        try:
            self.epoch.watch_each((), False)
        except Refused as refused:
            assert refused.args == ("busy", "", -1, 0, 0, 0)
            return True
        return False


@contextmanager
def held(fd: int) -> Iterator[None]:
    """Hold the lock, like a process that is stopped in a transition. It locks `fd` itself, which is
    another description than those of the attachments."""
    assert eventually(lambda: try_lock(fd, BYTE, False))
    try:
        yield
    finally:
        unlock(fd, BYTE)


def waiting(pool: ThreadPoolExecutor, call: Callable[[], T]) -> Future[T]:
    """A call in a thread, which waits for the lock now unless it has got it."""
    began: list[int] = []

    def run() -> T:
        began.append(threading.get_native_id())
        return call()

    task = pool.submit(run)
    eventually(lambda: began)
    eventually(lambda: task.done() or is_asleep(began[0]))
    return task


def is_asleep(thread: int) -> bool:
    """Whether a thread of this process sleeps in a system call."""
    stat = Path(f"/proc/self/task/{thread}/stat").read_text()
    return stat.rpartition(")")[2].split()[0] == "S"


def interrupt_main_thread(number: int = signal.SIGINT) -> None:
    """Send a signal while the main thread sleeps in a system call."""
    thread = threading.main_thread().native_id
    assert thread is not None
    eventually(lambda: is_asleep(thread))
    os.kill(os.getpid(), number)


#: An epoch whose copy takes a moment, while the lock is held without the interpreter lock.
LARGE: Final = Room(feed_bytes=2**26)


@contextmanager
def copying(one: Attached, fd: int) -> Iterator[Future[Memory]]:
    """A thread that has just begun to copy a large epoch, without the interpreter lock."""
    with ThreadPoolExecutor(1) as pool:
        with held(fd):
            task = waiting(pool, one.epoch.copy)
        eventually(lambda: is_locked(fd, BYTE) or task.done())
        yield task
        task.result(60)
