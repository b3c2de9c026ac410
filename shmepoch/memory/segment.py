"""Segments: the memory of one epoch, private to a process or a file in /dev/shm."""

from __future__ import annotations

import contextlib
import hmac
import logging
import os
import threading
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final, Self, SupportsIndex

from shmepoch import _native as at
from shmepoch._native import (
    Cell,
    Descriptor,
    Epoch,
    Memory,
    Refused,
    WriterLock,
    is_locked,
    leave_inherited,
    try_lock,
    unlock,
)
from shmepoch.config import OpsLifecycleConfig
from shmepoch.errors import (
    BindingsClosed,
    EpochGone,
    EpochSealed,
    ObserverReadOnly,
    ParticipantsExhausted,
    SegmentCorrupted,
    SegmentExists,
    WitnessMismatch,
    WriterBusy,
)
from shmepoch.events import Event, about
from shmepoch.forking import Part, on_fork
from shmepoch.ids import RuntimeEpochId, SessionId
from shmepoch.lazy import lazy
from shmepoch.memory.claims import Claim, Listed, claim, claims_after_fork, lose_claims
from shmepoch.memory.doorbells import SharedWaits
from shmepoch.memory.files import (
    SHM_DIR,
    NewFile,
    is_same,
    map_shared,
    open_held,
    open_owned,
    unlink,
)
from shmepoch.memory.header import SIZE as HEADER_SIZE
from shmepoch.memory.header import Header, read_header, write_header
from shmepoch.memory.layout import Layout
from shmepoch.memory.namespaces import segment_name, segment_path
from shmepoch.memory.participants import Participants, Role
from shmepoch.memory.waiting import AsyncWaits, LocalWaits, Waiters

_log = logging.getLogger(__name__)

#: pathlib would take longer to join a path than the kernel to open it.
_SHM_DIR: Final = str(SHM_DIR)


