"""shmepoch: one runtime epoch, shared by the processes of an agent deployment.

In the order in which a program needs them:

- a runtime: `RuntimeSessionAdapter.ephemeral` or `.persistent(SqliteRuntimeStore(path))`, and its
  `prepare_bindings`, which gives `SessionRuntimeBindings`
- a child process: `bindings.env()` and there `SessionRuntimeBindings.from_env()`, or pickle, or a
  token
- a worker: `with bindings.operation(name)`, or each step with `bindings.ops_lifecycle`
- an agent: `AgentFactory().build(session_id, SessionOwned(bindings))`, and its `wait` and `drain`
- a loop that wakes the agent: `RuntimeLoop`
- monitoring: `list_sessions`, `observe_session`, `remove_unused`, and the `shmepoch` command

All errors are subclasses of `ShmepochError`.
"""

from shmepoch import starting  # first: it handles a Ctrl-C during the other imports
from shmepoch.config import OpsLifecycleConfig
from shmepoch.epoch.bindings import (
    RuntimeBuildMode,
    SessionOwned,
    SessionRuntimeBindings,
    StandaloneEphemeral,
)
from shmepoch.epoch.completions import (
    CompletionBatch,
    CompletionEntry,
    CompletionFeed,
    CompletionFeedGap,
    CompletionSeq,
)
from shmepoch.epoch.cursors import CursorState, EpochCursorSnapshot, EpochCursorState
from shmepoch.epoch.handle import EpochHandle
from shmepoch.epoch.lifecycle import OpsLifecycleRegistry
from shmepoch.epoch.operations import (
    DEFAULT_MAX_COMPLETED,
    Aborted,
    Cancelled,
    Completed,
    Failed,
    OperationKind,
    OperationLifecycleSnapshot,
    OperationPeerHandle,
    OperationProgressUpdate,
    OperationResult,
    OperationSpec,
    OperationStatus,
    OperationTerminalOutcome,
    Retired,
    Terminated,
    TrustedPeerSpec,
    WaitAllResult,
    WaitAllSatisfied,
)
from shmepoch.epoch.persisted import PersistedOpsSnapshot
from shmepoch.epoch.registry import RuntimeOpsLifecycleRegistry
from shmepoch.epoch.waits import OperationCompletionWatch
from shmepoch.errors import (
    AdapterClosed,
    AgentAlreadyActive,
    AlreadyPeerReady,
    AlreadyRegistered,
    ArgumentInvalid,
    BindingsClosed,
    BindingsMismatch,
    BindingsNotTransferable,
    BoundaryClosed,
    CaptureInvalid,
    ChannelClosed,
    ConfigInvalid,
    CursorAhead,
    CursorsOnly,
    DuplicateWaitOperation,
    EpochGone,
    EpochSealed,
    InvalidTransition,
    LayoutUnsupported,
    LoopAlreadyActive,
    LoopAnswerInvalid,
    MaxConcurrentExceeded,
    NamespaceInvalid,
    NotFound,
    ObserverReadOnly,
    OutcomeDropped,
    ParticipantsExhausted,
    PayloadTooLarge,
    PeerNotExpected,
    RecordInvalid,
    RecoveryNeedsRoom,
    RuntimeAlreadyActive,
    SegmentCorrupted,
    SegmentExists,
    SegmentForeign,
    SegmentInRemoval,
    SessionBusy,
    SessionNotFound,
    SessionNotRegistered,
    SharedMemoryExhausted,
    SharedMemoryUnusable,
    ShmepochError,
    StoreBehind,
    StoreConflict,
    StoreError,
    StoreLoadFailed,
    StoreReadFailed,
    StoreUnusable,
    StoreWriteFailed,
    TokenInvalid,
    WaitAlreadyActive,
    WitnessMismatch,
    WriterBusy,
)
from shmepoch.ids import (
    OperationId,
    RunId,
    RuntimeEpochId,
    SessionId,
    WaitRequestId,
    dec_hook,
    enc_hook,
)
from shmepoch.memory.participants import Participant, Role
from shmepoch.runtime.adapter import RuntimeSessionAdapter
from shmepoch.runtime.boundary import AgentBoundary, Drain, Notice
from shmepoch.runtime.factory import AgentFactory
from shmepoch.runtime.loop import Continuation, RuntimeLoop
from shmepoch.runtime.observing import list_sessions, observe_session, remove_unused
from shmepoch.runtime.persistence import ChannelStatus, PersistenceChannel
from shmepoch.stores import InMemoryRuntimeStore, RuntimeStore, SqliteRuntimeStore

