"""Dumps: one epoch as a file, to be inspected or continued on another machine.

A dump is a zip archive of two members: `epoch.json` says what it is, and `memory.bin` is the
segment as it was, but for its witness key, which is zeros: a dump lets no process attach.
"""

from __future__ import annotations

import errno
import importlib.metadata
import os
import stat
import time
import zipfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO, Final

import msgspec

from shmepoch import _native as at
from shmepoch.config import OpsLifecycleConfig
from shmepoch.epoch.codec import Record, decode_json
from shmepoch.epoch.operations import Count
from shmepoch.errors import (
    LayoutUnsupported,
    SegmentCorrupted,
    SessionNotFound,
    ShmepochError,
)
from shmepoch.ids import RuntimeEpochId, SessionId
from shmepoch.memory.clock import wall_ms
from shmepoch.memory.header import SIZE as HEADER_SIZE
from shmepoch.memory.header import Header, read_header
from shmepoch.memory.namespaces import segment_name, segment_path
from shmepoch.memory.participants import Participant
from shmepoch.memory.segment import ObservedSegment, SharedSegment
from shmepoch.monitoring.epochs import DAMAGE, EpochSummary, of_damaged, of_segment

#: The format that this release writes, and the only one that it reads.
FORMAT: Final = 1

_FACTS: Final = "epoch.json"
_MEMORY: Final = "memory.bin"
#: No `epoch.json` is this long, even with as many participants as a segment can have.
_FACTS_LIMIT: Final = 2**20
#: The time for which the memory is copied again, until two copies in a row are equal.
_PATIENCE_S: Final = 1.0
_CHUNK: Final = 2**20


class EpochDump(Record, kw_only=True, frozen=True):
    """The facts of a dump about its epoch, in `epoch.json`."""

    format: int = FORMAT
    release: str
    """The release of shmepoch that made the dump."""
    layout: int = at.VERSION
    """The layout version of that release."""
    taken_at_ms: Count
    """Wall-clock milliseconds since the Unix epoch."""
    size: Count
    """Bytes of the memory."""
    moving: bool
    """Whether the memory changed during every copy. Then its parts are of slightly different
    moments, and may contradict each other."""
    summary: EpochSummary
    limits: OpsLifecycleConfig | None = None
    """None for a damaged epoch, and for one that has cursors only."""
    participants: tuple[Participant, ...] = ()
    """The processes that had the epoch attached, and those that had died attached."""


class _Format(Record, frozen=True):
    format: int


class _Summary(Record, frozen=True):
    session_id: SessionId
    epoch_id: RuntimeEpochId | None
    problem: str | None


class DumpFacts(Record, frozen=True):
    """The facts of `epoch.json` that a restoration needs. The others are for people; those of a
    damaged epoch may be out of every range."""

    size: int
    moving: bool
    summary: _Summary


class DumpInvalid(ShmepochError, ValueError):
    """A file is no dump that can be restored; no epoch was made."""

    path: Path
    reason: str
    message = """{path} cannot be restored: {reason}; only a whole file of 'shmepoch dump' can, by a
    release with the same layout"""


# --- making one -------------------------------------------------------------------------------


def take(namespace: str, session_id: SessionId) -> tuple[EpochDump, bytes]:
    """A session's epoch as it is, and its memory. It takes no lock, and reads damaged epochs too.

    Raises `SessionNotFound`, and `SegmentForeign` for what is no regular file of this user's.
    """
    try:
        segment = ObservedSegment.peek(namespace, session_id)
    except FileNotFoundError:
        raise SessionNotFound(session_id, namespace) from None
    except DAMAGE as error:
        return _take_damaged(namespace, session_id, error)
    with closing(segment):
        memory, moving = _copied(segment.fd)
        limits = segment.layout.config
        participants: tuple[Participant, ...] = ()
        try:
            participants = tuple(segment.participants.list())
            summary = of_segment(segment)
        except SegmentCorrupted as error:
            file = os.fstat(segment.fd)
            summary = of_damaged(namespace, session_id, error, file, segment.epoch_id)
        return _described(summary, memory, moving, limits, participants), memory


def _take_damaged(
    namespace: str, session_id: SessionId, error: Exception
) -> tuple[EpochDump, bytes]:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        fd = os.open(segment_path(namespace, session_id), flags)
    except FileNotFoundError:
        raise SessionNotFound(session_id, namespace) from None
    except OSError:
        raise error from None
    try:
        file = os.fstat(fd)
        if not stat.S_ISREG(file.st_mode) or file.st_uid != os.geteuid():
            raise error
        memory, moving = _copied(fd)
        return _described(of_damaged(namespace, session_id, error, file), memory, moving), memory
    finally:
        os.close(fd)


def _described(
    summary: EpochSummary,
    memory: bytes,
    moving: bool,
    limits: OpsLifecycleConfig | None = None,
    participants: tuple[Participant, ...] = (),
) -> EpochDump:
    return EpochDump(
        release=importlib.metadata.version("shmepoch"),
        taken_at_ms=wall_ms(),
        size=len(memory),
        moving=moving,
        summary=summary,
        limits=limits,
        participants=participants,
    )


