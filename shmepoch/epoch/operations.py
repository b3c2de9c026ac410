"""Operations: what one is, what can become of it, and the table of its lifecycle."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Final, TypeAlias

import msgspec

from shmepoch.epoch.codec import Record
from shmepoch.ids import OperationId, RunId, SessionId, WaitRequestId

#: How many terminal operations a registry retains unless told otherwise.
DEFAULT_MAX_COMPLETED: Final = 256

#: How many there are, or a number of milliseconds: what a record and a store can hold of one.
LAST_COUNT: Final = 2**63 - 1
Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=LAST_COUNT)]


class OperationKind(StrEnum):
    """What sort of work an operation is."""

    MOB_MEMBER_CHILD = "mob_member_child"
    """A child agent; it may hand over a peer channel, and its end wakes no agent."""
    BACKGROUND_TOOL_OP = "background_tool_op"
    """A tool that runs in the background; the agent is told of its end."""


class OperationStatus(StrEnum):
    """Where an operation is in its lifecycle."""

    ABSENT = "absent"
    PROVISIONING = "provisioning"
    RUNNING = "running"
    RETIRING = "retiring"
    COMPLETED = "completed"
    FAILED = "failed"
    ABORTED = "aborted"
    CANCELLED = "cancelled"
    RETIRED = "retired"
    TERMINATED = "terminated"

    @property
    def is_terminal(self) -> bool:
        """Whether an operation with this status has ended."""
        return self in _TERMINAL


class OperationSpec(Record, kw_only=True, frozen=True):
    """What is known of an operation when it is registered.

    `owner_session_id` is the session of the registry that it is registered with, which fills it in
    where it is None. Encoded, a spec has at most 512 bytes: `display_name` and `source_label` have
    about 300 between them.
    """

    id: OperationId
    kind: OperationKind
    owner_session_id: SessionId | None = None
    display_name: str
    source_label: str
    child_session_id: SessionId | None = None
    expect_peer_channel: bool = False


class OperationResult(Record, kw_only=True, frozen=True):
    """What a completed operation returned; `is_error` marks a tool's own failure."""

    id: OperationId
    content: str
    is_error: bool = False
    duration_ms: Count = 0
    tokens_used: Count = 0


class OperationProgressUpdate(Record, frozen=True):
    """How far a running operation has come; `percent` is 0 to 100 where it is known.

    A message of more than about 450 bytes, or of more than 60 beside a long peer handle, is cut to
    what fits, and ends with an ellipsis then.
    """

    message: str
    percent: Annotated[float, msgspec.Meta(ge=0, le=100)] | None = None


class TrustedPeerSpec(Record, frozen=True):
    """A peer agent and where it is reached."""

    name: str
    peer_id: str
    address: str


class OperationPeerHandle(Record, frozen=True):
    """The channel that a child agent hands over once it is ready; 400 bytes at most, encoded."""

    peer_name: str
    trusted_peer: TrustedPeerSpec


class Completed(Record, frozen=True, tag_field="outcome_type", tag="completed"):
    """The operation ran to its end and returned `result`."""

    result: OperationResult


class Failed(Record, frozen=True, tag_field="outcome_type", tag="failed"):
    """The operation could not be started or broke off with `error`."""

    error: str


class Aborted(Record, frozen=True, tag_field="outcome_type", tag="aborted"):
    """The operation was given up while it was still being provisioned."""

    reason: str | None = None


class Cancelled(Record, frozen=True, tag_field="outcome_type", tag="cancelled"):
    """The operation was no longer wanted."""

    reason: str | None = None


class Retired(Record, frozen=True, tag_field="outcome_type", tag="retired"):
    """The operation was wound down on request."""


class Terminated(Record, frozen=True, tag_field="outcome_type", tag="terminated"):
    """The operation's owner or process ended under it, for the given `reason`."""

    reason: str


OperationTerminalOutcome: TypeAlias = (
    Completed | Failed | Aborted | Cancelled | Retired | Terminated
)
"""How an operation ended: exactly one of these, told apart by `outcome_type`."""


