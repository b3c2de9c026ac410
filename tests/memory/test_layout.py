"""The layout of a segment: its page matches the native module; its parts are in order."""

from __future__ import annotations

import re
import sys
from itertools import pairwise
from pathlib import Path
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shmepoch import _native as at
from shmepoch.config import MAX_STORE_WAIT_MS, OpsLifecycleConfig, least_feed_bytes
from shmepoch.errors import ConfigInvalid
from shmepoch.memory.layout import Layout
from tests.epoch.deadline import UNHURRIED

PAGE: Final = Path(__file__).parents[2] / "docs/layout.md"
#: The columns of a table that draws offsets.
COLUMNS: Final = ["offset", "field", "changed by", "ordering", "meaning"]

#: The constant behind each line of the tables of the page.
HEADER: Final = {
    "magic": at.MAGIC_AT,
    "version": at.VERSION_AT,
    "size": at.SIZE_AT,
    "state": at.STATE_AT,
    "epoch_id (16)": at.EPOCH_ID_AT,
    "session_id (16)": at.SESSION_ID_AT,
    "witness (16)": at.WITNESS_AT,
    "max_completed": at.CAPACITIES_AT,
    "max_concurrent": at.CAPACITIES_AT + at.WORD,
    "max_operations": at.CAPACITIES_AT + 2 * at.WORD,
    "feed_bytes": at.CAPACITIES_AT + 3 * at.WORD,
    "max_participants": at.CAPACITIES_AT + 4 * at.WORD,
    "store_wait_ms": at.CAPACITIES_AT + 5 * at.WORD,
    "origin": at.ORIGIN_AT,
    "created_at_ms": at.CREATED_AT,
    "skipped_after": at.SKIPPED_AT,
    "skipped_through": at.SKIPPED_AT + at.WORD,
    "checksum": at.CHECKSUM_AT,
    "agent_applied": Layout.cursor(0),
    "runtime_observed": Layout.cursor(1),
    "runtime_injected": Layout.cursor(2),
    "watermark": at.WATERMARK_AT,
    "event": at.EVENT_AT,
    "doorbells": at.DOORBELLS_AT,
    "dropped_through": at.DROPPED_AT,
    "intent": at.INTENT_AT,
    "registrations": at.REGISTRATIONS_AT,
    "collected_through": at.COLLECTED_AT,
    "kept": at.KEPT_AT,
    "head": at.HEAD_AT,
    "joined": at.JOINED_AT,
    "durable_seq": at.DURABLE_AT,
    "repairs": at.REPAIRS_AT,
}
PARTICIPANT: Final = {
    "word": 0,
    "pid": at.PARTICIPANT_PID,
    "joined_at_ms": at.PARTICIPANT_JOINED,
    "spare": at.PARTICIPANT_SIZE - at.WORD,
}
SLOT: Final = {
    "word": at.SLOT_WORD,
    "birth": at.SLOT_BIRTH,
    "terminal_seq": at.SLOT_TERMINAL_SEQ,
    "id (16)": at.SLOT_ID,
    "participant": at.SLOT_PARTICIPANT,
    "created_at_ms": at.SLOT_CREATED_MS,
    "created_mono_ns": at.SLOT_CREATED_MONO,
    "started": at.SLOT_STARTED,
    "position": at.SLOT_POSITION,
    "spec_lengths": at.SLOT_SPEC_LENGTHS,
    "detail_length (2 x 8)": at.SLOT_DETAIL_LENGTH,
    f"spec ({at.SPEC_LIMIT})": at.SLOT_SPEC,
    f"details (2 x {at.DETAIL_LIMIT})": at.SLOT_DETAIL,
    "watchers (2 x max_participants)": at.SLOT_WATCHERS,
}
#: The words before the lengths have no constants: only the native module reads them.
RECORD: Final = {
    "seq": 0,
    "birth": at.WORD,
    "id (16)": 2 * at.WORD,
    "created_at_ms": at.RECORD_LENGTHS - 4 * at.WORD,
    "started": at.RECORD_LENGTHS - 3 * at.WORD,
    "completed_at_ms": at.RECORD_LENGTHS - 2 * at.WORD,
    "elapsed_ms": at.RECORD_LENGTHS - at.WORD,
    "lengths": at.RECORD_LENGTHS,
    "checksums": at.RECORD_CHECKSUMS,
    "parts": at.RECORD_SIZE,
}

CONFIGS: Final = st.builds(
    lambda completed, operations, extra, participants, store_wait_ms: OpsLifecycleConfig(
        max_completed=completed,
        max_operations=operations,
        feed_bytes=least_feed_bytes(operations) + 8 * extra,
        max_participants=participants,
        store_wait_ms=store_wait_ms,
    ),
    st.integers(1, 3000),
    st.integers(1, 3000),
    st.integers(0, 100_000),
    st.integers(1, at.MAX_PARTICIPANTS),
    st.integers(0, MAX_STORE_WAIT_MS),
)


