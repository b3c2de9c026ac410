"""The memory of an epoch: atomics, locks, waits, and each transition once (see native/).

Offsets are bytes from the start of a Memory. One that is not word-aligned inside it raises
IndexError; a value outside 0..2**64-1 raises OverflowError, another type TypeError.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Final, Generic, Self, SupportsIndex, TypedDict, TypeVar, final, overload

from _typeshed import FileDescriptorLike

T = TypeVar("T")
Id = TypeVar("Id", bound=Identifier)

# --- identifier.c ---

class Identifier:
    # TypeError unless `raw` is bytes, ValueError unless there are sixteen.
    def __new__(cls, raw: bytes, /) -> Self: ...
    @classmethod
    def from_bytes(cls, raw: bytes, /) -> Self: ...
    @property
    def bytes(self) -> bytes: ...
    # The random half of a UUID v7 as a number; never 0.
    @property
    def fingerprint(self) -> int: ...
    # Compares with identifiers of exactly the same class only.
    def __hash__(self) -> int: ...
    def __eq__(self, other: object, /) -> bool: ...
    def __lt__(self, other: Self, /) -> bool: ...
    def __le__(self, other: Self, /) -> bool: ...
    def __gt__(self, other: Self, /) -> bool: ...
    def __ge__(self, other: Self, /) -> bool: ...

# The hooks of an encoder and a decoder: to an identifier's bytes and back. Numbers of other types
# become plain ones; NotImplementedError for anything else.
@overload
def encode(value: Identifier, /) -> bytes: ...
@overload
def encode(value: object, /) -> bytes | int | float: ...
def decode(kind: type[Id], raw: bytes, /) -> Id: ...

# --- memory.c and wait.c ---

@final
class Memory:
    # Mapped through a description of its own, so it does not hold the descriptor's locks.
    def __new__(cls, fd: FileDescriptorLike, size: int) -> Memory: ...
    @classmethod
    def private(cls, size: int, /) -> Memory: ...
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
    # Searches `count` words from index `start` on; they are adjacent, or `stride` bytes apart.
    def find(
        self, offset: int, count: int, value: int, start: int, stride: int = ..., /
    ) -> int: ...
    def read(self, offset: int, length: int, /) -> bytes: ...
    def write(self, offset: int, data: bytes, /) -> None: ...
    def wait_above(
        self, value: int, above: int, event: int, closed_flag: int, timeout_ns: int | None, /
    ) -> bool: ...
    def wake(self, event: int, /) -> bool: ...

# --- cursor.c ---

# Made by Memory.snapshots only.
@final
class _Snapshots(Generic[T]):
    # Calls `make` with the words as they stand at one instant. Returns the last result while they
    # stay the same.
    def take(self) -> T: ...

@final
class Cell:
    def __new__(
        cls, memory: Memory, offset: int, closed_flag: int, on_closed: Callable[[], BaseException]
    ) -> Cell: ...
    def load(self) -> int: ...
    def advance(self, value: SupportsIndex, /) -> bool: ...
    def compare_and_swap(self, expected: SupportsIndex, new: SupportsIndex, /) -> bool: ...

# --- descriptor.c ---

# The descriptor is closed with this object, or inside the call that raises. Once it is closed,
# `fileno` raises what the last `on_closed` made, or ValueError.
@final
class Descriptor:
    # OSError, as os.open has it.
    @classmethod
    def open(cls, path: str | Path, flags: int, mode: int = 0o600, /) -> Descriptor: ...
    # Opens a file and takes the byte's shared lock: the descriptor, its size, its first bytes, and
    # all of it as a Memory if `mapped`. None if the lock was held, or the file has no name, another
    # mode, another user than this process, or fewer bytes.
    @classmethod
    def open_held(
        cls, path: str | Path, byte: int, mode: int, length: int, mapped: bool, /
    ) -> tuple[Descriptor, int, bytes, Memory | None] | None: ...
    def fileno(self) -> int: ...
    # Releases every lock, unless it was the parent's. OSError if a child keeps the parent's locks,
    # since the memory could not be mapped again.
    def close(self, on_closed: Callable[[], BaseException] | None = None, /) -> None: ...
    # Takes over the descriptor of `other`, and closes `other`; whether it did. This one must be
    # closed.
    def take(self, other: Descriptor, /) -> bool: ...
    @property
    def closed(self) -> bool: ...
    # Closed in a forked child, since it was the parent's.
    @property
    def inherited(self) -> bool: ...

# Gives a file the name `target` instead of `source`, in one step; FileExistsError if that is taken.
def rename_new(source: str | Path, target: str | Path, /) -> None: ...

# In a forked child: closes every descriptor that was the parent's; OSError as of `close`.
def leave_inherited() -> None: ...

# --- locks.c ---

def try_lock(fd: FileDescriptorLike, byte: int, shared: bool, /) -> bool: ...
def unlock(fd: FileDescriptorLike, byte: int, /) -> None: ...
def is_locked(fd: FileDescriptorLike, byte: int, /) -> bool: ...

@final
class WriterLock:
    # The key of the participant whose lock it is; 0 for none.
    participant: int
    # `attend` is called without a lock: if the descriptor is inherited, so that it takes another
    # one; and at most twice a second if its file has no name.
    def __new__(
        cls,
        descriptor: Descriptor | None = None,
        byte: int = ...,
        attend: Callable[[], object] | None = None,
    ) -> WriterLock: ...
    # In a forked child: free, since the thread that held it is not there.
    def after_fork(self) -> None: ...
    # Refuses every later attempt, also of those that wait now, and waits until no thread is inside.
    def retire(self, on_closed: Callable[[], BaseException], /) -> None: ...

# --- epoch.c and reading.c ---

# (reason, field, index, least, most, actual): why a transition or a read was refused. A refused
# transition has changed nothing. The reasons, and what the facts say:
#
#   corrupt             a field, of a slot or a sequence if the index is not -1, and its bounds
#   ended               the epoch takes no more changes
#   read_only           there is no lock: an observer's, or a copy
#   busy                the lock is held, and the caller does not wait
#   already_registered  index: which of the operations
#   limit               actual: how many have not ended
#   not_found           index
#   has_ended           index; actual: the sequence that ended it
#   wrong_status        index; actual: the number of its status
#   twice               index: which of the operations repeats an earlier one
#   changed             the state that the change was based on has changed
#   too_large           actual: the size of the records; index: how many they are
#   store_behind        actual: the sequence that a store must have first
#   dropped             it has ended, and its entry is gone
class Refused(Exception):
    args: tuple[str, str, int, int, int, int]

@final
class Epoch:
    def __new__(
        cls,
        memory: Memory,
        lock: WriterLock | None,
        max_completed: int,
        max_concurrent: int,
        max_operations: int,
        feed_bytes: int,
        max_participants: int,
        store_wait_ms: int,
    ) -> Epoch: ...

    # --- transitions; each takes the writer lock ---

    # Registers operations, each (id, head, rest); returns the number of the first.
    def register(
        self,
        entrants: tuple[tuple[Identifier, bytes, bytes], ...],
        created_at_ms: int,
        created_mono_ns: int,
        /,
    ) -> int: ...
    def start(self, ids: tuple[Identifier, ...], now_ms: int, /) -> None: ...
    # Changes an operation whose status is among `statuses`, as bits: its status unless `target` is
    # 0, and its detail unless that is None. The detail was made when the slot's word was `word`.
    def change(
        self, id: Identifier, statuses: int, target: int, word: int, detail: bytes | None, /
    ) -> None: ...
    # Ends operations, each (id, outcome); returns the sequence of the first.
    def end(
        self,
        endings: tuple[tuple[Identifier, bytes], ...],
        statuses: int,
        now_ms: int,
        now_ns: int,
        waits_for_store: bool,
        /,
    ) -> int: ...
    # Ends the operations of these participants, or of all; returns how many. Removes the watchers
    # of the dead.
    def terminate(
        self,
        outcome: bytes,
        participants: tuple[int, ...] | None,
        dead: tuple[int, ...],
        now_ms: int,
        now_ns: int,
        waits_for_store: bool,
        seal: bool,
        wait: bool,
        /,
    ) -> int: ...
    def seal(self) -> None: ...
    # Refused as changed if others were collected since `collected`.
    def collect(self, collected: int, through: int, /) -> None: ...
    # Counts one more watcher of an operation; returns (slot, birth, watermark).
    def watch(self, id: Identifier, /) -> tuple[int, int, int]: ...
    # One more watcher of each that has not ended, or one less of each; returns which were counted.
    def watch_each(
        self, places: tuple[tuple[int, int], ...], more: bool, /
    ) -> tuple[bool, ...]: ...
    # Private memory like this at one moment, after a repair.
    def copy(self) -> Memory: ...
    # Only into a fresh epoch that no other process has found. Each record is
    # (seq, birth, created_at_ms, started, completed_at_ms, elapsed_ms, id, head, outcome, rest,
    # detail).
    def restore(
        self,
        records: tuple[
            tuple[int, int, int, int, int, int, Identifier, bytes, bytes, bytes, bytes],
            ...,
        ],
        dropped: int,
        last: int,
        skipped_after: int,
        /,
    ) -> None: ...

    # --- reading; no lock. `started` is 1 + a time in milliseconds, or 0 ---

    # (registrations, watermark, origin, skipped_after, skipped_through, dropped, collected, floor)
    def words(self) -> tuple[int, int, int, int, int, int, int, int]: ...
    def active(self) -> int: ...
    # (slot, 0), or (-1, seq) of one that has ended.
    def find(self, id: Identifier, /) -> tuple[int, int] | None: ...
    def used(self) -> list[int]: ...
    # (word, birth, terminal_seq, id, participant, created_at_ms, created_mono_ns, started,
    # head, rest, detail, watchers)
    def slot(
        self, index: int, /
    ) -> tuple[int, int, int, bytes, int, int, int, int, bytes, bytes, bytes, int] | None: ...
    # (birth, created_at_ms, started, completed_at_ms, elapsed_ms, id, head, outcome, rest, detail)
    def record(
        self, seq: int, /
    ) -> tuple[int, int, int, int, int, bytes, bytes, bytes, bytes, bytes] | None: ...
    # (watermark, dropped_through, entries), the entries as one MessagePack array. The template has
    # the bytes of an entry before its sequence, its id, its head, its outcome and its time.
    def list_since(
        self, after: int, template: tuple[bytes, bytes, bytes, bytes, bytes], /
    ) -> tuple[int, int, bytes | None]: ...
    # The outcome of the operation that was registered as `birth`, or None while it has not ended;
    # `since` is a watermark at which it had not ended.
    def outcome(self, slot: int, birth: int, since: int, /) -> bytes | None: ...

# --- layout.h ---

class Parts(TypedDict):
    participants: int
    fingerprints: int
    retained: int
    retained_count: int
    index: int
    index_count: int
    slots: int
    slot_size: int
    records: int
    size: int

# Where the parts of a segment lie. ValueError where no segment has these capacities.
def layout(
    max_completed: int, max_operations: int, feed_bytes: int, max_participants: int, /
) -> Parts: ...

WORD: Final[int]
LINE: Final[int]
PAGE: Final[int]
VERSION: Final[int]
OPEN: Final[int]
SEALED: Final[int]
GONE: Final[int]
MAGIC_AT: Final[int]
VERSION_AT: Final[int]
SIZE_AT: Final[int]
STATE_AT: Final[int]
EPOCH_ID_AT: Final[int]
SESSION_ID_AT: Final[int]
WITNESS_AT: Final[int]
CAPACITIES_AT: Final[int]
CAPACITIES: Final[int]
ORIGIN_AT: Final[int]
CREATED_AT: Final[int]
SKIPPED_AT: Final[int]
CHECKSUM_AT: Final[int]
HEADER_SIZE: Final[int]
ID_SIZE: Final[int]
CURSORS_AT: Final[int]
CURSORS: Final[int]
WATERMARK_AT: Final[int]
EVENT_AT: Final[int]
DOORBELLS_AT: Final[int]
DROPPED_AT: Final[int]
INTENT_AT: Final[int]
REGISTRATIONS_AT: Final[int]
COLLECTED_AT: Final[int]
KEPT_AT: Final[int]
HEAD_AT: Final[int]
JOINED_AT: Final[int]
DURABLE_AT: Final[int]
REPAIRS_AT: Final[int]
PARTICIPANTS_AT: Final[int]
PARTICIPANT_SIZE: Final[int]
PARTICIPANT_PID: Final[int]
PARTICIPANT_JOINED: Final[int]
SLOT_WORD: Final[int]
SLOT_BIRTH: Final[int]
SLOT_TERMINAL_SEQ: Final[int]
SLOT_ID: Final[int]
SLOT_PARTICIPANT: Final[int]
SLOT_CREATED_MS: Final[int]
SLOT_CREATED_MONO: Final[int]
SLOT_STARTED: Final[int]
SLOT_POSITION: Final[int]
SLOT_SPEC_LENGTHS: Final[int]
SLOT_DETAIL_LENGTH: Final[int]
SLOT_SPEC: Final[int]
SLOT_DETAIL: Final[int]
SLOT_WATCHERS: Final[int]
SPEC_LIMIT: Final[int]
DETAIL_LIMIT: Final[int]
RECORD_SIZE: Final[int]
HAS_RECORD: Final[int]
STATUS_MASK: Final[int]
RECORD_LENGTHS: Final[int]
RECORD_CHECKSUMS: Final[int]
HEAD_LIMIT: Final[int]
MAX_PARTICIPANTS: Final[int]
MIN_FEED_ENTRIES: Final[int]
RECOVERY_SKIP: Final[int]
WRITER_BYTE: Final[int]
RUNTIME_BYTE: Final[int]
PRESENCE_BYTE: Final[int]
AGENT_BYTE: Final[int]
LOOP_BYTE: Final[int]
PARTICIPANT_BYTE: Final[int]
MAGIC: Final[int]
