"""A small epoch in private memory, whose every byte the tests know."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

from shmepoch import _native as at
from shmepoch._native import Epoch, Identifier, Memory, WriterLock

TOP: Final = 2**64 - 1
#: Every status that an operation may have before it has ended.
LIVE: Final = 0b1110


class Room(NamedTuple):
    """The capacities of an epoch, in the order in which it takes them."""

    max_completed: int = 3
    max_concurrent: int = 0
    max_operations: int = 4
    feed_bytes: int = 1024
    max_participants: int = 2
    store_wait_ms: int = 0

    @property
    def parts(self) -> at.Parts:
        """The offsets of its parts."""
        return at.layout(
            self.max_completed, self.max_operations, self.feed_bytes, self.max_participants
        )


class Id(Identifier):
    """An identifier made from a number."""

    @classmethod
    def of(cls, number: int) -> Id:
        return cls(number.to_bytes(8, "big") * 2)


def head(id: Identifier, length: int = 48) -> bytes:
    """The head of an operation's spec: any bytes, for the native module."""
    return (id.bytes * (length // len(id.bytes) + 1))[:length]


#: The bytes before each value of an entry.
TEMPLATE: Final = (b"<seq>", b"<id>", b"<head>", b"<outcome>", b"<time>")


def entry(seq: int, id: Identifier, head: bytes, outcome: bytes, now_ms: int) -> bytes:
    """The entry that the native module makes of these values with that template."""
    values = (seq.to_bytes(8, "big"), id.bytes, head, outcome, now_ms.to_bytes(8, "big"))
    return b"".join(part + value for part, value in zip(TEMPLATE, values, strict=True))


def array(entries: Iterable[bytes]) -> bytes:
    """Entries as `list_since` returns them."""
    all = list(entries)
    return b"\xdd" + len(all).to_bytes(4, "big") + b"".join(all)


class Private:
    """An epoch with its memory and its lock."""

    def __init__(self, room: Room | None = None, *, memory: Memory | None = None) -> None:
        self.room: Final = room or Room()
        self.parts: Final = self.room.parts
        self.memory: Final = memory or Memory.private(self.parts["size"])
        self.lock: Final = WriterLock()
        self.epoch: Final = Epoch(self.memory, self.lock, *self.room)

    def register(self, number: int, *, length: int = 48, rest: bytes = b"") -> Id:
        """Register the operation of a number."""
        id = Id.of(number)
        self.epoch.register(((id, head(id, length), rest),), 1, 1_000_000)
        return id

    def put(self, number: int, outcome: bytes, *, length: int = 48, rest: bytes = b"") -> bytes:
        """Register and end the operation of a number; returns its entry."""
        id = self.register(number, length=length, rest=rest)
        seq = self.epoch.end(((id, outcome),), LIVE, 5, 9_000_000, False)
        return entry(seq, id, head(id, length), outcome, 5)

    def list_since(self, after: int) -> tuple[int, int, bytes | None]:
        """The feed's entries above a sequence."""
        return self.epoch.list_since(after, TEMPLATE)

    def recorded(self, seq: int) -> bytes | None:
        """The entry that a sequence's record makes."""
        record = self.epoch.record(seq)
        if record is None:
            return None
        _, _, _, completed_at_ms, _, raw, head, outcome, _, _ = record
        return entry(seq, Id(raw), head, outcome, completed_at_ms)

    def image(self) -> bytes:
        """The content of its memory."""
        return bytes(self.memory)
