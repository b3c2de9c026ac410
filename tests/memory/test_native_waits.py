"""Sleeping until a word has grown, and waking: no wake-up and no signal is missed."""

from __future__ import annotations

import os
import signal
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Final

import pytest

from shmepoch._native import Memory
from tests.support import eventually

SIZE: Final = 4096
TOP: Final = 2**64 - 1


VALUE, EVENT, CLOSED_FLAG = 0, 128, 256
SECOND: Final = 10**9


def wait(memory: Memory, above: int, timeout_ns: int | None = None) -> bool:
    return memory.wait_above(VALUE, above, EVENT, CLOSED_FLAG, timeout_ns)


@pytest.mark.parametrize("timeout_ns", [0, 1, 1000, 10**6, -1, -(2**63), -(10**9)])
def test_a_wait_times_out(memory: Memory, timeout_ns: int) -> None:
    assert wait(memory, 0, timeout_ns) is False
    memory.store(VALUE, 5)
    assert wait(memory, 5, timeout_ns) is False
    assert wait(memory, TOP, timeout_ns) is False


@pytest.mark.parametrize("timeout_ns", [0, -1, None, 2**63 - 1])
def test_a_wait_that_is_over(memory: Memory, timeout_ns: int | None) -> None:
    memory.store(VALUE, 5)
    assert wait(memory, 4, timeout_ns) is True
    memory.store(CLOSED_FLAG, 1)
    assert wait(memory, 5, timeout_ns) is True


@pytest.mark.parametrize("timeout", [2**63, -(2**63) - 1, 1.5, "1"])
def test_a_timeout_that_is_none(memory: Memory, timeout: Any) -> None:
    with pytest.raises((OverflowError, TypeError)):
        wait(memory, 0, timeout)


@pytest.mark.parametrize("word", [VALUE, CLOSED_FLAG])
def test_a_sleeper_is_woken(memory: Memory, word: int) -> None:
    """By the value and by the closed flag. Every wake call wakes it; without a sleeper there is
    none."""
    assert memory.wake(EVENT) is False

    def asleep(sleepers: list[Future[bool]]) -> bool:
        return memory.load(EVENT) >> 32 != 0 or all(sleeper.done() for sleeper in sleepers)

    with ThreadPoolExecutor(3) as pool:
        for value in range(1, 20):
            memory.store(CLOSED_FLAG, 0)
            sleepers = [pool.submit(wait, memory, memory.load(VALUE)) for _ in range(3)]
            eventually(partial(asleep, sleepers))
            memory.store(word, value)
            memory.wake(EVENT)
            assert [sleeper.result(60) for sleeper in sleepers] == [True] * 3


def test_a_sleeper_without_a_wake_call_polls_by_itself(memory: Memory) -> None:
    """Its writer was killed between its store and its wake call."""
    with ThreadPoolExecutor(1) as pool:
        sleeper = pool.submit(wait, memory, 0)
        eventually(lambda: memory.load(EVENT) >> 32)
        memory.store(VALUE, 1)
        assert sleeper.result(60) is True


def test_a_count_that_comes_round(memory: Memory) -> None:
    """The futex has 32 bits, and the caller sees neither it nor the flag beside it."""
    memory.store(EVENT, 2**32 - 1)
    memory.wake(EVENT)
    assert memory.load(EVENT) & (2**32 - 1) == 0
    memory.store(EVENT, TOP)
    assert memory.wake(EVENT) is True
    assert memory.wake(EVENT) is False


def test_processes_wake_each_other(fds: tuple[int, int]) -> None:
    memory, rounds = Memory(fds[0], SIZE), 200
    pid = os.fork()
    if pid == 0:
        try:
            theirs = Memory(fds[1], SIZE)
            for value in range(1, rounds):
                theirs.wait_above(8, value - 1, EVENT + 64, CLOSED_FLAG, None)
                theirs.store(VALUE, value)
                theirs.wake(EVENT)
        finally:
            os._exit(0)
    for value in range(1, rounds):
        memory.store(8, value)
        memory.wake(EVENT + 64)
        assert wait(memory, value - 1, 60 * SECOND)
        assert memory.load(VALUE) == value
    assert os.waitpid(pid, 0)[1] == 0


def test_a_wait_ends_with_ctrl_c(memory: Memory) -> None:
    """The main thread sleeps, and the wait raises the handler's exception."""
    assert threading.current_thread() is threading.main_thread()

    def interrupt() -> None:
        eventually(lambda: memory.load(EVENT) >> 32)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(interrupt)
            with pytest.raises(KeyboardInterrupt):
                wait(memory, 0)
    finally:
        signal.signal(signal.SIGINT, before)
    memory.store(VALUE, 1)
    assert wait(memory, 0)


def test_a_signal_that_is_handled_does_not_end_a_wait(memory: Memory) -> None:
    seen: list[int] = []

    def handle(number: int, frame: object) -> None:
        seen.append(number)
        if len(seen) == 3:
            memory.store(VALUE, 1)

    def reached(count: int) -> bool:
        return len(seen) == count

    def send() -> None:
        for count in range(3):
            eventually(partial(reached, count))
            eventually(lambda: memory.load(EVENT) >> 32)
            os.kill(os.getpid(), signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, handle)
    try:
        with ThreadPoolExecutor(1) as pool:
            sent = pool.submit(send)
            assert wait(memory, 0, 60 * SECOND)
            sent.result(60)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert len(seen) == 3


def test_an_idle_wait_uses_no_processor(memory: Memory) -> None:
    wait(memory, 0, 10**7)  # it has learned that spinning does not pay
    before = time.process_time_ns()
    for _ in range(3):
        wait(memory, 0, 10**8)
    assert time.process_time_ns() - before < 10**8  # of 3 * 10**8 that it waited


def test_a_signal_that_comes_just_before_a_wait_sleeps_is_handled(memory: Memory) -> None:
    """Before the sleep there is no system call that it could interrupt."""

    def interrupted(delay_us: int) -> None:
        signal.setitimer(signal.ITIMER_REAL, delay_us / 1e6)
        wait(memory, 0, 20 * SECOND)

    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        for delay_us in range(1, 200, 2):
            with pytest.raises(KeyboardInterrupt):
                interrupted(delay_us)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
