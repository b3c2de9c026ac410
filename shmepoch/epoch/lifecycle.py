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

    Every verb raises `NotFound` for an id that the registry does not hold, `InvalidTransition` if
    the lifecycle does not allow it, and `EpochSealed` after the epoch has ended. A refused call
    changes nothing. With `store_wait_ms`, verbs that end operations may wait for the store, and
    raise `StoreBehind`.
    """

    def register_operation(self, spec: OperationSpec) -> None:
        """Register a new operation. Its status is `provisioning`.

        Raises `AlreadyRegistered`, `MaxConcurrentExceeded`, `PayloadTooLarge`, `RecordInvalid`.
        """
        ...

    def register_operations(self, specs: Iterable[OperationSpec]) -> None:
        """Register new operations: all of them in one commit, or none.

        Raises the errors of `register_operation`.
        """
        ...

    def provisioning_succeeded(self, id: OperationId) -> None:
        """Mark the operation as running."""
        ...

    def start_operations(self, ids: Iterable[OperationId]) -> None:
        """Mark the operations as running, if all of them may start; else none.

        They start one by one: if the process is killed meanwhile, some may have started.
        """
        ...

    def provisioning_failed(self, id: OperationId, error: str) -> None:
        """End an operation that could not be started as `Failed`."""
        ...

    def abort_provisioning(self, id: OperationId, reason: str | None = None) -> None:
        """End an operation that is given up before it started as `Aborted`."""
        ...

    def peer_ready(self, id: OperationId, handle: OperationPeerHandle) -> None:
        """Hand over the channel of a child agent, once. Raises `PeerNotExpected`,
        `AlreadyPeerReady`."""
        ...

    def register_watcher(self, id: OperationId) -> OperationCompletionWatch:
        """A watch: wait on it, or await it, for the operation's outcome."""
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
        """End the operation as `Completed`.

        With `durable` it returns after a store has the completion. If no store has it after
        `timeout` seconds, or when the epoch ends, it raises `StoreBehind` with `completed` true:
        the operation has ended all the same. Without a store it always raises that.
        """
        ...

    def complete_operations(self, results: Iterable[OperationResult]) -> None:
        """End the operations as `Completed`, in this order: all of them in one commit, or none.

        Readers get them together. Raises `PayloadTooLarge` if the feed cannot hold them together.
        """
        ...

    def fail_operation(self, id: OperationId, error: str) -> None:
        """End the operation as `Failed`."""
        ...

    def cancel_operation(self, id: OperationId, reason: str | None = None) -> None:
        """End the operation as `Cancelled`."""
        ...

    def request_retire(self, id: OperationId) -> None:
        """Ask a running operation to finish early: its status becomes `retiring`."""
        ...

    def mark_retired(self, id: OperationId) -> None:
        """End the operation as `Retired`."""
        ...

    def terminate_owner(self, reason: str) -> None:
        """End every operation that has not ended as `Terminated`, in one commit, in the order of
        their registration."""
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
        `TimeoutError` after `timeout` seconds. After any error another wait may begin.
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
        """Everything that a store needs to continue the epoch, if it already has the completions up
        to `after_seq`: the later completions, and the operations that the earlier ones have not
        ended."""
        ...
