"""One shared 64-bit position, as each contestant offers it."""

from __future__ import annotations

import ctypes
import mmap
import multiprocessing
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing.shared_memory import SharedMemory
from typing import Any, NamedTuple

import atomics
import atomicshm
import numpy as np
import posix_ipc

from bench.contestants import ATOMICS, ATOMICSHM, MANAGER, SEMAPHORE, SHMEPOCH, VALUE
from bench.work import epoch


class Cell(NamedTuple):
    """The operations on a position: `advance` to the larger value, `swap` an expected for a new
    one."""

    load: Callable[[], int]
    advance: Callable[[int], bool]
    swap: Callable[[int, int], object]


def of_shmepoch(stack: ExitStack) -> Cell:
    """A cursor of a live epoch."""
    cursor = epoch(stack).cursor_state.agent_applied_cursor
    return Cell(cursor.load, cursor.advance, cursor.compare_and_swap)


def _buffer(stack: ExitStack) -> Any:
    memory = SharedMemory(create=True, size=4096)
    stack.callback(memory.unlink)
    return memory.buf  # closed with the process, since its views are not released earlier


def of_atomicshm(stack: ExitStack, offset: int = 0) -> Cell:
    """A cell of the package atomicshm, whose monotonic update is a loop around its exchange."""
    view = stack.enter_context(atomicshm.AtomicView(_buffer(stack)))
    cell = view.cell_u64(offset)
    load, cas = cell.load, cell.cas

    def advance(value: int) -> bool:
        current = load()
        while current < value:
            found = cas(current, value)
            if found == current:
                return True
            current = found
        return False

    return Cell(load, advance, cas)


def of_atomics(stack: ExitStack) -> Cell:
    """The package atomics, the same way."""
    view: Any = stack.enter_context(
        atomics.atomicview(buffer=_buffer(stack)[:8], atype=atomics.UINT)
    )
    load, exchange = view.load, view.cmpxchg_strong

    def advance(value: int) -> bool:
        current = load()
        while current < value:
            found = exchange(current, value)
            if found.success:
                return True
            current = found.expected
        return False

    return Cell(load, advance, exchange)


def of_value(stack: ExitStack) -> Cell:
    """multiprocessing.Value with its lock."""
    synchronized = multiprocessing.Value(ctypes.c_uint64)
    # Its own `value` would take the lock again.
    lock, shared = synchronized.get_lock(), synchronized.get_obj()

    def load() -> int:
        with lock:
            return shared.value

    def advance(value: int) -> bool:
        with lock:
            if shared.value >= value:
                return False
            shared.value = value
            return True

    def swap(expected: int, new: int) -> bool:
        with lock:
            if shared.value != expected:
                return False
            shared.value = new
            return True

    return Cell(load, advance, swap)


def of_semaphore(stack: ExitStack) -> Cell:
    """A numpy array in shared memory under a named POSIX semaphore."""
    semaphore = posix_ipc.Semaphore(None, posix_ipc.O_CREX, initial_value=1)
    semaphore.unlink()
    stack.callback(semaphore.close)
    array: Any = np.ndarray(1, dtype=np.uint64, buffer=mmap.mmap(-1, mmap.PAGESIZE))

    def load() -> int:
        with semaphore:
            return int(array[0])

    def advance(value: int) -> bool:
        with semaphore:
            if array[0] >= value:
                return False
            array[0] = value
            return True

    def swap(expected: int, new: int) -> bool:
        with semaphore:
            if array[0] != expected:
                return False
            array[0] = new
            return True

    return Cell(load, advance, swap)


def of_manager(stack: ExitStack) -> Cell:
    """A number in a multiprocessing.Manager's process; not safe: it has no atomic exchange."""
    manager = stack.enter_context(multiprocessing.Manager())
    shared = manager.Value("Q", 0)

    def advance(value: int) -> bool:
        if shared.value >= value:
            return False
        shared.value = value
        return True

    def swap(expected: int, new: int) -> bool:
        if shared.value != expected:
            return False
        shared.value = new
        return True

    return Cell(lambda: int(shared.value), advance, swap)


#: Name, maker and caveat of each, and a divisor for the number of calls in its samples.
ALL: list[tuple[str, Callable[[ExitStack], Cell], str, int]] = [
    (SHMEPOCH, of_shmepoch, "", 1),
    (ATOMICSHM, of_atomicshm, "no waiting, no lifetime", 1),
    (ATOMICS, of_atomics, "no waiting, no lifetime", 100),
    (VALUE, of_value, "a killed holder keeps the lock", 10),
    (SEMAPHORE, of_semaphore, "a killed holder keeps the lock", 10),
    (MANAGER, of_manager, "unsafe: updates can be lost", 500),
]
