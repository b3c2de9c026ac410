"""Byte locks, and descriptors: closed with their object, and not kept by a forked child."""

from __future__ import annotations

import itertools
import os
import signal
import stat
from pathlib import Path
from typing import Any, Final

import pytest

from shmepoch._native import (
    Cell,
    Descriptor,
    Epoch,
    Memory,
    WriterLock,
    is_locked,
    leave_inherited,
    rename_new,
    try_lock,
    unlock,
)
from tests.memory.private import Room
from tests.support import in_a_child

SIZE: Final = 4096
#: The mode of a file that no other user may open.
OWNED: Final = stat.S_IFREG | 0o600


class Closed(Exception):
    pass


# --- byte locks -----------------------------------------------------------------------------------


def test_byte_locks_are_between_descriptions(fds: tuple[int, int]) -> None:
    one, two = fds
    assert try_lock(one, 5, False)
    assert try_lock(one, 5, False)
    assert not try_lock(two, 5, False)
    assert not try_lock(two, 5, True)
    assert (is_locked(one, 5), is_locked(two, 5)) == (False, True)
    assert try_lock(two, 4, False)
    assert try_lock(two, 6, False)
    assert try_lock(one, 5, True)
    assert try_lock(two, 5, True)
    assert not try_lock(one, 5, False)
    unlock(two, 5)
    assert try_lock(one, 5, False)
    unlock(one, 5)
    unlock(one, 5)
    assert not is_locked(two, 5)
    assert try_lock(one, 2**62, False)
    assert is_locked(two, 2**62)