def tables() -> list[tuple[list[str], list[list[str]]]]:
    """The tables of the page, each with its columns and the cells of its rows."""
    found: list[tuple[list[str], list[list[str]]]] = []
    before = ""
    for line in PAGE.read_text().splitlines():
        if line.startswith("|"):
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            if not before.startswith("|"):
                found.append((cells, []))
            elif not line.startswith("| ---"):
                found[-1][1].append(cells)
        before = line
    return found


def drawn() -> list[dict[str, int]]:
    """The offsets of the page: of the header and lines, a participant, a slot, a record."""
    return [
        {field: int(offset) for offset, field, *_ in rows}
        for columns, rows in tables()
        if columns == COLUMNS
    ]


def extent(field: str) -> int:
    """The bytes of a field, by its name on the page."""
    found = re.search(r"\((?:(\d+) x )?(\d+|max_participants)\)", field)
    if found is None:
        return at.WORD
    count = at.MAX_PARTICIPANTS if found[2] == "max_participants" else int(found[2])
    return int(found[1] or 1) * count


def test_the_tables_are_the_constants() -> None:
    assert drawn() == [HEADER, PARTICIPANT, SLOT, RECORD]


def test_every_constant_of_an_offset_is_drawn() -> None:
    """A new constant must be on the page, or be named in this test."""
    prefixes = ("SLOT_", "RECORD_", "PARTICIPANT_")
    named = {name for name in dir(at) if name.endswith("_AT") or name.startswith(prefixes)}
    elsewhere = {"PARTICIPANTS_AT", "PARTICIPANT_SIZE", "PARTICIPANT_BYTE", "CURSORS_AT"}
    places = {offset for table in drawn() for offset in table.values()}
    assert elsewhere <= named
    assert {name for name in named - elsewhere if getattr(at, name) not in places} == set()


def test_the_page_is_of_this_version() -> None:
    assert f"as\nof version {at.VERSION}." in PAGE.read_text()


def test_the_lock_bytes_are_the_constants() -> None:
    [rows] = [rows for columns, rows in tables() if columns == ["byte", "held", "by"]]
    assert [byte for byte, _, _ in rows] == [
        str(at.WRITER_BYTE),
        str(at.RUNTIME_BYTE),
        str(at.PRESENCE_BYTE),
        str(at.AGENT_BYTE),
        str(at.LOOP_BYTE),
        f"{at.PARTICIPANT_BYTE} + i",
    ]


def test_nothing_in_a_table_overlaps() -> None:
    header, participant, slot, record = drawn()
    slot_size = at.layout(1, 1, at.PAGE, at.MAX_PARTICIPANTS)["slot_size"]
    for table, size in (
        (header, at.PARTICIPANTS_AT),
        (participant, at.PARTICIPANT_SIZE),
        (slot, slot_size),
        (record, record["parts"] + at.WORD),
    ):
        spans = [(offset, offset + extent(field)) for field, offset in table.items()]
        for (_, end), (begin, _) in pairwise([*spans, (size, size)]):
            assert end <= begin
        assert all(begin % at.WORD == 0 for begin, _ in spans)


