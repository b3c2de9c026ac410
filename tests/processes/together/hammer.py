"""Each test runs in every worker of the run at once, on the epoch that all of them share.

`test_xdist.py` starts it: `pytest -p tests.processes.together.plugin --tx 4*popen --dist each`.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import uuid
from functools import partial
from multiprocessing import get_context

from shmepoch import (
    AlreadyRegistered,
    CompletionEntry,
    InvalidTransition,
    NotFound,
    OperationId,
    OperationKind,
    OperationResult,
    OperationSpec,
    OpsLifecycleRegistry,
    SessionRuntimeBindings,
)
from tests.support import eventually

ROUNDS = 200


def shared_id(name: str, number: int) -> OperationId:
    """The same id in every worker."""
    return OperationId.from_uuid(uuid.uuid5(uuid.NAMESPACE_OID, f"{name} {number}"))


def all_done(bindings: SessionRuntimeBindings, name: str, content: str, workers: int) -> list[str]:
    """Say that this worker is done, and wait for the others; what each of them said."""
    with bindings.operation(name) as operation:
        operation.complete(content)
    feed = bindings.ops_lifecycle.completion_feed()

    def said() -> list[str] | None:
        entries = [entry for entry in feed.list_since(0).entries if entry.display_name == name]
        found = [entry.terminal_outcome.text for entry in entries]
        return found if len(found) == workers else None

    return eventually(said, within=60)


def test_a_cursor_only_grows(bindings: SessionRuntimeBindings, workers: int, number: int) -> None:
    cursor = bindings.cursor_state.runtime_observed_seq
    before = 0
    for position in random.Random(number).sample(range(1, 10_000), ROUNDS):
        cursor.advance(position)
        now = cursor.load()
        assert now >= max(before, position)
        before = now
    highest = max(random.Random(number).sample(range(1, 10_000), ROUNDS))
    told = all_done(bindings, "cursor", str(highest), workers)
    assert cursor.load() == max(map(int, told))


def test_a_compare_and_swap_loses_no_step(bindings: SessionRuntimeBindings, workers: int) -> None:
    cursor = bindings.cursor_state.runtime_last_injected_seq
    for _ in range(ROUNDS):
        while True:
            before = cursor.load()
            if cursor.compare_and_swap(before, before + 1):
                break
    all_done(bindings, "swaps", "", workers)
    assert cursor.load() == workers * ROUNDS


def end(registry: OpsLifecycleRegistry, id: OperationId, way: int) -> None:
    """End an operation in one of three ways."""
    match way:
        case 0:
            registry.complete_operation(id, OperationResult(id=id, content="won"))
        case 1:
            registry.fail_operation(id, "won")
        case _:
            registry.cancel_operation(id, "won")


def test_each_operation_ends_once(
    bindings: SessionRuntimeBindings, workers: int, number: int
) -> None:
    registry = bindings.ops_lifecycle
    won = 0
    for turn in range(ROUNDS):
        id = shared_id("race", turn)
        with contextlib.suppress(AlreadyRegistered):
            registry.register_operation(
                OperationSpec(
                    id=id,
                    kind=OperationKind.MOB_MEMBER_CHILD,
                    display_name="race",
                    source_label="test",
                )
            )
        with contextlib.suppress(InvalidTransition):
            registry.provisioning_succeeded(id)
        with contextlib.suppress(InvalidTransition):
            end(registry, id, (number + turn) % 3)
            won += 1
    told = all_done(bindings, "races", str(won), workers)
    assert sum(map(int, told)) == ROUNDS
    entries = bindings.ops_lifecycle.completion_feed().list_since(0).entries
    ended = [entry.operation_id for entry in entries if entry.display_name == "race"]
    assert sorted(ended) == sorted(shared_id("race", turn) for turn in range(ROUNDS))


def run_until_killed(bindings: SessionRuntimeBindings, name: str) -> None:
    while True:
        with bindings.operation(name) as operation:
            operation.progress("on it")


def test_the_dead_leave_nothing(
    bindings: SessionRuntimeBindings, workers: int, number: int
) -> None:
    feed = bindings.ops_lifecycle.completion_feed()
    name = f"killed {number}"

    def entries() -> list[CompletionEntry]:
        return [entry for entry in feed.list_since(0).entries if entry.display_name == name]

    def came_to(count: int) -> bool:
        return len(entries()) >= count

    for _ in range(3):
        before = len(entries())
        child = get_context("spawn").Process(target=run_until_killed, args=(bindings, name))
        child.start()
        eventually(partial(came_to, before + 5), within=60)
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        child.join()
    registry = bindings.ops_lifecycle
    eventually(
        lambda: all(
            one.display_name != name
            for one in registry.list_operations()
            if not one.status.is_terminal
        ),
        within=60,
    )
    registry.check()
    all_done(bindings, "dead", "", workers)


def test_the_feed_has_no_holes(bindings: SessionRuntimeBindings, workers: int) -> None:
    feed = bindings.ops_lifecycle.completion_feed()
    seen = 0
    for _ in range(ROUNDS):
        with contextlib.suppress(NotFound), bindings.operation("hole"):
            pass
        batch = feed.list_since(seen)
        assert [entry.seq for entry in batch.entries] == list(range(seen + 1, batch.watermark + 1))
        seen = batch.watermark
    all_done(bindings, "holes", "", workers)