def _copied(fd: int) -> tuple[bytes, bool]:
    """The file as it is at one moment, and False; or True if it kept changing.

    If two copies are equal, then the whole file was so at a moment between them. A transition
    between them makes the copies differ: the words that commit only grow, and a slot's word has
    a version.
    """
    size = os.fstat(fd).st_size
    before, copy = bytearray(size), bytearray(size)  # made once: a fast copy meets fewer changes
    _copy(fd, copy)
    deadline, moving = time.monotonic() + _PATIENCE_S, True
    while moving:
        before, copy = copy, before
        _copy(fd, copy)
        moving = before != copy
        if time.monotonic() > deadline:
            break
    witness = slice(at.WITNESS_AT, at.WITNESS_AT + at.ID_SIZE)
    copy[witness] = bytes(len(copy[witness]))  # the file may end before it, or in it
    return bytes(copy), moving


def _copy(fd: int, copy: bytearray) -> None:
    """Copy as much of the file as there is. It is read and not mapped, because a damaged file may
    be cut short meanwhile."""
    offset = 0
    with memoryview(copy) as view:
        while count := os.preadv(fd, [view[offset:]], offset):
            offset += count
    del copy[offset:]


def write(dump: EpochDump, memory: bytes, file: IO[bytes]) -> None:
    """Write a dump."""
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in (
            (_FACTS, msgspec.json.format(dump.to_json(), indent=2)),
            (_MEMORY, memory),
        ):
            member = zipfile.ZipInfo(name)  # dated 1980: its contents have the date
            member.external_attr = (stat.S_IFREG | 0o600) << 16
            archive.writestr(member, data, zipfile.ZIP_DEFLATED)


# --- bringing one back ------------------------------------------------------------------------


def restore(path: Path, namespace: str) -> DumpFacts:
    """Give the session of a dump its epoch back, in this namespace. Returns the dump's facts.

    The epoch has a new witness key, so that old tokens are refused. The processes that had it
    attached count as dead: the next runtime ends the operations that they ran. Raises
    `DumpInvalid`, `SegmentExists`, `SharedMemoryExhausted`, and `OSError` if the file cannot be
    read.
    """
    with _reading(path), zipfile.ZipFile(path) as archive:
        dump = _facts(path, archive)
        member = _member(path, archive, _MEMORY)
        with archive.open(member) as source:
            head = source.read(HEADER_SIZE)
            header = _header(path, dump, head, member.file_size, namespace)
            segment = SharedSegment.allocate(
                namespace,
                header.layout.config,
                session_id=header.session_id,
                epoch_id=header.epoch_id,
            )
            with closing(segment):
                _fill(path, segment, header, head, source)
                segment.publish()
    return dump


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Raise `DumpInvalid` for any of the many errors that reading an archive raises."""
    try:
        yield
    except (ShmepochError, MemoryError):
        raise
    except Exception as error:
        # EINVAL: the archive names a place before the file's beginning.
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        raise DumpInvalid(path, f"it is no whole zip file ({error})") from error


def _facts(path: Path, archive: zipfile.ZipFile) -> DumpFacts:
    member = _member(path, archive, _FACTS)
    if member.file_size > _FACTS_LIMIT:
        raise DumpInvalid(path, f"its {_FACTS} has {member.file_size} bytes, not {_FACTS_LIMIT}")
    data = archive.read(member)
    try:
        format = decode_json(_Format, data).format
        if format != FORMAT:
            raise DumpInvalid(path, f"it has format {format}, and this release reads {FORMAT}")
        return DumpFacts.from_json(data)
    except DumpInvalid:
        raise
    except ShmepochError as error:
        raise DumpInvalid(path, f"its {_FACTS} says: {error}") from error


def _member(path: Path, archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    try:
        return archive.getinfo(name)
    except KeyError:
        raise DumpInvalid(path, f"it has no {name}") from None


def _header(path: Path, dump: DumpFacts, head: bytes, size: int, namespace: str) -> Header:
    """The header of the memory. It agrees with all that is known before the memory is read."""
    session_id = dump.summary.session_id
    if len(head) < HEADER_SIZE or size != dump.size:
        raise DumpInvalid(path, f"its {_MEMORY} has {size} bytes, not {dump.size}")
    try:
        header = read_header(head, segment_name(namespace, session_id), size, session_id)
    except LayoutUnsupported as error:
        reason = f"it has layout {error.actual}, and this release reads {error.expected}"
        raise DumpInvalid(path, reason) from error
    except SegmentCorrupted as error:
        problem = dump.summary.problem
        damaged = "" if problem is None else f". It is of a damaged epoch: {problem}"
        reason = f"its {error.field} is {error.actual!r}, not {error.expected!r}{damaged}"
        raise DumpInvalid(path, reason) from error
    if dump.summary.epoch_id not in (None, header.epoch_id):
        reason = f"its epoch_id is {header.epoch_id}, not {dump.summary.epoch_id}"
        raise DumpInvalid(path, reason)
    return header


def _fill(
    path: Path, segment: SharedSegment, header: Header, head: bytes, source: IO[bytes]
) -> None:
    """Put everything behind the capacities into a fresh segment, and the state."""
    memory, size = segment.memory, header.layout.size
    memory.write(at.ORIGIN_AT, head[at.ORIGIN_AT :])
    offset = len(head)
    while chunk := source.read(_CHUNK):  # it gives no more than the member's size
        memory.write(offset, chunk)
        offset += len(chunk)
    if offset != size:
        raise DumpInvalid(path, f"its {_MEMORY} has {offset} bytes, not {size}")
    memory.store(at.STATE_AT, at.SEALED if header.sealed else at.OPEN)
    # Its sleepers are of another memory, perhaps on another machine.
    memory.store(at.EVENT_AT, 0)
    memory.store(at.DOORBELLS_AT, 0)