def test_cursors_and_what_waiters_look_at_share_no_line() -> None:
    lines = [Layout.cursor(i) // at.LINE for i in range(at.CURSORS)]
    lines += [at.WATERMARK_AT // at.LINE, at.DROPPED_AT // at.LINE]
    assert len(set(lines)) == len(lines)
    assert all(offset % at.LINE == 0 for offset in (at.CURSORS_AT, at.WATERMARK_AT, at.DROPPED_AT))
    assert at.WATERMARK_AT // at.LINE == at.DOORBELLS_AT // at.LINE
    assert at.DROPPED_AT // at.LINE == at.DURABLE_AT // at.LINE


def test_cursors_alone_take_one_page() -> None:
    assert Layout(None).size == at.PAGE


@pytest.mark.parametrize("config", [None, OpsLifecycleConfig()])
def test_a_layout_is_rebuilt_from_its_header(config: OpsLifecycleConfig | None) -> None:
    layout = Layout(config)
    again = Layout.from_capacities(layout.capacities())
    assert again.config == config
    assert again.size == layout.size


#: The alignment and the size of each part on the page.
SIZES: Final = {
    "header": (at.PAGE, "256"),
    "cursors": (at.LINE, "3 x 128"),
    "feed line": (at.LINE, "128"),
    "writer line": (at.LINE, "128"),
    "participants": (at.LINE, "max_participants x 32"),
    "fingerprints": (at.LINE, "max_operations x 8"),
    "retained": (at.WORD, "retained_count x 8"),
    "index": (at.LINE, "index_count x 8"),
    "slots": (at.LINE, "max_operations x slot_size"),
    "records": (at.LINE, "feed_bytes"),
}


def test_the_parts_are_drawn_as_they_are_tested() -> None:
    [rows] = [rows for columns, rows in tables() if columns[0] == "part"]
    assert {part: (int(to), size) for part, to, size, _ in rows} == SIZES
    text = PAGE.read_text()
    for formula in (
        "retained_count = max_completed + max_operations\n",
        "index_count = max(1024, 4 x max_completed, 2 x max_operations) + 1024.",
        "slot_size = 1664 + 2 x max_participants, rounded up to lines\n",
    ):
        assert formula in text


def up_to(offset: int, to: int) -> int:
    return -(-offset // to) * to


@UNHURRIED
@given(config=CONFIGS)
def test_parts_follow_each_other(config: OpsLifecycleConfig) -> None:
    """As on the page: each part begins where the one before ends, at its alignment."""
    layout = Layout(config)
    completed, operations = config.max_completed, config.max_operations
    retained_count = completed + operations
    index_count = max(at.MIN_FEED_ENTRIES, 4 * completed, 2 * operations) + at.RECOVERY_SKIP
    slot_size = up_to(1664 + 2 * config.max_participants, at.LINE)
    parts = {
        "header": (0, at.HEADER_SIZE),
        "cursors": (at.CURSORS_AT, at.CURSORS * at.LINE),
        "feed line": (at.WATERMARK_AT, at.LINE),
        "writer line": (at.DROPPED_AT, at.LINE),
        "participants": (at.PARTICIPANTS_AT, config.max_participants * at.PARTICIPANT_SIZE),
        "fingerprints": (layout.fingerprints, operations * at.WORD),
        "retained": (layout.retained, retained_count * at.WORD),
        "index": (layout.index, index_count * at.WORD),
        "slots": (layout.slots_at, operations * slot_size),
        "records": (layout.records, config.feed_bytes),
    }
    assert list(parts) == list(SIZES)
    end = 0
    for part, (begin, size) in parts.items():
        assert begin == up_to(end, SIZES[part][0]), part
        end = begin + size
    assert layout.size == up_to(end, at.PAGE)
    assert (layout.slots, layout.slot_size) == (operations, slot_size)
    assert (layout.entries, layout.feed_bytes) == (index_count, config.feed_bytes)
    assert at.layout(completed, operations, config.feed_bytes, config.max_participants) == {
        "participants": at.PARTICIPANTS_AT,
        "fingerprints": layout.fingerprints,
        "retained": layout.retained,
        "retained_count": retained_count,
        "index": layout.index,
        "index_count": index_count,
        "slots": layout.slots_at,
        "slot_size": slot_size,
        "records": layout.records,
        "size": layout.size,
    }
    again = Layout.from_capacities(layout.capacities())
    assert (again.config, again.size, again.records) == (config, layout.size, layout.records)


def test_places_in_a_part() -> None:
    layout = Layout(OpsLifecycleConfig())
    assert layout.slot(3) == layout.slots_at + 3 * layout.slot_size
    assert layout.fingerprint(3) == layout.fingerprints + 3 * at.WORD
    assert layout.index_word(3) == layout.index + 3 * at.WORD
    assert layout.index_word(3 + 5 * layout.entries) == layout.index_word(3)
    assert layout.participant(3) == at.PARTICIPANTS_AT + 3 * at.PARTICIPANT_SIZE


@UNHURRIED
@given(words=st.tuples(*[st.integers(0, 2**64 - 1) | st.integers(0, 300)] * at.CAPACITIES))
def test_any_capacities_are_a_layout_or_refused(words: tuple[int, ...]) -> None:
    try:
        layout = Layout.from_capacities(words)
    except ConfigInvalid as refused:
        assert refused.setting in OpsLifecycleConfig.__struct_fields__
    else:
        assert layout.size > 0
        assert layout.config is None or layout.capacities() == words


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("value", [2**31 + 1, 2**63, 2**64 - 1])
def test_capacities_that_no_segment_has(place: int, value: int) -> None:
    capacities = [3, 4, at.PAGE, 2]
    capacities[place] = value
    with pytest.raises(ValueError, match="no segment"):
        at.layout(*capacities)


def test_what_capacities_are_not() -> None:
    for feed_bytes, participants in ((4097, 2), (at.PAGE, at.MAX_PARTICIPANTS + 1)):
        with pytest.raises(ValueError, match="no segment"):
            at.layout(3, 4, feed_bytes, participants)
    for place in range(4):
        for value, error in ((-1, OverflowError), (2**64, OverflowError), ("4", TypeError)):
            arguments: list[object] = [3, 4, at.PAGE, 2]
            arguments[place] = value
            with pytest.raises(error):
                at.layout(*arguments)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        at.layout(3, 4, at.PAGE)  # type: ignore[call-arg]
    assert at.layout(2**31, 2**31, 2**31, at.MAX_PARTICIPANTS)["size"] > 2**40


def test_the_magic_reads_as_a_word() -> None:
    assert at.MAGIC.to_bytes(8, sys.byteorder) == b"shmepoch"


@pytest.mark.parametrize("participants", [1, 64, at.MAX_PARTICIPANTS])
def test_watchers_fit_a_slot(participants: int) -> None:
    slot_size = at.layout(1, 1, at.PAGE, participants)["slot_size"]
    assert at.SLOT_WATCHERS + 2 * participants <= slot_size
    assert at.SLOT_DETAIL + 2 * at.DETAIL_LIMIT == at.SLOT_WATCHERS
    assert slot_size % at.LINE == 0
