"""The run itself: sessions over one adapter, until every command is decided and told of."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import msgspec

from shmepoch.cli.run.jobs import Job
from shmepoch.cli.run.session import SessionRun
from shmepoch.cli.run.summary import Notices, Summary
from shmepoch.cli.run.views import view_for
from shmepoch.epoch.operations import OperationStatus
from shmepoch.ids import SessionId
from shmepoch.memory.layout import MAX_PARTICIPANTS, OpsLifecycleConfig
from shmepoch.runtime.adapter import RuntimeSessionAdapter

#: Room for the tails of some thousand commands that the agent has not been told of yet.
_FEED_BYTES: Final = 4 * 1024 * 1024
#: How long an interrupted run waits for its agents to be told of what was cancelled.
_LAST_TURN_S: Final = 2.0


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
    """Run the commands; the exit status."""
    with contextlib.ExitStack() as stack:
        folder = options.transcript
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="shmepoch-")))
        folder.mkdir(parents=True, exist_ok=True)
        run = _Run(jobs, options, folder)
        status, summary = asyncio.run(run.run())
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
        self._sessions: list[SessionRun] = []
        self._kills = 0
        self._signal: int | None = None

    async def run(self) -> tuple[int, Summary]:
        """Everything; the exit status, and what it came to."""
        began = time.monotonic()
        with self._adapter() as adapter:
            try:
                self._open(adapter)
                await self._until_finished()
            finally:
                await asyncio.gather(*(session.end() for session in self._sessions))
                self._view.close()
                summary = self._summary(time.monotonic() - began)
                for session in self._sessions:
                    adapter.unregister_session(session.bindings.session_id)
        if self._signal is not None:
            return 128 + self._signal, summary
        return int(any(session.not_completed for session in self._sessions)), summary

    def _adapter(self) -> RuntimeSessionAdapter:
        participants = min(MAX_PARTICIPANTS, max(64, 2 * (self._options.workers + 2)))
        config = OpsLifecycleConfig(feed_bytes=_FEED_BYTES, max_participants=participants)
        return RuntimeSessionAdapter.ephemeral(config=config)

    def _open(self, adapter: RuntimeSessionAdapter) -> None:
        options = self._options
        count = min(options.sessions, len(self._jobs))
        for number in range(1, count + 1):
            self._sessions.append(
                SessionRun(
                    number,
                    adapter.prepare_bindings(SessionId.new()),
                    self._jobs[number - 1 :: count],
                    workers=options.workers,
                    retries=options.retries,
                    transcripts=self._transcripts,
                    view=self._view,
                )
            )
        self._view.began(self._sessions, len(self._jobs))
        for session in self._sessions:
            session.start()

    async def _until_finished(self) -> None:
        loop = asyncio.get_running_loop()
        interrupted = asyncio.Event()

        def interrupt(number: int) -> None:
            self._signal = self._signal or number
            interrupted.set()

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, interrupt, number)
        tasks: list[asyncio.Task[Any]] = [
            asyncio.create_task(self._all_finished()),
            asyncio.create_task(interrupted.wait()),
        ]
        if self._options.kill_every is not None:
            tasks.append(asyncio.create_task(self._kill_every(self._options.kill_every)))
        done, rest = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)
        for task in done:
            task.result()
        if interrupted.is_set():
            for session in self._sessions:
                session.cancel("the run was interrupted")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._all_finished(), _LAST_TURN_S)

    async def _all_finished(self) -> None:
        for session in self._sessions:
            await session.finished.wait()

    async def _kill_every(self, seconds: float) -> None:
        chance = random.Random(self._options.seed)
        while True:
            await asyncio.sleep(seconds)
            session = chance.choice(self._sessions)
            victims = session.children()
            if victims and not session.finished.is_set():
                victim = chance.choice(victims)
                session.killed.add(victim.pid)
                victim.kill()
                self._kills += 1

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
