"""Many processes change the same words at once."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from shmepoch import (
    InvalidTransition,
    MaxConcurrentExceeded,
    OperationId,
    OperationStatus,
    OpsLifecycleConfig,
    RuntimeSessionAdapter,
    SessionId,
    SessionRuntimeBindings,
)
from tests.processes.children import Channel, Child, start
from tests.processes.workloads import obeys_the_feed, one_entry_each, one_operation
from tests.support import result, spec

PROCESSES = 5


@contextmanager
def racing(act: Any, bindings: SessionRuntimeBindings, *args: object) -> Iterator[list[Child]]:
    """Processes that start together, after all of them are ready."""
    with ExitStack() as stack:
        children = [
            stack.enter_context(start(act, bindings, number, *args)) for number in range(PROCESSES)
        ]
        for child in children:
            assert child.hear() == "ready"
        for child in children:
            child.say("go")
        yield children


def ready(test: Channel) -> None:
    test.say("ready")
    test.hear()


# --- ends -------------------------------------------------------------------------------------


def end_all(
    bindings: SessionRuntimeBindings, test: Channel, number: int, ids: list[OperationId]
) -> tuple[list[OperationId], list[tuple[OperationId, str]]]:
    """Try to end every operation; returns those that this process ended, and the others."""
    registry = bindings.ops_lifecycle
    verbs = (
        lambda id: registry.complete_operation(id, result(id, f"by {number}")),
        lambda id: registry.fail_operation(id, f"by {number}"),
        lambda id: registry.cancel_operation(id, f"by {number}"),
    )
    won, refused = [], []
    ready(test)
    for id in ids:
        try:
            verbs[number % len(verbs)](id)
        except InvalidTransition as error:
            assert error.id == id
            refused.append((id, error.status))
        else:
            won.append(id)
    return won, refused


def test_one_outcome_stands_however_many_end_an_operation(
    bindings: SessionRuntimeBindings,
) -> None:
    registry = bindings.ops_lifecycle
    ids = [OperationId.new() for _ in range(100)]
    for id in ids:
        registry.register_operation(spec(id=id))
        registry.provisioning_succeeded(id)
    with racing(end_all, bindings, ids) as children:
        said = [child.result() for child in children]
    winner = {id: number for number, (won, _) in enumerate(said) for id in won}
    assert sum(len(won) for won, _ in said) == len(ids)
    assert winner.keys() == set(ids)

    batch = registry.completion_feed().list_since(0)
    obeys_the_feed(batch, 0)
    one_entry_each(batch.entries)
    assert batch.watermark == len(ids)
    for entry in batch.entries:
        assert f"by {winner[entry.operation_id]}" in str(entry.terminal_outcome)
    statuses = {operation.id: operation.status for operation in registry.list_operations()}
    for _, refused in said:
        assert all(statuses[id] == status for id, status in refused)


def complete_overlapping(
    bindings: SessionRuntimeBindings, test: Channel, number: int, ids: list[OperationId]
) -> list[list[OperationId]]:
    """Try to complete groups of neighbours, other groups in each process; returns the completed
    ones."""
    random_, done = random.Random(number), []
    ready(test)
    for first in range(len(ids) - 3):
        group = ids[first : first + random_.randrange(1, 5)]
        random_.shuffle(group)
        try:
            bindings.ops_lifecycle.complete_operations([result(id, f"by {number}") for id in group])
        except InvalidTransition as error:
            assert error.id in group
        else:
            done.append(group)
    return done


def test_groups_that_overlap_are_completed_whole_or_not_at_all(
    bindings: SessionRuntimeBindings,
) -> None:
    registry = bindings.ops_lifecycle
    specs = [spec() for _ in range(100)]
    registry.register_operations(specs)
    ids = [each.id for each in specs]
    registry.start_operations(ids)
    with racing(complete_overlapping, bindings, ids) as children:
        said = [child.result() for child in children]
    batch = registry.completion_feed().list_since(0)
    obeys_the_feed(batch, 0)
    one_entry_each(batch.entries)
    ended = [entry.operation_id for entry in batch.entries]
    groups = [group for groups in said for group in groups]
    assert sorted(ended) == sorted(id for group in groups for id in group)
    for group in groups:
        first = ended.index(group[0])
        assert ended[first : first + len(group)] == group, "one commit, in the order asked for"
    registry.check()


# --- cursors ----------------------------------------------------------------------------------


def advance_to_many(
    bindings: SessionRuntimeBindings, test: Channel, number: int, rounds: int
) -> int:
    """Advance to random positions, and check the cursor each time; returns the highest position."""
    cell = bindings.cursor_state.agent_applied_cursor
    random_ = random.Random(number)
    highest = before = 0
    ready(test)
    for upto in range(1, rounds):
        value = random_.randrange(upto * 50)
        moved = cell.advance(value)
        assert not moved or value > before
        highest = max(highest, value)
        now = cell.load()
        assert now >= max(before, value), f"the cursor was {before}, and then {now}"
        before = now
    return highest


def test_a_cursor_that_many_advance_ends_at_the_highest(bindings: SessionRuntimeBindings) -> None:
    with racing(advance_to_many, bindings, 20_000) as children:
        said = [child.result() for child in children]
    assert bindings.cursor_state.agent_applied_cursor.load() == max(said)


def count_up(bindings: SessionRuntimeBindings, test: Channel, number: int, rounds: int) -> None:
    """Raise the cursor by one with compare-and-swap, until this process has done it `rounds`
    times."""
    cell = bindings.cursor_state.runtime_observed_seq
    ready(test)
    for _ in range(rounds):
        while True:
            now = cell.load()
            if cell.compare_and_swap(now, now + 1):
                break


def test_no_swap_is_lost(bindings: SessionRuntimeBindings) -> None:
    with racing(count_up, bindings, 4_000) as children:
        for child in children:
            child.result()
    assert bindings.cursor_state.runtime_observed_seq.load() == PROCESSES * 4_000


def climb(bindings: SessionRuntimeBindings, test: Channel, number: int, rounds: int) -> None:
    """Half the processes raise all cursors in a fixed order, the others see them in that order."""
    cursors = bindings.cursor_state
    ready(test)
    if number % 2:
        for position in range(1, rounds):
            cursors.runtime_observed_seq.advance(position)
            cursors.runtime_last_injected_seq.advance(position)
            cursors.agent_applied_cursor.advance(position)
        return
    before = cursors.snapshot()
    while before.agent_applied_cursor < rounds - 1:
        now = cursors.snapshot()
        order = now.agent_applied_cursor, now.runtime_last_injected_seq, now.runtime_observed_seq
        assert list(order) == sorted(order), f"not of one instant: {now}"
        assert now.agent_applied_cursor >= before.agent_applied_cursor
        before = now


def test_a_snapshot_is_of_one_instant(bindings: SessionRuntimeBindings) -> None:
    with racing(climb, bindings, 30_000) as children:
        for child in children:
            child.result()


# --- registrations ----------------------------------------------------------------------------


def register_many(
    bindings: SessionRuntimeBindings, test: Channel, number: int, count: int
) -> tuple[list[OperationId], int]:
    """Register operations; returns the accepted ones, and how many were refused."""
    taken, refused = [], 0
    ready(test)
    for _ in range(count):
        id = OperationId.new()
        try:
            bindings.ops_lifecycle.register_operation(spec(f"of {number}", id=id))
        except MaxConcurrentExceeded as error:
            assert (error.limit, error.active) == (64, 64)
            refused += 1
        else:
            taken.append(id)
    test.say((taken, refused))
    test.hear()  # alive until its operations were counted: they end with it
    return [], 0


@pytest.mark.parametrize("limit", ["max_concurrent", "max_operations"])
def test_registrations_of_many_processes_stop_at_the_limit(
    adapter: RuntimeSessionAdapter, namespace: str, limit: str
) -> None:
    config = OpsLifecycleConfig(max_operations=64 if limit == "max_operations" else 100)
    if limit == "max_concurrent":
        config = OpsLifecycleConfig(max_operations=100, max_concurrent=64)
    with RuntimeSessionAdapter.ephemeral(namespace=namespace, config=config) as small:
        bindings = small.prepare_bindings(SessionId.new())
        registry = bindings.ops_lifecycle
        with racing(register_many, bindings, 20) as children:
            said = [child.hear() for child in children]
            taken = {id for ids, _ in said for id in ids}
            assert len(taken) == 64
            assert sum(refused for _, refused in said) == PROCESSES * 20 - 64
            listed = registry.list_operations()
            assert {operation.id for operation in listed} == taken
            assert {operation.status for operation in listed} == {OperationStatus.PROVISIONING}
            for child in children:
                child.say("end")
                child.result()
        registry.check()
        small.unregister_session(bindings.session_id)


# --- everything -------------------------------------------------------------------------------


def live_many_lives(
    bindings: SessionRuntimeBindings, test: Channel, number: int, count: int
) -> list[OperationId]:
    """Lead operations through their lives; returns all of them."""
    random_ = random.Random(number)
    ready(test)
    return [one_operation(bindings.ops_lifecycle, random_) for _ in range(count)]


def test_lives_in_many_processes_are_all_in_the_feed_once(
    bindings: SessionRuntimeBindings,
) -> None:
    with racing(live_many_lives, bindings, 120) as children:
        ended = [id for child in children for id in child.result()]
    batch = bindings.ops_lifecycle.completion_feed().list_since(0)
    obeys_the_feed(batch, 0)
    assert batch.dropped_through == 0
    assert Counter(entry.operation_id for entry in batch.entries) == Counter(ended)
