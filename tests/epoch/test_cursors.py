"""Cursors: positions that only grow, shared by all processes that have the epoch attached."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from shmepoch.epoch.cursors import CursorCell, CursorState, EpochCursorSnapshot, EpochCursorState
from shmepoch.errors import ArgumentInvalid, EpochSealed
from shmepoch.memory.segment import SharedSegment
from tests.epoch.implementations import Epoch, shared

NAMES = ["agent_applied_cursor", "runtime_observed_seq", "runtime_last_injected_seq"]
TOP = 2**64 - 1


@pytest.fixture(params=NAMES)
def cell(request: pytest.FixtureRequest, cursors: EpochCursorState) -> CursorCell:
    found: CursorCell = getattr(cursors, request.param)
    return found


def test_cursors_keep_the_protocol(cursors: EpochCursorState) -> None:
    assert isinstance(cursors, CursorState)


def test_fresh_cursors_are_zero(cursors: EpochCursorState) -> None:
    assert cursors.snapshot() == EpochCursorSnapshot()
    assert [getattr(cursors, name).load() for name in NAMES] == [0, 0, 0]
    assert EpochCursorState.new().snapshot() == EpochCursorSnapshot()


def test_a_cursor_becomes_the_larger(cell: CursorCell) -> None:
    moves = [(0, False), (5, True), (5, False), (3, False), (0, False), (6, True), (2**63, True)]
    position = 0
    for value, moved in moves:
        assert cell.advance(value) is moved
        position = max(position, value)
        assert cell.load() == position


@pytest.mark.parametrize("value", [0, 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, TOP - 1, TOP])
def test_every_value_of_a_word(cell: CursorCell, value: int) -> None:
    cell.advance(value)
    assert cell.load() == value
    assert cell.compare_and_swap(value, value)
    assert cell.compare_and_swap(value, TOP)
    assert cell.load() == TOP
    assert not cell.advance(TOP)


def test_fresh_cursors_need_no_segment() -> None:
    fresh = EpochCursorState()
    assert fresh.snapshot() == EpochCursorSnapshot()
    assert fresh.agent_applied_cursor.advance(3)
    assert EpochCursorState().agent_applied_cursor.load() == 0


@pytest.mark.parametrize("name", [*NAMES, "snapshot", "values", "other"])
def test_a_cursor_is_advanced_and_not_assigned(cursors: EpochCursorState, name: str) -> None:
    """Other processes would not see an assigned value."""
    with pytest.raises(AttributeError, match=rf"{name}.*advance\(position\)"):
        setattr(cursors, name, 5)
    assert cursors.snapshot() == EpochCursorSnapshot()
    assert cursors.values.tolist() == [0, 0, 0]


def test_each_cursor_is_its_own(cursors: EpochCursorState) -> None:
    for position, name in enumerate(NAMES, 1):
        getattr(cursors, name).advance(position)
    assert cursors.snapshot() == EpochCursorSnapshot(
        agent_applied_cursor=1, runtime_observed_seq=2, runtime_last_injected_seq=3
    )
    assert repr(cursors) == (
        "EpochCursorState(agent_applied_cursor=1, runtime_observed_seq=2, "
        "runtime_last_injected_seq=3)"
    )


def test_compare_and_swap(cell: CursorCell) -> None:
    assert not cell.compare_and_swap(1, 2)
    assert cell.load() == 0
    assert cell.compare_and_swap(0, 7)
    assert not cell.compare_and_swap(0, 9)
    assert cell.compare_and_swap(7, 7)
    assert cell.load() == 7


@pytest.mark.parametrize(("expected", "new"), [(7, 6), (7, 0), (TOP, TOP - 1), (9, 8)])
def test_a_swap_cannot_move_back(cell: CursorCell, expected: int, new: int) -> None:
    cell.advance(7)
    with pytest.raises(ValueError, match=f"back from {expected} to {new}"):
        cell.compare_and_swap(expected, new)
    assert cell.load() == 7


@pytest.mark.parametrize("value", [-1, -(2**63), 2**64, 2**100, -(2**100)])
def test_a_value_outside_a_word(cell: CursorCell, value: int) -> None:
    with pytest.raises(OverflowError):
        cell.advance(value)
    with pytest.raises(OverflowError):
        cell.compare_and_swap(0, value)
    with pytest.raises(OverflowError):
        cell.compare_and_swap(value, 1)
    assert cell.load() == 0


@pytest.mark.parametrize("value", [1.0, "1", None, b"1", 1j, [1], np.float64(1)], ids=repr)
def test_a_value_that_is_no_integer(cell: CursorCell, value: Any) -> None:
    with pytest.raises(TypeError):
        cell.advance(value)
    with pytest.raises(TypeError):
        cell.compare_and_swap(value, 1)
    with pytest.raises(TypeError):
        cell.compare_and_swap(0, value)
    assert cell.load() == 0


@pytest.mark.parametrize("kind", [np.uint64, np.int64, np.uint8, np.int32, bool])
def test_whatever_is_an_integer(cell: CursorCell, kind: Any) -> None:
    assert cell.advance(kind(1))
    assert cell.compare_and_swap(kind(1), kind(1))
    assert cell.load() == 1
    assert type(cell.load()) is int


def test_the_whole_range_of_numpy(cell: CursorCell) -> None:
    assert cell.advance(np.uint64(TOP).item())
    assert not cell.advance(int(np.uint64(TOP)))
    assert cell.compare_and_swap(np.iinfo(np.uint64).max, TOP)
    with pytest.raises(OverflowError):
        cell.advance(np.int64(-1))  # type: ignore[arg-type]


def test_arguments_that_are_missing_or_too_many(cell: Any) -> None:
    for call in (
        cell.advance,
        lambda: cell.advance(1, 2),
        lambda: cell.compare_and_swap(1),
        lambda: cell.compare_and_swap(1, 2, 3),
        lambda: cell.load(1),
    ):
        with pytest.raises(TypeError):
            call()


def test_recovered_positions() -> None:
    cursors = EpochCursorState.from_recovered(5, 0, TOP)
    assert cursors.snapshot() == EpochCursorSnapshot(
        agent_applied_cursor=5, runtime_observed_seq=0, runtime_last_injected_seq=TOP
    )
    assert EpochCursorState.from_recovered(0, 0, 0).snapshot() == EpochCursorSnapshot()


@pytest.mark.parametrize(
    ("position", "error"), [(-1, OverflowError), (2**64, OverflowError), ("1", TypeError)]
)
def test_positions_that_cannot_have_been_stored(position: Any, error: type[Exception]) -> None:
    for at in range(3):
        with pytest.raises(error):
            EpochCursorState.from_recovered(*[position if at == i else 0 for i in range(3)])


def test_a_snapshot_is_json() -> None:
    snapshot = EpochCursorState.from_recovered(0, TOP, 3).snapshot()
    assert EpochCursorSnapshot.from_json(snapshot.to_json()) == snapshot
    assert snapshot.to_json() == (
        b'{"agent_applied_cursor":0,"runtime_observed_seq":18446744073709551615,'
        b'"runtime_last_injected_seq":3}'
    )


def test_a_view_for_monitors(cursors: EpochCursorState) -> None:
    values = cursors.values
    assert (values.dtype, values.shape) == (np.dtype(np.uint64), (3,))
    for position, name in enumerate(NAMES, 1):
        getattr(cursors, name).advance(TOP - position)
    assert values.tolist() == [TOP - 1, TOP - 2, TOP - 3]
    assert cursors.values is values


def test_nothing_is_stored_through_the_view(cursors: EpochCursorState) -> None:
    with pytest.raises(ValueError, match="read-only"):
        cursors.values[0] = 1
    with pytest.raises(ValueError, match=r"WRITEABLE|cannot set"):
        cursors.values.flags.writeable = True
    assert cursors.snapshot() == EpochCursorSnapshot()


def test_a_view_outlives_its_cursors() -> None:
    values = EpochCursorState.from_recovered(1, 2, 3).values
    assert values.tolist() == [1, 2, 3]


def test_the_cursors_of_many_epochs_are_one_array(cursors: EpochCursorState) -> None:
    others = [EpochCursorState.from_recovered(n, 10 * n, TOP - n) for n in range(1, 4)]
    cursors.runtime_observed_seq.advance(TOP)
    stacked = EpochCursorState.stacked(iter([*others, cursors]))
    assert stacked.dtype == np.dtype(np.uint64)
    assert stacked.tolist() == [
        [1, 10, TOP - 1],
        [2, 20, TOP - 2],
        [3, 30, TOP - 3],
        [0, TOP, 0],
    ]
    assert EpochCursorState.stacked([]).shape == (0, 3)
    for wrong in (cursors, [cursors, EpochCursorSnapshot()], "cursors"):
        with pytest.raises(ArgumentInvalid, match="stacked"):
            EpochCursorState.stacked(wrong)  # type: ignore[arg-type]


def test_cursors_of_a_sealed_epoch_stand(epoch: Epoch) -> None:
    epoch.cursors.agent_applied_cursor.advance(3)
    epoch.seal()
    for name in NAMES:
        cell: CursorCell = getattr(epoch.cursors, name)
        for value in (0, 9):
            with pytest.raises(EpochSealed) as ended:
                cell.advance(value)
            assert ended.value.epoch_id == epoch.segment.epoch_id
        with pytest.raises(EpochSealed):
            cell.compare_and_swap(0, 9)
    assert epoch.cursors.agent_applied_cursor.load() == 3
    assert epoch.cursors.snapshot() == EpochCursorSnapshot(agent_applied_cursor=3)
    assert epoch.cursors.values.tolist() == [3, 0, 0]
    with pytest.raises(ValueError, match="back from"):
        epoch.cursors.agent_applied_cursor.compare_and_swap(3, 2)


def test_a_cell_outlives_its_epoch(namespace: str) -> None:
    with shared(namespace, None) as epoch:
        cell = epoch.cursors.agent_applied_cursor
        cell.advance(4)
    del epoch
    assert cell.load() == 4


def test_two_attachments_see_one_cursor(namespace: str) -> None:
    with shared(namespace, None) as epoch:
        other = SharedSegment.attach(namespace, epoch.segment.session_id)
        theirs = EpochCursorState(other)
        assert epoch.cursors.runtime_observed_seq.advance(2)
        assert not theirs.runtime_observed_seq.advance(2)
        assert theirs.runtime_observed_seq.compare_and_swap(2, 3)
        assert epoch.cursors.snapshot() == theirs.snapshot()
        epoch.seal()
        with pytest.raises(EpochSealed):
            theirs.runtime_observed_seq.advance(4)
        other.close()


def test_advances_of_many_threads_end_at_the_largest(cell: CursorCell) -> None:
    def advance(start: int) -> int:
        last, moved = 0, 0
        for value in range(start, 8000, 8):
            moved += cell.advance(value)
            now = cell.load()
            assert now >= max(last, value)
            last = now
        return moved

    with ThreadPoolExecutor(8) as pool:
        moved = sum(pool.map(advance, range(8)))
    assert cell.load() == 7999
    assert 1 <= moved <= 7999


def test_of_racing_swaps_one_wins(cell: CursorCell) -> None:
    racers, rounds = 4, 200
    line = threading.Barrier(racers, timeout=60)

    def race(_: int) -> list[bool]:
        won = []
        for value in range(rounds):
            line.wait()
            won.append(cell.compare_and_swap(value, value + 1))
        return won

    with ThreadPoolExecutor(racers) as pool:
        results = list(pool.map(race, range(racers)))
    assert [sum(won) for won in zip(*results, strict=True)] == [1] * rounds
    assert cell.load() == rounds


def test_a_snapshot_is_of_one_instant(cursors: EpochCursorState) -> None:
    """A writer keeps injected <= observed <= applied, and no snapshot shows another order."""
    done = threading.Event()

    def write() -> None:
        for value in range(1, 20_000):
            cursors.agent_applied_cursor.advance(value)
            cursors.runtime_observed_seq.advance(value)
            cursors.runtime_last_injected_seq.advance(value)
        done.set()

    with ThreadPoolExecutor(1) as pool:
        writer = pool.submit(write)
        while not done.is_set():
            now = cursors.snapshot()
            assert (
                now.agent_applied_cursor
                >= now.runtime_observed_seq
                >= now.runtime_last_injected_seq
                >= now.agent_applied_cursor - 1
            )
        writer.result(60)
