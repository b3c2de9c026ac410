"""The plan of a run: its commands and sessions, kept in its store so that it can be resumed."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Final, Self

from shmepoch.cli.run import leftovers
from shmepoch.cli.run.jobs import Job
from shmepoch.cli.streams import counted
from shmepoch.epoch.codec import Record
from shmepoch.epoch.completions import CompletionEntry
from shmepoch.epoch.operations import Completed, OperationKind, OperationResult
from shmepoch.epoch.persisted import PersistedOpsSnapshot
from shmepoch.errors import RecordInvalid, ShmepochError, StoreLoadFailed
from shmepoch.ids import OperationId, RuntimeEpochId, SessionId
from shmepoch.memory.clock import wall_ms
from shmepoch.stores import EpochCapture, RuntimeStore

#: The session whose epochs are the runs of a store, one after the other; the current one is the run
#: that has not finished. Each has one completion, which holds the plan.
RUNS: Final = SessionId.from_uuid(uuid.uuid5(uuid.NAMESPACE_URL, "shmepoch:run"))


class RunRefused(ShmepochError):
    """What the store holds does not go with what the command line asks for."""


class RunUnfinished(RunRefused):
    """A run is to begin in a store that holds another one which has not finished."""

    commands: int
    sessions: int

    def _text(self) -> str:
        return (
            f"the store holds an unfinished run of {counted(self.commands, 'command')} in "
            f"{counted(self.sessions, 'session')}; "
            "carry on with it with --resume, or name another file with --store"
        )


class NothingToResume(RunRefused):
    """The store holds no run that has not finished."""

    message = """the store holds no unfinished run; leave --resume away to begin one, or name the
    file of the run to carry on with"""


class PlanUnreadable(RunRefused):
    """The store is damaged where it holds the plan of a run."""

    reason: str
    message = """the plan of the run in the store cannot be read: {reason}; name another file with
    --store (shmepoch history still shows how this one's commands ended)"""


class SessionsDiffer(RunRefused):
    """A run is to be resumed with another number of sessions than it was begun with."""

    begun: int
    asked: int

    def _text(self) -> str:
        return (
            f"the run in the store has {counted(self.begun, 'session')}, this one would have "
            f"{self.asked}; resume it with --sessions {self.begun}"
        )


class CommandsDiffer(RunRefused):
    """A run is to be resumed with other commands than it was begun with."""

    begun: Job | None
    asked: Job | None

    def _text(self) -> str:
        return (
            "the run in the store is one of other commands: the first difference is "
            f"{_said(self.begun)} there and {_said(self.asked)} here; resume it with the file it "
            "was begun with, or run this one with another --store"
        )


def _said(job: Job | None) -> str:
    return "no further command" if job is None else f"line {job.line}: {job.command!r}"


class Plan(Record, frozen=True, kw_only=True):
    """What a run set out to do. `namespace` is where its epochs live while they are in memory."""

    namespace: str
    sessions: tuple[SessionId, ...]
    jobs: tuple[Job, ...]

    @classmethod
    def new(cls, jobs: Sequence[Job], sessions: int, namespace: str, *, kept: bool) -> Self:
        """The plan of a run that begins: at most as many sessions as there are commands.

        `kept` says whether a store will have it.
        """
        new_session = SessionId.new if kept else leftovers.new_session
        ids = tuple(new_session() for _ in range(min(sessions, len(jobs))))
        return cls(namespace=namespace, sessions=ids, jobs=tuple(jobs))

    def of_session(self, number: int) -> tuple[Job, ...]:
        """The commands of a session, which are dealt out in turn; the first has number 1."""
        return self.jobs[number - 1 :: len(self.sessions)]

    def check_same(self, jobs: Sequence[Job], sessions: int) -> None:
        """Raise what keeps these commands in so many sessions from being this plan."""
        for begun, asked in zip(self.jobs, jobs, strict=False):
            if begun != asked:
                raise CommandsDiffer(begun, asked)
        if len(self.jobs) != len(jobs):
            both = min(len(self.jobs), len(jobs))
            raise CommandsDiffer(*(next(iter(all[both:]), None) for all in (self.jobs, jobs)))
        if len(self.sessions) != min(sessions, len(jobs)):
            raise SessionsDiffer(len(self.sessions), min(sessions, len(jobs)))


class KeptPlan:
    """The plan of an unfinished run in its store, from before its first session until its last."""

    def __init__(self, store: RuntimeStore, epoch_id: RuntimeEpochId, plan: Plan) -> None:
        self._store = store
        self._epoch_id = epoch_id
        self.plan: Final = plan

    @classmethod
    def begin(cls, store: RuntimeStore, plan: Plan) -> Self:
        """Keep the plan of a run that begins; `RunUnfinished`, `PlanUnreadable`."""
        unfinished = cls._find(store)
        if unfinished is not None:
            raise RunUnfinished(len(unfinished.plan.jobs), len(unfinished.plan.sessions))
        kept = cls(store, RuntimeEpochId.new(), plan)
        id = OperationId.new()
        content = plan.to_json().decode()
        entry = CompletionEntry(
            seq=1,
            operation_id=id,
            kind=OperationKind.BACKGROUND_TOOL_OP,
            display_name="the plan of a run",
            terminal_outcome=Completed(OperationResult(id=id, content=content, duration_ms=0)),
            completed_at_ms=wall_ms(),
        )
        kept._save(entries=(entry,), finished=False)
        return kept

    @classmethod
    def resume(cls, store: RuntimeStore, jobs: Sequence[Job], sessions: int) -> Self:
        """The unfinished run.

        Raises `NothingToResume`, `PlanUnreadable`, `CommandsDiffer` and `SessionsDiffer`.
        """
        unfinished = cls._find(store)
        if unfinished is None:
            raise NothingToResume
        unfinished.plan.check_same(jobs, sessions)
        return unfinished

    def finish(self) -> None:
        """The run has finished: there is nothing to resume any more."""
        self._save(entries=(), finished=True)

    @classmethod
    def _find(cls, store: RuntimeStore) -> Self | None:
        try:
            current = store.load(RUNS)
        except StoreLoadFailed as error:
            raise PlanUnreadable(error.reason) from error
        if current is None:
            return None
        match current.entries:
            case (CompletionEntry(terminal_outcome=Completed(result)),):
                pass
            case _:
                raise PlanUnreadable(f"{len(current.entries)} entries stand where it should")
        try:
            plan = Plan.from_json(result.content)
        except RecordInvalid as error:
            raise PlanUnreadable(str(error)) from error
        return cls(store, current.epoch_id, plan)

    def _save(self, *, entries: tuple[CompletionEntry, ...], finished: bool) -> None:
        snapshot = PersistedOpsSnapshot(epoch_id=self._epoch_id, entries=entries)
        self._store.save([EpochCapture(session_id=RUNS, snapshot=snapshot, sealed=finished)])
