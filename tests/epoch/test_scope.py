"""An operation as a block of code: it is ended however the block is left."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest

from shmepoch import (
    AlreadyRegistered,
    ArgumentInvalid,
    Cancelled,
    Completed,
    Failed,
    InvalidTransition,
    OperationStatus,
    PayloadTooLarge,
    SessionId,
    SessionRuntimeBindings,
)
from shmepoch.config import OpsLifecycleConfig
from shmepoch.epoch.completions import CompletionEntry
from shmepoch.epoch.scope import OperationScope
from tests.support import eventually, held_writer


@pytest.fixture
def alone() -> SessionRuntimeBindings:
    config = OpsLifecycleConfig(max_operations=8, max_completed=8, feed_bytes=16 * 1024)
    return SessionRuntimeBindings.standalone(SessionId.new(), config)


def entries(bindings: SessionRuntimeBindings) -> tuple[CompletionEntry, ...]:
    return bindings.ops_lifecycle.completion_feed().list_since(0).entries


def ran(bindings: SessionRuntimeBindings, body: Callable[[OperationScope], object]) -> object:
    """How the one operation ended whose block did this."""
    with bindings.operation("work", source="test") as operation:
        body(operation)
    (entry,) = entries(bindings)
    assert (entry.operation_id, entry.display_name) == (operation.id, "work")
    return entry.terminal_outcome


async def ran_async(
    bindings: SessionRuntimeBindings, body: Callable[[OperationScope], object]
) -> object:
    async with bindings.operation("work", source="test") as operation:
        body(operation)
    (entry,) = entries(bindings)
    return entry.terminal_outcome


Ran = Callable[[SessionRuntimeBindings, Callable[[OperationScope], object]], object]


@pytest.fixture(params=["sync", "async"])
def run(request: pytest.FixtureRequest) -> Ran:
    """A block, in both of its forms."""
    if request.param == "sync":
        return ran
    return lambda bindings, body: asyncio.run(ran_async(bindings, body))


def test_it_runs_while_its_block_does(alone: SessionRuntimeBindings, run: Ran) -> None:
    def body(operation: OperationScope) -> None:
        operation.progress("half way", percent=50)
        snapshot = alone.ops_lifecycle.snapshot(operation.id)
        assert snapshot is not None
        assert snapshot.status is OperationStatus.RUNNING
        assert snapshot.last_progress is not None
        assert (snapshot.last_progress.message, snapshot.last_progress.percent) == ("half way", 50)
        assert entries(alone) == ()

    outcome = run(alone, body)
    assert isinstance(outcome, Completed)
    assert (outcome.ok, outcome.text) == (True, "")


def test_it_ends_as_it_was_said_last(alone: SessionRuntimeBindings, run: Ran) -> None:
    def body(operation: OperationScope) -> None:
        operation.fail("no")
        operation.complete("almost", is_error=True)
        operation.complete("1,204 files", tokens_used=7)

    outcome = run(alone, body)
    assert isinstance(outcome, Completed)
    assert (outcome.result.content, outcome.result.is_error) == ("1,204 files", False)
    assert outcome.result.tokens_used == 7


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (lambda operation: operation.fail("no disk"), Failed("no disk")),
        (lambda operation: operation.cancel("too late"), Cancelled("too late")),
        (lambda operation: operation.cancel(), Cancelled(None)),
    ],
)
def test_it_can_end_otherwise(
    alone: SessionRuntimeBindings,
    run: Ran,
    body: Callable[[OperationScope], object],
    expected: object,
) -> None:
    assert run(alone, body) == expected


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("no such file"), Failed("ValueError: no such file")),
        (ValueError("x" * 20_000), Failed(f"ValueError: {'x' * 288}...")),
        (KeyboardInterrupt(), Cancelled("KeyboardInterrupt")),
        (SystemExit(1), Cancelled("SystemExit")),
    ],
)
def test_an_exception_ends_it_and_goes_on(
    alone: SessionRuntimeBindings, error: BaseException, expected: object
) -> None:
    def body(operation: OperationScope) -> None:
        operation.complete("done")
        raise error

    with pytest.raises(type(error)) as raised:
        ran(alone, body)
    assert raised.value is error
    assert [entry.terminal_outcome for entry in entries(alone)] == [expected]


def test_a_cancelled_task_cancels_it(alone: SessionRuntimeBindings) -> None:
    async def main() -> None:
        began = asyncio.Event()

        async def work() -> None:
            async with alone.operation("work"):
                began.set()
                await asyncio.Event().wait()

        task = asyncio.create_task(work())
        await began.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert [entry.terminal_outcome for entry in entries(alone)] == [Cancelled("CancelledError")]


def test_content_that_does_not_fit_fails_it(alone: SessionRuntimeBindings, run: Ran) -> None:
    with pytest.raises(PayloadTooLarge):
        run(alone, lambda operation: operation.complete("x" * 20_000))
    (entry,) = entries(alone)
    assert isinstance(entry.terminal_outcome, Failed)
    assert "feed_bytes" in entry.terminal_outcome.text


def test_an_end_by_another_process_stands(alone: SessionRuntimeBindings, run: Ran) -> None:
    def body(operation: OperationScope) -> None:
        alone.ops_lifecycle.cancel_operation(operation.id, "not wanted")

    with pytest.raises(InvalidTransition):
        run(alone, body)
    assert [entry.terminal_outcome for entry in entries(alone)] == [Cancelled("not wanted")]


def test_an_exception_is_not_replaced_where_it_has_an_end_already(
    alone: SessionRuntimeBindings,
) -> None:
    def body(operation: OperationScope) -> None:
        alone.ops_lifecycle.cancel_operation(operation.id, "not wanted")
        raise ValueError("first")

    with pytest.raises(ValueError, match="first"):
        ran(alone, body)
    assert [entry.terminal_outcome for entry in entries(alone)] == [Cancelled("not wanted")]


def test_one_that_could_not_be_started_is_not_left(
    alone: SessionRuntimeBindings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(alone.ops_lifecycle, "provisioning_succeeded", interrupted)
    with pytest.raises(KeyboardInterrupt), alone.operation("work"):
        pytest.fail("the block was entered")
    assert [entry.terminal_outcome for entry in entries(alone)] == [Cancelled("KeyboardInterrupt")]


def test_a_scope_is_entered_once(alone: SessionRuntimeBindings) -> None:
    operation = alone.operation("work")
    with operation:
        pass
    with pytest.raises(AlreadyRegistered), operation:
        pytest.fail("the block was entered")
    assert len(entries(alone)) == 1


def test_a_function_is_an_operation_each_time(alone: SessionRuntimeBindings) -> None:
    @alone.operation("add")
    def add(a: int, b: int) -> int:
        """Adds."""
        return a + b

    @alone.operation("nothing")
    async def nothing() -> None:
        await asyncio.sleep(0)

    assert (add(1, b=2), add(3, 4), add.__doc__) == (3, 7, "Adds.")
    asyncio.run(nothing())
    found = [(entry.display_name, entry.terminal_outcome.text) for entry in entries(alone)]
    assert found == [("add", "3"), ("add", "7"), ("nothing", "")]
    assert len({entry.operation_id for entry in entries(alone)}) == 3


def test_a_function_that_raises_fails(alone: SessionRuntimeBindings) -> None:
    @alone.operation("divide")
    def divide(a: int) -> float:
        return a / 0

    with pytest.raises(ZeroDivisionError):
        divide(1)
    assert [entry.terminal_outcome.text for entry in entries(alone)] == [
        "ZeroDivisionError: division by zero"
    ]


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda operation: operation.complete(1204), "content"),
        (lambda operation: operation.fail(ValueError()), "error"),
        (lambda operation: operation.cancel(3), "reason"),
        (lambda operation: operation(3), "function"),
    ],
)
def test_wrong_arguments_are_refused_at_once(
    alone: SessionRuntimeBindings, call: Callable[[OperationScope], object], argument: str
) -> None:
    with pytest.raises(ArgumentInvalid) as refused:
        call(alone.operation("work"))
    assert refused.value.argument == argument


@pytest.mark.parametrize("cancelled", [False, True])
def test_while_the_writer_lock_is_held_the_event_loop_goes_on(
    bindings: SessionRuntimeBindings, cancelled: bool
) -> None:
    entered = threading.Event()

    async def work() -> None:
        async with bindings.operation("work"):
            entered.set()

    async def main() -> None:
        task = asyncio.create_task(work())
        with held_writer(bindings.shared_segment()):
            for _ in range(10):  # turns of the event loop, which is not blocked
                await asyncio.sleep(0.001)
            assert not entered.is_set()
            if cancelled:
                task.cancel()
                await asyncio.sleep(0)
        if not cancelled:
            await task
            return
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    outcomes = [entry.terminal_outcome for entry in entries(bindings)]
    if cancelled:
        assert outcomes == [Cancelled("CancelledError")]
    else:
        assert [outcome.ok for outcome in outcomes] == [True]
    assert eventually(lambda: bindings.ops_lifecycle.active_count() == 0)
