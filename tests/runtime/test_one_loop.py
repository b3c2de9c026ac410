"""One running loop for each epoch, which can run again, and its reaction to answers."""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from shmepoch import (
    AgentBoundary,
    Continuation,
    LoopAlreadyActive,
    LoopAnswerInvalid,
    RuntimeLoop,
    RuntimeSessionAdapter,
    SessionId,
    SessionRuntimeBindings,
)
from tests.processes.children import METHODS, Channel, start
from tests.runtime.completions import TOOL, end
from tests.support import eventually


class Agent:
    """Takes every continuation, and applies its completions at once."""

    def __init__(self, bindings: SessionRuntimeBindings) -> None:
        self.bindings = bindings
        self.taken: list[int] = []

    def inject(self, continuation: Continuation) -> bool:
        self.taken.append(continuation.watermark)
        self.bindings.cursor_state.agent_applied_cursor.advance(continuation.watermark)
        return True

    def loop(self) -> RuntimeLoop:
        return RuntimeLoop(self.bindings, inject=self.inject, quiescent=lambda: True)

    def took(self, watermark: int) -> None:
        eventually(lambda: self.taken and self.taken[-1] == watermark)


@pytest.fixture(params=["private", "shared"])
def agent(request: pytest.FixtureRequest) -> Agent:
    if request.param == "private":
        return Agent(SessionRuntimeBindings.standalone(SessionId.new()))
    return Agent(request.getfixturevalue("bindings"))


def loop_until_told(bindings: SessionRuntimeBindings, test: Channel) -> None:
    with Agent(bindings).loop():
        test.say(os.getpid())
        test.hear()


# --- one at a time ----------------------------------------------------------------------------


def refused(call: Callable[[], object], agent: Agent) -> LoopAlreadyActive:
    with pytest.raises(LoopAlreadyActive) as error:
        call()
    assert error.value.session_id == agent.bindings.session_id
    assert str(error.value.pid) in str(error.value)
    assert pickle.loads(pickle.dumps(error.value)).pid == error.value.pid
    return error.value


def test_a_second_loop_is_refused_while_the_first_runs(agent: Agent) -> None:
    first, second = agent.loop(), agent.loop()
    with first:
        for call in (first.start, second.start, second.run, first.run):
            assert refused(call, agent).pid == os.getpid()
        second.stop()
        end(agent.bindings, TOOL)
        agent.took(1)
    with second:
        end(agent.bindings, TOOL)
        agent.took(2)


@pytest.mark.parametrize("method", METHODS)
def test_a_loop_of_another_process_is_refused_until_that_is_killed(
    bindings: SessionRuntimeBindings, method: str
) -> None:
    agent = Agent(bindings)
    with start(loop_until_told, bindings, method=method) as child:
        assert child.hear() == child.pid
        assert refused(agent.loop().start, agent).pid == child.pid
        child.kill()
        with agent.loop():
            end(bindings, TOOL)
            agent.took(1)


def test_the_runtime_that_runs_it_is_named(bindings: SessionRuntimeBindings) -> None:
    with Agent(bindings).loop(), start(loop_until_told, bindings) as child:
        with pytest.raises(LoopAlreadyActive) as error:
            child.hear()
        assert error.value.pid == os.getpid()


def test_a_loop_whose_bindings_were_closed_ends(adapter: RuntimeSessionAdapter) -> None:
    session_id = SessionId.new()
    bindings = adapter.prepare_bindings(session_id)
    loop = Agent(bindings).loop().start()
    adapter.close()
    loop.session_changed()
    loop.stop()
    with RuntimeSessionAdapter.ephemeral() as next_adapter:
        agent = Agent(next_adapter.prepare_bindings(session_id))
        with agent.loop():
            end(agent.bindings, TOOL)
            agent.took(1)
        next_adapter.unregister_session(session_id)


def test_a_thread_that_cannot_start_leaves_nothing(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = agent.loop()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_thread)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            loop.start()
    loop.stop()
    with loop:
        end(agent.bindings, TOOL)
        agent.took(1)


