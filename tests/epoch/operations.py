"""Operations for tests: how to make them, and every verb that moves them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeAlias

from shmepoch import _native as at
from shmepoch.epoch.completions import CompletionBatch
from shmepoch.epoch.lifecycle import OpsLifecycleRegistry
from shmepoch.epoch.operations import (
    Action,
    OperationKind,
    OperationLifecycleSnapshot,
    OperationPeerHandle,
    OperationProgressUpdate,
    OperationStatus,
    TrustedPeerSpec,
)
from shmepoch.epoch.registry import RuntimeOpsLifecycleRegistry
from shmepoch.ids import OperationId
from tests.support import result as result
from tests.support import spec as spec

Registry: TypeAlias = RuntimeOpsLifecycleRegistry
Verb: TypeAlias = Callable[[OpsLifecycleRegistry, OperationId], None]


CHILD: Final = OperationKind.MOB_MEMBER_CHILD
PEER: Final = OperationPeerHandle("peer", TrustedPeerSpec("peer", "p-1", "inproc://p-1"))
UPDATE: Final = OperationProgressUpdate("half", 50.0)

#: The call of each action. Owner termination is not about one operation.
VERBS: Final[dict[Action, Verb]] = {
    Action.PROVISIONING_SUCCEEDED: lambda r, op: r.provisioning_succeeded(op),
    Action.PROVISIONING_FAILED: lambda r, op: r.provisioning_failed(op, "no room"),
    Action.ABORT_PROVISIONING: lambda r, op: r.abort_provisioning(op, "not needed"),
    Action.PEER_READY: lambda r, op: r.peer_ready(op, PEER),
    Action.REPORT_PROGRESS: lambda r, op: r.report_progress(op, UPDATE),
    Action.COMPLETE_OPERATION: lambda r, op: r.complete_operation(op, result(op)),
    Action.FAIL_OPERATION: lambda r, op: r.fail_operation(op, "broke"),
    Action.CANCEL_OPERATION: lambda r, op: r.cancel_operation(op, "unwanted"),
    Action.REQUEST_RETIRE: lambda r, op: r.request_retire(op),
    Action.MARK_RETIRED: lambda r, op: r.mark_retired(op),
    Action.TERMINATE_OWNER: lambda r, op: r.terminate_owner("owner ended"),
}

#: The verbs that lead from registration to each status.
PATHS: Final[dict[OperationStatus, tuple[Action, ...]]] = {
    OperationStatus.PROVISIONING: (),
    OperationStatus.RUNNING: (Action.PROVISIONING_SUCCEEDED,),
    OperationStatus.RETIRING: (Action.PROVISIONING_SUCCEEDED, Action.REQUEST_RETIRE),
    OperationStatus.COMPLETED: (Action.PROVISIONING_SUCCEEDED, Action.COMPLETE_OPERATION),
    OperationStatus.FAILED: (Action.PROVISIONING_FAILED,),
    OperationStatus.ABORTED: (Action.ABORT_PROVISIONING,),
    OperationStatus.CANCELLED: (Action.CANCEL_OPERATION,),
    OperationStatus.RETIRED: (Action.PROVISIONING_SUCCEEDED, Action.MARK_RETIRED),
    OperationStatus.TERMINATED: (Action.TERMINATE_OWNER,),
}


def reach(registry: OpsLifecycleRegistry, status: OperationStatus) -> OperationId:
    """The id of a fresh child operation with this status."""
    id = OperationId.new()
    registry.register_operation(spec(kind=CHILD, id=id))
    for action in PATHS[status]:
        VERBS[action](registry, id)
    return id


def state(registry: Registry) -> tuple[list[OperationLifecycleSnapshot], CompletionBatch]:
    """Everything that a refused call must not change."""
    return registry.list_operations(), registry.completion_feed().list_since(0)


def taken(registry: Registry, id: OperationId) -> OperationLifecycleSnapshot:
    """The snapshot of an existing operation."""
    snapshot = registry.snapshot(id)
    assert snapshot is not None
    return snapshot


def end(registry: OpsLifecycleRegistry, reason: str = "done") -> OperationId:
    """The id of a fresh operation that has ended."""
    id = OperationId.new()
    registry.register_operation(spec(id=id))
    registry.cancel_operation(id, reason)
    return id


def size_of(registry: Registry, seq: int) -> int:
    """How many bytes of the feed the record of a sequence takes."""
    record = registry._table.record(seq)
    assert record is not None
    parts = record.head + record.outcome, record.rest + record.detail
    return at.RECORD_SIZE + sum(-(-len(part) // at.WORD) * at.WORD for part in parts)
