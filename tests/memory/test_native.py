"""The native module as a whole: its names, and that its calls neither leak nor free twice."""

from __future__ import annotations

import gc
import os
import re
import sys
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest

from shmepoch import _native
from shmepoch import _native as at
from shmepoch._native import (
    Cell,
    Descriptor,
    Epoch,
    Memory,
    Refused,
    WriterLock,
    is_locked,
    try_lock,
    unlock,
)
from tests.memory.private import LIVE, TEMPLATE, TOP, Id, Private, Room, head
from tests.memory.test_native_epoch import CALLS, wrongs
from tests.memory.test_native_memory import LENGTH_CALLS, VALUE_CALLS, WORD_CALLS

SIZE: Final = 4096


class Closed(Exception):
    pass


# --- its names ------------------------------------------------------------------------------------


def test_the_module_names_what_its_types_say() -> None:
    stub = Path(_native.__file__).with_name("_native.pyi").read_text()
    stated = set(re.findall(r"^(?:class |def |)([A-Za-z]\w*)(?::|\(|$)", stub, re.M))
    unnamed = {"T", "Id", "Parts", "else", "from"}
    assert {name for name in dir(_native) if not name.startswith("_")} == stated - unnamed


def test_the_constants_are_numbers() -> None:
    for name in dir(_native):
        if name.isupper():
            assert type(getattr(_native, name)) is int, name