def status_of(outcome: OperationTerminalOutcome) -> OperationStatus:
    """The terminal status that `outcome` gives its operation: its tag, by construction."""
    return OperationStatus(str(outcome.__struct_config__.tag))


class OperationLifecycleSnapshot(Record, kw_only=True, frozen=True):
    """One operation as it stood at one instant.

    The `_at_ms` fields are wall-clock milliseconds since the Unix epoch, never decreasing from
    created to completed; `elapsed_ms` is monotonic, from registration to the end, and None before.
    """

    id: OperationId
    kind: OperationKind
    display_name: str
    status: OperationStatus
    peer_ready: bool = False
    progress_count: Count = 0
    watcher_count: Count = 0
    last_progress: OperationProgressUpdate | None = None
    terminal_outcome: OperationTerminalOutcome | None = None
    child_session_id: SessionId | None = None
    peer_handle: OperationPeerHandle | None = None
    created_at_ms: Count = 0
    started_at_ms: Count | None = None
    completed_at_ms: Count | None = None
    elapsed_ms: Count | None = None


class WaitAllSatisfied(Record, kw_only=True, frozen=True):
    """Proof that every operation of one `wait_all` had ended."""

    wait_request_id: WaitRequestId
    run_id: RunId
    operation_ids: tuple[OperationId, ...]


class WaitAllResult(Record, kw_only=True, frozen=True):
    """What `wait_all` returns: `(id, outcome)` in the order asked, and the proof."""

    outcomes: tuple[tuple[OperationId, OperationTerminalOutcome], ...]
    satisfied: WaitAllSatisfied


class Action(StrEnum):
    """What can be asked of a registered operation; the names that `InvalidTransition` shows."""

    PROVISIONING_SUCCEEDED = "provisioning_succeeded"
    PROVISIONING_FAILED = "provisioning_failed"
    ABORT_PROVISIONING = "abort_provisioning"
    PEER_READY = "peer_ready"
    REPORT_PROGRESS = "report_progress"
    COMPLETE_OPERATION = "complete_operation"
    FAIL_OPERATION = "fail_operation"
    CANCEL_OPERATION = "cancel_operation"
    REQUEST_RETIRE = "request_retire"
    MARK_RETIRED = "mark_retired"
    TERMINATE_OWNER = "terminate_owner"


_P, _R, _T = OperationStatus.PROVISIONING, OperationStatus.RUNNING, OperationStatus.RETIRING

#: OPS-1. The lifecycle: for each action, the statuses it is allowed in and the one it leads to
#: (None: the status stays). The registry's guard reads it, the tests enumerate it.
TRANSITIONS: Final[dict[Action, tuple[frozenset[OperationStatus], OperationStatus | None]]] = {
    Action.PROVISIONING_SUCCEEDED: (frozenset({_P}), _R),
    Action.PROVISIONING_FAILED: (frozenset({_P}), OperationStatus.FAILED),
    Action.ABORT_PROVISIONING: (frozenset({_P}), OperationStatus.ABORTED),
    Action.PEER_READY: (frozenset({_R, _T}), None),
    Action.REPORT_PROGRESS: (frozenset({_R, _T}), None),
    Action.COMPLETE_OPERATION: (frozenset({_R, _T}), OperationStatus.COMPLETED),
    Action.FAIL_OPERATION: (frozenset({_P, _R, _T}), OperationStatus.FAILED),
    Action.CANCEL_OPERATION: (frozenset({_P, _R, _T}), OperationStatus.CANCELLED),
    Action.REQUEST_RETIRE: (frozenset({_R}), _T),
    Action.MARK_RETIRED: (frozenset({_R, _T}), OperationStatus.RETIRED),
    Action.TERMINATE_OWNER: (frozenset({_P, _R, _T}), OperationStatus.TERMINATED),
}

_TERMINAL: Final = frozenset(OperationStatus) - {OperationStatus.ABSENT, _P, _R, _T}
