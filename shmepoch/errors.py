"""The errors: one hierarchy, each class with its facts as attributes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Never, dataclass_transform

if TYPE_CHECKING:
    from pathlib import Path

    from shmepoch.ids import OperationId, RuntimeEpochId, SessionId


#: The number of characters of a conflicting value that an error's text shows. Its attributes have
#: the whole value.
_SHOWN = 400


@dataclass_transform(eq_default=False)
class ShmepochError(Exception):
    """Base of all errors that shmepoch itself raises.

    The annotated attributes of a subclass are its facts. They are the arguments of its constructor,
    by position or by name; a fact with a value is optional. `message` is the error's text, with
    facts in braces; its lines are joined. A class without a text is a base of others and cannot be
    raised itself. An error survives pickling: an error from a worker arrives whole in its parent.
    """

    message: ClassVar[str]
    _facts: ClassVar[dict[str, str]] = {}
    _defaults: ClassVar[dict[str, object]] = {}

    def __init_subclass__(cls) -> None:
        # No dataclasses: making sixty of them takes every process more than ten milliseconds.
        own = cls.__annotations__
        cls._facts = cls._facts | own
        cls._defaults = cls._defaults | {name: vars(cls)[name] for name in own if name in vars(cls)}

    # Never is for the classes without facts; type checkers know the signature of the others.
    def __init__(self, *values: Never, **named: Never) -> None:
        given = dict(zip(self._facts, values, strict=False)) | named
        facts = self._defaults | given
        if len(given) < len(values) + len(named) or facts.keys() != self._facts.keys():
            raise TypeError(
                f"{type(self).__name__}({', '.join(self._facts)}) was given {len(values)} facts "
                f"by position and {[*named]} by name"
            )
        vars(self).update(facts)
        super().__init__(self._text())

    def _text(self) -> str:
        """The text of the error, for `str`. A class overrides it if its message is not fixed."""
        return " ".join(self.message.split()).format_map(vars(self))

    def __reduce__(self) -> tuple[Callable[..., ShmepochError], tuple[Any, ...]]:
        return _restore, (type(self), self.args, self.__dict__.copy())


def _restore(
    kind: type[ShmepochError], args: tuple[Any, ...], facts: dict[str, Any]
) -> ShmepochError:
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(facts)
    return error


# --- operations -------------------------------------------------------------------------------


class AlreadyRegistered(ShmepochError):
    """An operation with this id is in the registry already."""

    id: OperationId
    message = """operation {id} is already registered; register each operation once, a retry under a
    new id"""


class NotFound(ShmepochError, LookupError):
    """The registry holds no operation with this id: never registered, collected, or evicted."""

    id: OperationId
    message = """operation {id} is not in the registry: it was never registered here, or it ended
    and was collected or evicted"""


class OutcomeDropped(NotFound):
    """The operation ended, and its outcome is gone: the feed dropped its entry, and it was not kept
    for this watcher."""

    message = """operation {id} ended, and its outcome is gone: the feed dropped it, and the epoch
    had no room to keep it for its watchers, or this watcher was closed; read it from the store, or
    create the epoch with a larger max_operations or feed_bytes"""


class InvalidTransition(ShmepochError):
    """The operation's status does not allow this action."""

    id: OperationId
    status: str
    action: str
    message = "operation {id} is {status}, which does not allow {action}"


class PeerNotExpected(ShmepochError):
    """A peer channel was handed over for an operation of a kind without peers."""

    id: OperationId
    message = "operation {id} does not expect a peer: only mob_member_child operations do"


class AlreadyPeerReady(ShmepochError):
    """The operation's peer channel was handed over before."""

    id: OperationId
    message = "operation {id} already has its peer; it is handed over once"


class MaxConcurrentExceeded(ShmepochError):
    """The registry's limit of running operations is reached, or the `entering` ones would exceed
    it."""

    limit: int
    active: int
    entering: int = 1
    setting: str = "max_concurrent"

    def _text(self) -> str:
        together = f", {self.entering} were to be registered together" if self.entering > 1 else ""
        return (
            f"{self.active} operations have not ended{together} and the limit is {self.limit}; "
            f"end some first, or create the epoch with a larger {self.setting}"
        )


class DuplicateWaitOperation(ShmepochError, ValueError):
    """`wait_all` was given the same operation twice."""

    id: OperationId
    message = "operation {id} is in the same wait_all twice; name it once"


class WaitAlreadyActive(ShmepochError):
    """A `wait_all` is in progress on this registry handle."""

    message = "this registry handle is already in a wait_all; await or cancel that one first"


