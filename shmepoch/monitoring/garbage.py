"""Garbage in shared memory: files that no process holds, the rules for them, and their removal.

GC-2: a file that a process has attached or is making is never removed, nor a file of another user.
A segment that a runtime may continue is removed only if the user says so. A file is judged without
a lock. A process may use it after that, so it is judged once more before it is removed; meanwhile
the removal keeps every process from attaching it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from enum import StrEnum
from typing import Final

import msgspec

from shmepoch import _native as at
from shmepoch.epoch.codec import Record
from shmepoch.epoch.operations import Count
from shmepoch.epoch.table import OperationTable
from shmepoch.errors import LayoutUnsupported, SegmentCorrupted, SegmentForeign
from shmepoch.ids import SessionId
from shmepoch.memory.clock import wall_ms
from shmepoch.memory.doorbells import doorbells_path, has_listeners, remove_unused_doorbells
from shmepoch.memory.files import SHM_DIR, is_provisional
from shmepoch.memory.namespaces import list_files, segment_name, session_of
from shmepoch.memory.removal import is_held, remove_leftover, remove_unused
from shmepoch.memory.segment import ObservedSegment
from shmepoch.monitoring.epochs import last_sign_of_life

#: A string: pathlib takes longer to join a path than the kernel takes to open it.
_SHM_DIR: Final = str(SHM_DIR)
_BLOCK: Final = 512  # what stat(2) counts a file's memory in
_UNITS: Final = ((86_400_000, "d"), (3_600_000, "h"), (60_000, "m"), (1000, "s"))


#: The options that choose more files.
OLDER_THAN: Final = "--older-than"
DAMAGED: Final = "--damaged"


class What(StrEnum):
    """The kinds of files in shared memory, as the user sees them."""

    IN_USE = "in use"
    """A process has it attached, listens on it or makes it."""
    SEALED = "sealed"
    """The segment of an epoch that its runtime has ended."""
    ABANDONED = "abandoned"
    """The segment of an open epoch, which a runtime may continue."""
    LEFTOVER = "leftover"
    """A file that was being made when its creator was killed."""
    DOORBELLS = "doorbells"
    """A page of doorbells on which no process listens."""
    DAMAGED = "damaged"
    """A segment that this release cannot read."""
    UNSAFE = "unsafe"
    """A file of this user that is not regular, or that others may open too."""
    OTHERS = "another user's"
    """A file of another user."""
    UNKNOWN = "unknown"
    """A file with a name that this release gives to no file."""


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """The files that a user wants removed, besides those that no process can need."""

    older_than_ms: int | None = None
    """Epochs without a sign of life for this long; None: no epoch is removed because of its age."""
    damaged: bool = False
    """Segments that this release cannot read."""


class Found(Record, kw_only=True, frozen=True):
    """A file in shared memory, and the judgement of it."""

    namespace: str
    name: str
    what: What
    remove: bool
    """Whether it is to be removed."""
    why: str
    """The rule for that, for people."""
    hint: str | None = None
    """The option of `shmepoch gc` with which it would be removed."""
    bytes: Count
    """The shared memory that it takes."""
    session_id: SessionId | None = None
    """The session of a segment."""
    alive_at_ms: Count | None = None
    """The last sign of life of a segment that no process has attached, in wall-clock milliseconds
    since the Unix epoch."""
    removed: bool = False
    problem: str | None = None
    """The reason why it could not be removed."""


class _Judgement(msgspec.Struct, frozen=True):
    what: What
    remove: bool
    why: str
    hint: str | None = None
    alive_at_ms: int | None = None


def find(namespace: str | None, wanted: Wanted) -> Iterator[Found]:
    """Every file of one namespace, or of all, in the order of their names. It changes nothing.

    Raises `OSError` where there is no shared memory, or no descriptor to be had."""
    files = sorted((found, entry.name) for found, entry in list_files(namespace))
    for found, name in files:
        try:
            file = os.lstat(_path(name))
            judgement = _judge(found, name, file, wanted)
        except FileNotFoundError:
            continue  # removed since
        yield Found(
            namespace=found,
            name=name,
            what=judgement.what,
            remove=judgement.remove,
            why=judgement.why,
            hint=judgement.hint,
            bytes=file.st_blocks * _BLOCK,
            session_id=session_of(name),
            alive_at_ms=judgement.alive_at_ms,
        )


def remove(found: Found, wanted: Wanted) -> Found:
    """Remove the files that are to be removed, unless a process has used one meanwhile. Returns
    the results."""
    try:
        removed = _remove(found, wanted)
    except OSError as error:
        return msgspec.structs.replace(found, problem=error.strerror or str(error))
    if removed:
        return msgspec.structs.replace(found, removed=True)
    why = "a process has used or removed it since it was looked at"
    return msgspec.structs.replace(found, remove=False, why=why, hint=None)


def _remove(found: Found, wanted: Wanted) -> bool:
    namespace, session_id = found.namespace, found.session_id
    if session_id is not None:
        return remove_unused(
            namespace, session_id, still=lambda: _unheld(namespace, session_id, wanted).remove
        )
    if found.what is What.DOORBELLS:
        return remove_unused_doorbells(namespace)
    return remove_leftover(_path(found.name))


def _path(name: str) -> str:
    return f"{_SHM_DIR}/{name}"


def _judge(namespace: str, name: str, file: os.stat_result, wanted: Wanted) -> _Judgement:
    if file.st_uid != os.geteuid():
        return _Judgement(What.OTHERS, False, f"it is of the user {file.st_uid}")
    try:
        session_id = session_of(name)
        if session_id is not None:
            return _judge_segment(namespace, session_id, wanted)
        if is_provisional(name):
            if is_held(_path(name)):
                return _Judgement(What.IN_USE, False, "a process makes it")
            return _Judgement(What.LEFTOVER, True, "the process that made it was killed")
        if name == doorbells_path(namespace).name:
            if has_listeners(namespace):
                return _Judgement(What.IN_USE, False, "a process listens on it")
            return _Judgement(What.DOORBELLS, True, "no process listens on it")
    except SegmentForeign as error:
        why = f"its {error.field} is {error.actual}, not {error.expected}"
        return _Judgement(What.UNSAFE, False, why)
    return _Judgement(What.UNKNOWN, False, "shmepoch gives such a name to no file")


def _judge_segment(namespace: str, session_id: SessionId, wanted: Wanted) -> _Judgement:
    if is_held(_path(segment_name(namespace, session_id))):
        return _Judgement(What.IN_USE, False, "a process has it attached")
    return _unheld(namespace, session_id, wanted)


def _unheld(namespace: str, session_id: SessionId, wanted: Wanted) -> _Judgement:
    """The judgement of a segment that no process has attached."""
    try:
        segment = ObservedSegment.peek(namespace, session_id)
        try:
            return _judge_epoch(segment, wanted)
        finally:
            segment.close()
    except SegmentCorrupted as error:
        why = f"its {error.field} is {error.actual!r}, not {error.expected!r}"
    except LayoutUnsupported as error:
        why = f"it has layout version {error.actual}, this release reads {error.expected}"
    return _Judgement(What.DAMAGED, wanted.damaged, why, None if wanted.damaged else DAMAGED)


def _judge_epoch(segment: ObservedSegment, wanted: Wanted) -> _Judgement:
    alive_at_ms = last_sign_of_life(segment, segment.participants.list())
    age_ms = wall_ms() - alive_at_ms
    least_ms = wanted.older_than_ms
    remove = least_ms is not None and age_ms >= least_ms
    seen = f"its last sign of life was {_length(age_ms)} ago"
    if segment.sealed:
        what, why = What.SEALED, "its runtime ended the epoch"
        if lacking := _lacking(segment):
            why += f"; completions that its store lacks: {lacking}; {seen}"
        else:
            remove = True
    else:
        what, why = What.ABANDONED, seen + _unfinished(segment)
    hint = None if remove or least_ms is not None else OLDER_THAN
    return _Judgement(what, remove, why, hint, alive_at_ms)


def _lacking(segment: ObservedSegment) -> int:
    """The number of completions that the epoch's store lacks, if a store is known. The next runtime
    takes them there. A store that never took a completion is not known."""
    memory, config = segment.memory, segment.layout.config
    durable = memory.load(at.DURABLE_AT)
    has_store = durable > 0 or (config is not None and config.store_wait_ms > 0)
    return max(0, memory.load(at.WATERMARK_AT) - durable) if has_store else 0


def _unfinished(segment: ObservedSegment) -> str:
    if segment.layout.config is None:
        return ""
    words = OperationTable(segment).words()
    count = words.registrations - (words.watermark - words.origin)
    return f"; unfinished operations: {count}" if count > 0 else ""


def _length(ms: int) -> str:
    """A length of time in its largest unit, rounded down, as `--older-than` takes it."""
    for size, unit in _UNITS:
        if ms >= size:
            return f"{ms // size}{unit}"
    return "0s"
