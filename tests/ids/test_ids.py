"""Identifiers: typed, time-ordered, and written in one way only."""

from __future__ import annotations

import copy
import json
import pickle
import time
import uuid
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shmepoch.epoch.codec import decode_json, to_wire, wire_decoder
from shmepoch.errors import RecordInvalid
from shmepoch.ids import (
    OperationId,
    RunId,
    RuntimeEpochId,
    SessionId,
    WaitRequestId,
    dec_hook,
    enc_hook,
)
from tests.epoch.deadline import UNHURRIED

KINDS = [SessionId, RuntimeEpochId, OperationId, RunId, WaitRequestId]
TEXT = "0190b6c8-4f1e-7cc2-9d3a-1f2e3d4c5b6a"

kinds = pytest.mark.parametrize("kind", KINDS)


@kinds
def test_a_new_one_is_a_uuid_v7_of_now(kind: type[SessionId]) -> None:
    before = time.time_ns() // 1_000_000
    made = kind.new()
    after = time.time_ns() // 1_000_000
    assert made.uuid.version == 7
    assert made.uuid.variant == uuid.RFC_4122
    assert before <= int.from_bytes(made.bytes[:6]) <= after


@kinds
def test_later_ones_sort_after_earlier_ones(kind: type[SessionId]) -> None:
    made = [kind.new() for _ in range(1000)]
    assert made == sorted(made)
    assert len(set(made)) == 1000


@kinds
@UNHURRIED
@given(value=st.uuids())
def test_every_way_to_write_one_leads_back(kind: type[SessionId], value: uuid.UUID) -> None:
    made = kind.from_uuid(value)
    assert made.uuid == value
    assert str(made) == str(value)
    assert made == kind.parse(str(value)) == kind.parse(str(value).upper())
    assert made == kind.from_bytes(value.bytes)
    assert made.bytes == value.bytes
    assert hash(made) == hash(kind.from_uuid(value))
    assert pickle.loads(pickle.dumps(made)) == made
    assert copy.deepcopy(made) == copy.copy(made) == made
    assert repr(made) == f"{kind.__name__}('{value}')"


@UNHURRIED
@given(first=st.uuids(), second=st.uuids())
def test_they_are_ordered_as_their_uuids(first: uuid.UUID, second: uuid.UUID) -> None:
    one, two = OperationId.from_uuid(first), OperationId.from_uuid(second)
    assert (one < two) == (first < second)
    assert (one <= two) == (first <= second)
    assert (one > two) == (first > second)
    assert (one >= two) == (first >= second)
    assert (one == two) == (first == second)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        TEXT[:-1],
        TEXT + "0",
        TEXT.replace("-", ""),
        "{" + TEXT + "}",
        "urn:uuid:" + TEXT,
        TEXT.replace("-", "_"),
        TEXT[:7] + "-" + TEXT[7] + TEXT[9:],
        TEXT.replace("0", "g", 1),
        TEXT.replace("0", "\u0660", 1),  # a digit, in Arabic
        " " + TEXT[1:],
        TEXT + "\n",
        TEXT[:-1] + "\n",
    ],
)
def test_any_other_text_is_refused_and_shown(text: str) -> None:
    for kind in KINDS:
        with pytest.raises(ValueError) as refused:
            kind.parse(text)
        assert repr(text) in str(refused.value)
        assert kind.__name__ in str(refused.value)
        assert "hyphenated UUID" in str(refused.value)


@pytest.mark.parametrize("value", [None, 5, b"raw", uuid.UUID(TEXT)], ids=repr)
def test_what_is_no_text_is_refused(value: Any) -> None:
    with pytest.raises(ValueError):
        SessionId.parse(value)


@pytest.mark.parametrize("value", [TEXT, b"0" * 16, None, 5], ids=repr)
def test_what_is_no_uuid_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match=r"takes a uuid\.UUID"):
        SessionId.from_uuid(value)


@pytest.mark.parametrize("raw", [b"", b"x" * 15, b"x" * 17])
def test_other_than_sixteen_bytes_are_refused(raw: bytes) -> None:
    with pytest.raises(ValueError, match=f"16 bytes, not {len(raw)}"):
        SessionId.from_bytes(raw)


def test_kinds_are_told_apart() -> None:
    value = uuid.uuid4()
    made: list[Any] = [kind.from_uuid(value) for kind in KINDS]
    for one in made:
        for two in made:
            assert (one == two) is (one is two)
            assert (one != two) is (one is not two)
            if one is not two:
                for compare in ("__lt__", "__le__", "__gt__", "__ge__"):
                    assert getattr(one, compare)(two) is NotImplemented
                with pytest.raises(TypeError):
                    sorted([one, two])
    assert len(set(made)) == len(KINDS)
    assert made[0] != value
    assert made[0] != str(value)


def test_an_identifier_has_no_room_for_more() -> None:
    with pytest.raises(AttributeError):
        OperationId.new().other = 1  # type: ignore[attr-defined]


class Named(msgspec.Struct):
    id: OperationId


def test_json_has_the_text_and_the_wire_the_bytes() -> None:
    id = OperationId.parse(TEXT)
    assert decode_json(Named, f'{{"id":"{TEXT}"}}') == Named(id)
    data = to_wire(Named(id))
    assert id.bytes in data
    assert wire_decoder(Named).decode(data) == Named(id)


@pytest.mark.parametrize("text", ['{"id":"x"}', '{"id":5}', '{"id":null}', "{}", "[]", "{"])
def test_json_of_something_else_names_the_field(text: str) -> None:
    with pytest.raises(RecordInvalid) as refused:
        decode_json(Named, text)
    assert refused.value.kind == "Named"
    if text not in ("[]", "{"):
        assert "id" in refused.value.reason


@pytest.mark.parametrize("kind", KINDS)
def test_an_identifier_alone_is_its_text_in_json(kind: type[SessionId]) -> None:
    id = kind.parse(TEXT)
    text = f'"{TEXT}"'
    assert msgspec.json.encode(id, enc_hook=enc_hook).decode() == text
    assert json.dumps(id, default=str) == text
    assert msgspec.json.decode(text, type=kind, dec_hook=dec_hook) == id


def test_an_identifier_in_a_record_of_the_user_s_own() -> None:
    named = Named(OperationId.parse(TEXT))
    data = msgspec.json.encode(named, enc_hook=enc_hook)
    assert data.decode() == f'{{"id":"{TEXT}"}}'
    assert msgspec.json.decode(data, type=Named, dec_hook=dec_hook) == named
    for wrong in ('{"id":5}', '{"id":"x"}', '{"id":null}'):
        with pytest.raises(msgspec.ValidationError, match=r"\$\.id"):
            msgspec.json.decode(wrong, type=Named, dec_hook=dec_hook)


def test_the_hooks_know_nothing_else() -> None:
    with pytest.raises(NotImplementedError):
        enc_hook(object())
    with pytest.raises(NotImplementedError):
        dec_hook(dict, "x")