class PayloadTooLarge(ShmepochError, ValueError):
    """An encoded record does not fit the room that the epoch reserved for it."""

    size: int
    limit: int
    what: str
    setting: str | None = None

    def _text(self) -> str:
        larger = f", or create the epoch with a larger {self.setting}" if self.setting else ""
        return (
            f"{self.what} takes {self.size} bytes and the limit is {self.limit}; shorten it{larger}"
        )


class ArgumentInvalid(ShmepochError, TypeError):
    """A call was given an argument of a wrong type."""

    call: str
    argument: str
    expected: str
    actual: str
    hint: str = ""

    def _text(self) -> str:
        hint = f"; {self.hint}" if self.hint else ""
        return (
            f"{self.call} takes {self.expected} as {self.argument}, and was given "
            f"{self.actual}{hint}"
        )


class RecordInvalid(ShmepochError, ValueError):
    """A value is not the record it should be; `reason` names the field."""

    kind: str
    reason: str
    message = "not a valid {kind}: {reason}"


class ConfigInvalid(ShmepochError, ValueError):
    """A setting is outside its range."""

    setting: str
    value: object
    allowed: str
    message = "{setting} is {value!r}; it must be {allowed}"


class RecoveryNeedsRoom(ShmepochError, ValueError):
    """An epoch is too small for the stored one that is to be continued in it."""

    epoch_id: RuntimeEpochId
    setting: str
    needed: int
    given: int
    message = """to continue epoch {epoch_id}, {setting} must be at least {needed}, and it is
    {given}; nothing was recovered. Make the new epoch with an OpsLifecycleConfig of that size"""


class CursorAhead(ShmepochError):
    """A cursor stands beyond the feed: its consumer is told of no completion up to there."""

    epoch_id: RuntimeEpochId
    cursor: str
    position: int
    watermark: int
    message = """{cursor} of epoch {epoch_id} stands at {position}, beyond the feed's watermark
    {watermark}: no completion up to there is new to its consumer. A cursor never goes back; advance
    it to the watermark of a batch at most, and reset the session to start over"""


# --- epochs -----------------------------------------------------------------------------------


class EpochSealed(ShmepochError):
    """The epoch was ended by a reset or an unregister and takes no more changes."""

    epoch_id: RuntimeEpochId
    message = """epoch {epoch_id} is sealed: its session was reset or unregistered; ask the runtime
    for new bindings"""


class WriterBusy(ShmepochError):
    """Another transition of the epoch is in progress, and this call does not wait for it."""

    epoch_id: RuntimeEpochId
    message = "another transition of epoch {epoch_id} is in progress; try again later"


class EpochGone(ShmepochError):
    """The epoch's segment is not in shared memory any more."""

    session_id: SessionId
    epoch_id: RuntimeEpochId
    name: str
    message = """epoch {epoch_id} of session {session_id} is gone: shared memory has its {name!r} no
    more. The session was unregistered, the machine restarted, something else removed files from
    /dev/shm, or systemd did when the user's last login ended (RemoveIPC=yes in logind.conf); ask
    the runtime for new bindings"""


class WitnessMismatch(ShmepochError):
    """The handle carries another key than the epoch it names."""

    epoch_id: RuntimeEpochId
    message = """the handle does not carry the witness key of epoch {epoch_id}; it was not issued by
    this epoch's runtime"""


class BindingsMismatch(ShmepochError):
    """A factory, or an operation, of the session `expected` was given bindings of `actual`."""

    expected: SessionId
    actual: SessionId
    registering: OperationId | None = None

    def _text(self) -> str:
        if self.registering is None:
            return (
                f"building session {self.expected}, but the bindings were prepared for session "
                f"{self.actual}; pass the bindings that prepare_bindings returned for the session "
                "being built"
            )
        return (
            f"operation {self.registering} is owned by session {self.expected}, but is registered "
            f"with the bindings of session {self.actual}; register it with those of its owner, or "
            "leave owner_session_id out"
        )


class BindingsNotTransferable(ShmepochError):
    """Local-only bindings, and an observer's, cannot leave their process."""

    observer: bool = False

    def _text(self) -> str:
        if self.observer:
            return (
                "an observer's bindings stay in its process; observe the session from the other "
                "one, too, or pass it the bindings that RuntimeSessionAdapter.prepare_bindings "
                "returned"
            )
        return (
            "standalone bindings live in this process's private memory and cannot leave it; "
            "use RuntimeSessionAdapter.prepare_bindings for bindings that other processes share"
        )


class ObserverReadOnly(ShmepochError):
    """A change was requested through an observer's bindings, which can only read."""

    epoch_id: RuntimeEpochId
    message = """these bindings of epoch {epoch_id} are an observer's and change nothing; ask the
    session's runtime for bindings (prepare_bindings, or a token of them)"""


class TokenInvalid(ShmepochError, ValueError):
    """A token is cut, edited, of another version, or not a token at all."""

    reason: str
    message = "not a usable bindings token: {reason}; pass the text of to_token() unchanged"


