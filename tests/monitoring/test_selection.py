"""Which epoch is meant by an id, or by how one begins."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from shmepoch.ids import RuntimeEpochId, SessionId
from shmepoch.memory.segment import SharedSegment
from shmepoch.monitoring.selection import EpochAmbiguous, EpochUnknown, select


@contextmanager
def epochs(namespace: str, *ids: tuple[str, str]) -> Iterator[None]:
    """Epochs whose session and epoch have these ids, each continued with zeros."""
    segments = []
    for session, epoch in ids:
        segment = SharedSegment.allocate(
            namespace,
            None,
            session_id=session_id(session),
            epoch_id=RuntimeEpochId.from_bytes(bytes.fromhex(epoch.ljust(32, "0"))),
        )
        segment.publish()
        segments.append(segment)
    try:
        yield
    finally:
        for segment in segments:
            segment.unlink()
            segment.close()


def session_id(beginning: str) -> SessionId:
    return SessionId.from_bytes(bytes.fromhex(beginning.ljust(32, "0")))


@pytest.mark.parametrize(
    "text",
    [
        "0190b6c8-4f1e-0000-0000-000000000000",  # the session's id
        "0190B6C8-4F1E-0000-0000-000000000000",
        "0190b6c84f1e00000000000000000000",
        "0190b6c8-4f1e",
        "0190b6c84f",
        "0190b6c8-4",
        " 0190b6c8-4\n",
        "0190b6c9-aaaa-0000-0000-000000000000",  # its epoch's
        "0190B6C9A",
        "0190b6c9-a",
    ],
)
def test_one_is_meant(namespace: str, text: str) -> None:
    with epochs(namespace, ("0190b6c84f1e", "0190b6c9aaaa"), ("0190b6c85", "0190b6c9bbbb")):
        assert select(text, namespace) == (namespace, session_id("0190b6c84f1e"))


def test_a_session_and_its_own_epoch_that_begin_alike_are_one(namespace: str) -> None:
    with epochs(namespace, ("0190b6c84f1e", "0190b6c84f1f"), ("0290", "0390")):
        assert select("0190b6c8", namespace) == (namespace, session_id("0190b6c84f1e"))


def test_an_ambiguous_beginning_names_the_candidates(namespace: str) -> None:
    with (
        epochs(namespace, ("0190b6", "0390"), ("0290", "0190b7"), ("0490", "0590")),
        pytest.raises(EpochAmbiguous) as refused,
    ):
        select("0190", namespace)
    assert [one.session_id for one in refused.value.candidates] == [
        session_id("0190b6"),
        session_id("0290"),
    ]
    for named in (session_id("0190b6"), session_id("0290"), namespace, "'0190'"):
        assert str(named) in str(refused.value)
    assert str(session_id("0490")) not in str(refused.value)


def test_many_candidates_are_counted(namespace: str) -> None:
    with (
        epochs(namespace, *((f"01{number:02x}", f"02{number:02x}") for number in range(13))),
        pytest.raises(EpochAmbiguous) as refused,
    ):
        select("01", namespace)
    assert len(refused.value.candidates) == 13
    assert str(refused.value).count("session ") == 10
    assert str(refused.value).endswith("and 3 more")


def test_the_same_session_in_two_namespaces(namespace: str) -> None:
    other = f"{namespace}-2"
    with epochs(namespace, ("0190", "0290")), epochs(other, ("0190", "0390")):
        whole = str(session_id("0190"))
        assert select(whole, other) == (other, session_id("0190"))
        with pytest.raises(EpochAmbiguous) as refused:
            select(whole, None)
        assert f"(namespace {other})" in str(refused.value)
        assert select("0390", None) == (other, session_id("0190"))


def test_an_unknown_one_suggests_the_nearest(namespace: str) -> None:
    with (
        epochs(namespace, ("0190b6c84f1e", "0190b6c9aaaa"), ("77777777", "88888888")),
        pytest.raises(EpochUnknown) as refused,
    ):
        select("0190b6c84f1d", namespace)
    assert refused.value.nearest[0] == f"session {session_id('0190b6c84f1e')}"
    assert "77777777" not in str(refused.value)
    assert "shmepoch ls" in str(refused.value)
    assert namespace in str(refused.value)


@pytest.mark.parametrize("text", ["", "-", " ", "zz", "0190\x1b[31m", "0" * 33, "é"])
def test_what_is_no_beginning_of_an_id_is_unknown(namespace: str, text: str) -> None:
    with epochs(namespace, ("0190", "0000")), pytest.raises(EpochUnknown):
        select(text, namespace)


def test_nothing_is_there(namespace: str) -> None:
    with pytest.raises(EpochUnknown) as refused:
        select("01", namespace)
    assert refused.value.nearest == ()


@pytest.mark.parametrize("size", [0, 40, 4096])
def test_a_damaged_segment_is_found_by_its_session(namespace: str, size: int) -> None:
    with epochs(namespace, ("0190", "0290"), ("0191", "0291")):
        path = f"/dev/shm/shmepoch.{namespace}.{'0190'.ljust(32, '0')}"
        with open(path, "r+b") as damaged:
            damaged.truncate(0)
            damaged.truncate(size)
        assert select("0190", namespace) == (namespace, session_id("0190"))


def test_a_segment_with_a_foreign_mode_is_found_by_its_session(namespace: str) -> None:
    with epochs(namespace, ("0190", "0290"), ("0191", "0291")):
        path = f"/dev/shm/shmepoch.{namespace}.{'0190'.ljust(32, '0')}"
        os.chmod(path, 0o644)
        try:
            assert select("0190", namespace) == (namespace, session_id("0190"))
            with pytest.raises(EpochUnknown):
                select("0290", namespace)
        finally:
            os.chmod(path, 0o600)


def test_one_that_vanishes_meanwhile_is_no_candidate(
    namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = [(namespace, session_id("0190"))]
    monkeypatch.setattr("shmepoch.monitoring.selection.list_segments", lambda _: listed)
    with pytest.raises(EpochUnknown):
        select("0190", namespace)
