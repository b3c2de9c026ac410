"""Processes that are killed, or stopped, before the n-th word they change of an epoch."""

from __future__ import annotations

import os
import signal
import struct
import sys
import traceback
from collections.abc import Callable
from typing import Any, Final

from shmepoch.epoch.registry import RuntimeOpsLifecycleRegistry
from shmepoch.memory import layout as at
from shmepoch.memory._native import Memory
from shmepoch.memory.layout import Ring
from shmepoch.memory.participants import Role
from shmepoch.memory.segment import SharedSegment

_WORD: Final = struct.Struct("=Q")
_INDEX_WORDS: Final = 3


class DyingMemory:
    """A memory that calls `before` ahead of every change of a word.

    What the native module does in one call, but in several stores, is done here word by word first,
    so that a process can die with a record half written.
    """

    def __init__(self, memory: Memory, before: Callable[[str], None]) -> None:
        self._memory = memory
        self._before = before

    def __getattr__(self, name: str) -> Any:
        return getattr(self._memory, name)  # everything that only reads

    def __len__(self) -> int:
        return len(self._memory)

    def store(self, offset: int, value: int) -> None:
        self._before("store")
        self._memory.store(offset, value)

    def exchange(self, offset: int, value: int) -> int:
        self._before("exchange")
        return self._memory.exchange(offset, value)

    def fetch_add(self, offset: int, delta: int) -> int:
        self._before("fetch_add")
        return self._memory.fetch_add(offset, delta)

    def fetch_or(self, offset: int, bits: int) -> int:
        self._before("fetch_or")
        return self._memory.fetch_or(offset, bits)

    def wake(self, event: int) -> bool:
        self._before("wake")
        return self._memory.wake(event)

    def write(self, offset: int, data: bytes) -> None:
        for begin in range(0, len(data), at.WORD):
            self._before("write")
            self._memory.write(offset + begin, data[begin : begin + at.WORD])

    def ring_put(self, ring: Ring, seq: int, position: int, data: bytes, tag: int) -> None:
        index, capacity, begin, size = ring
        words = [data[at_ : at_ + at.WORD] for at_ in range(0, len(data), at.WORD)]
        for number, word in enumerate(words):
            self._before("ring_put")
            self._memory.write(begin + (position + number * at.WORD) % size, word)
        entry = index + seq % capacity * at.INDEX_SIZE
        whole = Memory.private(len(self._memory))
        whole.ring_put(ring, seq, position, data, tag)
        for word_at in range(entry, entry + _INDEX_WORDS * at.WORD, at.WORD):
            self._before("ring_put")
            self._memory.store(word_at, whole.load(word_at))


class Death:
    """Sends this process a signal before the n-th change of a word, or of one kind of change."""

    def __init__(self, n: int, *, kind: str | None = None, by: int = signal.SIGKILL) -> None:
        self._left = n
        self._kind = kind
        self._signal = by

    def __call__(self, kind: str) -> None:
        if self._kind in (None, kind):
            self._left -= 1
            if self._left == 0:
                os.kill(os.getpid(), self._signal)


def start(
    namespace: str,
    parent: SharedSegment,
    death: Death,
    act: Callable[[RuntimeOpsLifecycleRegistry], object],
) -> int:
    """The pid of a forked process that attaches to `parent`'s segment and acts on it.

    It exits with 0 if it lives through the act, and with 1 if the act raises.
    """

    def act_dying(segment: SharedSegment) -> None:
        memory: Any = DyingMemory(segment.memory, death)
        segment.waiters._memory = memory
        segment.waiters._waits._memory = memory  # type: ignore[attr-defined]
        segment.memory = memory  # type: ignore[misc]
        act(RuntimeOpsLifecycleRegistry(segment))

    return attached(namespace, parent, act_dying)


def attached(namespace: str, parent: SharedSegment, act: Callable[[SharedSegment], object]) -> int:
    """The pid of a forked process that attaches to `parent`'s segment for itself and acts on it."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        segment = SharedSegment.attach(namespace, parent.session_id)
        segment.join(Role.WORKER)
        act(segment)
        status = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


def survived(pid: int) -> bool:
    """Whether a process lived through its act, rather than being killed in it."""
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, -signal.SIGKILL), f"the act itself failed: {code}"
    return code == 0