class BindingsClosed(ShmepochError):
    """This process gave up its bindings of the epoch."""

    epoch_id: RuntimeEpochId
    message = """this process closed its bindings of epoch {epoch_id}; keep them open while they are
    used, or attach again from the token"""


class SessionNotFound(ShmepochError, LookupError):
    """The session has no segment in shared memory."""

    session_id: SessionId
    namespace: str
    message = """session {session_id} has no epoch in shared memory in namespace {namespace!r};
    list_sessions names those that have one. A runtime makes it (prepare_bindings), from its store
    if it has one"""


class SessionNotRegistered(ShmepochError, LookupError):
    """The adapter does not run this session."""

    session_id: SessionId
    message = """session {session_id} is not registered with this adapter; call register_session or
    prepare_bindings first"""


class SessionBusy(ShmepochError):
    """A signal handler or finalizer interrupted a call about a session, and made another."""

    session_id: SessionId
    message = """this thread is in the middle of a call about session {session_id}, which a signal
    handler or finalizer interrupted; make the call after that one has returned"""


class RuntimeAlreadyActive(ShmepochError):
    """Another live runtime owns the session."""

    session_id: SessionId
    pid: int
    message = """session {session_id} already has a live runtime: process {pid} (its own PID
    namespace); attach with its bindings, or end it first"""


class AgentAlreadyActive(ShmepochError):
    """The session has a live agent already."""

    session_id: SessionId
    pid: int
    message = """session {session_id} already has a live agent: process {pid} (its own PID
    namespace; 0: unknown); close that agent's boundary or end its process first, or build every
    agent of the session with sharing=True"""


class LoopAlreadyActive(ShmepochError):
    """A runtime loop runs on the epoch already."""

    session_id: SessionId
    pid: int
    message = """session {session_id} already has a running loop: in process {pid} (its own PID
    namespace; 0: unknown); stop that one first, or let it do the work"""


class LoopAnswerInvalid(ShmepochError, TypeError):
    """A function of a runtime loop returned something other than True or False."""

    function: str
    answer: str

    def _text(self) -> str:
        rule = _ANSWERS[self.function]
        return f"{self.function} of a RuntimeLoop returned {_short(self.answer)}; {rule}"


_ANSWERS = {
    "inject": "it returns True for a continuation that the session accepted, False for a refused "
    "one, and may be a coroutine function",
    "quiescent": "it returns True while the session is between turns, else False, and may not be a "
    "coroutine function",
}


class BoundaryClosed(ShmepochError):
    """This process is not the session's agent any more."""

    session_id: SessionId
    message = """this boundary of session {session_id} is closed: it or its bindings were closed, or
    the process that built it has forked this one; build the agent again"""


class AdapterClosed(ShmepochError):
    """The session adapter was closed."""

    message = "this RuntimeSessionAdapter is closed; make a new one"


# --- segments ---------------------------------------------------------------------------------


class NamespaceInvalid(ShmepochError, ValueError):
    """A namespace is not a short plain word."""

    namespace: str
    limit: int
    message = """namespace {namespace!r} is not usable; it takes 1 to {limit} letters, digits, '-'
    or '_' (parameter namespace or environment variable SHMEPOCH_NAMESPACE)"""


class SegmentExists(ShmepochError):
    """A segment of this name is there already."""

    name: str
    message = "segment {name!r} exists already; attach to it, or remove it first (remove_unused)"


class SegmentInRemoval(ShmepochError):
    """A process is removing the segment and does not go on, so the segment cannot be attached."""

    name: str
    waited_s: float
    message = """segment {name!r} is being removed by a process that did not go on for {waited_s} s;
    continue that process, or kill it, and the segment can be attached or made anew"""


class SegmentForeign(ShmepochError, PermissionError):
    """The segment belongs to another user or is open to others."""

    name: str
    field: str
    expected: object
    actual: object
    message = """segment {name!r} is not this user's alone: its {field} is {actual}, not {expected};
    it was not made by shmepoch for this user, or was changed since"""


class SegmentCorrupted(ShmepochError):
    """A segment does not match its layout; `field` is the wrong part."""

    name: str
    field: str
    expected: object
    actual: object
    message = """segment {name!r} is corrupted: {field} is {actual!r}, not {expected!r}; end the
    processes that use it and call remove_unused, or prepare the session with an adapter that was
    made with rotate_if_unloadable=True, which removes the segment; the session then goes on from
    its store, or with a new epoch"""


class LayoutUnsupported(ShmepochError):
    """The segment was written by a release with another layout."""

    name: str
    expected: int
    actual: int
    message = """segment {name!r} has layout version {actual}, this release reads {expected}; use
    the same release of shmepoch in every process of a deployment. If no process of the other
    release runs, remove_unused removes the segment"""


