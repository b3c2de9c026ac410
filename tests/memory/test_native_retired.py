"""The end of a writer lock: retired, forked, its descriptor closed, or its file without a name."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from shmepoch import _native as at
from shmepoch._native import (
    Epoch,
    Memory,
    WriterLock,
    is_locked,
    leave_inherited,
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
    waiting,
)
from tests.memory.private import Id, head
from tests.support import eventually

# --- retired --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True])
def test_a_lock_that_is_retired_refuses_every_transition(fd: int, shared: bool) -> None:
    lock = Attached(fd).lock if shared else WriterLock()
    epoch = Epoch(Memory.private(ROOM.parts["size"]), lock, *ROOM)
    native: Any = lock
    for arguments in ((), (Retired, 0)):
        with pytest.raises(TypeError):
            native.retire(*arguments)
    with pytest.raises(TypeError, match="called to make the error"):
        native.retire("not callable")
    epoch.copy()
    lock.retire(Retired)
    lock.retire(ValueError)  # the first call decides the error
    for transition in (epoch.seal, epoch.copy, lambda: epoch.watch_each((), True)):
        with pytest.raises(Retired):
            transition()
    assert epoch.words()[0] == 0, "to look takes no lock"
    assert not is_locked(fd, BYTE)


def test_retiring_frees_the_threads_that_wait_for_another_process(fd: int) -> None:
    """The other process is stopped and keeps the lock. The threads do not get it later, either."""
    one = Attached(fd)
    with ThreadPoolExecutor(3) as pool, held(fd):
        tasks = [waiting(pool, one.epoch.seal) for _ in range(3)]
        assert not any(task.done() for task in tasks)
        one.lock.retire(Retired)
        for task in tasks:
            with pytest.raises(Retired):
                task.result(60)
        assert is_locked(one.descriptor, BYTE), "it is held still"
    assert one.memory.load(at.STATE_AT) == at.OPEN


@pytest.mark.parametrize("moment", range(5))
def test_no_thread_is_inside_once_it_is_retired(fd: int, moment: int) -> None:
    """The descriptor may be closed then: nothing can change."""
    one = Attached(fd)

    def take_turns(thread: int) -> None:
        for turn in range(100_000):
            one.turn(thread * 100_000 + turn)

    def hold() -> None:
        while not all(task.done() for task in tasks):
            with held(fd):
                pass

    with ThreadPoolExecutor(4) as pool:
        tasks = [pool.submit(take_turns, thread) for thread in range(3)]
        holding = pool.submit(hold)
        eventually(lambda: one.memory.load(at.WATERMARK_AT) > 10 + 50 * moment)
        one.lock.retire(Retired)
        image = bytes(one.memory)
        one.descriptor.close()
        for task in tasks:
            with pytest.raises(Retired):
                task.result(60)
        holding.result(60)
    assert bytes(one.memory) == image


def test_retiring_waits_for_who_is_inside(fd: int) -> None:
    os.truncate(fd, LARGE.parts["size"])
    one = Attached(fd, LARGE)
    with copying(one, fd) as task:
        one.lock.retire(Retired)
        assert not is_locked(fd, BYTE)
    assert len(task.result()) == LARGE.parts["size"]


def test_after_a_fork_it_is_free_in_the_child(fd: int) -> None:
    """The thread that held it does not exist in the child; the parent still has the file's lock."""
    os.truncate(fd, LARGE.parts["size"])
    one, id = Attached(fd, LARGE), Id.of(1)
    one.epoch.register(((id, head(id), b""),), 1, 1)

    def forked_inside() -> bool:
        """Whether the fork was at the right moment, when the lock was held."""
        with copying(one, fd):
            pid = os.fork()
            if pid == 0:
                try:
                    leave_inherited()
                    inside = one.is_busy()
                    one.lock.after_fork()
                    assert one.descriptor.take(attachment(fd))
                    one.epoch.watch(id)  # after the parent's thread has left
                    os._exit(0 if inside else 3)
                finally:
                    os._exit(1)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code in (0, 3)
        return code == 0

    assert eventually(forked_inside)
    slot = one.epoch.slot(0)
    assert slot is not None
    assert slot[-1] >= 1


# --- attended -------------------------------------------------------------------------------------


def test_what_attends_opens_a_closed_descriptor(fd: int) -> None:
    def attend() -> None:
        assert not is_locked(fd, BYTE), "without a lock"
        calls.append(one.descriptor.take(attachment(fd)))

    calls: list[bool] = []
    one = Attached(fd, attend=attend)
    one.turn(1)
    calls.clear()  # it is also called for a file without a name
    one.descriptor.close()
    one.turn(2)
    assert calls[0] is True
    assert one.outcomes() == 2


@pytest.mark.parametrize("act", [lambda one: None, lambda one: one.descriptor.close(Retired)])
def test_what_attends_and_opens_nothing(fd: int, act: Callable[[Attached], None]) -> None:
    one: Attached
    one = Attached(fd, attend=lambda: act(one))
    one.descriptor.close(Retired)
    for transition in (one.epoch.seal, one.is_busy):
        with pytest.raises(Retired):
            transition()


def test_an_error_of_what_attends_is_raised(fd: int) -> None:
    def attend() -> None:
        raise LookupError("attended")

    def attended() -> bool:
        with suppress(LookupError):
            return one.is_busy()
        return True

    one = Attached(fd, attend=attend)
    eventually(attended)  # the file has no name, which is checked twice a second
    for _ in range(2):
        with pytest.raises(LookupError, match="attended"):
            one.epoch.seal()
    assert not is_locked(fd, BYTE)
    assert one.memory.load(at.STATE_AT) == at.OPEN


def test_a_file_without_a_name_is_looked_at_now_and_then(fd: int, tmp_path: Path) -> None:
    """At most twice a second: the check takes as long as the lock."""
    calls: list[int] = []

    def hears_of(attached: Attached) -> bool:
        assert not attached.is_busy()
        return bool(calls)

    unnamed = Attached(fd, attend=lambda: calls.append(1))
    eventually(partial(hears_of, unnamed))
    for number in range(50):
        unnamed.turn(number)
    assert len(calls) < 50
    path = tmp_path / "named"
    path.write_bytes(bytes(ROOM.parts["size"]))
    calls.clear()
    with open(path, "r+b") as file:
        named = Attached(file.fileno(), attend=lambda: calls.append(1))
        for number in range(50):
            named.turn(number)
        assert calls == []
        path.unlink()
        eventually(partial(hears_of, named))


def test_no_lock_is_held_while_a_file_without_a_name_is_attended_to(fd: int) -> None:
    """The callback may make a transition, and so may another process."""

    def attend() -> None:
        found.append(is_locked(fd, BYTE))
        if len(found) == 1:
            found.append(one.is_busy())

    found: list[bool] = []
    one = Attached(fd, attend=attend)
    eventually(lambda: one.is_busy() or found)
    assert set(found) == {False}


def test_a_lock_that_is_retired_while_a_transition_opens_its_descriptor(fd: int) -> None:
    one: Attached
    one = Attached(fd, attend=lambda: one.lock.retire(Retired))
    one.descriptor.close()
    with pytest.raises(Retired):
        one.epoch.seal()
    with pytest.raises(Retired):
        one.is_busy()
    one.lock.retire(Retired)  # no thread is inside
