"""Operations: their records, their outcomes, and the table of their lifecycle."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Final, TypeAlias

import msgspec

from shmepoch.epoch.codec import Record
from shmepoch.ids import OperationId, RunId, SessionId, WaitRequestId
from shmepoch.memory.clock import moment

#: The number of terminal operations that a registry retains by default.
DEFAULT_MAX_COMPLETED: Final = 256

#: The largest count, or number of milliseconds, that a record and a store can hold.
LAST_COUNT: Final = 2**63 - 1
Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=LAST_COUNT)]


class OperationKind(StrEnum):
    """The kind of an operation's work."""

    MOB_MEMBER_CHILD = "mob_member_child"
    """A child agent; it may hand over a peer channel, and its end does not wake an agent."""
    BACKGROUND_TOOL_OP = "background_tool_op"
    """A tool that runs in the background; the agent is told of its end."""


class OperationStatus(StrEnum):
    """The place of an operation in its lifecycle."""

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
    """The facts of an operation at its registration.

    `owner_session_id` must be the registry's session; the registry fills it in if it is None. An
    encoded spec has at most 512 bytes: `display_name` and `source_label` together have about 300.
    """

    id: OperationId
    kind: OperationKind
    owner_session_id: SessionId | None = None
    display_name: str
    source_label: str
    child_session_id: SessionId | None = None
    expect_peer_channel: bool = False


class OperationResult(Record, kw_only=True, frozen=True):
    """The result of a completed operation; `is_error` marks a tool's own failure."""

    id: OperationId
    content: str
    is_error: bool = False
    duration_ms: Count = 0
    tokens_used: Count = 0


class OperationProgressUpdate(Record, frozen=True):
    """The progress of a running operation; `percent` is 0 to 100 if it is known.

    A message that is too long is cut and ends with an ellipsis: above about 450 bytes, or above 60
    beside a long peer handle.
    """

    message: str
    percent: Annotated[float, msgspec.Meta(ge=0, le=100)] | None = None


class TrustedPeerSpec(Record, frozen=True):
    """A peer agent and its address."""

    name: str
    peer_id: str
    address: str


class OperationPeerHandle(Record, frozen=True):
    """The channel that a child agent hands over once it is ready; 400 bytes at most, encoded."""

    peer_name: str
    trusted_peer: TrustedPeerSpec


class _Outcome(Record, frozen=True, tag_field="outcome_type"):
    """The properties that every kind of outcome has."""

    @property
    def ok(self) -> bool:
        """Whether the operation completed, and its result is not a tool's own failure."""
        return False

    @property
    def text(self) -> str:
        """The text of the outcome: the content, the error or the reason; empty if there is none."""
        return ""


class Completed(_Outcome, frozen=True, tag="completed"):
    """The operation ran to its end and returned `result`."""

    result: OperationResult

    @property
    def ok(self) -> bool:
        return not self.result.is_error

    @property
    def text(self) -> str:
        return self.result.content


class Failed(_Outcome, frozen=True, tag="failed"):
    """The operation could not be started, or stopped with `error`."""

    error: str

    @property
    def text(self) -> str:
        return self.error


class _Reasoned(_Outcome, frozen=True):
    reason: str | None = None

    @property
    def text(self) -> str:
        return self.reason or ""


class Aborted(_Reasoned, frozen=True, tag="aborted"):
    """The operation was given up while it was still being provisioned."""


class Cancelled(_Reasoned, frozen=True, tag="cancelled"):
    """The operation was no longer wanted."""


class Retired(_Outcome, frozen=True, tag="retired"):
    """The operation finished early on request."""


class Terminated(_Outcome, frozen=True, tag="terminated"):
    """The operation's owner or process ended before it; `reason` says why."""

    reason: str

    @property
    def text(self) -> str:
        return self.reason


OperationTerminalOutcome: TypeAlias = (
    Completed | Failed | Aborted | Cancelled | Retired | Terminated
)
"""The outcome of an operation: exactly one of these; `outcome_type` says which."""


def status_of(outcome: OperationTerminalOutcome) -> OperationStatus:
    """The terminal status that `outcome` gives its operation: its tag, by construction."""
    return OperationStatus(str(outcome.__struct_config__.tag))


class OperationLifecycleSnapshot(Record, kw_only=True, frozen=True):
    """One operation as it stood at one instant.

    The `_at_ms` fields are wall-clock milliseconds since the Unix epoch; they never decrease from
    created to completed. `elapsed_ms` is the monotonic time from registration to the end, and None
    before.
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

    @property
    def created_at(self) -> datetime:
        """The time of its registration, in UTC; `OverflowError` if that is in no year of the
        calendar. The other times raise it too."""
        return moment(self.created_at_ms)

    @property
    def started_at(self) -> datetime | None:
        """The time of its start, in UTC."""
        return None if self.started_at_ms is None else moment(self.started_at_ms)

    @property
    def completed_at(self) -> datetime | None:
        """The time of its end, in UTC."""
        return None if self.completed_at_ms is None else moment(self.completed_at_ms)


class WaitAllSatisfied(Record, kw_only=True, frozen=True):
    """Proof that every operation of one `wait_all` had ended."""

    wait_request_id: WaitRequestId
    run_id: RunId
    operation_ids: tuple[OperationId, ...]


class WaitAllResult(Record, kw_only=True, frozen=True):
    """The result of `wait_all`: `(id, outcome)` in the order of the argument, and the proof."""

    outcomes: tuple[tuple[OperationId, OperationTerminalOutcome], ...]
    satisfied: WaitAllSatisfied


class Action(StrEnum):
    """The actions on a registered operation; the names that `InvalidTransition` shows."""

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

#: OPS-1. The lifecycle: for each action, the statuses in which it is allowed, and its target status
#: (None: the status stays). The registry's guard reads it, and the tests enumerate it.
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
