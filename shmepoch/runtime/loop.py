"""The runtime loop: turns completions into continuations of the session's agent."""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
from collections.abc import Awaitable, Callable
from typing import Final, NamedTuple, Self

from shmepoch.epoch.bindings import SessionRuntimeBindings
from shmepoch.epoch.codec import Record
from shmepoch.epoch.completions import CompletionSeq
from shmepoch.epoch.operations import OperationKind
from shmepoch.errors import EpochSealed
from shmepoch.ids import RuntimeEpochId, SessionId

_log = logging.getLogger(__name__)

_FIRST_RETRY_S: Final = 0.05
_LAST_RETRY_S: Final = 5.0
#: A position that no feed gets above: waiting for it is waiting for the end of the epoch.
_THE_END: Final = 2**64 - 1


class Continuation(Record, kw_only=True, frozen=True):
    """A reason to go on: completions up to `watermark` that the agent has not been told of."""

    session_id: SessionId
    epoch_id: RuntimeEpochId
    watermark: CompletionSeq


class _Pause(NamedTuple):
    """What to wait for, besides `session_changed`: the feed above `after`, or `timeout` seconds."""

    after: CompletionSeq
    timeout: float | None = None


class RuntimeLoop:
    """Follows one epoch's feed and injects one continuation into the session when it is quiescent.

    `inject` hands a continuation to the session and returns whether it was accepted; it may be a
    coroutine function. `quiescent` says whether the session is between turns; call
    `session_changed` whenever its answer may have changed. What either of them raises is logged,
    and they are asked again later, as after a refusal.

    LOOP-1: only an accepted continuation advances `runtime_last_injected_seq`, and nothing
    advances `runtime_observed_seq` past an obligation that was not met.
    """

    def __init__(
        self,
        bindings: SessionRuntimeBindings,
        *,
        inject: Callable[[Continuation], bool | Awaitable[bool]],
        quiescent: Callable[[], bool],
    ) -> None:
        self._bindings = bindings
        self._feed = bindings.ops_lifecycle.completion_feed()
        self._observed = bindings.cursor_state.runtime_observed_seq
        self._injected = bindings.cursor_state.runtime_last_injected_seq
        self._inject = inject
        self._quiescent = quiescent
        self._retry_s = _FIRST_RETRY_S
        self._state = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake = asyncio.Event()
        self._stopping = False
        self._thread: threading.Thread | None = None

    # --- driving it ---------------------------------------------------------------------------

    async def run_async(self) -> None:
        """Run until `stop` is called or the epoch ends."""
        with self._state:
            self._loop = asyncio.get_running_loop()
        try:
            while not self._stopping:
                self._wake.clear()
                await self._pause(await self._step())
        except EpochSealed:
            _log.info("epoch %s was sealed; its loop ends", self._bindings.epoch_id)
        finally:
            with self._state:
                self._loop = None

    def run(self) -> None:
        """Run in this thread, until `stop` is called or the epoch ends."""
        asyncio.run(self.run_async())

    def start(self) -> Self:
        """Run in a thread of its own."""
        self._thread = threading.Thread(
            target=self.run, name=f"shmepoch-loop-{self._bindings.session_id}", daemon=True
        )
        self._thread.start()
        return self

    def stop(self) -> None:
        """End the loop, from any thread, and wait for the thread of `start`."""
        self._stopping = True
        self.session_changed()
        thread, self._thread = self._thread, None
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def session_changed(self) -> None:
        """Look again: the session may have become quiescent. From any thread."""
        with self._state:
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._wake.set)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.stop()

    # --- what it does -------------------------------------------------------------------------

    async def _step(self) -> _Pause:
        observed = self._observed.load()
        batch = self._feed.list_since(observed)
        if batch.watermark <= observed:
            return _Pause(observed)
        injected = self._injected.load()
        # What was dropped may have carried an obligation, so a gap counts as one.
        owed = batch.dropped_through > max(observed, injected) or any(
            entry.seq > injected and entry.kind is OperationKind.BACKGROUND_TOOL_OP
            for entry in batch.entries
        )
        if owed:
            accepted = await self._offer(batch.watermark)
            if accepted is None:
                return _Pause(batch.watermark)
            if not accepted:
                pause = _Pause(_THE_END, self._retry_s)
                self._retry_s = min(self._retry_s * 2, _LAST_RETRY_S)
                return pause
            self._injected.advance(batch.watermark)
        self._retry_s = _FIRST_RETRY_S
        self._observed.advance(batch.watermark)
        return _Pause(batch.watermark)

    async def _offer(self, watermark: CompletionSeq) -> bool | None:
        """Whether the session took the continuation; None if it is not the moment to offer it."""
        continuation = Continuation(
            session_id=self._bindings.session_id,
            epoch_id=self._bindings.epoch_id,
            watermark=watermark,
        )
        try:
            if not self._quiescent():
                return None
            answer = self._inject(continuation)
            return bool(await answer if inspect.isawaitable(answer) else answer)
        except Exception:
            _log.exception(
                "injecting into session %s failed; trying again in %.2f s",
                self._bindings.session_id,
                self._retry_s,
            )
            return False

    async def _pause(self, pause: _Pause) -> None:
        waits: set[asyncio.Future[object]] = {
            asyncio.ensure_future(self._wake.wait()),
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
