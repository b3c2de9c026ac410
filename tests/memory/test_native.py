"""The native edge: it does one thing, or raises; whatever it is given, it never crashes."""

from __future__ import annotations

import gc
import itertools
import mmap
import os
import signal
import stat
import sys
import threading
import time
import traceback
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeAlias

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shmepoch.memory import _native
from shmepoch.memory._native import (
    Cell,
    Descriptor,
    Memory,
    WriterLock,
    is_locked,
    leave_inherited,
    try_lock,
    unlock,
)
from shmepoch.memory.layout import Ring
from tests.epoch.deadline import UNHURRIED
from tests.epoch.stepping import Stepped, steps
from tests.support import eventually, is_free

SIZE: Final = 4096
TOP: Final = 2**64 - 1
HUGE: Final = (2**31, 2**63 - 1, 2**63, 2**64, -(2**63), -(2**64), 10**30)

#: A ring of eight entries, whose bytes are the last 256 of the memory.
RING: Final[Ring] = (1024, 8, SIZE - 256, 256)


@pytest.fixture
def memory() -> Memory:
    return Memory.private(SIZE)


@pytest.fixture
def fds() -> Iterator[tuple[int, int]]:
    """Two open file descriptions of one file."""
    fd = os.open("/dev/shm", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    os.truncate(fd, SIZE)
    other = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
    yield fd, other
    os.close(fd)
    os.close(other)


# --- arguments ------------------------------------------------------------------------------------

Call: TypeAlias = Callable[[Memory, Any], object]


def snapshot(memory: Memory, offset: int, count: int, stride: int) -> tuple[int, ...]:
    return memory.snapshots(offset, count, stride, lambda *words: words).take()


#: The mode of a file that no other user may open.
OWNED: Final = stat.S_IFREG | 0o600

#: For each function that takes the offset of a word: a call with everything else in order.
WORD_CALLS: Final[dict[str, Call]] = {
    "load": lambda m, at: m.load(at),
    "store": lambda m, at: m.store(at, 1),
    "exchange": lambda m, at: m.exchange(at, 1),
    "fetch_add": lambda m, at: m.fetch_add(at, 1),
    "fetch_or": lambda m, at: m.fetch_or(at, 1),
    "wake": lambda m, at: m.wake(at),
    "load_column": lambda m, at: m.load_column(at, 1, 8),
    "snapshot": lambda m, at: snapshot(m, at, 1, 8),
    "find": lambda m, at: m.find(at, 1, 0, 0),
    "read": lambda m, at: m.read(at, 8),
    "write": lambda m, at: m.write(at, b"12345678"),
    "wait_above value": lambda m, at: m.wait_above(at, 0, 8, 16, 0),
    "wait_above event": lambda m, at: m.wait_above(0, 0, at, 16, 0),
    "wait_above gate": lambda m, at: m.wait_above(0, 0, 8, at, 0),
    "ring index": lambda m, at: m.ring_at((at, 1, 0, 8), 0),
    "ring bytes": lambda m, at: m.ring_at((0, 1, at, 8), 0),
    "cell": lambda m, at: Cell(m, at, 0, ValueError),
    "cell gate": lambda m, at: Cell(m, 0, at, ValueError),
}

#: For each function that takes an unsigned word: a call with everything else in order.
VALUE_CALLS: Final[dict[str, Call]] = {
    "store": lambda m, value: m.store(0, value),
    "exchange": lambda m, value: m.exchange(0, value),
    "fetch_add": lambda m, value: m.fetch_add(0, value),
    "fetch_or": lambda m, value: m.fetch_or(0, value),
    "find": lambda m, value: m.find(0, 1, value, 0),
    "wait_above": lambda m, value: m.wait_above(0, value, 8, 16, 0),
    "ring_put seq": lambda m, value: m.ring_put(RING, value, 0, b"", 0),
    "ring_at": lambda m, value: m.ring_at(RING, value),
    "advance": lambda m, value: Cell(m, 0, 8, ValueError).advance(value),
    "swap": lambda m, value: Cell(m, 0, 8, ValueError).compare_and_swap(0, value),
}

#: For each function that takes a count of bytes or words: a call with everything else in order.
LENGTH_CALLS: Final[dict[str, Call]] = {
    "load_column count": lambda m, n: m.load_column(0, n, 8),
    "load_column stride": lambda m, n: m.load_column(0, 2, n),
    "snapshot count": lambda m, n: snapshot(m, 0, n, 8),
    "snapshot stride": lambda m, n: snapshot(m, 0, 2, n),
    "find count": lambda m, n: m.find(0, n, 1, 0),
    "find start": lambda m, n: m.find(0, 1, 1, n),
    "find stride": lambda m, n: m.find(0, 2, 1, 0, n),
    "read": lambda m, n: m.read(0, n),
    "private": lambda m, n: Memory.private(n),
    "ring index": lambda m, n: m.ring_at((n, 8, 0, 8), 0),
    "ring capacity": lambda m, n: m.ring_at((0, n, 0, 8), 0),
    "ring bytes": lambda m, n: m.ring_at((0, 1, n, 8), 0),
    "ring budget": lambda m, n: m.ring_at((0, 1, 0, n), 0),
}


@pytest.mark.parametrize("name", WORD_CALLS)
def test_a_word_inside(memory: Memory, name: str) -> None:
    for offset in (0, 8, SIZE // 2, SIZE - 24):
        WORD_CALLS[name](memory, offset)
    if not name.startswith("ring"):
        WORD_CALLS[name](memory, SIZE - 8)


@pytest.mark.parametrize("offset", [-8, -1, 1, 4, 7, SIZE - 7, SIZE - 4, SIZE, SIZE + 8, 2**62])
@pytest.mark.parametrize("name", WORD_CALLS)
def test_a_word_outside_or_across_two(memory: Memory, name: str, offset: int) -> None:
    with pytest.raises(IndexError, match=r"word-aligned inside a memory of 4096 bytes"):
        WORD_CALLS[name](memory, offset)
    assert memory.read(0, SIZE) == bytes(SIZE)


@pytest.mark.parametrize("offset", HUGE)
@pytest.mark.parametrize("name", WORD_CALLS)
def test_a_word_far_outside(memory: Memory, name: str, offset: int) -> None:
    with pytest.raises((IndexError, OverflowError)):
        WORD_CALLS[name](memory, offset)


@pytest.mark.parametrize("offset", [None, "0", b"0", 0.0, [0]], ids=repr)
@pytest.mark.parametrize("name", WORD_CALLS)
def test_an_offset_that_is_no_integer(memory: Memory, name: str, offset: Any) -> None:
    with pytest.raises(TypeError):
        WORD_CALLS[name](memory, offset)
    assert memory.read(0, SIZE) == bytes(SIZE)


@pytest.mark.parametrize("value", [-1, 2**64, -(2**63), 2**200])
@pytest.mark.parametrize("name", VALUE_CALLS)
def test_a_value_outside_a_word(memory: Memory, name: str, value: int) -> None:
    with pytest.raises(OverflowError):
        VALUE_CALLS[name](memory, value)
    assert memory.read(0, 64) == bytes(64)


@pytest.mark.parametrize("value", [None, "1", 1.5, b"1"])
@pytest.mark.parametrize("name", VALUE_CALLS)
def test_a_value_that_is_no_integer(memory: Memory, name: str, value: Any) -> None:
    with pytest.raises(TypeError):
        VALUE_CALLS[name](memory, value)
    assert memory.read(0, 64) == bytes(64)


@pytest.mark.parametrize("length", [-1, -8, *(n for n in HUGE if n != 2**31)])
@pytest.mark.parametrize("name", LENGTH_CALLS)
def test_a_length_that_cannot_be(memory: Memory, name: str, length: int) -> None:
    if name == "find start" and length > 0:
        if length < 2**63:
            assert LENGTH_CALLS[name](memory, length) == -1
        return
    with pytest.raises((IndexError, OverflowError, ValueError, OSError)):
        LENGTH_CALLS[name](memory, length)


@pytest.mark.parametrize(
    "name",
    [name for name in dir(Memory) if not name.startswith("_")],
)
def test_any_number_of_arguments(memory: Memory, name: str) -> None:
    """Of whatever type: an error, or an answer."""
    for arity in range(8):
        for argument in (None, -1, 7, "x", (1, 2), RING, b"x" * 9):
            try:
                getattr(memory, name)(*[argument] * arity)
            except (TypeError, ValueError, IndexError, OverflowError):
                continue
            except OSError as refused:  # no room for a mapping of the size, no such descriptor
                assert name in ("private", "reopen"), refused


def test_types_are_made_by_their_own_rules(memory: Memory) -> None:
    native: Any = _native
    for kind, arguments in (
        (native.Memory, ()),
        (native.Memory, (1,)),
        (native.Memory, ("0", 1)),
        (native.Cell, ()),
        (native.Cell, (object(), 0, 0, ValueError)),
        (native.Cell, (memory, 0, 0)),
        (native.WriterLock, ()),
        (native.WriterLock, ("0", 0)),
        (native.Descriptor.open_held, ("/dev/null", 0, 0)),
        (native.Descriptor.open_held, (0, 0, 0, 0, True)),
        (native.Descriptor.open_held, ("/dev/null", 0, "0", 0, True)),
        (native.try_lock, (0, 0)),
        (native.unlock, (0,)),
        (native.is_locked, ("0", 0)),
    ):
        with pytest.raises(TypeError):
            kind(*arguments)
    for call, values in (
        (native.WriterLock, (-2, 0)),
        (native.WriterLock, (0, -1)),
        (native.Descriptor.open_held, ("/dev/null", -1, 0, 0, True)),
        (native.Descriptor.open_held, ("/dev/null", 0, -1, 0, True)),
        (native.Descriptor.open_held, ("/dev/null", 0, 0, -1, True)),
        (native.Descriptor.open_held, ("/dev/\0null", 0, 0, 0, True)),
        (native.try_lock, (-1, 0, False)),
        (native.unlock, (2**40, 0)),
        (native.is_locked, (0, -1)),
    ):
        with pytest.raises((ValueError, OverflowError)):
            call(*values)
    with pytest.raises(TypeError):
        type("Sub", (native.Memory,), {})


def test_a_descriptor_that_is_not_open() -> None:
    fd = os.open("/dev/null", os.O_RDONLY)
    os.close(fd)
    for call in (
        lambda: Memory(fd, SIZE),
        lambda: try_lock(fd, 0, False),
        lambda: unlock(fd, 0),
        lambda: is_locked(fd, 0),
        lambda: WriterLock(fd, 0).__enter__(),
    ):
        with pytest.raises(OSError):
            call()


def test_a_writer_lock_that_could_not_be_taken_is_free() -> None:
    fd = os.open("/dev/null", os.O_RDONLY)
    lock = WriterLock(fd, 0)
    os.close(fd)
    for _ in range(2):
        with pytest.raises(OSError), lock:
            pass


# --- words and bytes ------------------------------------------------------------------------------


@UNHURRIED
@given(first=st.integers(0, TOP), second=st.integers(0, TOP))
def test_words(first: int, second: int) -> None:
    memory = Memory.private(64)
    memory.store(8, first)
    assert memory.load(8) == first
    assert memory.exchange(8, second) == first
    assert memory.fetch_add(8, first) == second
    assert memory.load(8) == (first + second) % 2**64
    assert memory.fetch_or(8, first) == (first + second) % 2**64
    assert memory.load(8) == (first + second) % 2**64 | first
    assert memory.load_column(0, 3, 8) == (0, memory.load(8), 0)
    assert snapshot(memory, 0, 3, 8) == (0, memory.load(8), 0)
    assert memory.find(0, 3, memory.load(8), 0) == (0 if memory.load(8) == 0 else 1)


@UNHURRIED
@given(data=st.binary(max_size=64), offset=st.integers(0, 7))
def test_bytes(data: bytes, offset: int) -> None:
    memory = Memory.private(128)
    for at in range(0, 128, 8):
        memory.store(at, TOP)
    memory.write(offset * 8, data)
    padding = -len(data) % 8
    assert memory.read(offset * 8, len(data)) == data
    assert memory.read(0, 128) == (
        b"\xff" * offset * 8
        + data
        + bytes(padding)
        + b"\xff" * (128 - offset * 8 - len(data) - padding)
    )


def test_a_column_and_a_search() -> None:
    memory = Memory.private(SIZE)
    for i in range(10):
        memory.store(i * 24, i % 3)
    assert memory.load_column(0, 10, 24) == (0, 1, 2) * 3 + (0,)
    assert memory.load_column(0, 0, 8) == snapshot(memory, SIZE - 8, 0, 8) == ()
    assert memory.load_column(24, 4, 0) == (1,) * 4
    for i in range(10):
        memory.store(512 + i * 8, i % 3)
    assert [memory.find(512, 10, 2, start) for start in (0, 2, 3, 8, 9, 10, 99)] == [
        2, 2, 5, 8, -1, -1, -1,
    ]  # fmt: skip
    assert memory.find(512, 0, 0, 0) == -1
    assert [memory.find(0, 10, 2, start, 24) for start in (0, 2, 3, 8, 9, 10, 99)] == [
        2, 2, 5, 8, -1, -1, -1,
    ]  # fmt: skip
    assert memory.find(0, 10, 99, 0, 24) == -1
    assert memory.find(24, 4, 1, 3, 0) == 3
    assert memory.find(SIZE - 8, 1, 0, 0, 24) == 0
    with pytest.raises(ValueError, match="at most 8 words, not 9"):
        snapshot(memory, 0, 9, 8)


def test_the_buffer_is_read_only(memory: Memory) -> None:
    memory.store(0, 0x0102030405060708)
    view = memoryview(memory)
    assert len(memory) == len(view) == SIZE
    assert int.from_bytes(view[:8], sys.byteorder) == 0x0102030405060708
    assert view.readonly
    with pytest.raises(TypeError):
        view[0] = 1
    buffer: Any = memory
    with open("/dev/zero", "rb", buffering=0) as zeros, pytest.raises((BufferError, TypeError)):
        zeros.readinto(buffer)
    assert memory.load(0) == 0x0102030405060708


def test_a_view_keeps_the_mapping(memory: Memory) -> None:
    views = [memoryview(Memory.private(SIZE)) for _ in range(10)]
    gc.collect()
    assert all(bytes(view) == bytes(SIZE) for view in views)


def test_mappings_of_one_file_share_it(fds: tuple[int, int]) -> None:
    one, two = Memory(fds[0], SIZE), Memory(fd=fds[1], size=SIZE)
    one.store(SIZE - 8, 5)
    assert two.load(SIZE - 8) == 5
    private = Memory.private(SIZE)
    assert private.load(SIZE - 8) == 0


def test_a_mapping_holds_no_lock(fds: tuple[int, int]) -> None:
    fd = os.open(f"/proc/self/fd/{fds[0]}", os.O_RDWR | os.O_CLOEXEC)
    assert try_lock(fd, 5, False)
    memory = Memory(fd, SIZE)
    assert is_locked(fds[1], 5)
    os.close(fd)
    assert not is_locked(fds[1], 5)
    assert len(memory) == SIZE


def test_no_descriptor_is_left_open(fds: tuple[int, int]) -> None:
    before = os.listdir("/proc/self/fd")
    Memory(fds[0], SIZE)
    for size in (0, sys.maxsize):
        with pytest.raises((OSError, ValueError)):
            Memory(fds[0], size)
    assert Descriptor.open_held("/dev/shm/shmepoch.missing", 0, OWNED, 0, True) is None
    assert Descriptor.open_held(__file__, 0, 0, 0, True) is None
    assert os.listdir("/proc/self/fd") == before


# --- cells ----------------------------------------------------------------------------------------


class Closed(Exception):
    pass


def test_a_gate_closes_a_cell(memory: Memory) -> None:
    cell = Cell(memory, 0, 8, Closed)
    assert cell.advance(3)
    memory.store(8, 1)
    with pytest.raises(Closed):
        cell.advance(4)
    with pytest.raises(Closed):
        cell.compare_and_swap(3, 4)
    assert cell.load() == 3
    memory.store(8, 0)
    assert cell.compare_and_swap(3, 4)


def test_a_gate_whose_error_cannot_be_made(memory: Memory) -> None:
    def fails() -> BaseException:
        raise RuntimeError("no error to be had")

    memory.store(8, 1)
    with pytest.raises(RuntimeError, match="no error to be had"):
        Cell(memory, 0, 8, fails).advance(1)
    not_callable: Any = 5
    with pytest.raises(TypeError):
        Cell(memory, 0, 8, not_callable).advance(1)
    no_error: Any = int
    with pytest.raises((TypeError, SystemError)):
        Cell(memory, 0, 8, no_error).advance(1)
    assert memory.load(0) == 0


def test_a_cell_in_a_cycle_is_collected() -> None:
    memory = Memory.private(SIZE)
    before = sys.getrefcount(memory)

    class Holder:
        cell: Cell

        def closed(self) -> BaseException:
            return Closed()

    for _ in range(100):
        holder = Holder()
        holder.cell = Cell(memory, 0, 8, holder.closed)
    del holder
    gc.collect()
    assert sys.getrefcount(memory) == before


# --- rings ----------------------------------------------------------------------------------------


def put(memory: Memory, seq: int, position: int, data: bytes, tag: int = 0) -> int:
    memory.ring_put(RING, seq, position, data, tag)
    return position + -(-len(data) // 8) * 8


def array(*entries: bytes) -> bytes:
    return b"\xdd" + len(entries).to_bytes(4, "big") + b"".join(entries)


def test_a_ring_gives_back_what_was_put(memory: Memory) -> None:
    position, datas = 0, [b"", b"1", b"12345678", b"123456789", b"x" * 100]
    for seq, data in enumerate(datas):
        after = put(memory, seq, position, data, tag=seq + 7)
        assert memory.ring_at(RING, seq) == (position, len(data), seq + 7)
        position = after
    assert memory.ring_gather(RING, 0, 4) == (0, array(*datas[1:]))
    assert memory.ring_gather(RING, 2, 3) == (2, array(*datas[2:4]))
    assert memory.ring_gather(RING, 0, 0) == (0, array())


def test_a_ring_wraps(memory: Memory) -> None:
    """Both rings: bytes around the end, and an index that was used before."""
    outside = memory.read(0, 1024)
    position = 0
    for seq in range(1, 60):
        data = bytes([seq]) * (5 + 31 * seq % 90)
        position = put(memory, seq, position, data)
        assert memory.ring_gather(RING, seq, seq) == (seq, array(data))
    assert position > 3 * RING[3]
    assert memory.read(0, 1024) == outside
    assert memory.read(1024 + 8 * 24, SIZE - 256 - 1024 - 8 * 24) == bytes(
        SIZE - 256 - 1024 - 8 * 24
    )


@pytest.mark.parametrize("position", [0, 8, 248, 256, 2**32 - 8, 2**63, 2**64 - 8])
def test_an_entry_as_long_as_the_ring(memory: Memory, position: int) -> None:
    data = bytes(range(256))
    memory.ring_put(RING, TOP, position, data, 2**32 - 1)
    assert memory.ring_at(RING, TOP) == (position, 256, 2**32 - 1)
    assert memory.ring_gather(RING, TOP, TOP) == (TOP, array(data))


@pytest.mark.parametrize(
    ("position", "data", "tag"),
    [(0, b"x" * 257, 0), (4, b"", 0), (2**64 - 1, b"", 0), (0, b"", 2**32), (0, b"", TOP)],
)
def test_an_entry_that_cannot_be(memory: Memory, position: int, data: bytes, tag: int) -> None:
    with pytest.raises(ValueError, match="no longer than the ring"):
        memory.ring_put(RING, 1, position, data, tag)
    assert memory.read(0, SIZE) == bytes(SIZE)


@pytest.mark.parametrize("data", ["text", bytearray(b"x"), None, 5], ids=repr)
def test_an_entry_that_is_not_bytes(memory: Memory, data: Any) -> None:
    with pytest.raises(TypeError):
        memory.ring_put(RING, 1, 0, data, 0)
    with pytest.raises(TypeError):
        memory.write(0, data)


@pytest.mark.parametrize("ring", [(), (0,), (0, 1, 0), (0, 1, 0, 8, 0), (None,) * 4])
def test_a_ring_that_is_none(memory: Memory, ring: Any) -> None:
    with pytest.raises(TypeError):
        memory.ring_at(ring, 0)


@pytest.mark.parametrize("ring", [None, 5, "abcd", [0] * 4], ids=repr)
def test_a_ring_that_is_no_tuple(memory: Memory, ring: Any) -> None:
    with pytest.raises(TypeError):
        memory.ring_at(ring, 0)


@pytest.mark.parametrize(
    "ring",
    [
        (0, 0, 1024, 64),
        (0, -1, 1024, 64),
        (0, 1, 1024, 0),
        (0, 1, 1024, -8),
        (0, 1, 1024, 12),
        (0, 1, 1024, 2**32),
        (0, SIZE // 24 + 1, 0, 8),
        (SIZE - 16, 1, 0, 8),
        (0, 1, SIZE - 8, 16),
        (0, 2**60, 0, 8),
    ],
)
def test_a_ring_that_is_not_inside(memory: Memory, ring: Ring) -> None:
    for call in (
        lambda: memory.ring_at(ring, 0),
        lambda: memory.ring_put(ring, 0, 0, b"", 0),
        lambda: memory.ring_gather(ring, 0, 0),
    ):
        with pytest.raises((ValueError, IndexError)):
            call()
    assert memory.read(0, SIZE) == bytes(SIZE)


@pytest.mark.parametrize(("first", "last"), [(1, 0), (0, 8), (5, 13), (TOP, 0), (0, TOP)])
def test_a_span_that_the_ring_does_not_hold(memory: Memory, first: int, last: int) -> None:
    with pytest.raises(ValueError, match=f"8 entries do not hold {first} to {last}"):
        memory.ring_gather(RING, first, last)


@pytest.mark.parametrize("torn", range(1, 6))
def test_a_torn_entry_voids_those_before_it(memory: Memory, torn: int) -> None:
    position, at = 0, {}
    for seq in range(1, 6):
        at[seq] = position
        position = put(memory, seq, position, bytes([seq]) * 20)
    memory.fetch_or(RING[2] + at[torn] + 8, 0xFF00)
    rest = [bytes([seq]) * 20 for seq in range(torn + 1, 6)]
    assert memory.ring_gather(RING, 1, 5) == (torn + 1, array(*rest))


@pytest.mark.parametrize("word", range(3))
@pytest.mark.parametrize("bits", [1, 8, 2**31, 2**32 - 1, TOP])
def test_an_index_that_was_changed(memory: Memory, word: int, bits: int) -> None:
    put(memory, 1, 0, b"a" * 24)
    put(memory, 2, 24, b"b" * 24)
    at = RING[0] + 24 + 8 * word
    memory.store(at, memory.load(at) ^ bits)
    first_whole, data = memory.ring_gather(RING, 1, 2)
    if (word, bits) != (2, 2**32 - 1):
        assert (first_whole, data) in ((2, array(b"b" * 24)), (1, array(b"a" * 24, b"b" * 24)))
    if first_whole == 1:  # only what no checksum covers: the tag, or a whole round of the ring
        assert word == 2 or bits % 256 == 0


def test_an_entry_of_another_round_is_not_whole(memory: Memory) -> None:
    put(memory, 1, 0, b"old")
    assert memory.ring_gather(RING, 9, 9) == (10, array())


@UNHURRIED
@given(
    garbage=st.binary(min_size=0, max_size=512),
    at=st.integers(0, 63),
    seqs=st.tuples(st.integers(0, 20) | st.integers(0, TOP), st.integers(0, 9)),
    entries=st.lists(st.binary(max_size=40), max_size=8),
)
def test_garbage_in_a_ring_is_never_returned(
    garbage: bytes, at: int, seqs: tuple[int, int], entries: list[bytes]
) -> None:
    """Whatever lies in the memory, what comes out was put in, whole and under its sequence."""
    ring: Ring = (0, 8, 256, 256)
    memory, position = Memory.private(512), 0
    for seq, data in enumerate(entries):
        memory.ring_put(ring, seq, position, data, 0)
        position += -(-len(data) // 8) * 8
    memory.write(at * 8, garbage[: 512 - at * 8])
    first, last = seqs[0], min(seqs[0] + seqs[1], TOP)
    try:
        first_whole, found = memory.ring_gather(ring, first, last)
    except ValueError:
        assert last - first >= 8
        return
    if (first_whole, last) == (0, TOP):
        first_whole = TOP + 1  # none is whole, and what comes after the last sequence is 0
    assert first <= first_whole <= last + 1
    count = int.from_bytes(found[1:5], "big")
    assert count <= last - first + 1
    whole = [data for seq, data in enumerate(entries) if first_whole <= seq <= last and data]
    assert len(found) <= 5 + 256
    if not garbage:
        assert found == array(*whole)


@UNHURRIED
@given(
    garbage=st.binary(max_size=256),
    name=st.sampled_from([name for name in dir(Memory) if not name.startswith("_")]),
    arguments=st.lists(
        st.one_of(
            st.integers(-16, 300),
            st.integers(-(2**70), 2**70),
            st.tuples(*[st.integers(-8, 300)] * 4),
            st.binary(max_size=40),
            st.none(),
            st.text(max_size=3),
        ),
        max_size=6,
    ),
)
def test_any_arguments_over_any_memory(garbage: bytes, name: str, arguments: list[Any]) -> None:
    if name == "wait_above":
        arguments = [*arguments[:4], 0]  # or it would wait
    memory = Memory.private(256)
    memory.write(0, garbage)
    with suppress(TypeError, ValueError, IndexError, OverflowError, OSError, SystemError):
        getattr(memory, name)(*arguments)


# --- waiting --------------------------------------------------------------------------------------

VALUE, EVENT, GATE = 0, 128, 256
SECOND: Final = 10**9


def wait(memory: Memory, above: int, timeout_ns: int | None = None) -> bool:
    return memory.wait_above(VALUE, above, EVENT, GATE, timeout_ns)


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
    memory.store(GATE, 1)
    assert wait(memory, 5, timeout_ns) is True


@pytest.mark.parametrize("timeout", [2**63, -(2**63) - 1, 1.5, "1"])
def test_a_timeout_that_is_none(memory: Memory, timeout: Any) -> None:
    with pytest.raises((OverflowError, TypeError)):
        wait(memory, 0, timeout)


@pytest.mark.parametrize("word", [VALUE, GATE])
def test_a_sleeper_is_woken(memory: Memory, word: int) -> None:
    """By the value, and by the gate; by every wake call, but none is made for nobody."""
    assert memory.wake(EVENT) is False

    def asleep(sleepers: list[Future[bool]]) -> bool:
        return memory.load(EVENT) >> 32 != 0 or all(sleeper.done() for sleeper in sleepers)

    with ThreadPoolExecutor(3) as pool:
        for value in range(1, 20):
            memory.store(GATE, 0)
            sleepers = [pool.submit(wait, memory, memory.load(VALUE)) for _ in range(3)]
            eventually(partial(asleep, sleepers))
            memory.store(word, value)
            memory.wake(EVENT)
            assert [sleeper.result(60) for sleeper in sleepers] == [True] * 3


def test_a_sleeper_that_nobody_wakes_looks_by_itself(memory: Memory) -> None:
    """Its writer was killed between its store and its wake call."""
    with ThreadPoolExecutor(1) as pool:
        sleeper = pool.submit(wait, memory, 0)
        eventually(lambda: memory.load(EVENT) >> 32)
        memory.store(VALUE, 1)
        assert sleeper.result(60) is True


def test_a_count_that_comes_round(memory: Memory) -> None:
    """The futex has 32 bits, and neither it nor the flag beside it are the caller's to know."""
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
                theirs.wait_above(8, value - 1, EVENT + 64, GATE, None)
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
    """In the main thread, asleep: the handler's exception comes out of the wait."""
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
    wait(memory, 0, 10**7)  # it has learned by now that spinning does not pay
    before = time.process_time_ns()
    for _ in range(3):
        wait(memory, 0, 10**8)
    assert time.process_time_ns() - before < 10**8  # of 3 * 10**8 that it waited


def test_a_snapshot_is_of_one_instant(fds: tuple[int, int]) -> None:
    """Of words that another process, which this one's interpreter lock does not stop, raises one
    after the other: no later one is ever ahead, and none is two behind."""
    memory, words, stride, rounds = Memory(fds[0], SIZE), 8, 512, 1_000_000
    pid = os.fork()
    if pid == 0:
        try:
            theirs = Memory(fds[1], SIZE)
            for value in range(1, rounds):
                theirs.write(0, value.to_bytes(8, sys.byteorder) * (SIZE // 8))
        finally:
            os._exit(0)
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        for _ in range(500):
            found = snapshot(memory, 0, words, stride)
            assert list(found) == sorted(found, reverse=True)
            assert found[0] - found[-1] <= 1
    assert snapshot(memory, 0, words, stride) == (rounds - 1,) * words


# --- locks ----------------------------------------------------------------------------------------


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
    """The descriptor of a file of this user's alone that byte 5 is held of, and the file mapped."""
    opened = Descriptor.open_held(path, 5, OWNED, 3, True)
    assert opened is not None
    descriptor, size, head, memory = opened
    assert memory is not None
    assert (size, head) == (len(memory), bytes(memory)[:3])
    return descriptor, memory


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file that everything is in order of."""
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


# --- descriptors ----------------------------------------------------------------------------------


def open_descriptors() -> list[str]:
    """The numbers that are open, but for that of the listing."""
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
    lock = WriterLock(one, 0)
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
            lock.__enter__,
            lock.if_free(BlockingIOError).__enter__,
        ):
            with pytest.raises(ValueError, match="closed"):
                use()
    one.close(Closed)
    one.close()
    with pytest.raises(Closed):
        one.fileno()
    with pytest.raises(Closed):
        lock.__enter__()


def test_what_cannot_be_opened(path: Path) -> None:
    before = open_descriptors()
    with pytest.raises(FileNotFoundError) as missing:
        Descriptor.open(path / "none" if path.is_dir() else path.parent / "none", os.O_RDWR)
    assert missing.value.filename == path.parent / "none"
    with pytest.raises(NotADirectoryError):
        Descriptor.open(f"{path}/none", os.O_RDWR)
    with pytest.raises(TypeError):
        Descriptor.open(path)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        Descriptor.open(path, os.O_RDWR).close(5)  # type: ignore[arg-type]
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


def in_a_child(act: Callable[[], object]) -> None:
    """Do this in a forked child, which has to succeed."""
    pid = os.fork()
    if pid == 0:
        try:
            act()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_child_leaves_what_it_inherited_to_its_parent(path: Path) -> None:
    """However it is closed there, also beside memory that is mapped through it."""
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


def test_detached_memory_is_a_copy(path: Path) -> None:
    path.write_bytes(bytes(SIZE))
    path.chmod(0o600)
    one = Descriptor.open(path, os.O_RDWR)
    memory, other = Memory(one, SIZE), Memory(one, SIZE)
    cell, view = Cell(memory, 8, 16, ValueError), memoryview(memory)
    assert cell.advance(5)
    memory.detach()
    assert cell.load() == view[8] == 5
    assert cell.advance(6)
    assert (view[8], other.load(8)) == (6, 5)
    other.store(8, 7)
    assert cell.load() == 6
    memory.reopen(one)
    assert cell.load() == view[8] == 7
    assert cell.advance(8)
    assert other.load(8) == 8
    one.close()
    with pytest.raises(ValueError, match="closed"):
        memory.reopen(one)
    with pytest.raises(ValueError):
        memory.reopen(-1)
    assert cell.load() == 8


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
    assert not is_locked(other, 5), "the child lives, and holds nothing of its parent"
    os.kill(child, signal.SIGKILL)
    os.close(reader)
    os.close(writer)


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
    """However often the name comes to lead to another file meanwhile."""
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


def test_a_writer_lock_excludes_threads() -> None:
    lock, inside, seen = WriterLock(-1, 0), 0, []

    def enter(_: int) -> None:
        nonlocal inside
        for _ in range(200):
            with lock:
                inside += 1
                seen.append(inside)
                inside -= 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(enter, range(8)))
    assert seen == [1] * 1600


def test_a_writer_lock_excludes_descriptions(fds: tuple[int, int]) -> None:
    locks = [WriterLock(fd, 3) for fd in fds]
    memory = Memory(fds[0], SIZE)

    def enter(turn: int) -> None:
        for _ in range(500):
            with locks[turn % 2]:
                memory.store(0, memory.load(0) + 1)  # no atomic increment: the lock makes it one

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(enter, range(4)))
    assert memory.load(0) == 2000
    assert not is_locked(fds[0], 3)


def test_a_writer_lock_excludes_processes(fds: tuple[int, int]) -> None:
    memory = Memory(fds[0], SIZE)
    children = []
    for _ in range(3):
        pid = os.fork()
        if pid == 0:
            try:
                fd = os.open(f"/proc/self/fd/{fds[0]}", os.O_RDWR)
                lock = WriterLock(fd, 3)
                for _ in range(500):
                    with lock:
                        memory.store(0, memory.load(0) + 1)
            finally:
                os._exit(0)
        children.append(pid)
    for pid in children:
        os.waitpid(pid, 0)
    assert memory.load(0) == 1500


def test_a_writer_lock_is_given_up_by_whoever_dies(fds: tuple[int, int]) -> None:
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            fd = os.open(f"/proc/self/fd/{fds[0]}", os.O_RDWR)
            with WriterLock(fd, 3):
                os.write(write, b"x")
                signal.pause()
        finally:
            os._exit(0)
    os.read(read, 1)
    os.close(read)
    os.close(write)
    assert is_locked(fds[0], 3)
    with ThreadPoolExecutor(1) as pool:
        entered = pool.submit(lambda: WriterLock(fds[0], 3).__enter__())
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        entered.result(60)
    unlock(fds[0], 3)


def test_a_thread_is_refused_a_second_time(fds: tuple[int, int]) -> None:
    for lock in (WriterLock(-1, 0), WriterLock(fds[0], 0)):
        with lock:
            with pytest.raises(RuntimeError, match="already"), lock:
                pass
            with ThreadPoolExecutor(1) as pool, pytest.raises(RuntimeError, match="released by"):
                pool.submit(lock.__exit__, None, None, None).result(60)
        with lock:
            pass
        with pytest.raises(RuntimeError, match="released by"):
            lock.__exit__(None, None, None)


class Retired(Exception):
    pass


def interrupt_main_thread() -> None:
    """Send SIGINT while the main thread sleeps in a system call."""
    stat = Path(f"/proc/self/task/{threading.main_thread().native_id}/stat")
    eventually(lambda: stat.read_text().rpartition(")")[2].split()[0] == "S")
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("shared", [False, True])
def test_retiring_waits_for_who_is_inside_and_refuses_who_waits(
    fds: tuple[int, int], shared: bool
) -> None:
    lock = WriterLock(fds[0] if shared else -1, 0)

    def enter() -> None:
        with lock:
            assert not retiring.done(), "let in afterwards"

    with ThreadPoolExecutor(2) as pool:
        with lock:
            retiring = pool.submit(lock.retire, Retired)
            with pytest.raises(TimeoutError):
                retiring.result(0.05)
            waiting = pool.submit(enter)
        assert retiring.result(60)
        with suppress(Retired):  # whichever of the two was first
            waiting.result(60)
    for _ in range(2):
        with pytest.raises(Retired):
            lock.__enter__()
    assert not is_locked(fds[1], 0)
    with pytest.raises(TypeError, match="called"):
        lock.retire("not callable")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="called"):
        lock.retire(Retired, None, "not callable")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="arguments"):
        lock.retire()  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        lock.retire(Retired, "soon")  # type: ignore[arg-type]


@pytest.mark.parametrize("shared", [False, True])
def test_retiring_within_a_time_leaves_the_rest_to_the_last_one_out(
    fds: tuple[int, int], shared: bool
) -> None:
    lock, left = WriterLock(fds[0] if shared else -1, 0), []
    with ThreadPoolExecutor(2) as pool:
        with lock:
            assert not pool.submit(lock.retire, Retired, 0, lambda: left.append(0)).result(60)
            assert not pool.submit(lock.retire, Retired, 10_000_000, left.clear).result(60)
            assert not pool.submit(lock.retire, Retired, 0, lambda: left.append(1)).result(60)
            assert not left
            with pytest.raises(Retired):
                pool.submit(is_free, lock).result(60)
            entering = pool.submit(lock.__enter__)
        assert left == [1]
        with pytest.raises(Retired):
            entering.result(60)
    assert not is_locked(fds[1], 0)
    assert lock.retire(Retired, 0, lambda: left.append(2))
    assert left == [1]


@pytest.mark.parametrize("shared", [False, True])
def test_a_lock_that_is_retired_inside_its_own_transition(
    fds: tuple[int, int], shared: bool
) -> None:
    """As by a signal handler: it does not wait for what it interrupted, which ends as it would."""
    lock, left = WriterLock(fds[0] if shared else -1, 0), []
    with lock:
        assert not lock.retire(Retired, None, lambda: left.append(is_locked(fds[1], 0)))
        assert is_locked(fds[1], 0) == shared
        assert not left
    assert left == [False]
    with pytest.raises(Retired):
        lock.__enter__()


def test_retiring_frees_a_thread_that_waits_for_another_process(fds: tuple[int, int]) -> None:
    mine, theirs = WriterLock(fds[0], 0), WriterLock(fds[1], 0)
    with ThreadPoolExecutor(3) as pool, theirs:
        waiting = [pool.submit(mine.__enter__) for _ in range(3)]
        with pytest.raises(TimeoutError):
            waiting[0].result(0.05)
        assert mine.retire(Retired, 60 * 10**9)
        for each in waiting:
            with pytest.raises(Retired):
                each.result(60)
        assert is_locked(fds[0], 0)  # theirs


def test_what_the_last_one_out_raises_is_reported_and_stops_nothing(
    fds: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, raised = WriterLock(fds[0], 0), list[object]()
    monkeypatch.setattr(sys, "unraisablehook", lambda args: raised.append(args.exc_value))

    def fail() -> None:
        raise error

    error = ValueError("left badly")
    with lock:
        assert not lock.retire(Retired, 0, fail)
    assert raised == [error]
    assert not is_locked(fds[1], 0)


def test_retiring_that_a_signal_interrupts_is_finished_by_the_last_one_out() -> None:
    lock, left, held, release = WriterLock(-1, 0), [], threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            held.set()
            release.wait(60)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with ThreadPoolExecutor(2) as pool:
            holding = pool.submit(hold)
            held.wait(60)
            pool.submit(interrupt_main_thread)
            with pytest.raises(KeyboardInterrupt):
                lock.retire(Retired, None, lambda: left.append(1))
            assert not left
            release.set()
            holding.result(60)
        assert left == [1]
    finally:
        signal.signal(signal.SIGINT, before)


def test_entering_only_what_is_free(fds: tuple[int, int]) -> None:
    for lock in (mine := WriterLock(fds[0], 0), WriterLock(-1, 0)):
        with lock.if_free(BlockingIOError):
            assert is_locked(fds[1], 0) == (lock is mine)
            assert not is_free(lock)  # inside already
            with ThreadPoolExecutor(1) as pool:
                assert not pool.submit(is_free, lock).result(60)
        assert not is_locked(fds[1], 0)
        assert is_free(lock)
    with WriterLock(fds[1], 0):
        assert not is_free(mine)
    with mine:  # what was not entered is not left half taken
        pass
    with pytest.raises(RuntimeError, match="released by the thread that holds it"):
        mine.if_free(BlockingIOError).__exit__(None, None, None)
    with pytest.raises(TypeError, match="on_busy"):
        mine.if_free(5)  # type: ignore[arg-type]
    assert mine.retire(Retired)
    with pytest.raises(Retired):
        is_free(mine)


@pytest.mark.parametrize("enter", [WriterLock.__enter__, is_free])
def test_a_lock_that_is_retired_while_an_entry_opens_its_descriptor(
    tmp_path: Path, enter: Callable[[WriterLock], object]
) -> None:
    closed = Descriptor.open(tmp_path, os.O_RDONLY)
    closed.close()
    lock = WriterLock(closed, 0, lambda: lock.retire(Retired))
    with pytest.raises(Retired):
        enter(lock)
    assert lock.retire(Retired)  # nothing is left inside


def test_a_thread_that_waits_for_the_lock_lets_others_run(fds: tuple[int, int]) -> None:
    mine, theirs = WriterLock(fds[0], 0), WriterLock(fds[1], 0)

    def enter() -> str:
        with theirs:
            return "entered"

    with ThreadPoolExecutor(1) as pool:
        with mine:
            waiting = pool.submit(enter)
            for _ in range(1000):
                sum(range(100))  # it would never end if the other held the interpreter
            assert not waiting.done()
        assert waiting.result(60) == "entered"


def test_ctrl_c_while_waiting_for_the_lock(fds: tuple[int, int]) -> None:
    """Between processes and between threads; the lock is not left half taken."""
    release, held = threading.Event(), threading.Event()

    def hold(lock: WriterLock) -> None:
        with lock:
            held.set()
            release.wait(60)

    def interrupt() -> None:
        held.wait(60)
        interrupt_main_thread()

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for theirs, mine in (
            (WriterLock(fds[0], 0), WriterLock(fds[1], 0)),
            ((lock := WriterLock(fds[0], 0)), lock),
        ):
            release.clear()
            held.clear()
            with ThreadPoolExecutor(2) as pool:
                holding = pool.submit(hold, theirs)
                held.wait(60)
                sent = pool.submit(interrupt)
                with pytest.raises(KeyboardInterrupt), mine:
                    pass
                sent.result(60)
                release.set()
                holding.result(60)
            with mine:
                pass
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("what", ["word", "thread", "process"])
def test_a_signal_that_comes_just_before_a_wait_sleeps_is_handled(
    fds: tuple[int, int], what: str
) -> None:
    """Before the sleep there is no system call that it could interrupt."""
    mine, theirs = WriterLock(fds[0], 0), WriterLock(fds[1], 0)
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with {"word": WriterLock(-1, 0), "thread": mine, "process": theirs}[what]:
            held.set()
            release.wait(60)  # then who waits for the lock is let in, and was told of no signal

    def wait(delay_us: int) -> None:
        signal.setitimer(signal.ITIMER_REAL, delay_us / 1e6)
        if what == "word":
            Memory.private(64).wait_above(0, 0, 8, 16, 20_000_000_000)
        else:
            mine.__enter__()

    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        with ThreadPoolExecutor(1) as pool:
            holding = pool.submit(hold)
            held.wait(60)
            for delay_us in range(1, 200, 2):
                with pytest.raises(KeyboardInterrupt):
                    wait(delay_us)
            release.set()
            holding.result(60)
    finally:
        release.set()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_snapshot_of_words_that_never_stand_still_ends(fds: tuple[int, int]) -> None:
    """Another process moves a word after each instruction of it."""
    pid = os.fork()
    if pid == 0:
        try:
            memory: Any = Stepped(Memory(fds[0], SIZE))
            os._exit(0 if snapshot(memory, 0, 3, 16)[1:] == (7, 9) else 1)
        finally:
            os._exit(2)
    os.pwrite(fds[0], (7).to_bytes(8, "little"), 16)
    os.pwrite(fds[0], (9).to_bytes(8, "little"), 32)
    for moves, _ in enumerate(steps(pid), 1):
        os.pwrite(fds[0], moves.to_bytes(8, "little"), 0)
        assert moves < 300_000


# --- lifetimes ------------------------------------------------------------------------------------


def test_nothing_is_leaked_or_freed_twice(fds: tuple[int, int]) -> None:
    """References and allocations stay level over many rounds of every call and every error."""
    memory = Memory.private(SIZE)
    cell, lock = Cell(memory, 0, 8, Closed), WriterLock(fds[0], 0)
    number, data, closed = 2**62 + 1, b"some bytes", Closed

    def everything() -> None:
        for name, call in {**WORD_CALLS, **VALUE_CALLS, **LENGTH_CALLS}.items():
            for argument in (0, 8, -1, TOP, number, "x", None):
                if not (name.startswith("wait") and argument is None):
                    with_errors(call, memory, argument)
        memory.store(0, 0)
        memory.write(0, data)
        memory.ring_put(RING, 1, 0, data, 0)
        memory.ring_gather(RING, 1, 3)
        memory.ring_gather(RING, 2, 2)
        with_errors(cell.advance, 5)
        memory.store(8, 1)
        with_errors(cell.advance, 6)
        memory.store(8, 0)
        Cell(memory, 0, 8, closed)
        Memory(fds[0], SIZE)
        with_errors(Memory, fds[0], 0)
        Descriptor.open_held("/dev/null", 0, 0, 0, True)
        with_errors(Descriptor.open_held, "/dev/null", -1, 0, 0, True)
        with_errors(Descriptor.open, "/dev/null/none", 0)
        opened = Descriptor.open("/dev/null", os.O_RDWR)
        opened.close(partial(Closed, opened))  # a cycle
        with_errors(opened.fileno)
        retired = WriterLock(-1, 0)
        retired.retire(partial(Closed, retired))  # a cycle
        with_errors(retired.__enter__)
        with lock:
            with_errors(lock.__enter__)
        try_lock(fds[0], 1, False)
        is_locked(fds[1], 1)
        unlock(fds[0], 1)

    counted = (memory, cell, lock, number, data, closed, RING, True, False, None)
    for _ in range(3):
        everything()
    gc.collect()
    before = [sys.getrefcount(thing) for thing in counted]
    tracemalloc.start()
    try:
        everything()
        gc.collect()
        allocated = tracemalloc.get_traced_memory()[0]
        for _ in range(50):
            everything()
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - allocated
    finally:
        tracemalloc.stop()
    after = [sys.getrefcount(thing) for thing in counted]
    # A leak in any one call would be 50 references, or 50 times at least 16 bytes.
    assert max(abs(x - y) for x, y in zip(before, after, strict=True)) < 20
    assert grown < 50 * 16


def with_errors(call: Callable[..., object], *arguments: object) -> None:
    with suppress(Exception):
        call(*arguments)


def test_mappings_are_given_back() -> None:
    def mapped() -> int:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[0])

    Memory.private(2**24)
    before = mapped()
    for _ in range(50):
        Memory.private(2**24)
    assert (mapped() - before) * mmap.PAGESIZE < 10 * 2**24


def test_the_module_names_what_it_has() -> None:
    public = {name for name in dir(_native) if not name.startswith("_")}
    assert public == {
        "Cell",
        "Descriptor",
        "Memory",
        "WriterLock",
        "is_locked",
        "leave_inherited",
        "try_lock",
        "unlock",
    }


# --- snapshots ------------------------------------------------------------------------------------


def test_a_snapshot_is_made_into_something(memory: Memory) -> None:
    for number in range(3):
        memory.store(128 + number * 64, 10**6 + number)
    take = memory.snapshots(128, 3, 64, lambda *words: words).take
    assert take() == (10**6, 10**6 + 1, 10**6 + 2)
    memory.store(192, TOP)
    assert take() == (10**6, TOP, 10**6 + 2)
    assert memory.snapshots(0, 0, 8, dict).take() == {}
    assert len(memory.snapshots(0, 8, 8, lambda *words: words).take()) == 8


def test_a_snapshot_serves_until_a_word_has_moved(memory: Memory) -> None:
    made: list[tuple[int, ...]] = []

    def make(*words: int) -> int:
        made.append(words)
        return len(made)

    taking = memory.snapshots(0, 2, 8, make)
    assert [taking.take() for _ in range(3)] == [1, 1, 1]
    for word in (0, 8):
        memory.store(word, 1)
        assert taking.take() == taking.take() == len(made)
    assert made == [(0, 0), (1, 0), (1, 1)]


def test_what_snapshots_are_not_made_of(memory: Memory) -> None:
    native: Any = memory
    arguments: tuple[Any, ...]
    for arguments in ((0, 1, 8), (0, 1, 8, tuple, 0), (0, 1, 8, None), ("0", 1, 8, tuple)):
        with pytest.raises(TypeError):
            native.snapshots(*arguments)
    for arguments in ((1, 1, 8, tuple), (SIZE, 1, 8, tuple), (0, 8, SIZE // 4, tuple)):
        with pytest.raises(IndexError):
            native.snapshots(*arguments)
    with pytest.raises(ValueError, match="at most 8 words, not 9"):
        native.snapshots(0, 9, 8, tuple)
    taking = native.snapshots(0, 1, 8, int)
    with pytest.raises(TypeError):
        taking.take(1)
    with pytest.raises(TypeError):
        type(taking)()


def test_an_error_of_what_makes_a_snapshot_is_raised(memory: Memory) -> None:
    def refuse(_: int) -> None:
        raise Closed

    with pytest.raises(Closed):
        memory.snapshots(0, 1, 8, refuse).take()


def test_snapshots_keep_the_mapping_and_are_collected() -> None:
    class Record(tuple[int, ...]):
        pass

    take = Memory.private(SIZE).snapshots(0, 1, 8, lambda word: (word,)).take
    gc.collect()
    assert take() == (0,)
    Record.taking = Memory.private(SIZE).snapshots(0, 1, 8, Record)  # type: ignore[attr-defined]
    gone = weakref.ref(Record)
    del Record
    gc.collect()
    assert gone() is None
