"""The protocol of the operation registry: the verbs of an operation's lifecycle."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

from shmepoch.epoch.completions import CompletionFeed, CompletionSeq
from shmepoch.epoch.cursors import CursorState
from shmepoch.epoch.operations import (
    OperationLifecycleSnapshot,
    OperationPeerHandle,
    OperationProgressUpdate,
    OperationResult,
    OperationSpec,
    OperationTerminalOutcome,
    WaitAllResult,
)
from shmepoch.epoch.persisted import PersistedOpsSnapshot
from shmepoch.epoch.waits import OperationCompletionWatch
from shmepoch.ids import OperationId, RunId, RuntimeEpochId


@runtime_checkable
class OpsLifecycleRegistry(Protocol):
    """Every operation of one epoch and its lifecycle.

    Every verb raises `NotFound` for an id the registry does not hold, `InvalidTransition` where
    the lifecycle does not allow it, and `EpochSealed` once the epoch has ended; a refused call
    changes nothing. With `store_wait_ms`, those that end operations may wait, and raise
    `StoreBehind`.
    """

    def register_operation(self, spec: OperationSpec) -> None:
        """Enter a new operation, in provisioning.

        Raises `AlreadyRegistered`, `MaxConcurrentExceeded`, `PayloadTooLarge`, `RecordInvalid`.
        """
        ...

    def register_operations(self, specs: Iterable[OperationSpec]) -> None:
        """Enter new operations, in provisioning: all of them in one commit, or none.

        Raises what `register_operation` does.
        """
        ...

    def provisioning_succeeded(self, id: OperationId) -> None:
        """The operation runs from now on."""
        ...

    def start_operations(self, ids: Iterable[OperationId]) -> None:
        """The operations run from now on, if all of them may; else none.

        They start one by one: of a process that is killed meanwhile, some may have.
        """
        ...

    def provisioning_failed(self, id: OperationId, error: str) -> None:
        """The operation could not be started: it ends as `Failed`."""
        ...

    def abort_provisioning(self, id: OperationId, reason: str | None = None) -> None:
        """The operation is given up before it started: it ends as `Aborted`."""
        ...

    def peer_ready(self, id: OperationId, handle: OperationPeerHandle) -> None:
        """A child agent hands over its channel, once; `PeerNotExpected`, `AlreadyPeerReady`."""
        ...

    def register_watcher(self, id: OperationId) -> OperationCompletionWatch:
        """Something to wait on, or await, for the operation's outcome."""
        ...

    def report_progress(self, id: OperationId, update: OperationProgressUpdate) -> None:
        """Count a progress report and keep it as the last one."""
        ...

    def complete_operation(
        self,
        id: OperationId,
        result: OperationResult,
        *,
        durable: bool = False,
        timeout: float | None = 10.0,
    ) -> None:
        """The operation ends as `Completed`.

        With `durable` it returns once a store has the completion. If none has it after `timeout`
        seconds, or when the epoch ends, it raises `StoreBehind` with `completed` true: the
        completion stands all the same. Without a store that is always so.
        """
        ...

    def complete_operations(self, results: Iterable[OperationResult]) -> None:
        """The operations end as `Completed`, in this order: all of them in one commit, or none.

        Readers get them together. Raises `PayloadTooLarge` if the feed cannot hold them together.
        """
        ...

    def fail_operation(self, id: OperationId, error: str) -> None:
        """The operation ends as `Failed`."""
        ...

    def cancel_operation(self, id: OperationId, reason: str | None = None) -> None:
        """The operation ends as `Cancelled`."""
        ...

    def request_retire(self, id: OperationId) -> None:
        """Ask a running operation to wind down."""
        ...

    def mark_retired(self, id: OperationId) -> None:
        """The operation ends as `Retired`."""
        ...

    def terminate_owner(self, reason: str) -> None:
        """Every operation that has not ended ends as `Terminated`, all in one commit, in the order
        of their registration."""
        ...

    def snapshot(self, id: OperationId) -> OperationLifecycleSnapshot | None:
        """The operation as it stands, or None if the registry does not hold it."""
        ...

    def list_operations(self) -> list[OperationLifecycleSnapshot]:
        """Every operation the registry holds, by display name."""
        ...

    def collect_completed(self) -> list[tuple[OperationId, OperationTerminalOutcome]]:
        """Drain the retained terminal operations, in completion order; the feed keeps its
        entries."""
        ...

    def wait_all(
        self, run_id: RunId, ids: Sequence[OperationId], timeout: float | None = None
    ) -> WaitAllResult:
        """Block until all of `ids` have ended.

        Raises `DuplicateWaitOperation`, `NotFound`, `OutcomeDropped`, `WaitAlreadyActive`, and
        `TimeoutError` after `timeout` seconds; whatever it raises frees the handle for another
        wait.
        """
        ...

    async def all_ended(self, run_id: RunId, ids: Sequence[OperationId]) -> WaitAllResult:
        """Like `wait_all`, without blocking the event loop."""
        ...

    def completion_feed(self) -> CompletionFeed:
        """The epoch's feed."""
        ...

    def capture_persistence_snapshot(
        self,
        epoch_id: RuntimeEpochId,
        cursor_state: CursorState,
        *,
        after_seq: CompletionSeq = 0,
    ) -> PersistedOpsSnapshot:
        """Everything a store needs to continue the epoch, if it has the completions up to
        `after_seq`: those above it, and the operations but for those that these ended."""
        ...
