"""Registration: each operation once, while there is room, and only valid records that fit."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest

from shmepoch import _native as at
from shmepoch.config import PEER_HANDLE_LIMIT, OpsLifecycleConfig
from shmepoch.epoch.codec import to_wire
from shmepoch.epoch.cursors import EpochCursorSnapshot, EpochCursorState
from shmepoch.epoch.operations import (
    Completed,
    OperationKind,
    OperationPeerHandle,
    OperationProgressUpdate,
    OperationResult,
    OperationSpec,
    OperationStatus,
    Terminated,
    TrustedPeerSpec,
)
from shmepoch.epoch.persisted import PersistedOpsSnapshot
from shmepoch.epoch.registry import RuntimeOpsLifecycleRegistry
from shmepoch.errors import (
    AlreadyRegistered,
    BindingsMismatch,
    ConfigInvalid,
    CursorsOnly,
    MaxConcurrentExceeded,
    PayloadTooLarge,
    RecordInvalid,
)
from shmepoch.ids import OperationId, RuntimeEpochId, SessionId
from shmepoch.memory.segment import Segment
from tests.epoch.conftest import MakeEpoch
from tests.epoch.implementations import Epoch
from tests.epoch.operations import CHILD, PEER, Registry, reach, result, size_of, spec, state, taken

#: The smallest feed that an epoch with two live operations may have.
SMALL_FEED = at.PAGE + 2 * 2 * at.SPEC_LIMIT


@pytest.mark.parametrize(
    "status", [OperationStatus.PROVISIONING, OperationStatus.RUNNING, OperationStatus.COMPLETED]
)
def test_an_operation_is_registered_once(registry: Registry, status: OperationStatus) -> None:
    id = reach(registry, status)
    before = state(registry)
    with pytest.raises(AlreadyRegistered) as refused:
        registry.register_operation(spec(id=id))
    assert refused.value.id == id
    assert "a retry under a new id" in str(refused.value)
    assert state(registry) == before


def test_what_was_collected_may_come_again(registry: Registry) -> None:
    id = reach(registry, OperationStatus.COMPLETED)
    registry.collect_completed()
    registry.register_operation(spec("again", id=id))
    assert taken(registry, id).status is OperationStatus.PROVISIONING
    registry.cancel_operation(id)
    assert registry.completion_feed().watermark() == 2


@pytest.mark.parametrize("setting", ["max_concurrent", "max_operations"])
def test_there_is_room_for_so_many_at_once(make_epoch: MakeEpoch, setting: str) -> None:
    sizes = {"max_operations": 3} if setting == "max_operations" else {"max_concurrent": 3}
    registry = make_epoch(**sizes).registry
    ids = [
        reach(registry, status)
        for status in (
            OperationStatus.PROVISIONING,
            OperationStatus.RUNNING,
            OperationStatus.RETIRING,
        )
    ]
    for _ in range(2):
        before = state(registry)
        with pytest.raises(MaxConcurrentExceeded) as refused:
            registry.register_operation(spec())
        assert (refused.value.limit, refused.value.active) == (3, 3)
        assert f"a larger {setting}" in str(refused.value)
        assert state(registry) == before
        registry.cancel_operation(ids.pop())
        ids.append(reach(registry, OperationStatus.PROVISIONING))


def test_the_whole_table_is_of_use_however_often_it_turns_over(make_epoch: MakeEpoch) -> None:
    registry = make_epoch(max_operations=3, max_completed=2).registry
    for _ in range(10):
        ids = [reach(registry, OperationStatus.RUNNING) for _ in range(3)]
        for id in ids:
            registry.complete_operation(id, result(id))
        assert [found.id for found in registry.list_operations()] == ids[1:]
        registry.check()


def test_ids_that_share_their_fingerprint_are_told_apart(registry: Registry) -> None:
    ids = [OperationId.from_bytes(bytes([i]) * 8 + b"\x80same id") for i in range(1, 5)]
    ids.append(OperationId.from_bytes(b"not none" + bytes(8)))  # a fingerprint of zero
    for id in ids:
        assert registry.snapshot(id) is None
        registry.register_operation(spec(str(id), id=id))
    assert {id: taken(registry, id).display_name for id in ids} == {id: str(id) for id in ids}
    for id in ids[::2]:
        registry.cancel_operation(id)
    statuses = [taken(registry, id).status.is_terminal for id in ids]
    assert statuses == [True, False, True, False, True]


def named(length: int) -> OperationSpec:
    return spec("n" * length)


def test_a_spec_may_fill_its_room_exactly(registry: Registry) -> None:
    stored = msgspec.structs.replace(named(300), owner_session_id=SessionId.new())
    fits = at.SPEC_LIMIT - (len(to_wire(stored)) - 300)
    registry.register_operation(named(fits))
    assert [found.display_name for found in registry.list_operations()] == ["n" * fits]
    before = state(registry)
    with pytest.raises(PayloadTooLarge) as refused:
        registry.register_operation(named(fits + 1))
    assert (refused.value.size, refused.value.limit) == (at.SPEC_LIMIT + 1, at.SPEC_LIMIT)
    assert "display_name" in str(refused.value)
    assert state(registry) == before


def test_the_limit_is_of_bytes_not_characters(registry: Registry) -> None:
    with pytest.raises(PayloadTooLarge):
        registry.register_operation(spec("€" * 200))


def longest_peer() -> OperationPeerHandle:
    rest = len(to_wire(OperationPeerHandle("p" * 300, PEER.trusted_peer))) - 300
    return OperationPeerHandle("p" * (PEER_HANDLE_LIMIT - rest), PEER.trusted_peer)


def test_a_peer_handle_has_a_limit_of_its_own(registry: Registry) -> None:
    id = reach(registry, OperationStatus.RUNNING)
    before = state(registry)
    longest = longest_peer()
    with pytest.raises(PayloadTooLarge) as refused:
        registry.peer_ready(id, OperationPeerHandle(longest.peer_name + "p", PEER.trusted_peer))
    assert (refused.value.size, refused.value.limit) == (401, 400)
    assert "peer handle" in str(refused.value)
    assert state(registry) == before
    registry.peer_ready(id, longest)
    assert taken(registry, id).peer_handle == longest


@pytest.mark.parametrize("letter", ["m", "€", "😀"])
@pytest.mark.parametrize("length", [1, 110, 300, 470, 300_000])
@pytest.mark.parametrize("first", ["progress", "peer"])
def test_a_progress_message_is_cut_to_what_the_peer_handle_leaves(
    make_epoch: MakeEpoch, first: str, length: int, letter: str
) -> None:
    """In either order, and any number of times."""
    registry = make_epoch().registry
    id, peer = reach(registry, OperationStatus.RUNNING), longest_peer()
    update = OperationProgressUpdate(letter * length, 12.5)
    if first == "peer":
        registry.peer_ready(id, peer)
    for turn in range(1, 4):
        registry.report_progress(id, update)
        found = taken(registry, id)
        assert found.progress_count == turn
        least = 60 if first == "peer" else 440
        require_cut(found.last_progress, update, least)
    if first == "progress":
        registry.peer_ready(id, peer)
    found = taken(registry, id)
    assert found.peer_handle == peer
    require_cut(found.last_progress, update, 60)
    registry.report_progress(id, OperationProgressUpdate("short"))
    assert taken(registry, id).last_progress == OperationProgressUpdate("short")


def require_cut(
    found: OperationProgressUpdate | None, asked: OperationProgressUpdate, least: int
) -> None:
    """Fail unless it is the whole message, or at least `least` bytes of it and a mark."""
    assert found is not None
    assert found.percent == asked.percent
    if found.message != asked.message:
        assert found.message.endswith("…")
        assert asked.message.startswith(found.message[:-1].rstrip("…"))
        assert len(found.message.encode()) >= least
    else:
        assert len(asked.message.encode()) <= at.DETAIL_LIMIT


def test_a_detail_that_a_store_kept_is_cut_as_well(registry: Registry) -> None:
    id = reach(registry, OperationStatus.RUNNING)
    registry.peer_ready(id, longest_peer())
    captured = registry.capture_persistence_snapshot(RuntimeEpochId.new(), EpochCursorState())
    operations = [
        msgspec.structs.replace(found, last_progress=OperationProgressUpdate("m" * 450))
        for found in captured.operations
    ]
    recovered = RuntimeOpsLifecycleRegistry()
    recovered.restore(
        msgspec.structs.replace(captured, operations=tuple(operations)), unfinished=True
    )
    progress = taken(recovered, id).last_progress
    assert progress is not None
    assert progress.message.endswith("…")


# --- the owner of an operation --------------------------------------------------------------------


def test_an_operation_is_owned_by_the_session_that_it_is_registered_with(epoch: Epoch) -> None:
    session_id = epoch.segment.session_id
    epoch.registry.register_operation(spec())
    epoch.registry.register_operations([spec(), spec()])
    epoch.registry.register_operation(msgspec.structs.replace(spec(), owner_session_id=session_id))
    captured = epoch.registry.capture_persistence_snapshot(epoch.segment.epoch_id, epoch.cursors)
    assert [made.owner_session_id for made in captured.specs] == [session_id] * 4
    assert PersistedOpsSnapshot.from_json(captured.to_json()) == captured


def test_an_operation_of_another_session_is_refused(epoch: Epoch) -> None:
    registry, other = epoch.registry, SessionId.new()
    foreign = msgspec.structs.replace(spec(), owner_session_id=other)
    before = state(registry)
    ways: list[Callable[[], None]] = [
        lambda: registry.register_operation(foreign),
        lambda: registry.register_operations([spec(), foreign]),
    ]
    for register in ways:
        with pytest.raises(BindingsMismatch) as refused:
            register()
        error = refused.value
        assert (error.expected, error.actual) == (other, epoch.segment.session_id)
        assert error.registering == foreign.id
        assert str(other) in str(error)
        assert str(epoch.segment.session_id) in str(error)
        assert pickle.loads(pickle.dumps(error)).registering == foreign.id
    assert state(registry) == before


def test_a_registry_of_no_session_takes_those_of_any() -> None:
    for registry in (
        RuntimeOpsLifecycleRegistry(),
        RuntimeOpsLifecycleRegistry.with_config(OpsLifecycleConfig()),
        RuntimeOpsLifecycleRegistry.from_recovered(
            PersistedOpsSnapshot(epoch_id=RuntimeEpochId.new())
        ),
    ):
        owners = [SessionId.new(), SessionId.new()]
        for owner in owners:
            registry.register_operation(msgspec.structs.replace(spec(), owner_session_id=owner))
        captured = registry.capture_persistence_snapshot(RuntimeEpochId.new(), EpochCursorState())
        assert [made.owner_session_id for made in captured.specs] == owners


# --- numbers of other types -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", [np.int64, np.uint64, np.int32, np.uint8, np.int16])
def test_numpy_s_integers_are_numbers(make_epoch: MakeEpoch, kind: Callable[[int], Any]) -> None:
    registry = make_epoch(max_completed=kind(7), max_participants=kind(5)).registry
    config = registry._config
    assert [type(config.max_completed), type(config.max_participants)] == [int, int]
    id = reach(registry, OperationStatus.RUNNING)
    registry.report_progress(id, OperationProgressUpdate("half", kind(50)))
    registry.complete_operation(
        id, OperationResult(id=id, content="", duration_ms=kind(3), tokens_used=kind(4))
    )
    [entry] = registry.completion_feed().list_since(kind(0)).entries
    assert isinstance(entry.terminal_outcome, Completed)
    assert entry.terminal_outcome.result.duration_ms == 3
    assert type(entry.terminal_outcome.result.tokens_used) is int
    assert registry.completion_feed().wait_for_advance(kind(0), 0) == 1
    cursors = EpochCursorState.from_recovered(kind(1), kind(1), kind(0))
    captured = registry.capture_persistence_snapshot(
        RuntimeEpochId.new(), cursors, after_seq=kind(0)
    )
    given = EpochCursorSnapshot(kind(1), kind(1), kind(0))
    assert given == captured.cursors
    assert EpochCursorSnapshot.from_json(given.to_json()) == given


def test_the_last_position_of_numpy_is_one() -> None:
    feed = RuntimeOpsLifecycleRegistry().completion_feed()
    last: Any = np.uint64(2**64 - 1)
    assert feed.list_since(last).entries == ()
    assert feed.list_since(last).gap_after(last) is None


@pytest.mark.parametrize("value", [True, 1.0, np.float64(2), "3", None, np.bool_(True)])
def test_a_setting_that_is_no_integer(value: Any) -> None:
    for setting in ("max_completed", "max_operations", "max_participants", "feed_bytes"):
        with pytest.raises(ConfigInvalid, match=setting):
            OpsLifecycleConfig(**{setting: value})


def test_a_feed_can_be_filled_by_one_entry_exactly(make_epoch: MakeEpoch) -> None:
    registry = make_epoch(max_operations=2, feed_bytes=SMALL_FEED).registry
    feed = registry.completion_feed()
    first, second = (reach(registry, OperationStatus.RUNNING) for _ in range(2))
    registry.complete_operation(first, result(first, "c" * 1000))
    record = registry._table.record(1)
    assert record is not None
    others = size_of(registry, 1) - -(-len(record.head + record.outcome) // at.WORD) * at.WORD
    fits = SMALL_FEED - others - (len(record.head + record.outcome) - 1000)
    before = state(registry)
    with pytest.raises(PayloadTooLarge) as refused:
        registry.complete_operation(second, result(second, "c" * (fits + 1)))
    error = refused.value
    assert (error.size, error.limit) == (SMALL_FEED + at.WORD, SMALL_FEED)
    assert "a larger feed_bytes" in str(error)
    assert state(registry) == before
    registry.complete_operation(second, result(second, "c" * fits))
    batch = feed.list_since(0)
    assert [entry.seq for entry in batch.entries] == [2]
    assert batch.dropped_through == 1
    assert registry.snapshot(first) is None  # its outcome went with its entry


def test_operations_that_end_together_fit_together_or_not_at_all(make_epoch: MakeEpoch) -> None:
    registry = make_epoch(max_operations=2, feed_bytes=SMALL_FEED).registry
    ids = [reach(registry, OperationStatus.RUNNING) for _ in range(2)]
    before = state(registry)
    with pytest.raises(PayloadTooLarge):
        registry.complete_operations([result(id, "c" * (SMALL_FEED // 2)) for id in ids])
    assert state(registry) == before
    registry.complete_operations([result(id, "c" * (SMALL_FEED // 2 - 400)) for id in ids])
    assert len(registry.completion_feed().list_since(0).entries) == 2


def _where(registry: RuntimeOpsLifecycleRegistry, reason: str) -> None:
    registry.terminate_where(lambda _: True, reason)


def _size_as_registered(spec: OperationSpec) -> int:
    return len(to_wire(msgspec.structs.replace(spec, owner_session_id=SessionId.new())))


def _longest_spec() -> OperationSpec:
    short = spec("x" * 40)
    longest = spec("x" * (40 + at.SPEC_LIMIT - _size_as_registered(short) - 1))
    assert _size_as_registered(longest) == at.SPEC_LIMIT
    return longest


#: The least room that a configuration may give a table of 50 operations.
FULL = {"max_operations": 50, "feed_bytes": at.PAGE + 100 * at.SPEC_LIMIT}
LONGEST = {
    "no reason to speak of": "owner ended",
    "a reason longer than the feed": "r" * 2**20,
    "a reason in characters of four bytes": "\U0001f6d1" * 2**17,
}


@pytest.mark.parametrize("reason", LONGEST.values(), ids=LONGEST)
@pytest.mark.parametrize(
    "end",
    [
        RuntimeOpsLifecycleRegistry.terminate_owner,
        RuntimeOpsLifecycleRegistry.terminate_and_seal,
        _where,
    ],
)
def test_a_full_table_of_the_longest_names_can_end_in_one_commit(
    make_epoch: MakeEpoch, end: Callable[[RuntimeOpsLifecycleRegistry, str], object], reason: str
) -> None:
    registry = make_epoch(**FULL).registry
    for _ in range(50):
        registry.register_operation(_longest_spec())
    end(registry, reason)
    entries = registry.completion_feed().list_since(0).entries
    assert len(entries) == 50
    for entry in entries:
        assert isinstance(entry.terminal_outcome, Terminated)
        kept, cut = entry.terminal_outcome.reason.removesuffix("…"), len(reason) > 50
        assert reason.startswith(kept)
        assert entry.terminal_outcome.reason.endswith("…") is cut
        assert len(kept) >= 11 if not cut else len(kept.encode()) > 400


def test_a_reason_is_whole_where_there_is_room(make_epoch: MakeEpoch) -> None:
    registry = make_epoch(**FULL).registry
    registry.register_operation(named(350))
    registry.terminate_owner("r" * 40_000)
    (entry,) = registry.completion_feed().list_since(0).entries
    assert entry.terminal_outcome == Terminated("r" * 40_000)


SURROGATE = "\ud800"


def broken_spec(**fields: Any) -> OperationSpec:
    return msgspec.structs.replace(spec(), **fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"display_name": SURROGATE},
        {"source_label": SURROGATE},
        {"display_name": 5},
        {"display_name": None},
        {"display_name": b"bytes"},
        {"kind": "no_such_kind"},
        {"kind": None},
        {"owner_session_id": 7},
        {"owner_session_id": "no-uuid"},
        {"owner_session_id": "0190b6c8-4f1e-7cc2-9d3a-1f2e3d4c5b6a"},
        {"id": "0190b6c8-4f1e-7cc2-9d3a-1f2e3d4c5b6a"},
        {"id": SessionId.parse("0190b6c8-4f1e-7cc2-9d3a-1f2e3d4c5b6a")},
        {"owner_session_id": b"short"},
        {"child_session_id": 1.5},
        {"expect_peer_channel": 1},
        {"display_name": {"a": "b"}},
        {"display_name": 2**70},
    ],
    ids=str,
)
def test_a_spec_that_could_not_be_read_back_is_refused(
    registry: Registry, fields: dict[str, Any]
) -> None:
    before = state(registry)
    with pytest.raises(RecordInvalid) as refused:
        registry.register_operation(broken_spec(**fields))
    assert refused.value.kind == "OperationSpec"
    assert refused.value.reason
    assert state(registry) == before


def a_result(id: OperationId, **fields: Any) -> OperationResult:
    return msgspec.structs.replace(result(id), **fields)


BROKEN: dict[str, Callable[[Registry, OperationId], None]] = {
    "a result of another operation": lambda r, op: r.complete_operation(
        op, result(OperationId.new())
    ),
    "a result that is text": lambda r, op: r.complete_operation(op, "done"),  # type: ignore[arg-type]
    "a content that is no text": lambda r, op: r.complete_operation(
        op, a_result(op, content=b"raw")
    ),
    "a lone surrogate in a content": lambda r, op: r.complete_operation(
        op, a_result(op, content=SURROGATE)
    ),
    "a negative duration": lambda r, op: r.complete_operation(op, a_result(op, duration_ms=-1)),
    "a duration beyond a word": lambda r, op: r.complete_operation(
        op, a_result(op, duration_ms=2**64)
    ),
    "a duration beyond a signed word": lambda r, op: r.complete_operation(
        op, a_result(op, duration_ms=2**63)
    ),
    "tokens that are no number": lambda r, op: r.complete_operation(
        op, a_result(op, tokens_used="12")
    ),
    "an error that is no text": lambda r, op: r.fail_operation(op, 5),  # type: ignore[arg-type]
    "a lone surrogate in an error": lambda r, op: r.fail_operation(op, SURROGATE),
    "an exception for an error": lambda r, op: r.fail_operation(
        op,
        ValueError("no"),  # type: ignore[arg-type]
    ),
    "a reason that is no text": lambda r, op: r.cancel_operation(op, 5),  # type: ignore[arg-type]
    "no reason": lambda r, op: r.terminate_owner(None),  # type: ignore[arg-type]
    "a lone surrogate in a reason": lambda r, op: r.terminate_owner(SURROGATE),
    "progress that is text": lambda r, op: r.report_progress(op, "half"),  # type: ignore[arg-type]
    "progress above all": lambda r, op: r.report_progress(
        op, OperationProgressUpdate("more", 100.1)
    ),
    "progress below nothing": lambda r, op: r.report_progress(
        op, OperationProgressUpdate("less", -0.1)
    ),
    "a lone surrogate in progress": lambda r, op: r.report_progress(
        op, OperationProgressUpdate(SURROGATE)
    ),
    "a peer that is text": lambda r, op: r.peer_ready(op, "peer"),  # type: ignore[arg-type]
    "a peer without an address": lambda r, op: r.peer_ready(
        op,
        OperationPeerHandle("peer", TrustedPeerSpec("p", "p", None)),  # type: ignore[arg-type]
    ),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_record_that_could_not_be_read_back_is_refused(registry: Registry, broken: str) -> None:
    id = OperationId.new()
    registry.register_operation(spec(kind=CHILD, id=id))
    registry.provisioning_succeeded(id)
    before = state(registry)
    with pytest.raises(RecordInvalid):
        BROKEN[broken](registry, id)
    assert state(registry) == before
    registry.mark_retired(id)


def test_any_text_survives(registry: Registry) -> None:
    text = "\x00 'quoted' \\ \"\n 日本語 \u200f עברית 😀 \U0010ffff"
    id = OperationId.new()
    registry.register_operation(spec(text, id=id))
    registry.provisioning_succeeded(id)
    registry.report_progress(id, OperationProgressUpdate(text, 0.1))
    registry.complete_operation(id, result(id, text))
    after = taken(registry, id)
    assert (after.display_name, after.last_progress) == (text, OperationProgressUpdate(text, 0.1))
    assert registry.completion_feed().list_since(0).entries[0].display_name == text
    assert registry.collect_completed()[0][1] == after.terminal_outcome


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("max_completed", 0),
        ("max_completed", -1),
        ("max_completed", 2**20 + 1),
        ("max_completed", 1.0),
        ("max_completed", True),
        ("max_operations", 0),
        ("max_operations", None),
        ("max_concurrent", 0),
        ("max_concurrent", 129),
        ("max_concurrent", "3"),
        ("feed_bytes", at.PAGE + 128 * 2 * at.SPEC_LIMIT - 8),
        ("feed_bytes", 512 * 1024 + 4),
        ("feed_bytes", 2**31 + 8),
        ("max_participants", 0),
        ("max_participants", at.MAX_PARTICIPANTS + 1),
    ],
)
def test_a_setting_outside_its_range(setting: str, value: object) -> None:
    sizes: dict[str, Any] = {setting: value}
    with pytest.raises(ConfigInvalid) as refused:
        OpsLifecycleConfig(**sizes)
    assert (refused.value.setting, refused.value.value) == (setting, value)
    assert setting in str(refused.value)
    assert refused.value.allowed in str(refused.value)


def test_memory_for_cursors_has_no_registry() -> None:
    with pytest.raises(CursorsOnly):
        RuntimeOpsLifecycleRegistry(Segment.private(None))


def test_a_registry_that_stands_alone() -> None:
    registry = RuntimeOpsLifecycleRegistry()
    registry.register_operation(spec())
    assert registry.active_count() == 1
    assert RuntimeOpsLifecycleRegistry().list_operations() == []
    sized = RuntimeOpsLifecycleRegistry.with_config(OpsLifecycleConfig(max_concurrent=1))
    sized.register_operation(spec())
    with pytest.raises(MaxConcurrentExceeded):
        sized.register_operation(spec())


def test_a_kind_may_be_given_by_its_name(registry: Registry) -> None:
    plain: Any = "background_tool_op"
    given = OperationSpec(
        id=OperationId.new(),
        kind=plain,
        display_name="named",
        source_label="test",
    )
    registry.register_operation(given)
    assert taken(registry, given.id).kind is OperationKind.BACKGROUND_TOOL_OP
