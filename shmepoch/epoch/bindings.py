"""Bindings: the facts of one epoch that a runtime prepares and a factory consumes.

A build consumes bindings; it does not create them.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Final, Protocol, Self, TypeAlias, runtime_checkable

from shmepoch.arguments import require
from shmepoch.config import OpsLifecycleConfig
from shmepoch.epoch.completions import CompletionEntry, CompletionSeq
from shmepoch.epoch.cursors import EpochCursorState
from shmepoch.epoch.handle import EpochHandle
from shmepoch.epoch.operations import OperationKind, OperationSpec
from shmepoch.epoch.persisted import SkippedRange
from shmepoch.epoch.registry import RuntimeOpsLifecycleRegistry
from shmepoch.epoch.scope import OperationScope
from shmepoch.errors import BindingsClosed, BindingsNotTransferable, TokenInvalid
from shmepoch.forking import Part, on_fork
from shmepoch.ids import OperationId, RuntimeEpochId, SessionId
from shmepoch.lazy import lazy
from shmepoch.memory.claims import Claim
from shmepoch.memory.participants import Participant, Role
from shmepoch.memory.segment import Segment, SharedSegment

#: The environment variable that carries a token to child processes.
VARIABLE: Final = "SHMEPOCH_BINDINGS"


@runtime_checkable
class History(Protocol):
    """A place that keeps completions which the feed no longer holds."""

    def list_entries(
        self, epoch_id: RuntimeEpochId, after_seq: CompletionSeq, through_seq: CompletionSeq
    ) -> Sequence[CompletionEntry]:
        """The kept entries above `after_seq`, up to and including `through_seq`, in order."""
        ...

    def list_skipped(self, epoch_id: RuntimeEpochId) -> Sequence[SkippedRange]:
        """The sequences that were skipped: no completion of the epoch has one of them."""
        ...


class SessionRuntimeBindings:
    """One process's bindings of one epoch: its registry, its cursors, and the way to share them.

    A copy is the same object. In another process, bindings from a pickle or a token attach to the
    same epoch: from a token at once, from a pickle on their first use, which raises the errors of
    `attach`. In this process both resolve to this object. `RuntimeSessionAdapter.prepare_bindings`
    makes them; a consumer never does.
    """

    session_id: SessionId
    epoch_id: RuntimeEpochId
    #: A place that keeps completions which the feed has dropped, if this process has one.
    history: History | None
    _closed: bool

    def __init__(self, segment: Segment) -> None:
        if not isinstance(segment, Segment):
            hint = "bindings come from prepare_bindings, from_token or observe_session"
            require(Segment, segment, "SessionRuntimeBindings", "segment", hint=hint)
        vars(self).update(
            session_id=segment.session_id,
            epoch_id=segment.epoch_id,
            history=None,
            ops_lifecycle=RuntimeOpsLifecycleRegistry(segment),
            _segment=segment,
            _closed=False,
        )

    @classmethod
    def _of_handle(cls, handle: EpochHandle) -> SessionRuntimeBindings:
        """Bindings that attach on their first use."""
        self = cls.__new__(cls)
        vars(self).update(
            session_id=handle.session_id,
            epoch_id=handle.epoch_id,
            history=None,
            handle=handle,
            _closed=False,
        )
        return self

    def __setattr__(self, name: str, value: object) -> None:
        if name != "history":
            raise AttributeError(
                f"{name} of bindings cannot be assigned to: they are the facts of one epoch; "
                "prepare_bindings or attach gives those of another"
            )
        super().__setattr__(name, value)

    @lazy
    def _segment(self) -> Segment:
        return self._attach()

    @lazy
    def ops_lifecycle(self) -> RuntimeOpsLifecycleRegistry:
        """The epoch's operations."""
        self._attach()
        registry: RuntimeOpsLifecycleRegistry = vars(self)["ops_lifecycle"]
        return registry

    @lazy
    def cursor_state(self) -> EpochCursorState:
        """The epoch's cursors; a worker that runs operations never asks for them."""
        return EpochCursorState(self._segment)

    @lazy
    def handle(self) -> EpochHandle | None:
        """The handle to attach with; None for standalone bindings and an observer's."""
        segment = self._segment
        if not isinstance(segment, SharedSegment) or segment.read_only:
            return None
        return EpochHandle(
            namespace=segment.namespace,
            session_id=segment.session_id,
            epoch_id=segment.epoch_id,
            witness=segment.witness,
        )

    @classmethod
    def standalone(
        cls, session_id: SessionId, config: OpsLifecycleConfig | None = None
    ) -> SessionRuntimeBindings:
        """Local bindings for a standalone build: other processes cannot share them."""
        require(SessionId, session_id, "SessionRuntimeBindings.standalone", "session_id")
        require(OpsLifecycleConfig | None, config, "SessionRuntimeBindings.standalone", "config")
        return cls(Segment.private(config or OpsLifecycleConfig(), session_id=session_id))

    @classmethod
    def attach(cls, handle: EpochHandle) -> SessionRuntimeBindings:
        """This process's bindings of the epoch that `handle` names, as a worker until it announces
        another role.

        Raises `EpochGone`, `EpochSealed`, `WitnessMismatch`, `ParticipantsExhausted`, and the
        errors of a segment that is not valid.
        """
        if not isinstance(handle, EpochHandle):
            require(EpochHandle, handle, "SessionRuntimeBindings.attach", "handle")
        with _attached_lock:
            bindings = _known(handle)
            if bindings is None:
                return _remember(cls, _join(handle))
        bindings.require_open()
        return bindings

    @classmethod
    def of_segment(cls, segment: SharedSegment) -> SessionRuntimeBindings:
        """The process's bindings of an attached segment: the existing ones, or new ones.

        After a recovery the epoch has the same name and other memory: its older bindings are not
        reused.
        """
        with _attached_lock:
            reference = _attached.get(segment.witness)
            bindings = None if reference is None else reference()
            if bindings is None:
                return _remember(cls, segment)
        known = bindings.shared_segment()
        if known is not segment:
            segment.close()
        known.ensure_attached()
        return bindings

    @classmethod
    def _unpickle(cls, token: str) -> SessionRuntimeBindings:
        """This process's bindings of a token's epoch; new ones attach on their first use."""
        handle = EpochHandle.from_token(token)
        with _attached_lock:
            return _known(handle) or _sole(handle.witness, cls._of_handle(handle))

    def _attach(self) -> Segment:
        """Attach, if these bindings came from a pickle and were not used since."""
        mine = vars(self)
        with _attached_lock:
            if "_segment" not in mine:
                if self._closed:
                    raise BindingsClosed(self.epoch_id)
                segment = _join(mine["handle"])
                try:
                    registry = RuntimeOpsLifecycleRegistry(segment)
                except BaseException:
                    segment.close()
                    raise
                # A signal handler may have attached meanwhile, but none can run after this check.
                if "_segment" not in mine:
                    mine.update(_segment=segment, ops_lifecycle=registry)
                else:
                    segment.close()
        attached: Segment = mine["_segment"]
        return attached

    def operation(
        self,
        name: str,
        *,
        source: str = "",
        kind: OperationKind = OperationKind.BACKGROUND_TOOL_OP,
        id: OperationId | None = None,
    ) -> OperationScope:
        """One piece of background work of this process, as a block of code or a decorator:

            with bindings.operation("index the repository") as operation:
                operation.progress("half way", percent=50)
                operation.complete("1,204 files")

        `name` and `source` are the operation's `display_name` and `source_label`. Raises
        `RecordInvalid`; entering it raises what `register_operation` does.
        """
        return OperationScope(
            self.ops_lifecycle,
            OperationSpec(
                id=id or OperationId.new(), kind=kind, display_name=name, source_label=source
            ),
        )

    def env(self, environment: Mapping[str, str] | None = None) -> dict[str, str]:
        """An environment for a child process, which attaches with `from_env`: this process's, or
        the one given, with the token as `SHMEPOCH_BINDINGS`.

        The token is a capability, and processes of the same user can read it there. Raises
        `BindingsNotTransferable`.
        """
        before = os.environ if environment is None else environment
        return {**before, VARIABLE: self.to_token()}

    @classmethod
    def from_env(cls, environment: Mapping[str, str] | None = None) -> SessionRuntimeBindings:
        """Attach to the epoch whose token is in `SHMEPOCH_BINDINGS`, as `env` put it there.

        Raises `TokenInvalid`, also where there is none, and what `attach` raises.
        """
        token = (os.environ if environment is None else environment).get(VARIABLE)
        if token is None:
            raise TokenInvalid(
                f"the environment has no {VARIABLE}; start this process with env=bindings.env()"
            )
        return cls.from_token(token)

    def to_token(self) -> str:
        """The bindings as text, for an environment variable or a command line.

        The text is a capability: each process that has it can attach. Raises
        `BindingsNotTransferable` for standalone bindings and an observer's.
        """
        if self.handle is None:
            raise BindingsNotTransferable(observer=self.read_only)
        return self.handle.to_token()

    @classmethod
    def from_token(cls, text: str) -> SessionRuntimeBindings:
        """Attach to the epoch of a token. Raises `TokenInvalid`, and the errors of `attach`."""
        return cls.attach(EpochHandle.from_token(text))

    @property
    def sealed(self) -> bool:
        """Whether the epoch was ended by its runtime."""
        return self._segment.sealed

    @property
    def ended(self) -> bool:
        """Whether the epoch takes no more changes: it is sealed, or found to be gone."""
        return self._segment.ended

    def require_open(self) -> None:
        """Raise `EpochSealed` or `EpochGone` if the epoch has ended."""
        segment = self._segment
        if isinstance(segment, SharedSegment):
            segment.ensure_attached()
            segment.require_name()
        if segment.ended:
            raise segment.closed_error()

    @property
    def skipped(self) -> SkippedRange:
        """The sequences that the last recovery skipped."""
        return self._segment.skipped

    @property
    def read_only(self) -> bool:
        """Whether they are an observer's, and cannot change the epoch."""
        return self._segment.read_only

    def announce(self, role: Role) -> None:
        """Set the role of this process in the epoch; no effect on standalone bindings."""
        require(Role, role, "announce", "role")
        if isinstance(self._segment, SharedSegment):
            self._segment.join(role)

    @property
    def role(self) -> Role | None:
        """The role of this process in the epoch; None for standalone bindings."""
        return self._segment.role if isinstance(self._segment, SharedSegment) else None

    def participants(self) -> list[Participant]:
        """The attached processes, and those that died attached and are not cleared yet."""
        segment = self._segment
        if not isinstance(segment, SharedSegment):
            return []
        participants = segment.participants
        return participants.list(me=segment.participant)

    def claim(self, byte: int, *, shared: bool = False) -> Claim | None:
        """Claim a byte of the epoch, as `Segment.claim` does; for the boundary and the loop.

        Raises `BindingsClosed`, and the errors of attaching.
        """
        return self._segment.claim(byte, shared=shared)

    def has_claimed(self, byte: int) -> bool:
        """Whether this process has claimed `byte`."""
        return any(claim.byte == byte and claim.held for claim in self._segment.claims)

    def claimed_by(self, byte: int, role: Role) -> int:
        """The pid of the process that has claimed `byte` and has the `role` for it: this process,
        or a live participant.

        0 if it is unknown. The process may not have announced the role yet, or may have another
        role besides. Then its pid is returned only if there is exactly one other live participant.
        """
        if self.has_claimed(byte):
            return os.getpid()
        others = [one for one in self.participants() if one.alive and not one.is_self]
        named = [one.pid for one in others if one.role is role]
        if named or len(others) != 1:
            return named[0] if named else 0
        return others[0].pid

    def shared_segment(self) -> SharedSegment:
        """The segment, for the epoch's runtime; `BindingsNotTransferable` for private memory."""
        if not isinstance(self._segment, SharedSegment):
            raise BindingsNotTransferable
        return self._segment

    def close(self) -> None:
        """Leave the epoch: this process's running operations soon end as `Terminated`.

        If it was interrupted, it may be called again.
        """
        with _attached_lock:
            segment = vars(self).get("_segment")
            shared = segment if isinstance(segment, SharedSegment) else self.handle
            if shared is None:
                return  # other processes do not wait for standalone bindings
            vars(self)["_closed"] = True
            reference = _attached.get(shared.witness)
            if reference is not None and reference() is self:
                del _attached[shared.witness]
        if isinstance(segment, SharedSegment):
            segment.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        return self

    def __reduce__(self) -> tuple[object, ...]:
        return SessionRuntimeBindings._unpickle, (self.to_token(),)

    def __repr__(self) -> str:
        attached = "_segment" in vars(self)
        return (
            f"SessionRuntimeBindings(session_id={self.session_id!r}, epoch_id={self.epoch_id!r}, "
            f"ops_lifecycle=<{RuntimeOpsLifecycleRegistry.__name__}>, "
            f"cursor_state={self.cursor_state if attached else '<not attached yet>'!s})"
        )


