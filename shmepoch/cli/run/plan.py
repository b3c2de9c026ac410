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

#: The session of plans: each of its epochs is one run of the store, and the current epoch is the
#: unfinished run. Each epoch has one completion, which holds the plan.
RUNS: Final = SessionId.from_uuid(uuid.uuid5(uuid.NAMESPACE_URL, "shmepoch:run"))


class RunRefused(ShmepochError):
    """The contents of the store do not match the command line."""


class RunUnfinished(RunRefused):
    """A new run cannot begin in a store that holds an unfinished run."""

    commands: int
    sessions: int

    def _text(self) -> str:
        return (
            f"the store holds an unfinished run of {counted(self.commands, 'command')} in "
            f"{counted(self.sessions, 'session')}; "
            "carry on with it with --resume, or name another file with --store"
        )


class NothingToResume(RunRefused):
    """The store holds no unfinished run."""

    message = """the store holds no unfinished run; leave --resume away to begin one, or name the
    file of the run to carry on with"""


class PlanUnreadable(RunRefused):
    """The plan of a run in the store is damaged."""

    reason: str
    message = """the plan of the run in the store cannot be read: {reason}; name another file with
    --store (shmepoch history still shows how this one's commands ended)"""


class SessionsDiffer(RunRefused):
    """A run cannot be resumed with another number of sessions."""

    begun: int
    asked: int

    def _text(self) -> str:
        return (
            f"the run in the store has {counted(self.begun, 'session')}, this one would have "
            f"{self.asked}; resume it with --sessions {self.begun}"
        )


class CommandsDiffer(RunRefused):
    """A run cannot be resumed with other commands."""

    begun: Job | None
    asked: Job | None

    def _text(self) -> str:
        return (
            "the run in the store is one of other commands: the first difference is "
            f"{_said(self.begun)} there and {_said(self.asked)} here; resume it with the file it "
            "was begun with, or run this one with another --store"
        )


class NamespacesDiffer(RunRefused):
    """A run cannot be resumed in another namespace."""

    begun: str
    asked: str
    message = """the run in the store is one of namespace {begun!r}, not of {asked!r}; resume it
    without --namespace, or with {begun!r}"""


def _said(job: Job | None) -> str:
    return "no further command" if job is None else f"line {job.line}: {job.command!r}"


class Plan(Record, frozen=True, kw_only=True):
    """The commands and sessions of a run. `namespace` is that of its epochs in shared memory."""

    namespace: str
    sessions: tuple[SessionId, ...]
    jobs: tuple[Job, ...]

    @classmethod
    def new(cls, jobs: Sequence[Job], sessions: int, namespace: str, *, kept: bool) -> Self:
        """The plan of a new run: at most as many sessions as there are commands.

        `kept` says whether it will be stored.
        """
        new_session = SessionId.new if kept else leftovers.new_session
        ids = tuple(new_session() for _ in range(min(sessions, len(jobs))))
        return cls(namespace=namespace, sessions=ids, jobs=tuple(jobs))

    def of_session(self, number: int) -> tuple[Job, ...]:
        """The commands of a session, which get them in turn; the first session has number 1."""
        return self.jobs[number - 1 :: len(self.sessions)]

    def check_same(self, jobs: Sequence[Job], sessions: int, namespace: str | None) -> None:
        """Raise `CommandsDiffer`, `SessionsDiffer` or `NamespacesDiffer` unless these are the
        plan's; None is any namespace."""
        for begun, asked in zip(self.jobs, jobs, strict=False):
            if begun != asked:
                raise CommandsDiffer(begun, asked)
        if len(self.jobs) != len(jobs):
            both = min(len(self.jobs), len(jobs))
            raise CommandsDiffer(*(next(iter(all[both:]), None) for all in (self.jobs, jobs)))
        if len(self.sessions) != min(sessions, len(jobs)):
            raise SessionsDiffer(len(self.sessions), min(sessions, len(jobs)))
        if namespace not in (None, self.namespace):
            raise NamespacesDiffer(self.namespace, namespace)


class KeptPlan:
    """The plan of an unfinished run in its store, from before its first session to its end."""

    def __init__(self, store: RuntimeStore, epoch_id: RuntimeEpochId, plan: Plan) -> None:
        self._store = store
        self._epoch_id = epoch_id
        self.plan: Final = plan

    @classmethod
    def begin(cls, store: RuntimeStore, plan: Plan) -> Self:
        """Store the plan of a new run. Raises `RunUnfinished`, `PlanUnreadable`."""
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
    def resume(
        cls, store: RuntimeStore, jobs: Sequence[Job], sessions: int, namespace: str | None
    ) -> Self:
        """The unfinished run.

        Raises `NothingToResume`, `PlanUnreadable`, `CommandsDiffer`, `SessionsDiffer` and
        `NamespacesDiffer`.
        """
        unfinished = cls._find(store)
        if unfinished is None:
            raise NothingToResume
        unfinished.plan.check_same(jobs, sessions, namespace)
        return unfinished

    def finish(self) -> None:
        """Record that the run has finished, so that it is not resumed."""
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
