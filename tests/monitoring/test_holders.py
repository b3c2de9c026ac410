"""Who holds the locks of a file, as the kernel lists them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from shmepoch._native import PAGE, Descriptor, Memory, try_lock, unlock
from shmepoch.monitoring.holders import Holder, holders, is_stopped
from tests.support import eventually


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Descriptor]:
    """A file that this process has mapped."""
    made = Descriptor.open(tmp_path / "file", os.O_CREAT | os.O_RDWR)
    os.truncate(made.fileno(), PAGE)
    mapped = Memory(made, PAGE)
    yield made
    assert len(mapped) == PAGE
    made.close()


def found(file: Descriptor) -> list[Holder]:
    return holders(os.fstat(file.fileno()))


def test_nobody(file: Descriptor) -> None:
    assert found(file) == []


def test_neighbours_and_others(file: Descriptor) -> None:
    for byte, shared in ((0, False), (1, False), (2, True), (5, False)):
        assert try_lock(file, byte, shared)
    [holder] = found(file)
    assert (holder.pid, holder.descriptor) == (os.getpid(), file.fileno())
    assert [byte for byte in range(8) if holder.holds(byte)] == [0, 1, 2, 5]
    unlock(file, 1)
    [holder] = found(file)
    assert [byte for byte in range(8) if holder.holds(byte)] == [0, 2, 5]


def test_several_who_share(file: Descriptor, tmp_path: Path) -> None:
    other = Descriptor.open(tmp_path / "file", os.O_RDWR)
    for one in (file, other):
        assert try_lock(one, 3, True)
    assert {one.descriptor for one in found(file)} == {file.fileno(), other.fileno()}
    assert all(one.holds(3) for one in found(file))
    other.close()


def test_the_locks_of_other_files_are_theirs(file: Descriptor, tmp_path: Path) -> None:
    other = Descriptor.open(tmp_path / "other", os.O_CREAT | os.O_RDWR)
    assert try_lock(other, 0, False)
    assert found(file) == []
    other.close()


def test_the_descriptors_of_a_process_that_has_not_mapped_it_are_left_alone(
    tmp_path: Path,
) -> None:
    """To read of them would delay the end of the locks of a process that is killed."""
    file = Descriptor.open(tmp_path / "file", os.O_CREAT | os.O_RDWR)
    assert try_lock(file, 0, False)
    assert found(file) == []
    file.close()


def test_another_process(file: Descriptor, tmp_path: Path) -> None:
    pid = os.fork()
    if pid == 0:
        mine = Descriptor.open(tmp_path / "file", os.O_RDWR)
        try_lock(mine, 4, False)
        signal.pause()
        os._exit(0)
    [holder] = eventually(lambda: found(file))
    assert holder.pid == pid
    assert holder.holds(4)
    assert not is_stopped(pid)
    os.kill(pid, signal.SIGSTOP)
    eventually(lambda: is_stopped(pid))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert found(file) == []
    assert not is_stopped(pid)
