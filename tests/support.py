"""Helpers of several tests: waiting, inspecting shared memory, making operations."""

from __future__ import annotations

import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from shmepoch import _native as at
from shmepoch._native import Descriptor, is_locked, try_lock
from shmepoch.epoch.operations import OperationKind, OperationResult, OperationSpec
from shmepoch.ids import OperationId
from shmepoch.memory.files import SHM_DIR
from shmepoch.memory.segment import Segment, SharedSegment

T = TypeVar("T")


def eventually(look: Callable[[], T | None], *, within: float = 20.0) -> T:
    """The first true answer of `look`; fails when there is none by the deadline."""
    deadline = time.monotonic() + within
    while not (answer := look()):
        assert time.monotonic() < deadline, f"not within {within} s: {look}"
        time.sleep(0.002)
    return answer


def forked(act: Callable[[], object]) -> int:
    """Call `act` in a forked child; returns its exit code: 0, 1 if it raises, or that of an
    alarm."""
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(20)
        try:
            act()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def in_a_child(act: Callable[[], object]) -> None:
    """Call `act` in a forked child, which must succeed."""
    assert forked(act) == 0


def segments_in(namespace: str) -> list[Path]:
    """The files of the namespace in shared memory."""
    return sorted(SHM_DIR.glob(f"shmepoch.{namespace}.*"))


def names_in(namespace: str) -> list[str]:
    """The names of the namespace's files in shared memory."""
    return [path.name for path in segments_in(namespace)]


def mappings(segment: SharedSegment) -> int:
    """How many times this process has the segment mapped."""
    return Path("/proc/self/maps").read_text().count(segment.name)


def empty_shared_memory(namespace: str) -> None:
    """Remove the namespace's files in shared memory, like a crash of the machine."""
    for path in segments_in(namespace):
        path.unlink(missing_ok=True)  # a listener may publish its page of doorbells meanwhile


def spec(
    name: str = "work",
    *,
    kind: OperationKind = OperationKind.BACKGROUND_TOOL_OP,
    id: OperationId | None = None,
) -> OperationSpec:
    """The spec of a fresh operation, owned by the session that it is registered with."""
    return OperationSpec(
        id=id or OperationId.new(),
        kind=kind,
        display_name=name,
        source_label="test",
    )


def damage_record(segment: Segment, seq: int) -> None:
    """Overwrite a word of a record, so that its checksum does not match."""
    position = segment.memory.load(segment.layout.index_word(seq)) & ~1
    word = (position + at.RECORD_SIZE) % segment.layout.feed_bytes
    segment.memory.store(segment.layout.records + word, 2**63)


def result(id: OperationId, content: str = "done") -> OperationResult:
    """A result for an operation."""
    return OperationResult(id=id, content=content, duration_ms=1)


@contextmanager
def held_writer(segment: SharedSegment) -> Iterator[None]:
    """Hold an epoch's writer lock, like another process that is stopped in a transition."""
    descriptor = Descriptor.open(segment.path, os.O_RDWR)
    try:
        eventually(lambda: try_lock(descriptor, at.WRITER_BYTE, False))
        yield
    finally:
        descriptor.close()


def is_free(segment: SharedSegment) -> bool:
    """Whether the writer lock could be taken without waiting."""
    return not is_locked(segment.fd, at.WRITER_BYTE)
