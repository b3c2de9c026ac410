"""One session of a run: its commands, its agent and workers, and its runtime loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, deque
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

from shmepoch.cli.run import agent, transcript, worker
from shmepoch.cli.run.children import Child, ChildFailed, Children
from shmepoch.cli.run.events import View
from shmepoch.cli.run.jobs import Job
from shmepoch.cli.run.messages import Assignment, Idle, Turn
from shmepoch.cli.run.past import FINISHED, Past, operation_id
from shmepoch.cli.run.summary import Notices, SessionSummary
from shmepoch.epoch.bindings import SessionRuntimeBindings
from shmepoch.epoch.completions import CompletionEntry, CompletionSeq
from shmepoch.epoch.cursors import EpochCursorSnapshot
from shmepoch.epoch.operations import OperationStatus, status_of
from shmepoch.errors import InvalidTransition, NotFound
from shmepoch.ids import OperationId
from shmepoch.runtime.loop import Continuation, RuntimeLoop

#: How many ended or running operations there may be that the agent has not been told of. If there
#: are more, no new command is started: so the feed never drops a completion that the agent has not
#: seen.
MOST_UNTOLD: Final = 256


class _Attempt(NamedTuple):
    """One attempt at a command: its number among all, and how often this run has tried again."""

    job: Job
    number: int
    retry: int


class _Ended(NamedTuple):
    """A command that has ended, and whose end may not be durable yet."""

    job: Job
    entry: CompletionEntry


class SessionRun:
    """Runs the commands of one session; everything in it happens on one event loop."""

    def __init__(
        self,
        number: int,
        bindings: SessionRuntimeBindings,
        jobs: Sequence[Job],
        past: Past,
        *,
        children: Children,
        workers: int,
        retries: int,
        transcripts: Path,
        store: Path | None,
        view: View,
    ) -> None:
        self.number: Final = number
        self.bindings: Final = bindings
        self.counts: Counter[str] = Counter()
        self.watermark = past.watermark
        self.operations = 0
        self.retried = 0
        self.restarts = 0
        self.undecided = self._commands = len(jobs)
        self.not_completed = 0
        #: Every command has ended, or was given up, and the agent has been told.
        self.finished = asyncio.Event()
        #: No ended command waits for the store.
        self.settled = asyncio.Event()
        self.settled.set()
        self._feed = bindings.ops_lifecycle.completion_feed()
        self._token = bindings.to_token()
        self._pending: deque[_Attempt] = deque()
        self._attempts: dict[OperationId, _Attempt] = {}
        self._by_worker: dict[Child, OperationId] = {}
        self._sequence = dict(past.owed)
        self._unsettled: deque[_Ended] = deque()
        self._durable: CompletionSeq = 0
        for job in jobs:
            self._carry_on(job, past)
        self.finished_before: Final = self.decided
        self._children = children
        self._workers_wanted = min(workers, len(self._pending))
        self._retries = retries
        self._transcript = transcript.path_in(transcripts, bindings.session_id)
        self._store = store
        self._view = view
        self._agent: Child | None = None
        self._agent_idle = False
        self._workers: set[Child] = set()
        self._idle: deque[Child] = deque()
        self._ending = False
        self._abandoned = False
        self._loop = RuntimeLoop(bindings, inject=self._inject, quiescent=lambda: self._agent_idle)
        self.tasks: list[asyncio.Task[None]] = []

    def _carry_on(self, job: Job, past: Past) -> None:
        """Count a command's attempts in earlier runs; queue the command unless one finished it."""
        attempts = list(past.attempts(self.bindings.session_id, job))
        self.operations += len(attempts)
        self.counts.update(attempts)
        finished = bool(attempts) and attempts[-1] in FINISHED
        self.retried += len(attempts) - finished
        if finished:
            self._decided(attempts[-1])
        else:
            self._pending.append(_Attempt(job, len(attempts), retry=0))

    # --- life ---------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the loop, the agent and the workers; the `tasks` run until `end`."""
        self.tasks = [
            asyncio.create_task(self._loop.run_async()),
            asyncio.create_task(self._follow()),
        ]
        self._start_agent()
        for _ in range(self._workers_wanted):
            self._start_worker()

    async def cancel(self, reason: str) -> None:
        """Cancel running commands and drop waiting ones; `finished` is set after the agent was
        told."""
        self._ending = True
        self._give_up(len(self._pending))
        self._pending.clear()
        self._cancel_running(reason)
        await asyncio.gather(*(worker.end() for worker in self._workers))
        self._workers.clear()
        self._by_worker.clear()
        self._cancel_running(reason)  # those not yet registered at first
        self._collect()
        self._give_up(len(self._attempts))
        self._attempts.clear()
        self._end_if_finished()

    def abandon(self) -> None:
        """Kill every child, and do not replace it."""
        self._ending = self._abandoned = True
        for child in self.children():
            child.kill()

    def _cancel_running(self, reason: str) -> None:
        for id in self._attempts:
            with contextlib.suppress(NotFound, InvalidTransition):  # no such, or ended by itself
                self.bindings.ops_lifecycle.cancel_operation(id, reason)

    def _give_up(self, commands: int) -> None:
        self.undecided -= commands
        self.not_completed += commands

    async def end(self) -> None:
        """End every child and task."""
        self._ending = True
        await asyncio.gather(*(child.end() for child in self.children()))
        self._workers.clear()
        self._agent = None
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    def children(self) -> list[Child]:
        """The live children, which can be killed."""
        return [*self._workers, *([self._agent] if self._agent else [])]

    # --- the figures for views ----------------------------------------------------------------

    @property
    def decided(self) -> int:
        """Commands that have ended for good."""
        return self._commands - self.undecided

    @property
    def running(self) -> int:
        """Commands that a worker is running."""
        return len(self._by_worker)

    @property
    def stored(self) -> bool:
        """Whether the store has everything that has ended in the epoch."""
        return self._feed.durable_through() >= self._feed.watermark()

    @property
    def waiting(self) -> int:
        """Commands that are not assigned yet."""
        return len(self._pending)

    def cursors(self) -> EpochCursorSnapshot:
        """The epoch's cursors."""
        return self.bindings.cursor_state.snapshot()

    def participants(self) -> int:
        """How many processes are attached."""
        return sum(participant.alive for participant in self.bindings.participants())

    def summary(self) -> SessionSummary:
        """The session at its end, with its transcript compared to its feed."""
        epoch_id = str(self.bindings.epoch_id)
        told = [
            (line.epoch_id, line.seq, line.operation_id)
            for line in transcript.read(self._transcript)
            if line.after_seq is None
        ]
        owed = {(epoch_id, seq, str(id)) for seq, id in self._sequence.items()}
        return SessionSummary(
            session_id=str(self.bindings.session_id),
            epoch_id=epoch_id,
            watermark=self.watermark,
            cursors=self.cursors(),
            notices=Notices(
                delivered=len(set(told)),
                duplicates=len(told) - len(set(told)),
                lost=len(owed - set(told)),
            ),
        )

    # --- the agent ----------------------------------------------------------------------------

    def _start_agent(self) -> None:
        self._agent_idle = False
        self._agent = self._children.start(
            "agent",
            agent.main,
            (self._token, self._transcript, self._store),
            on_message=self._agent_said,
            on_death=self._agent_died,
        )

    def _agent_said(self, child: Child, message: Idle) -> None:
        self._agent_idle = True
        self._view.told(self, self.bindings.cursor_state.agent_applied_cursor.load())
        self._loop.session_changed()
        self._assign()
        self._end_if_finished()

    def _agent_died(self, child: Child) -> None:
        self._agent_idle = False
        self._agent = None
        if not self._abandoned:
            self._lost(child)
            self._start_agent()

    def _inject(self, continuation: Continuation) -> bool:
        if self._agent is None or not self._agent_idle or not self._agent.send(Turn()):
            return False
        self._agent_idle = False
        return True

    # --- the workers --------------------------------------------------------------------------

    def _start_worker(self) -> None:
        self._workers.add(
            self._children.start(
                "worker",
                worker.main,
                (self._token,),
                on_message=self._worker_said,
                on_death=self._worker_died,
            )
        )

    def _worker_said(self, child: Child, message: Idle) -> None:
        self._by_worker.pop(child, None)
        self._idle.append(child)
        self._collect()
        self._assign()

    def _assign(self) -> None:
        while self._pending and self._idle and self._untold() < MOST_UNTOLD:
            child = self._idle.popleft()
            attempt = self._pending.popleft()
            job = attempt.job
            id = operation_id(self.bindings.session_id, job, attempt.number)
            self._attempts[id] = attempt
            self._by_worker[child] = id
            # If the worker is dead already, the event of its death comes next and queues the
            # command again.
            child.send(Assignment(id, job.line, job.command))
            self._view.assigned(self, job)

    def _untold(self) -> int:
        applied = self.bindings.cursor_state.agent_applied_cursor.load()
        return self.watermark - applied + len(self._attempts)

    def _worker_died(self, child: Child) -> None:
        self._workers.discard(child)
        if child in self._idle:
            self._idle.remove(child)
        if self._abandoned:
            return
        self._lost(child)
        id = self._by_worker.pop(child, None)
        if id is not None and self._never_registered(id):
            self._pending.appendleft(self._attempts.pop(id))
            self._assign()
        self._start_worker()

    def _never_registered(self, id: OperationId) -> bool:
        # If the operation ended and was evicted since, its completion was collected from the feed.
        self._collect()
        return id in self._attempts and self.bindings.ops_lifecycle.snapshot(id) is None

    def _lost(self, child: Child) -> None:
        assert child.exitcode is not None
        if child.exitcode >= 0:
            raise ChildFailed(child.role, child.pid, child.exitcode)
        self.restarts += 1
        self._view.lost_child(self, child)

    # --- the feed -----------------------------------------------------------------------------

    async def _follow(self) -> None:
        """Collect completions that no worker reports: those of dead workers' operations."""
        while True:
            await self._feed.advanced(self.watermark)
            self._collect()

    def _collect(self) -> None:
        batch = self._feed.list_since(self.watermark)
        self.watermark = batch.watermark
        for entry in batch.entries:
            self._decide(entry)
        self._end_if_finished()

    def _decide(self, entry: CompletionEntry) -> None:
        self._sequence[entry.seq] = entry.operation_id
        job, number, retry = self._attempts.pop(entry.operation_id)
        status = status_of(entry.terminal_outcome)
        if status is OperationStatus.TERMINATED and retry < self._retries and not self._ending:
            self.retried += 1
            self._show(job, entry)
            self._pending.append(_Attempt(job, number + 1, retry + 1))
            self._assign()
        elif status in FINISHED and self._store is not None and entry.seq > self._durable:
            self._unsettled.append(_Ended(job, entry))
            self.settled.clear()
        else:
            self._settle(job, entry)

    def stored_through(self, seq: CompletionSeq) -> None:
        """Count and show the commands that are durable now: those up to `seq`, or more.

        A command is not finished before that: if the machine crashed, it would run again.
        """
        # The store may have more than was reported here.
        self._durable = max(self._durable, seq, self._feed.durable_through())
        while self._unsettled and self._unsettled[0].entry.seq <= self._durable:
            self._settle(*self._unsettled.popleft())
        if not self._unsettled:
            self.settled.set()

    def _settle(self, job: Job, entry: CompletionEntry) -> None:
        self._show(job, entry)
        self._decided(status_of(entry.terminal_outcome))

    def _show(self, job: Job, entry: CompletionEntry) -> None:
        self.operations += 1
        self.counts[status_of(entry.terminal_outcome)] += 1
        self._view.ended(self, job, entry)

    def _decided(self, status: OperationStatus) -> None:
        self.undecided -= 1
        self.not_completed += status is not OperationStatus.COMPLETED

    def _end_if_finished(self) -> None:
        applied = self.bindings.cursor_state.agent_applied_cursor.load()
        ended = not self._pending and not self._attempts
        if ended and self._agent_idle and applied >= self.watermark:
            self.finished.set()