__all__ = [
    "DEFAULT_MAX_COMPLETED",
    "Aborted",
    "AdapterClosed",
    "AgentAlreadyActive",
    "AgentBoundary",
    "AgentFactory",
    "AlreadyPeerReady",
    "AlreadyRegistered",
    "ArgumentInvalid",
    "BindingsClosed",
    "BindingsMismatch",
    "BindingsNotTransferable",
    "BoundaryClosed",
    "Cancelled",
    "CaptureInvalid",
    "ChannelClosed",
    "ChannelStatus",
    "Completed",
    "CompletionBatch",
    "CompletionEntry",
    "CompletionFeed",
    "CompletionFeedGap",
    "CompletionSeq",
    "ConfigInvalid",
    "Continuation",
    "CursorAhead",
    "CursorState",
    "CursorsOnly",
    "Drain",
    "DuplicateWaitOperation",
    "EpochCursorSnapshot",
    "EpochCursorState",
    "EpochGone",
    "EpochHandle",
    "EpochSealed",
    "Failed",
    "InMemoryRuntimeStore",
    "InvalidTransition",
    "LayoutUnsupported",
    "LoopAlreadyActive",
    "LoopAnswerInvalid",
    "MaxConcurrentExceeded",
    "NamespaceInvalid",
    "NotFound",
    "Notice",
    "ObserverReadOnly",
    "OperationCompletionWatch",
    "OperationId",
    "OperationKind",
    "OperationLifecycleSnapshot",
    "OperationPeerHandle",
    "OperationProgressUpdate",
    "OperationResult",
    "OperationSpec",
    "OperationStatus",
    "OperationTerminalOutcome",
    "OpsLifecycleConfig",
    "OpsLifecycleRegistry",
    "OutcomeDropped",
    "Participant",
    "ParticipantsExhausted",
    "PayloadTooLarge",
    "PeerNotExpected",
    "PersistedOpsSnapshot",
    "PersistenceChannel",
    "RecordInvalid",
    "RecoveryNeedsRoom",
    "Retired",
    "Role",
    "RunId",
    "RuntimeAlreadyActive",
    "RuntimeBuildMode",
    "RuntimeEpochId",
    "RuntimeLoop",
    "RuntimeOpsLifecycleRegistry",
    "RuntimeSessionAdapter",
    "RuntimeStore",
    "SegmentCorrupted",
    "SegmentExists",
    "SegmentForeign",
    "SegmentInRemoval",
    "SessionBusy",
    "SessionId",
    "SessionNotFound",
    "SessionNotRegistered",
    "SessionOwned",
    "SessionRuntimeBindings",
    "SharedMemoryExhausted",
    "SharedMemoryUnusable",
    "ShmepochError",
    "SqliteRuntimeStore",
    "StandaloneEphemeral",
    "StoreBehind",
    "StoreConflict",
    "StoreError",
    "StoreLoadFailed",
    "StoreReadFailed",
    "StoreUnusable",
    "StoreWriteFailed",
    "Terminated",
    "TokenInvalid",
    "TrustedPeerSpec",
    "WaitAllResult",
    "WaitAllSatisfied",
    "WaitAlreadyActive",
    "WaitRequestId",
    "WitnessMismatch",
    "WriterBusy",
    "dec_hook",
    "enc_hook",
    "list_sessions",
    "observe_session",
    "remove_unused",
]


def __getattr__(name: str) -> str:
    if name == "__version__":
        from importlib.metadata import version  # reads files, which most programs never need

        return version("shmepoch")
    raise AttributeError(f"module 'shmepoch' has no attribute {name!r}")


starting.imported()