class SharedMemoryExhausted(ShmepochError, OSError):
    """There is no room in shared memory for a new segment."""

    need: int
    room: int
    directory: str
    message = """a new epoch needs {need} bytes in {directory} and {room} are free; enlarge it
    (docker run --shm-size=1g; Compose shm_size: 1g; Kubernetes: an emptyDir with medium: Memory
    mounted there), remove epochs that are no longer used (list_sessions, remove_unused), or create
    the epoch with a smaller OpsLifecycleConfig"""


class SharedMemoryUnusable(ShmepochError):
    """There is no shared memory, or this user may not use it."""

    directory: str
    reason: str
    message = """shared memory cannot be used: {directory} {reason}; it takes a tmpfs that is
    mounted there and that this user may write to (mount -t tmpfs -o mode=1777 tmpfs /dev/shm)"""


class ParticipantsExhausted(ShmepochError):
    """Every participant slot of the epoch is held by a live process."""

    limit: int
    name: str
    message = """all {limit} participant slots of segment {name!r} are held by live processes;
    detach some, or create the epoch with a larger max_participants"""


class CursorsOnly(ShmepochError):
    """An epoch was made without a feed, and a call needs one."""

    message = "this memory holds cursors only; operations and a feed need an OpsLifecycleConfig"


# --- stores -----------------------------------------------------------------------------------


class StoreError(ShmepochError):
    """Base of the errors between an epoch and its store."""


class StoreLoadFailed(StoreError):
    """The store could not load a session. That is not an empty store."""

    session_id: SessionId
    reason: str
    message = """the store could not load session {session_id}: {reason}. Nothing was started, since
    a failed load is not an empty store; mend the store, or rotate the epoch on purpose"""


class StoreWriteFailed(StoreError):
    """The store did not take a write; the epoch goes on and the write is tried again."""

    reason: str
    message = "the store did not take a write: {reason}; it is tried again"


class StoreReadFailed(StoreError):
    """The store could not read the requested data. That is not an empty answer."""

    reason: str
    message = "the store could not be read: {reason}; mend the store and ask again"


class StoreUnusable(StoreError):
    """The file at the path cannot serve as a store."""

    path: Path
    reason: str
    message = "{path} cannot be used as a store: {reason}"


class StoreConflict(StoreError):
    """The data to be saved contradicts the stored data; saving it again cannot succeed."""

    epoch_id: RuntimeEpochId
    field: str
    stored: object
    offered: object

    def _text(self) -> str:
        return (
            f"epoch {self.epoch_id}: {self.field} is stored as {_short(self.stored)} and was "
            f"offered as {_short(self.offered)}; nothing was saved. Two histories carry the name "
            "of one epoch: save each to a store of its own"
        )


class CaptureInvalid(StoreError, OverflowError):
    """The captured state of an epoch has a value that no store can keep.

    The memory of that epoch is damaged. Saving it again cannot succeed; other epochs are not
    delayed by it.
    """

    epoch_id: RuntimeEpochId
    field: str
    value: int
    allowed: str
    message = """epoch {epoch_id} cannot be stored: {field} is {value}; it must be {allowed}. Its
    segment is damaged, and what is stored of it is sound: end its session with unregister_session
    or reset_session"""


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


class StoreBehind(StoreError, TimeoutError):
    """The store has not reached the position for which a call waits.

    `completed` tells whether the operation ended. False: it is as it was, since its completion
    would have left the store too far behind. The call may be made again. True: its completion
    stands, as `awaited_seq`, and is not durable yet.
    """

    epoch_id: RuntimeEpochId
    durable_seq: int
    awaited_seq: int
    watermark: int
    waited_ms: int
    completed: bool = False

    @property
    def lag(self) -> int:
        """The number of completions of the feed that the store does not have."""
        return self.watermark - self.durable_seq

    def _text(self) -> str:
        awaited = self.awaited_seq
        if self.completed:
            what = f"this completion, {awaited}, stands and is not durable yet"
            setting, then = "timeout", f"then wait with the feed's wait_durable({awaited})"
        else:
            what = f"before there is room for more it has to have those up to {awaited}"
            setting, then = "store_wait_ms", "then make the call again"
        return (
            f"epoch {self.epoch_id}: the store has the completions up to {self.durable_seq} of "
            f"{self.watermark}, and {what}; {self.waited_ms} ms have passed ({setting}). See that "
            f"a persistence channel follows the epoch and what its status says, {then}"
        )


class ChannelClosed(ShmepochError):
    """The persistence channel was closed, or belongs to the process that forked this one."""

    message = """this PersistenceChannel is closed, or was made before a fork and belongs to the
    parent; make a new one"""
