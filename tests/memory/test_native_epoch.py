"""The arguments of an epoch's calls, and its refusals; the tests of the registry test their
effects."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, TypeAlias

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shmepoch import _native as at
from shmepoch._native import Epoch, Memory, Refused, WriterLock
from tests.epoch.deadline import UNHURRIED
from tests.memory.private import LIVE, TEMPLATE, TOP, Id, Private, Room, head

ID: Final = Id.of(1)
RECORD: Final = (1, 1, 0, 0, 0, 0, ID, head(ID), b"outcome", b"rest", b"detail")

#: For each call: valid arguments, and the kind of each. "slot" is a number too; brackets have the
#: kinds in the tuples of a tuple.
CALLS: Final[dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]]] = {
    "register": (
        (((Id.of(2), head(Id.of(2)), b"rest"),), 1, 1),
        (["id", "bytes", "bytes"], "word", "word"),
    ),
    "start": (((ID,), 1), (["id"], "word")),
    "change": ((ID, LIVE, 2, 0, None), ("id", "word", "word", "word", "detail")),
    "end": ((((ID, b"outcome"),), LIVE, 1, 1, False), (["id", "bytes"], *["word"] * 3, "flag")),
    "terminate": (
        (b"outcome", (1,), (1,), 1, 1, False, False, True),
        ("bytes", ["participant"], ["participant"], "word", "word", "flag", "flag", "flag"),
    ),
    "seal": ((), ()),
    "collect": ((0, 0), ("word", "word")),
    "watch": ((ID,), ("id",)),
    "watch_each": ((((0, 1),), True), (["slot", "word"], "flag")),
    "copy": ((), ()),
    "restore": (
        ((RECORD,), 0, 1, 0),
        ([*["whole"] * 6, "id", *["buffer"] * 4], "word", "word", "word"),
    ),
    "words": ((), ()),
    "active": ((), ()),
    "find": ((ID,), ("id",)),
    "used": ((), ()),
    "slot": ((0,), ("slot",)),
    "record": ((1,), ("word",)),
    "list_since": ((0, TEMPLATE), ("word", "template")),
    "outcome": ((0, 1, 0), ("slot", "word", "word")),
}

Wrongs: TypeAlias = list[tuple[Any, type[Exception]]]

NO_NUMBERS: Final[Wrongs] = [(wrong, TypeError) for wrong in (None, "1", 1.5, b"1")]
NO_WORDS: Final[Wrongs] = [*NO_NUMBERS, *((wrong, OverflowError) for wrong in (-1, 2**64, 2**200))]


class NoFlag:
    """A value that is neither true nor false."""

    def __bool__(self) -> bool:
        raise LookupError


NO_TUPLES: Final[tuple[Any, ...]] = ("text", 5, [], {}, iter(()))
#: Wrong values for each kind of argument, and their errors.
WRONG: Final[dict[str, Wrongs]] = {
    "word": NO_WORDS,
    "whole": NO_NUMBERS,
    "slot": [*NO_WORDS, (4, IndexError), (TOP, IndexError)],
    "participant": [*NO_WORDS, (2, ValueError), (0x1FF, ValueError)],
    "id": [(None, TypeError), (ID.bytes, TypeError), ("1", TypeError), (7, TypeError)],
    "bytes": [(wrong, TypeError) for wrong in (None, "text", 5, bytearray(48))],
    "buffer": [(wrong, TypeError) for wrong in (None, "text", 5)],
    "detail": [(wrong, TypeError) for wrong in ("text", 5, bytearray(8))],
    "flag": [(NoFlag(), LookupError)],
    "template": [
        (wrong, TypeError)
        for wrong in (None, b"<seq>", [*TEMPLATE], TEMPLATE[1:], (*TEMPLATE, b""), ("",) * 5)
    ],
    "tuple": [(wrong, TypeError) for wrong in NO_TUPLES],
}


@pytest.fixture
def one() -> Private:
    """An epoch with one operation, in slot 0."""
    one = Private()
    assert one.register(1) == ID
    return one


def fresh(name: str) -> Private:
    """An epoch on which a call with valid arguments succeeds."""
    one = Private()
    if name != "restore":
        one.register(1)
    return one


def wrongs(name: str) -> list[tuple[tuple[Any, ...], type[Exception]]]:
    """The arguments of a call with one wrong value, and its error."""
    right, kinds = CALLS[name]
    found: list[tuple[tuple[Any, ...], type[Exception]]] = []

    def put(place: int, value: Any, error: type[Exception]) -> None:
        found.append(((*right[:place], value, *right[place + 1 :]), error))

    for place, kind in enumerate(kinds):
        if isinstance(kind, str):
            for value, error in WRONG[kind]:
                put(place, value, error)
            continue
        for value, error in WRONG["tuple"]:
            put(place, value, error)
        if len(kind) == 1:
            for value, error in WRONG[kind[0]]:
                put(place, (*right[place], value), error)
            continue
        whole = right[place][0]
        for value in (None, 7, [*whole], whole[:-1], (*whole, 0), ()):
            put(place, (whole, value), TypeError)
        for inner, inner_kind in enumerate(kind):
            for value, error in WRONG[inner_kind]:
                put(place, ((*whole[:inner], value, *whole[inner + 1 :]),), error)
    return found


# --- arguments ------------------------------------------------------------------------------------


def test_every_call_is_tried() -> None:
    assert set(CALLS) == {name for name in dir(Epoch) if not name.startswith("_")}


@pytest.mark.parametrize("name", CALLS)
def test_arguments_that_are_in_order(name: str) -> None:
    getattr(fresh(name).epoch, name)(*CALLS[name][0])


@pytest.mark.parametrize("name", CALLS)
def test_each_argument_that_is_wrong(name: str) -> None:
    """Of another type, out of its range, or a tuple of wrong items; the lock is free afterwards."""
    one = fresh(name)
    before = one.image()
    for arguments, error in wrongs(name):
        with pytest.raises(error):
            getattr(one.epoch, name)(*arguments)
        assert one.image() == before, arguments
    one.epoch.watch_each((), True)


@pytest.mark.parametrize("name", CALLS)
def test_another_number_of_arguments(name: str) -> None:
    one, right = fresh(name), CALLS[name][0]
    before = one.image()
    for arguments in ((*right, 0), right[:-1] if right else (0, 0), (None,) * 12):
        with pytest.raises(TypeError):
            getattr(one.epoch, name)(*arguments)
    with pytest.raises(TypeError):
        getattr(one.epoch, name)(*right, unknown=1)
    assert one.image() == before


@pytest.mark.parametrize("name", CALLS)
def test_any_number_of_arguments(one: Private, name: str) -> None:
    """Of any type: the call returns or raises."""
    for arity in range(10):
        for argument in (None, -1, 7, "x", (1, 2), ((1, 2),), 2**70, b"x" * 16, ID, (ID,)):
            with suppress(TypeError, ValueError, OverflowError, IndexError, Refused):
                getattr(one.epoch, name)(*[argument] * arity)


@pytest.mark.parametrize(
    ("name", "place", "value"),
    [
        ("register", 0, ((ID, b"h" * (at.SPEC_LIMIT + 1), b""),)),
        ("register", 0, ((ID, b"h" * at.SPEC_LIMIT, b"r"),)),
        ("register", 0, ((ID, b"h" * 48, b"r" * (at.SPEC_LIMIT - 47)),)),
        ("register", 0, ((Id.of(2), head(Id.of(2)), b""), (Id.of(3), b"", b"r" * 513))),
        ("change", 2, 4),
        ("change", 2, TOP),
        ("change", 4, b"d" * (at.DETAIL_LIMIT + 1)),
        ("restore", 0, ((*RECORD[:7], b"h" * (at.HEAD_LIMIT + 1), *RECORD[8:]),)),
        ("restore", 0, ((*RECORD[:8], b"o" * 1025, *RECORD[9:]),)),
        ("restore", 0, ((*RECORD[:9], b"r" * (at.SPEC_LIMIT + 1), b""),)),
        ("restore", 0, ((*RECORD[:10], b"d" * (at.DETAIL_LIMIT + 1)),)),
        ("restore", 0, ((TOP, *RECORD[1:]),)),
    ],
)
def test_a_length_or_a_number_out_of_its_range(name: str, place: int, value: object) -> None:
    one, arguments = fresh(name), list(CALLS[name][0])
    arguments[place] = value
    before = one.image()
    with pytest.raises(ValueError):
        getattr(one.epoch, name)(*arguments)
    assert one.image() == before


@pytest.mark.parametrize(
    ("name", "place", "value"),
    [
        *[("restore", 0, ((*RECORD[:n], 2**63 + 1, *RECORD[n + 1 :]),)) for n in (2, 3, 4, 5)],
        *[("restore", 0, ((*RECORD[:n], -1, *RECORD[n + 1 :]),)) for n in range(6)],
        *[("restore", 0, ((*RECORD[:n], 2**64 + 3, *RECORD[n + 1 :]),)) for n in range(6)],
        *[("register", n, 2**63) for n in (1, 2)],
        ("start", 1, 2**63),
        *[("end", n, 2**63) for n in (2, 3)],
        *[("terminate", n, 2**63) for n in (3, 4)],
    ],
)
def test_a_number_that_no_record_holds(name: str, place: int, value: object) -> None:
    one, arguments = fresh(name), list(CALLS[name][0])
    arguments[place] = value
    before = one.image()
    with pytest.raises(OverflowError):
        getattr(one.epoch, name)(*arguments)
    assert one.image() == before


@pytest.mark.parametrize("name", sorted(CALLS))
def test_memory_for_cursors_has_no_operations(name: str) -> None:
    one = Private(Room(0, 0, 0, 0, 2))
    if name in ("seal", "copy", "used"):
        getattr(one.epoch, name)()
        return
    with pytest.raises((ValueError, IndexError), match=r"cursors only|there are 0"):
        getattr(one.epoch, name)(*CALLS[name][0])


def test_memory_for_cursors_is_copied_whatever_is_in_it() -> None:
    one = Private(Room(0, 0, 0, 0, 2))
    one.memory.store(at.INTENT_AT, 1)
    assert bytes(one.epoch.copy()) == one.image()


@pytest.mark.parametrize("participant", [2, 0xFF, 0x1FF, TOP])
def test_a_participant_without_a_slot_changes_nothing(participant: int) -> None:
    one = Private()
    id = one.register(1)
    one.lock.participant = participant
    before = one.image()
    with pytest.raises(ValueError, match="no participant"):
        one.epoch.watch(id)
    assert one.image() == before


def test_the_longest_that_fits() -> None:
    one = Private(Room(feed_bytes=4096))
    id, spec = Id.of(1), head(Id.of(1), 100)
    rest, detail = b"r" * (at.SPEC_LIMIT - 100), b"d" * at.DETAIL_LIMIT
    one.epoch.register(((id, spec, rest),), TOP >> 1, TOP >> 1)
    found = one.epoch.slot(0)
    assert found is not None
    assert found[:3] == (2 << 16 | 1, 1, 0)
    assert found[3:] == (id.bytes, 0, TOP >> 1, TOP >> 1, 0, spec, rest, b"", 0)
    one.epoch.change(id, LIVE, 2, found[0], detail)
    changed = one.epoch.slot(0)
    assert changed is not None
    assert (changed[0], changed[10]) == (3 << 16 | 1 << 8 | 2, detail)


@UNHURRIED
@given(
    name=st.sampled_from(list(CALLS)),
    garbage=st.lists(
        st.tuples(
            st.sampled_from(["control", "fingerprints", "retained", "index", "slots", "records"]),
            st.integers(0, 64) | st.integers(0, 400),
            st.binary(min_size=8, max_size=64)
            | st.integers(0, 20).map(lambda n: n.to_bytes(8, "little")),
        ),
        max_size=5,
    ),
    any_arguments=st.none()
    | st.lists(
        st.one_of(
            st.integers(-4, 10),
            st.integers(-(2**70), 2**70),
            st.just(ID),
            st.just((ID,)),
            st.tuples(st.integers(0, 4), st.integers(0, 4)).map(lambda pair: (pair,)),
            st.binary(max_size=60),
            st.none(),
        ),
        max_size=8,
    ),
)
def test_any_arguments_over_any_memory(
    name: str, garbage: list[tuple[str, int, bytes]], any_arguments: list[Any] | None
) -> None:
    """Each call returns or raises, and leaves the lock free."""
    one = fresh(name)
    if name != "restore":
        one.put(7, b"outcome")
    size = one.parts["size"]
    for part, word, data in garbage:
        begin = at.STATE_AT if part == "control" else one.parts[part]  # type: ignore[literal-required]
        offset = min(begin + word * at.WORD, size - 64)
        one.memory.write(offset, data)
    arguments = CALLS[name][0] if any_arguments is None else any_arguments
    with suppress(TypeError, ValueError, IndexError, OverflowError, Refused):
        getattr(one.epoch, name)(*arguments)
    with suppress(Refused):
        one.epoch.watch_each((), True)
    one.memory.store(at.STATE_AT, at.OPEN)
    one.epoch.seal()


@pytest.mark.parametrize("watermark", [2**20, 2**40, 2**62, TOP])
def test_a_search_of_the_feed_ends(one: Private, watermark: int) -> None:
    """For any content of the watermark: a reader has not checked it."""
    one.put(2, b"outcome")
    one.memory.store(at.WATERMARK_AT, watermark)
    for slot in (0, 3):
        with pytest.raises(Refused):
            one.epoch.outcome(slot, 7, 0)
    with suppress(Refused):
        one.epoch.find(Id.of(3))


# --- refusals -------------------------------------------------------------------------------------


def register(one: Private, *numbers: int) -> None:
    ids = [Id.of(number) for number in numbers]
    one.epoch.register(tuple((id, head(id), b"") for id in ids), 1, 1)


def end(one: Private, *numbers: int, statuses: int = LIVE, waits: bool = False) -> None:
    endings = tuple((Id.of(number), b"outcome") for number in numbers)
    one.epoch.end(endings, statuses, 5, 9, waits)


#: For each reason: the preparation, the refused call, and its facts.
REFUSALS: Final[
    dict[str, tuple[Callable[[Private], object], Callable[[Private], object], tuple[int, int]]]
] = {
    "already_registered": (lambda o: None, lambda o: register(o, 2, 3, 1), (2, 0)),
    "already_registered ended": (lambda o: end(o, 1), lambda o: register(o, 1), (0, 0)),
    "already_registered together": (lambda o: None, lambda o: register(o, 2, 3, 2), (2, 0)),
    "limit": (lambda o: register(o, 2, 3), lambda o: register(o, 4, 5), (1, 3)),
    "not_found": (lambda o: None, lambda o: end(o, 1, 2), (1, 0)),
    "not_found watch": (lambda o: None, lambda o: o.epoch.watch(Id.of(2)), (0, 0)),
    "has_ended": (lambda o: o.put(2, b""), lambda o: end(o, 1, 2), (1, 1)),
    "has_ended watch": (lambda o: end(o, 1), lambda o: o.epoch.watch(ID), (0, 1)),
    "wrong_status": (lambda o: None, lambda o: end(o, 1, statuses=0b1100), (0, 1)),
    "wrong_status start": (
        lambda o: o.epoch.start((ID,), 1),
        lambda o: o.epoch.start((ID,), 1),
        (0, 2),
    ),
    "wrong_status change": (
        lambda o: o.epoch.change(ID, LIVE, 3, 0, None),
        lambda o: o.epoch.change(ID, 0b0110, 0, 0, b""),
        (0, 3),
    ),
    "twice": (lambda o: register(o, 2), lambda o: end(o, 2, 1, 2), (2, 0)),
    "twice start": (lambda o: None, lambda o: o.epoch.start((ID, ID), 1), (1, 0)),
    "changed": (
        lambda o: o.epoch.start((ID,), 1),
        lambda o: o.epoch.change(ID, LIVE, 0, 2 << 16 | 1, b"detail"),
        (0, 3 << 16 | 2),
    ),
    "changed collected": (lambda o: end(o, 1), lambda o: o.epoch.collect(1, 1), (-1, 0)),
    "changed beyond": (lambda o: end(o, 1), lambda o: o.epoch.collect(0, 2), (-1, 0)),
    "store_behind": (
        lambda o: [o.put(number, b"x" * 200) for number in (2, 3)],
        lambda o: o.epoch.end(((ID, b"x" * 600),), LIVE, 5, 9, True),
        (-1, 2),
    ),
    "ended": (lambda o: o.epoch.seal(), lambda o: register(o, 2), (-1, 0)),
    "ended gone": (
        lambda o: o.memory.store(at.STATE_AT, at.GONE),
        lambda o: o.epoch.seal(),
        (-1, 0),
    ),
    "dropped": (lambda o: end(o, 1), lambda o: o.epoch.outcome(0, 7, 0), (-1, 0)),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_refused_has_changed_nothing(one: Private, name: str) -> None:
    """Except prepared words, which readers do not count, and the hints for the search."""
    prepare, call, (index, actual) = REFUSALS[name]
    prepare(one)
    before, words = [one.epoch.slot(slot) for slot in range(4)], one.epoch.words()
    with pytest.raises(Refused) as refused:
        call(one)
    assert refused.value.args == (name.split()[0], "", index, 0, 0, actual)
    assert [one.epoch.slot(slot) for slot in range(4)] == before
    assert one.epoch.words() == words
    assert one.memory.load(at.INTENT_AT) == 0
    if not name.startswith("ended"):
        one.epoch.copy()


@pytest.mark.parametrize(
    "name", ["register", "start", "change", "end", "terminate", "seal", "collect", "watch", "copy"]
)
def test_without_a_lock_there_is_no_transition(one: Private, name: str) -> None:
    epoch = Epoch(one.memory, None, *one.room)
    before = one.image()
    for call in (
        lambda: getattr(epoch, name)(*CALLS[name][0]),
        lambda: epoch.watch_each((), False),
    ):
        with pytest.raises(Refused) as refused:
            call()
        assert refused.value.args == ("read_only", "", -1, 0, 0, 0)
    assert one.image() == before
    assert epoch.find(ID) == (0, 0)
    assert epoch.used() == [0]


def test_a_limit_of_its_own() -> None:
    one = Private(Room(max_concurrent=2))
    register(one, 1, 2)
    with pytest.raises(Refused) as refused:
        register(one, 3)
    assert refused.value.args == ("limit", "", 0, 0, 0, 2)


def test_a_limit_above_the_table_is_that_of_the_table() -> None:
    one = Private(Room(max_concurrent=9))
    register(one, 1, 2)
    before = one.epoch.words()
    with pytest.raises(Refused) as refused:
        register(one, 3, 4, 5)
    assert refused.value.args == ("limit", "", 2, 0, 0, 2)
    assert one.epoch.words() == before
    register(one, 3, 4)


def test_a_store_may_have_just_what_is_dropped(one: Private) -> None:
    """DURABLE-2: the store must have the last dropped entry; the one before is not enough."""
    for number in (2, 3):
        one.put(number, b"x" * 200)
    ending = ((ID, b"x" * 600),)
    one.memory.store(at.DURABLE_AT, 1)
    with pytest.raises(Refused) as refused:
        one.epoch.end(ending, LIVE, 5, 9, True)
    assert refused.value.args == ("store_behind", "", -1, 0, 0, 2)
    one.memory.store(at.DURABLE_AT, 2)
    assert one.epoch.end(ending, LIVE, 5, 9, True) == 3


def test_more_may_end_together_than_a_recovery_skips() -> None:
    """A store cannot have them before, so it must only have everything that was committed
    before."""
    count = at.RECOVERY_SKIP + 10
    one = Private(Room(max_operations=count, feed_bytes=2**18))
    register(one, *range(count))
    endings = tuple((Id.of(number), b"outcome") for number in range(count))
    assert one.epoch.end(endings, LIVE, 5, 9, True) == 1
    register(one, count)
    with pytest.raises(Refused) as refused:
        end(one, count, waits=True)
    assert refused.value.args == ("store_behind", "", -1, 0, 0, 11)


def test_watchers_are_counted_in_a_lane_of_their_own(one: Private) -> None:
    """Counting above its maximum, or below zero, does not change the next participant's count."""
    watchers = one.parts["slots"] + at.SLOT_WATCHERS
    one.memory.store(watchers, 1 << 16 | 0xFFFF)
    one.epoch.watch(ID)
    assert one.memory.load(watchers) == 1 << 16 | 0xFFFF
    one.memory.store(watchers, 1 << 16)
    assert one.epoch.watch_each(((0, 1),), False) == (True,)
    assert one.memory.load(watchers) == 1 << 16


