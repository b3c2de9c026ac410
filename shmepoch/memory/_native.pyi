"""Atomics, ring copies, futexes and record locks on mapped memory (see _native.c).

Offsets are bytes from the start of a Memory. One that is not word-aligned inside it raises
IndexError; a value outside 0..2**64-1 raises OverflowError, another type TypeError.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Generic, SupportsIndex, TypeVar, final

from _typeshed import FileDescriptorLike

from shmepoch.memory.layout import Ring

T = TypeVar("T")

@final
class Memory:
    # Mapped through a description of its own: it holds no lock of the descriptor's.
    def __new__(cls, fd: FileDescriptorLike, size: int) -> Memory: ...
    @classmethod
    def private(cls, size: int, /) -> Memory: ...
    # A copy takes its place, which no other process sees.
    def detach(self) -> None: ...
    # The file of `fd` takes its place, mapped through a description of its own.
    def reopen(self, fd: FileDescriptorLike, /) -> None: ...
    def __len__(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...
    def load(self, offset: int, /) -> int: ...
    def store(self, offset: int, value: int, /) -> None: ...
    def exchange(self, offset: int, value: int, /) -> int: ...
    def fetch_add(self, offset: int, delta: int, /) -> int: ...
    def fetch_or(self, offset: int, bits: int, /) -> int: ...
    def load_column(self, offset: int, count: int, stride: int, /) -> tuple[int, ...]: ...
    def snapshots(
        self, offset: int, count: int, stride: int, make: Callable[..., T], /
    ) -> _Snapshots[T]: ...
    # Of `count` words, those from `start` on; side by side unless they lie `stride` bytes apart.
    def find(
        self, offset: int, count: int, value: int, start: int, stride: int = ..., /
    ) -> int: ...
    def read(self, offset: int, length: int, /) -> bytes: ...
    def write(self, offset: int, data: bytes, /) -> None: ...
    def ring_put(self, ring: Ring, seq: int, position: int, data: bytes, tag: int, /) -> None: ...
    def ring_at(self, ring: Ring, seq: int, /) -> tuple[int, int, int]: ...
    def ring_gather(self, ring: Ring, first: int, last: int, /) -> tuple[int, bytes]: ...
    def wait_above(
        self, value: int, above: int, event: int, gate: int, timeout_ns: int | None, /
    ) -> bool: ...
    def wake(self, event: int, /) -> bool: ...
    def transitions(
        self,
        *,
        ring: Ring,
        state: int,
        origin: int,
        skipped: int,
        watermark: int,
        dropped: int,
        intent: int,
        registrations: int,
        collected: int,
        reclaimed: int,
        fingerprints: int,
        slots: int,
        slots_at: int,
        slot_size: int,
        birth: int,
        terminal_seq: int,
        id: int,
        participant: int,
        created_ms: int,
        created_mono: int,
        elapsed_ms: int,
        spec_length: int,
        detail_length: int,
        watchers: int,
        lanes: int,
        spec: int,
        detail: int,
        detail_limit: int,
        max_operations: int,
        max_completed: int,
    ) -> _Transitions: ...

@final
class _Snapshots(Generic[T]):
    def take(self) -> T: ...

@final
class _Transitions:  # under the writer lock; None: nothing was done, for it is not the common case
    def register(
        self,
        fingerprint: int,
        id: bytes,
        participant: int,
        created_ms: int,
        created_mono: int,
        spec: bytes,
        status: int,
        limit: int,
        /,
    ) -> int | None: ...  # the registration's number
    # Fingerprint, id and spec of several with different ids, in one commit; the first one's number.
    def register_all(
        self,
        entrants: tuple[tuple[int, bytes, bytes], ...],
        participant: int,
        created_ms: int,
        created_mono: int,
        status: int,
        limit: int,
        /,
    ) -> int | None: ...
    def start(
        self,
        fingerprint: int,
        id: bytes,
        status: int,
        started_status: int,
        started_ms: int,
        detail: bytes,
        /,
    ) -> bool | None: ...
    # The sequence it would have, its slot, birth, created_ms, created_mono and encoded detail.
    def look(
        self, fingerprint: int, id: bytes, statuses: int, /
    ) -> tuple[int, int, int, int, int, bytes] | None: ...
    def end(self, seq: int, slot: int, elapsed_ms: int, data: bytes, /) -> bool | None: ...
    # Slot, elapsed_ms and data of several with different slots, in one commit.
    def end_all(
        self, first: int, endings: tuple[tuple[int, int, bytes], ...], /
    ) -> bool | None: ...

@final
class Cell:
    def __new__(
        cls, memory: Memory, offset: int, gate: int, on_closed: Callable[[], BaseException]
    ) -> Cell: ...
    def load(self) -> int: ...
    def advance(self, value: SupportsIndex, /) -> bool: ...
    def compare_and_swap(self, expected: SupportsIndex, new: SupportsIndex, /) -> bool: ...

# The descriptor is closed with this object, or inside the call that raises. Once it is closed,
# `fileno` raises what the last `on_closed` made, or ValueError.
@final
class Descriptor:
    # OSError, as os.open has it.
    @classmethod
    def open(cls, path: str | Path, flags: int, mode: int = 0o600, /) -> Descriptor: ...
    # The descriptor of a file that now has the byte's lock, shared; its size, its first bytes, and
    # all of it as a Memory if that is asked for. None unless it has a name, this mode, this
    # process's user and so many bytes, and the lock was to be had.
    @classmethod
    def open_held(
        cls, path: str | Path, byte: int, mode: int, length: int, mapped: bool, /
    ) -> tuple[Descriptor, int, bytes, Memory | None] | None: ...
    def fileno(self) -> int: ...
    # Gives up every lock, unless it was the parent's: OSError if a child has to keep them, since
    # the memory could not be mapped anew.
    def close(self, on_closed: Callable[[], BaseException] | None = None, /) -> None: ...
    # Whether this one, which was closed, is now what `other` was, and `other` is closed.
    def take(self, other: Descriptor, /) -> bool: ...
    @property
    def closed(self) -> bool: ...
    # Closed in a forked child, since it was the parent's.
    @property
    def inherited(self) -> bool: ...

@final
class WriterLock:
    # `attend` is called without a lock where the descriptor is inherited, to have it take another;
    # and with the locks, twice a second at most, where its file has no name.
    def __new__(
        cls, fd: int | Descriptor, byte: int, attend: Callable[[], object] | None = None
    ) -> WriterLock: ...
    def __enter__(self) -> None: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None: ...
    # In a forked child: free, unless it is private memory's and this thread holds it.
    # Whether this thread held it.
    def after_fork(self) -> bool: ...
    # The lock as a context whose entry waits for nothing, and raises what `on_busy` makes where it
    # would have to: inside this thread's own transition, too.
    def if_free(
        self, on_busy: Callable[[], BaseException], /
    ) -> AbstractContextManager[None, None]: ...
    # Entries are refused from now on, those that wait included; whether no thread of this process
    # is inside by then. After False, and where a signal handler raises, `on_left` is called by the
    # last thread out. Called inside this thread's own transition it waits for nothing.
    def retire(
        self,
        on_closed: Callable[[], BaseException],
        timeout_ns: int | None = None,
        on_left: Callable[[], object] | None = None,
        /,
    ) -> bool: ...

def try_lock(fd: FileDescriptorLike, byte: int, shared: bool, /) -> bool: ...
def unlock(fd: FileDescriptorLike, byte: int, /) -> None: ...
def is_locked(fd: FileDescriptorLike, byte: int, /) -> bool: ...

# In a forked child: closes every descriptor that was the parent's; OSError as of `close`.
def leave_inherited() -> None: ...
