"""The run itself: sessions over one adapter, until every command has ended and was told of."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

import msgspec

from shmepoch.cli.run import leftovers, past
from shmepoch.cli.run.children import Children
from shmepoch.cli.run.inherited import leave_strangers
from shmepoch.cli.run.interruptions import Interruptions
from shmepoch.cli.run.jobs import Job
from shmepoch.cli.run.outcomes import TAIL_BYTES
from shmepoch.cli.run.plan import KeptPlan, Plan
from shmepoch.cli.run.session import MOST_UNTOLD, SessionRun
from shmepoch.cli.run.store import RunStore
from shmepoch.cli.run.summary import Notices, Summary
from shmepoch.cli.run.terminal import LastingStream, leave_if_gone
from shmepoch.cli.run.views import view_for
from shmepoch.cli.streams import complain
from shmepoch.config import OpsLifecycleConfig
from shmepoch.epoch.bindings import SessionRuntimeBindings
from shmepoch.epoch.operations import OperationStatus
from shmepoch.errors import ShmepochError, StoreError
from shmepoch.memory.namespaces import resolve_namespace
from shmepoch.memory.participants import Participant
from shmepoch.memory.removal import remove_unused
from shmepoch.runtime.adapter import RuntimeSessionAdapter
from shmepoch.runtime.supervision import EpochSupervisor
from shmepoch.stores import EpochCapture

#: The most bytes that a command's completion takes in the feed: the tail of its output, and the
#: rest.
_ENTRY_BYTES: Final = TAIL_BYTES + 1024
#: How long an interrupted run waits until its agents are told of the cancelled commands.
_LAST_TURN_S: Final = 5.0
#: How many processes may be attached to an epoch besides its workers.
_OTHERS: Final = 16
#: How long the children of a killed runtime have to notice it and end, and how often that is
#: polled.
_LEAVE_S: Final = 15.0
_POLL_S: Final = 0.05
#: How long the store may take for everything that has ended.
_STORE_S: Final = 10.0
#: How long a run still waits for its store after a second signal.
_ABANDONED_S: Final = 1.0
#: After a signal, the exit status is this plus its number.
_SIGNALLED: Final = 128


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """The options of the command line."""

    namespace: str | None = None
    sessions: int = 1
    workers: int = 2
    transcript: Path | None = None
    retries: int = 0
    store: Path | None = None
    resume: bool = False
    kill_every: float | None = None
    seed: int | None = None
    json: bool = False


class ChildrenLeft(ShmepochError):
    """Children of the resumed run are still alive, so they cannot be replaced."""

    left: Sequence[Participant]

    def _text(self) -> str:
        who = ", ".join(f"{one.role} process {one.pid}" for one in self.left)
        return (
            f"the run to be resumed still has {who}, {_LEAVE_S:.0f} s after its runtime ended; "
            "end it and try again"
        )


def execute(jobs: list[Job], options: Options) -> int:
    """Run the commands; returns the exit status.

    An error that ends the run is raised after everything was ended.
    """
    leave_strangers()
    interruptions = Interruptions()
    children = Children()  # before the plan is stored, since it starts a process
    with contextlib.ExitStack() as stack:
        stack.callback(interruptions.end)
        folder = options.transcript
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="shmepoch-")))
        store, kept = None, None
        namespace = resolve_namespace(options.namespace)
        plan = Plan.new(jobs, options.sessions, namespace, kept=options.store is not None)
        if options.store is not None:
            store = stack.enter_context(RunStore(options.store))
            if options.resume:
                kept = KeptPlan.resume(store, jobs, options.sessions, options.namespace)
                plan = kept.plan
            else:
                kept = KeptPlan.begin(store, plan)
        running = _Run(plan, options, folder, store, kept, interruptions, children)
        try:
            status, summary = asyncio.run(running.run())
        except StoreError:
            if options.store is not None and running.resumable:
                _say_how_to_resume(options.store)
            raise
    line = summary.line()
    if options.json:
        line = msgspec.json.format(msgspec.json.encode(summary)).decode()
    print(line, file=LastingStream(sys.stdout), flush=True)  # flushed: it must not be lost
    if options.store is not None and status >= _SIGNALLED:
        _say_how_to_resume(options.store)
    return status


def _say_how_to_resume(store: Path) -> None:
    how = f"--store {shlex.quote(str(store))} --resume carries on with this run"
    print(f"shmepoch: {how}", file=sys.stderr, flush=True)


class _Run:
    def __init__(
        self,
        plan: Plan,
        options: Options,
        transcripts: Path,
        store: RunStore | None,
        kept: KeptPlan | None,
        interruptions: Interruptions,
        children: Children,
    ) -> None:
        self._plan = plan
        self._options = options
        self._transcripts = transcripts
        self._store = store
        self._kept = kept
        self._interruptions = interruptions
        #: Whether the run can be resumed later.
        self.resumable = options.resume
        self._view = view_for(sys.stderr if options.json else sys.stdout)
        self._children = children
        self._sessions: list[SessionRun] = []
        self._kills = 0
        self._signal: int | None = None
        self._interrupted = asyncio.Event()
        self._abandoned = asyncio.Event()
        self._error: BaseException | None = None
        self._broken = asyncio.Event()

    async def run(self) -> tuple[int, Summary]:
        """Run everything; returns the exit status and the summary."""
        began = time.monotonic()
        self._listen()
        leftovers.remove_left_over(self._plan.namespace)
        adapter = self._adapter()
        try:
            with contextlib.ExitStack() as stack:
                await self._open(adapter)
                self.resumable = self._kept is not None
                stack.callback(self._view.close)
                self._view.began(self._sessions, len(self._plan.jobs))
                try:
                    await self._until_finished()
                finally:
                    await asyncio.gather(*(session.end() for session in self._sessions))
                interrupted = self._signal
                self.resumable = self.resumable and interrupted is not None
                summary = self._summary(time.monotonic() - began)
        finally:
            await self._leave(adapter)
        if interrupted is not None:
            return _SIGNALLED + interrupted, summary
        return int(any(s.undecided or s.not_completed for s in self._sessions)), summary

    def _listen(self) -> None:
        """Listen to signals, to errors in callbacks, which are not awaited, and to the store."""
        loop = asyncio.get_running_loop()

        def fail(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
            self._error = (
                self._error or context.get("exception") or RuntimeError(context["message"])
            )
            self._broken.set()

        self._interruptions.pass_to(self._interrupt)
        loop.set_exception_handler(fail)
        if self._store is not None:
            self._store.on_saved = lambda saved: loop.call_soon_threadsafe(self._saved, saved)

    def _interrupt(self, number: int) -> None:
        """The first signal ends the run regularly, the second one at once."""
        leave_if_gone()
        if self._signal is None:
            self._signal = number
            self._interrupted.set()
            return
        self._abandoned.set()
        for session in self._sessions:
            session.abandon()

    def _saved(self, captures: Sequence[EpochCapture]) -> None:
        durable = {one.snapshot.epoch_id: one.snapshot.entries for one in captures}
        for session in self._sessions:
            entries = durable.get(session.bindings.epoch_id)
            session.stored_through(entries[-1].seq if entries else 0)

    def _adapter(self) -> RuntimeSessionAdapter:
        namespace, config = self._plan.namespace, self._config()
        if self._store is None:
            return RuntimeSessionAdapter.ephemeral(namespace=namespace, config=config)
        return RuntimeSessionAdapter.persistent(self._store, namespace=namespace, config=config)

    async def _open(self, adapter: RuntimeSessionAdapter) -> None:
        options = self._options
        opened = [adapter.prepare_bindings(id) for id in self._plan.sessions]
        if options.resume:
            await self._until_alone(opened)
            await self._until_stored(opened)
        for number, bindings in enumerate(opened, 1):
            room = bindings.shared_segment().layout.max_participants - _OTHERS
            self._sessions.append(
                SessionRun(
                    number,
                    bindings,
                    self._plan.of_session(number),
                    past.read(bindings, self._store),
                    children=self._children,
                    workers=min(options.workers, room),
                    retries=options.retries,
                    transcripts=self._transcripts,
                    store=options.store,
                    view=self._view,
                )
            )

    async def _until_alone(self, opened: Sequence[SessionRuntimeBindings]) -> None:
        """Wait for the children of a killed runtime, and end the operations that they left."""
        deadline = time.monotonic() + _LEAVE_S
        while left := [one for bindings in opened for one in past.left_behind(bindings)]:
            if self._interrupted.is_set():
                return
            if time.monotonic() > deadline:
                raise ChildrenLeft(left)
            await asyncio.sleep(_POLL_S)
        for bindings in opened:
            EpochSupervisor(bindings).settle()

    async def _until_stored(self, opened: Sequence[SessionRuntimeBindings]) -> None:
        """Wait until the store has the completions of the earlier run that are in the live
        epochs."""
        deadline = time.monotonic() + _STORE_S
        for bindings in opened:
            feed = bindings.ops_lifecycle.completion_feed()
            if through := feed.watermark():
                try:
                    await asyncio.to_thread(feed.wait_durable, through, deadline - time.monotonic())
                except TimeoutError:
                    raise self._store_behind() from None

    async def _leave(self, adapter: RuntimeSessionAdapter) -> None:
        """End the sessions, or leave them for the run that continues them.

        It runs in a thread, since a store may be slow: a second signal is still handled.
        """
        if self._store is None:
            self._end_sessions(adapter)
            return
        ended = asyncio.ensure_future(asyncio.to_thread(self._end_sessions, adapter))
        abandoned = asyncio.ensure_future(self._abandoned.wait())
        await asyncio.wait((ended, abandoned), return_when=asyncio.FIRST_COMPLETED)
        await asyncio.wait([ended], timeout=_ABANDONED_S)
        abandoned.cancel()
        if not ended.done():
            self._end_at_once()
        ended.result()

    def _end_sessions(self, adapter: RuntimeSessionAdapter) -> None:
        with adapter:  # closing it stores the rest
            if not self.resumable:
                for id in self._plan.sessions:
                    if adapter.contains_session(id):
                        adapter.unregister_session(id)
                if self._kept is not None:
                    self._kept.finish()
        if self.resumable:
            for session in self._sessions:
                if session.stored:
                    remove_unused(self._plan.namespace, session.bindings.session_id)

    def _end_at_once(self) -> NoReturn:
        """Stop waiting for the store; anything that it lacks is in shared memory."""
        if self._options.transcript is None:
            shutil.rmtree(self._transcripts, ignore_errors=True)
        complain(self._store_behind())
        if self._options.store is not None:
            _say_how_to_resume(self._options.store)
        os._exit(_SIGNALLED + (self._signal or signal.SIGINT))

    def _config(self) -> OpsLifecycleConfig:
        workers = self._options.workers
        return OpsLifecycleConfig(
            max_operations=2 * workers + 64,  # including those of workers that have just died
            feed_bytes=(MOST_UNTOLD + workers) * _ENTRY_BYTES,
            max_participants=workers + _OTHERS,
        )

    async def _until_finished(self) -> None:
        if not self._interrupted.is_set():
            for session in self._sessions:
                session.start()
            awaited = [self._all_finished(), self._interrupted.wait()]
            if self._options.kill_every is not None:
                awaited.append(self._kill_every(self._options.kill_every))
            await self._first_of(awaited)
        if self._signal is not None:
            self._view.interrupted(
                signal.Signals(self._signal).name,
                sum(session.running for session in self._sessions),
                sum(session.waiting for session in self._sessions),
            )
            reason = "the run was interrupted"
            await asyncio.gather(*(session.cancel(reason) for session in self._sessions))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LAST_TURN_S):
                    await self._first_of([self._all_finished(), self._abandoned.wait()])

    async def _first_of(self, awaited: Sequence[Coroutine[Any, Any, object]]) -> None:
        """Wait until one of `awaited` is done; raise an error that breaks the run before that."""
        tasks = [asyncio.create_task(one) for one in (*awaited, self._broken.wait())]
        running = [task for session in self._sessions for task in session.tasks]
        try:
            done, _ = await asyncio.wait([*tasks, *running], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
        for task in done:
            task.result()
        if self._error is not None:
            raise self._error

    async def _all_finished(self) -> None:
        for session in self._sessions:
            await session.finished.wait()
        try:
            async with asyncio.timeout(_STORE_S):
                for session in self._sessions:
                    await session.settled.wait()
        except TimeoutError:
            for session in self._sessions:
                session.stored_through(0)
            if not all(session.settled.is_set() for session in self._sessions):
                raise self._store_behind() from None

    def _store_behind(self) -> StoreError:
        assert self._store is not None
        return self._store.behind(_STORE_S)

    async def _kill_every(self, seconds: float) -> None:
        chance = random.Random(self._options.seed)
        while True:
            await asyncio.sleep(seconds)
            session = chance.choice(self._sessions)
            if not session.finished.is_set():
                self._kills += chance.choice(session.children()).kill()

    def _summary(self, duration_s: float) -> Summary:
        sessions = [session.summary() for session in self._sessions]

        def count(status: OperationStatus) -> int:
            return sum(session.counts.get(status, 0) for session in self._sessions)

        return Summary(
            commands=len(self._plan.jobs),
            finished_before=sum(session.finished_before for session in self._sessions),
            operations=sum(session.operations for session in self._sessions),
            completed=count(OperationStatus.COMPLETED),
            failed=count(OperationStatus.FAILED),
            terminated=count(OperationStatus.TERMINATED),
            cancelled=count(OperationStatus.CANCELLED),
            retried=sum(session.retried for session in self._sessions),
            notices=Notices(
                delivered=sum(session.notices.delivered for session in sessions),
                duplicates=sum(session.notices.duplicates for session in sessions),
                lost=sum(session.notices.lost for session in sessions),
            ),
            kills=self._kills,
            restarts=sum(session.restarts for session in self._sessions),
            duration_s=round(duration_s, 3),
            sessions=sessions,
        )
