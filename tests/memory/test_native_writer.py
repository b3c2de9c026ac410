"""The writer lock, through the transitions that take it: it excludes, and its waits let other
threads run."""

from __future__ import annotations

import errno
import gc
import os
import signal
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any

import pytest

from shmepoch import _native as at
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
from tests.memory.attached import (
    BYTE,
    LARGE,
    ROOM,
    Attached,
    Retired,
    attachment,
    copying,
    held,
    interrupt_main_thread,
    waiting,
)
from tests.memory.private import LIVE, Id, head
from tests.support import eventually

# --- it excludes ----------------------------------------------------------------------------------


def test_threads_and_attachments_exclude_each_other(fd: int) -> None:
    """Two attachments of one file, each with several threads. The lock is never free for long, so
    they wait, and go on without the interpreter lock."""
    attachments = [Attached(fd), Attached(fd)]

    def take_turns(thread: int) -> None:
        for turn in range(300):
            attachments[thread % 2].turn(thread * 1000 + turn)

    def hold() -> None:
        while not all(task.done() for task in tasks):
            with held(fd):
                pass

    with ThreadPoolExecutor(7) as pool:
        tasks = [pool.submit(take_turns, thread) for thread in range(6)]
        pool.submit(hold).result(100)
        for task in tasks:
            task.result(60)
    assert attachments[0].outcomes() == 1800
    assert not is_locked(fd, BYTE)


def test_threads_of_one_attachment_exclude_each_other(fd: int) -> None:
    """The file's lock does not exclude them: they share one description. One is inside for a while,
    without the interpreter lock, and another one polls."""
    os.truncate(fd, LARGE.parts["size"])
    one = Attached(fd, LARGE)

    def was_busy() -> bool:
        with copying(one, fd):
            return one.is_busy()

    assert eventually(was_busy)
    assert not one.is_busy()


def test_processes_exclude_each_other(fd: int) -> None:
    children = []
    for child in range(3):
        pid = os.fork()
        if pid == 0:
            try:
                one = Attached(fd)
                for turn in range(2000):
                    one.turn(child * 10_000 + turn)
                os._exit(0)
            finally:
                os._exit(1)
        children.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0, 0, 0]
    assert Attached(fd).outcomes() == 6000


def test_a_lock_that_is_held_elsewhere_is_waited_for(fd: int) -> None:
    """Every transition waits for it, except those that must not wait."""
    one = Attached(fd)
    id = Id.of(1)
    one.epoch.register(((id, head(id), b""),), 1, 1)
    before = bytes(one.memory)
    calls: list[Callable[[], object]] = [
        lambda: one.epoch.register(((Id.of(2), head(Id.of(2)), b""),), 1, 1),
        lambda: one.epoch.start((id,), 1),
        lambda: one.epoch.change(id, LIVE, 3, 0, None),
        lambda: one.epoch.watch(id),
        lambda: one.epoch.collect(0, 0),
        lambda: one.epoch.end((), LIVE, 1, 1, False),
        one.epoch.copy,
        lambda: one.epoch.terminate(b"", (), (), 1, 1, False, False, True),
    ]
    with ThreadPoolExecutor(len(calls)) as pool:
        with held(fd):
            tasks = [waiting(pool, call) for call in calls]
            assert one.is_busy()
            with pytest.raises(Refused) as busy:
                one.epoch.terminate(b"outcome", None, (), 1, 1, False, True, False)
            assert busy.value.args[0] == "busy"
            assert not any(task.done() for task in tasks)
            assert bytes(one.memory) == before
        for task in tasks:
            with suppress(Refused):  # such as a start of a running operation
                task.result(60)
    assert not one.is_busy()
    assert bytes(one.memory) != before


def test_a_lock_is_given_up_by_whoever_dies(fd: int) -> None:
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            theirs = attachment(fd)
            os.write(write, b"%d" % try_lock(theirs, BYTE, False))
            signal.pause()
        finally:
            os._exit(0)
    assert os.read(read, 1) == b"1"
    os.close(read)
    os.close(write)
    one = Attached(fd)
    assert one.is_busy()
    with ThreadPoolExecutor(1) as pool:
        sealing = waiting(pool, one.epoch.seal)
        assert not sealing.done()
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        sealing.result(60)
    assert one.memory.load(at.STATE_AT) == at.SEALED


def test_a_lock_that_could_not_be_taken_is_free() -> None:
    """The descriptor is not open for writing."""
    lock = WriterLock(Descriptor.open("/dev/null", os.O_RDONLY))
    epoch = Epoch(Memory.private(ROOM.parts["size"]), lock, *ROOM)
    for transition in (epoch.seal, epoch.copy, lambda: epoch.watch_each((), True)):
        for _ in range(2):
            with pytest.raises(OSError) as refused:
                transition()
            assert refused.value.errno == errno.EBADF