# --- construction ---------------------------------------------------------------------------------


def test_it_is_made_of_a_memory_and_a_lock() -> None:
    make: Any = Epoch
    memory, room = Memory.private(Room().parts["size"]), Room()
    for arguments in (
        (),
        (memory, None, *room[:-1]),
        (memory, None, *room, 0),
        (b"memory", None, *room),
        (memory, b"lock", *room),
        (None, None, *room),
    ):
        with pytest.raises(TypeError):
            make(*arguments)
    for place in range(len(room)):
        for value in (None, "1", 1.5):
            with pytest.raises(TypeError):
                make(memory, None, *room[:place], value, *room[place + 1 :])
    with pytest.raises(TypeError):
        type("Sub", (make,), {})
    named = make(memory=memory, lock=WriterLock(), **room._asdict())
    assert named.words() == (0,) * 8


@pytest.mark.parametrize(
    "room",
    [
        Room(max_completed=2**31 + 1),
        Room(max_operations=2**31 + 1),
        Room(feed_bytes=2**31 + 8),
        Room(feed_bytes=1020),
        Room(feed_bytes=at.RECORD_SIZE - 8),
        Room(max_completed=0),
        Room(max_participants=0),
        Room(max_participants=at.MAX_PARTICIPANTS + 1),
        Room(max_operations=6),
        Room(feed_bytes=8192),
        Room(max_completed=2**31, max_operations=2**31, feed_bytes=2**31),
    ],
)
def test_it_lies_inside_its_memory(room: Room) -> None:
    memory = Memory.private(Room().parts["size"])
    with pytest.raises(ValueError, match=f"lies in {len(memory)} bytes"):
        Epoch(memory, None, *room)


def test_it_keeps_the_mapping_and_the_lock() -> None:
    size = Room().parts["size"]
    epochs = [Epoch(Memory.private(size), WriterLock(), *Room()) for _ in range(10)]
    gc.collect()
    for epoch in epochs:
        assert epoch.register(((ID, head(ID), b""),), 1, 1) == 1


def test_a_copy_is_the_same_and_apart(one: Private) -> None:
    one.put(2, b"outcome")
    copied = one.epoch.copy()
    assert bytes(copied) == one.image()
    register(one, 3)
    other = Epoch(copied, None, *one.room)
    assert (other.active(), one.epoch.active()) == (1, 2)
    assert other.list_since(0, TEMPLATE) == one.list_since(0)
