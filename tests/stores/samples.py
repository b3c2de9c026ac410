"""Epochs to store: completions, operations and captures of them, made by hand."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from shmepoch.epoch.completions import CompletionEntry
from shmepoch.epoch.cursors import EpochCursorSnapshot
from shmepoch.epoch.operations import (
    Completed,
    Failed,
    OperationKind,
    OperationLifecycleSnapshot,
    OperationProgressUpdate,
    OperationResult,
    OperationSpec,
    OperationStatus,
    OperationTerminalOutcome,
    status_of,
)
from shmepoch.epoch.persisted import PersistedOpsSnapshot
from shmepoch.ids import OperationId, RuntimeEpochId, SessionId
from shmepoch.stores import EpochCapture
from tests.support import spec

T0 = 1_700_000_000_000


def completion(
    seq: int,
    *,
    id: OperationId | None = None,
    content: str = "done",
    outcome: OperationTerminalOutcome | None = None,
    at_ms: int | None = None,
) -> CompletionEntry:
    """The completion of a fresh operation."""
    id = id or OperationId.new()
    return CompletionEntry(
        seq=seq,
        operation_id=id,
        kind=OperationKind.BACKGROUND_TOOL_OP,
        display_name=f"work {seq}",
        terminal_outcome=outcome or Completed(OperationResult(id=id, content=content)),
        completed_at_ms=T0 + seq if at_ms is None else at_ms,
    )


def completions(first: int, last: int) -> list[CompletionEntry]:
    return [completion(seq) for seq in range(first, last + 1)]


def running(
    spec: OperationSpec, *, progress: int = 0, created_at_ms: int = T0
) -> OperationLifecycleSnapshot:
    """An operation under way."""
    return OperationLifecycleSnapshot(
        id=spec.id,
        kind=spec.kind,
        display_name=spec.display_name,
        status=OperationStatus.RUNNING,
        progress_count=progress,
        last_progress=OperationProgressUpdate(f"step {progress}") if progress else None,
        watcher_count=2,
        created_at_ms=created_at_ms,
        started_at_ms=created_at_ms + 1,
    )


def ended(spec: OperationSpec, entry: CompletionEntry) -> OperationLifecycleSnapshot:
    """The snapshot of an ended operation, as in its registry."""
    return OperationLifecycleSnapshot(
        id=spec.id,
        kind=spec.kind,
        display_name=spec.display_name,
        status=status_of(entry.terminal_outcome),
        progress_count=3,
        last_progress=OperationProgressUpdate("nearly", 99.5),
        terminal_outcome=entry.terminal_outcome,
        created_at_ms=T0,
        started_at_ms=T0 + 1,
        completed_at_ms=entry.completed_at_ms,
        elapsed_ms=17,
    )


def failed(seq: int) -> tuple[OperationSpec, CompletionEntry]:
    """An operation and its failure."""
    made = spec(f"work {seq}")
    return made, completion(seq, id=made.id, outcome=Failed("no such file: größe.txt"))


class Epoch:
    """A short way to make captures of one epoch."""

    def __init__(self, session_id: SessionId | None = None) -> None:
        self.session_id = session_id or SessionId.new()
        self.id = RuntimeEpochId.new()

    def capture(
        self,
        entries: Iterable[CompletionEntry] = (),
        *,
        operations: Sequence[OperationLifecycleSnapshot] = (),
        specs: Sequence[OperationSpec] = (),
        cursors: tuple[int, int, int] = (0, 0, 0),
        sealed: bool = False,
    ) -> EpochCapture:
        applied, observed, injected = cursors
        return EpochCapture(
            session_id=self.session_id,
            snapshot=PersistedOpsSnapshot(
                epoch_id=self.id,
                operations=tuple(operations),
                specs=tuple(specs),
                entries=tuple(entries),
                cursors=EpochCursorSnapshot(
                    agent_applied_cursor=applied,
                    runtime_observed_seq=observed,
                    runtime_last_injected_seq=injected,
                ),
            ),
            sealed=sealed,
        )