def held(path: Path) -> tuple[Descriptor, Memory]:
    """The descriptor of a file of this user alone, with byte 5 locked, and the mapped file."""
    opened = Descriptor.open_held(path, 5, OWNED, 3, True)
    assert opened is not None
    descriptor, size, head, memory = opened
    assert memory is not None
    assert (size, head) == (len(memory), bytes(memory)[:3])
    return descriptor, memory


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file in which everything is in order."""
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    path.chmod(0o600)
    return path


def test_a_file_is_opened_and_held_in_one(path: Path) -> None:
    one, memory = held(path)
    assert bytes(memory) == b"12345"
    two, other = held(path)
    assert is_locked(one, 5)
    assert not is_locked(one, 4)
    two.close()
    assert not is_locked(one, 5), "the memory, which is there still, holds no lock"
    assert bytes(other) == b"12345"
    unmapped = Descriptor.open_held(path, 5, OWNED, 3, False)
    assert unmapped is not None
    assert unmapped[3] is None
    assert not os.get_inheritable(one.fileno())


def test_a_descriptor_that_is_not_open() -> None:
    fd = os.open("/dev/null", os.O_RDONLY)
    os.close(fd)
    for call in (
        lambda: Memory(fd, SIZE),
        lambda: try_lock(fd, 0, False),
        lambda: unlock(fd, 0),
        lambda: is_locked(fd, 0),
    ):
        with pytest.raises(OSError):
            call()


# --- descriptors ----------------------------------------------------------------------------------


def open_descriptors() -> list[str]:
    """The open descriptors, without that of the listing."""
    return sorted(os.listdir("/proc/self/fd"))


def test_a_descriptor_is_closed_with_its_object(path: Path) -> None:
    before = open_descriptors()
    two = Descriptor.open(path, os.O_RDWR)
    one, memory = held(path)
    assert is_locked(two, 5)
    del one
    assert not is_locked(two, 5)
    assert bytes(memory) == b"12345"
    del two
    assert open_descriptors() == before


def test_a_number_does_not_outlive_its_descriptor(path: Path) -> None:
    one = Descriptor.open(path, os.O_RDWR)
    epoch = Epoch(Memory.private(Room().parts["size"]), WriterLock(one, 0), *Room())
    number = one.fileno()
    assert (one.closed, one.inherited) == (False, False)
    one.close()
    assert (one.closed, one.inherited) == (True, False)
    other = open(path, "rb")  # noqa: SIM115 # it takes the number
    with other:
        assert other.fileno() == number
        for use in (
            one.fileno,
            lambda: try_lock(one, 0, False),
            lambda: unlock(one, 0),
            lambda: is_locked(one, 0),
            lambda: Memory(one, 1),
            epoch.seal,
            lambda: epoch.watch_each((), False),
        ):
            with pytest.raises(ValueError, match="closed"):
                use()
    one.close(Closed)
    one.close()
    with pytest.raises(Closed):
        one.fileno()
    with pytest.raises(Closed):
        epoch.seal()


def test_what_cannot_be_opened(path: Path) -> None:
    before = open_descriptors()
    with pytest.raises(FileNotFoundError) as missing:
        Descriptor.open(path / "none" if path.is_dir() else path.parent / "none", os.O_RDWR)
    assert missing.value.filename == path.parent / "none"
    with pytest.raises(NotADirectoryError):
        Descriptor.open(f"{path}/none", os.O_RDWR)
    with pytest.raises(TypeError):
        Descriptor.open(path)  # type: ignore[call-arg]
    native: Any = Descriptor
    arguments: tuple[Any, ...]
    for arguments in (("x", "0"), ("x", 0, "0"), (5, 0), ("x", 0, 0, 0)):
        with pytest.raises(TypeError):
            native.open(*arguments)
    with pytest.raises(ValueError, match="null"):
        Descriptor.open("/dev/\0null", 0)
    opened: Any = Descriptor.open(path, os.O_RDWR)
    for wrong in ((5,), (None, None)):
        with pytest.raises(TypeError):
            opened.close(*wrong)
    assert not opened.closed
    del opened
    assert open_descriptors() == before


def test_a_descriptor_takes_over_another(path: Path) -> None:
    one, two = Descriptor.open(path, os.O_RDWR), Descriptor.open(path, os.O_RDWR)
    assert not one.take(two), "it is open"
    number = two.fileno()
    assert try_lock(two, 3, False)
    one.close(Closed)
    assert one.take(two)
    assert (one.fileno(), two.closed) == (number, True)
    with pytest.raises(ValueError, match="closed"):
        two.fileno()
    assert not one.take(two)
    with pytest.raises(TypeError):
        one.take(number)  # type: ignore[arg-type]
    three = Descriptor.open(path, os.O_RDWR)
    assert is_locked(three, 3)
    del one
    assert not is_locked(three, 3)


def test_a_child_leaves_what_it_inherited_to_its_parent(path: Path) -> None:
    """In every way to close it there, also with memory that is mapped through it."""
    path.write_bytes(bytes(SIZE))
    path.chmod(0o600)
    one, memory = held(path)
    by_hand, dropped = Descriptor.open(path, os.O_RDWR), Descriptor.open(path, os.O_RDWR)
    assert try_lock(by_hand, 6, False)
    assert try_lock(dropped, 7, False)
    cell, view = Cell(memory, 8, 16, ValueError), memoryview(memory)

    def leave() -> None:
        nonlocal dropped
        del dropped
        by_hand.close()
        assert (by_hand.closed, by_hand.inherited) == (True, False), "it was told to"
        leave_inherited()
        leave_inherited()
        assert (one.closed, one.inherited) == (True, True)
        assert cell.advance(5)
        assert view[8] == 5
        mine = Descriptor.open(path, os.O_RDWR)
        assert [is_locked(mine, byte) for byte in (5, 6, 7)] == [True] * 3
        assert one.take(mine)
        assert (one.closed, one.inherited) == (False, False)

    in_a_child(leave)
    assert cell.load() == 5
    other = Descriptor.open(path, os.O_RDWR)
    assert [is_locked(other, byte) for byte in (5, 6, 7)] == [True] * 3


def test_what_a_child_left_ends_with_its_parent(path: Path) -> None:
    path.write_bytes(bytes(SIZE))
    path.chmod(0o600)
    reader, writer = os.pipe()
    parent = os.fork()
    if parent == 0:
        kept = held(path)
        child = os.fork()
        if child == 0:
            leave_inherited()
            os.write(writer, b"%d" % os.getpid())
            signal.pause()
        assert kept
        os._exit(0)
    child = int(os.read(reader, 10))
    os.waitpid(parent, 0)
    other = Descriptor.open(path, os.O_RDWR)
    try:
        assert not is_locked(other, 5), "the child lives, and holds nothing of its parent"
    finally:
        os.kill(child, signal.SIGKILL)
    os.close(reader)
    os.close(writer)


def test_a_file_takes_a_name_that_is_free_only(tmp_path: Path) -> None:
    one, two, name = (tmp_path / each for each in ("one", "two", "name"))
    one.write_bytes(b"1")
    two.write_bytes(b"2")
    rename_new(one, name)
    assert (one.exists(), name.read_bytes(), name.stat().st_nlink) == (False, b"1", 1)
    with pytest.raises(FileExistsError) as taken:
        rename_new(two, str(name))
    assert (taken.value.filename, taken.value.filename2) == (two, str(name))
    assert (two.read_bytes(), name.read_bytes()) == (b"2", b"1")
    with pytest.raises(FileNotFoundError):
        rename_new(one, tmp_path / "other")
    for paths in ((1, name), (two, None), (two,), (two, "a\0b")):
        with pytest.raises((TypeError, ValueError)):
            rename_new(*paths)


def test_a_file_that_is_not_in_order_is_not_held(path: Path, tmp_path: Path) -> None:
    link, pipe, wide, foreign = (tmp_path / name for name in ("link", "pipe", "wide", "foreign"))
    link.symlink_to(path)
    os.mkfifo(pipe, 0o600)
    for other, mode in ((wide, 0o640), (foreign, 0o600)):
        other.write_bytes(b"12345")
        other.chmod(mode)
    if os.geteuid() == 0:
        os.chown(foreign, 12345, 12345)
    others = [link, pipe, wide, tmp_path, tmp_path / "missing", Path("/dev/zero")]
    before = os.listdir("/proc/self/fd")
    for other in [*others, foreign] if os.geteuid() == 0 else others:
        assert Descriptor.open_held(other, 5, OWNED, 3, True) is None
    assert Descriptor.open_held(path, 5, OWNED, 6, True) is None, "it is too short"
    assert os.listdir("/proc/self/fd") == before
    fd, _ = held(path)
    assert try_lock(fd, 5, False)
    assert Descriptor.open_held(path, 5, OWNED, 3, True) is None, "it is locked"
    other_byte = Descriptor.open_held(path, 4, OWNED, 3, True)
    assert other_byte is not None


def test_what_is_opened_is_what_is_mapped(tmp_path: Path) -> None:
    """However often the name changes to another file meanwhile."""
    name = tmp_path / "name"
    name.touch(0o600)
    child = os.fork()
    if child == 0:
        try:
            for number in itertools.count():
                other = tmp_path / "other"
                other.touch(0o600)
                other.write_bytes(number.to_bytes(8, "little").ljust(SIZE, b"."))
                other.rename(name)
        finally:
            os._exit(1)
    opened = 0
    try:
        while opened < 10_000:
            whole = Descriptor.open_held(name, 0, OWNED, SIZE, True)
            if whole is not None:
                _, _, head, memory = whole
                assert memory is not None
                assert bytes(memory) == head
                opened += 1
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