def no_thread(thread: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


# --- again ------------------------------------------------------------------------------------


def test_it_runs_again_after_it_was_stopped(agent: Agent) -> None:
    loop = agent.loop()
    for seq in (1, 2):
        with loop:
            end(agent.bindings, TOOL)
            agent.took(seq)
    runner = threading.Thread(target=loop.run)
    runner.start()
    end(agent.bindings, TOOL)
    agent.took(3)
    loop.stop()
    runner.join(60)
    assert not runner.is_alive()


def test_it_runs_in_another_event_loop(agent: Agent) -> None:
    loop = agent.loop()

    async def for_a_while(seq: int) -> None:
        task = asyncio.ensure_future(loop.run_async())
        end(agent.bindings, TOOL)
        while agent.taken[-1:] != [seq]:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    for seq in (1, 2):
        asyncio.run(for_a_while(seq))
    loop.session_changed()
    loop.stop()
    with loop:
        end(agent.bindings, TOOL)
        agent.took(3)


def test_a_signal_handler_stops_it(agent: Agent) -> None:
    """The handler interrupts the loop at any point, in the same thread."""
    loop = agent.loop()
    ended = threading.Event()

    def interrupt() -> None:
        while not ended.wait(0.001):
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, lambda *_: loop.stop())
    try:
        for _ in range(20):
            ended.clear()
            thread = threading.Thread(target=interrupt)
            thread.start()
            loop.run()
            ended.set()
            thread.join()
    finally:
        signal.signal(signal.SIGUSR1, before)


# --- a cancelled injection --------------------------------------------------------------------


@pytest.mark.parametrize("how", ["coroutine", "function"])
def test_a_cancelled_injection_is_offered_again(agent: Agent, how: str) -> None:
    """The session's stop button was pressed."""
    take = agent.inject
    cancelled: list[Continuation] = []

    async def inject(continuation: Continuation) -> bool:
        if not cancelled:
            cancelled.append(continuation)
            turn = asyncio.ensure_future(asyncio.sleep(60))
            asyncio.get_running_loop().call_soon(turn.cancel)
            await turn
        return take(continuation)

    def refuse(continuation: Continuation) -> bool:
        if not cancelled:
            cancelled.append(continuation)
            raise asyncio.CancelledError
        return take(continuation)

    injection: Any = inject if how == "coroutine" else refuse
    with RuntimeLoop(agent.bindings, inject=injection, quiescent=lambda: True):
        end(agent.bindings, TOOL)
        agent.took(1)
        end(agent.bindings, TOOL)
        agent.took(2)
    assert len(cancelled) == 1


def test_a_loop_that_is_cancelled_while_it_injects_ends(agent: Agent) -> None:
    injecting = asyncio.Event()

    async def inject(continuation: Continuation) -> bool:
        injecting.set()
        await asyncio.sleep(60)
        return True

    async def cancel() -> None:
        loop = RuntimeLoop(agent.bindings, inject=inject, quiescent=lambda: True)
        end(agent.bindings, TOOL)
        task = asyncio.ensure_future(loop.run_async())
        await injecting.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(asyncio.wait_for(cancel(), 60))
    assert agent.bindings.cursor_state.runtime_last_injected_seq.load() == 0


def test_a_task_that_was_cancelled_before_it_ran_the_loop(agent: Agent) -> None:
    """The task's count of cancellations stays: that cancellation was not for the loop."""
    take = agent.inject
    cancelled: list[Continuation] = []

    def inject(continuation: Continuation) -> bool:
        if not cancelled:
            cancelled.append(continuation)
            raise asyncio.CancelledError
        return take(continuation)

    async def cancelled_once(loop: RuntimeLoop) -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            await loop.run_async()

    async def cancel() -> None:
        loop = RuntimeLoop(agent.bindings, inject=inject, quiescent=lambda: True)
        task = asyncio.ensure_future(cancelled_once(loop))
        await asyncio.sleep(0)
        task.cancel()
        end(agent.bindings, TOOL)
        while agent.taken != [1]:
            await asyncio.sleep(0)
        loop.stop()
        await task

    asyncio.run(asyncio.wait_for(cancel(), 60))


# --- answers that are not valid ---------------------------------------------------------------


class Later:
    """The result of a coroutine function, without the warning that it was never awaited."""

    def __await__(self) -> Iterator[Any]:
        yield from ()


