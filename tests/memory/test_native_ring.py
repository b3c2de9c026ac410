"""Records in the byte ring: a record comes out whole and under its sequence, or not at all."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shmepoch import _native as at
from shmepoch._native import Memory, Refused
from tests.epoch.deadline import UNHURRIED
from tests.memory.private import LIVE, TOP, Id, Private, Room, array, entry, head

#: The ring refuses a head above this: adding to it would soon overflow.
LAST_POSITION: Final = 2**63


def refusal(error: pytest.ExceptionInfo[Refused]) -> tuple[str, str, int]:
    """The reason of a refusal, and the field and the sequence that it names."""
    reason, field, index, *_ = error.value.args
    return reason, field, index


def size_of(outcome: bytes, length: int = 48, rest: bytes = b"") -> int:
    """The bytes of a record in the ring."""
    return at.RECORD_SIZE + -(-(length + len(outcome)) // 8) * 8 + -(-len(rest) // 8) * 8


# --- records that were written --------------------------------------------------------------------


def test_a_ring_gives_back_what_was_put() -> None:
    one = Private(Room(feed_bytes=4096))
    outcomes = [b"", b"1", b"12345678", b"123456789", b"x" * 100]
    entries = [one.put(n, outcome) for n, outcome in enumerate(outcomes, 1)]
    for after in range(5):
        assert one.list_since(after) == (5, 0, array(entries[after:]))
    for after in (5, 6, TOP):
        assert one.list_since(after) == (5, 0, None)
    for seq, (data, outcome) in enumerate(zip(entries, outcomes, strict=True), 1):
        id = Id.of(seq)
        record = (seq, 1, 0, 5, 8, id.bytes, head(id), outcome, b"", b"")
        assert one.epoch.record(seq) == record
        assert one.recorded(seq) == data
    for seq in (0, 6, TOP):
        assert one.epoch.record(seq) is None


@pytest.mark.parametrize("length", [0, 1, 48, 52, 512])
@pytest.mark.parametrize("rest", [b"", b"r", b"r" * 8, b"r" * 467], ids=len)
@pytest.mark.parametrize("detail", [None, b"", b"d", b"d" * 512])
def test_every_part_of_a_record_comes_back(length: int, rest: bytes, detail: bytes | None) -> None:
    if length + len(rest) > at.SPEC_LIMIT:
        rest = rest[: at.SPEC_LIMIT - length]
    one = Private(Room(feed_bytes=2048))
    for number in range(1, 6):
        id = one.register(number, length=length, rest=rest)
        one.epoch.start((id,), 3)
        slot = one.epoch.find(id)
        assert slot is not None
        held = one.epoch.slot(slot[0])
        assert held is not None
        one.epoch.change(id, LIVE, 0, held[0], detail)
        one.epoch.end(((id, b"outcome"),), LIVE, 5, 9_000_000, False)
        times, first = (number, 1, 4, 5, 8), (id.bytes, head(id, length), b"outcome")
        assert one.epoch.record(number) == (*times, *first, rest, detail or b"")


def test_a_ring_wraps() -> None:
    """Records go around the end of the bytes and of the index; nothing else changes."""
    room = Room(max_operations=1)
    one = Private(room, memory=Memory.private(room.parts["size"] + at.PAGE))
    parts, wrapped = one.parts, at.MIN_FEED_ENTRIES + at.RECOVERY_SKIP + 60
    assert parts["index_count"] < wrapped
    entries: dict[int, bytes] = {}
    for seq in range(1, wrapped):
        entries[seq] = one.put(seq, bytes([seq % 256]) * (5 + 31 * seq % 90))
        watermark, dropped, data = one.list_since(0)
        assert watermark == seq
        assert dropped == 0 or seq - dropped >= 3, "no more is dropped than has to be"
        assert data == array(entries[kept] for kept in range(dropped + 1, seq + 1))
        if dropped:
            assert one.epoch.record(dropped) is None
    assert one.memory.load(at.HEAD_AT) > 100 * room.feed_bytes
    image = one.image()
    assert not any(image[: at.WATERMARK_AT])
    assert not any(image[at.DURABLE_AT : parts["fingerprints"]])
    assert not any(image[parts["retained"] + 8 * parts["retained_count"] : parts["index"]])
    end_of_index = parts["index"] + 8 * parts["index_count"]
    assert not any(image[end_of_index : parts["slots"]])
    assert not any(image[parts["slots"] + at.SLOT_WATCHERS : parts["records"]])
    assert not any(image[parts["records"] + room.feed_bytes :])


@pytest.mark.parametrize("at_once", [1, 2, 4])
@pytest.mark.parametrize("position", [0, 8, 248, 1016, 1024, 2**32 - 8, 2**62, LAST_POSITION])
def test_records_as_long_as_the_ring(position: int, at_once: int) -> None:
    """FEED-3: all of them together, at any position of the ring."""
    one = Private()
    one.memory.store(at.HEAD_AT, position)
    ids = [one.register(number) for number in range(at_once)]
    room = one.room.feed_bytes // at_once
    outcome = bytes(i % 256 for i in range(room - size_of(b"")))
    assert size_of(outcome) == room
    assert one.epoch.end(tuple((id, outcome) for id in ids), LIVE, 5, 9, False) == 1
    entries = [entry(seq, id, head(id), outcome, 5) for seq, id in enumerate(ids, 1)]
    assert one.list_since(0) == (at_once, 0, array(entries))
    assert [one.recorded(seq) for seq in range(1, at_once + 1)] == entries
    assert one.memory.load(at.HEAD_AT) == position + one.room.feed_bytes


@pytest.mark.parametrize("at_once", [1, 2, 4])
def test_records_that_are_longer_than_the_ring(at_once: int) -> None:
    one = Private()
    ids = [one.register(number) for number in range(at_once)]
    outcome = b"x" * (one.room.feed_bytes // at_once - size_of(b"") + 1)
    before = one.image()
    with pytest.raises(Refused) as refused:
        one.epoch.end(tuple((id, outcome) for id in ids), LIVE, 5, 9, False)
    total = at_once * size_of(outcome)
    assert refused.value.args == ("too_large", "", at_once, 0, 0, total)
    with pytest.raises(Refused) as refused:
        one.epoch.terminate(outcome, None, (), 5, 9, False, True, True)
    assert refused.value.args == ("too_large", "", at_once, 0, 0, total)
    assert one.image() == before


def test_details_are_left_out_where_they_do_not_fit_with_the_outcomes() -> None:
    """FEED-3: all operations that end together leave them out, so only outcomes must fit."""
    one = Private()
    detail, outcome = b"d" * 200, b"o" * 200
    assert 2 * (size_of(outcome) + len(detail)) > one.room.feed_bytes > 2 * size_of(outcome)
    ids = [one.register(number) for number in range(3)]
    for slot, id in enumerate(ids):
        one.epoch.start((id,), 3)
        held = one.epoch.slot(slot)
        assert held is not None
        one.epoch.change(id, LIVE, 0, held[0], detail)
    one.epoch.end(tuple((id, outcome) for id in ids[:2]), LIVE, 5, 9, False)
    found = [one.epoch.record(seq) for seq in (1, 2)]
    assert [record and record[-3:] for record in found] == [(outcome, b"", b"")] * 2
    one.epoch.end(((ids[2], outcome),), LIVE, 5, 9, False)
    last = one.epoch.record(3)
    assert last is not None
    assert last[-3:] == (outcome, b"", detail)


def test_no_operation_took_less_than_no_time() -> None:
    """The machine may have restarted since the registration, and the monotonic clock with it."""
    one = Private()
    id = one.register(1)
    one.epoch.end(((id, b"outcome"),), LIVE, 5, 999_999, False)
    record = one.epoch.record(1)
    assert record is not None
    elapsed_ms = record[4]
    assert elapsed_ms == 0


@pytest.mark.parametrize("position", [4, 1, LAST_POSITION + 8, TOP - 7, TOP])
def test_a_head_that_is_none(position: int) -> None:
    one = Private()
    id = one.register(1)
    one.memory.store(at.HEAD_AT, position)
    before = one.image()
    with pytest.raises(Refused) as refused:
        one.epoch.end(((id, b"outcome"),), LIVE, 5, 9, False)
    assert refused.value.args == ("corrupt", "head", -1, 0, LAST_POSITION, position)
    assert one.image() == before


def test_what_is_dropped_is_said_before_it_is_overwritten() -> None:
    """FEED-2: also for one record that takes the room of all."""
    one = Private()
    for number in range(1, 9):
        one.put(number, b"")
    assert one.list_since(0)[:2] == (8, 0)
    last = one.put(9, bytes(one.room.feed_bytes - size_of(b"")))
    assert one.list_since(0) == (9, 8, array([last]))
    assert [one.epoch.record(seq) for seq in range(9)] == [None] * 9


# --- records that were not written, or damaged ----------------------------------------------------


@pytest.mark.parametrize("torn", range(1, 6))
@pytest.mark.parametrize("word", [0, 2, 6, 8, 9, 10, 13, 18])
def test_an_entry_torn_by_overwriting_is_never_returned(torn: int, word: int) -> None:
    """If it was dropped, it is left out with all earlier entries; if not, it is corruption."""
    one = Private()
    entries = [one.put(number, bytes([number]) * 20) for number in range(1, 6)]
    size = size_of(bytes(20))
    torn_at = one.parts["records"] + (torn - 1) * size + word * at.WORD
    one.memory.store(torn_at, one.memory.load(torn_at) ^ 0xFF00)
    for read in (lambda: one.list_since(torn - 1), lambda: one.epoch.record(torn)):
        with pytest.raises(Refused) as refused:
            read()
        assert refusal(refused) == ("corrupt", "feed.record", torn)
    for seq in range(1, 6):
        if seq != torn:
            assert one.recorded(seq) == entries[seq - 1]
    one.memory.store(at.DROPPED_AT, torn)
    rest = array(entries[torn:]) if torn < 5 else None
    for after in range(torn):
        assert one.list_since(after) == (5, torn, rest)
    assert one.epoch.record(torn) is None


@pytest.mark.parametrize("word", range(at.RECORD_SIZE // at.WORD))
@pytest.mark.parametrize("bits", [1, 2**31, 2**32, 2**48, TOP])
def test_a_word_of_a_record_that_was_changed(word: int, bits: int) -> None:
    """The checksum of an entry covers only the part for readers of the feed."""
    one = Private()
    first, second = one.put(1, b"first", rest=b"rest"), one.put(2, b"second")
    changed = one.parts["records"] + word * at.WORD
    one.memory.store(changed, one.memory.load(changed) ^ bits)
    with pytest.raises(Refused) as refused:
        one.epoch.record(1)
    assert refusal(refused) == ("corrupt", "feed.record", 1)
    try:
        assert one.list_since(0) == (2, 0, array([first, second]))
    except Refused as torn:
        assert torn.args[:3] == ("corrupt", "feed.record", 1)
    assert one.list_since(1) == (2, 0, array([second]))


@pytest.mark.parametrize("bits", [1, 8, 128, 1024, 2**31, 2**32 - 1, 2**63, TOP])
def test_an_index_word_that_was_changed(bits: int) -> None:
    one = Private()
    entries = [one.put(number, b"12345678") for number in (1, 2)]
    word = one.parts["index"] + at.WORD
    one.memory.store(word, one.memory.load(word) ^ bits)
    if bits % 2:  # it says that the sequence was skipped
        assert one.list_since(0) == (2, 0, array(entries[1:]))
        assert one.epoch.record(1) is None
    elif bits % one.room.feed_bytes == 0:  # the same place, in another round
        assert one.list_since(0) == (2, 0, array(entries))
    else:
        for read in (lambda: one.list_since(0), lambda: one.epoch.record(1)):
            with pytest.raises(Refused) as refused:
                read()
            assert refusal(refused) == ("corrupt", "feed.record", 1)


def test_a_record_of_another_sequence_is_not_taken() -> None:
    one = Private()
    one.put(1, b"same")
    one.put(2, b"same")
    index = one.parts["index"]
    one.memory.store(index + 2 * at.WORD, one.memory.load(index + at.WORD))
    for read in (lambda: one.list_since(1), lambda: one.epoch.record(2)):
        with pytest.raises(Refused) as refused:
            read()
        assert refusal(refused) == ("corrupt", "feed.record", 2)


@pytest.mark.parametrize(
    ("watermark", "dropped"), [(2**40, 0), (3000, 951), (TOP, 0), (TOP, TOP - 5), (5, 6), (0, 1)]
)
def test_a_span_that_the_index_does_not_hold(watermark: int, dropped: int) -> None:
    one = Private()
    one.memory.store(at.WATERMARK_AT, watermark)
    one.memory.store(at.DROPPED_AT, dropped)
    with pytest.raises(Refused) as refused:
        one.list_since(0)
    assert refusal(refused)[0] == "corrupt"


def subsequence(found: bytes, entries: list[bytes]) -> bool:
    """Whether it is an array of some of these entries, in their order."""
    count, rest = int.from_bytes(found[1:5], "big"), found[5:]
    for each in entries:
        if count and rest.startswith(each):
            count, rest = count - 1, rest[len(each) :]
    return found[:1] == b"\xdd" and not count and not rest


@UNHURRIED
@given(
    garbage=st.lists(
        st.tuples(
            st.sampled_from(["records", "index", "control"]),
            st.integers(0, 127),
            st.binary(max_size=64) | st.integers(0, 20).map(lambda n: n.to_bytes(8, sys.byteorder)),
        ),
        max_size=4,
    ),
    outcomes=st.lists(st.binary(max_size=200), max_size=9),
    after=st.integers(0, 10),
)
def test_garbage_in_a_ring_is_never_returned(
    garbage: list[tuple[str, int, bytes]], outcomes: list[bytes], after: int
) -> None:
    """With any content of memory, every returned entry was written, whole and under its
    sequence."""
    one = Private()
    entries = [one.put(number, outcome) for number, outcome in enumerate(outcomes, 1)]
    begins = {
        "records": one.parts["records"],
        "index": one.parts["index"],
        "control": at.WATERMARK_AT,
    }
    for part, word, data in garbage:
        most = at.PARTICIPANTS_AT - at.WATERMARK_AT if part == "control" else 1024
        begin = word * at.WORD % most
        one.memory.write(begins[part] + begin, data[: most - begin])
    found: bytes | None = None
    with suppress(Refused):
        _, dropped, found = one.list_since(after)
        assert found is None or subsequence(found, entries[max(after, dropped) :])
    if not garbage and after < len(outcomes):
        assert found is not None
    for seq in range(11):
        with suppress(Refused):
            record = one.epoch.record(seq)
            assert record is None or record[0] == seq
            assert record is None or one.recorded(seq) == entries[seq - 1]


def test_an_entry_that_was_overwritten_while_it_was_copied_is_never_returned(
    fds: tuple[int, int],
) -> None:
    """Another process goes round the ring as fast as it can."""
    room, rounds = Room(max_operations=1), 30_000
    os.truncate(fds[0], room.parts["size"])
    mine = Private(room, memory=Memory(fds[0], room.parts["size"]))
    id = Id.of(7)

    def outcome(seq: int) -> bytes:
        return seq.to_bytes(2, "big") * (seq % 150)

    pid = os.fork()
    if pid == 0:
        try:
            theirs = Private(room, memory=Memory(fds[1], room.parts["size"]))
            for seq in range(1, rounds + 1):
                theirs.epoch.register(((id, head(id), b""),), 1, 1)
                theirs.epoch.end(((id, outcome(seq)),), LIVE, 5, 9, False)
                theirs.epoch.collect(seq - 1, seq)
            os._exit(0)
        finally:
            os._exit(1)
    watermark = 0
    while watermark < rounds:
        watermark, dropped, data = mine.list_since(watermark - 3 if watermark > 3 else 0)
        wanted = [entry(s, id, head(id), outcome(s), 5) for s in range(dropped + 1, watermark + 1)]
        if data is not None:
            count = int.from_bytes(data[1:5], "big")
            assert data == array(wanted[len(wanted) - count :])
        seq = dropped + 1
        assert mine.recorded(seq) in (None, entry(seq, id, head(id), outcome(seq), 5))
    assert os.waitpid(pid, 0)[1] == 0


# --- restored -------------------------------------------------------------------------------------


def laid(seq: int, *, birth: int = 0, outcome: bytes = b"outcome") -> tuple[Any, ...]:
    """A record as `restore` takes it."""
    id = Id.of(seq)
    return seq, birth, 11, 12, 14, 13, id, head(id), outcome, b"rest", b"detail"


def test_what_is_laid_in_comes_back() -> None:
    one = Private()
    records = laid(101), laid(103, birth=1), laid(104, birth=2)
    entries = [entry(r[0], r[6], r[7], r[8], r[4]) for r in records]
    one.epoch.restore(records, 100, 110, 105)
    assert one.list_since(0) == (110, 100, array(entries))
    assert one.list_since(103) == (110, 100, array(entries[2:]))
    assert one.list_since(104) == (110, 100, array([]))
    for seq, *times, id, spec, outcome, rest, detail in records:
        assert one.epoch.record(seq) == (*times, id.bytes, spec, outcome, rest, detail)
    assert [one.epoch.record(seq) for seq in (100, 102, 105, 110)] == [None] * 4
    assert one.epoch.words() == (2, 110, 108, 105, 110, 100, 102, 102)
    assert [one.epoch.find(Id.of(seq)) for seq in (101, 103, 104)] == [None, (-1, 103), (-1, 104)]
    assert one.epoch.active() == 0
    # Sequences without a record take no room, and are dropped only with earlier entries.
    dropped = []
    for seq in range(111, 120):
        last = one.put(seq, b"next")
        assert one.list_since(seq - 1)[2] == array([last])
        dropped.append(one.list_since(0)[1])
    assert dropped == [100, 100, 100, 100, 101, 103, 104, 111, 112]


@pytest.mark.parametrize("length", [0, 48, 512, at.HEAD_LIMIT])
def test_a_head_of_any_length_is_laid_in(length: int) -> None:
    """A store may have a longer one than a slot has room for."""
    one = Private(Room(feed_bytes=8192))
    record = list(laid(1))
    record[7] = b"h" * length
    one.epoch.restore((tuple(record),), 0, 1, 1)
    assert one.list_since(0) == (1, 0, array([entry(1, record[6], record[7], record[8], 14)]))
    record[7] = b"h" * (at.HEAD_LIMIT + 1)
    with pytest.raises(ValueError, match="there is room for"):
        Private(Room(feed_bytes=8192)).epoch.restore((tuple(record),), 0, 1, 1)


def test_nothing_is_laid_in() -> None:
    one = Private()
    one.epoch.restore((), 2**40, 2**40 + 5, 2**40)
    assert one.list_since(0) == (2**40 + 5, 2**40, array([]))
    last = one.put(1, b"next")
    assert one.list_since(0) == (2**40 + 6, 2**40, array([last]))
    other = Private()
    other.epoch.restore((), 7, 7, 7)
    assert other.list_since(0) == (7, 7, None)
    last = other.put(1, b"next")
    assert other.list_since(0) == (8, 7, array([last]))


@pytest.mark.parametrize(
    "arguments",
    [
        ((laid(2), laid(1)), 0, 5, 5),
        ((laid(1), laid(1)), 0, 5, 5),
        ((laid(1),), 1, 5, 5),
        ((laid(6),), 0, 5, 5),
        ((laid(1, outcome=bytes(1024)),), 0, 5, 5),
        (tuple(laid(seq, outcome=bytes(300)) for seq in (1, 2, 3)), 0, 5, 5),
        ((), 6, 5, 5),
        ((), 0, 5, 6),
        ((), 0, 2049, 0),
        ((), TOP - 1, TOP - 1, 0),
    ],
)
def test_what_cannot_be_laid_in(arguments: tuple[Any, ...]) -> None:
    one = Private()
    with pytest.raises(ValueError):
        one.epoch.restore(*arguments)
    assert one.list_since(0) == (0, 0, None)
    last = one.put(1, b"first")
    assert one.list_since(0) == (1, 0, array([last]))


def test_only_into_a_fresh_epoch() -> None:
    one = Private()
    one.put(1, b"first")
    before = one.image()
    with pytest.raises(Refused, match="changed"):
        one.epoch.restore((laid(2),), 1, 5, 5)
    assert one.image() == before
