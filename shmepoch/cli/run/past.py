"""How a session's commands ended before this run continues it."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from itertools import count
from typing import Final, NamedTuple

from shmepoch.cli.run.jobs import Job
from shmepoch.epoch.bindings import SessionRuntimeBindings
from shmepoch.epoch.completions import CompletionSeq
from shmepoch.epoch.operations import OperationStatus, status_of
from shmepoch.ids import OperationId, SessionId
from shmepoch.memory.participants import Participant, Role
from shmepoch.stores import RuntimeStore

#: The statuses of a command that ended by itself. A command with another status is run again.
FINISHED: Final = frozenset({OperationStatus.COMPLETED, OperationStatus.FAILED})
_LINE_BYTES: Final = 4
#: The roles of a run's children in its epochs.
_CHILDREN: Final = frozenset({Role.AGENT, Role.WORKER})


class Past(NamedTuple):
    """How operations ended, through `watermark`, and which ends the agent has not applied."""

    ended: Mapping[OperationId, OperationStatus]
    owed: Mapping[CompletionSeq, OperationId]
    watermark: CompletionSeq

    def attempts(self, session_id: SessionId, job: Job) -> Iterator[OperationStatus]:
        """How each attempt at a command ended, from the first on."""
        for attempt in count():
            status = self.ended.get(operation_id(session_id, job, attempt))
            if status is None:
                return
            yield status


def operation_id(session_id: SessionId, job: Job, attempt: int) -> OperationId:
    """The operation id of an attempt at a command; the first attempt is 0.

    It is derived from the session, the command and the attempt, so that a resumed run recognises
    its operations. It begins with the line, since a completion has only the id of its operation.
    """
    name = f"{job.line} {attempt} {job.command}"
    digest = uuid.uuid5(session_id.uuid, name).bytes
    return OperationId.from_bytes(job.line.to_bytes(_LINE_BYTES) + digest[_LINE_BYTES:])


def line_of(id: OperationId) -> int:
    """The line of the command of an operation."""
    return int.from_bytes(id.bytes[:_LINE_BYTES])


def read(bindings: SessionRuntimeBindings, store: RuntimeStore | None) -> Past:
    """Read the store and the feed; no operation may end meanwhile."""
    applied = bindings.cursor_state.agent_applied_cursor.load()
    ended: dict[OperationId, OperationStatus] = {}
    owed: dict[CompletionSeq, OperationId] = {}
    batch = bindings.ops_lifecycle.completion_feed().list_since(0)
    entries = [(bindings.epoch_id, entry) for entry in batch.entries]
    if store is not None:  # earlier epochs, and completions that the feed has dropped
        stored = store.history(bindings.session_id)
        entries = [(item.epoch_id, item.entry) for item in stored] + entries
    for epoch_id, entry in entries:
        ended[entry.operation_id] = status_of(entry.terminal_outcome)
        if epoch_id == bindings.epoch_id and entry.seq > applied:
            owed[entry.seq] = entry.operation_id
    return Past(ended, owed, batch.watermark)


def left_behind(bindings: SessionRuntimeBindings) -> list[Participant]:
    """The live children of a run whose runtime was killed."""
    return [
        one
        for one in bindings.participants()
        if one.alive and not one.is_self and one.role in _CHILDREN
    ]
