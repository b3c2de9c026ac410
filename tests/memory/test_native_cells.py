"""Cells, which only grow, and snapshots of several words at one instant."""

from __future__ import annotations

import gc
import os
import sys
import weakref
from typing import Any, Final

import pytest

from shmepoch._native import Cell, Memory
from tests.epoch.stepping import Stepped, steps

SIZE: Final = 4096
TOP: Final = 2**64 - 1


def snapshot(memory: Memory, offset: int, count: int, stride: int) -> tuple[int, ...]:
    return memory.snapshots(offset, count, stride, lambda *words: words).take()


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


def test_a_cell_only_grows(memory: Memory) -> None:
    cell = Cell(memory, offset=0, closed_flag=8, on_closed=Closed)
    moves = [cell.advance(value) for value in (3, 3, 2, 0, TOP, 5)]
    assert moves == [True, False, False, False, True, False]
    assert cell.load() == TOP
    other = Cell(memory, 16, 8, Closed)
    swaps = [other.compare_and_swap(*pair) for pair in ((1, 2), (0, 5), (0, 5), (5, 5))]
    assert swaps == [False, True, False, True]
    with pytest.raises(ValueError, match="move back from 5 to 4"):
        other.compare_and_swap(5, 4)
    assert other.load() == 5


@pytest.mark.parametrize("value", [-1, 2**64, None, "1", 1.5], ids=repr)
def test_what_a_cell_does_not_hold(memory: Memory, value: Any) -> None:
    cell = Cell(memory, 0, 8, Closed)
    with pytest.raises((OverflowError, TypeError)):
        cell.advance(value)
    for pair in ((value, 0), (0, value)):
        with pytest.raises((OverflowError, TypeError)):
            cell.compare_and_swap(*pair)
    native: Any = cell
    arguments: tuple[int, ...]
    for arguments in ((), (1,), (1, 2, 3)):
        with pytest.raises(TypeError):
            native.compare_and_swap(*arguments)
    with pytest.raises(TypeError):
        native.load(1)
    for arguments in ((), (1, 2)):
        with pytest.raises(TypeError):
            native.advance(*arguments)
    assert cell.load() == 0


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


# --- snapshots ------------------------------------------------------------------------------------
def test_a_snapshot_is_of_one_instant(fds: tuple[int, int]) -> None:
    """Another process, which this one's interpreter lock does not stop, raises the words in turn: a
    later word is never ahead, and never two behind."""
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


def test_a_snapshot_of_words_that_never_stand_still_ends(fds: tuple[int, int]) -> None:
    """Another process moves a word after each instruction of the snapshot."""
    pid = os.fork()
    if pid == 0:
        try:
            snapshots = Memory(fds[0], SIZE).snapshots(0, 3, 16, lambda *words: words)
            stepped: Any = Stepped(snapshots, frozenset(("take",)))
            moves, *others = stepped.take()
            os._exit(0 if moves > 1000 and others == [7, 9] else 1)
        finally:
            os._exit(2)
    os.pwrite(fds[0], (7).to_bytes(8, "little"), 16)
    os.pwrite(fds[0], (9).to_bytes(8, "little"), 32)
    for moves, _ in enumerate(steps(pid), 1):
        os.pwrite(fds[0], moves.to_bytes(8, "little"), 0)
        assert moves < 300_000


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