class Segment:
    """An epoch's memory with its layout, its transitions and its waiters. This class has private
    memory.

    It works without /dev/shm, and a forked child has its own copy.
    """

    name: str = "private memory"
    #: The descriptor that carries this process's locks; private memory has none.
    carrier: Descriptor | None = None
    #: Whether this is an observer's, which changes nothing.
    read_only: bool = False
    #: The lock that transitions take, between threads and between processes.
    writer: WriterLock | None
    epoch: Epoch
    waiters: Waiters
    _waits: LocalWaits

    def __init__(self, memory: Memory, header: Header) -> None:
        self.memory: Final = memory
        self.layout: Final = header.layout
        self.epoch_id: Final = header.epoch_id
        self.session_id: Final = header.session_id
        self.claims: Final[list[Listed]] = []
        self._header: Final = header
        self._participant = 0
        self._reference: Final = weakref.ref(self, _every_segment.discard)
        _every_segment.add(self._reference)

    @classmethod
    def private(
        cls,
        config: OpsLifecycleConfig | None,
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
        return cls._of_private(memory, header, WriterLock())

    @classmethod
    def _of_private(cls, memory: Memory, header: Header, writer: WriterLock | None) -> Segment:
        segment = Segment(memory, header)
        segment._open(writer)
        segment._waits = LocalWaits()
        segment.waiters = segment._make_waiters(segment._waits)
        return segment

    def _open(self, writer: WriterLock | None) -> None:
        self.writer = writer
        self.epoch = Epoch(self.memory, writer, *self.layout.capacities())

    def copy(self) -> Segment:
        """A copy of its memory at one moment. It does not change later."""
        copied = self._of_private(self.epoch.copy(), self._header, None)
        copied.name = self.name
        return copied

    @property
    def participant(self) -> int:
        """This process's participant key, in the slots it writes; 0 in private memory."""
        return self._participant

    @participant.setter
    def participant(self, key: int) -> None:
        self._participant = key
        if self.writer is not None:
            self.writer.participant = key

    @property
    def skipped(self) -> tuple[int, int]:
        """The sequences that recovery skipped: those above the first, through the second."""
        return self.memory.load(at.SKIPPED_AT), self.memory.load(at.SKIPPED_AT + at.WORD)

    @property
    def sealed(self) -> bool:
        """Whether the epoch was ended by its runtime."""
        return self.memory.load(at.STATE_AT) == at.SEALED

    @property
    def ended(self) -> bool:
        """Whether the epoch takes no more changes: it is sealed, or found to be gone."""
        return self.memory.load(at.STATE_AT) != at.OPEN

    def require_writable(self) -> None:
        """Raise the error that every change raises now, if there is one."""
        if self.read_only:
            raise self._read_only_error()
        if self.ended:
            raise self.closed_error()

    def refusal(self, refused: Refused) -> Exception:
        """The error for a refusal of the native module that is not about one operation."""
        reason, field, index, least, most, actual = refused.args
        if reason == "corrupt":
            holder, _, name = field.partition(".")
            if index >= 0:
                field = f"{holder}[{index}].{name}"
            expected = least if least == most else f"{least} to {most}"
            return self.corrupted(field, expected, actual)
        if reason == "busy":
            return WriterBusy(self.epoch_id)
        if reason == "read_only":
            return self._read_only_error()
        assert reason == "ended", reason
        return self.closed_error()

    def corrupted(self, field: str, expected: object, actual: object) -> SegmentCorrupted:
        """The error that names a field of this segment that is damaged."""
        return SegmentCorrupted(self.name, field, expected, actual)

    def _read_only_error(self) -> Exception:
        return ObserverReadOnly(self.epoch_id)

    def cell(self, offset: int) -> Cell | ObservedCell:
        """The word at `offset` as a cell, which takes no change of an epoch that has ended."""
        return Cell(self.memory, offset, at.STATE_AT, self.closed_error)

    def closed_error(self) -> EpochSealed | EpochGone:
        """The error that a change of an ended epoch raises."""
        return self._closed_error_maker()()

    def _closed_error_maker(self) -> Callable[[], EpochSealed | EpochGone]:
        """`closed_error` without a reference to the segment. So a dropped segment is freed at once,
        with its mapping and its locks, and not later by the garbage collector."""
        return partial(_ended_error, self.memory, self.session_id, self.epoch_id, self.name)

    def seal(self) -> None:
        """End the epoch for good and wake every waiter."""
        try:
            self.epoch.seal()
        except Refused as refused:
            raise self.refusal(refused) from None
        self.waiters.notify()

    def claim(self, byte: int, *, shared: bool = False) -> Claim | None:
        """Claim `byte` of the epoch for this process, alone or with others that share it; None
        while other claims exclude that. The claim is lost when this process leaves the epoch, and
        in a forked child."""
        return claim(self, byte, shared=shared)

    def _require_not_gone(self) -> None:
        if self.memory.load(at.STATE_AT) == at.GONE:
            raise self.closed_error()

    def _make_waiters(self, waits: AsyncWaits) -> Waiters:
        return Waiters(self.memory, self._closed_error_maker(), waits)

    def _after_fork(self) -> None:
        if self.writer is not None:
            self.writer.after_fork()
        lose_claims(self)
        self._waits.after_fork()


class SharedSegment(Segment):
    """A segment in /dev/shm, attached by this process.

    Its descriptor carries every lock of this attachment. They are released when the process leaves
    or dies. Only `unlink` removes the segment.
    """

    role: Role = Role.WORKER
    _owns: bool = False

    def __init__(
        self,
        namespace: str,
        name: str,
        descriptor: Descriptor,
        memory: Memory,
        header: Header,
        *,
        new: NewFile | None = None,
    ) -> None:
        self.namespace: Final = namespace
        self.name = name
        super().__init__(memory, header)
        self.witness: Final = header.witness
        self.carrier = self._descriptor = descriptor
        #: None after the segment has its name.
        self._new = new
        #: Reentrant: a signal handler may use the epoch in the middle of its first use.
        self._attaching = threading.RLock()
        self._open(self._make_writer())

    @classmethod
    def allocate(
        cls,
        namespace: str,
        config: OpsLifecycleConfig | None,
        *,
        session_id: SessionId,
        epoch_id: RuntimeEpochId,
    ) -> SharedSegment:
        """A complete segment that has no name yet: other processes cannot find it before `publish`.

        Raises `SharedMemoryExhausted` if /dev/shm has not enough room. All pages are reserved now:
        a later write to a page that tmpfs cannot provide is a SIGBUS.
        """
        layout = Layout(config)
        new = NewFile(segment_path(namespace, session_id), layout.size)
        try:
            memory = map_shared(new.fd, layout.size)
            header = write_header(memory, layout, session_id, epoch_id)
            name = segment_name(namespace, session_id)
            return cls(namespace, name, new.fd, memory, header, new=new)
        except BaseException:
            new.close()
            raise

    def publish(self, *, replace: bool = False) -> None:
        """Give the segment its name; `SegmentExists` if it is taken and not to be replaced."""
        if self._new is None:
            raise SegmentExists(self.name)
        try:
            self._new.publish(replace=replace)
        except FileExistsError:
            raise SegmentExists(self.name) from None
        self._new = None

    @classmethod
    def attach(cls, namespace: str, session_id: SessionId) -> Self:
        """The session's segment. Its owner and its whole header are checked before any use.

        Raises `FileNotFoundError` if there is none, `SegmentForeign`, `SegmentCorrupted` or
        `LayoutUnsupported` if it is not what it should be. A failed attach leaves no trace.
        """
        return cls._attach(namespace, session_id, None)

    @classmethod
    def attach_epoch(
        cls, namespace: str, session_id: SessionId, epoch_id: RuntimeEpochId, witness: bytes
    ) -> SharedSegment:
        """Attach to the epoch that a handle names.

        Raises the errors of `attach`, and `EpochGone`, `EpochSealed` and `WitnessMismatch`.
        """
        try:
            return cls._attach(namespace, session_id, partial(_require_epoch, epoch_id, witness))
        except FileNotFoundError:
            name = segment_name(namespace, session_id)
            raise EpochGone(session_id, epoch_id, name) from None

    @classmethod
    def _attach(
        cls,
        namespace: str,
        session_id: SessionId,
        require: Callable[[Header], None] | None,
    ) -> Self:
        name = segment_name(namespace, session_id)
        descriptor, size, head, memory = open_held(
            f"{_SHM_DIR}/{name}", at.PRESENCE_BYTE, HEADER_SIZE
        )
        return cls._checked(namespace, session_id, descriptor, size, head, memory, require)

    @classmethod
    def _checked(
        cls,
        namespace: str,
        session_id: SessionId,
        descriptor: Descriptor,
        size: int,
        head: bytes,
        memory: Memory | None = None,
        require: Callable[[Header], None] | None = None,
    ) -> Self:
        """The segment of a file that was opened, which is closed if the file holds none."""
        name = segment_name(namespace, session_id)
        try:
            if size < at.PAGE:
                raise SegmentCorrupted(name, "file size", f"at least {at.PAGE}", size)
            header = read_header(head, name, size, session_id)
            if require is not None:
                require(header)
            memory = memory or map_shared(descriptor, size)
            return cls(namespace, name, descriptor, memory, header)
        except BaseException:
            descriptor.close()
            raise

    @lazy
    def waiters(self) -> Waiters:
        """The epoch's waiters, in its memory and at the namespace's doorbells."""
        return self._make_waiters(SharedWaits(self.memory, self.namespace))

    @property
    def participants(self) -> Participants:
        """The attached processes, as seen from this one; `BindingsClosed` once it has left."""
        self.ensure_attached()
        self._descriptor.fileno()  # raises if this attachment has left
        return self._participants_of(self._descriptor)

    def _participants_of(self, descriptor: Descriptor) -> Participants:
        return Participants(self.memory, descriptor, self.layout.max_participants, self.name)

    def join(self, role: Role) -> None:
        """Become a participant, or change the role of this participant."""
        participants = self.participants
        if self.participant:
            participants.announce(self.participant, role)
        else:
            self.participant = self._take_slot(participants, role)
        self.role = role

    def _make_writer(self) -> WriterLock | None:
        return WriterLock(self._descriptor, at.WRITER_BYTE, partial(_attend, self._reference))

    def _take_slot(self, participants: Participants, role: Role) -> int:
        return participants.join(role)

    @property
    def path(self) -> Path:
        """The path of the segment, from `publish` until `unlink`."""
        return segment_path(self.namespace, self.session_id)

    def try_own(self) -> bool:
        """Become the session's one runtime; False while it has one, in this or another process."""
        with self._attaching:
            self.ensure_attached()
            if self._owns or not try_lock(self._descriptor, at.RUNTIME_BYTE, False):
                return False
            self._owns = True
            return True

    def disown(self, role: Role) -> None:
        """Undo `try_own`, and be a participant in this role again."""
        with self._attaching:
            if not (self._owns and self.attached):
                return
            self._owns = False
            unlock(self._descriptor, at.RUNTIME_BYTE)
        self.join(role)

    @property
    def named(self) -> bool:
        """Whether the session's name names this segment. Only its owner changes that, so a process
        that has become the owner checks again."""
        return is_same(self._descriptor, f"{_SHM_DIR}/{self.name}")

    @property
    def owned(self) -> bool:
        """Whether another attachment is the session's live runtime."""
        self.ensure_attached()
        return is_locked(self._descriptor, at.RUNTIME_BYTE)

    @property
    def fd(self) -> int:
        """The descriptor's number, for one system call; `BindingsClosed` once this has left."""
        return self._descriptor.fileno()

    def claim(self, byte: int, *, shared: bool = False) -> Claim | None:
        self.ensure_attached()
        made = super().claim(byte, shared=shared)
        if not self.attached:  # checked last, since another thread may leave at any moment
            if made is not None:
                made.release()
            raise self._left_error_maker()()
        return made

    @property
    def attached(self) -> bool:
        """Whether this process is attached: false after it has left, and right after a fork."""
        return not self._descriptor.closed

    def require_name(self) -> None:
        """Raise `EpochGone` if the file has lost its name although its epoch has not ended.

        GONE-1: then no other process can attach, and only the attached ones see new commits. The
        first of them that notices it changes the state in the shared memory, so that all of them
        notice, and waits end.
        """
        # The name first: a regular removal seals the epoch before it removes the name.
        nameless = self._new is None and os.fstat(self.fd).st_nlink == 0
        if nameless and not self.ended:
            self.memory.store(at.STATE_AT, at.GONE)
            self.waiters.notify()
        self._require_not_gone()

    def show_life(self) -> None:
        """Have the file say that the epoch was attached until now (GC-1); writes to the memory do
        not. Failures are ignored: they make the epoch look older once it is abandoned."""
        # By its name: the descriptor's number may be another file's by the time of the call.
        with contextlib.suppress(OSError):
            os.utime(f"{_SHM_DIR}/{self.name}", follow_symlinks=False)

    def unlink(self) -> None:
        """Remove the segment's name, if it is still this segment's. Attachments stay usable."""
        unlink(self._descriptor, self.path)

    def close(self) -> None:
        """Leave the epoch: give up the participant slot and every lock. The memory stays readable
        through the cursors that still have it. If it was interrupted, it may be called again."""
        left_error = self._left_error_maker()
        # Closing the descriptor releases the lock, even in the middle of a transition.
        if self.writer is not None:
            self.writer.retire(left_error)
        if self.attached and self.participant:
            self.show_life()
            self._participants_of(self._descriptor).leave(self.participant)
        lose_claims(self)
        if self._new is not None:
            self._new.discard()
        self._descriptor.close(left_error)
        self.participant = 0

    def _left_error_maker(self) -> Callable[[], Exception]:
        return partial(_left_error, self.memory, self.session_id, self.epoch_id, self.name)

    def _after_fork(self) -> None:
        """In a forked child, after its parent's descriptors are closed: be no participant yet.

        The memory stays readable, and cursors stay usable.
        """
        self._attaching = threading.RLock()
        lose_claims(self)
        self.participant = 0
        self._owns = False
        if self.role is Role.RUNTIME:
            self.role = Role.WORKER
        if self.writer is not None:
            self.writer.after_fork()

    def ensure_attached(self) -> None:
        """Attach again if this was inherited by a fork and not used since.

        Raises `EpochGone` or `EpochSealed` if the epoch has ended meanwhile.
        """
        if self._descriptor.inherited:
            with self._attaching:
                if self._descriptor.inherited:
                    self._attach_again()

    def _attach_again(self) -> None:
        try:
            opened, _, head, _ = open_held(
                f"{_SHM_DIR}/{self.name}", at.PRESENCE_BYTE, HEADER_SIZE, mapped=False
            )
        except FileNotFoundError:
            raise EpochGone(self.session_id, self.epoch_id, self.name) from None
        # Not the epoch's id: a recovered epoch has the same id in other memory.
        if head[at.WITNESS_AT : at.WITNESS_AT + at.ID_SIZE] != self.witness:
            if self.sealed:
                raise EpochSealed(self.epoch_id)
            raise EpochGone(self.session_id, self.epoch_id, self.name)
        participants = self._participants_of(opened)
        participant = self._take_slot(participants, self.role)
        # A signal handler may have attached meanwhile, but none can run after this check. The
        # process gets its key before it is attached, so that it never writes without one.
        writer = self.writer
        if self._descriptor.inherited:
            self._participant = participant  # not by the property: a handler may run in a call
            if writer is not None:
                writer.participant = participant
            self._descriptor.take(opened)
        else:
            participants.leave(participant)


class ObservedSegment(SharedSegment):
    """The segment of an observer.

    OBSERVE-1: every change of the memory goes through the writer lock or through a cell. An
    observer has no such lock, and its cells refuse every change. The calls for runtimes refuse as
    well. An observer becomes a participant if there is a free slot, and changes nothing else.
    """

    read_only = True
    role = Role.OBSERVER

    @classmethod
    def peek(cls, namespace: str, session_id: SessionId) -> Self:
        """The session's segment without a lock: it does not count as attached, and a process may
        remove its name meanwhile.

        Raises what `attach` does.
        """
        descriptor = open_owned(f"{_SHM_DIR}/{segment_name(namespace, session_id)}")
        size = os.fstat(descriptor.fileno()).st_size
        head = os.pread(descriptor.fileno(), HEADER_SIZE, 0)
        return cls._checked(namespace, session_id, descriptor, size, head)

    def _make_writer(self) -> WriterLock | None:
        return None

    def _read_only_error(self) -> Exception:
        left = self._descriptor.closed and not self._descriptor.inherited
        return self._left_error_maker()() if left else super()._read_only_error()

    def claim(self, byte: int, *, shared: bool = False) -> Claim | None:
        raise ObserverReadOnly(self.epoch_id)

    def try_own(self) -> bool:
        raise ObserverReadOnly(self.epoch_id)

    def show_life(self) -> None:
        pass  # to be looked at is no life

    def unlink(self) -> None:
        raise ObserverReadOnly(self.epoch_id)

    def cell(self, offset: int) -> ObservedCell:
        return ObservedCell(self.memory, offset, self.epoch_id)

    def join(self, role: Role) -> None:
        if role is not Role.OBSERVER:
            raise ObserverReadOnly(self.epoch_id)
        super().join(role)

    def _take_slot(self, participants: Participants, role: Role) -> int:
        try:
            return participants.join(role, only_free=True)
        except ParticipantsExhausted:
            return 0  # it can read, but is not listed


class ObservedCell:
    """The cell of an observer."""

    def __init__(self, memory: Memory, offset: int, epoch_id: RuntimeEpochId) -> None:
        self._memory = memory
        self._offset = offset
        self._epoch_id = epoch_id

    def load(self) -> int:
        return self._memory.load(self._offset)

    def advance(self, value: SupportsIndex, /) -> bool:
        raise ObserverReadOnly(self._epoch_id)

    def compare_and_swap(self, expected: SupportsIndex, new: SupportsIndex, /) -> bool:
        raise ObserverReadOnly(self._epoch_id)


def _require_epoch(epoch_id: RuntimeEpochId, witness: bytes, header: Header) -> None:
    if header.epoch_id != epoch_id:
        raise EpochSealed(epoch_id)  # only the name of a sealed epoch is taken over
    if not hmac.compare_digest(header.witness, witness):
        raise WitnessMismatch(epoch_id)
    if header.sealed:
        raise EpochSealed(epoch_id)


def _attend(reference: weakref.ref[Segment]) -> None:
    """Called by the writer lock, in a forked child or if the file has no name."""
    segment = reference()
    if isinstance(segment, SharedSegment):
        segment.ensure_attached()
        segment.require_name()


def _ended_error(
    memory: Memory, session_id: SessionId, epoch_id: RuntimeEpochId, name: str
) -> EpochSealed | EpochGone:
    if memory.load(at.STATE_AT) == at.GONE:
        return EpochGone(session_id, epoch_id, name)
    return EpochSealed(epoch_id)


def _left_error(
    memory: Memory, session_id: SessionId, epoch_id: RuntimeEpochId, name: str
) -> EpochSealed | EpochGone | BindingsClosed:
    if memory.load(at.STATE_AT) == at.OPEN:
        return BindingsClosed(epoch_id)
    return _ended_error(memory, session_id, epoch_id, name)


#: Not a WeakSet: it is slower because it guards its iteration, which is not needed here.
_every_segment: set[weakref.ref[Segment]] = set()


def _after_fork_in_child() -> None:
    try:
        leave_inherited()
    except OSError as error:
        _log.warning(
            "a forked child keeps locks of its parent: %s",
            error,
            extra=about(Event.FORK_FAILED, reason=str(error)),
        )
    claims_after_fork()
    for reference in list(_every_segment):
        segment = reference()
        if segment is not None:
            try:
                segment._after_fork()
            except OSError as error:
                _log.warning(
                    "%s: not detached from its parent's: %s",
                    segment.name,
                    error,
                    extra=about(
                        Event.FORK_FAILED,
                        session=segment.session_id,
                        epoch=segment.epoch_id,
                        reason=str(error),
                    ),
                )


on_fork(Part.ATTACHMENTS, after_in_child=_after_fork_in_child)
