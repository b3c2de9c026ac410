"""Segments: the memory of one epoch, private to a process or a file in /dev/shm."""

from __future__ import annotations

import hmac
import logging
import os
import re
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Final, Protocol

from shmepoch.errors import (
    BindingsClosed,
    EpochGone,
    EpochSealed,
    NamespaceInvalid,
    SegmentCorrupted,
    SegmentExists,
    WitnessMismatch,
)
from shmepoch.forking import Part, on_fork
from shmepoch.ids import RuntimeEpochId, SessionId
from shmepoch.lazy import lazy
from shmepoch.memory import layout as at
from shmepoch.memory._native import Memory, WriterLock, is_locked, try_lock
from shmepoch.memory.bells import SharedWaits
from shmepoch.memory.files import (
    SHM_DIR,
    create_unnamed,
    leave_to_parent,
    let_go,
    link,
    map_shared,
    open_held,
    open_owned,
    unlink,
)
from shmepoch.memory.header import SIZE as HEADER_SIZE
from shmepoch.memory.header import Header, read_header, write_header
from shmepoch.memory.layout import Layout
from shmepoch.memory.participants import Participants, Role
from shmepoch.memory.waiting import AsyncWaits, LocalWaits, Waiters

_log = logging.getLogger(__name__)

#: pathlib would take longer to join a path than the kernel to open it.
_SHM_DIR: Final = str(SHM_DIR)
_NAMESPACE_LIMIT: Final = 64
#: How long `close` waits for a transition of another thread: a transition takes microseconds.
_LEAVE_NS: Final = 1_000_000_000
_NAMESPACE: Final = re.compile(r"[A-Za-z0-9_-]+")
_NAME: Final = re.compile(r"shmepoch\.(?P<namespace>[A-Za-z0-9_-]+)\.(?P<session>[0-9a-f]{32})")


def resolve_namespace(namespace: str | None) -> str:
    """`namespace`, else the environment's SHMEPOCH_NAMESPACE, else "default"; checked."""
    chosen = os.environ.get("SHMEPOCH_NAMESPACE", "default") if namespace is None else namespace
    if len(chosen) > _NAMESPACE_LIMIT or not _NAMESPACE.fullmatch(chosen):
        raise NamespaceInvalid(chosen, _NAMESPACE_LIMIT)
    return chosen


def segment_path(namespace: str, session_id: SessionId) -> Path:
    """Where a session's segment lies. One name a session: a new epoch replaces the old one's."""
    return SHM_DIR / _segment_name(namespace, session_id)


def list_sessions(namespace: str) -> Iterator[SessionId]:
    """The sessions of a namespace that have a segment, in no order."""
    with os.scandir(SHM_DIR) as entries:
        for entry in entries:
            match = _NAME.fullmatch(entry.name)
            if match and match["namespace"] == namespace:
                yield SessionId.from_bytes(bytes.fromhex(match["session"]))


def _segment_name(namespace: str, session_id: SessionId) -> str:
    return f"shmepoch.{namespace}.{session_id.bytes.hex()}"


class Lock(Protocol):
    """The writer lock of a segment, as its transitions see it."""

    def __enter__(self) -> None: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None: ...

    def try_enter(self) -> bool:
        """Enter if that waits for nothing; whether it did, for the caller to exit."""
        ...