NO_ANSWERS: list[tuple[str, Callable[..., Any]]] = [
    ("inject", lambda _: None),
    ("inject", lambda _: 1),
    ("inject", lambda _: "accepted"),
    ("inject", lambda _: Later()),
    ("quiescent", lambda: None),
    ("quiescent", lambda: 0),
    ("quiescent", Later),
]


def answering(bindings: SessionRuntimeBindings, function: str, answer: Any) -> RuntimeLoop:
    functions = {"inject": lambda _: True, "quiescent": lambda: True, function: answer}
    return RuntimeLoop(bindings, **functions)


@pytest.mark.parametrize(("function", "answer"), NO_ANSWERS)
def test_an_answer_that_is_none_is_an_error(
    agent: Agent, caplog: pytest.LogCaptureFixture, function: str, answer: Any
) -> None:
    end(agent.bindings, TOOL)
    loop = answering(agent.bindings, function, answer)
    for run in (loop.run, lambda: asyncio.run(loop.run_async())):
        with pytest.raises(LoopAnswerInvalid) as error:
            run()
        assert error.value.function == function
        assert error.value.answer in str(error.value)
        assert "True" in str(error.value)
        assert isinstance(error.value, TypeError)
        assert pickle.loads(pickle.dumps(error.value)).function == function
    assert caplog.records == []
    loop.start()
    eventually(lambda: caplog.records)
    with pytest.raises(LoopAnswerInvalid):
        loop.stop()
    loop.stop()
    [said] = caplog.records
    assert said.levelno == logging.ERROR
    assert f"{function} of a RuntimeLoop returned" in said.getMessage()
    assert agent.bindings.cursor_state.runtime_observed_seq.load() == 0


def test_leaving_its_block_raises_what_ended_it(agent: Agent) -> None:
    end(agent.bindings, TOOL)
    answers: list[Any] = [None]
    loop = answering(agent.bindings, "inject", lambda _: answers[0])
    with pytest.raises(LoopAnswerInvalid), loop:
        eventually(lambda: loop._failure)
    answers[0] = True
    with loop:
        eventually(lambda: agent.bindings.cursor_state.runtime_observed_seq.load() == 1)


# --- a cursor ahead of the feed ---------------------------------------------------------------

CURSORS = ["agent_applied_cursor", "runtime_observed_seq", "runtime_last_injected_seq"]


@pytest.mark.parametrize("position", [100, 2**63, 2**64 - 1])
@pytest.mark.parametrize("name", CURSORS)
def test_a_cursor_that_is_ahead_is_named_once(
    agent: Agent, caplog: pytest.LogCaptureFixture, name: str, position: int
) -> None:
    getattr(agent.bindings.cursor_state, name).advance(position)
    looks = []

    def quiescent() -> bool:
        looks.append(1)
        return True

    loop = RuntimeLoop(agent.bindings, inject=agent.inject, quiescent=quiescent)
    for seq in (1, 2, 3):
        with loop:
            end(agent.bindings, TOOL)
            cursor = "runtime_last_injected_seq" if name == CURSORS[1] else CURSORS[1]
            eventually(lambda: getattr(agent.bindings.cursor_state, cursor).load() >= seq)  # noqa: B023
    assert agent.taken == ([] if name == CURSORS[0] else [1, 2, 3])
    assert len(looks) == len(agent.taken)
    [said] = caplog.records
    assert said.levelno == logging.WARNING
    for part in (name, str(position), str(agent.bindings.session_id), "reset_session"):
        assert part in said.getMessage()


def test_a_boundary_says_once_that_its_cursor_is_ahead(
    agent: Agent, caplog: pytest.LogCaptureFixture
) -> None:
    with AgentBoundary(agent.bindings) as boundary:
        end(agent.bindings, TOOL)
        boundary.drain().commit()
        assert caplog.records == []
        agent.bindings.cursor_state.agent_applied_cursor.advance(2**63)
        for _ in range(3):
            end(agent.bindings, TOOL)
            assert len(boundary.drain()) == 0
    [said] = caplog.records
    assert f"agent_applied_cursor is {2**63}" in said.getMessage()
    assert "watermark is 2" in said.getMessage()
