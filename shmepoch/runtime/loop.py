"""The runtime loop: turns completions into continuations of the session's agent."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Final, NamedTuple, Self

from shmepoch._native import LOOP_BYTE
from shmepoch.arguments import require, require_callable
from shmepoch.epoch.bindings import SessionRuntimeBindings
from shmepoch.epoch.codec import Record
from shmepoch.epoch.completions import CompletionBatch, CompletionSeq
from shmepoch.epoch.cursors import EpochCursorSnapshot
from shmepoch.epoch.operations import OperationKind
from shmepoch.errors import EpochGone, EpochSealed, LoopAlreadyActive, LoopAnswerInvalid
from shmepoch.events import Event, about
from shmepoch.ids import RuntimeEpochId, SessionId
from shmepoch.memory.claims import Claim
from shmepoch.memory.participants import Role
from shmepoch.runtime.ahead import CursorsAhead

_log = logging.getLogger(__name__)

#: A position that no feed reaches: a wait for it ends with the epoch.
_THE_END: Final = 2**64 - 1


class Continuation(Record, kw_only=True, frozen=True):
    """A reason for a new turn: completions up to `watermark` that the agent has not been told
    of."""

    session_id: SessionId
    epoch_id: RuntimeEpochId
    watermark: CompletionSeq


class _Pause(NamedTuple):
    """The end of a pause, besides `session_changed`: the feed above `after`, or `timeout`
    seconds."""

    after: CompletionSeq
    timeout: float | None = None


class _Growing:
    """Pauses in seconds, each twice as long as the one before, up to a longest one."""

    def __init__(self, first: float, longest: float) -> None:
        self._first: Final = first
        self._longest: Final = longest
        self._next = first

    def take(self) -> float:
        """The next pause."""
        pause = self._next
        self._next = min(2 * pause, self._longest)
        return pause

    def reset(self) -> None:
        """Begin again with the first one."""
        self._next = self._first


class _Owed:
    """The completions up to `through` that the agent must be told of, and the promises for them.

    LOOP-2: only the agent's cursor proves that it was told. An accepted continuation is a promise
    for a while: long enough for the turn to begin. After that, completions that are still owed are
    offered again, after growing pauses.
    """

    def __init__(self, applied: CompletionSeq) -> None:
        self.through = applied
        self.examined = applied
        self._promised = applied
        self._promise_ends = 0.0
        self._promises: Final = _Growing(0.5, 30.0)

    def examine(self, batch: CompletionBatch) -> None:
        """Find the completions that wake the agent, in a batch that follows `examined`."""
        # Dropped completions may have been owed, so a gap counts as owed.
        if batch.dropped_through > self.examined:
            self.through = max(self.through, batch.dropped_through)
        for entry in reversed(batch.entries):
            if entry.kind is OperationKind.BACKGROUND_TOOL_OP:
                self.through = max(self.through, entry.seq)
                break
        self.examined = max(self.examined, batch.watermark)

    def promise(self, watermark: CompletionSeq) -> float:
        """Record that a continuation up to `watermark` was accepted; returns for how many seconds
        that is good."""
        if self.through > self._promised:
            self._promises.reset()
        self._promised = watermark
        good_for = self._promises.take()
        self._promise_ends = time.monotonic() + good_for
        return good_for

    def promised_for(self) -> float:
        """For how many more seconds everything that is owed is promised."""
        if self.through > self._promised:
            return 0.0
        return max(0.0, self._promise_ends - time.monotonic())


class _Run:
    """One run of a loop, which any thread and any signal handler may wake or stop."""

    def __init__(self, claim: Claim) -> None:
        self.claim: Final = claim
        self._stopping = False
        self._wake: Final = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[object] | None = None
        self._cancellations = 0

    def begin(self) -> None:
        """Make the running task the one to wake, in its event loop."""
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self._cancellations = self._task.cancelling() if self._task else 0

    @property
    def cancelled(self) -> bool:
        """Whether its task was cancelled, and not only an awaitable of the task."""
        return self._task is None or self._task.cancelling() > self._cancellations

    @property
    def over(self) -> bool:
        """Whether the run must end: it was stopped, or its bindings were closed."""
        return self._stopping or not self.claim.held

    def stop(self) -> None:
        self._stopping = True
        self.wake()

    def wake(self) -> None:
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the event loop was closed
                self._loop.call_soon_threadsafe(self._wake.set)

    async def woken(self) -> None:
        """Wait until it is woken. After that it can be woken again."""
        await self._wake.wait()
        self._wake.clear()


class RuntimeLoop:
    """Follows one epoch's feed and injects one continuation into the session when it is quiescent.

    `inject` hands a continuation to the session and returns True if it was accepted and False if
    it was refused; it may be a coroutine function. `quiescent` returns whether the session is
    between turns; call `session_changed` whenever its answer may have changed. An error of either
    is logged, and counts as a refusal: the loop tries again later. So does the cancellation of an
    injection while the loop is not cancelled. An answer other than True and False ends the loop
    with `LoopAnswerInvalid`.

    An epoch has one running loop; it may run again after its end, and in another event loop.

    LOOP-1: only an accepted continuation advances `runtime_last_injected_seq`.
    `runtime_observed_seq` is never advanced past a completion that is owed, and for which no
    continuation was accepted.
    """

    def __init__(
        self,
        bindings: SessionRuntimeBindings,
        *,
        inject: Callable[[Continuation], bool | Awaitable[bool]],
        quiescent: Callable[[], bool],
    ) -> None:
        require(SessionRuntimeBindings, bindings, "RuntimeLoop", "bindings")
        require_callable(inject, "RuntimeLoop", "inject")
        require_callable(quiescent, "RuntimeLoop", "quiescent")
        self._bindings = bindings
        self._feed = bindings.ops_lifecycle.completion_feed()
        self._cursors = bindings.cursor_state
        self._inject = inject
        self._quiescent = quiescent
        self._retries = _Growing(0.05, 5.0)
        self._polls = _Growing(0.025, 1.0)
        self._ahead = CursorsAhead(bindings)
        self._run: _Run | None = None
        self._thread: threading.Thread | None = None
        self._task: asyncio.Task[None] | None = None
        self._failure: BaseException | None = None

    # --- driving it ---------------------------------------------------------------------------

    async def run_async(self) -> None:
        """Run until `stop` is called, the epoch ends or the bindings are closed.

        Raises `LoopAlreadyActive` while a loop runs on the epoch, in this process or another one,
        `BindingsClosed`, and `LoopAnswerInvalid`.
        """
        await self._drive(self._begin())

    def run(self) -> None:
        """Run in this thread; otherwise like `run_async`."""
        asyncio.run(self.run_async())

    def start(self) -> Self:
        """Run in a new thread. An error that ends the thread is logged, and raised by `stop`.

        Raises `LoopAlreadyActive` while a loop runs on the epoch, this one included.
        """
        run = self._begin()
        self._failure = None
        name = f"shmepoch-loop-{self._bindings.session_id}"
        try:
            thread = threading.Thread(
                target=self._run_in_thread, args=(run,), name=name, daemon=True
            )
            thread.start()
        except BaseException:
            run.claim.release()
            raise
        self._thread = thread
        return self

    def stop(self) -> None:
        """End the run, from any thread, and wait for the thread of `start`.

        Without a run it does nothing, and does not affect the next run. Raises, once, the error
        that ended the thread of `start`.
        """
        run = self._run
        if run is not None:
            run.stop()
        thread = self._thread
        if thread is None or thread is threading.current_thread():
            return
        thread.join()
        self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def session_changed(self) -> None:
        """Poll again: the session may have become quiescent. From any thread."""
        run = self._run
        if run is not None:
            run.wake()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.stop()

    async def __aenter__(self) -> Self:
        """Run as a task of this event loop; what ends it is raised on exit."""
        self._task = asyncio.create_task(self._drive(self._begin()))
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.stop()
        if self._task is not None:
            await self._task

    def __repr__(self) -> str:
        running = self._run is not None and self._run.claim.held
        state = "running" if running else "not running"
        return f"RuntimeLoop(session_id={self._bindings.session_id!r}, {state})"

    def _begin(self) -> _Run:
        claim = self._bindings.claim(LOOP_BYTE)
        if claim is None:
            pid = self._bindings.claimed_by(LOOP_BYTE, Role.RUNTIME)
            raise LoopAlreadyActive(self._bindings.session_id, pid)
        self._run = _Run(claim)
        return self._run

    def _run_in_thread(self, run: _Run) -> None:
        try:
            asyncio.run(self._drive(run))
        except BaseException as error:
            self._failure = error
            session_id = self._bindings.session_id
            _log.error(
                "the loop of session %s ended: %s",
                session_id,
                error,
                exc_info=error,
                extra=about(
                    Event.LOOP_FAILED,
                    session=session_id,
                    epoch=self._bindings.epoch_id,
                    reason=str(error),
                ),
            )
        finally:
            run.claim.release()

    async def _drive(self, run: _Run) -> None:
        session_id, epoch_id = self._bindings.session_id, self._bindings.epoch_id
        try:
            run.begin()
            self._retries.reset()
            self._polls.reset()
            owed = _Owed(self._cursors.agent_applied_cursor.load())
            while not run.over:
                await self._pause(run, await self._step(run, owed))
            _log.debug(
                "the loop of session %s ends",
                session_id,
                extra=about(Event.LOOP_STOPPED, session=session_id, epoch=epoch_id),
            )
        except EpochSealed:
            _log.info(
                "epoch %s was sealed; its loop ends",
                epoch_id,
                extra=about(Event.LOOP_ENDED, session=session_id, epoch=epoch_id),
            )
        except EpochGone as error:
            _log.error(
                "the loop of session %s ends: %s",
                session_id,
                error,
                extra=about(
                    Event.LOOP_FAILED, session=session_id, epoch=epoch_id, reason=str(error)
                ),
            )
        finally:
            run.claim.release()

    # --- what it does -------------------------------------------------------------------------

    async def _step(self, run: _Run, owed: _Owed) -> _Pause:
        cursors = self._cursors.snapshot()  # read before the batch, with which they are compared
        batch = self._feed.list_since(owed.examined)
        for name in EpochCursorSnapshot.__struct_fields__:
            self._ahead.check(name, getattr(cursors, name), batch.watermark)
        owed.examine(batch)
        is_owed = self._cursors.agent_applied_cursor.load() < owed.through
        promised_for = owed.promised_for() if is_owed else 0.0
        if is_owed and not promised_for:
            accepted = await self._offer(run, batch.watermark)
            if accepted is None:
                return _Pause(batch.watermark, self._polls.take())
            self._polls.reset()
            if not accepted:
                return _Pause(_THE_END, self._retries.take())
            promised_for = owed.promise(batch.watermark)
            self._cursors.runtime_last_injected_seq.advance(batch.watermark)
        self._polls.reset()
        self._retries.reset()
        self._cursors.runtime_observed_seq.advance(batch.watermark)
        return _Pause(batch.watermark, promised_for or None)

    async def _offer(self, run: _Run, watermark: CompletionSeq) -> bool | None:
        """Whether the session took the continuation; None if the session is not quiescent."""
        continuation = Continuation(
            session_id=self._bindings.session_id,
            epoch_id=self._bindings.epoch_id,
            watermark=watermark,
        )
        try:
            if not _answer("quiescent", self._quiescent()):
                return None
            answer = self._inject(continuation)
            return _answer("inject", await answer if inspect.isawaitable(answer) else answer)
        except LoopAnswerInvalid:
            raise
        except asyncio.CancelledError:
            if run.cancelled:
                raise
            _log.warning(
                "injecting into session %s was cancelled",
                continuation.session_id,
                extra=about(
                    Event.INJECTION_CANCELLED,
                    session=continuation.session_id,
                    epoch=continuation.epoch_id,
                    seq=watermark,
                ),
            )
        except Exception as error:
            _log.exception(
                "injecting into session %s failed",
                continuation.session_id,
                extra=about(
                    Event.INJECTION_FAILED,
                    session=continuation.session_id,
                    epoch=continuation.epoch_id,
                    seq=watermark,
                    reason=str(error),
                ),
            )
        return False

    async def _pause(self, run: _Run, pause: _Pause) -> None:
        waits: set[asyncio.Future[object]] = {
            asyncio.ensure_future(run.woken()),
            asyncio.ensure_future(self._feed.advanced(pause.after)),
        }
        try:
            done, _ = await asyncio.wait(
                waits, timeout=pause.timeout, return_when=asyncio.FIRST_COMPLETED
            )
            for wait in done:
                wait.result()  # an ended epoch ends the loop
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)


def _answer(question: str, answer: object) -> bool:
    if not isinstance(answer, bool):
        raise LoopAnswerInvalid(question, repr(answer))
    return answer