class Segment:
    """An epoch's memory with its layout, writer lock and waiters; as it stands, private memory.

    It works without /dev/shm, and a forked child has a copy of its own.
    """

    name: str = "private memory"
    #: Who this process is in the slots it writes; private memory has nobody else.
    participant: int = 0
    writer: Lock
    waiters: Waiters
    _waits: LocalWaits

    def __init__(self, memory: Memory, header: Header, writer: Lock) -> None:
        self.memory: Final = memory
        self.layout: Final = header.layout
        self.epoch_id: Final = header.epoch_id
        self.session_id: Final = header.session_id
        self.writer = writer
        _every_segment.add(weakref.ref(self, _every_segment.discard))

    @classmethod
    def private(
        cls,
        config: at.OpsLifecycleConfig | None,
        *,
        session_id: SessionId | None = None,
        epoch_id: RuntimeEpochId | None = None,
    ) -> Segment:
        """Fresh private memory; `config` None makes room for cursors only."""
        layout = Layout(config)
        memory = Memory.private(layout.size)
        header = write_header(
            memory, layout, session_id or SessionId.new(), epoch_id or RuntimeEpochId.new()
        )
        segment = Segment(memory, header, WriterLock(-1, 0))
        segment._waits = LocalWaits()
        segment.waiters = segment._make_waiters(segment._waits)
        return segment

    @property
    def skipped(self) -> tuple[int, int]:
        """The sequences that recovery skipped: those above the first, through the second."""
        return self.memory.load(at.SKIPPED_AT), self.memory.load(at.SKIPPED_AT + at.WORD)

    @property
    def sealed(self) -> bool:
        """Whether the epoch takes no more changes."""
        return self.memory.load(at.STATE_AT) != at.OPEN

    def closed_error(self) -> EpochSealed:
        """What a change of a sealed epoch raises."""
        return EpochSealed(self.epoch_id)

    def seal(self) -> None:
        """End the epoch for good and wake everybody who waits for it."""
        with self.writer:
            self.memory.store(at.STATE_AT, at.SEALED)
        self.waiters.notify()

    def _make_waiters(self, waits: AsyncWaits) -> Waiters:
        # Not `closed_error`, which would hold the segment: one that is let go of goes at once, with
        # its mapping and its locks, and not when the garbage collector comes by.
        return Waiters(self.memory, partial(EpochSealed, self.epoch_id), waits)

    def _after_fork(self) -> None:
        # Another thread of the parent may have held it; here that thread does not exist.
        self.writer = WriterLock(-1, 0)
        self._waits.after_fork()


