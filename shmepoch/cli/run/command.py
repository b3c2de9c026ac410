"""The run itself: sessions over one adapter, until every command is decided and told of."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import sys
import tempfile
import time
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from shmepoch.cli.run.children import Children
from shmepoch.cli.run.jobs import Job
from shmepoch.cli.run.session import MOST_UNTOLD, SessionRun
from shmepoch.cli.run.summary import Notices, Summary
from shmepoch.cli.run.views import view_for
from shmepoch.cli.run.worker import TAIL_BYTES
from shmepoch.epoch.operations import OperationStatus
from shmepoch.ids import SessionId
from shmepoch.memory.layout import OpsLifecycleConfig
from shmepoch.runtime.adapter import RuntimeSessionAdapter

#: What the completion of a command takes in the feed at most: the tail of its output, and the rest.
_ENTRY_BYTES: Final = TAIL_BYTES + 1024
#: How long an interrupted run waits for its agents to be told of what was cancelled.
_LAST_TURN_S: Final = 5.0
#: What ends a run early, and as if it had ended by it.
_INTERRUPTIONS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """How to run, as the command line says it."""

    sessions: int = 1
    workers: int = 2
    transcript: Path | None = None
    retries: int = 0
    kill_every: float | None = None
    seed: int | None = None
    json: bool = False


def execute(jobs: list[Job], options: Options) -> int:
    """Run the commands; the exit status.

    What made it impossible to go on is raised once everything was ended.
    """
    with contextlib.ExitStack() as stack:
        folder = options.transcript
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="shmepoch-")))
        status, summary = asyncio.run(_Run(jobs, options, folder).run())
    if options.json:
        print(msgspec.json.format(msgspec.json.encode(summary)).decode())
    else:
        print(summary.line())
    return status


class _Run:
    def __init__(self, jobs: list[Job], options: Options, transcripts: Path) -> None:
        self._jobs = jobs
        self._options = options
        self._transcripts = transcripts
        self._view = view_for(sys.stderr if options.json else sys.stdout)
        self._children = Children()
        self._sessions: list[SessionRun] = []
        self._kills = 0
        self._signal: int | None = None
        self._interrupted = asyncio.Event()
        self._error: BaseException | None = None
        self._broken = asyncio.Event()

    async def run(self) -> tuple[int, Summary]:
        """Everything; the exit status, and what it came to."""
        began = time.monotonic()
        self._listen()
        with contextlib.ExitStack() as stack:
            self._open(stack)
            stack.callback(self._view.close)
            self._view.began(self._sessions, len(self._jobs))
            try:
                await self._until_finished()
            finally:
                await asyncio.gather(*(session.end() for session in self._sessions))
            summary = self._summary(time.monotonic() - began)
        if self._signal is not None:
            return 128 + self._signal, summary
        return int(any(s.undecided or s.not_completed for s in self._sessions)), summary

    def _listen(self) -> None:
        """Hear of signals, and of errors in callbacks, which nobody awaits."""
        loop = asyncio.get_running_loop()

        def interrupt(number: int) -> None:
            self._signal = self._signal or number
            self._interrupted.set()

        def fail(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
            self._error = (
                self._error or context.get("exception") or RuntimeError(context["message"])
            )
            self._broken.set()

        for number in _INTERRUPTIONS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
                loop.add_signal_handler(number, interrupt, number)
        loop.set_exception_handler(fail)

    def _open(self, stack: contextlib.ExitStack) -> None:
        options = self._options
        adapter = stack.enter_context(RuntimeSessionAdapter.ephemeral(config=self._config()))
        count = min(options.sessions, len(self._jobs))
        for number in range(1, count + 1):
            bindings = adapter.prepare_bindings(SessionId.new())
            stack.callback(adapter.unregister_session, bindings.session_id)
            self._sessions.append(
                SessionRun(
                    number,
                    bindings,
                    self._jobs[number - 1 :: count],
                    children=self._children,
                    workers=options.workers,
                    retries=options.retries,
                    transcripts=self._transcripts,
                    view=self._view,
                )
            )

    def _config(self) -> OpsLifecycleConfig:
        workers = self._options.workers
        return OpsLifecycleConfig(
            max_operations=2 * workers + 64,  # those of workers that have just died among them
            feed_bytes=(MOST_UNTOLD + workers) * _ENTRY_BYTES,
            max_participants=workers + 16,
        )

    async def _until_finished(self) -> None:
        for session in self._sessions:
            session.start()
        awaited = [self._all_finished(), self._interrupted.wait()]
        if self._options.kill_every is not None:
            awaited.append(self._kill_every(self._options.kill_every))
        await self._first_of(awaited)
        if self._interrupted.is_set():
            reason = "the run was interrupted"
            await asyncio.gather(*(session.cancel(reason) for session in self._sessions))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LAST_TURN_S):
                    await self._first_of([self._all_finished()])

    async def _first_of(self, awaited: Sequence[Coroutine[Any, Any, object]]) -> None:
        """Wait until one of `awaited` is done; raise what breaks the run before that."""
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
            commands=len(self._jobs),
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