def test_types_are_made_by_their_own_rules(memory: Memory) -> None:
    native: Any = _native
    for kind, arguments in (
        (native.Memory, ()),
        (native.Memory, (1,)),
        (native.Memory, ("0", 1)),
        (native.Cell, ()),
        (native.Cell, (object(), 0, 0, ValueError)),
        (native.Cell, (memory, 0, 0)),
        (native.Descriptor.open_held, ("/dev/null", 0, 0)),
        (native.Descriptor.open_held, (0, 0, 0, 0, True)),
        (native.Descriptor.open_held, ("/dev/null", 0, "0", 0, True)),
        (native.Descriptor, ()),
        (native.try_lock, (0, 0)),
        (native.unlock, (0,)),
        (native.is_locked, ("0", 0)),
    ):
        with pytest.raises(TypeError):
            kind(*arguments)
    for call, values in (
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


def test_a_refusal_is_no_error_of_another_kind() -> None:
    assert Refused.__bases__ == (Exception,)
    with pytest.raises(Refused) as refused:
        Private().epoch.watch(Id.of(1))
    assert refused.value.args == ("not_found", "", 0, 0, 0, 0)


# --- lifetimes ------------------------------------------------------------------------------------


def with_errors(call: Callable[..., object], *arguments: object) -> None:
    with suppress(Exception):
        call(*arguments)


def test_no_call_of_a_memory_leaks(fds: tuple[int, int]) -> None:
    memory, closed = Memory.private(SIZE), Closed
    cell, number, data = Cell(memory, 0, 8, Closed), 2**62 + 1, b"some bytes"

    def everything() -> None:
        for name, call in {**WORD_CALLS, **VALUE_CALLS, **LENGTH_CALLS}.items():
            for argument in (0, 8, -1, TOP, number, "x", None):
                if not (name.startswith("wait") and argument is None):
                    with_errors(call, memory, argument)
        memory.store(0, 0)
        memory.write(0, data)
        with_errors(cell.advance, 5)
        memory.store(8, 1)
        with_errors(cell.advance, 6)
        memory.store(8, 0)
        Cell(memory, 0, 8, closed)
        Memory(fds[0], SIZE)
        with_errors(Memory, fds[0], 0)
        memory.snapshots(0, 2, 8, lambda *words: words).take()
        with_errors(memory.snapshots(0, 2, 8, closed).take)

    stays_level(everything, memory, cell, number, data, closed)


def test_no_call_of_a_descriptor_or_a_lock_leaks(fds: tuple[int, int]) -> None:
    memory, closed = Memory.private(Room().parts["size"]), Closed
    mine = Descriptor.open(f"/proc/self/fd/{fds[0]}", os.O_RDWR)
    lock = WriterLock(mine, 0, closed)
    epoch = Epoch(memory, lock, *Room())

    def everything() -> None:
        Descriptor.open_held("/dev/null", 0, 0, 0, True)
        with_errors(Descriptor.open_held, "/dev/null", -1, 0, 0, True)
        with_errors(Descriptor.open, "/dev/null/none", 0)
        opened = Descriptor.open("/dev/null", os.O_RDWR)
        opened.close(partial(Closed, opened))  # a cycle
        with_errors(opened.fileno)
        with_errors(mine.take, opened)
        retired = WriterLock(mine, 0, closed)
        retired.retire(partial(Closed, retired))  # a cycle
        retired.retire(closed)
        with_errors(Epoch(memory, retired, *Room()).copy)
        with_errors(WriterLock, mine, -1)
        with_errors(WriterLock, mine, 0, 5)
        with_errors(WriterLock, 5)
        WriterLock(None)
        lock.participant = 2**40
        with_errors(setattr, lock, "participant", -1)
        assert lock.participant == 2**40
        try_lock(fds[1], 0, False)
        with_errors(epoch.watch_each, (), True)
        with_errors(epoch.terminate, b"", None, (), 1, 1, False, False, False)
        unlock(fds[1], 0)
        epoch.watch_each((), True)
        is_locked(fds[1], 0)

    stays_level(everything, memory, mine, lock, epoch, closed)


def test_no_call_of_an_epoch_leaks() -> None:
    one = Private(Room(feed_bytes=2048))
    ids = [Id.of(number) for number in range(5)]
    outcome, detail, heads = b"outcome", b"detail", [head(id) for id in ids]
    entrants = tuple((id, spec, b"") for id, spec in zip(ids[:3], heads, strict=False))
    many = (entrants[0], entrants[1], entrants[0])
    endings = tuple((id, outcome) for id in ids[:2])
    record = (1, 1, 0, 0, 0, 0, ids[4], heads[4], outcome, b"rest", detail)
    wrong = [(name, arguments) for name in CALLS for arguments, _ in wrongs(name)]

    def everything() -> None:
        for name, arguments in wrong:
            with_errors(getattr(one.epoch, name), *arguments)
        with_errors(one.epoch.register, many, 1, 1)
        one.epoch.register(entrants, 1, 1)
        with_errors(one.epoch.register, entrants, 1, 1)
        one.epoch.start(tuple(ids[:2]), 1)
        with_errors(one.epoch.start, tuple(ids[:2]), 1)
        slot, birth, since = one.epoch.watch(ids[0])
        held = one.epoch.slot(slot)
        assert held is not None
        one.epoch.change(ids[0], LIVE, 0, held[0], detail)
        with_errors(one.epoch.change, ids[0], LIVE, 0, held[0], detail)
        assert one.epoch.outcome(slot, birth, since) is None
        last = one.epoch.end(endings, LIVE, 5, 9, False)
        with_errors(one.epoch.end, endings, LIVE, 5, 9, False)
        assert one.epoch.outcome(slot, birth, since) is not None
        one.epoch.watch_each(((slot, birth),), False)
        with_errors(one.epoch.outcome, slot, 10**9, since)
        assert one.epoch.terminate(outcome, None, (), 5, 9, False, False, True) == 1
        one.epoch.find(ids[0])
        one.epoch.find(ids[4])
        one.epoch.used()
        one.epoch.active()
        one.epoch.record(last)
        one.epoch.record(0)
        one.epoch.list_since(0, TEMPLATE)
        one.epoch.list_since(last + 9, TEMPLATE)
        one.epoch.collect(one.epoch.words()[6], last + 2)
        copied = Epoch(one.epoch.copy(), None, *one.room)
        with_errors(copied.seal)
        fresh = Private()
        fresh.epoch.restore((record,), 0, 5, 1)
        with_errors(fresh.epoch.restore, (record,), 0, 5, 1)
        with_errors(Private().epoch.restore, (record, record), 0, 5, 1)
        with_errors(Epoch, one.memory, one.lock, *Room(max_operations=2**20))
        torn = one.memory.exchange(at.HEAD_AT, TOP)
        one.register(3)
        with_errors(one.epoch.end, ((ids[3], outcome),), LIVE, 5, 9, False)
        one.memory.store(at.HEAD_AT, torn)
        one.epoch.end(((ids[3], outcome),), LIVE, 5, 9, False)
        one.epoch.collect(one.epoch.words()[6], last + 3)
        with_errors(one.epoch.seal, 1)

    things = *ids, *heads, *entrants, *endings, entrants, many, endings, outcome, detail, record
    stays_level(everything, *things, *record, one.memory, one.lock, one.epoch)


def stays_level(everything: Callable[[], None], *things: object) -> None:
    """References and allocations stay level over many rounds of every call and every error."""
    counted = *things, True, False, None, Id, Refused
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
