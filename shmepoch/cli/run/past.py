"""What became of a session's commands before this run carries on with it."""

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

#: How a command ends that has run to its own end. Any other end leaves it to be run again.
FINISHED: Final = frozenset({OperationStatus.COMPLETED, OperationStatus.FAILED})
_LINE_BYTES: Final = 4
#: What the children of a run are in its epochs.
_CHILDREN: Final = frozenset({Role.AGENT, Role.WORKER})


class Past(NamedTuple):
    """How operations ended, through `watermark`, and which of these the agent has not applied."""

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
    """The operation that an attempt at a command is; the first attempt is 0.

    It follows from what it names, so that a run that is resumed knows what has been done. It
    begins with the line, since a completion says no more of its operation than the id.
    """
    name = f"{job.line} {attempt} {job.command}"
    digest = uuid.uuid5(session_id.uuid, name).bytes
    return OperationId.from_bytes(job.line.to_bytes(_LINE_BYTES) + digest[_LINE_BYTES:])


def line_of(id: OperationId) -> int:
    """The line of the command that an operation is an attempt at."""
    return int.from_bytes(id.bytes[:_LINE_BYTES])


def read(bindings: SessionRuntimeBindings, store: RuntimeStore | None) -> Past:
    """What the store and the feed say; nothing may end meanwhile."""
    applied = bindings.cursor_state.agent_applied_cursor.load()
    ended: dict[OperationId, OperationStatus] = {}
    owed: dict[CompletionSeq, OperationId] = {}
    batch = bindings.ops_lifecycle.completion_feed().list_since(0)
    entries = [(bindings.epoch_id, entry) for entry in batch.entries]
    if store is not None:  # what was stored of earlier epochs, and what the feed has dropped
        stored = store.history(bindings.session_id)
        entries = [(item.epoch_id, item.entry) for item in stored] + entries
    for epoch_id, entry in entries:
        ended[entry.operation_id] = status_of(entry.terminal_outcome)
        if epoch_id == bindings.epoch_id and entry.seq > applied:
            owed[entry.seq] = entry.operation_id
    return Past(ended, owed, batch.watermark)


def left_behind(bindings: SessionRuntimeBindings) -> list[Participant]:
    """The children of a run whose runtime was killed that have not ended yet."""
    return [
        one
        for one in bindings.participants()
        if one.alive and not one.is_self and one.role in _CHILDREN
    ]
