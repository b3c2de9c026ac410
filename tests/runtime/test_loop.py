"""The runtime loop: the injection of continuations, and the moves of its cursors."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from shmepoch import (
    AgentFactory,
    CompletionBatch,
    CompletionEntry,
    Continuation,
    EpochCursorSnapshot,
    LoopAnswerInvalid,
    OperationId,
    OperationKind,
    OpsLifecycleConfig,
    Retired,
    RuntimeLoop,
    SessionId,
    SessionOwned,
    SessionRuntimeBindings,
)
from shmepoch.runtime.loop import _Growing, _Owed
from tests.processes.children import Channel, start
from tests.runtime.completions import CHILD, TOOL, drop_through, end
from tests.support import eventually


class Session:
    """A session for a loop: it takes continuations or refuses them, between its turns.

    A continuation that it takes is a turn, in which the agent applies its notices.
    """

    def __init__(self, bindings: SessionRuntimeBindings) -> None:
        self.bindings = bindings
        self.quiet = True
        self.accepts = True
        self.applies = True
        self.failure: Exception | None = None
        self.looks = 0
        #: Every continuation that it was offered, with the cursors at that time.
        self.offered: list[tuple[Continuation, EpochCursorSnapshot]] = []
        self.taken: list[int] = []

    def inject(self, continuation: Continuation) -> bool:
        self.offered.append((continuation, self.bindings.cursor_state.snapshot()))
        if self.failure is not None:
            raise self.failure
        if self.accepts:
            self.taken.append(continuation.watermark)
            if self.applies:
                self.apply(continuation.watermark)
        return self.accepts

    def apply(self, seq: int) -> None:
        """Apply everything up to `seq`, as the agent."""
        self.bindings.cursor_state.agent_applied_cursor.advance(seq)

    def quiescent(self) -> bool:
        self.looks += 1
        return self.quiet

    def loop(self) -> RuntimeLoop:
        return RuntimeLoop(self.bindings, inject=self.inject, quiescent=self.quiescent)

    def observed(self, seq: int) -> None:
        """Wait until the loop has observed everything up to `seq`."""
        eventually(lambda: self.bindings.cursor_state.runtime_observed_seq.load() >= seq)

    def looked(self, times: int) -> None:
        """Wait until it was asked so many times whether it is quiescent."""
        eventually(lambda: self.looks >= times)

    @property
    def cursors(self) -> tuple[int, int]:
        """Observed and last injected."""
        now = self.bindings.cursor_state.snapshot()
        return now.runtime_observed_seq, now.runtime_last_injected_seq


@pytest.fixture(params=["private", "shared"])
def session(request: pytest.FixtureRequest) -> Session:
    if request.param == "private":
        return Session(SessionRuntimeBindings.standalone(SessionId.new()))
    return Session(request.getfixturevalue("bindings"))


@pytest.fixture
def small() -> Session:
    """A session whose epoch soon drops completions."""
    config = OpsLifecycleConfig(max_completed=2, max_operations=4, feed_bytes=8 * 1024)
    return Session(SessionRuntimeBindings.standalone(SessionId.new(), config))


@pytest.fixture
def running(session: Session) -> Iterator[RuntimeLoop]:
    with session.loop() as loop:
        yield loop


# --- injections -------------------------------------------------------------------------------


def test_a_completion_is_injected(session: Session, running: RuntimeLoop) -> None:
    end(session.bindings, TOOL)
    session.observed(1)
    [(continuation, cursors)] = session.offered
    assert continuation == Continuation(
        session_id=session.bindings.session_id, epoch_id=session.bindings.epoch_id, watermark=1
    )
    assert cursors == EpochCursorSnapshot(), "nothing advances before it was accepted"
    assert session.cursors == (1, 1)
    end(session.bindings, TOOL)
    session.observed(2)
    assert session.taken == [1, 2]


def test_it_runs_as_a_task_of_an_event_loop(session: Session) -> None:
    loop = session.loop()

    async def main() -> None:
        async with loop:
            end(session.bindings, TOOL)
            while session.taken != [1]:
                await asyncio.sleep(0.001)
            assert "running" in repr(loop)
        assert "not running" in repr(loop)

    asyncio.run(asyncio.wait_for(main(), 20))
    session.loop().start().stop()  # it has given the epoch up


def test_what_ends_its_task_is_raised_at_the_end(session: Session) -> None:
    session.inject = lambda _: None  # type: ignore[assignment,method-assign,return-value]

    async def main() -> None:
        loop = session.loop()
        async with loop:
            end(session.bindings, TOOL)
            while "not running" not in repr(loop):
                await asyncio.sleep(0.001)

    with pytest.raises(LoopAnswerInvalid):
        asyncio.run(asyncio.wait_for(main(), 20))


def test_many_completions_are_one_continuation(session: Session) -> None:
    end(session.bindings, *[TOOL, CHILD] * 5)
    with session.loop():
        session.observed(10)
    assert session.taken == [10]
    assert session.cursors == (10, 10)


def test_children_wake_nobody(session: Session, running: RuntimeLoop) -> None:
    for seq in range(1, 4):
        end(session.bindings, CHILD)
        session.observed(seq)
    assert session.offered == []
    assert session.looks == 0
    assert session.cursors == (3, 0)


def test_what_comes_during_an_injection_is_in_the_next(session: Session) -> None:
    take = session.inject

    def inject(continuation: Continuation) -> bool:
        if continuation.watermark == 1:
            end(session.bindings, TOOL, TOOL)
        return take(continuation)

    session.inject = inject  # type: ignore[method-assign]
    end(session.bindings, TOOL)
    with session.loop():
        session.observed(3)
    assert session.taken == [1, 3]


def end_a_tool(bindings: SessionRuntimeBindings, test: Channel) -> None:
    end(bindings, TOOL)


def test_a_completion_of_another_process_is_injected(bindings: SessionRuntimeBindings) -> None:
    session = Session(bindings)
    with session.loop(), start(end_a_tool, bindings) as worker:
        worker.result()
        session.observed(1)
    assert session.taken == [1]


# --- where it starts --------------------------------------------------------------------------


def test_it_starts_at_the_shared_cursors(session: Session) -> None:
    end(session.bindings, TOOL, TOOL)
    session.apply(2)
    session.bindings.cursor_state.runtime_last_injected_seq.advance(2)
    session.bindings.cursor_state.runtime_observed_seq.advance(2)
    with session.loop():
        end(session.bindings, CHILD)
        session.observed(3)
        assert session.offered == []
        end(session.bindings, TOOL)
        session.observed(4)
    assert session.taken == [4]


@pytest.mark.parametrize("observed", [0, 2])
def test_what_was_accepted_and_not_applied_is_offered_by_the_next_loop(
    session: Session, observed: int
) -> None:
    """The runtime died after the acceptance, or the turn never came."""
    end(session.bindings, TOOL, CHILD)
    session.bindings.cursor_state.runtime_last_injected_seq.advance(2)
    session.bindings.cursor_state.runtime_observed_seq.advance(observed)
    with session.loop():
        eventually(lambda: session.taken)
    assert session.taken == [2]
    session.applies = False
    end(session.bindings, TOOL)
    for times in (2, 3):
        with session.loop():
            eventually(lambda times=times: len(session.taken) == times)  # type: ignore[misc]
    assert session.taken == [2, 3, 3], "once for each loop, and only what was not applied"


def test_what_the_agent_has_applied_is_not_injected(session: Session) -> None:
    """The agent was told between two model calls of one turn, or in a turn that it began itself."""
    end(session.bindings, TOOL, TOOL)
    session.apply(2)
    with session.loop():
        session.observed(2)
        end(session.bindings, CHILD)
        session.observed(3)
        assert session.offered == []
        end(session.bindings, TOOL)
        session.observed(4)
    assert session.taken == [4]
    assert session.cursors == (4, 4)


def test_what_the_agent_applies_while_the_session_is_busy_is_not_injected(session: Session) -> None:
    session.quiet = False
    end(session.bindings, TOOL)
    with session.loop() as loop:
        session.looked(1)
        session.apply(1)
        session.quiet = True
        loop.session_changed()
        session.observed(1)
    assert session.offered == []
    assert session.cursors == (1, 0)


def test_the_cursors_advance_in_an_order_that_loses_nothing(session: Session) -> None:
    """`runtime_last_injected_seq` first: a kill between the two repeats nothing and skips
    nothing."""
    order: list[str] = []

    class Recorded:
        def __init__(self, name: str) -> None:
            self._name = name
            self._cell: Any = getattr(session.bindings.cursor_state, name)

        def load(self) -> int:
            return int(self._cell.load())

        def advance(self, value: int) -> bool:
            order.append(self._name)
            return bool(self._cell.advance(value))

    class RecordedState:
        snapshot = session.bindings.cursor_state.snapshot
        agent_applied_cursor = Recorded("agent_applied_cursor")
        runtime_observed_seq = Recorded("runtime_observed_seq")
        runtime_last_injected_seq = Recorded("runtime_last_injected_seq")

    loop = session.loop()
    loop._cursors = RecordedState()  # type: ignore[assignment]
    end(session.bindings, TOOL)
    with loop:
        session.observed(1)
    assert order == ["runtime_last_injected_seq", "runtime_observed_seq"]


# --- a promise that is not kept ---------------------------------------------------------------


class Pauses:
    """The timeouts that a loop waits for, each cut short."""

    def __init__(self, loop: RuntimeLoop) -> None:
        self.taken: list[float] = []
        self._wait = loop._pause
        loop._pause = self._pause  # type: ignore[method-assign]

    async def _pause(self, run: Any, pause: Any) -> None:
        if pause.timeout is not None:
            self.taken.append(pause.timeout)
            pause = pause._replace(timeout=0.001)
        await self._wait(run, pause)


def test_what_was_accepted_and_not_applied_is_offered_again(session: Session) -> None:
    """The turn failed, or never began, and the session is quiescent again."""
    session.applies = False
    end(session.bindings, TOOL)
    with session.loop():
        eventually(lambda: len(session.taken) == 2)
        assert session.cursors == (1, 1)
        session.applies = True
        eventually(lambda: len(session.taken) == 3)
        end(session.bindings, CHILD)
        session.observed(2)
        end(session.bindings, TOOL)
        session.observed(3)
    assert session.taken == [1, 1, 1, 3]


def test_a_turn_that_raises_in_its_drain_is_offered_again(session: Session) -> None:
    boundary = AgentFactory().build(session.bindings.session_id, SessionOwned(session.bindings))
    turns: list[int] = []

    def turn(loop: RuntimeLoop) -> None:
        with contextlib.suppress(ConnectionError), boundary.drain() as notices:
            turns.append(len(notices))
            if len(turns) < 3:
                raise ConnectionError("the model was not to be had")
        session.quiet = True
        loop.session_changed()

    def inject(continuation: Continuation) -> bool:
        session.quiet = False
        threads.append(threading.Thread(target=turn, args=(loop,)))
        threads[-1].start()
        return True

    threads: list[threading.Thread] = []
    loop = RuntimeLoop(session.bindings, inject=inject, quiescent=session.quiescent)
    end(session.bindings, TOOL)
    with loop:
        eventually(lambda: session.bindings.cursor_state.agent_applied_cursor.load() == 1)
        for thread in threads:
            thread.join()
    assert turns == [1, 1, 1]


def test_a_turn_that_goes_on_is_not_offered_again(session: Session) -> None:
    session.applies = False
    take = session.inject

    def inject(continuation: Continuation) -> bool:
        session.quiet = False
        return take(continuation)

    session.inject = inject  # type: ignore[method-assign]
    loop = session.loop()
    pauses = Pauses(loop)
    end(session.bindings, TOOL)
    with loop:
        eventually(lambda: pauses.taken and pauses.taken[-1] == 1.0)  # it has polled it
        assert session.taken == [1]
        session.apply(1)
        session.quiet = True
        end(session.bindings, CHILD)
        session.observed(2)
    assert session.taken == [1]


def test_a_promise_is_good_for_growing_times(session: Session) -> None:
    """A session that stays quiescent may not have begun its turn yet."""
    now = 1000.0
    owed = _Owed(0)
    owed.examine(batch(1))
    assert owed.promised_for() == 0.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shmepoch.runtime.loop.time.monotonic", lambda: now)
        good = []
        for _ in range(8):
            good.append(owed.promise(1))
            assert owed.promised_for() == good[-1]
            now += good[-1]
            assert owed.promised_for() == 0.0
        assert good == sorted(good)
        assert good[0] < good[1] < good[6] == good[7] <= 60
        owed.examine(batch(2, CHILD))
        owed.promise(1)
        assert owed.promised_for(), "what wakes no agent was not to be promised"
        owed.examine(batch(3))
        assert owed.promised_for() == 0.0, "what came since was not promised"
        assert owed.promise(3) == good[0]


def batch(seq: int, kind: OperationKind = TOOL) -> CompletionBatch:
    """One completion."""
    entry = CompletionEntry(
        seq=seq,
        operation_id=OperationId.new(),
        kind=kind,
        display_name="work",
        terminal_outcome=Retired(),
        completed_at_ms=0,
    )
    return CompletionBatch(entries=(entry,), watermark=seq)


# --- gaps -------------------------------------------------------------------------------------


def test_a_gap_counts_as_something_owed(small: Session) -> None:
    end(small.bindings, TOOL)
    drop_through(small.bindings, 1)
    watermark = small.bindings.ops_lifecycle.completion_feed().watermark()
    with small.loop():
        small.observed(watermark)
    assert small.taken == [watermark]


def test_a_gap_that_was_applied_does_not(small: Session) -> None:
    end(small.bindings, TOOL)
    dropped = drop_through(small.bindings, 1)
    small.apply(dropped)
    watermark = small.bindings.ops_lifecycle.completion_feed().watermark()
    with small.loop():
        small.observed(watermark)
    assert small.offered == []


# --- a session that is busy -------------------------------------------------------------------


def test_a_busy_session_is_looked_at_when_something_may_have_changed(session: Session) -> None:
    session.quiet = False
    end(session.bindings, TOOL)
    loop = session.loop()
    loop._polls = _Growing(10_000.0, 10_000.0)
    with loop:
        eventually(lambda: session.looks == 1)
        # It polls once for each possible change, and never in between.
        for looks in range(2, 5):
            loop.session_changed()
            session.looked(looks)
        end(session.bindings, TOOL)
        eventually(lambda: session.looks == 5)
        assert (session.offered, session.cursors) == ([], (0, 0))
        session.quiet = True
        loop.session_changed()
        session.observed(2)
    assert session.looks == 6
    assert session.taken == [2]


def test_a_busy_session_is_looked_at_again_without_a_word(session: Session) -> None:
    session.quiet = False
    end(session.bindings, TOOL)
    with session.loop():
        session.looked(4)
        session.quiet = True
        session.observed(1)
    assert session.taken == [1]


def test_the_pauses_of_a_busy_session_grow_and_begin_anew(session: Session) -> None:
    session.quiet = False
    end(session.bindings, TOOL)
    loop = session.loop()
    pauses = Pauses(loop)
    with loop:
        eventually(lambda: len(pauses.taken) >= 10)
        session.quiet = True
        session.observed(1)
        held = [pause for pause in pauses.taken if pause <= 1.0][:10]
        assert (held[0], held[-1]) == (0.025, 1.0)
        assert held == sorted(held)
        session.quiet = False
        before = len(pauses.taken)
        end(session.bindings, TOOL)
        eventually(lambda: 0.025 in pauses.taken[before:])


def test_a_change_that_is_told_while_it_looks_is_not_lost(session: Session) -> None:
    loop = session.loop()

    def quiescent() -> bool:
        session.looks += 1
        if session.looks == 1:
            loop.session_changed()  # the session became quiescent just after it was asked
            return False
        return True

    loop._quiescent = quiescent
    end(session.bindings, TOOL)
    with loop:
        session.observed(1)
    assert session.looks == 2


# --- a session that refuses -------------------------------------------------------------------


@pytest.mark.parametrize("how", ["refuses", "raises"])
def test_a_refusal_advances_nothing_and_is_tried_again(session: Session, how: str) -> None:
    if how == "refuses":
        session.accepts = False
    else:
        session.failure = ValueError("not now")
    end(session.bindings, TOOL)
    with session.loop():
        eventually(lambda: len(session.offered) == 3)
        assert session.cursors == (0, 0)
        end(session.bindings, TOOL)
        session.accepts, session.failure = True, None
        session.observed(2)
    assert session.taken == [2], "the next attempt has what came meanwhile, too"
    assert {cursors for _, cursors in session.offered} == {EpochCursorSnapshot()}


def test_a_session_that_changed_is_tried_at_once(session: Session) -> None:
    session.accepts = False
    loop = session.loop()
    loop._retries = _Growing(10_000.0, 10_000.0)
    end(session.bindings, TOOL)
    with loop:
        eventually(lambda: len(session.offered) == 1)
        session.accepts = True
        loop.session_changed()
        session.observed(1)
    assert len(session.offered) == 2


def test_attempts_become_rarer_and_after_a_success_do_not_stay_so(session: Session) -> None:
    session.accepts = False
    loop = session.loop()
    pauses = Pauses(loop).taken
    end(session.bindings, TOOL)
    with loop:
        eventually(lambda: len(pauses) >= 12)
        session.accepts = True
        session.observed(1)
        refused = 12
        del pauses[refused:]
        session.accepts = False
        end(session.bindings, TOOL)
        eventually(lambda: len(pauses) > refused + 1)
        session.accepts = True
        session.observed(2)
    assert pauses[:refused] == sorted(pauses[:refused])
    assert pauses[0] < pauses[1] < pauses[11] == pauses[refused - 1] <= 60
    assert pauses[0] in pauses[refused:]


# --- coroutines -------------------------------------------------------------------------------


def test_inject_may_be_a_coroutine_function(session: Session) -> None:
    async def inject(continuation: Continuation) -> bool:
        await asyncio.sleep(0)
        return session.inject(continuation)

    with RuntimeLoop(session.bindings, inject=inject, quiescent=session.quiescent):
        end(session.bindings, TOOL)
        session.observed(1)
    assert session.taken == [1]


def test_a_coroutine_that_refuses_or_raises_advances_nothing(session: Session) -> None:
    async def inject(continuation: Continuation) -> bool:
        await asyncio.sleep(0)
        session.failure = ValueError("once") if len(session.offered) == 0 else None
        session.accepts = len(session.offered) > 1
        return session.inject(continuation)

    end(session.bindings, TOOL)
    with RuntimeLoop(session.bindings, inject=inject, quiescent=session.quiescent):
        session.observed(1)
    assert [cursors for _, cursors in session.offered] == [EpochCursorSnapshot()] * 3


def test_it_runs_in_an_event_loop_beside_others() -> None:
    sessions = [Session(SessionRuntimeBindings.standalone(SessionId.new())) for _ in range(3)]

    async def together() -> None:
        loops = [session.loop() for session in sessions]
        tasks = [asyncio.ensure_future(loop.run_async()) for loop in loops]
        for session in sessions:
            end(session.bindings, TOOL)
        while any(session.cursors != (1, 1) for session in sessions):
            await asyncio.sleep(0)
        for loop in loops:
            loop.stop()
        await asyncio.wait_for(asyncio.gather(*tasks), 60)

    asyncio.run(together())


def test_cancelling_it_ends_it(session: Session) -> None:
    async def cancelled() -> None:
        before = asyncio.all_tasks()
        task = asyncio.ensure_future(session.loop().run_async())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert asyncio.all_tasks() == before

    asyncio.run(asyncio.wait_for(cancelled(), 60))


# --- its end ----------------------------------------------------------------------------------


def test_stopping_ends_it_wherever_it_is(session: Session) -> None:
    for quiet, accepts in [(True, True), (False, True), (True, False)]:
        session.quiet, session.accepts = quiet, accepts
        looks = session.looks
        loop = session.loop()
        runner = runner_of(loop)
        end(session.bindings, TOOL)
        session.looked(looks + 1)
        loop.stop()
        runner.join(60)
        assert not runner.is_alive()


def test_stopping_twice_or_before_it_runs_does_nothing(session: Session) -> None:
    loop = session.loop()
    loop.stop()
    loop.stop()
    end(session.bindings, TOOL)
    with loop:
        session.observed(1)
    loop.stop()
    assert session.taken == [1]


def test_the_session_may_stop_it_from_within(session: Session) -> None:
    loop = session.loop()

    def inject(continuation: Continuation) -> bool:
        loop.stop()
        return session.inject(continuation)

    loop._inject = inject
    end(session.bindings, TOOL)
    loop.start()
    session.observed(1)
    assert session.taken == [1]


def test_a_session_that_changes_before_and_after_it_runs(session: Session) -> None:
    loop = session.loop()
    loop.session_changed()
    with loop:
        end(session.bindings, TOOL)
        session.observed(1)
    loop.session_changed()


def runner_of(loop: RuntimeLoop) -> threading.Thread:
    runner = threading.Thread(target=loop.run)
    runner.start()
    return runner


def seal(session: Session) -> None:
    session.bindings._segment.seal()


def test_the_end_of_the_epoch_ends_it_while_it_waits(session: Session) -> None:
    end(session.bindings, TOOL)
    runner = runner_of(session.loop())
    session.observed(1)
    seal(session)
    runner.join(60)
    assert not runner.is_alive()


def test_the_end_of_the_epoch_ends_it_while_the_session_is_busy(session: Session) -> None:
    session.quiet = False
    end(session.bindings, TOOL)
    runner = runner_of(session.loop())
    eventually(lambda: session.looks)
    seal(session)
    runner.join(60)
    assert not runner.is_alive()


def test_the_end_of_the_epoch_ends_it_while_it_injects(session: Session) -> None:
    def inject(continuation: Continuation) -> bool:
        seal(session)
        return session.inject(continuation)

    end(session.bindings, TOOL)
    loop = RuntimeLoop(session.bindings, inject=inject, quiescent=session.quiescent)
    runner = runner_of(loop)
    runner.join(60)
    assert not runner.is_alive()
    assert session.cursors == (0, 0)


def test_a_session_that_cannot_say_whether_it_is_quiescent_is_asked_again(session: Session) -> None:
    failures = [ValueError("not yet"), OSError("nor now")]

    def quiescent() -> bool:
        if failures:
            raise failures.pop()
        return True

    end(session.bindings, TOOL)
    with RuntimeLoop(session.bindings, inject=session.inject, quiescent=quiescent):
        session.observed(1)
    assert session.taken == [1]


def test_the_end_of_the_epoch_ends_it_while_it_is_refused(session: Session) -> None:
    session.accepts = False
    end(session.bindings, TOOL)
    loop = session.loop()
    runner = runner_of(loop)
    eventually(lambda: session.offered)
    seal(session)
    offered = len(session.offered)
    eventually(lambda: not runner.is_alive() or len(session.offered) > offered + 2)
    loop.stop()
    runner.join(60)
    assert len(session.offered) <= offered + 1, "continuations of an epoch that has ended"