#: By the segment's own witness key, since a recovered epoch has its name in other memory. Not a
#: WeakValueDictionary: it takes four times as long because it guards its iteration, which is not
#: needed here.
_attached: Final[dict[bytes, weakref.ref[SessionRuntimeBindings]]] = {}
#: Reentrant: at any moment a signal handler may attach, or bindings may be dropped.
_attached_lock = threading.RLock()


def _known(handle: EpochHandle) -> SessionRuntimeBindings | None:
    reference = _attached.get(handle.witness)
    bindings = None if reference is None else reference()
    return bindings if bindings is not None and bindings.handle == handle else None


def _join(handle: EpochHandle) -> SharedSegment:
    """Attach to an epoch as a worker."""
    segment = SharedSegment.attach_epoch(
        handle.namespace, handle.session_id, handle.epoch_id, handle.witness
    )
    try:
        segment.join(Role.WORKER)
    except BaseException:
        segment.close()
        raise
    return segment


def _remember(kind: type[SessionRuntimeBindings], segment: SharedSegment) -> SessionRuntimeBindings:
    """New bindings of a segment, for which this process had none at the last check."""
    try:
        made = kind(segment)
        bindings = _sole(segment.witness, made)
    except BaseException:
        segment.close()
        raise
    if bindings is not made:
        segment.close()
    return bindings


