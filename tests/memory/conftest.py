"""Shared by the tests of the native module: a page of memory, and a file that is open twice."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from shmepoch._native import PAGE, Memory
from tests.memory.attached import ROOM


@pytest.fixture
def memory() -> Memory:
    """A page of private memory."""
    return Memory.private(PAGE)


@pytest.fixture
def fds() -> Iterator[tuple[int, int]]:
    """Two open file descriptions of one file of a page."""
    fd = os.open("/dev/shm", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    os.truncate(fd, PAGE)
    other = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
    yield fd, other
    os.close(fd)
    os.close(other)


@pytest.fixture
def fd() -> Iterator[int]:
    """The file of an empty epoch, as large as `ROOM`; it has no name."""
    fd = os.open("/dev/shm", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    os.truncate(fd, ROOM.parts["size"])
    yield fd
    os.close(fd)