def test_an_error_inside_gives_the_lock_up(fd: int) -> None:
    one, other = Attached(fd), Attached(fd)
    for call in (
        lambda: one.epoch.start((Id.of(1),), 1),
        lambda: one.epoch.watch(Id.of(1)),
        lambda: one.epoch.collect(5, 5),
    ):
        with pytest.raises(Refused):
            call()
        assert not is_locked(fd, BYTE)
    assert not other.is_busy()


# --- other code during a wait ---------------------------------------------------------------------


def test_a_thread_that_waits_for_the_lock_lets_others_run(fd: int) -> None:
    one = Attached(fd)
    with ThreadPoolExecutor(1) as pool:
        with held(fd):
            sealing = waiting(pool, one.epoch.seal)
            for _ in range(1000):
                sum(range(100))  # it would never end if the other thread held the interpreter lock
            assert not sealing.done()
        sealing.result(60)


def test_ctrl_c_while_waiting_for_the_lock(fd: int) -> None:
    """Afterwards the lock is completely free."""
    one = Attached(fd)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with ThreadPoolExecutor(1) as pool:
            with held(fd):
                sent = pool.submit(interrupt_main_thread)
                with pytest.raises(KeyboardInterrupt):
                    one.epoch.seal()
                sent.result(60)
            assert one.memory.load(at.STATE_AT) == at.OPEN
            assert not one.is_busy()
            one.turn(1)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_signal_that_is_handled_does_not_end_a_wait(fd: int) -> None:
    """The handler may also use the epoch, whose lock this thread does not have."""
    one, seen = Attached(fd), list[bool]()

    def handle(number: int, frame: object) -> None:
        seen.append(one.is_busy())
        if len(seen) == 3:
            unlock(fd, BYTE)
            one.turn(1)

    def reached(count: int) -> bool:
        return len(seen) == count

    def send() -> None:
        for count in range(3):
            eventually(partial(reached, count))
            interrupt_main_thread(signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, handle)
    try:
        with ThreadPoolExecutor(1) as pool, held(fd):
            sent = pool.submit(send)
            one.epoch.seal()
            sent.result(60)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert seen == [True] * 3
    assert one.outcomes() == 1
    assert one.memory.load(at.STATE_AT) == at.SEALED


def test_a_signal_that_comes_just_before_a_wait_sleeps_is_handled(fd: int) -> None:
    """Before the sleep there is no system call that it could interrupt."""
    one = Attached(fd)

    def interrupted(delay_us: int) -> None:
        signal.setitimer(signal.ITIMER_REAL, delay_us / 1e6)
        one.epoch.seal()

    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        with held(fd):
            for delay_us in range(1, 200, 2):
                with pytest.raises(KeyboardInterrupt):
                    interrupted(delay_us)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert not one.is_busy()


# --- construction ---------------------------------------------------------------------------------


def test_what_a_lock_is_not_made_of(fd: int) -> None:
    descriptor = attachment(fd)
    make: Any = WriterLock
    for arguments in ((fd,), ("x",), (descriptor, "0"), (descriptor, 0, 5), (None, 0, list)):
        with pytest.raises(TypeError):
            make(*arguments)
    with pytest.raises(TypeError):
        make(descriptor, at=0)
    for byte in (-1, -(2**63)):
        with pytest.raises(ValueError, match="no byte"):
            make(descriptor, byte)
    with pytest.raises(OverflowError):
        make(descriptor, 2**63)
    assert make(descriptor, 2**62, None)
    assert not hasattr(make(), "__enter__")


def test_whose_lock_it_is() -> None:
    lock: Any = WriterLock()
    assert lock.participant == 0
    for key in (5, 2**64 - 1, 0):
        lock.participant = key
        assert lock.participant == key
    wrong: Any
    for wrong, error in ((-1, OverflowError), (2**64, OverflowError), ("1", TypeError)):
        with pytest.raises(error):
            lock.participant = wrong
    with pytest.raises(TypeError):
        del lock.participant
    assert lock.participant == 0


def test_it_is_the_writer_byte_by_itself(fd: int) -> None:
    one = Attached(fd)
    epoch = Epoch(one.memory, WriterLock(one.descriptor), *ROOM)
    assert try_lock(fd, at.WRITER_BYTE, False)
    with pytest.raises(Refused):
        epoch.watch_each((), False)
    assert not one.is_busy()
    unlock(fd, at.WRITER_BYTE)
    epoch.watch_each((), False)


def test_a_lock_in_a_cycle_is_collected(fd: int) -> None:
    class Holder:
        lock: WriterLock

        def attend(self) -> None:
            pass

    holder = Holder()
    holder.lock = WriterLock(attachment(fd), 0, holder.attend)
    holder.lock.retire(partial(Retired, holder))
    gone = weakref.ref(holder)
    del holder
    gc.collect()
    assert gone() is None