class SharedSegment(Segment):
    """A segment in /dev/shm, attached by this process.

    Its descriptor carries every lock this attachment holds. Leaving, or dying, gives all of them
    up; only `unlink` removes the segment.
    """

    fd: int = -1
    role: Role = Role.WORKER
    _owns: bool = False

    def __init__(self, namespace: str, name: str, fd: int, memory: Memory, header: Header) -> None:
        self.namespace: Final = namespace
        self.name = name
        super().__init__(memory, header, WriterLock(fd, at.WRITER_BYTE))
        self.witness: Final = header.witness
        self._attaching = threading.Lock()
        self.fd = fd  # last: from here on it is this object's to close

    @classmethod
    def allocate(
        cls,
        namespace: str,
        config: at.OpsLifecycleConfig | None,
        *,
        session_id: SessionId,
        epoch_id: RuntimeEpochId,
    ) -> SharedSegment:
        """A whole segment that has no name yet: nobody finds it before `publish`.

        Raises `SharedMemoryExhausted` where /dev/shm has not enough room: all pages are reserved
        now, because a write to a page that tmpfs cannot provide later is a SIGBUS.
        """
        layout = Layout(config)
        fd = create_unnamed(layout.size)
        try:
            memory = map_shared(fd, layout.size)
            header = write_header(memory, layout, session_id, epoch_id)
            try_lock(fd, at.PRESENCE_BYTE, True)
            name = _segment_name(namespace, session_id)
            return cls(namespace, name, fd, memory, header)
        except BaseException:
            os.close(fd)
            raise

    def publish(self, *, replace: bool = False) -> None:
        """Give the segment its name; `SegmentExists` if it is taken and not to be replaced."""
        target = self.path
        if replace:
            target = self._replacement
            target.unlink(missing_ok=True)
        try:
            link(self.fd, target)
        except FileExistsError:
            raise SegmentExists(self.name) from None
        if replace:
            target.rename(self.path)

    @classmethod
    def attach(cls, namespace: str, session_id: SessionId) -> SharedSegment:
        """The session's segment, checked from its owner to its last capacity before any use.

        Raises `FileNotFoundError` if there is none, `SegmentForeign`, `SegmentCorrupted` or
        `LayoutUnsupported` if it is not what it should be. A failed attach leaves no trace.
        """
        return cls._attach(namespace, session_id, None)

    @classmethod
    def attach_epoch(
        cls, namespace: str, session_id: SessionId, epoch_id: RuntimeEpochId, witness: bytes
    ) -> SharedSegment:
        """Attach to one particular epoch, as a handle names it.

        Raises, besides what `attach` does, `EpochGone`, `EpochSealed` and `WitnessMismatch`.
        """
        try:
            return cls._attach(namespace, session_id, partial(_require_epoch, epoch_id, witness))
        except FileNotFoundError:
            name = _segment_name(namespace, session_id)
            raise EpochGone(session_id, epoch_id, name) from None

    @classmethod
    def _attach(
        cls,
        namespace: str,
        session_id: SessionId,
        require: Callable[[Header], None] | None,
    ) -> SharedSegment:
        name = _segment_name(namespace, session_id)
        fd, size, head, memory = open_held(f"{_SHM_DIR}/{name}", at.PRESENCE_BYTE, HEADER_SIZE)
        try:
            if size < at.PAGE:
                raise SegmentCorrupted(name, "file size", f"at least {at.PAGE}", size)
            header = read_header(head, name, size, session_id)
            if require is not None:
                require(header)
            return cls(namespace, name, fd, memory or map_shared(fd, size), header)
        except BaseException:
            let_go(fd)
            raise

    @lazy
    def waiters(self) -> Waiters:
        """Whoever waits for the epoch: they are in its memory, and in the namespace's bells."""
        return self._make_waiters(SharedWaits(self.memory, self.namespace))

    @lazy
    def participants(self) -> Participants:
        """Who is attached, as seen through this attachment."""
        return Participants(self.memory, self.fd, self.layout.max_participants, self.name)

    def join(self, role: Role) -> None:
        """Become a participant, or change the role of the one this attachment is."""
        self.role = role
        if self.participant:
            self.participants.announce(self.participant, role)
        else:
            self.participant = self.participants.join(role)

    @property
    def path(self) -> Path:
        """Where the segment lies, once it is published and until it is unlinked."""
        return segment_path(self.namespace, self.session_id)

    @property
    def _replacement(self) -> Path:
        """Where a segment lies for the moment before it takes over an old one's name."""
        return self.path.with_name(f"{self.name}.new")

    def try_own(self) -> bool:
        """Become the session's one runtime; False while there is one, here or elsewhere."""
        with self._attaching:
            if self._owns or not try_lock(self.fd, at.RUNTIME_BYTE, False):
                return False
            self._owns = True
            return True

    @property
    def owned(self) -> bool:
        """Whether another attachment is the session's live runtime."""
        return is_locked(self.fd, at.RUNTIME_BYTE)

    @property
    def attached(self) -> bool:
        """Whether this process is attached: no more once it has left, nor right after a fork."""
        return self.fd >= 0

    def unlink(self) -> None:
        """Remove the segment's name, if it is still this segment's. Attachments stay usable."""
        unlink(self.fd, self.path)
        self._replacement.unlink(missing_ok=True)  # of a runtime that was killed while it replaced

    def close(self) -> bool:
        """Leave the epoch: give up the participant slot and every lock. The memory stays readable
        to whoever still holds a cursor of it.

        Waits a second for a transition of another thread. False: it takes longer, or it is one of
        this thread's, that a signal handler interrupted; then it leaves the epoch when it is done.
        """
        if not isinstance(self.writer, WriterLock):
            self.writer = WriterLock(-1, 0)  # inherited by a fork and not used since
        # Closing the descriptor gives the lock up, in the middle of a transition as well.
        closed_error = partial(_left_error, self.memory, self.epoch_id)
        if not self.writer.retire(closed_error, _LEAVE_NS, self._leave):
            return False
        self._leave()
        return True

    def _leave(self) -> None:
        if self.fd >= 0 and self.participant:
            self.participants.leave(self.participant)
        self._close_fd()
        self.participant = 0

    def _close_fd(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            let_go(fd)

    def __del__(self) -> None:
        # Not `let_go`: in a child that is being forked this may be of a thread that went with the
        # parent, whose locks they are. They go with the memory, which mostly goes now.
        if self.fd >= 0:
            os.close(self.fd)

    def _after_fork(self) -> None:
        """In a forked child: let go of the parent's locks and identity.

        What the memory holds stays readable, and cursors stay usable.
        """
        self._attaching = threading.Lock()
        if self.fd < 0:
            return
        fd, self.fd = self.fd, -1
        self.participant = 0
        self._owns = False
        if self.role is Role.RUNTIME:
            self.role = Role.WORKER
        self.writer = _AttachAgain(self)
        try:
            leave_to_parent(fd, self.memory)
        except OSError as error:
            _log.warning("%s: a forked child keeps its parent's locks: %s", self.name, error)

    def ensure_attached(self) -> None:
        """Attach again if this was inherited by a fork and not used since.

        Raises `EpochGone` or `EpochSealed` if the epoch has ended meanwhile.
        """
        with self._attaching:
            if isinstance(self.writer, _AttachAgain):
                self._attach_again()

    def _attach_again(self) -> None:
        fd = -1
        try:
            fd, _, head, _ = open_held(f"{_SHM_DIR}/{self.name}", at.PRESENCE_BYTE, HEADER_SIZE)
            if head[at.EPOCH_ID_AT : at.EPOCH_ID_AT + at.ID_SIZE] != self.epoch_id.bytes:
                raise self.closed_error()
        except FileNotFoundError:
            raise EpochGone(self.session_id, self.epoch_id, self.name) from None
        except BaseException:
            if fd >= 0:
                let_go(fd)
            raise
        self.writer = WriterLock(fd, at.WRITER_BYTE)
        self.fd = fd
        vars(self).pop("participants", None)  # they were seen through the parent's descriptor
        self.join(self.role)


def _require_epoch(epoch_id: RuntimeEpochId, witness: bytes, header: Header) -> None:
    if header.epoch_id != epoch_id:
        raise EpochSealed(epoch_id)  # a name is only taken over from a sealed epoch
    if not hmac.compare_digest(header.witness, witness):
        raise WitnessMismatch(epoch_id)
    if header.sealed:
        raise EpochSealed(epoch_id)


class _AttachAgain:
    """The writer lock of a segment that was inherited by a fork: attaches on its first use."""

    def __init__(self, segment: SharedSegment) -> None:
        self._segment: SharedSegment = weakref.proxy(segment)

    def __enter__(self) -> None:
        self._segment.ensure_attached()
        self._segment.writer.__enter__()

    def try_enter(self) -> bool:
        self._segment.ensure_attached()
        return self._segment.writer.try_enter()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._segment.writer.__exit__(kind, value, traceback)


def _left_error(memory: Memory, epoch_id: RuntimeEpochId) -> EpochSealed | BindingsClosed:
    sealed = memory.load(at.STATE_AT) != at.OPEN
    return EpochSealed(epoch_id) if sealed else BindingsClosed(epoch_id)


def remove_unused(namespace: str, session_id: SessionId) -> bool:
    """Remove a session's segment if no process has it attached; whether it was removed.

    Safe against any attach: an attachment holds the presence byte shared before it looks at the
    name a last time, and this holds it exclusively.
    """
    path = segment_path(namespace, session_id)
    try:
        fd = open_owned(path)
    except FileNotFoundError:
        return False
    try:
        if not try_lock(fd, at.PRESENCE_BYTE, False) or os.fstat(fd).st_nlink == 0:
            return False
        path.unlink()
        return True
    finally:
        os.close(fd)


#: Not a WeakSet, which guards its iteration against changes: it takes longer, and is not iterated.
_every_segment: set[weakref.ref[Segment]] = set()


def _after_fork_in_child() -> None:
    for reference in list(_every_segment):
        segment = reference()
        if segment is not None:
            segment._after_fork()


on_fork(Part.ATTACHMENTS, after_in_child=_after_fork_in_child)
