"""Which epochs pass a filter, and in which order they come."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from shmepoch.epoch.cursors import EpochCursorSnapshot
from shmepoch.epoch.operations import OperationStatus
from shmepoch.ids import RuntimeEpochId, SessionId
from shmepoch.memory.participants import Role
from shmepoch.monitoring.epochs import EpochState, EpochSummary
from shmepoch.monitoring.queries import (
    FIELDS,
    FilterInvalid,
    SortKeyInvalid,
    condition,
    matching,
    order,
)

NOW_MS = 10_000_000

ONE = EpochSummary(
    namespace="one",
    session_id=SessionId.from_bytes(bytes.fromhex("0190b6c8" + "0" * 24)),
    epoch_id=RuntimeEpochId.from_bytes(bytes.fromhex("aa" + "0" * 30)),
    state=EpochState.OPEN,
    created_at_ms=NOW_MS - 3_600_000,
    alive_at_ms=NOW_MS - 90_000,
    bytes=1536,
    participants={Role.RUNTIME: 1, Role.WORKER: 2},
    dead=1,
    operations={OperationStatus.RUNNING: 3},
    ended=7,
    repairs=2,
    watermark=9,
    cursors=EpochCursorSnapshot(2, 9, 4),
)
OTHER = EpochSummary(
    namespace="other",
    session_id=SessionId.from_bytes(bytes.fromhex("0290" + "0" * 28)),
    epoch_id=RuntimeEpochId.from_bytes(bytes.fromhex("bb" + "0" * 30)),
    state=EpochState.ABANDONED,
    created_at_ms=NOW_MS - 60_000,
    alive_at_ms=NOW_MS - 60_000,
    bytes=2**21,
)
DAMAGED = EpochSummary(
    namespace="one",
    session_id=SessionId.from_bytes(bytes.fromhex("0390" + "0" * 28)),
    state=EpochState.DAMAGED,
    problem="magic",
    alive_at_ms=NOW_MS - 600_000,
    bytes=0,
)
ALL = (OTHER, DAMAGED, ONE)


def passing(*filters: str) -> set[str]:
    found = matching(ALL, [condition(text) for text in filters], NOW_MS)
    return {name for name in ("ONE", "OTHER", "DAMAGED") if globals()[name] in found}


@pytest.mark.parametrize(
    ("filters", "names"),
    [
        ([], "ONE OTHER DAMAGED"),
        (["state=open"], "ONE"),
        (["state=damaged"], "DAMAGED"),
        (["namespace=one"], "ONE DAMAGED"),
        (["namespace=on"], ""),
        (["session=0190b6c8-0"], "ONE"),
        (["session=0190B6C80"], "ONE"),
        (["session=0"], "ONE OTHER DAMAGED"),
        (["epoch=a"], "ONE"),
        (["age>60"], "ONE"),
        (["age<1.5m"], "OTHER"),
        (["age=1h"], "ONE"),
        (["age>1d"], ""),
        (["idle>59s"], "OTHER DAMAGED"),
        (["idle<2m"], "ONE OTHER"),
        (["bytes>1K"], "ONE OTHER"),
        (["bytes=1.5K"], "ONE"),
        (["bytes=2M"], "OTHER"),
        (["bytes<1G"], "ONE OTHER DAMAGED"),
        (["worker=2"], "ONE"),
        (["worker=0"], "OTHER"),
        (["runtime<1"], "OTHER"),
        (["dead>0"], "ONE"),
        (["running>2"], "ONE"),
        (["retiring=0"], "ONE OTHER"),
        (["ended=7"], "ONE"),
        (["repairs>1"], "ONE"),
        (["watermark<1"], "OTHER"),
        (["lag=7"], "ONE"),
        (["applied_lag=7"], "ONE"),
        (["observed_lag=0"], "ONE OTHER"),
        (["injected_lag>4"], "ONE"),
        (["bytes>1K", "age<2m"], "OTHER"),
        (["state=open", "age<2m"], ""),
    ],
)
def test_filters(filters: list[str], names: str) -> None:
    assert passing(*filters) == set(names.split())


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is none"),
        ("state", "is none"),
        ("=open", "is none"),
        ("age!=3", "is none"),
        ("colour=red", "names no field"),
        ("state=shut", "open, sealed, abandoned, damaged"),
        ("state>open", "compares text"),
        ("session<0190", "compares text"),
        ("age>", "no number"),
        ("age>-1", "no number"),
        ("age>1w", "one of s, m, h, d"),
        ("age>1K", "no number"),
        ("bytes>1s", "one of K, M, G"),
        ("worker>1K", "no number"),
        ("worker>nan", "no number"),
        ("worker>1e3", "no number"),
        ("worker>\u0661", "no number"),
    ],
)
def test_a_filter_that_is_none_is_refused(text: str, reason: str) -> None:
    with pytest.raises(FilterInvalid, match="FIELD=VALUE") as refused:
        condition(text)
    assert reason in str(refused.value)
    assert repr(text) in str(refused.value)


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("session", [ONE, OTHER, DAMAGED]),
        ("-session", [DAMAGED, OTHER, ONE]),
        ("namespace", [ONE, DAMAGED, OTHER]),
        ("age", [OTHER, ONE, DAMAGED]),
        ("-age", [ONE, OTHER, DAMAGED]),
        ("-idle", [DAMAGED, OTHER, ONE]),
        ("-bytes", [OTHER, ONE, DAMAGED]),
        ("epoch", [ONE, OTHER, DAMAGED]),
        ("-epoch", [OTHER, ONE, DAMAGED]),
        ("observed_lag", [ONE, OTHER, DAMAGED]),
        ("-observed_lag", [ONE, OTHER, DAMAGED]),
    ],
)
def test_orders(key: str, expected: list[EpochSummary]) -> None:
    """Those of which the key is not known come last, and equal ones as their sessions do."""
    assert order(key)(ALL, NOW_MS) == expected


@pytest.mark.parametrize("key", ["", "-", "--age", "problem", "Age"])
def test_a_key_that_is_none_names_those_there_are(key: str) -> None:
    with pytest.raises(SortKeyInvalid) as refused:
        order(key)
    for name in FIELDS:
        assert name in str(refused.value)


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_is_of_every_epoch(name: str) -> None:
    empty = replace(DAMAGED, state=EpochState.OPEN, problem=None)
    for epoch in (*ALL, empty):
        assert isinstance(FIELDS[name].value(epoch, NOW_MS), str | int | None)
    assert len(order(name)([*ALL, empty], NOW_MS)) == 4
