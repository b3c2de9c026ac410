"""The layout module says once where everything lies; its table and its numbers are the same."""

from __future__ import annotations

import re
import sys
from itertools import pairwise
from typing import Final, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shmepoch.errors import ConfigInvalid
from shmepoch.memory import layout as at
from shmepoch.memory.layout import Layout, OpsLifecycleConfig
from tests.epoch.deadline import UNHURRIED

#: The constant behind each line of the tables of the layout's docstring.
HEADER: Final = {
    "magic": at.MAGIC_AT,
    "version": at.VERSION_AT,
    "size": at.SIZE_AT,
    "state": at.STATE_AT,
    "epoch id (16)": at.EPOCH_ID_AT,
    "session id (16)": at.SESSION_ID_AT,
    "witness key (16)": at.WITNESS_AT,
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
    "bells": at.BELLS_AT,
    "dropped_through": at.DROPPED_AT,
    "intent": at.INTENT_AT,
    "registrations": at.REGISTRATIONS_AT,
    "collected_through": at.COLLECTED_AT,
    "reclaimed_through": at.RECLAIMED_AT,
    "joined": at.JOINED_AT,
    "durable_seq": at.DURABLE_AT,
}
PARTICIPANT: Final = {
    "word": 0,
    "pid": at.PARTICIPANT_PID,
    "joined_at_ms": at.PARTICIPANT_JOINED,
}
SLOT: Final = {
    "word": at.SLOT_WORD,
    "birth": at.SLOT_BIRTH,
    "terminal_seq": at.SLOT_TERMINAL_SEQ,
    "operation id (16)": at.SLOT_ID,
    "participant": at.SLOT_PARTICIPANT,
    "created_at_ms": at.SLOT_CREATED_MS,
    "created_mono_ns": at.SLOT_CREATED_MONO,
    "elapsed_ms": at.SLOT_ELAPSED_MS,
    "spec_length": at.SLOT_SPEC_LENGTH,
    "detail_length (2)": at.SLOT_DETAIL_LENGTH,
    "watchers": at.SLOT_WATCHERS,
    "spec (512)": at.SLOT_SPEC,
    "details (2 x 512)": at.SLOT_DETAIL,
}

CONFIGS: Final = st.builds(
    lambda completed, operations, extra, participants, store_wait_ms: OpsLifecycleConfig(
        max_completed=completed,
        max_operations=operations,
        feed_bytes=at.PAGE + operations * 2 * at.SPEC_LIMIT + 8 * extra,
        max_participants=participants,
        store_wait_ms=store_wait_ms,
    ),
    st.integers(1, 3000),
    st.integers(1, 3000),
    st.integers(0, 100_000),
    st.integers(1, at.MAX_PARTICIPANTS),
    st.integers(0, at.MAX_STORE_WAIT_MS),
)


def drawn() -> list[dict[str, int]]:
    """The tables of the docstring: of the header and lines, of a participant, of a slot."""
    assert at.__doc__ is not None
    line = re.compile(r"^ {2,}(\d+)  (\S+(?: \S+)*)", re.MULTILINE)
    tables: list[dict[str, int]] = []
    last = -1
    for found in line.finditer(at.__doc__):
        offset, name = int(found[1]), found[2]
        if offset <= last or not tables:
            tables.append({})
        tables[-1][name] = last = offset
    return tables


def test_the_tables_are_the_constants() -> None:
    header, participant, slot, *locks = drawn()
    assert header == HEADER
    assert participant == PARTICIPANT
    assert slot == SLOT
    assert [list(table.values()) for table in locks] == [
        [at.WRITER_BYTE, at.RUNTIME_BYTE, at.PRESENCE_BYTE, at.AGENT_BYTE, at.LOOP_BYTE]
    ]
    assert at.PARTICIPANT_BYTE == at.LOOP_BYTE + 1


def test_nothing_in_a_table_overlaps() -> None:
    header, participant, slot, _ = drawn()
    for table, size in (
        (header, at.PARTICIPANTS_AT),
        (participant, at.PARTICIPANT_SIZE),
        (slot, at.SLOT_SIZE),
    ):
        ends = {
            offset: offset
            + {"16": 16, "2": 16, "512": 512, "2 x 512": 1024}.get(
                re.sub(r".*\((.*)\)|.*", r"\1", name), at.WORD
            )
            for name, offset in table.items()
        }
        offsets = [*sorted(ends), size]
        assert all(ends[a] <= b for a, b in pairwise(offsets))
        assert all(offset % at.WORD == 0 for offset in offsets)


def test_cursors_and_what_waiters_look_at_share_no_line() -> None:
    lines = [Layout.cursor(i) // at.LINE for i in range(at.CURSORS)]
    lines += [at.WATERMARK_AT // at.LINE, at.DROPPED_AT // at.LINE]
    assert len(set(lines)) == len(lines)
    assert all(offset % at.LINE == 0 for offset in (at.CURSORS_AT, at.WATERMARK_AT, at.DROPPED_AT))
    assert at.WATERMARK_AT // at.LINE == at.BELLS_AT // at.LINE
    assert at.DROPPED_AT // at.LINE == at.DURABLE_AT // at.LINE


def test_cursors_alone_take_one_page() -> None:
    assert Layout(None).size == at.PAGE


@pytest.mark.parametrize("config", [None, OpsLifecycleConfig()])
def test_a_layout_is_rebuilt_from_its_header(config: OpsLifecycleConfig | None) -> None:
    layout = Layout(config)
    again = Layout.from_capacities(layout.capacities())
    assert again.config == config
    assert again.size == layout.size


@UNHURRIED
@given(config=CONFIGS)
def test_parts_follow_each_other(config: OpsLifecycleConfig) -> None:
    layout = Layout(config)
    index, entries, data, size = layout.ring
    participants_end = Layout.participant(config.max_participants)
    parts = [
        (0, at.PARTICIPANTS_AT),
        (at.PARTICIPANTS_AT, participants_end),
        (layout.fingerprints, layout.fingerprint(layout.slots)),
        (layout.slots_at, layout.slot(layout.slots)),
        (index, index + entries * at.INDEX_SIZE),
        (data, data + size),
        (layout.size, layout.size),
    ]
    for (begin, end), (following, _) in pairwise(parts):
        assert begin < end <= following < end + at.PAGE
        assert begin % at.WORD == 0
    assert layout.size % at.PAGE == 0
    assert (size, layout.slots) == (
        config.feed_bytes,
        config.max_operations + config.max_completed,
    )
    assert entries >= max(1024, 4 * config.max_completed, 2 * layout.slots)
    again = Layout.from_capacities(layout.capacities())
    assert (again.config, again.size, again.ring) == (config, layout.size, layout.ring)


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


def test_the_magic_reads_as_a_word() -> None:
    assert at.MAGIC.to_bytes(8, sys.byteorder) == b"shmepoch"
    assert len(get_args(at.Ring)) == 4


def test_lanes_of_watchers_fit_before_the_spec() -> None:
    assert at.SLOT_WATCHERS + 2 * at.MAX_PARTICIPANTS <= at.SLOT_SPEC
    assert at.SLOT_DETAIL + 2 * at.DETAIL_LIMIT == at.SLOT_SIZE
