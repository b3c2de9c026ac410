"""A mapping and its words: each call does one thing or raises, for any arguments."""

from __future__ import annotations

import gc
import mmap
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, TypeAlias

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shmepoch._native import Cell, Memory, is_locked, try_lock
from tests.epoch.deadline import UNHURRIED

SIZE: Final = 4096
TOP: Final = 2**64 - 1
HUGE: Final = (2**31, 2**63 - 1, 2**63, 2**64, -(2**63), -(2**64), 10**30)


# --- arguments ------------------------------------------------------------------------------------

Call: TypeAlias = Callable[[Memory, Any], object]


def snapshot(memory: Memory, offset: int, count: int, stride: int) -> tuple[int, ...]:
    return memory.snapshots(offset, count, stride, lambda *words: words).take()


#: For each function that takes the offset of a word: a call whose other arguments are valid.
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
    "wait_above closed_flag": lambda m, at: m.wait_above(0, 0, 8, at, 0),
    "cell": lambda m, at: Cell(m, at, 0, ValueError),
    "cell closed_flag": lambda m, at: Cell(m, 0, at, ValueError),
}

#: For each function that takes an unsigned word: a call whose other arguments are valid.
VALUE_CALLS: Final[dict[str, Call]] = {
    "store": lambda m, value: m.store(0, value),
    "exchange": lambda m, value: m.exchange(0, value),
    "fetch_add": lambda m, value: m.fetch_add(0, value),
    "fetch_or": lambda m, value: m.fetch_or(0, value),
    "find": lambda m, value: m.find(0, 1, value, 0),
    "wait_above": lambda m, value: m.wait_above(0, value, 8, 16, 0),
    "advance": lambda m, value: Cell(m, 0, 8, ValueError).advance(value),
    "swap": lambda m, value: Cell(m, 0, 8, ValueError).compare_and_swap(0, value),
}

#: For each function that takes a count of bytes or words: a call whose other arguments are valid.
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
}


@pytest.mark.parametrize("name", WORD_CALLS)
def test_a_word_inside(memory: Memory, name: str) -> None:
    for offset in (0, 8, SIZE // 2, SIZE - 8):
        WORD_CALLS[name](memory, offset)


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
    """Of any type: the call returns or raises."""
    for arity in range(8):
        for argument in (None, -1, 7, "x", (1, 2), b"x" * 9):
            try:
                getattr(memory, name)(*[argument] * arity)
            except (TypeError, ValueError, IndexError, OverflowError):
                continue
            except OSError as refused:  # no room for a mapping of the size
                assert name == "private", refused


@UNHURRIED
@given(
    garbage=st.binary(max_size=256),
    name=st.sampled_from([name for name in dir(Memory) if not name.startswith("_")]),
    arguments=st.lists(
        st.one_of(
            st.integers(-16, 300),
            st.integers(-(2**70), 2**70),
            st.tuples(*[st.integers(-8, 300)] * 2),
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


@pytest.mark.parametrize("data", ["text", bytearray(b"x"), None, 5], ids=repr)
def test_what_is_written_is_bytes(memory: Memory, data: Any) -> None:
    with pytest.raises(TypeError):
        memory.write(0, data)
    assert memory.read(0, SIZE) == bytes(SIZE)


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
    for size in (0, -1, sys.maxsize):
        with pytest.raises((OSError, ValueError)):
            Memory(fds[0], size)
    assert os.listdir("/proc/self/fd") == before


def test_mappings_are_given_back() -> None:
    def mapped() -> int:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[0])

    Memory.private(2**24)
    before = mapped()
    for _ in range(50):
        Memory.private(2**24)
    assert (mapped() - before) * mmap.PAGESIZE < 10 * 2**24