def _sole(key: bytes, made: SessionRuntimeBindings) -> SessionRuntimeBindings:
    """`made`, or the bindings of the same epoch that a signal handler has made meanwhile."""
    reference = weakref.ref(made, partial(_forget, key))
    known = _attached.setdefault(key, reference)()
    if known is None:  # it was dropped just now
        _attached[key] = reference
    if known is None or known is made or known.handle != made.handle:
        return made
    return known


def _forget(key: bytes, reference: weakref.ref[SessionRuntimeBindings]) -> None:
    with _attached_lock:
        if _attached.get(key) is reference:
            del _attached[key]


def _after_fork_in_child() -> None:
    global _attached_lock
    _attached_lock = threading.RLock()  # another thread of the parent may have held it


on_fork(Part.BINDINGS, after_in_child=_after_fork_in_child)


class StandaloneEphemeral:
    """Build with new local bindings: for tests, embedding and examples.

    It works without /dev/shm. The bindings cannot be shared with other processes.
    """

    def __repr__(self) -> str:
        return "StandaloneEphemeral()"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StandaloneEphemeral)

    def __hash__(self) -> int:
        return hash(StandaloneEphemeral)


class SessionOwned:
    """Build with the bindings that the session's runtime prepared."""

    def __init__(self, bindings: SessionRuntimeBindings) -> None:
        require(SessionRuntimeBindings, bindings, "SessionOwned", "bindings")
        self.bindings: Final = bindings

    def __repr__(self) -> str:
        return f"SessionOwned({self.bindings.session_id}, {self.bindings.epoch_id})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SessionOwned) and other.bindings is self.bindings

    def __hash__(self) -> int:
        return hash(self.bindings)


RuntimeBuildMode: TypeAlias = StandaloneEphemeral | SessionOwned
"""Where a factory gets the lifecycle resources for a build."""
